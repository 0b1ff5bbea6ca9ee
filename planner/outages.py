"""Failures of a deployment: from its layout and engine to an `OutagePlan`, and from a run to what it cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.cost import StepCost
from planner.engine import Engine, Limits
from planner.errors import InputError, LayoutError
from planner.failures.readiness import Readiness, readiness
from planner.failures.recovery import loader_rate, recovery
from planner.failures.risk import group_mttf_s
from planner.failures.settings import GIVEN, FailureSettings, RecoverySettings
from planner.failures.survival import survival, tolerated_ranks
from planner.incidents import ElasticPlan, Incident, OutagePlan, Outages
from planner.loads import placement_of
from planner.memory import MemoryUse
from planner.simulation import Simulation

_ELASTIC_SEQS, _ELASTIC_CONTEXT = 64.0, 2048.0
"""Decode step in which the share of the experts is read off; it slows down when fewer ranks hold them."""


def plan_outages(
    cost: StepCost, limits: Limits, memory: MemoryUse, settings: FailureSettings
) -> tuple[OutagePlan, Readiness]:
    """Plan of the failures of the deployment that `cost` times, and what the rebuild of a replica consists of.

    Raises InputError or LayoutError where an elastic group was asked for and cannot be, and where failures meet
    something that is not modelled together with them.
    """
    layout, experts = cost.layout, cost.experts
    if experts.rebalance_steps and not experts.rebalance_async:
        raise InputError(
            "failures and rebalancing that stops the ranks are not simulated together. Add --rebalance-async, or leave "
            "out --rebalance-steps."
        )
    ready = readiness(cost.model, cost.cluster, layout, cost.engine, limits, memory, settings.recovery)
    plan = OutagePlan(
        fixed=settings.fixed,
        mtbf_gpu_s=settings.mtbf_gpu_s,
        gpus_per_replica=layout.replica_gpus,
        groups_per_replica=layout.pp,
        detect_s=settings.recovery.detect.value,
        rebuild_s=ready.total_s,
        on_failure=settings.on_failure,
    )
    if settings.elastic:
        plan = replace(plan, elastic=elastic_plan(cost, memory, settings.recovery))
    return plan, ready


def elastic_plan(cost: StepCost, memory: MemoryUse, settings: RecoverySettings) -> ElasticPlan:
    """How the expert-parallel group of `cost` goes on without some of its ranks.

    Experts without a living copy are loaded again from host memory by all survivors at once. The expert part of a step
    grows with the experts per survivor, R / (R - f); tokens per rank stay what the scheduler makes them.
    """
    layout, facts = cost.layout, recovery(cost.engine)
    _check_elastic(cost.engine, cost)
    assert cost.model.moe is not None
    assert facts.elastic_detect and facts.elastic_pause and facts.join_pause
    ranks = layout.ep
    tolerated = min(tolerated_ranks(cost.model.moe.num_experts, layout.redundant_experts, ranks), ranks - 1)
    step = cost.decode(np.array([_ELASTIC_SEQS]), np.array([_ELASTIC_CONTEXT]))
    share = float(step.terms["experts"][0] / step.total_s[0])
    placement = placement_of(cost.routed.question(cost.experts.router(cost.model.moe), "decode"))
    # An expert in the placement stands for one of every layer; its bytes are those of a slot of a rank.
    rows = cost.model.num_moe_layers / placement.num_layers
    slot_bytes = memory.terms["experts"] / placement.slots_per_rank / cost.model.num_moe_layers
    slowdown, reload_s = [], []
    for dead in range(tolerated + 1):
        alive = ranks - dead
        slowdown.append(1.0 + share * (ranks / alive - 1.0))
        lost_bytes = survival(placement, dead).lost_experts * rows * slot_bytes
        reload_s.append(lost_bytes / alive / loader_rate().value)
    detect = settings.detect if settings.detect.source == GIVEN else facts.elastic_detect
    return ElasticPlan(
        detect.value, facts.elastic_pause.value, facts.join_pause.value, tuple(slowdown), tuple(reload_s)
    )


def _check_elastic(engine: Engine, cost: StepCost) -> None:
    layout, moe = cost.layout, cost.model.moe
    if recovery(engine).elastic_pause is None:
        raise InputError(f"--elastic: {engine.name} cannot go on without a rank. Use --engine sglang or vllm.")
    if moe is None or layout.ep == 1 or layout.pp > 1 or layout.tp > 1 or layout.attention_dp != layout.ep:
        raise LayoutError(
            f"--elastic: {layout} is not one rank per GPU. Use tp=1 and attention_dp = ep, such as "
            "attention_dp=16,ep=16,redundant_experts=32."
        )
    if tolerated_ranks(moe.num_experts, layout.redundant_experts, layout.ep) < 1:
        least = -(-moe.num_experts // (layout.ep - 1))
        least += -(moe.num_experts + least) % layout.ep
        raise LayoutError(
            f"--elastic: with {layout.redundant_experts} redundant experts the other ranks have no slots for the "
            f"{moe.num_experts} experts once one is dead. Use redundant_experts={least} or more in --layout."
        )


@dataclass(frozen=True, slots=True)
class Latencies:
    """Requests of one kind: how many, mean and 95th percentile of TTFT and TPOT [s], NaN without any."""

    num: int
    ttft_mean_s: float
    ttft_p95_s: float
    tpot_mean_s: float
    tpot_p95_s: float


@dataclass(frozen=True, slots=True)
class FailureReport:
    """What failures did to a run.

    `capacity_share` is the mean share of the ranks that worked, `availability` the share of the time in which at least
    one replica did, `downtime_s` the replica-seconds without service, all until the last step. `during` are requests
    in the system between a failure and the return of its replica, `otherwise` the others. `expected_failures` is how
    many random ones the run would see on average (None without).
    """

    plan: OutagePlan
    readiness: Readiness
    incidents: tuple[Incident, ...]
    num_retried: int
    num_dropped: int
    num_ignored: int
    capacity_share: float
    availability: float
    downtime_s: float
    during: Latencies
    otherwise: Latencies
    expected_failures: float | None

    @property
    def lost_output_tokens(self) -> int:
        """Output tokens that were generated and thrown away."""
        return sum(incident.lost_output_tokens for incident in self.incidents)

    @property
    def recomputed_tokens(self) -> int:
        """Tokens in the KV caches of dead ranks."""
        return sum(incident.recomputed_tokens for incident in self.incidents)


def report(outages: Outages, ready: Readiness, simulation: Simulation) -> FailureReport:
    """What `outages` did to the finished run `simulation`."""
    # A run whose requests were all given up has no last step.
    end_s = max([simulation.simulated_s, *(i.detected_s for i in outages.incidents if not np.isnan(i.detected_s))])
    replicas = len(outages.replicas)
    lost, idle_s, down_s = _integrate(outages.capacity, replicas, end_s)
    requests = simulation.requests
    touched = np.zeros(len(requests), dtype=bool)
    last_s = np.where(np.isnan(requests.finish_s), np.inf, requests.finish_s)
    for incident in outages.incidents:
        until_s = np.inf if np.isnan(incident.ready_s) else incident.ready_s
        touched |= (requests.arrival_s <= until_s) & (last_s >= incident.failed_s)
    plan = outages.plan
    expected = None
    if plan.mtbf_gpu_s is not None:
        expected = end_s * replicas / group_mttf_s(plan.mtbf_gpu_s, plan.gpus_per_replica)
    return FailureReport(
        plan=plan,
        readiness=ready,
        incidents=tuple(outages.incidents),
        num_retried=len(outages.retried - outages.dropped),
        num_dropped=len(outages.dropped),
        num_ignored=outages.num_ignored,
        capacity_share=1.0 - lost / (end_s * replicas) if end_s else 1.0,
        availability=1.0 - idle_s / end_s if end_s else 1.0,
        downtime_s=down_s,
        during=_latencies(requests.ttft_s[touched], requests.tpot_s[touched]),
        otherwise=_latencies(requests.ttft_s[~touched], requests.tpot_s[~touched]),
        expected_failures=expected,
    )


def _integrate(log: list[tuple[float, int, float]], replicas: int, end_s: float) -> tuple[float, float, float]:
    """Lost replica-seconds, seconds in which no replica worked, and replica-seconds without service, until `end_s`."""
    share = [1.0] * replicas
    now_s = lost = idle_s = down_s = 0.0
    for time_s, index, left in [*log, (end_s, 0, share[0])]:
        span_s = max(0.0, min(time_s, end_s) - now_s)
        lost += span_s * sum(1.0 - part for part in share)
        idle_s += span_s * (max(share) == 0.0)
        down_s += span_s * share.count(0.0)
        now_s += span_s
        share[index] = left
    return lost, idle_s, down_s


def _latencies(ttft_s: NDArray[np.float64], tpot_s: NDArray[np.float64]) -> Latencies:
    values = []
    for column in (ttft_s, tpot_s):
        known = column[~np.isnan(column)]
        values += [float(known.mean()), float(np.percentile(known, 95))] if len(known) else [np.nan, np.nan]
    return Latencies(len(ttft_s), *values)
