"""Measured (or to be measured) serving points: reading and checking the CSV."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from planner.errors import InputError, nearest
from planner.textfile import opened

METRICS = ("ttft_mean_ms", "tpot_mean_ms", "output_tok_s_per_gpu")
"""Measured columns: means over requests of the time to first token and per later token, output tokens per GPU."""

REQUIRED = ("model", "gpu", "engine", "num_gpus", "tp", "isl", "osl", "concurrency")
_DEGREES = ("attention_dp", "moe_ep", "pp")
_MAX_BYTES = 20_000_000
_MAX_COLUMNS = 200
_MAX_ROWS = 20_000
_MAX_COUNT = 100_000_000
_SHOWN = 5
_UNIFORM = re.compile(r"uniform_(?P<low>[0-9.]+)_(?P<high>[0-9.]+)")


@dataclass(frozen=True, slots=True)
class Point:
    """One benchmark run.

    Attention is cut over `tp` x `attention_dp` x `pp` GPUs, experts over `moe_ep`. Prompts have `isl` tokens and
    answers `osl`, or are uniform between `lengths[0]` and `lengths[1]` times as many. `measured` follows METRICS,
    NaN where nothing was measured.
    """

    name: str
    model: str
    gpu: str
    engine: str
    precision: str
    num_gpus: int
    tp: int
    attention_dp: int
    moe_ep: int
    pp: int
    isl: int
    osl: int
    lengths: tuple[float, float]
    concurrency: int
    measured: tuple[float, float, float]

    @property
    def combination(self) -> tuple[str, str, str]:
        """Model, GPU and engine: what is left out together when a prediction is judged."""
        return self.model, self.gpu, self.engine

    @property
    def deployed(self) -> tuple[str | int, ...]:
        """Everything but the load: points that agree here ran on the same kind of server."""
        degrees = (self.tp, self.attention_dp, self.moe_ep, self.pp)
        return (self.model, self.gpu, self.engine, self.precision, *degrees)


@dataclass(frozen=True, slots=True)
class Row:
    """Fields of one line as they were read, and the point they state or why they state none."""

    fields: dict[str, str]
    name: str
    point: Point | None
    fault: str


@dataclass(frozen=True, slots=True)
class PointsFile:
    """A points file: its columns in order and its rows in order."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def points(self) -> list[Point]:
        """The points of all rows that state one."""
        return [row.point for row in self.rows if row.point is not None]


def read_points(path: Path) -> PointsFile:
    """Points of a CSV with the columns of REQUIRED; `id, precision, attention_dp, moe_ep, pp, lengths` and the
    measured columns are optional, others pass through.

    A degree that is not given is 1, lengths are fixed. A row that cannot be read keeps its place and its fault.
    InputError when the file cannot be read, is empty or too large, lacks columns, or has no row that states a point.
    """
    columns, lines = _lines(path)
    if not lines:
        raise InputError(f"{path}: no rows. Add at least one point below the header.")
    rows = tuple(_row(line, fields) for line, fields in lines)
    faulty = [row for row in rows if row.fault]
    if len(faulty) == len(rows):
        shown = "\n  ".join(f"{row.name}: {row.fault}" for row in faulty[:_SHOWN])
        more = f"\n  and {len(faulty) - _SHOWN} more" if len(faulty) > _SHOWN else ""
        raise InputError(f"{path}: no row states a point:\n  {shown}{more}")
    return PointsFile(path, columns, rows)


def _lines(path: Path) -> tuple[tuple[str, ...], list[tuple[int, dict[str, str]]]]:
    """Header, and line number with stripped fields of every row."""
    with opened(path, InputError, _MAX_BYTES) as file:
        reader = csv.reader(file, strict=True)
        columns = tuple(name.strip() for name in next(reader, []))
        _check_columns(path, columns)
        lines = [(reader.line_num, fields) for fields in islice(reader, _MAX_ROWS) if fields]
        if next(reader, None) is not None:
            raise InputError(f"{path}: more than {_MAX_ROWS:,} rows. Split it.")
    for line, fields in lines:
        if len(fields) > len(columns):
            raise InputError(
                f"{path}: line {line} has {len(fields)} fields, the header {len(columns)}. Quote fields with commas."
            )
    padding = [""] * len(columns)
    return columns, [
        (line, {c: field.strip() for c, field in zip(columns, [*fields, *padding], strict=False)})
        for line, fields in lines
    ]


