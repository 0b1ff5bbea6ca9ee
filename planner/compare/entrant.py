"""One model on one system: its own best layout by simulation, and the curves that answer what-if questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.compare.estimator import Estimator
from planner.compare.question import Offer, Question
from planner.compare.whatif import WhatIf, doubles, fabric
from planner.deployment import Run, run, scaled
from planner.facts.certainty import ratios_of
from planner.facts.plan import plan_facts
from planner.hardware import Cluster
from planner.recommend import HEADROOM_STEPS as PLAN_STEPS
from planner.recommend import Recommendation, recommend
from planner.routing import named_skew
from planner.search import MAX_OFFERED_GPUS
from planner.sizing import Anchor, Replica, anchored, demand_of, gpus_needed, key_of
from planner.validation.intervals import Ratios

Facts = dict[str, Any]

LONGER = 1.25
"""Factor on prompts and on outputs at which capacities are computed anew for their elasticity."""
_KEPT = 10
"""Replica kinds kept for what-if questions: those that take the fewest GPUs, and the winner's."""
_SPARE = 1.3
_GROWTH = 1.6
_TRIES = 3
_STEPS = (1.1, 1.25, 1.5, 2.0, 3.0, 6.0, 12.0, 24.0, 48.0)
_BISECTIONS = 2
MOST_TESTED = _STEPS[-1]
"""Multiple of the demand beyond which nobody looks."""


