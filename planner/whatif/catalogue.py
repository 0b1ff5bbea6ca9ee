"""Replicas of every layout with their steady states, put under any load in milliseconds.

Steady states depend on model, system, lengths and experts, not on rate or SLO: they are computed once per such set
and then loaded with whatever is asked. Pipelines and quantised caches are looked at when nothing plainer meets the
SLO; batch limits are the engine's defaults, with fewer sequences where the buffers of so many leave no room.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from planner.deployment import Deployment, deploy
from planner.economics import gpu_hour, usd_per_mtok
from planner.engine import Limits
from planner.enumeration import backends, layouts
from planner.errors import PlannerError
from planner.fit import limits_for
from planner.layout import Layout, layout_problem
from planner.memory import Ledger
from planner.model import ModelConfig
from planner.model.precision import override
from planner.recommend import default_kv_formats, rank
from planner.search import TAIL, Candidate, Search
from planner.steady import SteadyState
from planner.whatif.question import Question, ask
from planner.whatif.scenario import Scenario
from planner.workload import Slo

LOAD = "load"
_FEWER_SEQS = (256, 64, 16)
_FEW = 16
"""Sequences at once where experts lie outside HBM; their caches take the room of experts (`planner.outside`)."""
_CURVE_POINTS = 48
_HOPELESS = 1.25
"""Where the plainest layouts miss by more, pipelines and quantised caches will not save the question."""


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """One replica of a layout: `steady` is a rank of it at every batch, `running` the sequences it can run at once."""

    deployment: Deployment
    steady: SteadyState
    running: float

    @property
    def key(self) -> str:
        """Layout as on the command line, which tells kinds apart together with the precision of the cache."""
        return layout_text(self.deployment.layout)


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """Replicas of `kind` under the demand. `ratios` are objectives over their limits, and demand over capacity."""

    kind: Kind
    candidate: Candidate
    ratios: dict[str, float]
    output_tok_per_s: float
    usd_per_mtok_output: float | None

    @property
    def worst(self) -> tuple[str, float]:
        """The tightest of the ratios."""
        return max(self.ratios.items(), key=lambda item: item[1])

    @property
    def meets_slo(self) -> bool:
        """Every objective is expected to hold and the load to be carried."""
        return self.worst[1] <= 1.0

    @property
    def num_gpus(self) -> int:
        """GPUs of all replicas."""
        return self.candidate.num_gpus


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """A replica over its batch, arrays `[batch]`; `within` is the last index that keeps every objective, or None."""

    batch: np.ndarray
    tok_per_s_per_user: np.ndarray
    output_tok_per_s_per_gpu: np.ndarray
    requests_per_s: np.ndarray
    within: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Catalogue:
    """Kinds that fit, and those that do not with the reason and the excess over what is there."""

    kinds: tuple[Kind, ...]
    misfits: tuple[tuple[float, str], ...]


def estimates(question: Question) -> tuple[list[Estimate], list[tuple[float, str]]]:
    """Every kind in every number of replicas under the demand; and what does not fit, nearest miss first."""
    found: list[Estimate] = []
    misfits: list[tuple[float, str]] = []
    for stage in range(_stages(question)):
        catalogue = _catalogue(_unloaded(question), stage)
        found += [e for kind in catalogue.kinds for e in loaded(question, kind)]
        misfits += catalogue.misfits
        least = min((e.worst[1] for e in found), default=0.0)
        if found and (least <= 1.0 or least > _HOPELESS or question.layout is not None):
            break
    return found, sorted(misfits)


def best(found: list[Estimate]) -> Estimate | None:
    """The cheapest that meets the SLO, else what misses it least; equals in the order of a plan."""
    if not found:
        return None
    passing = [e for e in found if e.meets_slo]
    if passing:
        fewest = min(e.num_gpus for e in passing)
        return min((e for e in passing if e.num_gpus == fewest), key=lambda e: rank(e.candidate))
    return min(found, key=lambda e: (e.worst[1], e.num_gpus))


def loaded(question: Question, kind: Kind) -> list[Estimate]:
    """`kind` in every number of replicas that the cluster has room for, under the demand of `question`."""
    layout = kind.deployment.layout
    most = question.cluster.num_gpus // layout.replica_gpus
    counts = np.arange(1, most + 1)
    if question.layout is not None:
        counts = counts[counts == question.layout.replicas]
    if not len(counts):
        return []
    search = _search(question)
    return [_estimate(question, kind, c) for c in search.loaded(kind.deployment, kind.steady, counts)]


def curve(question: Question, kind: Kind) -> Curve:
    """What one replica of `kind` gives at every batch it can run, without waiting for a demand."""
    layout, steady = kind.deployment.layout, kind.steady
    search, output = _search(question), question.workload.mean_output_tokens
    batch = np.geomspace(1.0, max(1.0 + 1e-9, min(kind.running, steady.batch[-1])), _CURVE_POINTS)
    worst = np.maximum.accumulate(_ratios(question.slo, search.means(steady, batch), output))
    within = None
    if worst[0] <= 1.0:
        # The batch at which the first objective reaches its limit becomes a point of the curve.
        last = float(np.exp(np.interp(0.0, np.log(worst) + np.arange(len(batch)) * 1e-12, np.log(batch))))
        batch = np.unique(np.append(batch, last))
        within = int(np.searchsorted(batch, last))
    rate = np.interp(batch, steady.batch, np.maximum.accumulate(steady.requests_per_s))
    rate = rate * layout.pp * layout.attention_dp
    tpot_s = steady.tpot_at(batch)
    return Curve(batch, 1 / tpot_s, rate * output / layout.replica_gpus, rate, within)


def _ratios(slo: Slo, means: tuple[np.ndarray, np.ndarray], output_tokens: float) -> np.ndarray:
    """Largest estimated objective over its limit, `[batch]`."""
    ttft_s, tpot_s = means
    by_metric = {"ttft": ttft_s, "tpot": tpot_s, "e2e": ttft_s + tpot_s * output_tokens}
    return np.asarray(
        np.max([by_metric[o.metric] * TAIL[o.metric][o.statistic] / o.limit_s for o in slo.objectives], 0)
    )


def objectives(candidate: Candidate, slo: Slo, output_tokens: float) -> dict[str, tuple[float, float]]:
    """Estimated value and limit [s] of each objective, percentiles by the ratios that rank layouts in a search."""
    means = {"ttft": candidate.ttft_s, "tpot": candidate.tpot_s}
    means["e2e"] = candidate.ttft_s + candidate.tpot_s * output_tokens
    return {o.name: (means[o.metric] * TAIL[o.metric][o.statistic], o.limit_s) for o in slo.objectives}


def layout_text(layout: Layout) -> str:
    """`layout` as the command line takes it.

    >>> layout_text(Layout(tp=8, ep=8, replicas=2))
    'tp=8,ep=8,replicas=2'
    """
    degrees = {
        "tp": layout.tp,
        "attention_dp": layout.attention_dp,
        "ep": layout.ep,
        "moe_tp": layout.moe_tp if layout.ep > 1 else 1,
        "pp": layout.pp,
        "replicas": layout.replicas,
        "redundant_experts": layout.redundant_experts,
    }
    kept = {name: n for name, n in degrees.items() if n > 1 or (name == "redundant_experts" and n > 0)}
    return ",".join(f"{name}={n}" for name, n in kept.items()) or "tp=1"


def price_per_gpu_hour(question: Question) -> float | None:
    """Rent, or cost of owning, of a GPU; None when no price is known."""
    price = gpu_hour(question.cluster.system)
    return price.usd if price else None


def _estimate(question: Question, kind: Kind, candidate: Candidate) -> Estimate:
    workload, slo = question.workload, question.slo
    output = workload.mean_output_tokens
    ratios = {name: value / limit for name, (value, limit) in objectives(candidate, slo, output).items()}
    layout, users = candidate.deployment.layout, workload.arrivals.concurrency
    if users:
        ratios[LOAD] = candidate.batch / max(kind.running, 1e-9)
        ranks = layout.replicas * layout.pp * layout.attention_dp
        rate = float(np.interp(candidate.batch, kind.steady.batch, kind.steady.requests_per_s)) * ranks
    else:
        ratios[LOAD] = workload.arrivals.rate_per_s / max(candidate.capacity_per_s, 1e-12)
        rate = min(workload.arrivals.rate_per_s, candidate.capacity_per_s)
    tok_per_s = rate * output
    usd = usd_per_mtok(price_per_gpu_hour(question), candidate.num_gpus, tok_per_s)
    return Estimate(kind, candidate, ratios, tok_per_s, usd)


def _unloaded(question: Question) -> Scenario:
    """The scenario without what does not change steady states."""
    bare = replace(question.scenario, rivals="", seed=0, slo="ttft_p95=2s", gpus=question.cluster.num_gpus)
    if question.workload.shares or question.scenario.residency:
        return bare
    return replace(bare, rate=0.0 if bare.trace else 1.0, users=0)


def _stages(question: Question) -> int:
    formats = 1 if question.scenario.kv else len(default_kv_formats(question.model, question.cluster))
    return 1 if question.scenario.residency else 2 * formats


@lru_cache(maxsize=48)
def _catalogue(scenario: Scenario, stage: int) -> Catalogue:
    """Kinds of one stage: 0 without pipelines, 1 with; then the same with the next format of the cache."""
    question = ask(scenario)
    assert isinstance(question, Question)
    formats = (question.model.kv_format,) if scenario.kv else default_kv_formats(question.model, question.cluster)
    model = question.model if scenario.kv else override(question.model, kv=formats[stage // 2])
    search, kinds = _search(question), []
    misfits: list[tuple[float, str]] = []
    for deployment in _deployments(question, model, pipelined=stage % 2 == 1, misfits=misfits):
        steady = search.state(deployment)
        most = search.running(deployment.layout, deployment.limits.max_num_seqs, deployment.memory, steady)
        kinds.append(Kind(deployment, steady, most))
    return Catalogue(tuple(kinds), tuple(misfits))


@lru_cache(maxsize=64)
def _search(question: Question) -> Search:
    q = question
    return Search(q.cluster, q.engine, q.workload, q.slo, q.experts, q.tactics)


def _deployments(
    question: Question, model: ModelConfig, *, pipelined: bool, misfits: list[tuple[float, str]]
) -> Iterator[Deployment]:
    """One replica of every layout that is asked for and fits."""
    scenario, context = question.scenario, _context(question)
    if scenario.residency:
        yield from _outside_hbm(question, model, misfits)
        return
    tactics = question.tactics.serving(model)
    bare = Ledger(model, question.cluster.system, question.engine, replace(tactics, overlap=None))
    for layout in _wanted(question, model, pipelined):
        if tactics.speculation is not None and tactics.speculation.problem(layout):
            continue
        for backend in backends(question.engine, layout):
            if scenario.backend and layout.attention_dp > 1 and backend != scenario.backend:
                continue
            found = _limits(question, bare, layout, backend, context)
            if isinstance(found, tuple):
                misfits.append(found)
                continue
            use = bare.use(layout, found, backend, context)
            fixed = (model, question.cluster, question.engine, layout, found, backend, use, question.experts)
            yield Deployment(*fixed, None, tactics)


def _wanted(question: Question, model: ModelConfig, pipelined: bool) -> Iterator[Layout]:
    """Layouts of one replica under the knobs of the scenario; the one that is named, if one is."""
    scenario = question.scenario
    if question.layout is not None:
        yield replace(question.layout, replicas=1)
        return
    for layout in layouts(model, question.cluster, question.engine):
        if (layout.pp > 1) != pipelined or (scenario.ep and layout.ep != scenario.ep):
            continue
        copied = replace(layout, redundant_experts=scenario.redundant if layout.ep > 1 else 0)
        if scenario.redundant and (layout.ep == 1 or layout_problem(model, copied)):
            continue
        yield copied


def _limits(
    question: Question, ledger: Ledger, layout: Layout, backend: str, context: int
) -> Limits | tuple[float, str]:
    """The engine's limits, or fewer sequences, under which the longest request fits; else excess and reason."""
    scenario, system = question.scenario, question.cluster.system
    given = limits_for(question.engine, system, scenario.seqs or None, scenario.tokens or None, layout.attention_dp)
    most = question.engine.overheads.low_latency_tokens if backend == "deepep" else given.max_batched_tokens
    limits = ledger.tactics.limits(given, layout, most)
    longest = question.workload.max_prompt_tokens + question.workload.max_output_tokens
    miss = (np.inf, "")
    for seqs in (limits.max_num_seqs, *(n for n in _FEWER_SEQS if n < limits.max_num_seqs)):
        tried = replace(limits, max_num_seqs=seqs)
        use = ledger.use(layout, tried, backend, context)
        room = use.kv_tokens // seqs if question.engine.kv_slots else use.kv_tokens
        if use.fits and room >= longest:
            return tried
        over = use.needed_bytes / use.budget_bytes if use.breaking_term else longest / max(room, 1)
        what = (
            f"{layout}: {use.needed_bytes / 1e9:.1f} GB before KV cache, the engine may use "
            f"{use.budget_bytes / 1e9:.1f} GB per GPU; the last straw: {use.breaking_term}"
            if use.breaking_term
            else f"{layout}: room for {room:,} cached tokens, the longest request has {longest:,}"
        )
        miss = min(miss, (over, what))
    return miss


def _outside_hbm(question: Question, model: ModelConfig, misfits: list[tuple[float, str]]) -> Iterator[Deployment]:
    """A replica per node that keeps experts outside HBM; every GPU of it holds a slice of each expert."""
    gpus = question.cluster.gpus_per_node
    layout = Layout(tp=gpus, moe_tp=gpus) if question.layout is None else replace(question.layout, replicas=1)
    given = limits_for(question.engine, question.cluster.system, question.scenario.seqs or _FEW)
    fixed = (model, question.cluster, layout, question.engine, given, "all_reduce", _context(question))
    try:
        yield deploy(*fixed, question.experts, question.tactics)
    except PlannerError as error:
        misfits.append((np.inf, str(error)))


def _context(question: Question) -> int:
    return int(question.workload.mean_prompt_tokens + question.workload.mean_output_tokens / 2)
