"""How much one replica of each layout carries within an SLO, in closed form: how many GPUs another demand would take.

A plan answers one question by simulation. What-if questions (other demand, prices, errors, budgets) need thousands of
answers, which come from these curves: steady states (`planner.steady`) of every replica over its running batch, held
against the SLO with the tail ratios that rank layouts in a search. `Anchor` ties them to what was simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.deployment import Run, with_replicas
from planner.engine import Engine, Limits
from planner.enumeration import MAX_SEQS, backends, layouts
from planner.experts import AS_SERVED, ExpertSettings
from planner.fit import limits_for
from planner.hardware import Cluster
from planner.layout import Layout
from planner.memory import Ledger
from planner.model import ModelConfig
from planner.search import TAIL
from planner.steady import SteadyState, steady_state
from planner.tacticcost import step_cost
from planner.workload import Slo, Workload

Floats = NDArray[np.float64]

_POINTS = 32
_MISSED = 0.97
"""A replica that missed the SLO in simulation carries at most this share of the load it missed it under."""
_ROOMY_SEQS = (MAX_SEQS[-1], 256, 64, 16)
"""Sequence limits tried, largest first: the buffers of the largest may leave no room for a cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Replica:
    """One replica over its running sequences per rank, arrays `[batch]`.

    `carried` is what the whole replica serves: requests per second, or users in a closed loop. `tok_per_s` are its
    output tokens per second.
    """

    layout: Layout
    backend: str
    kv_format: str
    limits: Limits
    batch: Floats
    tpot_s: Floats
    ttft_s: Floats
    carried: Floats
    tok_per_s: Floats

    @property
    def num_gpus(self) -> int:
        """GPUs of the replica."""
        return self.layout.replica_gpus

    @property
    def key(self) -> tuple[Layout, str, str]:
        """What tells replicas of one system apart, limits aside."""
        return self.layout, self.backend, self.kv_format


@dataclass(frozen=True, slots=True)
class Anchor:
    """Simulated over estimated capacity of one replica, and smaller ratios of kinds known to carry less."""

    ratio: float
    capped: tuple[tuple[tuple[Layout, str, str], float], ...] = ()

    def of(self, found: Sequence[Replica]) -> Floats:
        """Factors on the estimates of replicas, `[kinds]`."""
        capped = dict(self.capped)
        return np.array([min(self.ratio, capped.get(replica.key, self.ratio)) for replica in found])


@dataclass(frozen=True, slots=True)
class Shift:
    """What a draw changes, scalars or arrays of one shape: factors on step times, on TTFT and on the demand."""

    time: Floats | float = 1.0
    ttft: Floats | float = 1.0
    demand: Floats | float = 1.0


def demand_of(workload: Workload) -> float:
    """Requests per second, or users of a closed loop."""
    return float(workload.arrivals.concurrency or workload.arrivals.rate_per_s)


def replicas(
    variants: Sequence[ModelConfig],
    cluster: Cluster,
    engine: Engine,
    workload: Workload,
    experts: ExpertSettings = AS_SERVED,
    only: Callable[[Layout], bool] = lambda layout: True,
) -> list[Replica]:
    """Every replica of `variants` that fits a part of `cluster`, with the engine's default token budget."""
    return [replica for model in variants for replica in _replicas_of(model, cluster, engine, workload, experts, only)]


def _replicas_of(
    model: ModelConfig,
    cluster: Cluster,
    engine: Engine,
    workload: Workload,
    experts: ExpertSettings,
    only: Callable[[Layout], bool],
) -> Iterator[Replica]:
    ledger = Ledger(model, cluster.system, engine)
    for layout in layouts(model, cluster, engine):
        for backend in backends(engine, layout) if only(layout) else ():
            found = _limits(ledger, layout, backend, cluster, engine, workload)
            if found is None:
                continue
            limits, kv_tokens = found
            cost = step_cost(model, layout, cluster, engine, backend, experts)
            steady = steady_state(cost, limits.max_batched_tokens, engine.policy, workload)
            yield _replica(steady, layout, backend, model.kv_format, limits, kv_tokens, workload)