@dataclass(frozen=True, slots=True, eq=False)
class Curves:
    """What replicas carry in closed form.

    `every` are all kinds that fit; `kept` the few that take the fewest GPUs. `changed` maps a change (`prompt`,
    `output`, `even_experts`, `oversubscription`) to `kept` under it, None where a kind no longer fits.
    """

    every: tuple[Replica, ...] = ()
    kept: tuple[Replica, ...] = ()
    changed: tuple[tuple[str, tuple[Replica | None, ...]], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Entrant:
    """One model on one system. `plan` holds the facts of its recommendation, the same that `moeplan plan` prints.

    `carries` is how many times the demand the recommended layout sustains in simulation (0 when it misses); `time` and
    `ttft` are 80 % bounds of measured over predicted. `num_gpus` is 0 where nothing runs.
    """

    cluster: Cluster
    plan: Facts
    meets_slo: bool
    feasible: bool
    num_gpus: int
    carries: float
    time: Ratios | None
    ttft: Ratios | None
    anchor: Anchor
    curves: Curves
    whatifs: tuple[WhatIf, ...] = ()


def evaluate(question: Question, index: int, offer: Offer) -> Entrant:
    """Plan the demand `index` of `question` on `offer`, and sample what its replicas carry, now and under changes."""
    estimator = Estimator(question, question.demands[index], question.experts[index], offer)
    found = estimator.replicas()
    cluster = _sized(estimator, found) if offer.is_open else offer.cluster
    answer = _plan(estimator, cluster)
    for _ in range(_TRIES if offer.is_open else 0):
        larger = replace(cluster, nodes=int(np.ceil(cluster.nodes * _GROWTH)) + 1)
        if answer.meets_slo or not answer.feasible or larger.num_gpus > MAX_OFFERED_GPUS:
            break
        cluster = larger
        answer = _plan(estimator, cluster)
    return _entrant(estimator, answer, cluster, found)


def _plan(estimator: Estimator, cluster: Cluster) -> Recommendation:
    question, demand, offer = estimator.question, estimator.demand, estimator.offer
    return recommend(
        demand.model,
        [cluster],
        demand.workload,
        demand.slo,
        question.engine,
        kv_formats=question.kv_formats,
        experts=estimator.experts,
        router=question.router,
        terms=question.terms if offer.basis is None else replace(question.terms, basis=offer.basis),
        seed=question.seed,
    )


def _sized(estimator: Estimator, found: list[Replica]) -> Cluster:
    """Cluster of as many nodes as the estimate asks for, with a reserve."""
    largest = estimator.widest
    needed = estimator.fewest(found, Anchor(1.0))
    if needed is None:
        return largest
    per_node = largest.gpus_per_node
    nodes = min(-(-int(needed[0] * _SPARE) // per_node) + 1, MAX_OFFERED_GPUS // per_node)
    return replace(largest, nodes=max(1, nodes))


def _entrant(estimator: Estimator, answer: Recommendation, cluster: Cluster, found: list[Replica]) -> Entrant:
    winner, plan, slo = answer.winner, plan_facts(answer, ""), estimator.demand.slo
    if winner is None:
        return Entrant(cluster, plan, False, answer.feasible, 0, 0.0, None, None, Anchor(1.0), Curves())
    share = plan["origin_share"]
    is_resident = winner.deployment.offload is None
    carries = _carries(answer, winner) if is_resident else answer.sustained_factor
    anchor = anchored(found, answer.runs, winner, carries, slo) if is_resident else Anchor(1.0)
    kept = _kept(estimator, found, anchor, winner) if is_resident else []
    curves = Curves()
    whatifs: tuple[WhatIf, ...] = ()
    if kept:
        curves = Curves(tuple(found), tuple(kept), tuple(_changed(estimator, kept).items()))
        whatifs = (*fabric(estimator, found, anchor), *doubles(estimator, found, anchor))
    return Entrant(
        cluster,
        plan,
        answer.meets_slo,
        answer.feasible,
        winner.num_gpus,
        carries,
        ratios_of(winner.deployment, "tpot", share),
        ratios_of(winner.deployment, "ttft", share),
        anchor,
        curves,
        whatifs,
    )


def _carries(answer: Recommendation, winner: Run) -> float:
    """Multiple of the demand that the winner sustains: steps until one misses, the last of them halved twice."""

    def meets(factor: float) -> bool:
        workload = scaled(answer.workload, factor)
        return run(winner.deployment, workload, slo=answer.slo, seed=answer.seed).meets_slo

    low = answer.sustained_factor
    if not 0 < low < MOST_TESTED:
        return low
    high = next(step for step in _STEPS if step > low)
    while high > PLAN_STEPS[-1] and meets(high):
        if high == MOST_TESTED:
            return high
        low, high = high, next(step for step in _STEPS if step > high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def _kept(estimator: Estimator, found: Sequence[Replica], anchor: Anchor, winner: Run) -> list[Replica]:
    if not found:
        return []
    workload, slo = estimator.demand.workload, estimator.demand.slo
    gpus, carried = gpus_needed(found, demand_of(workload), slo, workload.mean_output_tokens, anchor)
    per_gpu = carried / np.array([replica.num_gpus for replica in found])
    order = sorted(range(len(found)), key=lambda i: (gpus[i] < 0, gpus[i], -per_gpu[i]))
    kept = [found[i] for i in order[:_KEPT]]
    own = next((replica for replica in found if replica.key == key_of(winner)), None)
    return kept if own is None or own in kept else [own, *kept[:-1]]


def _changed(estimator: Estimator, kept: Sequence[Replica]) -> dict[str, tuple[Replica | None, ...]]:
    """The replicas `kept` under one change each."""
    layouts, base = {replica.layout for replica in kept}, estimator.widest
    demand, is_kept = estimator.demand, layouts.__contains__
    new = {
        "prompt": estimator.replicas(workload=demand.workload.with_lengths(prompt=LONGER), only=is_kept),
        "output": estimator.replicas(workload=demand.workload.with_lengths(output=LONGER), only=is_kept),
    }
    if demand.model.moe is not None:
        even = replace(estimator.experts, skew=named_skew("uniform"))
        new["even_experts"] = estimator.replicas(experts=even, only=is_kept)
    if any(layout.replica_gpus > base.scale_up_gpus for layout in layouts):
        shared = replace(base, oversubscription=2 * base.oversubscription)
        new["oversubscription"] = estimator.replicas(cluster=shared, only=is_kept)
    by_key = {change: {replica.key: replica for replica in found} for change, found in new.items()}
    return {change: tuple(of.get(replica.key) for replica in kept) for change, of in by_key.items()}
