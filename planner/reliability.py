"""What failures cost a deployment in the long run, and what one more replica takes: closed forms, no simulation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from planner.deployment import Deployment, deploy, with_replicas
from planner.errors import Infeasible, InputError, LayoutError
from planner.failures.readiness import Readiness, readiness
from planner.failures.recovery import Sourced, loader_rate, recovery
from planner.failures.risk import at_least_up, availability, group_mttf_s, replicas_for, spares_for
from planner.failures.settings import GIVEN, LOAD_SOURCES, RecoverySettings
from planner.failures.survival import Survival, survival, tolerated_ranks
from planner.layout import Layout, layout_problem
from planner.loads import placement_of
from planner.placement import Placement
from planner.steady import steady_state
from planner.units import DAY_S
from planner.workload import Workload

MONTH_S = 30 * DAY_S
_DEAD_RANKS = 3
_SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Sizes of a replica that are compared, as multiples of the one asked about."""


@dataclass(frozen=True, slots=True)
class Load:
    """One replica in the closed-form steady state: capacity [requests/s], and what it holds when it fails.

    `sequences` run at once; their KV caches hold `kv_tokens`, `output_tokens` of them generated.
    """

    capacity_per_s: float
    sequences: float
    kv_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True)
class Size:
    """Another size of a replica on the same GPUs; `replicas_wanted` keep the capacity of all with the target."""

    layout: Layout
    blast_share: float
    mttf_s: float
    mttr_s: float
    availability: float
    replicas_wanted: int
    requests_per_s_per_gpu: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """Failures of a deployment whose replicas are all needed for its load.

    A failure stops `blast_gpus`, `blast_share` of the capacity. Each replica fails every `mttf_s` and is away
    `mttr_s`; it works `availability` of the time. `replicas_wanted` keep the load served with probability `target`;
    `spare_nodes` make up for nodes in repair (None: no repair time given). `ranks` and `nodes` say which experts
    survive dead ranks and a dead node, `tolerated` how many ranks an elastic group can lose; `elastic_s` is how long
    such a group pauses for one failure in all (None where engine or layout cannot).
    """

    deployment: Deployment
    mtbf_gpu: Sourced
    recovery: RecoverySettings
    readiness: Readiness
    target: float
    mttf_s: float
    mttr_s: float
    availability: float
    all_up: float
    any_up: float
    replicas_wanted: int
    spare_nodes: int | None
    load: Load
    ranks: tuple[Survival, ...]
    nodes: tuple[Survival, ...]
    tolerated: int
    reload_bytes: float
    elastic_s: float | None
    sizes: tuple[Size, ...]

    @property
    def blast_gpus(self) -> int:
        """GPUs that stop with one failed GPU."""
        return self.deployment.layout.replica_gpus

    @property
    def blast_share(self) -> float:
        """Share of the capacity that stops."""
        return 1.0 / self.deployment.layout.replicas

    @property
    def failures_per_month(self) -> float:
        """Failures of all replicas in 30 days."""
        return MONTH_S / (self.mttf_s + self.mttr_s) * self.deployment.layout.replicas


def reliability(
    deployment: Deployment,
    workload: Workload,
    mtbf_gpu: Sourced,
    settings: RecoverySettings,
    *,
    target: float = 0.999,
    repair_s: float | None = None,
    is_loaded: bool = False,
) -> Reliability:
    """Long-run cost of failures of `deployment`, in which a spare GPU is at hand at once.

    `target` is the wanted probability that the whole load is served, `repair_s` how long a broken node is away.
    `is_loaded` takes the rate of `workload`, else replicas are full when they fail.
    """
    layout = deployment.layout
    ready = _ready(deployment, settings)
    mttr_s = settings.detect.value + ready.total_s
    mttf_s = group_mttf_s(mtbf_gpu.value, layout.replica_gpus)
    share = availability(mttf_s, mttr_s)
    spares = None
    if repair_s is not None:
        spares = spares_for(layout.num_gpus / mtbf_gpu.value, repair_s, target)
    placement = _placement(deployment)
    ranks, nodes = _survivors(placement)
    moe = deployment.model.moe
    reload_bytes = 0.0
    if placement is not None and ranks:
        per_slot = deployment.memory.terms["experts"] * layout.moe_tp / placement.slots_per_rank
        reload_bytes = ranks[0].lost_experts / placement.num_layers * per_slot
    return Reliability(
        deployment=deployment,
        mtbf_gpu=mtbf_gpu,
        recovery=settings,
        readiness=ready,
        target=target,
        mttf_s=mttf_s,
        mttr_s=mttr_s,
        availability=share,
        all_up=at_least_up(layout.replicas, layout.replicas, share),
        any_up=at_least_up(layout.replicas, 1, share),
        replicas_wanted=replicas_for(layout.replicas, share, target),
        spare_nodes=spares,
        load=load_of(deployment, workload, is_loaded=is_loaded),
        ranks=ranks,
        nodes=nodes,
        tolerated=tolerated_ranks(moe.num_experts, layout.redundant_experts, layout.ep) if moe else 0,
        reload_bytes=reload_bytes,
        elastic_s=_elastic_s(deployment, settings, reload_bytes),
        sizes=tuple(_sizes(deployment, workload, mtbf_gpu, settings, target)),
    )


