"""What a plan says about money: the price of each system and the terms the buyer changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from planner.economics import DEFAULT_TERMS, Terms, gpu_hour, terms_rows
from planner.hardware import System
from planner.units import format_usd

Facts = dict[str, Any]


def price_assumptions(systems: Iterable[System], terms: Terms = DEFAULT_TERMS) -> list[Facts]:
    """A row per system with its price, date and source, then one per term that is not the default."""
    rows = [_price_row(system, terms) for system in dict.fromkeys(systems)]
    changed = [row for row in terms_rows(terms) if not row["is_default"] and not row["name"].startswith("price.")]
    return rows + [{"name": row["name"], "value": str(row["value"]), "source": row["source"]} for row in changed]


def _price_row(system: System, terms: Terms) -> Facts:
    price = gpu_hour(system, terms)
    if price is None:
        wanted = "rental or purchase" if terms.basis == "auto" else terms.basis
        source = f"no dated {wanted} price in the profile"
        return {"name": f"{system.name} rental price", "value": "unknown", "source": source}
    name = f"{system.name} rental price" if price.basis == "rental" else f"{system.name} cost of owning"
    value = f"{format_usd(price.usd)} per GPU-hour, {price.provider} {price.as_of}"
    return {"name": name, "value": value, "source": price.source}
