"""Price of a GPU-hour, rented or owned, with what it rests on.

A price that nobody published is None, and everything computed from it is None too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.economics.annuity import owned_cost
from planner.economics.power import it_power_w_per_gpu
from planner.economics.refusal import refuse_unless
from planner.economics.terms import DEFAULT_TERMS, Terms
from planner.hardware import System
from planner.units import format_usd


@dataclass(frozen=True, slots=True)
class GpuHour:
    """Price of one GPU-hour, what it rests on, and when that was quoted."""

    usd: float
    basis: Literal["rental", "owned"]
    as_of: str
    provider: str
    source: str


def gpu_hour(
    system: System, terms: Terms = DEFAULT_TERMS, basis: Literal["rental", "owned"] | None = None
) -> GpuHour | None:
    """Price of one GPU-hour on `basis`, else on that of the terms: "auto" rents where a rental price is known and
    buys otherwise. None when no such price is known.

    Renting is the newest list price less the discount of a commitment; it needs no assumption about life, power or
    interest.
    """
    wanted = basis or terms.basis
    rented = None if wanted == "owned" else rented_gpu_hour(system, terms)
    return rented if rented is not None or wanted == "rental" else owned_gpu_hour(system, terms)


def rented_gpu_hour(system: System, terms: Terms = DEFAULT_TERMS) -> GpuHour | None:
    """The newest rental price, the cheaper of two equally recent, less the discount; None without one."""
    listed = terms.prices(system).rental_usd_per_gpu_hour()
    if listed is None:
        return None
    usd = rental_usd_per_gpu_hour(listed.usd, terms.renting.commit_discount)
    return GpuHour(usd, "rental", listed.as_of, listed.provider, listed.source)


def owned_gpu_hour(system: System, terms: Terms = DEFAULT_TERMS) -> GpuHour | None:
    """Cost of owning for one hour from the newest purchase price; None without a price or a known power."""
    purchase, power_w = terms.prices(system).purchase_usd_per_gpu(), it_power_w_per_gpu(system)
    if purchase is None or power_w is None:
        return None
    usd = owned_cost(purchase.usd, power_w, terms).usd_per_gpu_hour
    owning = terms.owning
    source = (
        f"{purchase.source}; ${purchase.usd:,.0f} per GPU over {owning.years:g} years at {owning.discount_rate:.3g} "
        "interest, docs/economics.md"
    )
    return GpuHour(usd, "owned", purchase.as_of, purchase.provider, source)


def rental_usd_per_gpu_hour(list_usd: float, commit_discount: float = 0.0) -> float:
    """list x (1 - commit_discount)."""
    refuse_unless(0 <= commit_discount < 1, f"commitment discount must be in [0, 1), got {commit_discount:g}")
    return list_usd * (1 - commit_discount)


def usd_text(usd: float | None) -> str:
    """Dollars for people.

    >>> usd_text(0.3003), usd_text(None)
    ('$0.300', 'price unknown')
    """
    return "price unknown" if usd is None else format_usd(usd)
