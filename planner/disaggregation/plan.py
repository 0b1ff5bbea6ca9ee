"""One pool or two: the best pair of pools beside the best colocated plan, and a verdict.

Disaggregation is not always a win (handbook serving 2.6): it pays two pools that are each rounded up to whole replicas,
and gets decode steps that no prompt interrupts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice, product

from planner.deployment import UNSUSTAINED, scaled
from planner.disaggregation.deployment import PoolsRun, check_combination, check_experts, check_model, run_pools
from planner.disaggregation.handover import Handover, handover
from planner.disaggregation.rates import matched_tok_per_s_per_gpu
from planner.disaggregation.search import (
    PairCandidate,
    PoolSearch,
    Split,
    candidates,
    deployed,
    search_pools,
    splits,
    token_limit_s,
    ttft_limit_s,
)
from planner.errors import InputError
from planner.experts import ExpertSettings
from planner.hardware import Cluster
from planner.model import ModelConfig
from planner.model.precision import override
from planner.recommend import Recommendation
from planner.tactics import PLAIN, Tactics
from planner.workload import Slo, Workload

_PER_PRICE = 3
_HEADROOM_STEPS = (1.1, 1.25, 1.5, 2.0, 3.0)
_MARGIN = 0.05
"""Differences below this share are within the error of the estimate."""

Verdict = tuple[str, str]


@dataclass(frozen=True)
class Ratio:
    """Layouts whose GPUs are matched exactly, replicas counted in fractions (TensorRT-LLM blog 05)."""

    prefill_layout: str
    decode_layout: str
    prefill_gpus_per_decode_gpu: float
    output_tok_per_s_per_gpu: float


@dataclass(frozen=True)
class PoolsPlan:
    """The answer about two pools on (prefill, decode) clusters: the best pair, what else was simulated, the curve.

    `sustained_factor` is the highest tested multiple of the demand at which the best pair meets the SLO; `verdict` is
    "two pools", "one pool" or "neither", `reason` says why.
    """

    clusters: tuple[Cluster, Cluster]
    handover: Handover
    winner: PoolsRun | None
    runs: tuple[PoolsRun, ...]
    estimates: tuple[PairCandidate, ...]
    curve: tuple[Split, ...]
    ratio: Ratio | None
    output_tokens: float
    num_considered: int
    sustained_factor: float
    verdict: str
    reason: str
    wall_s: float

    @property
    def cluster_names(self) -> str:
        """The cluster of both pools, or of each."""
        first, second = (cluster.name for cluster in self.clusters)
        return first if first == second else f"{first} (prefill) and {second} (decode)"

    @property
    def meets_slo(self) -> bool:
        """The best pair meets the SLO at the demanded load."""
        return self.winner is not None and self.winner.meets_slo


def check_question(
    model: ModelConfig,
    workload: Workload,
    experts: ExpertSettings,
    tactics: Tactics = PLAIN,
    router: str = "least_requests",
) -> None:
    """InputError where two pools cannot be planned for: closed loops and what only one pool is simulated with."""
    check_model(model)
    check_experts(experts)
    check_combination(workload, tactics, router)
    if workload.arrivals.kind == "closed":
        raise InputError(
            "--disaggregate matches two pools to a rate, and --concurrency states none. Give --rate, or simulate two "
            "pools with --prefill-layout and --decode-layout."
        )


def plan_pools(answer: Recommendation, progress: Callable[[str, float], None] | None = None) -> PoolsPlan:
    """The best two pools for the question of `answer` on one offered cluster or on two, compared with it.

    They keep the KV precision of the colocated winner. Raises InputError as `check_question`.
    """
    check_question(answer.model, answer.workload, answer.experts, answer.tactics)
    start = time.perf_counter()
    model = answer.model
    if answer.winner is not None:
        model = override(model, kv=answer.winner.deployment.model.kv_format)
    rules, found = handover(answer.engine), {}
    for cluster in answer.clusters:
        part = partial(progress, f"pools {cluster.name}") if progress else None
        question = (answer.engine, answer.workload, rules, answer.experts, part, answer.terms)
        found[cluster.name] = search_pools(model, cluster, *question)
    tried = []
    for first, second in product(answer.clusters, answer.clusters):
        search = found[first.name] if first == second else found[first.name].joined(found[second.name])
        tried.append(_tried((first, second), search, rules, answer))
    best = min(tried, key=_preference)
    return _plan(best, answer, rules, time.perf_counter() - start)


@dataclass(frozen=True)
class _Tried:
    """What was found for (prefill, decode) clusters: the search, pairs, and runs, best first."""

    clusters: tuple[Cluster, Cluster]
    search: PoolSearch
    pairs: list[PairCandidate]
    runs: list[PoolsRun]

    @property
    def is_shared(self) -> bool:
        """Both pools share one cluster."""
        return self.clusters[0] == self.clusters[1]


def _tried(clusters: tuple[Cluster, Cluster], search: PoolSearch, rules: Handover, answer: Recommendation) -> _Tried:
    pairs = candidates(search, clusters, rules, answer.slo)
    runs = _simulated(pairs, rules, answer.workload, answer.slo, answer.seed)
    return _Tried(clusters, search, pairs, sorted(runs, key=_order))


def _preference(tried: _Tried) -> tuple[bool, bool, float, bool]:
    """Meeting the SLO, then price or how near it is; one cluster rather than two."""
    if not tried.runs:
        return (True, True, 0.0, not tried.is_shared)
    return (False, *_order(tried.runs[0])[:2], not tried.is_shared)


def _plan(best: _Tried, answer: Recommendation, rules: Handover, wall_s: float) -> PoolsPlan:
    start = time.perf_counter()
    winner = best.runs[0] if best.runs else None
    factor = _sustained(winner, answer) if winner and winner.meets_slo else 0.0
    verdict, reason = _verdict(answer, winner, factor, _no_room(best))
    total = best.clusters[0].num_gpus
    return PoolsPlan(
        best.clusters,
        rules,
        winner,
        tuple(best.runs),
        tuple(best.pairs),
        tuple(splits(best.search, answer.slo, total)) if best.is_shared else (),
        _ratio(best.search, answer.slo),
        best.search.demand.output_tokens,
        best.search.num_considered,
        factor,
        verdict,
        reason,
        wall_s + time.perf_counter() - start,
    )


def _simulated(pairs: list[PairCandidate], rules: Handover, workload: Workload, slo: Slo, seed: int) -> list[PoolsRun]:
    """Runs of the best pairs of each price, cheapest first, until one meets the SLO."""
    runs: list[PoolsRun] = []
    for _, same in groupby(pairs, key=lambda candidate: candidate.price):
        for candidate in islice(same, _PER_PRICE):
            runs.append(run_pools(deployed(candidate, rules), workload, slo, seed=seed))
        if any(run.meets_slo for run in runs):
            break
    return runs


def _order(run: PoolsRun) -> tuple[bool, float, float]:
    """Meeting the SLO first, then price, then margin."""
    return (not run.meets_slo, _price(run) if run.meets_slo else run.worst_ratio, run.worst_ratio)


def _price(run: PoolsRun) -> float:
    """Rent per hour, or the GPUs where no price is known."""
    hourly = run.deployment.usd_per_hour
    return run.num_gpus * 1e6 if hourly is None else hourly


def _sustained(winner: PoolsRun, answer: Recommendation) -> float:
    """The highest multiple of the demand, as in `planner.recommend`."""
    factor = 1.0
    for step in _HEADROOM_STEPS:
        run = run_pools(winner.deployment, scaled(answer.workload, step), answer.slo, seed=answer.seed)
        if not run.meets_slo:
            break
        factor = step
    return factor


def _ratio(found: PoolSearch, slo: Slo) -> Ratio | None:
    """The best rate per GPU of each pool within the SLO, matched in fractions of replicas."""
    prefill = [(rate, rate.within_per_s(ttft_limit_s(slo))) for rate in found.prefill]
    decode = [(rate, rate.within_per_s(token_limit_s(slo))) for rate in found.decode]
    if not any(value for _, value in prefill) or not any(value for _, value in decode):
        return None
    p, p_per_s = max(prefill, key=lambda item: item[1] / item[0].deployment.layout.replica_gpus)
    d, d_per_s = max(decode, key=lambda item: item[1] / item[0].deployment.layout.replica_gpus)
    p_gpus, d_gpus = p.deployment.layout.replica_gpus, d.deployment.layout.replica_gpus
    return Ratio(
        p.deployment.name,
        d.deployment.name,
        (p_gpus / p_per_s) / (d_gpus / d_per_s),
        matched_tok_per_s_per_gpu(found.demand.output_tokens, p_per_s, p_gpus, d_per_s, d_gpus),
    )


def _no_room(tried: _Tried) -> str:
    """Why there is no pair at all, empty where there is one."""
    offered = tried.clusters[0].num_gpus
    if tried.is_shared and offered < 2:
        return "two pools need two GPUs"
    if tried.is_shared and tried.search.least_gpus > offered:
        return f"two pools need the model twice, and {offered} GPUs do not hold it twice"
    return ""


def _verdict(answer: Recommendation, pools: PoolsRun | None, factor: float, no_room: str) -> Verdict:
    """Who wins and why: meeting the SLO, then price, then how far the demand can grow, then margin."""
    one = answer.winner
    one_meets, two_meets = one is not None and one.meets_slo, pools is not None and pools.meets_slo
    if not two_meets:
        near = f"; the nearest pair has {_miss(pools.worst_objective, pools.worst_ratio)}" if pools else ""
        reason = (no_room or "no pair of pools meets the SLO on the offered GPUs") + near
        if one_meets:
            return "one pool", reason
        return "neither", f"{reason}, one pool {_miss(one.worst_objective, one.worst_ratio)}" if one else reason
    assert pools is not None
    if one is None or not one_meets:
        return "two pools", f"one pool does not meet the SLO; {pools.num_gpus} GPUs in two pools do"
    return _compared(answer, one.num_gpus, one.deployment.usd_per_hour, pools, factor, one.worst_ratio)


def _miss(objective: str, ratio: float) -> str:
    return objective if objective == UNSUSTAINED else f"{objective} at {ratio:.2f} x its limit"


def _compared(
    answer: Recommendation, gpus: int, hourly: float | None, pools: PoolsRun, factor: float, ratio: float
) -> Verdict:
    two = pools.deployment.usd_per_hour
    prices = (hourly, two) if hourly is not None and two is not None else (float(gpus), float(pools.num_gpus))
    counts = f"{pools.num_gpus} GPUs in two pools, {gpus} in one"
    if prices[1] < prices[0] * (1 - _MARGIN):
        return "two pools", f"they serve the demand for less: {counts}"
    if prices[0] < prices[1] * (1 - _MARGIN):
        most = answer.sustained_factor
        per_gpu = f"per GPU one pool carries about {most * pools.num_gpus / (factor * gpus):.2f} x the load of two"
        return "one pool", f"it serves the demand for less: {counts}; {per_gpu}" if factor else counts
    if factor != answer.sustained_factor:
        name = "two pools" if factor > answer.sustained_factor else "one pool"
        return name, (
            f"at the same price demand can grow to {factor:g} x in two pools and {answer.sustained_factor:g} x in one"
        )
    tightest = f"the tightest objective is at {pools.worst_ratio:.0%} of its limit in two pools, {ratio:.0%} in one"
    # Two pools are more to operate: they must be better by more than the error of the estimate.
    return ("two pools" if pools.worst_ratio < ratio - _MARGIN else "one pool"), f"at the same price {tightest}"
