"""The main flow: which layout on which cluster serves this workload within this SLO most cheaply, and why.

config.json ── model.load ──┐
<system>.toml ─ hardware ───┼─ search (layouts, memory, cost, steady state) ─ finalists ─ simulation ─ choose
workload, SLO ──────────────┘
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from planner.balance import balance_options
from planner.deployment import UNSUSTAINED, Run, check_context, run, scaled
from planner.economics import DEFAULT_TERMS, Terms
from planner.engine import Engine
from planner.experts import AS_SERVED, ExpertSettings
from planner.hardware import Cluster
from planner.layout import Layout
from planner.model import ModelConfig
from planner.model.precision import override
from planner.outside import Outside, outside
from planner.remedies import remedies
from planner.search import MORE_THAN_NEEDED, Candidate, Search, SearchResult
from planner.tactics import PLAIN, Tactics
from planner.workload import Slo, Workload

Progress = Callable[[str, float], None]

_FINALISTS_PER_COUNT = 3
_MAX_RUNS = 10
_HOPELESS_SCORE = 1.5
"""Analytic score beyond which nothing is simulated: of 140 random layouts none above 1.25 met its SLO
(`benchmarks/estimates.py`)."""
_TOP = 5
_NEAR_FINALISTS = 8
_NEAR_RATIO = 1.15
_TIE = 0.05
"""Differences below this share of a limit are within the error of the estimate."""
_COMPLEXITY_HANDICAP = 0.1
"""A pipeline, or mixing two ways of cutting, must win by this share: what they cost in operation is not simulated."""
_FP8_KV_HANDICAP = 0.1
"""A quantised cache can cost answer quality, so it must buy at least this share of margin."""
_BALANCE_GAIN = 0.03
"""Capacity that balancing the experts must promise before it is simulated."""
HEADROOM_STEPS = (1.1, 1.25, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Recommendation:
    """The answer with its evidence. `winner` is the cheapest run that meets the SLO, else the nearest miss.

    `sustained_factor` is the highest tested multiple of the demand at which the winner still meets the SLO (0 when
    it does not meet it at all); `outside` are the residency policies that were looked at, if the model does not fit in
    HBM or the user asked for one; `remedies` say what would make an infeasible question feasible, cheapest first.
    """

    model: ModelConfig
    clusters: tuple[Cluster, ...]
    workload: Workload
    slo: Slo
    engine: Engine
    experts: ExpertSettings
    seed: int
    winner: Run | None
    runs: tuple[Run, ...]
    searches: tuple[tuple[str, SearchResult], ...]
    outside: tuple[Outside, ...]
    sustained_factor: float
    remedies: tuple[str, ...]
    wall_s: float
    tactics: Tactics = PLAIN
    terms: Terms = DEFAULT_TERMS

    @property
    def feasible(self) -> bool:
        """Some layout fits in memory, or experts outside HBM make it fit."""
        return any(search.fitting for _, search in self.searches) or any(o.deployments for o in self.outside)

    @property
    def meets_slo(self) -> bool:
        """The winner meets the SLO at the demanded load."""
        return self.winner is not None and self.winner.meets_slo

    @property
    def considered(self) -> int:
        """Candidates counted over all clusters."""
        return sum(search.considered for _, search in self.searches)


def recommend(
    model: ModelConfig,
    clusters: list[Cluster],
    workload: Workload,
    slo: Slo,
    engine: Engine,
    *,
    kv_formats: tuple[str, ...] | None = None,
    experts: ExpertSettings = AS_SERVED,
    tactics: Tactics = PLAIN,
    router: str = "least_requests",
    terms: Terms = DEFAULT_TERMS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Recommendation:
    """Cheapest layout of `model` on one of `clusters` that serves `workload` within `slo`."""
    start = time.perf_counter()
    check_context(model, workload)
    trial = partial(run, slo=slo, seed=seed)
    searches: list[tuple[str, SearchResult]] = []
    runs: list[Run] = []
    for cluster in clusters:
        variants = [override(model, kv=kv) for kv in kv_formats or default_kv_formats(model, cluster)]
        search = Search(cluster, engine, workload, slo, experts, tactics, router, terms)
        found = search.run(variants, _part(progress, f"search {cluster.name}"))
        searches.append((cluster.name, found))
        runs += _simulate_finalists(found, trial, workload, _part(progress, f"simulate {cluster.name}"))
    beyond = _beyond_hbm(model, clusters, searches, workload, engine, experts)
    runs += [
        trial(replace(tried, router=router, terms=terms), workload) for found in beyond for tried in found.deployments
    ]
    runs += _balanced(runs, trial, workload)
    runs.sort(key=_preference)
    winner = runs[0] if runs else None
    meets = winner is not None and winner.meets_slo
    return Recommendation(
        model,
        tuple(clusters),
        workload,
        slo,
        engine,
        experts,
        seed,
        winner,
        tuple(runs),
        tuple(searches),
        beyond,
        _sustained_factor(winner, trial, workload) if winner and meets else 0.0,
        _remedies(model, searches, clusters, workload, engine, winner, terms),
        time.perf_counter() - start,
        tactics,
        terms,
    )


def _beyond_hbm(
    model: ModelConfig,
    clusters: list[Cluster],
    searches: list[tuple[str, SearchResult]],
    workload: Workload,
    engine: Engine,
    experts: ExpertSettings,
) -> tuple[Outside, ...]:
    """Residency policies on clusters whose HBM is too small, or on all if the user asked for a policy."""
    if model.moe is None:
        return ()
    return tuple(
        outside(model, cluster, workload, engine, experts)
        for cluster, (_, found) in zip(clusters, searches, strict=True)
        if not found.fitting or experts.residency is not None
    )


def _remedies(
    model: ModelConfig,
    searches: list[tuple[str, SearchResult]],
    clusters: list[Cluster],
    workload: Workload,
    engine: Engine,
    winner: Run | None,
    terms: Terms,
) -> tuple[str, ...]:
    """What would meet the SLO, or hold in HBM what the winner keeps outside; nothing when all is well."""
    if winner is not None and winner.meets_slo and winner.deployment.offload is None:
        return ()
    return remedies(model, searches, clusters, workload, engine, winner, terms)


def default_kv_formats(model: ModelConfig, cluster: Cluster) -> tuple[str, ...]:
    """KV precisions worth considering: the checkpoint's, and FP8 where the GPU multiplies FP8."""
    formats = [model.kv_format]
    if "fp8" in dict(cluster.system.gpu.flop_per_s) and not model.kv_format.startswith("fp8"):
        formats.append("fp8")
    return tuple(formats)


