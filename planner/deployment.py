"""One deployable choice (model, cluster, engine, layout, limits) and what a simulation of it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from planner.cost import StepCost
from planner.economics import gpu_hour, usd_per_mtok
from planner.engine import Engine, Limits
from planner.epochs import EpochTimer
from planner.errors import DoesNotFit, InputError, LayoutError, WorkloadError
from planner.experts import AS_SERVED, ExpertSettings
from planner.expertsteps import ExpertSteps, expert_steps
from planner.hardware import Cluster
from planner.layout import Layout, check_layout
from planner.memory import Ledger, MemoryUse
from planner.metrics import Summary
from planner.model import ModelConfig
from planner.offload import Offload, offload
from planner.residency import Tiers, tiers_of
from planner.simulation import EngineSpec, Simulation, simulate
from planner.timer import CostTimer, step_timer
from planner.units import format_bytes
from planner.workload import Slo, Workload

MAX_SIMULATED_REPLICAS = 2
MAX_SIMULATED_RANKS = 16
"""Replicas are alike and share the load evenly, so plans simulate at most this many, at their share of the load."""


MAX_LIMIT = 131_072
MIN_REQUESTS = 1000
"""Requests below which a p95 means little."""
UNSUSTAINED = "stability (the queue grows)"
_UNSTABLE_RATIO = 1.01
"""Reported where a run fails without missing a numeric objective."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model cut by `layout` on `cluster` under `engine`; `memory` is the ledger of its tightest GPU.

    `backend` is how ranks meet at the experts: `all_reduce` (every rank has all tokens), or between attention-DP
    ranks `allgather_reducescatter` or `deepep`.
    """

    model: ModelConfig
    cluster: Cluster
    engine: Engine
    layout: Layout
    limits: Limits
    backend: str
    memory: MemoryUse
    experts: ExpertSettings = AS_SERVED
    offload: Offload | None = None

    @property
    def name(self) -> str:
        """Layout with everything that distinguishes it from its neighbours."""
        parts = [str(self.layout), f"{self.limits.max_num_seqs} seqs", f"{self.limits.max_batched_tokens} tok/step"]
        parts += ["DeepEP"] if self.backend == "deepep" else []
        parts += [f"{self.experts.placement} placement"] if self.experts.placement != "contiguous" else []
        if self.offload is not None:
            held = self.offload.held
            parts += [f"{held.resident} of {held.num_experts} experts in HBM ({self.offload.residency.policy})"]
        parts += [f"{self.model.kv_format} KV"] if self.model.kv_format != "bf16" else []
        return ", ".join(parts)

    @property
    def usd_per_hour(self) -> float | None:
        """Rent of all GPUs, None when the price is unknown."""
        price = gpu_hour(self.cluster.system)
        return price.usd * self.layout.num_gpus if price else None

    def cost(self) -> StepCost:
        """Step times of this deployment."""
        return StepCost(self.model, self.layout, self.cluster, self.engine, self.backend, self.experts, self.offload)

    def spec(self, replicas: int) -> EngineSpec:
        """What the simulator must know of `replicas` copies.

        A pipeline keeps one batch per stage in flight, so a replica is `pp` scheduler slots that share its KV pool.
        """
        layout = self.layout
        return EngineSpec(
            num_groups=replicas * layout.pp,
            ranks_per_group=layout.attention_dp,
            kv_tokens_per_rank=self.memory.kv_tokens // layout.pp,
            block_tokens=self.engine.block_tokens,
            max_num_seqs=max(1, self.limits.max_num_seqs // layout.pp),
            max_batched_tokens=self.limits.max_batched_tokens,
            policy=self.engine.policy,
            admission_reserve=self.engine.admission_reserve,
            groups_per_link=max(1, self.experts.gpus_per_root // layout.replica_gpus) if self.offload else 0,
        )


def deploy(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    engine: Engine,
    limits: Limits,
    backend: str,
    context_tokens: int,
    experts: ExpertSettings = AS_SERVED,
) -> Deployment:
    """A checked deployment. LayoutError if the layout is invalid or too large, DoesNotFit if memory is short."""
    check_layout(model, layout)
    if limits.max_num_seqs > MAX_LIMIT or limits.max_batched_tokens > MAX_LIMIT:
        raise InputError(f"{limits}: engines run at most {MAX_LIMIT:,} sequences or tokens per step and rank")
    if layout.num_gpus > cluster.num_gpus:
        raise LayoutError(f"{layout} needs {layout.num_gpus} GPUs, {cluster.name} has {cluster.num_gpus}")
    if layout.tp > cluster.scale_up_gpus:
        raise LayoutError(
            f"tp={layout.tp} leaves the scale-up domain of {cluster.scale_up_gpus} GPUs. "
            f"Use tp <= {cluster.scale_up_gpus} with pp or attention_dp for the rest."
        )
    if engine.expert_parallel == "all_or_none" and layout.ep not in (1, layout.stage_gpus):
        raise LayoutError(
            f"{engine.name} spreads experts over one or all GPUs of a stage: use ep=1 or ep={layout.stage_gpus}, "
            "or an engine with free ep (--engine sglang)."
        )
    if backend == "deepep" and (layout.ep == 1 or layout.moe_tp > 1):
        raise LayoutError(f"{layout}: DeepEP needs whole experts on every rank. Use ep={layout.stage_gpus}.")
    ledger = Ledger(model, cluster.system, engine)
    memory, away = ledger.use(layout, limits, backend, context_tokens), None
    if experts.residency is not None:
        away = _offload(model, cluster, layout, limits, memory, context_tokens, experts)
        memory = ledger.use(layout, limits, backend, context_tokens, away.resident_share)
    if not memory.fits:
        raise DoesNotFit(
            f"{model.name} as {layout} does not fit {cluster.name}: {format_bytes(memory.needed_bytes)} before KV "
            f"cache, {engine.name} may use {format_bytes(memory.budget_bytes)} of "
            f"{format_bytes(memory.capacity_bytes)} per GPU; {memory.breaking_term} breaks it",
            ["fewer tokens per step (--max-batched-tokens)", "a lower precision (--weights)", "more GPUs per replica"],
        )
    return Deployment(model, cluster, engine, layout, limits, backend, memory, experts, away)


def _offload(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    limits: Limits,
    memory: MemoryUse,
    context_tokens: int,
    experts: ExpertSettings,
) -> Offload:
    """As many experts in HBM as fit beside the caches of all sequences that may run, the others behind it.

    LayoutError where experts or attention are spread over ranks, DoesNotFit when HBM or the tiers are too small.
    """
    residency = experts.residency
    assert residency is not None
    # Replicas on one node keep their experts apart: no engine shares pinned host memory between servers.
    per_node = max(1, min(layout.replicas, cluster.gpus_per_node // layout.replica_gpus))
    dram = cluster.system.host_dram_bytes if experts.dram_bytes is None else experts.dram_bytes
    if layout.ep > 1 or layout.attention_dp > 1 or layout.pp > 1:
        raise LayoutError(
            f"{layout}: experts outside HBM are modelled where every GPU holds a slice of each. "
            f"Use tp={layout.replica_gpus} alone."
        )
    wanted = limits.max_num_seqs * context_tokens * memory.kv_bytes_per_token
    free = layout.tp * (memory.budget_bytes - (memory.needed_bytes - memory.terms["experts"]) - wanted)
    if free < 0:
        raise DoesNotFit(
            f"{model.name} as {layout} does not fit {cluster.name} even without its experts: "
            f"{format_bytes(-free / layout.tp)} per GPU are missing for {limits.max_num_seqs} sequences of "
            f"{context_tokens:,} tokens",
            ["fewer sequences at once (--max-num-seqs)", "fewer tokens per step", "a lower precision (--weights)"],
        )

    def tiers(hbm_bytes: float) -> Tiers:
        return tiers_of(
            cluster.system,
            hbm_bytes,
            num_gpus=layout.tp,
            dram_bytes=None if dram is None else dram / per_node,
            nvme_bytes=experts.nvme_bytes / per_node,
            gpus_per_root=experts.gpus_per_root,
        )

    return offload(model, residency, free, tiers, experts.skew)


@dataclass(frozen=True)
class Run:
    """A simulated deployment: what its users see and what it costs.

    `worst_ratio` is the largest measured objective over its limit (1 or less meets the SLO); throughput and price
    count all replicas, also those that were not simulated. `expert_steps` is None for dense models.
    """

    deployment: Deployment
    workload: Workload
    slo: Slo | None
    summary: Summary
    simulation: Simulation
    worst_objective: str
    worst_ratio: float
    output_tok_per_s: float
    usd_per_mtok_output: float | None
    expert_steps: ExpertSteps | None
    num_rebalances: int
    rebalance_stall_s: float
    rebalance_moved_bytes: float

    @property
    def meets_slo(self) -> bool:
        """True when every objective holds and the queue does not grow."""
        return self.worst_ratio <= 1.0

    @property
    def num_gpus(self) -> int:
        """GPUs of all replicas."""
        return self.deployment.layout.num_gpus


def run(
    deployment: Deployment,
    workload: Workload,
    slo: Slo | None = None,
    *,
    seed: int = 0,
    max_replicas: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Run:
    """Simulate `deployment` under `workload` and judge it against `slo`.

    `max_replicas` replicas at most are simulated, at their share of the load; two, or one of many ranks, by default.
    """
    check_context(deployment.model, workload)
    replicas = min(deployment.layout.replicas, max_replicas or simulated_replicas(deployment.layout))
    users = workload.arrivals.concurrency
    replicas = min(replicas, users) if users else replicas
    share = replicas / deployment.layout.replicas
    timer = _timer(deployment, replicas)
    offered = scaled(workload, share)
    if share < 1:
        offered = offered.with_num_requests(
            min(workload.num_requests, max(MIN_REQUESTS, int(workload.num_requests * share)))
        )
    simulation = simulate(deployment.spec(replicas), timer, offered, seed=seed, progress=progress)
    if simulation.num_rejected == len(simulation.requests):
        raise DoesNotFit(f"no request was served: {simulation.rejection_reason}", ["a larger KV cache (more GPUs)"])
    share = offered.arrivals.concurrency / users if users else share
    summary = simulation.summary(slo)
    objective, ratio = _worst(summary)
    tok_per_s = summary.output_tok_per_s / share
    price = gpu_hour(deployment.cluster.system)
    usd = usd_per_mtok(price.usd, deployment.layout.num_gpus, tok_per_s) if price and tok_per_s > 0 else None
    drawn = expert_steps(timer.loads, timer.misses, simulation.steps) if timer.loads else None
    pauses = (0, 0.0, 0.0)
    if isinstance(timer, EpochTimer):
        pauses = (timer.num_rebalances, timer.stalled_s, timer.moved_bytes)
    return Run(deployment, workload, slo, summary, simulation, objective, ratio, tok_per_s, usd, drawn, *pauses)


def _timer(deployment: Deployment, replicas: int) -> CostTimer | EpochTimer:
    """Step times; with epochs where traffic drifts or experts are placed anew."""
    cost, experts = deployment.cost(), deployment.experts
    timer = step_timer(cost, deployment.limits)
    if deployment.model.moe is None or not (experts.drift or experts.rebalance_steps):
        return timer
    return EpochTimer(timer, cost, replicas * deployment.layout.pp)


def check_context(model: ModelConfig, workload: Workload) -> None:
    """WorkloadError when lengths that were stated one by one, or the mean of a distribution, exceed the context."""
    stated = workload.prompt.kind not in ("uniform", "lognormal")
    tokens = workload.max_prompt_tokens + workload.max_output_tokens
    if not stated:
        tokens = int(workload.mean_prompt_tokens + workload.mean_output_tokens)
    if 0 < model.max_context < tokens and not any(layer.stack == "encoder" for layer in model.layers):
        raise WorkloadError(
            f"{workload.name}: {tokens:,} tokens of prompt and answer exceed the {model.max_context:,} that "
            f"{model.name} was built for. Shorten or drop those requests."
        )


def simulated_replicas(layout: Layout) -> int:
    """How many of a layout's replicas a plan simulates."""
    wanted = max(1, min(MAX_SIMULATED_REPLICAS, MAX_SIMULATED_RANKS // (layout.attention_dp * layout.pp)))
    return min(layout.replicas, wanted)


def scaled(workload: Workload, factor: float) -> Workload:
    """`workload` with its rate or its number of users multiplied by `factor`."""
    if factor == 1.0:
        return workload
    if workload.arrivals.concurrency:
        return workload.with_concurrency(max(1, round(workload.arrivals.concurrency * factor)))
    return workload.with_rate(workload.arrivals.rate_per_s * factor)


def with_replicas(layout: Layout, replicas: int) -> Layout:
    """`layout` with another number of replicas."""
    return replace(layout, replicas=replicas)


def _worst(summary: Summary) -> tuple[str, float]:
    """The objective closest to (or furthest over) its limit; rejected requests or a growing queue are a miss.

    When the queue grows, latencies only tell how long the run was: the miss is named, the ratio only orders runs.
    """
    worst = ("none", 0.0)
    for result in summary.objectives:
        ratio = result.value_s / result.objective.limit_s
        if ratio > worst[1]:  # no gap between tokens (one-token answers) leaves nothing to promise: NaN
            worst = (f"{result.objective.metric.upper()} {result.objective.statistic}", ratio)
    if summary.saturation == "overloaded":
        return (UNSUSTAINED, max(worst[1], _UNSTABLE_RATIO))
    if worst[1] <= 1.0 and summary.num_rejected:
        return ("requests larger than the KV pool", _UNSTABLE_RATIO)
    return worst


def simulate_layout(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    workload: Workload,
    engine: Engine,
    slo: Slo | None = None,
    *,
    limits: Limits,
    backend: str,
    experts: ExpertSettings = AS_SERVED,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Run:
    """Deploy and simulate one layout, all replicas of it."""
    context = int(workload.mean_prompt_tokens + workload.mean_output_tokens / 2)
    backend = backend if layout.attention_dp > 1 else "all_reduce"
    deployment = deploy(model, cluster, layout, engine, limits, backend, context, experts)
    return run(deployment, workload, slo, seed=seed, max_replicas=layout.replicas, progress=progress)
