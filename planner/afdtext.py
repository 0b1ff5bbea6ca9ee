"""Facts of attention-FFN disaggregation as terminal text."""

from __future__ import annotations

from typing import Any

from planner.tables import table
from planner.units import format_seconds, format_usd, significant

Facts = dict[str, Any]
_ROWS = 8


def afd_text(facts: Facts) -> str:
    """Text of `afd`: verdict, splits, why."""
    best, plain = facts["best"], facts["plain"]
    lines = [
        f"{best['attention_gpus']} attention + {best['ffn_gpus']} feed-forward GPUs of {facts['cluster']}: "
        f"{significant(best['output_tok_per_s_per_gpu'])} output tok/s per GPU at {format_seconds(best['tpot_s'])} per "
        f"token and {facts['context']:,} tokens of context, {_against(facts)}",
        "",
        table(
            ["attention", "FFN", "TP", "batch", "FFN batch", "attention", "network", "FFN", "TPOT", "tok/s/GPU", ""],
            [_row(row) for row in _shown(facts["splits"])],
            left=0,
        ),
    ]
    if plain is not None:
        lines.append(
            f"  not split: {plain['layout']['name']}, {plain['batch']} sequences per rank, "
            f"{format_seconds(plain['tpot_s'])} per token, "
            f"{significant(plain['output_tok_per_s_per_gpu'])} tok/s per GPU"
        )
    lines += [
        "",
        f"Each of three stages may take {format_seconds(facts['tpot_limit_s'] / 3)} per pass; "
        "batch counts the sequences of one of three micro-batches per attention rank.",
        f"Feed-forward is compute-bound from {facts['roofline_batch']:,.0f} tokens per micro-batch; "
        f"it gets {best['ffn_batch']:,}.",
    ]
    if facts["sparsity_floor"] is not None:
        enough = facts["sparsity"] >= facts["sparsity_floor"]
        can = "can" if enough else "cannot"
        lines.append(
            f"A token uses {facts['sparsity']:.3f} of the experts; the link between the two sides {can} feed "
            f"compute-bound experts (that takes {facts['sparsity_floor']:.3f})."
        )
    floor = facts["cost_floor"]
    if floor is not None:
        lines.append(
            f"No token costs less than {format_usd(floor['attention_usd_per_mtok'])} attention + "
            f"{format_usd(floor['ffn_usd_per_mtok'])} feed-forward per million here "
            f"({format_usd(floor['usd_per_gpu_hour'])} per GPU-hour, data-sheet rates, one byte per cached value)."
        )
    lines += ["Analytic: even load, no failures, no host time; nothing was simulated."]
    return "\n".join(lines + [f"Note   {note}" for note in facts["notes"]])


def _against(facts: Facts) -> str:
    """The split beside the plain layout, in words."""
    gain = facts["gain"]
    if gain is None:
        return "and no layout that keeps both together does that"
    name = facts["plain"]["layout"]["name"]
    return f"{abs(gain):.0%} {'more' if gain >= 0 else 'less'} than {name} without the split"


def _shown(rows: list[Facts]) -> list[Facts]:
    return sorted(rows[:_ROWS], key=lambda row: row["attention_gpus"])


def _row(row: Facts) -> tuple[str, ...]:
    return (
        str(row["attention_gpus"]),
        str(row["ffn_gpus"]),
        str(row["attention_tp"]),
        str(row["batch"]),
        f"{row['ffn_batch']:,}",
        format_seconds(row["attention_s"]),
        format_seconds(row["network_s"]),
        format_seconds(row["ffn_s"]),
        format_seconds(row["tpot_s"]),
        significant(row["output_tok_per_s_per_gpu"]),
        f"bound by {row['bound']}",
    )