def load_of(deployment: Deployment, workload: Workload, *, is_loaded: bool = False) -> Load:
    """Steady state of one replica, full or at its share of the rate of `workload`."""
    layout, limits = deployment.layout, deployment.limits
    steady = steady_state(deployment.cost(), limits.max_batched_tokens, deployment.engine.policy, workload)
    ranks = layout.pp * layout.attention_dp
    tokens = workload.mean_prompt_tokens + workload.mean_output_tokens
    most = max(1.0, min(limits.max_num_seqs / layout.pp, deployment.memory.kv_tokens / layout.pp / tokens))
    capacity = float(steady.capacity_per_s(np.array(most))) * ranks
    batch = most
    if is_loaded:
        rate = workload.arrivals.rate_per_s / layout.replicas
        if rate >= capacity:
            raise InputError(
                f"--rate {workload.arrivals.rate_per_s:g}: {layout} serves {capacity * layout.replicas:.3g} requests/s "
                "by the closed form. Ask for less, or add replicas."
            )
        batch = min(most, float(steady.batch_at(np.array(rate / ranks))))
    sequences = batch * ranks
    output = workload.mean_output_tokens / 2
    return Load(capacity, sequences, sequences * (workload.mean_prompt_tokens + output), sequences * output)


def ready_by_source(deployment: Deployment, settings: RecoverySettings) -> dict[str, Readiness]:
    """Time to ready with weights from each known place, and from the rate the user gave."""
    given = ("rate",) if settings.load_from == "rate" else ()
    return {name: _ready(deployment, replace(settings, load_from=name)) for name in (*given, *LOAD_SOURCES)}


def _ready(deployment: Deployment, settings: RecoverySettings) -> Readiness:
    of = deployment
    return readiness(of.model, of.cluster, of.layout, of.engine, of.limits, of.memory, settings)


def _elastic_s(deployment: Deployment, settings: RecoverySettings, reload_bytes: float) -> float | None:
    """Pauses of an elastic group: to notice and go on without the rank, and to take another in."""
    layout, facts, moe = deployment.layout, recovery(deployment.engine), deployment.model.moe
    if moe is None or layout.ep == 1 or layout.attention_dp != layout.ep or layout.pp > 1:
        return None
    if not (facts.elastic_detect and facts.elastic_pause and facts.join_pause):
        return None
    if not tolerated_ranks(moe.num_experts, layout.redundant_experts, layout.ep):
        return None
    detect = settings.detect if settings.detect.source == GIVEN else facts.elastic_detect
    reload_s = reload_bytes / (layout.ep - 1) / loader_rate().value
    return detect.value + facts.elastic_pause.value + facts.join_pause.value + reload_s


def _placement(deployment: Deployment) -> Placement | None:
    """Experts of the MoE layers of one stage on its ranks, with their nodes; None where ranks share all experts."""
    layout, moe, experts = deployment.layout, deployment.model.moe, deployment.experts
    if moe is None or layout.ep == 1:
        return None
    nodes = math.ceil(layout.stage_gpus / deployment.cluster.gpus_per_node)
    nodes = nodes if layout.ep % nodes == 0 else 1
    question = experts.question(experts.router(moe), layout, "decode", nodes)
    placed = placement_of(replace(question, num_layers=math.ceil(deployment.model.num_moe_layers / layout.pp)))
    return replace(placed, num_nodes=nodes)


def _survivors(placement: Placement | None) -> tuple[tuple[Survival, ...], tuple[Survival, ...]]:
    if placement is None:
        return (), ()
    ranks = tuple(survival(placement, dead) for dead in range(1, min(_DEAD_RANKS, placement.num_ranks - 1) + 1))
    nodes = (survival(placement, 1, by_node=True),) if placement.num_nodes > 1 else ()
    return ranks, nodes


def _sizes(
    deployment: Deployment, workload: Workload, mtbf_gpu: Sourced, settings: RecoverySettings, target: float
) -> list[Size]:
    """The same GPUs as fewer large or more small replicas; sizes that do not fit are left out."""
    found = []
    for factor in _SIZES:
        other = deployment if factor == 1.0 else _resized(deployment, factor, workload)
        if other is None:
            continue
        layout = other.layout
        mttr_s = settings.detect.value + _ready(other, settings).total_s
        mttf_s = group_mttf_s(mtbf_gpu.value, layout.replica_gpus)
        share = availability(mttf_s, mttr_s)
        per_gpu = load_of(other, workload).capacity_per_s / layout.replica_gpus
        wanted = replicas_for(layout.replicas, share, target)
        found.append(Size(layout, 1.0 / layout.replicas, mttf_s, mttr_s, share, wanted, per_gpu))
    return found


def _resized(deployment: Deployment, factor: float, workload: Workload) -> Deployment | None:
    """The deployment with replicas `factor` times as large on as many GPUs; None where that cannot be."""
    layout = deployment.layout
    replicas = layout.replicas / factor
    wide = layout.attention_dp if layout.attention_dp > 1 else layout.tp
    size = wide * factor
    if replicas != int(replicas) or size != int(size) or replicas < 1 or size < 1:
        return None
    scaled = {"attention_dp" if layout.attention_dp > 1 else "tp": int(size)}
    scaled["ep" if layout.ep > 1 else "moe_tp"] = max(1, int((layout.ep if layout.ep > 1 else layout.moe_tp) * factor))
    other = with_replicas(replace(layout, **scaled), int(replicas))
    moe = deployment.model.moe
    if moe is not None and other.ep > 1 and (moe.num_experts + other.redundant_experts) % other.ep:
        more = -(moe.num_experts + other.redundant_experts) % other.ep
        other = replace(other, redundant_experts=other.redundant_experts + more)
    if layout_problem(deployment.model, other) is not None:
        return None
    context = int(workload.mean_prompt_tokens + workload.mean_output_tokens / 2)
    backend = deployment.backend if other.attention_dp > 1 else "all_reduce"
    asked = (deployment.model, deployment.cluster, other, deployment.engine, deployment.limits, backend)
    try:
        return deploy(*asked, context, deployment.experts, terms=deployment.terms)
    except (Infeasible, LayoutError):
        return None