def _simulate_finalists(
    found: SearchResult, trial: Callable[..., Run], workload: Workload, progress: Callable[[float], None]
) -> list[Run]:
    """Simulate the best of each GPU count, smallest first, until enough of them meet the SLO.

    On counts below the first that passes, the best three distinct layouts have been simulated and failed, and up to
    eight as long as the last one missed by less than 15 %: the GPU count recommended is the smallest found so.
    """
    hopeful = [c for c in found.survivors if c.score <= _HOPELESS_SCORE]
    hopeless = [c for c in found.survivors if c.score > _HOPELESS_SCORE]
    if hopeless and hopeful:
        near = min(hopeless, key=lambda c: c.score)
        text = f"{near.name}: estimated at {near.score:.2f} x its tightest limit"
        found.reject(f"estimated beyond {_HOPELESS_SCORE:g} x a limit", len(hopeless), near.score, text)
    tried = hopeful or _best_distinct(hopeless, _FINALISTS_PER_COUNT)
    runs: list[Run] = []
    passed = 0
    counts = sorted({c.num_gpus for c in tried})
    for done, count in enumerate(counts):
        if passed and (passed >= _TOP or len(runs) >= _MAX_RUNS):
            break
        wanted = _FINALISTS_PER_COUNT if not passed else _TOP - passed
        queue = _best_distinct([c for c in tried if c.num_gpus == count], None)
        for number, candidate in enumerate(queue):
            goes_on = not passed and number < _NEAR_FINALISTS and runs and runs[-1].worst_ratio <= _NEAR_RATIO
            if number >= wanted and not goes_on:
                break
            result = trial(candidate.deployment, workload)
            runs.append(result)
            passed += result.meets_slo
            if not result.meets_slo:
                text = f"{candidate.name}: {result.worst_objective}"
                text += "" if result.worst_objective == UNSUSTAINED else f" at {result.worst_ratio:.2f} x its limit"
                found.reject(f"simulated, misses {result.worst_objective}", 1, result.worst_ratio, text)
        progress((done + 1) / len(counts))
    _count_unsimulated(found, runs, hopeful)
    progress(1.0)
    return runs


