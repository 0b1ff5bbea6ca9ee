"""How uncertain each commercial term and each price is: low, mode and high, for a tornado and for random draws."""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.economics.sources import SOURCES
from planner.economics.terms import DEFAULT_TERMS, PriceBasis, Terms
from planner.hardware import System


@dataclass(frozen=True, slots=True)
class Range:
    """A term that published calculations set between `low` and `high`; `name` is its path in the terms file."""

    name: str
    low: float
    mode: float
    high: float
    unit: str
    source: str


@dataclass(frozen=True, slots=True)
class PriceRange:
    """What a system may cost: lowest, the quote that plans use, highest.

    $ per GPU-hour before the discount of a commitment, or $ per GPU bought. `oldest` and `newest` date the quotes,
    `source` says how the range came about.
    """

    low: float
    mode: float
    high: float
    num_quotes: int
    oldest: str
    newest: str
    source: str


_PUBLIC = "serving.md 10.1, 2026-11"
_SPREADS: tuple[tuple[str, float, float, str, str], ...] = (
    ("owning.years", 3.0, 5.0, "years", "assumed: a year either side of 4; residual values are quoted after 3"),
    ("owning.discount_rate", 0.05, 0.15, "per year", "assumed: 5 points either side of 0.10"),
    ("owning.residual_share", 0.0, 0.35, "of the capital", f"{_PUBLIC}: 0.25 to 0.35 after 36 months, 0 the default"),
    ("owning.fabric_share", 0.10, 0.15, "of the purchase price", _PUBLIC),
    ("owning.opex_share_per_year", 0.03, 0.07, "of the capital per year", f"{_PUBLIC}: about 0.05; +/- 0.02 assumed"),
    ("site.pue", 1.2, 1.4, "", _PUBLIC),
    ("site.usd_per_kwh", 0.06, 0.12, "$/kWh", _PUBLIC),
    ("site.colo_usd_per_kw_month", 150.0, 250.0, "$/kW-month", _PUBLIC),
    ("site.idle_share", 0.1, 0.5, "of full power", "assumed"),
    ("renting.commit_discount", 0.0, 0.3, "of the list price", "assumed: none to a yearly commitment"),
)
RANGES: dict[str, Range] = {
    name: Range(name, low, float(DEFAULT_TERMS.value(name)), high, unit, source)
    for name, low, high, unit, source in _SPREADS
}
"""Uncertain terms by their path; `mode` is the default."""
assert RANGES.keys() <= SOURCES.keys()

MANY_QUOTES = 4
"""Fewer dated quotes than this do not show how far prices spread."""
TYPICAL_SPREAD: dict[str, tuple[float, float]] = {"rental": (0.72, 1.55), "purchase": (0.74, 1.35)}
"""Lowest and highest quote over the one used: geometric means over the systems with four rental quotes or more (B200,
H100, H200, MI300X), and over those with two purchase quotes, of which the newest is the highest each time; that prices
of purchases lie as far above is assumed. `tests/test_economics_terms.py` derives them from the profiles."""


def ranges_around(terms: Terms) -> dict[str, Range]:
    """`RANGES` around the values of `terms`: a term the buyer changed keeps the relative width of its range.

    Where the default is 0 the range keeps its upper end, or the buyer's value where that is higher.
    """
    moved = {}
    for name, known in RANGES.items():
        mode = float(terms.value(name))
        scale = mode / known.mode if known.mode else 1.0
        low = min(mode, known.low * scale) if known.mode else min(mode, known.low)
        high = known.high * scale if known.mode else max(mode, known.high)
        moved[name] = replace(known, low=max(low, 1.0) if name == "site.pue" else low, mode=mode, high=high)
    return moved


def price_range(system: System, terms: Terms = DEFAULT_TERMS, basis: PriceBasis = "rental") -> PriceRange | None:
    """Spread of the dated quotes of `system`; None when there is none.

    Quotes of different years stand side by side: the spread is that of sellers and of time. Fewer than `MANY_QUOTES`
    are widened to the `TYPICAL_SPREAD` of systems with many. Prices the buyer stated are taken as they are: one quote
    has no spread.
    """
    priced = terms.prices(system)
    quotes = [p for p in priced.prices if p.basis == basis]
    used = priced.rental_usd_per_gpu_hour() if basis == "rental" else priced.purchase_usd_per_gpu()
    if used is None:
        return None
    low, high = min(p.usd for p in quotes), max(p.usd for p in quotes)
    source = f"{len(quotes)} dated quote{'s' if len(quotes) > 1 else ''}"
    if terms.states_price(system, basis):
        source = "stated by the buyer"
    elif len(quotes) < MANY_QUOTES:
        down, up = TYPICAL_SPREAD[basis]
        low, high = min(low, down * used.usd), max(high, up * used.usd)
        source += f", widened to the usual {down:g} to {up:g} times the price"
    dates = sorted(p.as_of for p in quotes)
    return PriceRange(low, used.usd, high, len(quotes), dates[0], dates[-1], source)
