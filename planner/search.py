"""Every valid layout x limits x precision x replica count, pruned by memory and by optimistic bounds, then ranked.

A candidate is rejected only when even an optimistic estimate misses (no queueing, mean instead of percentile,
less a slack); everything else survives to be ranked and, if among the best of its GPU count, simulated.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter

import numpy as np

from planner.cost import StepCost
from planner.deployment import Deployment, with_replicas
from planner.economics import DEFAULT_TERMS, Terms
from planner.engine import Engine, Limits
from planner.enumeration import BATCHED_TOKENS, MAX_SEQS, MIN_BATCHED_TOKENS, backends, layouts
from planner.errors import InputError
from planner.experts import AS_SERVED, ExpertSettings
from planner.hardware import Cluster
from planner.layout import Layout
from planner.memory import WEIGHT_TERMS, Ledger, MemoryUse
from planner.model import ModelConfig
from planner.prefixhits import HitModel, caches_prefixes
from planner.steady import SteadyState, steady_state, steady_with_hits
from planner.steptime import Floats
from planner.tacticcost import step_cost
from planner.tactics import PLAIN, Tactics
from planner.workload import Slo, Workload

CANNOT_SUSTAIN = "cannot sustain the load"
CANNOT_DRAFT = "the draft model cannot be cut so"
MORE_THAN_NEEDED = "more GPUs than needed"
MAX_OFFERED_GPUS = 1024
_SURPLUS = 4.0
_KEPT_SURPLUS = 2
"""Capacity over demand, and replica counts that have it, beyond which further replicas are not looked at."""
_BOUND_SLACK = 0.8
"""Optimistic bounds are cut by this factor before they may reject."""
TAIL = {
    "ttft": {"mean": 1.0, "p50": 0.8, "p90": 2.0, "p95": 2.5, "p99": 3.5},
    "tpot": {"mean": 1.0, "p50": 0.95, "p90": 1.2, "p95": 1.35, "p99": 1.6},
    "e2e": {"mean": 1.0, "p50": 0.9, "p90": 1.6, "p95": 1.9, "p99": 2.5},
}
"""Ratio of a percentile to the mean used for ranking only; the simulation decides."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A deployment with its analytic estimate (seconds, and requests per second over all replicas).

    `score` is the largest ratio of an estimated objective to its limit, or of demand to capacity; below 1 is
    expected to meet the SLO.
    """

    deployment: Deployment
    batch: float
    ttft_s: float
    tpot_s: float
    capacity_per_s: float
    score: float
    hit_rate: float | None = None
    """Expected share of the prompt tokens found in prefix caches; None where requests share nothing."""

    @property
    def name(self) -> str:
        """Layout and limits."""
        return self.deployment.name

    @property
    def num_gpus(self) -> int:
        """GPUs of all replicas."""
        return self.deployment.layout.num_gpus


@dataclass
class SearchResult:
    """What was considered, why most of it fell, and what is left in order of GPU count and score."""

    considered: int = 0
    fitting: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    nearest_miss: dict[str, tuple[float, str]] = field(default_factory=dict)
    survivors: list[Candidate] = field(default_factory=list)

    def reject(self, reason: str, count: int, excess: float, text: str) -> None:
        """Count `count` candidates lost to `reason`; `text` is kept if its `excess` over the limit is the smallest."""
        if count:
            self.rejected[reason] += count
            if reason not in self.nearest_miss or excess < self.nearest_miss[reason][0]:
                self.nearest_miss[reason] = (excess, text)


def _check(cluster: Cluster, workload: Workload) -> None:
    if cluster.num_gpus > MAX_OFFERED_GPUS:
        raise InputError(
            f"{cluster.name} offers {cluster.num_gpus:,} GPUs; a plan searches up to {MAX_OFFERED_GPUS:,}. Plan a "
            "share of the demand on a share of the GPUs: replicas scale evenly."
        )
    if workload.arrivals.kind == "trace" and not np.isfinite(workload.arrivals.rate_per_s):
        raise InputError(f"{workload.name}: all rows arrive at once, which is no rate to plan for. Use --concurrency.")


class Search:
    """Evaluates candidates of one cluster under one engine against one workload and SLO."""

    def __init__(
        self,
        cluster: Cluster,
        engine: Engine,
        workload: Workload,
        slo: Slo,
        experts: ExpertSettings = AS_SERVED,
        tactics: Tactics = PLAIN,
        router: str = "least_requests",
        terms: Terms = DEFAULT_TERMS,
    ) -> None:
        self.cluster, self.engine, self.workload, self.slo, self.experts = cluster, engine, workload, slo, experts
        self.tactics, self.router, self.terms = tactics, router, terms
        self.result = SearchResult()
        _check(cluster, workload)
        self._context = int(workload.mean_prompt_tokens + workload.mean_output_tokens / 2)
        prompts = workload.requests(seed=0).prompt_tokens
        self._prompt_cv2 = float(prompts.var() / prompts.mean() ** 2)
        self._think_s = workload.conversation_think_s / workload.mean_turns
        self._hits: dict[int, HitModel] = {}
        self._longest = workload.max_prompt_tokens + workload.max_output_tokens

    def run(self, variants: list[ModelConfig], progress: Callable[[float], None] | None = None) -> SearchResult:
        """Search `variants` of one model (same weights, different precisions)."""
        kept = [(model, *self._ledgers(model)) for model in variants]
        work = [(*those, layout) for those in kept for layout in self._layouts(those[0])]
        overlap = self.tactics.overlap
        for index, (model, bare, overlapped, layout) in enumerate(work):
            for backend in backends(self.engine, layout):
                applies = overlap is not None and overlap.applies(layout, backend)
                self._evaluate(model, overlapped if applies else bare, layout, backend)
            if progress:
                progress((index + 1) / len(work))
        self.result.survivors.sort(key=lambda c: (c.num_gpus, c.score))
        return self.result

    def state(self, deployment: Deployment) -> SteadyState:
        """Steady state of one rank of `deployment` under the workload."""
        layout, budget = deployment.layout, deployment.limits.max_batched_tokens
        return self._steady(deployment.cost(), budget, deployment.memory.kv_tokens // layout.pp)

    def running(self, layout: Layout, max_seqs: int, use: MemoryUse, steady: SteadyState) -> float:
        """Sequences that one rank can run at once."""
        return min(max_seqs // layout.pp, steady.batch_within(use.kv_tokens / layout.pp, self._context))

    def means(self, steady: SteadyState, batch: Floats) -> tuple[Floats, Floats]:
        """Mean TTFT and TPOT [s] with `batch` running sequences per rank."""
        return steady.ttft_at(batch, self._prompt_cv2), steady.tpot_at(batch)

    def loaded(self, deployment: Deployment, steady: SteadyState, replicas: np.ndarray) -> list[Candidate]:
        """Estimates of each number of `replicas` of `deployment`, also where it cannot keep up or misses the SLO."""
        layout, use = deployment.layout, deployment.memory
        limit = np.array(self.running(layout, deployment.limits.max_num_seqs, use, steady), dtype=float)
        batch, capacity = self._load(steady, replicas * layout.pp * layout.attention_dp, limit)
        ttft_s, tpot_s, score = self._estimates(steady, batch, capacity)
        found = []
        for i, count in enumerate(replicas):
            placed = replace(deployment, layout=with_replicas(layout, int(count)))
            b, ttft, tpot, most, ratio = (float(values[i]) for values in (batch, ttft_s, tpot_s, capacity, score))
            hit_rate = None if steady.hit_rate is None else float(np.interp(b, steady.batch, steady.hit_rate))
            found.append(Candidate(placed, b, ttft, tpot, most, ratio, hit_rate))
        return found

    def _layouts(self, model: ModelConfig) -> list[Layout]:
        found = list(layouts(model, self.cluster, self.engine))
        speculation = self.tactics.speculation
        if speculation is None:
            return found
        drafted = [layout for layout in found if speculation.problem(layout) is None]
        lost = [layout for layout in found if layout not in drafted]
        if lost:
            self.result.reject(CANNOT_DRAFT, len(lost), 1.0, speculation.problem(lost[0]) or "")
        return drafted

    def _ledgers(self, model: ModelConfig) -> tuple[Ledger, Ledger]:
        """Ledgers of `model` for layouts that have no exchange to overlap, and for those that have."""
        tactics, system = self.tactics.serving(model), self.cluster.system
        bare = Ledger(model, system, self.engine, replace(tactics, overlap=None))
        return bare, Ledger(model, system, self.engine, tactics)

    def _evaluate(self, model: ModelConfig, ledger: Ledger, layout: Layout, backend: str) -> None:
        replicas = np.arange(1, self.cluster.num_gpus // layout.replica_gpus + 1)
        cost: StepCost | None = None
        tactics = ledger.tactics
        trials = [(b, n) for b in self._budgets(layout) for n in self._sequence_limits(layout, backend, b, tactics)]
        self.result.considered += len(trials) * len(replicas)
        for budget, choices in groupby(trials, key=itemgetter(0)):
            fitting = []
            for _, n in choices:
                use = ledger.use(layout, Limits(n, budget), backend, self._context)
                if use.breaking_term in WEIGHT_TERMS and (budget, n) == trials[0]:
                    # Larger limits take more memory, so none of them comes nearer to fitting.
                    self._fits(layout, use, n, len(trials) * len(replicas))
                    return
                if self._fits(layout, use, n, len(replicas)):
                    fitting.append((n, use))
            if not fitting:
                continue
            if cost is None:
                cost = step_cost(model, layout, self.cluster, self.engine, backend, self.experts, None, tactics)
            steady = self._steady(cost, budget, fitting[0][1].kv_tokens // layout.pp)
            self._place(model, layout, backend, budget, replicas, fitting, steady, tactics)

    def _steady(self, cost: StepCost, budget: int, kv_tokens: int) -> SteadyState:
        """Steady state of a rank; where requests share anything, with the hits of the caches of as many ranks as the
        demand takes if they forget nothing."""
        question = cost, budget, self.engine.policy, self.workload
        if not (self.workload.shares and caches_prefixes(cost.model, self.engine)):
            return steady_state(*question)
        ranks_per_replica = cost.layout.pp * cost.layout.attention_dp
        steady = steady_with_hits(*question, self._hit_model(ranks_per_replica), kv_tokens)
        if self.router != "prefix_affinity" and self.workload.prefix and not self.workload.turns:
            return steady
        rate = 0.0 if self.workload.arrivals.concurrency else self.workload.arrivals.rate_per_s
        needed = max(1, math.ceil(rate / (ranks_per_replica * float(steady.requests_per_s.max()))))
        if needed == 1:
            return steady
        return steady_with_hits(*question, self._hit_model(needed * ranks_per_replica), kv_tokens)

    def _hit_model(self, num_ranks: int) -> HitModel:
        if num_ranks not in self._hits:
            affinity = self.router == "prefix_affinity"
            self._hits[num_ranks] = HitModel(self.workload, self.engine.block_tokens, num_ranks, affinity)
        return self._hits[num_ranks]

    def _sequence_limits(self, layout: Layout, backend: str, budget: int, tactics: Tactics) -> list[int]:
        """Sequence limits that fit the token budget and, with DeepEP, the low-latency buffer of a decode step."""
        most = self.engine.overheads.low_latency_tokens if backend == "deepep" else budget
        running = {n: -(-n // layout.pp) for n in MAX_SEQS}
        each = tactics.query_tokens
        return [n for n in MAX_SEQS if running[n] * each <= budget and tactics.dispatched_tokens(running[n]) <= most]

    def _budgets(self, layout: Layout) -> list[int]:
        dp = layout.attention_dp if self.engine.divides_prefill_by_attention_dp else 1
        return sorted({max(MIN_BATCHED_TOKENS, tokens // dp) for tokens in BATCHED_TOKENS})

    def _fits(self, layout: Layout, use: MemoryUse, max_seqs: int, count: int) -> bool:
        """True when the layout fits and can cache one longest request; otherwise counts the rejection."""
        if use.breaking_term:
            over = use.needed_bytes / use.budget_bytes
            text = (
                f"{layout} on {self.cluster.system.name}: {use.needed_bytes / 1e9:.1f} GB before KV cache, the engine "
                f"may use {use.budget_bytes / 1e9:.1f} GB per GPU; {use.breaking_term} breaks it"
            )
            self.result.reject("does not fit", count, over, text)
            return False
        room = use.kv_tokens // max_seqs if self.engine.kv_slots else use.kv_tokens
        if room < self._longest:
            text = f"{layout} on {self.cluster.system.name}: {room:,} cached tokens, longest request {self._longest:,}"
            self.result.reject("KV cache below one request", count, self._longest / max(room, 1), text)
            return False
        return True

    def _place(
        self,
        model: ModelConfig,
        layout: Layout,
        backend: str,
        budget: int,
        replicas: np.ndarray,
        fitting: list[tuple[int, MemoryUse]],
        steady: SteadyState,
        tactics: Tactics,
    ) -> None:
        """Load `replicas` copies with the demand under every limit that fits, arrays of [limits, replicas], and keep
        what even optimistic bounds cannot exclude."""
        ranks = replicas * layout.pp * layout.attention_dp
        limit = np.array([[self.running(layout, n, use, steady)] for n, use in fitting], dtype=float)
        batch, capacity = self._load(steady, ranks, limit)
        names = [f"{n} seqs, {budget} tok/step on {self.cluster.system.name}" for n, _ in fitting]
        alive = self._within(layout, names, capacity / ranks, batch, ranks, limit)
        alive = self._bounded(steady, batch, layout, names, alive)
        alive = self._not_surplus(alive, capacity, batch, layout, names)
        self.result.fitting += batch.size
        ttft_s, tpot_s, score = self._estimates(steady, batch, capacity)
        hits = None if steady.hit_rate is None else np.interp(batch, steady.batch, steady.hit_rate)
        for i, j in zip(*np.nonzero(alive), strict=True):
            max_seqs, use = fitting[i]
            placed = with_replicas(layout, int(replicas[j]))
            fixed = (model, self.cluster, self.engine, placed, Limits(max_seqs, budget), backend, use, self.experts)
            deployment = Deployment(*fixed, None, tactics, self.router, self.terms)
            hit_rate = None if hits is None else float(hits[i, j])
            b, ttft, tpot, most, ratio = (float(found[i, j]) for found in (batch, ttft_s, tpot_s, capacity, score))
            self.result.survivors.append(Candidate(deployment, b, ttft, tpot, most, ratio, hit_rate))

    def _load(self, steady: SteadyState, ranks: np.ndarray, limit: Floats) -> tuple[Floats, Floats]:
        """Running batch per rank under the demand, and the request rate all ranks can sustain."""
        capacity = steady.capacity_per_s(limit) * ranks
        if self.workload.arrivals.concurrency:
            batch = steady.batch_of(self.workload.arrivals.concurrency / ranks, self._think_s)
            return np.broadcast_to(batch, capacity.shape), capacity
        return np.minimum(steady.batch_at(self.workload.arrivals.rate_per_s / ranks), limit), capacity

    def _within(
        self, layout: Layout, names: list[str], capacity: Floats, batch: Floats, ranks: np.ndarray, limit: Floats
    ) -> np.ndarray:
        if self.workload.arrivals.concurrency:
            alive = batch <= np.maximum(limit, 1.0)
            ratio = batch / np.maximum(limit, 1e-9)
        else:
            demand = self.workload.arrivals.rate_per_s / ranks
            alive = capacity >= demand * _BOUND_SLACK
            ratio = demand / np.maximum(capacity, 1e-12)
        self._count(~alive, ratio, layout, names, CANNOT_SUSTAIN, "demand is {:.2f} x capacity")
        return np.asarray(alive)

    def _not_surplus(
        self, alive: np.ndarray, capacity: Floats, batch: Floats, layout: Layout, names: list[str]
    ) -> np.ndarray:
        """`alive`, less replicas beyond the second count that has `_SURPLUS` times what the load needs."""
        if self.workload.arrivals.concurrency:
            excess = 1.0 / np.maximum(batch, 1e-12)
        else:
            excess = capacity / self.workload.arrivals.rate_per_s / _SURPLUS
        enough = (excess >= 1.0) & alive
        surplus = enough & (np.cumsum(enough, axis=1) > _KEPT_SURPLUS)
        text = f"capacity is {{:.1f}} x {_SURPLUS:g} x the load"
        self._count(surplus, excess, layout, names, MORE_THAN_NEEDED, text)
        return np.asarray(alive & ~surplus)

    def _bounded(
        self, steady: SteadyState, batch: Floats, layout: Layout, names: list[str], alive: np.ndarray
    ) -> np.ndarray:
        """`alive`, less where an objective is missed even without queueing."""
        decode_s = np.interp(batch, steady.batch, steady.decode_s)
        prefill_s = np.full(batch.shape, steady.prefill_s.min())
        bounds = {"tpot": decode_s, "ttft": prefill_s, "e2e": prefill_s + decode_s * self.workload.mean_output_tokens}
        for objective in self.slo.objectives:
            ratio = bounds[objective.metric] * _BOUND_SLACK / objective.limit_s
            meets = ratio <= 1.0
            text = f"{objective.metric.upper()} at best {{:.2f}} x its limit"
            reason = f"misses {objective.metric.upper()}"
            self._count(alive & ~meets, ratio / _BOUND_SLACK, layout, names, reason, text)
            alive = alive & meets
        return alive

    def _count(self, lost: np.ndarray, ratio: Floats, layout: Layout, names: list[str], reason: str, text: str) -> None:
        """Count the candidates of `layout` marked in `lost` [limits, replicas]; nearest is that of least `ratio`."""
        if lost.any():
            limit, replicas = divmod(int(np.argmin(np.where(lost, ratio, np.inf))), lost.shape[1])
            best = float(np.broadcast_to(ratio, lost.shape)[limit, replicas])
            placed = with_replicas(layout, replicas + 1)
            self.result.reject(reason, int(lost.sum()), best, f"{placed}, {names[limit]}: {text.format(best)}")

    def _estimates(self, steady: SteadyState, batch: Floats, capacity: Floats) -> tuple[Floats, Floats, Floats]:
        """TTFT, TPOT and score of `Candidate`."""
        ttft_s, tpot_s = self.means(steady, batch)
        estimates = {"ttft": ttft_s, "tpot": tpot_s, "e2e": ttft_s + tpot_s * self.workload.mean_output_tokens}
        load = 0.0 if self.workload.arrivals.concurrency else self.workload.arrivals.rate_per_s
        score = load / np.maximum(capacity, 1e-12)
        for o in self.slo.objectives:
            score = np.maximum(score, estimates[o.metric] * TAIL[o.metric][o.statistic] / o.limit_s)
        return ttft_s, tpot_s, score
