"""Routing records as CSV: `layer,expert,assignments` and optionally the columns that tell records apart."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from planner.errors import WorkloadError, nearest
from planner.routing.records import MAX_EXPERTS, Record, record_from_counts
from planner.textfile import opened

COUNT_COLUMNS = ("layer", "expert", "assignments")
GROUP_COLUMNS = ("model", "domain", "dataset", "task")
_MOST_COLUMNS = 1000
Counts = dict[int, dict[int, float]]
"""Assignments by layer and expert."""


def read_counts(path: Path, max_bytes: float) -> dict[str, Record]:
    """Records in a CSV by group, "" where nothing tells them apart; WorkloadError with line, column and value."""
    groups: dict[str, Counts] = {}
    with opened(path, WorkloadError, max_bytes) as file:
        lines = csv.reader(file)
        header = _header(path, next(lines, []))
        by = [header.index(name) for name in GROUP_COLUMNS if name in header]
        at = [header.index(name) for name in COUNT_COLUMNS]
        for fields in lines:
            cells = [field.strip() for field in fields]
            if not any(cells):
                continue
            if len(cells) > len(header):
                raise WorkloadError(
                    f"{path}: cannot be read as CSV: line {lines.line_num} has {len(cells)} fields, the header "
                    f"{len(header)}. Quote fields with commas."
                )
            cells += [""] * (len(header) - len(cells))
            counts = groups.setdefault("/".join(cells[column] for column in by), {})
            _add(counts, [cells[column] for column in at], f"{path}: line {lines.line_num}")
    if not groups:
        raise WorkloadError(f"{path}: a header without rows; give one row per layer and expert")
    return {name: _record(counts, f"{path}:{name}" if name else str(path)) for name, counts in groups.items()}


def _header(path: Path, fields: Sequence[str]) -> list[str]:
    header = [name.strip() for name in fields]
    if len(header) > _MOST_COLUMNS:
        raise WorkloadError(f"{path}: more than {_MOST_COLUMNS} columns; the header is {','.join(COUNT_COLUMNS)}")
    missing = [name for name in COUNT_COLUMNS if name not in header]
    if missing:
        hints = "; ".join(f"{name}: {nearest(name, header)}" for name in missing)
        raise WorkloadError(f"{path}: missing column {', '.join(missing)} ({hints})")
    return header


def _add(counts: Counts, cells: Sequence[str], where: str) -> None:
    """One row into `counts`; WorkloadError naming the cell that is wrong."""
    layer, expert = (_whole(name, cell, where) for name, cell in zip(COUNT_COLUMNS[:2], cells[:2], strict=True))
    assignments = _number(cells[2])
    if not (math.isfinite(assignments) and assignments >= 0):
        raise WorkloadError(f"{where}: assignments {cells[2]!r} is not a finite number >= 0")
    row = counts.setdefault(layer, {})
    if expert in row:
        raise WorkloadError(
            f"{where}: layer {layer}, expert {expert} a second time; "
            f"keep one, or tell the records apart by a column {' or '.join(GROUP_COLUMNS)}"
        )
    row[expert] = assignments


def _whole(name: str, cell: str, where: str) -> int:
    value = _number(cell)
    if not (0 <= value < MAX_EXPERTS and value == int(value)):
        raise WorkloadError(f"{where}: {name} {cell!r} is not a whole number from 0 to {MAX_EXPERTS - 1}")
    return int(value)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _record(counts: Mapping[int, Mapping[int, float]], source: str) -> Record:
    """Record of one group; every layer must list every expert once."""
    layers = sorted(counts)
    num_experts = 1 + max(max(row) for row in counts.values())
    for layer in layers:
        if len(counts[layer]) < num_experts:
            gap = next(expert for expert in range(num_experts) if expert not in counts[layer])
            raise WorkloadError(
                f"{source}: layer {layer} has no row for expert {gap} of {num_experts}; "
                "write 0 for an expert without tokens"
            )
    table = np.array([[counts[layer][expert] for expert in range(num_experts)] for layer in layers])
    return record_from_counts(table, source, np.array(layers))
