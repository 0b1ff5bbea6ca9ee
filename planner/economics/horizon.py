"""Renting or buying over years: what each has cost by the end of every month, while demand grows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

from planner.economics.annuity import capex_usd_per_gpu, owned_cost
from planner.economics.bills import billed_gpus, monthly_usd
from planner.economics.demand import HOURS_PER_MONTH
from planner.economics.power import it_power_w_per_gpu
from planner.economics.refusal import positive, refuse_unless
from planner.economics.terms import DEFAULT_TERMS, Terms
from planner.hardware import System

MONTHS_PER_YEAR = 12
_MAX_MONTHS = 600
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class RentOrBuy:
    """Cumulative cost of renting and of buying, `[months + 1]`, as of the end of each month; the first is today.

    In dollars of today: costs are discounted at the cost of capital, so that capital paid at once and rent paid over
    years can be compared. `num_gpus` are those needed, `owned_gpus` those in service, in whole nodes or racks.
    `book_usd` is what a straight line from the capital to its residual value leaves of them: it is not taken off
    `buy_usd`. `crossing_month` is the first month after which buying has cost no more, None within the horizon.
    """

    months: tuple[int, ...]
    num_gpus: tuple[int, ...]
    owned_gpus: tuple[int, ...]
    rent_usd: tuple[float, ...]
    buy_usd: tuple[float, ...]
    book_usd: tuple[float, ...]
    crossing_month: int | None

    @property
    def cheaper_at_the_end(self) -> str:
        """ "rent" or "buy" over the whole horizon."""
        return "buy" if self.buy_usd[-1] <= self.rent_usd[-1] else "rent"


@dataclass(frozen=True, slots=True)
class _Batch:
    """GPUs bought at the end of `month`."""

    month: int
    num_gpus: int


def rent_or_buy(
    system: System,
    num_gpus: int,
    terms: Terms = DEFAULT_TERMS,
    months: int = 60,
    *,
    step_gpus: int | None = None,
    headroom: float = 1.0,
) -> RentOrBuy | None:
    """Cumulative costs of renting and of buying `num_gpus` and what `[demand]` growth adds, over `months`.

    The fleet grows in steps of `step_gpus`, a node by default, once the demand exceeds `headroom` times that of today.
    Hardware is bought when it is needed, resold for its residual value at the end of its life and bought anew at
    today's price; before that nothing is resold. Rental prices move by `renting.price_change_per_year`. None when the
    rental price, the purchase price or the power is unknown.
    """
    refuse_unless(1 <= months <= _MAX_MONTHS, f"months must lie in 1 to {_MAX_MONTHS}, got {months}")
    priced, power_w = terms.prices(system), it_power_w_per_gpu(system)
    purchase = priced.purchase_usd_per_gpu()
    if purchase is None or power_w is None or priced.rental_usd_per_gpu_hour() is None:
        return None
    step = step_gpus or system.gpus_per_node
    needed = [_needed(num_gpus, _beyond(terms.demand.growth(month), headroom), step) for month in range(months)]
    batches = _purchases([billed_gpus(system, count, terms, "owned") for count in needed], terms)
    capex = capex_usd_per_gpu(purchase.usd, terms)
    running = owned_cost(purchase.usd, power_w, terms).running_usd * HOURS_PER_MONTH
    owned = [_in_service(batches, month, terms) for month in range(months)]
    spent = [_capital(batches, capex, month, terms) for month in range(months + 1)]
    drift = (1 + terms.renting.price_change_per_year) ** (1 / MONTHS_PER_YEAR)
    rents = monthly_usd(system, needed, terms, "rental")
    rent = _cumulative([0.0, *(float(usd) * drift**month for month, usd in enumerate(rents))], terms)
    buy = _cumulative([spent[0], *(running * owned[m] + spent[m + 1] for m in range(months))], terms)
    book = [_book(batches, capex, month, terms) * _discount(month, terms) for month in range(months + 1)]
    crossing = next((month for month in range(1, months + 1) if buy[month] <= rent[month]), None)
    counts, owned = [*needed, needed[-1]], [*owned, owned[-1]]
    return RentOrBuy(tuple(range(months + 1)), tuple(counts), tuple(owned), rent, buy, tuple(book), crossing)


def _discount(month: int, terms: Terms) -> float:
    """Dollars of today per dollar paid after `month` months."""
    return float((1 + terms.owning.discount_rate) ** (-month / MONTHS_PER_YEAR))


def _cumulative(paid_usd: list[float], terms: Terms) -> tuple[float, ...]:
    """Running total, in dollars of today, of what is paid at the end of each month."""
    return tuple(accumulate(usd * _discount(month, terms) for month, usd in enumerate(paid_usd)))


def _beyond(growth: float, headroom: float) -> float:
    """Growth that the fleet of today does not carry."""
    positive("headroom", headroom)
    return max(1.0, growth / headroom) if growth > 1 else growth


def _needed(num_gpus: int, growth: float, step_gpus: int) -> int:
    """GPUs after growth, in whole steps on top of today's."""
    return max(1, num_gpus + step_gpus * math.ceil(num_gpus * (growth - 1) / step_gpus - _ROUNDING))


def _purchases(wanted: list[int], terms: Terms) -> list[_Batch]:
    """Batches that keep `wanted[month]` GPUs in service."""
    batches: list[_Batch] = []
    for month, count in enumerate(wanted):
        missing = count - _in_service(batches, month, terms)
        if missing > 0:
            batches.append(_Batch(month, missing))
    return batches


def _life_months(terms: Terms) -> int:
    return max(1, round(terms.owning.years * MONTHS_PER_YEAR))


def _in_service(batches: list[_Batch], month: int, terms: Terms) -> int:
    return sum(b.num_gpus for b in batches if b.month <= month < b.month + _life_months(terms))


def _capital(batches: list[_Batch], capex_usd_per_gpu: float, month: int, terms: Terms) -> float:
    """Capital paid at the end of `month`, less what retiring hardware brings."""
    bought = sum(b.num_gpus for b in batches if b.month == month)
    sold = sum(b.num_gpus for b in batches if b.month + _life_months(terms) == month)
    return capex_usd_per_gpu * (bought - terms.owning.residual_share * sold)


def _book(batches: list[_Batch], capex_usd_per_gpu: float, month: int, terms: Terms) -> float:
    """Straight-line value at the end of `month` of what is in service."""
    life = _life_months(terms)
    left = sum(b.num_gpus * (b.month + life - month) / life for b in batches if b.month <= month < b.month + life)
    kept = terms.owning.residual_share
    return capex_usd_per_gpu * ((1 - kept) * left + kept * _in_service(batches, month, terms))
