"""Sections that look beyond the asked question: more demand, other inputs, how to start the servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from planner import decisionfigures
from planner.failuretext import incident_lines
from planner.figures import readable
from planner.report.blocks import Section, Table
from planner.report.wording import money, number

Facts = Mapping[str, Any]


def cost_against_demand(facts: Facts) -> Section | None:
    """Monthly cost of the recommended layout in whole replicas at multiples of the demand."""
    rows = facts.get("cost_curve") or ()
    own = next((row for row in rows if row["demand_factor"] == 1.0), None)
    if own is None:
        return None
    half = next((row for row in rows if row["demand_factor"] == 0.5), None)
    more = next((row for row in rows if row["num_gpus"] > own["num_gpus"]), None)
    finding = (
        f"{own['num_gpus']:,} GPUs cost {money(own['usd_per_month'])} a month at the asked demand, "
        f"{money(own['usd_per_mtok_output'])} per Mtok output"
    )
    finding += f"; at half of it a million tokens cost {money(half['usd_per_mtok_output'])}." if half else "."
    if more is not None:
        finding += f" {more['demand_factor']:g} x the demand needs {more['num_gpus']:,} GPUs in whole replicas" + (
            "." if more["is_offered"] else ", more than are offered."
        )
    header = ("Demand", "GPUs", "$ per month", "$ per Mtok output", "Offered")
    cells = tuple(
        (
            f"{row['demand_factor']:g} x",
            f"{row['num_gpus']:,}",
            number(row["usd_per_month"]),
            number(row["usd_per_mtok_output"]),
            "yes" if row["is_offered"] else "no",
        )
        for row in rows
    )
    name = (facts.get("layout") or {}).get("name", "this layout")
    draw = partial(decisionfigures.cost_against_demand, {str(name): rows})
    notes = ["Every replica is taken to carry what the simulation showed and no more; hollow points exceed the offer."]
    return Section("Cost against demand", finding, (Table(header, cells, frozenset({0, 4})),), draw, tuple(notes))


def sensitivity(facts: Facts) -> Section | None:
    """A tornado of the tightest objective."""
    rows = [
        {
            "input": readable(row["input"]),
            "low": row["low_ratio"],
            "high": row["high_ratio"],
            "low_label": row["low_label"],
            "high_label": row["high_label"],
        }
        for row in facts.get("sensitivity") or ()
    ]
    if not rows:
        return None
    middle, objective = facts["worst_ratio"], facts["worst_objective"]
    breaking = [row["input"] for row in rows if max(row["low"], row["high"]) > 1 >= middle]
    finding = f"{objective} stands at {middle:.0%} of its limit."
    if breaking:
        finding += f" It breaks with an unfavourable {_listed(breaking)}."
    elif middle <= 1:
        finding += " None of these changes alone breaks it."
    table = sensitivity_table(rows, middle, lambda value: f"{value:.0%}")
    label = f"{objective} as a share of its limit"
    draw = partial(decisionfigures.tornado, rows, middle, label, limit=1.0)
    notes = ("Estimates: traffic by the closed-form steady state, kernels by their share of the step.",)
    return Section("What would change the answer", finding, (table,), draw, notes)


def sensitivity_table(rows: Sequence[Facts], middle: float, text: Any) -> Table:
    """The numbers of a tornado, in its order."""
    ordered = sorted(rows, key=lambda row: -decisionfigures.swing(row, middle))
    cells = tuple(
        (row["input"], f"{row['low_label']}", text(row["low"]), f"{row['high_label']}", text(row["high"]))
        for row in ordered
    )
    return Table(("Input", "Low", "gives", "High", "gives"), cells, frozenset({0, 1, 3}))


def launch(facts: Facts) -> Section | None:
    """Commands to start the recommended layout."""
    apart = ((facts.get("disaggregation") or {}).get("winner") or {}).get("launch") or ()
    pools = [pool for pool in (*(facts.get("launch") or ()), *apart) if pool["commands"] or pool["note"]]
    if not pools:
        return None
    code, notes = [], []
    for pool in pools:
        code += [f"{_role(pool)}{command['text']}" for command in pool["commands"]]
        notes.append(f"{pool['role'].capitalize()} pool: {pool['note']}" if pool["role"] else pool["note"])
    engine = pools[0]["engine"]
    counts = " and ".join(f"{pool['num_gpus']:,}{' ' + pool['role'] if pool['role'] else ''}" for pool in pools)
    finding = (
        f"Unverified: a starting point for {engine} on {counts} GPUs. Try it on one replica before you rely on it."
    )
    if not code:
        finding = f"No command for {engine}."
    return Section("How to start it", finding, items=tuple(notes), code=tuple(code))


def failures(facts: Facts) -> Section | None:
    """What failures did to a simulated run, as in the terminal."""
    lines = incident_lines(facts.get("failures"))
    return Section("What the failures cost", "", code=("\n".join(lines).strip(),)) if lines else None


def _role(pool: Facts) -> str:
    return f"# {pool['role']} pool\n" if pool["role"] else ""


def _listed(names: Sequence[str]) -> str:
    if len(names) > 3:
        return f"{', '.join(names[:3])} and {len(names) - 3} more"
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
