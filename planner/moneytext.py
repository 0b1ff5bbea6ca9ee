"""Money and power of a plan as lines: how a bill is divided, energy per token, the load that beats an API."""

from __future__ import annotations

from typing import Any

from planner.facts.prices import rule_note
from planner.units import format_usd, significant

Facts = dict[str, Any]
_ENERGY = ("kwh_per_mtok", "tok_per_s_per_mw")


def money_lines(facts: Facts) -> list[str]:
    """Lines for the terminal; empty where nothing is known or stated."""
    return [f"  {line}" for line in (*_price(facts), *_energy(facts["money"]), *_api(facts["money"]["break_even"]))]


def _price(facts: Facts) -> list[str]:
    """All three prices where output tokens do not bear all cost."""
    if not rule_note(facts["allocation"]) or facts["usd_per_mtok_output"] is None:
        return []
    kinds = [(kind, facts[f"usd_per_mtok_{kind}"]) for kind in ("input", "output", "total")]
    prices = ", ".join(f"{format_usd(usd)} {kind}" for kind, usd in kinds if usd is not None)
    return [f"$ per Mtok: {prices} ({facts['allocation']})"]


def _energy(money: Facts) -> list[str]:
    if money["kwh_per_mtok_provisioned"] is None:
        return []
    kwh, rate = ([money[f"{name}_{kind}"] for kind in ("provisioned", "scaled")] for name in _ENERGY)
    line = f"Power at the facility: {significant(kwh[0])} kWh/Mtok output, {significant(rate[0])} tok/s per MW reserved"
    if money["utilisation"] is None:
        return [line]
    return [f"{line}; {significant(kwh[1])} and {significant(rate[1])} drawn, busy at most {money['utilisation']:.0%}"]


def _api(point: Facts | None) -> list[str]:
    """Whether these GPUs beat the API at this demand, and from which load they do."""
    if point is None:
        return []
    name = f"{point['provider'] or 'the API'} ({point['as_of']})"
    verdict = "cheaper" if point["is_cheaper_than_api"] else "dearer"
    bills = format_usd(point["usd_per_month"]), format_usd(point["api_usd_per_month"])
    now = f"{bills[0]} a month, {verdict} than {bills[1]} of {name}"
    if point["utilisation"] > 1:
        return [f"{now}; break-even is beyond the load these GPUs are known to carry"]
    return [
        f"{now}; break-even at {significant(point['requests_per_s'])} requests/s in the mean, "
        f"{point['utilisation']:.0%} of what the GPUs are known to carry"
    ]
