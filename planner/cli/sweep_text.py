"""A sweep as terminal text."""

from __future__ import annotations

from typing import Any

from planner.tables import table
from planner.units import format_seconds, format_usd, significant

Facts = dict[str, Any]
_MOST_ROWS = 40
_MOST_REASONS = 10
_SHOWN = ("model", "cluster", "workload", "rate", "concurrency", "layout", "engine", "slo")


def sweep_text(facts: Facts) -> str:
    """Text of `sweep`: one line per combination, its seeds together."""
    groups, rows = facts["groups"], facts["rows"]
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    varied = [n for n in _SHOWN if len({str(group[n]) for group in groups}) > 1] or ["model"]
    seeded = any(group["seeds"] > 1 for group in groups)
    header = [*varied, "answer", "layout", "GPUs", "TTFT p95", "TPOT p95", "out tok/s/GPU", "$/Mtok out"]
    lines = [
        f"{facts['units']} units: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items())),
        "",
        table(header, [_cells(group, varied) for group in groups[:_MOST_ROWS]], left=len(varied) + 2),
    ]
    if len(groups) > _MOST_ROWS:
        lines.append(f"  and {len(groups) - _MOST_ROWS:,} more in {facts['folder']}/results.csv")
    if seeded:
        lines.append("  Numbers are means over the seeds; results.csv has each.")
    reasons: dict[str, int] = {}
    for row in rows:
        if row["status"] in ("infeasible", "refused", "failed"):
            reason = row["message"].splitlines()[0] if row["message"] else row["status"]
            reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        lines += ["", "Without an answer"]
        lines += [f"  {count} x {reason}" for reason, count in list(reasons.items())[:_MOST_REASONS]]
        more = len(reasons) - _MOST_REASONS
        lines += [f"  and {more:,} more reasons in {facts['folder']}/results.csv"] if more > 0 else []
    return "\n".join([*lines, "", f"Written to {facts['folder']}"])


def _cells(group: Facts, varied: list[str]) -> list[str]:
    def mean(name: str) -> float | None:
        return group[name][1] if group[name] else None

    statuses = group["statuses"]
    answer = next(iter(statuses)) if len(statuses) == 1 else ", ".join(f"{n} {s}" for s, n in statuses.items())
    layouts, gpus = group["chosen_layouts"], group["num_gpus"]
    each = gpus and (f"{gpus[0]:g}" if gpus[0] == gpus[2] else f"{gpus[0]:g}-{gpus[2]:g}")
    ttft, tpot, rate, usd = (mean(n) for n in ("ttft_p95_s", "tpot_p95_s", "output_tok_per_s_per_gpu", _USD))
    return [
        *["" if group[name] is None else str(group[name]) for name in varied],
        answer,
        " or ".join(layouts[:2]) + (f" or {len(layouts) - 2} more" if len(layouts) > 2 else "") or "-",
        each or "-",
        "-" if ttft is None else format_seconds(ttft),
        "-" if tpot is None else format_seconds(tpot),
        "-" if rate is None else significant(rate),
        "-" if usd is None else format_usd(usd),
    ]


_USD = "usd_per_mtok_output"
