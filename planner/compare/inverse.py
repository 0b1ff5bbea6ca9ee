"""The question turned round: what a budget, a power limit, a number of racks or a cost ceiling buys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from planner.compare.bands import FrontPoint
from planner.compare.question import Demand, Offer
from planner.compare.standing import Standing
from planner.economics import Bill, Terms, bill, usd_per_mtok
from planner.errors import InputError
from planner.sizing import Replica, capacity, demand_of, e2e_at_capacity
from planner.units import DAY_S

Resource = Literal["budget", "monthly_budget", "power", "racks"]
_BUDGET = re.compile(
    r"\$?\s*(?P<number>[0-9][0-9_,]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*(?P<scale>[kKmM]?)(?P<month>\s*/\s*month)?"
)
_SCALE = {"": 1.0, "k": 1e3, "m": 1e6}
_MOST_GPUS = 1_000_000
_MOST_AMOUNT = 1e15
_UNIT = {"budget": "$", "monthly_budget": "$ a month", "power": "MW", "racks": "racks"}


@dataclass(frozen=True, slots=True)
class Limit:
    """What may be spent: dollars of capital, dollars a month, megawatts at the facility, or racks."""

    resource: Resource
    amount: float

    def __str__(self) -> str:
        if self.resource in ("budget", "monthly_budget"):
            return f"${self.amount:,.0f}" + (" a month" if self.resource == "monthly_budget" else " of capital")
        return f"{self.amount:g} {_UNIT[self.resource]}"


@dataclass(frozen=True, slots=True)
class Bought:
    """What a limit buys of one offer, whole nodes (whole racks where the system is one), at the SLO and full load.

    `users` are requests in flight (Little: requests per second times end-to-end time). `note` says why nothing is
    bought.
    """

    name: str
    num_gpus: int
    nodes: int
    requests_per_s: float
    users: float
    output_tok_per_day: float
    usd_per_month: float | None
    layout: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The fastest each offer is for its users at a cost of output tokens of at most `usd_per_mtok_output`."""

    usd_per_mtok_output: float
    tok_per_s_per_user: dict[str, float | None]
    leader: str | None


def parse_limit(budget: str | None, power_mw: float | None, racks: float | None) -> Limit | None:
    """The limit of `--budget 5M | 200k/month`, `--power MW` or `--racks N`; InputError when more than one is given."""
    options = {"--budget": budget, "--power": power_mw, "--racks": racks}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are both given: ask about one limit at a time")
    if budget is not None:
        return _budget(budget)
    if power_mw is not None:
        _check_amount("--power", power_mw, "megawatts at the facility, such as --power 1.5")
        return Limit("power", power_mw)
    if racks is not None:
        _check_amount("--racks", racks if float(racks).is_integer() else -racks, "a whole number of racks, such as 4")
        return Limit("racks", racks)
    return None


def _budget(text: str) -> Limit:
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"--budget {text!r}: write dollars of capital such as 5M, or dollars a month such as 200k/month"
        )
    amount = float(match["number"].replace(",", "").replace("_", "")) * _SCALE[match["scale"].lower()]
    _check_amount("--budget", amount, "dollars, such as --budget 5M")
    return Limit("monthly_budget" if match["month"] else "budget", amount)


def _check_amount(option: str, amount: float, remedy: str) -> None:
    if not 0 < amount <= _MOST_AMOUNT:
        raise InputError(f"{option} {amount:g}: write {remedy}")


def check_limit(offers: Sequence[Offer], terms: Terms, limit: Limit) -> None:
    """Raise InputError when `limit` does not buy one node of any offer."""
    found = [(offer.name, *_nodes(offer, terms, limit)) for offer in offers]
    if not any(nodes for _, nodes, _ in found):
        reasons = "; ".join(f"{name}: {note}" for name, _, note in found)
        raise InputError(f"{limit} does not buy one node of any offer: {reasons}")


def bought(standings: Sequence[Standing], limit: Limit) -> tuple[Bought, ...]:
    """What `limit` buys of every offer of one model."""
    return tuple(_bought(one, limit) for one in standings if len(one.entrants) == 1)


