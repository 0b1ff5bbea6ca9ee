"""Prices in facts: of tokens with the rule behind them, of each system, and the terms the buyer changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from planner.economics import DEFAULT_TERMS, Terms, TokenCosts, gpu_hour, terms_rows
from planner.hardware import System
from planner.units import format_usd

Facts = dict[str, Any]
PRICES = ("usd_per_mtok_input", "usd_per_mtok_output", "usd_per_mtok_total", "allocation")
"""Names of the facts of `price_facts`."""


def price_facts(costs: TokenCosts) -> Facts:
    """$ per million tokens by kind, and the rule that divides the bill between them, in words."""
    return {**{name: getattr(costs, name) for name in PRICES[:-1]}, "allocation": costs.rule}


def rule_note(rule: str) -> str:
    """What to print behind a price of output tokens: nothing where they bear all cost, else the rule.

    >>> rule_note(DEFAULT_TERMS.allocation.name), rule_note("input and output tokens alike")
    ('', ' (input and output tokens alike)')
    """
    return "" if rule == DEFAULT_TERMS.allocation.name else f" ({rule})"


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
