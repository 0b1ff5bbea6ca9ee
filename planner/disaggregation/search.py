"""Which layouts, how many replicas of each, and how the GPUs are split between prefill and decode.

The pools meet only at the link, so each is searched alone: every layout x token budget as a prefill pool, every layout
x sequence limit as a decode pool. Pairs are ranked by GPUs and by the larger of their two scores, and simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from planner.cost import StepCost
from planner.deployment import Deployment, with_replicas
from planner.disaggregation.deployment import Disaggregated, pair
from planner.disaggregation.handover import Handover
from planner.disaggregation.rates import (
    DecodeRate,
    Demand,
    PrefillRate,
    decode_curve,
    decode_rate,
    prefill_rate,
)
from planner.disaggregation.transfer import kv_route
from planner.economics import DEFAULT_TERMS, Terms
from planner.engine import Engine, Limits
from planner.enumeration import BATCHED_TOKENS, MAX_SEQS, MIN_BATCHED_TOKENS, backends, layouts
from planner.experts import AS_SERVED, ExpertSettings
from planner.hardware import Cluster
from planner.layout import Layout
from planner.memory import Ledger
from planner.model import ModelConfig
from planner.search import TAIL
from planner.workload import Slo, Workload

HOPELESS_SCORE = 1.25
"""Estimate over limit beyond which nothing is simulated: no single pool estimated above it met its SLO
(`benchmarks/estimates.py`), and pools of one phase are estimated better (`benchmarks/pools.py`)."""
_PREFILL_SEQS = 256
"""Sequences per rank of a prefill pool; more prompts than this never share a step."""
_KEPT_PER_COUNT = 2
_TIE = 0.05


@dataclass(frozen=True)
class Sized:
    """Replicas of one pool layout under the demand: its deployment, its score, what it could answer within the SLO.

    `score` is the largest of estimates over limits and load over capacity; `latency_s` is the time until a prompt is
    computed (prefill) or the time per token (decode) [s].
    """

    deployment: Deployment
    score: float
    latency_s: float
    within_per_s: float

    @property
    def num_gpus(self) -> int:
        """GPUs of all replicas."""
        return self.deployment.layout.num_gpus


@dataclass(frozen=True)
class PairCandidate:
    """A prefill and a decode pool with their estimate."""

    prefill: Sized
    decode: Sized
    ttft_s: float
    score: float

    @property
    def num_gpus(self) -> int:
        """GPUs of both pools."""
        return self.prefill.num_gpus + self.decode.num_gpus

    @property
    def price(self) -> float:
        """Rent per hour, or a large number per GPU where a price is unknown."""
        hourly = [pool.deployment.usd_per_hour for pool in (self.prefill, self.decode)]
        return self.num_gpus * 1e6 if None in hourly else sum(usd for usd in hourly if usd is not None)


@dataclass(frozen=True)
class Split:
    """One way of splitting the offered GPUs: what each pool could answer within the SLO, estimated [requests/s]."""

    prefill_gpus: int
    decode_gpus: int
    prefill_per_s: float
    decode_per_s: float

    @property
    def requests_per_s(self) -> float:
        """Rate of both together."""
        return min(self.prefill_per_s, self.decode_per_s)


@dataclass
class PoolSearch:
    """Everything that fits, as rates of one replica, and what became of the rest."""

    demand: Demand
    prefill: list[PrefillRate] = field(default_factory=list)
    decode: list[DecodeRate] = field(default_factory=list)
    num_considered: int = 0

    def joined(self, decode: PoolSearch) -> PoolSearch:
        """The prefill pools of this search with the decode pools of another."""
        return PoolSearch(self.demand, self.prefill, decode.decode, self.num_considered + decode.num_considered)

    @property
    def least_gpus(self) -> float:
        """GPUs of the smallest pair that holds the model; infinite where a pool cannot."""
        sizes = [[rate.deployment.layout.replica_gpus for rate in rates] for rates in (self.prefill, self.decode)]
        return sum(min(each, default=np.inf) for each in sizes)


def search_pools(
    model: ModelConfig,
    cluster: Cluster,
    engine: Engine,
    workload: Workload,
    handover: Handover,
    experts: ExpertSettings = AS_SERVED,
    progress: Callable[[float], None] | None = None,
    terms: Terms = DEFAULT_TERMS,
) -> PoolSearch:
    """Rates of every layout of `model` on up to all GPUs of `cluster` as a prefill and as a decode pool."""
    found = PoolSearch(Demand.of(workload))
    ledger = Ledger(model, cluster.system, engine)
    longest = (workload.max_prompt_tokens, workload.max_prompt_tokens + workload.max_output_tokens)
    work = list(layouts(model, cluster, engine))
    for index, layout in enumerate(work):
        for backend in backends(engine, layout):
            cost: StepCost | None = None
            for phase, limits in _choices(engine, layout, backend):
                found.num_considered += 1
                context = int(found.demand.context if phase == "decode" else found.demand.prompt_tokens)
                use = ledger.use(layout, limits, backend, max(1, context))
                kept = handover.reserved_decode_tokens if phase == "decode" else 0
                if use.breaking_term or use.kv_tokens // layout.pp < longest[phase == "decode"] + kept:
                    continue
                cost = cost or StepCost(model, layout, cluster, engine, backend, experts)
                deployment = Deployment(model, cluster, engine, layout, limits, backend, use, experts, terms=terms)
                if phase == "prefill":
                    found.prefill.append(prefill_rate(cost, deployment, found.demand))
                else:
                    curve = decode_curve(cost, found.demand, handover)
                    found.decode.append(decode_rate(curve, deployment, found.demand, handover))
        if progress:
            progress((index + 1) / len(work))
    return found


def _choices(engine: Engine, layout: Layout, backend: str) -> Iterator[tuple[str, Limits]]:
    """Token budgets of a prefill pool and sequence limits of a decode pool."""
    share = layout.attention_dp if engine.divides_prefill_by_attention_dp else 1
    most = engine.overheads.low_latency_tokens if backend == "deepep" else MAX_SEQS[-1]
    for tokens in sorted({max(MIN_BATCHED_TOKENS, tokens // share) for tokens in BATCHED_TOKENS}):
        yield "prefill", Limits(min(_PREFILL_SEQS, tokens, most * layout.pp), tokens)
    for seqs in MAX_SEQS:
        if -(-seqs // layout.pp) <= most:
            # What is preempted is computed again here, in steps of the smallest budget that holds the batch.
            yield "decode", Limits(seqs, max(BATCHED_TOKENS[0], seqs))


def candidates(
    found: PoolSearch, clusters: tuple[Cluster, Cluster], handover: Handover, slo: Slo
) -> list[PairCandidate]:
    """Pairs that may keep the SLO under the demand on (prefill, decode) clusters, cheapest first, then by score.

    Equal clusters are one that both pools share.
    """
    shared, (first, second) = clusters[0] == clusters[1], clusters
    prefill = _best_per_count(_sized_prefill(found, slo, first.num_gpus))
    decode = _best_per_count(_sized_decode(found, slo, second.num_gpus))
    pairs = [
        _estimated(found, p, d, handover, slo, shared)
        for p in prefill
        for d in decode
        if not shared or p.num_gpus + d.num_gpus <= first.num_gpus
    ]
    pairs = [candidate for candidate in pairs if candidate.score <= HOPELESS_SCORE]
    return sorted(pairs, key=lambda c: (c.price, round(c.score / _TIE), _plainness(c), c.score))


def deployed(candidate: PairCandidate, handover: Handover) -> Disaggregated:
    """The pair as something that can be simulated."""
    prefill, decode = candidate.prefill.deployment, candidate.decode.deployment
    return pair(prefill, decode, handover, shared=prefill.cluster == decode.cluster)


def _plainness(candidate: PairCandidate) -> int:
    """Pipelines and mixed cuts in both pools; operators prefer the plainer of two equal ones."""
    both = (candidate.prefill.deployment.layout, candidate.decode.deployment.layout)
    return sum((la.pp > 1) + (la.tp > 1 and la.attention_dp > 1) + (la.ep > 1 and la.moe_tp > 1) for la in both)


def _limit_s(slo: Slo, metric: str) -> float:
    """The tightest limit of a mean that the percentiles of `metric` allow [s]."""
    limits = [o.limit_s / TAIL[metric][o.statistic] for o in slo.objectives if o.metric == metric]
    return min(limits, default=np.inf)


def ttft_limit_s(slo: Slo) -> float:
    """Limit of the mean time until a prompt is computed [s]."""
    return _limit_s(slo, "ttft")


def token_limit_s(slo: Slo) -> float:
    """Limit of the time per token: no prompt interrupts a decode pool, so its tail is close to its mean."""
    return min((o.limit_s for o in slo.objectives if o.metric == "tpot"), default=np.inf)


def _sized_prefill(found: PoolSearch, slo: Slo, most_gpus: int) -> Iterator[Sized]:
    limit_s = ttft_limit_s(slo)
    for rate in found.prefill:
        within = rate.within_per_s(limit_s)
        for count in range(1, most_gpus // rate.deployment.layout.replica_gpus + 1):
            share = found.demand.rate_per_s / (count * rate.requests_per_s)
            ttft_s = float(rate.ttft_s(np.array(share)))
            score = max(share, ttft_s / limit_s)
            yield Sized(_copies(rate.deployment, count), score, ttft_s, count * within)


def _sized_decode(found: PoolSearch, slo: Slo, most_gpus: int) -> Iterator[Sized]:
    limit_s = token_limit_s(slo)
    for rate in found.decode:
        within = rate.within_per_s(limit_s)
        for count in range(1, most_gpus // rate.deployment.layout.replica_gpus + 1):
            each = found.demand.rate_per_s / count
            tpot_s = rate.tpot_at(each)
            score = max(each / max(rate.capacity_per_s, 1e-12), tpot_s / limit_s)
            yield Sized(_copies(rate.deployment, count), score, tpot_s, count * within)


def _copies(deployment: Deployment, count: int) -> Deployment:
    return replace(deployment, layout=with_replicas(deployment.layout, count))


def _best_per_count(options: Iterator[Sized]) -> list[Sized]:
    """The best of each GPU count, a few of different layouts, without those far beyond a limit."""
    best: dict[int, dict[Layout, Sized]] = {}
    for option in options:
        if option.score <= HOPELESS_SCORE:
            layouts_of = best.setdefault(option.num_gpus, {})
            known = layouts_of.get(option.deployment.layout)
            if known is None or option.score < known.score:
                layouts_of[option.deployment.layout] = option
    return [
        option
        for count in sorted(best)
        for option in sorted(best[count].values(), key=lambda o: o.score)[:_KEPT_PER_COUNT]
    ]


def _estimated(
    found: PoolSearch, prefill: Sized, decode: Sized, handover: Handover, slo: Slo, shared: bool
) -> PairCandidate:
    """Both pools with the link between them: TTFT holds transfer and, on average, half a decode step."""
    layouts_of = prefill.deployment.layout, decode.deployment.layout
    on = prefill.deployment.cluster, decode.deployment.cluster
    route = kv_route(prefill.deployment.model, *layouts_of, *on, shared)
    tokens = round(found.demand.prompt_tokens)
    after = {"prefilled": 0.0, "joined": 0.5, "decoded": 1.5}[handover.first_token]
    moved_s = route.transfer_s(tokens) if handover.first_token != "prefilled" else 0.0
    ttft_s = prefill.latency_s + moved_s + after * decode.latency_s
    links = found.demand.rate_per_s * max(
        route.sender_s(tokens) / (layouts_of[0].replicas * layouts_of[0].attention_dp),
        route.receiver_s(tokens) / (layouts_of[1].replicas * layouts_of[1].attention_dp),
    )
    e2e_s = ttft_s + found.demand.output_tokens * decode.latency_s
    score = max(prefill.score, decode.score, links, ttft_s / ttft_limit_s(slo), e2e_s / _limit_s(slo, "e2e"))
    return PairCandidate(prefill, decode, ttft_s, score)


def splits(found: PoolSearch, slo: Slo, total_gpus: int) -> list[Split]:
    """What the best pools of every split of `total_gpus` could answer within the SLO.

    Splits whose last prefill GPU gains nothing, or in which a pool can do nothing, are left out.
    """
    prefill = _best_within(found.prefill, ttft_limit_s(slo), total_gpus)
    decode = _best_within(found.decode, token_limit_s(slo), total_gpus)
    gaining = [n for n in range(1, total_gpus) if prefill[n] > prefill[n - 1]]
    rows = [Split(n, total_gpus - n, prefill[n], decode[total_gpus - n]) for n in gaining]
    return [row for row in rows if row.requests_per_s > 0]


def _best_within(rates: list[PrefillRate] | list[DecodeRate], limit_s: float, total_gpus: int) -> list[float]:
    """Highest rate within `limit_s` of up to n GPUs, for n = 0 to `total_gpus`, replicas of one layout each."""
    best = np.zeros(total_gpus + 1)
    gpus = np.arange(total_gpus + 1)
    for rate in rates:
        best = np.maximum(best, gpus // rate.deployment.layout.replica_gpus * rate.within_per_s(limit_s))
    values: list[float] = best.tolist()
    return values