def _bought(one: Standing, limit: Limit) -> Bought:
    unit = _unit(one.offer)
    nodes, note = _nodes(one.offer, one.terms, limit)
    entrant, demand = one.entrants[0], one.demands[0]
    if nodes == 0 or not entrant.curves.every:
        nothing = note or "experts outside HBM have no curves to scale"
        return Bought(one.name, 0, nodes, 0.0, 0.0, 0.0, None, "", nothing)
    gpus, anchor = nodes * unit, entrant.anchor
    every, output_tokens = entrant.curves.every, demand.workload.mean_output_tokens
    counts = np.array([gpus // replica.num_gpus for replica in every])
    carried = counts * anchor.of(every) * [float(capacity(r, demand.slo, output_tokens)) for r in every]
    index = int(np.argmax(carried))
    if carried[index] <= 0:
        return Bought(one.name, gpus, nodes, 0.0, 0.0, 0.0, None, "", f"no layout of {gpus} GPUs meets the SLO")
    replica = every[index]
    rate, users = _rate_and_users(demand, replica, float(carried[index]))
    return Bought(
        one.name,
        gpus,
        nodes,
        rate,
        users,
        rate * demand.workload.mean_output_tokens * DAY_S * one.terms.demand.mean_over_peak,
        bill(one.system, gpus, one.terms, _basis(limit)).usd_per_month,
        f"{replica.layout} x{gpus // replica.num_gpus}",
    )


def _rate_and_users(demand: Demand, replica: Replica, carried: float) -> tuple[float, float]:
    """Requests per second and users in flight; `carried` is one of them by the kind of arrivals."""
    seconds = e2e_at_capacity(replica, demand.slo, demand.workload.mean_output_tokens)
    if demand.workload.arrivals.concurrency:
        return (carried / seconds if seconds else 0.0), carried
    return carried, carried * seconds


def _nodes(offer: Offer, terms: Terms, limit: Limit) -> tuple[int, str]:
    """Whole nodes within `limit`, and why there are none."""
    system = offer.billed_system
    unit, low, high = _unit(offer), 0, _MOST_GPUS // _unit(offer)

    def taken(nodes: int) -> float | None:
        return _taken(bill(system, nodes * unit, terms, _basis(limit) or offer.basis), limit)

    if limit.resource == "budget" and offer.basis == "rental":
        return 0, "rented: no capital"
    first = taken(1)
    if first is None:
        missing = {"power": "power of a node", "racks": "power of a node"}.get(limit.resource, "price")
        return 0, f"no {missing} on record"
    if first > limit.amount:
        text = f"${first:,.0f}" if "budget" in limit.resource else f"{first:g} {_UNIT[limit.resource]}"
        return 0, f"one node takes {text}"
    if not offer.is_open:
        high = offer.cluster.nodes + 1
    while high - low > 1:
        middle = (low + high) // 2
        use = taken(middle)
        low, high = (middle, high) if use is not None and use <= limit.amount else (low, middle)
    return low, ""


def _unit(offer: Offer) -> int:
    """GPUs of a node as offered."""
    return offer.billed_system.gpus_per_node if offer.is_open else offer.cluster.gpus_per_node


def _basis(limit: Limit) -> Literal["rental", "owned"] | None:
    return "owned" if limit.resource == "budget" else None


def _taken(cost: Bill, limit: Limit) -> float | None:
    """How much of the resource a bill takes."""
    if limit.resource == "budget":
        return cost.capex_usd
    if limit.resource == "monthly_budget":
        return cost.usd_per_month
    if limit.resource == "power":
        return None if cost.facility_power_w is None else cost.facility_power_w / 1e6
    return cost.racks


def ceilings(
    standings: Sequence[Standing], fronts: dict[str, tuple[FrontPoint, ...]], usd: Sequence[float]
) -> tuple[Ceiling, ...]:
    """Best interactivity of every offer under each cost ceiling, at full load."""
    return tuple(_ceiling(standings, fronts, ceiling) for ceiling in sorted(usd))


def _ceiling(standings: Sequence[Standing], fronts: dict[str, tuple[FrontPoint, ...]], usd: float) -> Ceiling:
    best: dict[str, float | None] = {}
    for one in standings:
        hourly = None if one.bill is None else one.bill.usd_per_gpu_hour
        costs = [(p.tok_per_s_per_user, usd_per_mtok(hourly, 1, p.output_tok_per_s_per_gpu)) for p in fronts[one.name]]
        best[one.name] = max((speed for speed, cost in costs if cost is not None and cost <= usd), default=None)
    reached = {name: speed for name, speed in best.items() if speed is not None}
    return Ceiling(usd, best, max(reached, key=lambda name: reached[name]) if reached else None)


def demand_text(demand: Demand) -> str:
    """The demand in its own unit."""
    unit = "users" if demand.workload.arrivals.concurrency else "requests/s"
    return f"{demand_of(demand.workload):g} {unit}"
