"""Facts of the routed experts as terminal text."""

from __future__ import annotations

from typing import Any

from planner.tables import table
from planner.units import format_bytes, format_seconds, significant

Facts = dict[str, Any]


def run_lines(facts: Facts | None) -> list[str]:
    """How even the ranks of a run were and what was dropped; nothing for dense models."""
    if facts is None:
        return []
    loads = []
    for phase in ("decode", "prefill"):
        if f"max_over_mean_{phase}" in facts:
            active = f"{facts[f'active_experts_{phase}']:.1f} of {facts['experts_per_rank']} experts active"
            busiest = f"busiest rank {facts[f'max_over_mean_{phase}']:.2f} x the even share with "
            loads.append(f"{phase} {busiest if facts['ep'] > 1 else ''}{active}")
    where = f"{facts['placement']}{_copies(facts)}" if facts["ep"] > 1 else "a slice of each on every GPU"
    lines = [f"  Experts ({where}): " + "; ".join(loads)]
    if facts["capacity_rule"]:
        lines.append(
            f"  Capacity {facts['capacity_factor']:g} ({facts['capacity_rule']}): "
            f"{facts['drop_rate']:.2%} of assignments dropped, "
            f"{facts['drop_rate_worst_step']:.1%} in the worst step and "
            f"{facts['drop_rate_worst_layer']:.1%} in the worst layer, "
            f"{facts['slot_utilisation']:.0%} of slots used, "
            f"{facts['fully_dropped_rate']:.2%} of tokens lost all their experts"
        )
    if facts["residency"]:
        away = facts["residency"]
        where = ", ".join(f"{format_bytes(size)} in {tier}" for tier, size in away["bytes_by_tier"].items() if size)
        hits = (
            "" if away["hit_rate_decode"] is None else f", {away['hit_rate_decode']:.0%} of the needed ones found there"
        )
        lines.append(
            f"  Residency ({away['policy']}): {away['resident_experts_per_layer']} of "
            f"{away['num_experts_per_layer']} experts per layer in HBM{hits}; {where}; "
            f"per output token {format_bytes(away['miss_bytes_per_output_token'])} fetched and "
            f"{format_bytes(away['cpu_bytes_per_output_token'])} read by the CPU"
        )
    if facts["num_rebalances"]:
        lines.append(
            f"  {facts['num_rebalances']} rebalances per replica, "
            f"{format_seconds(facts['rebalance_stall_s'])} of waiting, "
            f"{format_bytes(facts['rebalance_moved_bytes'])} moved"
        )
    return lines


def _copies(facts: Facts) -> str:
    return f", {facts['redundant_experts']} copies" if facts["redundant_experts"] else ""


def outside_lines(found: list[Facts]) -> list[str]:
    """Residency policies per cluster, where the experts do not fit in HBM."""
    lines = []
    for facts in found:
        lines.append(
            f"With experts outside HBM on one node of {facts['cluster']} "
            f"({facts['batch']} sequences of {facts['context_tokens']:,} tokens, estimates)"
        )
        if not facts["policies"]:
            lines += [f"  {facts['reason']}", ""]
            continue
        rows = [
            (
                row["policy"],
                significant(row["decode_tok_per_s"]),
                significant(row["prefill_tok_per_s"]),
                f"{row['resident_experts_per_layer']}/{row['num_experts_per_layer']}",
                f"{row['hit_rate']:.0%}",
                " + ".join(f"{format_bytes(size)} {tier}" for tier, size in row["bytes_by_tier"].items() if size),
                row["bound"],
                row["offered_by"],
            )
            for row in facts["policies"]
        ]
        header = ["policy", "output tok/s", "prompt tok/s", "experts in HBM", "hits", "experts lie in", "bound by"]
        header.append("offered by")
        lines += [table(header, rows), ""]
    return lines


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
    own = facts["options"][0]
    cost = "  Uneven experts cost nothing here: the step waits for weights, and fewer of them are read."
    if facts["uneven_s"] > 0:
        cost = f"  Uneven experts cost {format_seconds(facts['uneven_s'])} of the decode step of "
        cost += f"{format_seconds(own['decode_s'])}."
    if stale["interval_steps"]:
        text += f" Under the given drift place anew every {stale['interval_steps']:,} steps (--rebalance-steps)."
    return ["Where experts live (estimates)", table(header, rows), cost, text, ""]
