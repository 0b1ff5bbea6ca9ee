"""Recorded requests: reading and checking a trace CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from planner.errors import WorkloadError, nearest
from planner.textfile import lines, opened
from planner.workload.arrivals import Arrivals
from planner.workload.demand import Workload
from planner.workload.lengths import Lengths
from planner.workload.recorded import SHARING_COLUMNS, SharingReader

TRACE_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
_FAULTS_SHOWN = 5
_MOST_COLUMNS = 1000
_MOST_FAULTS = 1000
_MOST_BYTES = 2e9
"""Largest trace; a row has some 20 bytes."""


def read_trace(path: Path) -> Workload:
    """Workload that replays the rows of a CSV with the columns `arrival_s, prompt_tokens, output_tokens`.

    Times [s] ascend and are shifted to start at 0. `prefix_group` and `shared_tokens`, and `conversation`, are
    optional (see `planner.workload.recorded`); other columns are ignored. Raises WorkloadError that lists the first
    faults with line number, value and remedy.
    """
    arrivals: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    faults: list[str] = []
    sharing = SharingReader(faults)
    for line, row in _rows(path, TRACE_COLUMNS, SHARING_COLUMNS):
        found = len(faults)
        arrival_s = _time(line, row["arrival_s"], arrivals[-1] if arrivals else 0.0, faults)
        prompt = _tokens(line, "prompt_tokens", row["prompt_tokens"], faults)
        output = _tokens(line, "output_tokens", row["output_tokens"], faults)
        if len(faults) == found:
            sharing.read(line, row, prompt, output)
            arrivals.append(arrival_s)
            prompts.append(prompt)
            outputs.append(output)
        elif len(faults) > _MOST_FAULTS:
            break
    _raise_faults(path, faults, len(arrivals))
    lengths = Lengths.replay(prompts), Lengths.replay(outputs)
    arrival = Arrivals.trace(arrivals)
    return Workload(path.stem, *lengths, arrival, len(arrivals), recorded=sharing.sharing())


def read_lengths(path: Path, column: str) -> tuple[int, ...]:
    """Token counts of one `column` of a CSV, in file order; raises WorkloadError like `read_trace`."""
    faults: list[str] = []
    tokens = [_tokens(line, column, row[column], faults) for line, row in _rows(path, (column,))]
    _raise_faults(path, faults, len(tokens))
    return tuple(tokens)


def _rows(path: Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number (the header is line 1) and fields of each row, after checking that `columns` exist.

    Fields of `optional` columns are there when the file has them.
    """
    with opened(path, WorkloadError, _MOST_BYTES) as file:
        reader = csv.DictReader(lines(file))
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        if len(header) > _MOST_COLUMNS:
            raise WorkloadError(f"{path}: {len(header):,} columns; at most {_MOST_COLUMNS} are read. Is it a trace?")
        missing = [c for c in columns if c not in header]
        if missing:
            hints = "; ".join(f"{c}: {nearest(c, header)}" for c in missing) if header else "the file is empty"
            raise WorkloadError(
                f"{path}: missing column{'s' * (len(missing) > 1)} {', '.join(missing)} ({hints}). "
                f"The header must contain {','.join(columns)}."
            )
        read = [*columns, *(c for c in optional if c in header)]
        for row in reader:
            yield reader.line_num, {c: (row[c] or "").strip() for c in read}


def _time(line: int, text: str, before_s: float, faults: list[str]) -> float:
    value = _number(text)
    if not (math.isfinite(value) and value >= 0):
        faults.append(f"line {line}: arrival_s {text!r} is not a time in seconds >= 0; correct or drop the row")
    elif value < before_s:
        faults.append(f"line {line}: arrival_s {text} is earlier than {before_s:g} before it; sort the rows")
    return value


def _tokens(line: int, column: str, text: str, faults: list[str]) -> int:
    value = _number(text)
    if not (math.isfinite(value) and value >= 1 and value == int(value)):
        faults.append(f"line {line}: {column} {text!r} is not a whole number of tokens >= 1; correct or drop the row")
        return 1
    return int(value)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _raise_faults(path: Path, faults: list[str], num_rows: int) -> None:
    if faults:
        more = f"\n  and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise WorkloadError(f"{path}: {len(faults)} faults:\n  " + "\n  ".join(faults[:_FAULTS_SHOWN]) + more)
    if not num_rows:
        raise WorkloadError(f"{path}: no rows. Add at least one request below the header.")
