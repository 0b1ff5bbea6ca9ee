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
from planner.units import format_usd

MONTHS_PER_YEAR = 12
_MAX_MONTHS = 600
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class RentOrBuy:
    """Cumulative cost of renting and of buying, `[months + 1]`, as of the end of each month; the first is today.

    In dollars of today: costs are discounted at the cost of capital, so that capital paid at once and rent paid over
    years can be compared. `num_gpus` are those needed, `owned_gpus` those in service, in whole nodes or racks.
    `book_usd` is what a straight line from the capital to its residual value leaves of those in service: it is no
    money, and not taken off `buy_usd`; hardware at the end of its life has been resold, and that is.
    """

    months: tuple[int, ...]
    num_gpus: tuple[int, ...]
    owned_gpus: tuple[int, ...]
    rent_usd: tuple[float, ...]
    buy_usd: tuple[float, ...]
    book_usd: tuple[float, ...]

    @property
    def cheaper_at_the_end(self) -> str:
        """ "rent" or "buy" over the whole horizon."""
        return "buy" if self.buy_usd[-1] <= self.rent_usd[-1] else "rent"

    @property
    def bought_cheaper(self) -> tuple[tuple[int, int], ...]:
        """First and last month of each stretch at whose months' ends buying has cost no more than renting."""
        months = [m for m in self.months[1:] if self.buy_usd[m] <= self.rent_usd[m]]
        first = [m for m in months if m - 1 not in months]
        last = [m for m in months if m + 1 not in months]
        return tuple(zip(first, last, strict=True))

    @property
    def crossing_month(self) -> int | None:
        """Month from which buying has cost no more until the horizon; None where renting is cheaper at the end."""
        return self.bought_cheaper[-1][0] if self.cheaper_at_the_end == "buy" else None

    @property
    def verdict(self) -> str:
        """Which is cheaper when, over how many months, and whether the books see the end otherwise."""
        end, stretches = self.months[-1], self.bought_cheaper
        if not stretches:
            text = f"renting is cheaper throughout {end} months"
        elif stretches == ((1, end),):
            text = f"buying is cheaper throughout {end} months"
        else:
            passing = [f"in month {a}" if a == b else f"in months {a} to {b}" for a, b in stretches if b < end]
            lasting = [f"from month {a}" for a, b in stretches if b == end]
            whole = f" of {end}" if lasting else f", renting over {end}"
            text = f"buying is cheaper {' and '.join(passing + lasting)}{whole}"
        worth = self.book_usd[-1]
        if self.cheaper_at_the_end == "rent" and self.buy_usd[-1] - worth <= self.rent_usd[-1]:
            text += f"; buying too, if the hardware left then still sells for its book value of {format_usd(worth)}"
        return text


@dataclass(frozen=True, slots=True)
class _Batch:
    """GPUs bought at the end of `month`."""

    month: int
    num_gpus: int


def rent_or_buy(
    system: System,
    num_gpus: int,
    terms: Terms = DEFAULT_TERMS,
    months: int | None = None,
    *,
    step_gpus: int | None = None,
    headroom: float = 1.0,
) -> RentOrBuy | None:
    """Cumulative costs of renting and of buying `num_gpus` and what `[demand]` growth adds.

    `months` is the life of the hardware by default, so that the comparison ends when it is resold, not after a new one.
    The fleet grows in steps of `step_gpus`, a node by default, once the demand exceeds `headroom` times that of today.
    Hardware is bought when it is needed, resold for its residual value at the end of its life and bought anew at
    today's price; before that nothing is resold. Rental prices move by `renting.price_change_per_year`. None when the
    rental price, the purchase price or the power is unknown.
    """
    months = _life_months(terms) if months is None else months
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
    counts, owned = [*needed, needed[-1]], [*owned, owned[-1]]
    return RentOrBuy(tuple(range(months + 1)), tuple(counts), tuple(owned), rent, buy, tuple(book))


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
