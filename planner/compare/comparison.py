"""The main flow: every offer planned for the same demand and SLO, side by side, and how sure the order is.

question ─┬─ offer 1 ─ evaluate per model ─ standing ─┐
          ├─ offer 2 ─ ...                            ├─ winner ─ odds, swings, bands, growth, inverse questions
          └─ offer n ─ ...                            ┘
Offers are evaluated in processes of their own; the answer does not depend on how many.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np

from planner.compare.bands import Band, FrontPoint, bands, front
from planner.compare.entrant import Entrant, evaluate
from planner.compare.inverse import Bought, Ceiling, Limit, bought, ceilings, check_limit
from planner.compare.question import Offer, Question
from planner.compare.standing import Standing, World, standing
from planner.compare.uncertainty import Odds, Swing, odds, swings
from planner.cores import num_cores
from planner.deployment import check_context
from planner.economics import RentOrBuy, rent_or_buy
from planner.errors import InputError, nearest

Progress = Callable[[str, float], None]
_LOADS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
MOST_GROWTH = 16.0
"""Largest multiple of the demand that is looked at."""
_CEILINGS = (0.5, 1.0, 2.0)
"""Cost ceilings looked at when none is stated, as multiples of the winner's cost at full load."""


@dataclass(frozen=True, slots=True)
class CostPoint:
    """GPUs and bill at a multiple of the demand (estimate); None where the offer cannot serve it or has no price."""

    demand_factor: float
    num_gpus: int | None
    usd_per_month: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The answer. `standings` are in order of preference; `winner` is None when no offer meets the SLO.

    `room` is by offer the largest multiple of the demand that the GPUs it is billed for carry. `fronts`, `bands` and
    `ceilings` are of the first model.
    """

    question: Question
    standings: tuple[Standing, ...]
    winner: Standing | None
    baseline: str
    odds: dict[str, Odds]
    swings: tuple[Swing, ...]
    fronts: dict[str, tuple[FrontPoint, ...]]
    bands: tuple[Band, ...]
    room: dict[str, float]
    costs: dict[str, tuple[CostPoint, ...]]
    ceilings: tuple[Ceiling, ...]
    limit: Limit | None
    bought: tuple[Bought, ...]
    rent_or_buy: RentOrBuy | None
    wall_s: float


def compare(
    question: Question,
    offers: tuple[Offer, ...],
    *,
    baseline: str | None = None,
    limit: Limit | None = None,
    max_usd_per_mtok: float | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Plan all models of `question` on every offer and put the offers in order.

    `jobs` processes work at once, by default as many as there are cores. Raises InputError for an unknown baseline, a
    limit that buys nothing, or a workload that a model cannot take.
    """
    start, terms = time.perf_counter(), question.terms
    reference = _baseline(offers, baseline)
    _check_ceiling(max_usd_per_mtok)
    if limit is not None:
        if len(question.demands) > 1:
            raise InputError(f"{limit} is asked of one model: leave --also out, or the limit")
        check_limit(offers, terms, limit)
    for demand in question.demands:
        check_context(demand.model, demand.workload)
    entrants = _evaluated(question, offers, jobs, progress)
    found = [standing(offer, question.demands, entrants[i], terms) for i, offer in enumerate(offers)]
    found.sort(key=lambda one: one.order)
    winner = found[0] if found[0].meets_slo else None
    running = [one for one in found if one.bill is not None]
    fronts = {one.name: front(one) for one in running}
    room = {one.name: _room(one) for one in running}
    return Comparison(
        question,
        tuple(found),
        winner,
        reference,
        odds(running, question.demand_error, question.seed),
        tuple(swings(running, winner, question.demand_error)) if winner else (),
        fronts,
        bands(running, fronts, reference),
        room,
        {one.name: _costs(one) for one in running},
        ceilings(running, fronts, _ceilings(winner, max_usd_per_mtok)),
        limit,
        bought(running, limit) if limit else (),
        _rent_or_buy(winner, found, room),
        time.perf_counter() - start,
    )


def _baseline(offers: tuple[Offer, ...], wanted: str | None) -> str:
    names = [offer.name for offer in offers]
    if wanted is not None and wanted not in names:
        raise InputError(f"--baseline {wanted}: {nearest(wanted, names)}")
    return wanted or names[0]


def _evaluated(
    question: Question, offers: tuple[Offer, ...], jobs: int | None, progress: Progress | None
) -> list[tuple[Entrant, ...]]:
    """Entrants by offer and model, evaluated in any order and returned in theirs."""
    tasks = [(index, offer) for offer in offers for index in range(len(question.demands))]
    workers = min(jobs or num_cores(), len(tasks))
    tell = progress or (lambda label, share: None)
    tell("plan", 0.0)
    results: dict[tuple[int, str], Entrant] = {}
    if workers <= 1:
        for index, offer in tasks:
            results[index, offer.name] = evaluate(question, index, offer)
            tell("plan", len(results) / len(tasks))
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(evaluate, question, index, offer): (index, offer.name) for index, offer in tasks}
            try:
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    tell("plan", len(results) / len(tasks))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [tuple(results[index, offer.name] for index in range(len(question.demands))) for offer in offers]


def _room(one: Standing) -> float:
    """Largest multiple of the demand that the GPUs billed carry: at least what was simulated."""
    assert one.bill is not None
    simulated = min(entrant.carries for entrant in one.entrants)
    loads = np.geomspace(1.0, MOST_GROWTH, 400)
    gpus = one.gpus_in(World(rate=loads))
    within = (gpus > 0) & (gpus <= one.bill.billed_gpus)
    return max(simulated, float(loads[within].max()) if within.any() else 0.0)


def _costs(one: Standing) -> tuple[CostPoint, ...]:
    loads = np.array(_LOADS)
    world = World(rate=loads)
    gpus = np.broadcast_to(one.gpus_in(world), loads.shape)
    usd = one.usd_in(world, gpus)
    return tuple(
        CostPoint(
            float(load),
            int(count) if count > 0 else None,
            float(usd[i]) if usd is not None and count > 0 else None,
        )
        for i, (load, count) in enumerate(zip(loads, gpus, strict=True))
    )


def _check_ceiling(stated: float | None) -> None:
    if stated is not None and not (np.isfinite(stated) and stated > 0):
        raise InputError(f"--max-usd-per-mtok {stated:g}: write dollars per million output tokens, such as 0.8")


def _ceilings(winner: Standing | None, stated: float | None) -> list[float]:
    if stated is not None:
        return [stated]
    cost = None if winner is None else winner.entrants[0].plan.get("usd_per_mtok_output")
    return [] if not cost else [float(f"{cost * factor:.2g}") for factor in _CEILINGS]


def _rent_or_buy(winner: Standing | None, standings: list[Standing], room: dict[str, float]) -> RentOrBuy | None:
    """Renting or buying what was chosen, in steps of a replica; in the nodes of an offer to own it if there is one."""
    if winner is None:
        return None
    owned = [one for one in standings if one.system.name == winner.system.name and one.offer.basis == "owned"]
    system = (owned or [winner])[0].system
    headroom = max(1.0, room[winner.name])
    return rent_or_buy(system, winner.num_gpus, winner.terms, step_gpus=winner.step_gpus, headroom=headroom)
