"""What running a fleet means in money and power beyond its bill: how busy it is, energy per token, an API to beat."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite

from planner.deployment import Run
from planner.economics import Bill, Terms, bill, break_even, energy, kwh_per_mtok, tok_per_s_per_mw
from planner.facts.basic import Facts
from planner.hardware import System

_ENERGY = (
    "kwh_per_mtok_provisioned",
    "kwh_per_mtok_scaled",
    "tok_per_s_per_mw_provisioned",
    "tok_per_s_per_mw_scaled",
)


def money_facts(
    system: System,
    num_gpus: int,
    terms: Terms,
    output_tok_per_s: float,
    input_tok_per_s: float,
    requests_per_s: float,
    max_requests_per_s: float | None,
    *,
    replica_gpus: int | None = None,
) -> Facts:
    """Utilisation, energy and break-even of `num_gpus` of `system`; all rates are those of the busiest hour.

    `max_requests_per_s` is what the GPUs carry within the SLO, None where that is unknown; `replica_gpus` as in `bill`.
    `utilisation` is the mean demand of the week over it; None, with all that rests on it, when it is unknown or below
    the demand. `kwh_per_mtok_*` and `tok_per_s_per_mw_*` are of output tokens, at the facility, in the mean of the
    week; None without a known power or without tokens. `break_even` is None without an `[api]` price or a bill;
    `api_usd_per_month` and `is_cheaper_than_api` in it are at the demand of `terms`.
    """
    cost = bill(system, num_gpus, terms, replica_gpus=replica_gpus)
    ceiling = max_requests_per_s if max_requests_per_s and isfinite(max_requests_per_s) else 0.0
    is_carried = 0 < requests_per_s <= ceiling
    utilisation = terms.demand.utilisation(requests_per_s, ceiling) if is_carried else None
    return {
        "utilisation": utilisation,
        **_energy(cost, terms, output_tok_per_s, utilisation),
        "break_even": _break_even(cost, terms, output_tok_per_s, input_tok_per_s, requests_per_s, ceiling)
        if is_carried
        else None,
        "allocation": terms.allocation.name,
    }


def run_money(run: Run, sustained_factor: float) -> Facts:
    """`money_facts` of a simulated layout that carries `sustained_factor` times the demand, 0 where it misses the SLO.

    The load is the one simulated; it carries more wherever the largest multiple tried was still served.
    """
    deployment, load = run.deployment, run.workload
    requests_per_s = run.output_tok_per_s / load.mean_output_tokens
    return money_facts(
        deployment.cluster.system,
        run.num_gpus,
        deployment.terms,
        run.output_tok_per_s,
        requests_per_s * load.mean_prompt_tokens,
        requests_per_s,
        requests_per_s * sustained_factor,
        replica_gpus=deployment.layout.replica_gpus,
    )


def _energy(cost: Bill, terms: Terms, output_tok_per_s: float, utilisation: float | None) -> Facts:
    """Provisioned power does not depend on utilisation; what is drawn at that utilisation is None without one."""
    facts: Facts = dict.fromkeys(_ENERGY)
    mean_tok_per_s = output_tok_per_s * terms.demand.mean_over_peak
    if not cost.it_power_w or not isfinite(mean_tok_per_s) or mean_tok_per_s <= 0:
        return facts
    if utilisation is not None:
        found = asdict(energy(cost.it_power_w, mean_tok_per_s, utilisation, terms.site))
        return {name: found[name] for name in _ENERGY}
    facts["kwh_per_mtok_provisioned"] = kwh_per_mtok(cost.facility_power_w, mean_tok_per_s, 1.0)
    facts["tok_per_s_per_mw_provisioned"] = tok_per_s_per_mw(mean_tok_per_s, cost.facility_power_w)
    return facts


def _break_even(
    cost: Bill,
    terms: Terms,
    output_tok_per_s: float,
    input_tok_per_s: float,
    requests_per_s: float,
    max_requests_per_s: float,
) -> Facts | None:
    """The load from which the GPUs are cheaper than the API, and what both cost at the demand of the terms."""
    per_request = input_tok_per_s / requests_per_s, output_tok_per_s / requests_per_s
    found = break_even(cost.usd_per_month, max_requests_per_s, *per_request, terms.api)
    if found is None or cost.usd_per_month is None:
        return None
    busy = terms.demand.utilisation(requests_per_s, max_requests_per_s)
    api_usd = found.api_usd_per_month_at_most * busy
    return {
        **asdict(found),
        "usd_per_month": cost.usd_per_month,
        "api_usd_per_month": api_usd,
        "is_cheaper_than_api": cost.usd_per_month <= api_usd,
        "provider": terms.api.provider,
        "as_of": terms.api.as_of,
    }
