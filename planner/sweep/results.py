"""One row per unit, and units that differ only in their seed side by side."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

from planner.sweep.units import Result, Unit

Row = dict[str, Any]

_NUMBERS = {
    "num_gpus": ("layout", "num_gpus"),
    "worst_ratio": ("worst_ratio",),
    "ttft_mean_s": ("ttft_s", "mean"),
    "ttft_p95_s": ("ttft_s", "p95"),
    "tpot_mean_s": ("tpot_s", "mean"),
    "tpot_p95_s": ("tpot_s", "p95"),
    "output_tok_per_s": ("output_tok_per_s",),
    "output_tok_per_s_per_gpu": ("output_tok_per_s_per_gpu",),
    "usd_per_mtok_output": ("usd_per_mtok_output",),
}
"""Columns that are read from the facts of a plan or a simulation, and where they lie."""
STATUSES = ("meets", "misses", "answered", "infeasible", "refused", "failed")


def row(unit: Unit, result: Result) -> Row:
    """The unit on its axes, what became of it, and the numbers of its answer (None where there is none)."""
    facts = result.facts or {}
    return {
        "number": unit.number,
        **dict(unit.point),
        "status": _status(result),
        "chosen_layout": _at(facts, ("layout", "name")),
        "worst_objective": _at(facts, ("worst_objective",)),
        **{name: _at(facts, path) for name, path in _NUMBERS.items()},
        "message": result.message,
    }


def _status(result: Result) -> str:
    """What the command said: exit codes 0 answer, 2 bad input, 3 infeasible; anything else is a fault of ours."""
    if result.exit_code == 2:
        return "refused"
    if result.exit_code not in (0, 3) or result.facts is None:
        return "failed"
    if "layout" not in result.facts:
        return "infeasible"
    meets = result.facts.get("meets_slo")
    return "answered" if meets is None else "meets" if meets else "misses"


def _at(facts: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        facts = facts.get(key) if isinstance(facts, dict) else None
    return facts


def results_csv(rows: Iterable[Row]) -> str:
    """Rows as CSV, numbers in full."""
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for line in rows:
        if writer is None:
            writer = csv.DictWriter(text, list(line), lineterminator="\n")
            writer.writeheader()
        writer.writerow(line)
    return text.getvalue()


def seed_groups(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ only in their seed as one: each number as [least, mean, most] over the answered ones."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for line in rows:
        key = tuple(line[name] for name in line if name in _GROUP_AXES)
        groups.setdefault(key, []).append(line)
    return [_grouped(lines) for lines in groups.values()]


_GROUP_AXES = ("model", "cluster", "workload", "rate", "concurrency", "layout", "engine", "slo")


def _grouped(lines: list[Row]) -> Row:
    statuses = [line["status"] for line in lines]
    chosen = {line["chosen_layout"] for line in lines if line["chosen_layout"]}
    numbers = {name: [line[name] for line in lines if line[name] is not None] for name in _NUMBERS}
    return {
        **{name: lines[0][name] for name in _GROUP_AXES},
        "seeds": len(lines),
        "statuses": {status: statuses.count(status) for status in STATUSES if status in statuses},
        "chosen_layouts": sorted(chosen),
        **{n: [min(v), sum(v) / len(v), max(v)] if v else None for n, v in numbers.items()},
    }