def _limits(
    ledger: Ledger, layout: Layout, backend: str, cluster: Cluster, engine: Engine, workload: Workload
) -> tuple[Limits, int] | None:
    """Roomiest limits under which the longest request fits, and the cached tokens of a rank; None if none does."""
    default = limits_for(engine, cluster.system, None, None, layout.attention_dp)
    context = int(workload.mean_prompt_tokens + workload.mean_output_tokens / 2)
    longest = workload.max_prompt_tokens + workload.max_output_tokens
    most = engine.overheads.low_latency_tokens if backend == "deepep" else default.max_batched_tokens
    for num_seqs in _ROOMY_SEQS:
        if -(-num_seqs // layout.pp) > most:
            continue
        limits = Limits(num_seqs, default.max_batched_tokens)
        use = ledger.use(layout, limits, backend, context)
        room = use.kv_tokens // num_seqs if engine.kv_slots else use.kv_tokens
        if use.fits and room >= longest:
            return limits, use.kv_tokens
    return None


def _replica(
    steady: SteadyState,
    layout: Layout,
    backend: str,
    kv_format: str,
    limits: Limits,
    kv_tokens: int,
    workload: Workload,
) -> Replica:
    context = workload.mean_prompt_tokens + workload.mean_output_tokens / 2
    most = min(limits.max_num_seqs // layout.pp, steady.batch_within(kv_tokens / layout.pp, context))
    batch = np.geomspace(1.0, max(1.0, most), _POINTS)
    ranks = layout.pp * layout.attention_dp
    rate = np.interp(batch, steady.batch, steady.requests_per_s) * ranks
    carried = rate if not workload.arrivals.concurrency else batch * ranks
    lengths = workload.requests(seed=0).prompt_tokens
    ttft_s = steady.ttft_at(batch, float(lengths.var() / lengths.mean() ** 2))
    tok_per_s = rate * workload.mean_output_tokens
    return Replica(layout, backend, kv_format, limits, batch, steady.tpot_at(batch), ttft_s, carried, tok_per_s)


def capacity(replica: Replica, slo: Slo, output_tokens: float, shift: Shift | None = None) -> Floats:
    """Most that `replica` carries within `slo` [as `Replica.carried`]; 0 where one sequence already misses it.

    The batch at which the first objective reaches its limit, objectives being non-decreasing in the batch.
    """
    shift = shift or Shift()
    batch = _batch_within(replica, slo, output_tokens, shift)
    carried = np.interp(batch, replica.batch, np.maximum.accumulate(replica.carried))
    return np.where(batch >= 1.0, carried / np.asarray(shift.time), 0.0)


def e2e_at_capacity(replica: Replica, slo: Slo, output_tokens: float) -> float:
    """Mean seconds from arrival to the last token where `replica` carries as much as `slo` allows."""
    batch = float(_batch_within(replica, slo, output_tokens, Shift()))
    ttft_s, tpot_s = (float(np.interp(batch, replica.batch, curve)) for curve in (replica.ttft_s, replica.tpot_s))
    return ttft_s + tpot_s * max(0.0, output_tokens - 1)


def _batch_within(replica: Replica, slo: Slo, output_tokens: float, shift: Shift) -> Floats:
    """Largest batch within every objective, 0 where there is none."""
    shape = np.broadcast_shapes(np.shape(shift.time), np.shape(shift.ttft))
    batch = np.full(shape, replica.batch[-1])
    for objective in slo.objectives:
        tail = TAIL[objective.metric][objective.statistic]
        curves = {
            "ttft": (replica.ttft_s, shift.ttft),
            "tpot": (replica.tpot_s, shift.time),
            "e2e": (replica.ttft_s + replica.tpot_s * output_tokens, shift.time),
        }
        curve, factor = curves["tpot" if objective.metric == "itl" else objective.metric]
        rising = np.maximum.accumulate(curve) + np.arange(len(curve)) * 1e-12
        allowed = objective.limit_s / tail / np.asarray(factor)
        batch = np.minimum(batch, np.interp(allowed, rising, replica.batch, left=0.0))
    return batch


def anchored(found: Sequence[Replica], runs: Sequence[Run], winner: Run, carries: float, slo: Slo) -> Anchor:
    """Anchor of replicas to simulations of the same system: `winner` carries `carries` times its demand.

    Kinds that missed in simulation carry less than what they missed, and no kind carries the demand on fewer GPUs than
    a winner that meets the SLO, because the search looked for those.
    """
    output, demand = winner.workload.mean_output_tokens, demand_of(winner.workload)
    estimated = {replica.key: float(capacity(replica, slo, output)) for replica in found}
    own = key_of(winner)
    ratio = 1.0
    if estimated.get(own, 0.0) > 0.0 and carries > 0.0:
        ratio = carries * demand / winner.deployment.layout.replicas / estimated[own]
    too_few = [(key_of(run), run.deployment.layout.replicas) for run in runs if not run.meets_slo]
    if winner.meets_slo:
        too_few += [(replica.key, (winner.num_gpus - 1) // replica.num_gpus) for replica in found]
    capped: dict[tuple[Layout, str, str], float] = {}
    for key, count in too_few:
        if count > 0 and estimated.get(key, 0.0) > 0.0:
            limit = _MISSED * demand / count / estimated[key]
            capped[key] = min(limit, capped.get(key, ratio))
    return Anchor(ratio, tuple(capped.items()))


def key_of(run: Run) -> tuple[Layout, str, str]:
    """Key of the replica that `run` simulated."""
    deployment = run.deployment
    return with_replicas(deployment.layout, 1), deployment.backend, deployment.model.kv_format


def gpus_needed(
    found: Sequence[Replica], demand: float, slo: Slo, output_tokens: float, anchor: Anchor, shift: Shift | None = None
) -> tuple[NDArray[np.int64], Floats]:
    """GPUs that each replica kind takes for `demand`, `[kinds, ...draws]`, -1 where it cannot; and what one carries."""
    shift = shift or Shift()
    estimated = np.array([capacity(replica, slo, output_tokens, shift) for replica in found])
    carried = estimated * anchor.of(found).reshape(-1, *[1] * (estimated.ndim - 1))
    wanted = demand * np.asarray(shift.demand)
    with np.errstate(divide="ignore"):
        count = np.ceil(np.where(carried > 0, wanted / np.maximum(carried, 1e-12), 0.0) - 1e-9)
    gpus = np.array([r.num_gpus for r in found]).reshape(-1, *[1] * (carried.ndim - 1))
    return np.where(carried > 0, count * gpus, -1).astype(np.int64), carried


def fewest(gpus: NDArray[np.int64]) -> NDArray[np.int64]:
    """Fewest GPUs over kinds, `[kinds, ...draws]` to `[...draws]`; -1 where no kind can."""
    possible = np.where(gpus > 0, gpus, np.iinfo(np.int64).max)
    least = possible.min(axis=0)
    return np.where(least == np.iinfo(np.int64).max, -1, least)
