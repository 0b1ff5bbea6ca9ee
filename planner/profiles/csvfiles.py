"""CSV files of a profile, one per operation: keys, axes, time_us, p90_us, spread, repeats, library, origin.

Reading collects every fault of every file before it gives up, each with its line and remedy.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planner.errors import NoMeasurement, ProfileError, nearest
from planner.measurements.formats import canonical, kv_format
from planner.profiles.ops import OPS, QUALITY_COLUMNS, TIME_COLUMN, UNMEASURED_ORIGIN, Column, Op
from planner.profiles.rows import Rows, quality_of
from planner.textfile import opened
from planner.units import US

NOT_TABLES = ("failures",)
_MOST_COLUMNS = 1000
_MOST_FAULTS = 20
_LARGEST = 2**62
_ORIGINS = ("measured", UNMEASURED_ORIGIN)


def read_folder(folder: Path) -> tuple[list[Rows], list[str]]:
    """Rows of every `<op>.csv` in `folder` and all faults found; a file with faults contributes no rows."""
    found, faults = [], []
    for path in sorted(folder.glob("*.csv")):
        if path.stem in NOT_TABLES:
            continue
        if path.stem not in OPS:
            faults.append(f"{path.name}: operation {path.stem!r} is unknown: {nearest(path.stem, OPS)}")
            continue
        rows, wrong = read_file(path, OPS[path.stem])
        faults += wrong
        if rows is not None and len(rows):
            found.append(rows)
    return found, faults


def read_file(path: Path, op: Op) -> tuple[Rows | None, list[str]]:
    """Rows of one CSV, and its faults; rows are None when there are any faults."""
    try:
        with opened(path, ProfileError) as file:
            text = file.read()
            lines = list(csv.reader(io.StringIO(text, newline="")))
    except ProfileError as error:
        return None, [str(error)]
    if not lines:
        return None, [f"{path.name}: empty file"]
    if len(lines[0]) > _MOST_COLUMNS:
        return None, [f"{path.name}: {len(lines[0]):,} columns; at most {_MOST_COLUMNS} are read"]
    faults = _header_faults(path.name, op, lines[0])
    if faults:
        return None, faults
    values, faults = _values(path.name, op, lines)
    if text and not text.endswith("\n"):
        faults.append(
            f"{path.name}: line {len(lines)} has no line end: the file is cut off. "
            "Run the benchmark again (it resumes) or delete that line."
        )
    if len(faults) > _MOST_FAULTS:
        faults = [*faults[:_MOST_FAULTS], f"{path.name}: and {len(faults) - _MOST_FAULTS} more faults"]
    return (None, faults) if faults else (_rows(op, values), [])


def _header_faults(file: str, op: Op, header: Sequence[str]) -> list[str]:
    known = [column.name for column in op.columns] + [TIME_COLUMN, *QUALITY_COLUMNS]
    faults = []
    for column in op.columns:
        if column.default is None and column.name not in header:
            faults.append(f"{file}: column {column.name!r} is missing ({column.meaning})")
    if TIME_COLUMN not in header:
        faults.append(f"{file}: column {TIME_COLUMN!r} is missing: the median time of one call in microseconds")
    faults += [f"{file}: column {name!r} is unknown: {nearest(name, known)}" for name in header if name not in known]
    faults += [f"{file}: column {name!r} appears twice" for name in sorted(set(header)) if list(header).count(name) > 1]
    return faults


def _values(file: str, op: Op, lines: Sequence[Sequence[str]]) -> tuple[dict[str, list[Any]], list[str]]:
    """Parsed columns of all rows, with one fault per wrong cell."""
    header, faults = list(lines[0]), []
    values: dict[str, list[Any]] = {name: [] for name in header}
    for number, cells in enumerate(lines[1:], start=2):
        if not cells:
            continue
        if len(cells) != len(header):
            kind = "the file is cut off" if number == len(lines) else "a comma too many or too few"
            faults.append(f"{file}: line {number} has {len(cells)} of {len(header)} values: {kind}")
            continue
        for name, cell in zip(header, cells, strict=True):
            value, fault = _cell(op, name, cell.strip())
            values[name].append(value)
            if fault:
                faults.append(f"{file}: line {number}: {name} = {cell!r}: {fault}")
    return values, faults


def _cell(op: Op, name: str, cell: str) -> tuple[Any, str]:
    """Value of one cell and its fault, empty when it is fine."""
    column = next((c for c in op.columns if c.name == name), None)
    if column is not None:
        return _key_cell(column, cell)
    if name == "library":
        return cell, ""
    if name == "origin":
        return cell, "" if cell in _ORIGINS else f"write one of {', '.join(_ORIGINS)}"
    if name in ("p90_us", "spread", "repeats") and not cell:
        return math.nan, ""
    value = _number(cell)
    if value is None or not math.isfinite(value):
        return math.nan, "not a finite number"
    if name in (TIME_COLUMN, "p90_us") and value <= 0:
        return value, "a time must be positive"
    return value, "" if value >= 0 else "must not be negative"


def _key_cell(column: Column, cell: str) -> tuple[Any, str]:
    if not column.text:
        value = _number(cell)
        if value is None or not math.isfinite(value) or value != int(value) or value > _LARGEST:
            return 0, "a whole number is expected"
        return int(value), "" if value >= column.least else f"must be at least {column.least}"
    if not cell:
        return cell, "empty"
    if column.name in ("fmt", "kv_fmt", "gemm_fmt"):
        return _format_cell(column, cell)
    if column.choices and cell not in column.choices:
        return cell, nearest(cell, column.choices)
    return cell, ""


def _format_cell(column: Column, cell: str) -> tuple[str, str]:
    if column.name == "kv_fmt":
        return kv_format(cell), ""
    if cell in ("kernel", "unstated"):
        return cell, ""
    try:
        return canonical(cell), ""
    except NoMeasurement as error:
        return cell, str(error)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _rows(op: Op, values: dict[str, list[Any]]) -> Rows:
    count = len(values[TIME_COLUMN])
    columns = {}
    for column in op.columns:
        cells = values.get(column.name, [column.default] * count)
        columns[column.name] = np.array(cells, dtype=str if column.text else np.int64)
    if op.name == "collective":
        # RCCL is called through NCCL's API, and the cost model asks for that; `library` keeps the difference.
        columns["engine"] = np.where(columns["engine"] == "rccl", "nccl", columns["engine"])
    seconds = np.array(values[TIME_COLUMN], dtype=np.float64) * US

    def numbers(name: str, otherwise: Any) -> Any:
        given = np.array(values.get(name, [math.nan] * count), dtype=np.float64)
        return np.where(np.isfinite(given), given, otherwise)

    quality = quality_of(
        numbers("p90_us", seconds / US) * US,
        numbers("spread", 0.0),
        numbers("repeats", 1).astype(np.int64),
        values.get("library", [""] * count),
        values.get("origin", [_ORIGINS[0]] * count),
    )
    return Rows(op, columns, seconds, quality)


def write_file(path: Path, rows: Rows) -> None:
    """Write rows as CSV. Raises ProfileError when the folder cannot be written."""
    header = [column.name for column in rows.op.columns] + [TIME_COLUMN]
    header += QUALITY_COLUMNS if rows.quality is not None else ()
    columns: list[Any] = [rows.columns[column.name] for column in rows.op.columns]
    columns.append([f"{value:.6g}" for value in rows.seconds / US])
    if rows.quality is not None:
        q = rows.quality
        columns.append([f"{value:.6g}" for value in q.p90_s / US])
        columns.append([f"{value:.4g}" for value in q.spread])
        columns += [q.repeats, [q.libraries[i] for i in q.library], [q.origins[i] for i in q.origin]]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(zip(*columns, strict=True))
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}. Choose a folder you may write to.") from error