def _check_columns(path: Path, columns: tuple[str, ...]) -> None:
    if len(columns) > _MAX_COLUMNS:
        raise InputError(f"{path}: {len(columns):,} columns; at most {_MAX_COLUMNS} are read. Is it the right file?")
    if not any(columns):
        raise InputError(f"{path}: the file is empty. Its header must contain {','.join(REQUIRED)}.")
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        hints = "; ".join(f"{name}: {nearest(name, columns)}" for name in missing[:_SHOWN])
        raise InputError(
            f"{path}: missing column{'s' * (len(missing) > 1)} {', '.join(missing)} ({hints[:600]}). "
            f"The header must contain {','.join(REQUIRED)}."
        )
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise InputError(f"{path}: column {', '.join(map(repr, twice))} is there twice. Keep one of each.")


def _row(line: int, fields: dict[str, str]) -> Row:
    name = fields.get("id") or f"line {line}"
    faults: list[str] = []
    counts = {key: _count(key, fields[key], faults) for key in ("num_gpus", "tp", "isl", "osl", "concurrency")}
    counts |= {key: _count(key, fields.get(key) or "1", faults) for key in _DEGREES}
    faults += [f"{key} is empty" for key in ("model", "gpu", "engine") if not fields[key]]
    lengths = _lengths(fields.get("lengths", ""), faults)
    measured = tuple(_measured(key, fields.get(key, ""), faults) for key in METRICS)
    faults += [] if faults else _layout_faults(counts)
    if faults:
        return Row(fields, name, None, "; ".join(faults))
    texts = {key: fields.get(key, "") for key in ("model", "gpu", "engine", "precision")}
    point = Point(name=name, **texts, **counts, lengths=lengths, measured=measured)  # type: ignore[arg-type]
    return Row(fields, name, point, "")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _count(key: str, text: str, faults: list[str]) -> int:
    value = _number(text)
    if 1 <= value <= _MAX_COUNT and value == int(value):
        return int(value)
    faults.append(f"{key} {text[:40]!r} is not a whole number from 1 to {_MAX_COUNT:,}")
    return 1


def _measured(key: str, text: str, faults: list[str]) -> float:
    if not text or text.lower() in ("nan", "na", "null", "none"):
        return math.nan
    value = _number(text)
    if math.isfinite(value) and value > 0:
        return value
    faults.append(f"{key} {text[:40]!r} is not a positive number (leave it empty when it was not measured)")
    return math.nan


def _lengths(text: str, faults: list[str]) -> tuple[float, float]:
    if text.lower() in ("", "fixed"):
        return 1.0, 1.0
    match = _UNIFORM.fullmatch(text.lower())
    if match:
        low, high = _number(match["low"]), _number(match["high"])
        if 0 < low <= high <= 1:
            return low, high
    faults.append(f"lengths {text[:40]!r} is neither fixed nor uniform_<low>_<high> with 0 < low <= high <= 1")
    return 1.0, 1.0


def _layout_faults(counts: dict[str, int]) -> list[str]:
    faults = []
    product = counts["tp"] * counts["attention_dp"] * counts["pp"]
    if product != counts["num_gpus"]:
        faults.append(
            f"tp x attention_dp x pp = {counts['tp']} x {counts['attention_dp']} x {counts['pp']} = {product}, "
            f"not num_gpus = {counts['num_gpus']}"
        )
    stage = counts["tp"] * counts["attention_dp"]
    if stage % counts["moe_ep"]:
        faults.append(f"moe_ep {counts['moe_ep']} does not divide tp x attention_dp = {stage}")
    return faults
