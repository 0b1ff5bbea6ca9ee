"""Facts of the routed experts as terminal text."""

from __future__ import annotations

from typing import Any

from planner.tables import table
from planner.units import format_seconds, significant

Facts = dict[str, Any]


def run_lines(facts: Facts | None) -> list[str]:
    """How even the ranks of a run were and what was dropped; nothing for dense models."""
    if facts is None:
        return []
    loads = [
        f"{phase} busiest rank {facts[f'max_over_mean_{phase}']:.2f} x the even share with "
        f"{facts[f'active_experts_{phase}']:.1f} of {facts['experts_per_rank']} experts active"
        for phase in ("decode", "prefill")
        if f"max_over_mean_{phase}" in facts
    ]
    lines = [f"  Experts ({facts['placement']}{_copies(facts)}): " + "; ".join(loads)]
    if facts["capacity_rule"]:
        lines.append(
            f"  Capacity {facts['capacity_factor']:g} ({facts['capacity_rule']}): "
            f"{facts['drop_rate']:.2%} of assignments dropped, {facts['drop_rate_worst_step']:.1%} in the worst step, "
            f"{facts['fully_dropped_rate']:.2%} of tokens lost all their experts"
        )
    if facts["num_rebalances"]:
        lines.append(
            f"  {facts['num_rebalances']} rebalances per replica, "
            f"{format_seconds(facts['rebalance_stall_s'])} of waiting"
        )
    return lines


def _copies(facts: Facts) -> str:
    return f", {facts['redundant_experts']} copies" if facts["redundant_experts"] else ""


def balance_lines(facts: Facts | None) -> list[str]:
    """The table of placements around the winner, and what a change of traffic does; nothing without EP."""
    if facts is None:
        return []
    rows = [
        (
            option["placement"] + _copies(option),
            f"{option['max_over_mean']:.2f}",
            format_seconds(option["decode_s"]),
            f"{option['kv_tokens']:,}",
            significant(option["requests_per_s"]),
            f"{option['gain']:+.1%}",
        )
        for option in facts["options"]
    ]
    header = ["placement", "busiest / mean", "decode step", "KV tokens", "requests/s at most", "gain"]
    stale = facts["staleness"]
    text = (
        f"  If the dominant task changes, a balanced placement goes from {stale['fresh_max_over_mean']:.2f} to "
        f"{stale['stale_max_over_mean']:.2f}; learning it anew pauses {format_seconds(stale['rebalance_s'])}"
    )
    steps = stale["break_even_steps"]
    text += f" and has paid after {steps:,} steps." if steps else " and gains nothing at this batch."
    return ["Where experts live (estimates)", table(header, rows), text, ""]
