"""Sections about routed experts: how even the ranks are, where experts live, what lies outside GPU memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from planner import decisionfigures
from planner.report.blocks import Section, Table
from planner.report.wording import duration, number
from planner.units import format_bytes

Facts = Mapping[str, Any]
_WORTHWHILE = 0.03
"""Gain below which another placement is not worth its operation."""


def heat(facts: Facts) -> Section | None:
    """Loads layer by layer: of the ranks as placed and as balanced, or of the experts where no rank owns any."""
    found = facts.get("heat")
    if not found:
        return None
    unit = found.get("unit", "rank")
    panels = [panel for panel in (found["before"], found.get("after")) if panel]
    own = panels[0]
    finding = (
        f"The most popular of {own['num_ranks']} experts gets {own['busiest_mean']:.2f} x the even share in the mean "
        f"layer. Every GPU holds a part of each expert, so no rank waits for a busier one."
        if unit == "expert"
        else f"With {own['placement']} placement the busiest of {own['num_ranks']} ranks carries "
        f"{own['busiest_mean']:.2f} x the even share in the mean layer and {own['busiest_worst']:.2f} x in the worst."
    )
    if len(panels) > 1:
        finding += f" {panels[1]['placement']} brings that to {panels[1]['busiest_mean']:.2f} x."
    header = ("Placement", f"{unit.capitalize()}s", f"Busiest {unit}, mean layer", f"Busiest {unit}, worst layer")
    rows = [
        (p["placement"], str(p["num_ranks"]), f"{p['busiest_mean']:.2f} x", f"{p['busiest_worst']:.2f} x")
        for p in panels
    ]
    notes = ["Lasting loads by the popularity of experts; single steps scatter around them, more so with few tokens."]
    shown = len(own["loads"][0])
    if shown < own["num_ranks"]:
        notes.append(f"The first {shown} of {own['num_ranks']} {unit}s are drawn.")
    return Section(
        f"Load of the {unit}s by layer",
        finding,
        (Table(header, tuple(rows)),),
        partial(decisionfigures.heat_map, panels, unit.capitalize()),
        tuple(notes),
    )


def experts(facts: Facts) -> Section | None:
    """Placements around the winner and what a change of traffic does to them."""
    balance, drawn = facts.get("balance"), facts.get("experts")
    if not balance or not drawn:
        return None
    options = balance["options"]
    best = max(options, key=lambda option: option["gain"])
    own = options[0]
    finding = (
        f"The busiest rank of a decode step carries {own['max_over_mean']:.2f} x the even share, which costs "
        f"{duration(max(0.0, balance['uneven_s']))} of {duration(own['decode_s'])}."
    )
    if best["gain"] > _WORTHWHILE:
        finding += f" {_placed(best)} would serve {best['gain']:.0%} more (estimate)."
    else:
        finding += f" No other placement serves {_WORTHWHILE:.0%} more (estimate)."
    stale = balance["staleness"]
    finding += (
        f" After a change of task a balanced placement goes from {stale['fresh_max_over_mean']:.2f} to "
        f"{stale['stale_max_over_mean']:.2f}; placing anew pauses the ranks for {duration(stale['rebalance_s'])}"
    )
    steps = stale["break_even_steps"]
    finding += f" and has paid after {steps:,} steps." if steps else ", and gains nothing at this batch."
    header = ("Placement", "Busiest / mean", "Decode step, ms", "KV tokens", "Requests/s at most", "Gain")
    rows = [
        (
            _placed(option),
            f"{option['max_over_mean']:.2f}",
            number(option["decode_s"], 1e3),
            f"{option['kv_tokens']:,}",
            number(option["requests_per_s"]),
            f"{option['gain']:+.1%}",
        )
        for option in options
    ]
    return Section("Where the experts live", finding, (Table(header, tuple(rows)),))


def residency(facts: Facts) -> Section | None:
    """Residency policies where the experts do not fit in the GPUs' memory."""
    tables, said = [], []
    for found in facts.get("residency") or ():
        if not found["policies"]:
            said.append(f"{found['cluster']}: {found['reason']}.")
            continue
        best = found["policies"][0]
        said.append(
            f"On one node of {found['cluster']} {best['policy']} gives {number(best['decode_tok_per_s'])} output tok/s "
            f"with {found['batch']} sequences, bound by the {best['bound']} (estimate)."
        )
        rows = [
            (
                row["policy"],
                number(row["decode_tok_per_s"]),
                number(row["prefill_tok_per_s"]),
                f"{row['resident_experts_per_layer']}/{row['num_experts_per_layer']}",
                f"{row['hit_rate']:.0%}",
                " + ".join(f"{format_bytes(size)} {tier}" for tier, size in row["bytes_by_tier"].items() if size),
                row["bound"],
            )
            for row in found["policies"]
        ]
        header = ("Policy", "Output tok/s", "Prompt tok/s", "Experts in HBM", "Hits", "Experts lie in", "Bound by")
        tables.append(Table(header, tuple(rows), frozenset({0, 5, 6})))
    return Section("Experts outside GPU memory", " ".join(said), tuple(tables)) if said else None


def _placed(option: Facts) -> str:
    copies = option["redundant_experts"]
    return f"{option['placement']} with {copies} copies" if copies else str(option["placement"])
