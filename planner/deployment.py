"""One deployable choice (model, cluster, engine, layout, limits) and what a simulation of it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from planner.capacity import buffer_limit
from planner.cost import StepCost
from planner.economics import DEFAULT_TERMS, Terms, TokenCosts, hourly_usd, served_costs
from planner.engine import Engine, Limits
from planner.enginespec import EngineSpec
from planner.epochs import EpochTimer
from planner.errors import DoesNotFit, InputError, LayoutError, WorkloadError
from planner.experts import AS_SERVED, ExpertSettings
from planner.expertsteps import ExpertSteps, expert_steps, tokens_of
from planner.failures.settings import FailureSettings
from planner.hardware import Cluster
from planner.incidents import Outages
from planner.layout import Layout, check_layout
from planner.memory import Ledger, MemoryUse
from planner.metrics import Summary
from planner.model import ModelConfig
from planner.offload import Offload, offload_layout, replicas_per_node
from planner.outages import FailureReport, plan_outages, report
from planner.pipeline import stage_split
from planner.prefixhits import caches_prefixes
from planner.residency import REUSES
from planner.simulation import Simulation, simulate
from planner.tacticcost import step_cost
from planner.tactics import PLAIN, Tactics
from planner.tactictimer import tactic_timer
from planner.timer import CostTimer
from planner.ubatch import UbatchTimer
from planner.units import format_bytes
from planner.workload import Slo, Workload
from planner.workload.demand import MIN_REQUESTS

MAX_SIMULATED_REPLICAS = 2
MAX_SIMULATED_RANKS = 16
"""Replicas are alike and share the load evenly, so plans simulate at most this many, at their share of the load."""


MAX_LIMIT = 131_072
UNSUSTAINED = "stability (the queue grows)"
_UNSTABLE_RATIO = 1.01
"""Reported where a run fails without missing a numeric objective."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model cut by `layout` on `cluster` under `engine`; `memory` is the ledger of its tightest GPU.

    `backend` is how ranks meet at the experts: `all_reduce` (every rank has all tokens), or between attention-DP
    ranks `allgather_reducescatter` or `deepep`. `router` (`planner.routers`) spreads requests over ranks.
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
    tactics: Tactics = PLAIN
    router: str = "least_requests"
    terms: Terms = DEFAULT_TERMS

    @property
    def name(self) -> str:
        """Layout with everything that distinguishes it from its neighbours."""
        parts = [str(self.layout), f"{self.limits.max_num_seqs} seqs", f"{self.limits.max_batched_tokens} tok/step"]
        parts += ["DeepEP"] if self.backend == "deepep" else []
        placement = self.experts.placement_name
        parts += [f"{placement} placement"] if placement != "contiguous" else []
        if self.offload is not None:
            held = self.offload.held
            parts += [f"{held.resident} of {held.num_experts} experts in HBM ({self.offload.residency.policy})"]
        parts += [f"{self.model.kv_format} KV"] if self.model.kv_format != "bf16" else []
        parts += self.tactics.names
        return ", ".join(parts)

    @property
    def usd_per_hour(self) -> float | None:
        """Bill of all GPUs, None when the price is unknown."""
        return hourly_usd(self.cluster.system, self.layout.num_gpus, self.terms, replica_gpus=self.layout.replica_gpus)

    def cost(self) -> StepCost:
        """Step times of this deployment."""
        fixed = (self.model, self.layout, self.cluster, self.engine, self.backend, self.experts, self.offload)
        return step_cost(*fixed, self.tactics)

    def spec(self, replicas: int) -> EngineSpec:
        """What the simulator must know of `replicas` copies.

        A pipeline keeps one batch per stage in flight, so a replica is `pp` scheduler slots that share its KV pool.
        """
        layout = self.layout
        kv_tokens, num_seqs = self.memory.kv_tokens // layout.pp, max(1, self.limits.max_num_seqs // layout.pp)
        frontend_s, frontend_s_per_token = self.engine.frontend(self.cluster.system.gpu.arch)
        slot_tokens = max(1, kv_tokens // num_seqs) if self.engine.kv_slots else 0
        return EngineSpec(
            num_groups=replicas * layout.pp,
            ranks_per_group=layout.attention_dp,
            kv_tokens_per_rank=kv_tokens,
            block_tokens=slot_tokens or self.engine.block_tokens,
            max_request_tokens=slot_tokens,
            max_num_seqs=num_seqs,
            max_batched_tokens=self.limits.max_batched_tokens,
            policy=self.engine.policy,
            admission_reserve=self.engine.admission_reserve,
            token_ratio=self.engine.admission_ratio,
            prefill_balance=self.engine.prefill_balance,
            batch_wait=self.engine.batch_wait,
            rank_router=self.engine.rank_router if layout.attention_dp > 1 else "",
            frontend_s=frontend_s,
            frontend_s_per_token=frontend_s_per_token,
            receive_interval=self.engine.receive_interval,
            num_frontends=replicas,
            groups_per_link=self.replicas_per_root if self.offload else 0,
            groups_per_node=replicas_per_node(layout, self.cluster),
            acceptance=self.tactics.acceptance,
            prefix_caching=caches_prefixes(self.model, self.engine),
        )

    @property
    def replicas_per_root(self) -> int:
        """Replicas of a node that share one link to the host, a replica wider than the root having its own."""
        wanted = max(1, self.experts.gpus_per_root // self.layout.replica_gpus)
        return min(wanted, replicas_per_node(self.layout, self.cluster))


def deploy(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    engine: Engine,
    limits: Limits,
    backend: str,
    context_tokens: int,
    experts: ExpertSettings = AS_SERVED,
    tactics: Tactics = PLAIN,
    router: str = "least_requests",
    terms: Terms = DEFAULT_TERMS,
) -> Deployment:
    """A checked deployment. LayoutError if the layout is invalid or too large, DoesNotFit if memory is short."""
    check_layout(model, layout)
    tactics.check(model, layout, limits, backend)
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
    if engine.expert_parallel == "none" and layout.ep > 1:
        raise LayoutError(f"{engine.name} never spreads whole experts over GPUs: use ep=1, or another engine.")
    if layout.attention_dp > 1 and backend not in engine.moe_backends:
        offered = " or ".join(engine.moe_backends) or "no attention-DP: use attention_dp=1 with tp or replicas"
        raise LayoutError(f"{layout} with {backend}: {engine.name} has {offered}.")
    if backend == "deepep" and (layout.ep == 1 or layout.moe_tp > 1):
        raise LayoutError(f"{layout}: DeepEP needs whole experts on every rank. Use ep={layout.stage_gpus}.")
    if backend == "deepep":
        sent = tactics.dispatched_tokens(-(-limits.max_num_seqs // layout.pp))
        buffer_limit(engine).check(sent, tactics.query_tokens / tactics.num_batches)
    ledger = Ledger(model, cluster.system, engine, tactics)
    memory, away = ledger.use(layout, limits, backend, context_tokens), None
    if experts.residency is not None:
        if tactics != PLAIN:
            raise InputError("--residency with --speculative or --overlap: no engine combines them. Leave one out.")
        away = offload_layout(model, cluster, layout, limits, memory, context_tokens, experts)
        memory = ledger.use(layout, limits, backend, context_tokens, away.hbm_share)
    if not memory.fits:
        raise DoesNotFit(
            f"{model.name} as {layout} does not fit {cluster.name}: {format_bytes(memory.needed_bytes)} before KV "
            f"cache, {engine.name} may use {format_bytes(memory.budget_bytes)} of "
            f"{format_bytes(memory.capacity_bytes)} per GPU; {memory.breaking_term} breaks it",
            ["fewer tokens per step (--max-batched-tokens)", "a lower precision (--weights)", "more GPUs per replica"],
        )
    return Deployment(model, cluster, engine, layout, limits, backend, memory, experts, away, tactics, router, terms)


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
    token_costs: TokenCosts
    expert_steps: ExpertSteps | None
    num_rebalances: int
    rebalance_stall_s: float
    rebalance_moved_bytes: float
    failures: FailureReport | None = None

    @property
    def meets_slo(self) -> bool:
        """True when every objective holds and the queue does not grow."""
        return self.worst_ratio <= 1.0

    @property
    def usd_per_mtok_output(self) -> float | None:
        """$ per million output tokens by the rule of the terms, None when the price is unknown."""
        return self.token_costs.usd_per_mtok_output

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
    failures: FailureSettings | None = None,
) -> Run:
    """Simulate `deployment` under `workload` and judge it against `slo`.

    `max_replicas` replicas at most are simulated, at their share of the load; by default two, or one of many ranks, or
    all that fetch experts over one host link. `failures` says which replicas stop on the way.
    """
    check_context(deployment.model, workload)
    # Replicas on one link to the host slow each other down: they are simulated together.
    least = deployment.replicas_per_root if deployment.offload else 1
    users, most = workload.arrivals.concurrency, deployment.layout.replicas
    replicas = min(most, users or most, max_replicas or max(least, simulated_replicas(deployment, workload)))
    share = replicas / most
    timer = _timer(deployment, replicas)
    offered = scaled(workload, share)
    if share < 1:
        fewer = max(MIN_REQUESTS, int(workload.num_requests * share))
        offered = offered.with_num_requests(min(workload.num_requests, fewer))
    outages = ready = None
    if failures is not None:
        plan, ready = plan_outages(deployment.cost(), deployment.limits, deployment.memory, failures)
        outages = Outages(plan, seed)
    split = stage_split(deployment.cost()) if deployment.layout.pp > 1 else None
    spec, router = deployment.spec(replicas), deployment.router
    simulation = simulate(
        spec, timer, offered, seed=seed, router=router, progress=progress, split=split, disturb=outages
    )
    if simulation.num_rejected == len(simulation.requests):
        raise DoesNotFit(f"no request was served: {simulation.rejection_reason}", ["a larger KV cache (more GPUs)"])
    share = offered.arrivals.concurrency / users if users else share
    # A run with an incident has no steady part to pick: all of it counts.
    summary = simulation.summary(slo, warmup=0.0 if outages and outages.incidents else None)
    objective, ratio = worst_objective(summary)
    tok_per_s = summary.output_tok_per_s / share
    usd = served_costs(deployment.usd_per_hour, tok_per_s, workload, deployment.terms)
    drawn = None
    if timer.loads:
        routed = tokens_of(simulation.steps, deployment.tactics.query_tokens)
        drawn = expert_steps(timer.loads, timer.misses, routed, _encoder_share(deployment.model))
    moves = (0, 0.0, 0.0)
    if isinstance(timer, EpochTimer):
        moves = (timer.num_rebalances, timer.stalled_s, timer.moved_bytes)
    failed = report(outages, ready, simulation) if outages and ready else None
    if failed and failed.num_dropped and ratio <= 1.0:
        objective, ratio = "requests lost with a replica", _UNSTABLE_RATIO
    return Run(deployment, workload, slo, summary, simulation, objective, ratio, tok_per_s, usd, drawn, *moves, failed)


def _timer(deployment: Deployment, replicas: int) -> CostTimer | UbatchTimer | EpochTimer:
    """Step times; with epochs where traffic drifts or experts are placed anew."""
    cost, experts = deployment.cost(), deployment.experts
    whole, ubatch_tokens = tactic_timer(cost, deployment.limits), deployment.engine.ubatch_tokens
    timer = UbatchTimer(whole, ubatch_tokens) if ubatch_tokens else whole
    shifts = deployment.model.moe is not None and (experts.drift or experts.rebalance_steps)
    return EpochTimer(timer, cost, replicas * deployment.layout.pp) if shifts else timer


def _encoder_share(model: ModelConfig) -> float:
    """Share of the MoE layers that are in an encoder."""
    stacks = [layer.stack for layer in model.layers if layer.moe]
    return stacks.count("encoder") / len(stacks)


def check_context(model: ModelConfig, workload: Workload) -> None:
    """WorkloadError when lengths that were stated one by one, or the mean of a distribution, exceed the context."""
    stated = workload.turns is None and workload.prompt.kind not in ("uniform", "lognormal")
    mean = int(workload.mean_prompt_tokens + workload.mean_output_tokens)
    tokens = workload.max_prompt_tokens + workload.max_output_tokens if stated else mean
    if 0 < model.max_context < tokens and not any(layer.stack == "encoder" for layer in model.layers):
        raise WorkloadError(
            f"{workload.name}: {tokens:,} tokens of prompt and answer exceed the {model.max_context:,} that "
            f"{model.name} was built for. Shorten or drop those requests."
        )


def simulated_replicas(deployment: Deployment, workload: Workload) -> int:
    """How many of its replicas a plan simulates: all where the next turn of a conversation, or a group, may be sent to
    any of them, because the hits of their caches depend on how many there are."""
    layout = deployment.layout
    if workload.shares and (workload.turns or workload.recorded or deployment.router == "prefix_affinity"):
        return layout.replicas
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


def worst_objective(summary: Summary) -> tuple[str, float]:
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
    tactics: Tactics = PLAIN,
    router: str = "least_requests",
    terms: Terms = DEFAULT_TERMS,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
    failures: FailureSettings | None = None,
) -> Run:
    """Deploy and simulate one layout, all replicas of it.

    Raises what `deploy` raises, and InputError where the host is described but nothing lies outside HBM.
    """
    _check_host_used(experts)
    users = workload.arrivals.concurrency
    if experts.residency is not None and users:
        # So few users never fill more of the cache, and what is not reserved for it holds experts.
        limits = replace(limits, max_num_seqs=min(limits.max_num_seqs, -(-users // layout.replicas)))
    context = int(workload.mean_prompt_tokens + workload.mean_output_tokens / 2)
    backend = backend if layout.attention_dp > 1 else "all_reduce"
    deployment = deploy(model, cluster, layout, engine, limits, backend, context, experts, tactics, router, terms)
    return run(deployment, workload, slo, seed=seed, max_replicas=layout.replicas, progress=progress, failures=failures)


def _check_host_used(experts: ExpertSettings) -> None:
    """InputError naming an option of the host that does nothing without a residency policy."""
    given = {
        "--dram": experts.dram_bytes is not None,
        "--nvme": experts.nvme_bytes > 0,
        "--peer": experts.peer_bytes > 0,
        "--host": experts.host is not None,
        "--gpus-per-root": experts.gpus_per_root > 1,
        "--reuse": experts.reuse != REUSES["records"],
    }
    unused = next((option for option, is_given in given.items() if is_given), None)
    if experts.residency is None and unused:
        raise InputError(f"{unused} is used only with --residency, such as --residency lru")