def _balanced(runs: list[Run], trial: Callable[..., Run], workload: Workload) -> list[Run]:
    """The best run and those that miss by little, with their experts balanced where that is worth it."""
    best = sorted(runs, key=_preference)[:1]
    near = [r for r in runs if not r.meets_slo and r.worst_ratio <= _NEAR_RATIO and r not in best]
    found = []
    for result in [*best, *near[:_TOP]]:
        options = balance_options(result)
        if options:
            chosen = max(options, key=lambda option: (option.capacity_per_s, -option.decode_s))
            if chosen.capacity_per_s > (1 + _BALANCE_GAIN) * options[0].capacity_per_s:
                found.append(trial(chosen.deployment, workload))
    return found


def _count_unsimulated(found: SearchResult, runs: list[Run], hopeful: list[Candidate]) -> None:
    """Survivors that were never simulated: another limit or layout of the same size, or more GPUs than needed."""
    simulated = {id(result.deployment) for result in runs}
    left = [c for c in (hopeful or found.survivors) if id(c.deployment) not in simulated]
    largest = max((result.num_gpus for result in runs), default=0)
    for reason, lost in (
        ("ranked behind the simulated finalists", [c for c in left if c.num_gpus <= largest]),
        (MORE_THAN_NEEDED, [c for c in left if c.num_gpus > largest]),
    ):
        if lost:
            best = min(lost, key=lambda c: c.score)
            text = f"{best.name}: estimated at {best.score:.2f} x its tightest limit"
            found.reject(reason, len(lost), best.score, text)


def _best_distinct(candidates: list[Candidate], count: int | None) -> list[Candidate]:
    """The best candidates of different layouts, in order of `rank`."""
    best: dict[tuple[object, ...], Candidate] = {}
    for candidate in sorted(candidates, key=rank):
        deployment = candidate.deployment
        best.setdefault((deployment.layout, deployment.model.kv_format, deployment.backend), candidate)
    return list(best.values())[:count]


def rank(candidate: Candidate) -> tuple[int, bool, int, int, float]:
    """Score, with the handicap of complexity, in steps of 5 %; ties go to bf16 KV, the plainer layout, the engine's
    default limits, then the score."""
    deployment, limits = candidate.deployment, candidate.deployment.limits
    gpu = deployment.cluster.system.gpu
    default = deployment.engine.budget(gpu.hbm_bytes, gpu.arch)
    unusual = (limits.max_num_seqs != default.max_num_seqs) + (limits.max_batched_tokens != default.max_batched_tokens)
    quantised = deployment.model.kv_format.startswith("fp8")
    mixed = _complexity(deployment.layout)
    handicapped = candidate.score * (1 + _COMPLEXITY_HANDICAP * mixed)
    return (round(handicapped / _TIE), quantised, mixed, unusual, candidate.score)


def _complexity(layout: Layout) -> int:
    """How many ways of cutting a layout mixes; operators prefer the plainer of two equal ones."""
    mixes_attention = layout.tp > 1 and layout.attention_dp > 1
    mixes_experts = layout.ep > 1 and layout.moe_tp > 1
    return (layout.pp > 1) + mixes_attention + mixes_experts + (layout.redundant_experts > 0)


def _preference(result: Run) -> tuple[bool, float, float, int, float]:
    """Meeting the SLO first, then cost, then margin; runs that miss are ordered by how much they miss."""
    cost = result.deployment.usd_per_hour
    paid = result.num_gpus * 1e6 if cost is None else cost
    deployment = result.deployment
    margin = result.worst_ratio * (1 + _COMPLEXITY_HANDICAP * _complexity(deployment.layout))
    margin *= 1 + _FP8_KV_HANDICAP if deployment.model.kv_format.startswith("fp8") else 1.0
    if not result.meets_slo:
        return (True, result.worst_ratio, paid, 0, 0.0)
    return (False, paid, round(margin / _TIE), _complexity(deployment.layout), margin)


def _sustained_factor(winner: Run, trial: Callable[..., Run], workload: Workload) -> float:
    factor = 1.0
    for step in HEADROOM_STEPS:
        if not trial(winner.deployment, scaled(workload, step)).meets_slo:
            break
        factor = step
    return factor


def _part(progress: Progress | None, label: str) -> Callable[[float], None]:
    return (lambda share: progress(label, share)) if progress else (lambda share: None)
