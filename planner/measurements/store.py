"""Compact measured tables on disk: one `.npz` per (system, operation), numpy only.

A table is a set of series. A series has constant key columns (engine, format, shape ...) and rows of one or two
axis columns (`tokens`, or `batch` and `length`) with a time. Times are stored as whole multiples of `LOG_STEP` in
ln(time / `SHORTEST_S`), so the rounding error is at most 0.05 %; the codes are delta-coded and split into byte
planes because that is what deflate compresses well (about 1.2 bytes per time).

A table may carry a `Quality` per row (p90, spread, repeats, library, origin) where whoever measured it recorded one;
the published tables do not. Version 1 files, which cannot carry it, are still read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.arrayfile import read_arrays
from planner.errors import ProfileError

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
LOG_STEP = 1e-3
SHORTEST_S = 1e-7
_MOST_BYTES = 300e6
"""Largest unpacked table; the largest published one has 3 MB."""
_REMEDY = "Run `moeplan profiles import` again."
_ROWS_OF_QUALITY = ("p90_s", "spread", "repeats", "library", "origin")

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Quality:
    """How well each row of a table is known; every array is [rows].

    `p90_s`: 90th percentile of the repeats [s]. `spread`: half the width of the 95 % interval of the median over
    the median. `repeats`: timed iterations. `library`, `origin`: codes into the names beside them.
    """

    p90_s: Floats
    spread: Floats
    repeats: Ints
    library: Ints
    origin: Ints
    libraries: tuple[str, ...]
    origins: tuple[str, ...]

    def take(self, rows: NDArray[Any]) -> Quality:
        """The chosen rows, by index or mask."""
        return replace(
            self,
            p90_s=self.p90_s[rows],
            spread=self.spread[rows],
            repeats=self.repeats[rows],
            library=self.library[rows],
            origin=self.origin[rows],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One operation of one system.

    `keys[name]`: [series] int64, categorical columns coded by `categories[name]`.
    `axes[name]`: [rows] int64. `seconds`: [rows]. Rows of series i are `start[i]:start[i + 1]`.
    `quality` is None where the source gives no statistics.
    """

    op: str
    keys: Mapping[str, Ints]
    axes: Mapping[str, Ints]
    start: Ints
    seconds: Floats
    categories: Mapping[str, tuple[str, ...]]
    quality: Quality | None = None

    def code(self, column: str, value: str) -> int:
        """Code of a categorical `value`, or -1 when the table does not have it."""
        names = self.categories[column]
        return names.index(value) if value in names else -1

    def label(self, column: str, series: int) -> str:
        """Categorical value of one series."""
        return self.categories[column][int(self.keys[column][series])]

    def rows(self, series: int) -> slice:
        """Rows of one series."""
        return slice(int(self.start[series]), int(self.start[series + 1]))

    def spread_keys(self, column: str) -> Ints:
        """Key column repeated for every row: [rows]."""
        return np.repeat(self.keys[column], np.diff(self.start))


def write_table(path: Path, table: Table) -> None:
    """Write `table` to `path` (npz, no pickles); a reader sees the old file or the new one, never half of it."""
    header: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "op": table.op,
        "log_step": LOG_STEP,
        "shortest_s": SHORTEST_S,
        "keys": list(table.keys),
        "axes": list(table.axes),
        "categories": {name: list(values) for name, values in table.categories.items()},
    }
    arrays: dict[str, Any] = {f"key_{name}": _compact(column) for name, column in table.keys.items()}
    arrays |= {f"axis_{name}": _compact(column) for name, column in table.axes.items()}
    arrays["counts"] = np.diff(table.start).astype(np.int32)
    arrays["codes"] = _planes(_codes(table.seconds))
    if table.quality is not None:
        header["libraries"], header["origins"] = list(table.quality.libraries), list(table.quality.origins)
        arrays |= _quality_arrays(table.quality)
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_table(path: Path) -> Table:
    """Read a table. Raises ProfileError when the file is missing, malformed or of another schema version."""
    data = read_arrays(path, ProfileError, _MOST_BYTES, _REMEDY)
    try:
        header = json.loads(data["header"].tobytes().decode())
        version = header["schema_version"]
        if version in READABLE_VERSIONS:
            return _checked(_table(data, header))
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise ProfileError(f"{path}: not a measured table ({error}). {_REMEDY}") from error
    known = " and ".join(str(version) for version in READABLE_VERSIONS)
    raise ProfileError(f"{path}: schema version {version}, this program reads {known}. {_REMEDY}")


def _table(data: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> Table:
    codes = _from_planes(data["codes"])
    return Table(
        op=_names([header["op"]])[0],
        keys={name: data[f"key_{name}"].astype(np.int64, casting="same_kind") for name in _names(header["keys"])},
        axes={name: data[f"axis_{name}"].astype(np.int64, casting="same_kind") for name in _names(header["axes"])},
        start=np.concatenate([[0], np.cumsum(data["counts"].astype(np.int64, casting="same_kind"))]),
        seconds=header["shortest_s"] * np.exp(codes * header["log_step"]),
        categories={name: _names(values) for name, values in header["categories"].items()},
        quality=_read_quality(data, header),
    )


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"names expected, not {str(values)[:60]}")
    return tuple(values)


def _checked(table: Table) -> Table:
    """`table` if its parts agree; ValueError otherwise."""
    rows, series = len(table.seconds), len(table.start) - 1
    lengths = {f"axis {name}": (column, rows) for name, column in table.axes.items()}
    lengths |= {f"key {name}": (column, series) for name, column in table.keys.items()}
    if table.quality is not None:
        lengths |= {name: (getattr(table.quality, name), rows) for name in _ROWS_OF_QUALITY}
    for name, (column, length) in lengths.items():
        if column.shape != (length,):
            raise ValueError(f"{name} of shape {column.shape} for {series} series of {rows} rows")
    if int(table.start[-1]) != rows or (np.diff(table.start) < 0).any():
        raise ValueError(f"series end at row {table.start[-1]} of {rows}")
    if not table.axes or not np.isfinite(table.seconds).all() or (table.seconds <= 0).any():
        raise ValueError("no axes, or times that are not above 0")
    coded = [(names, ({**table.keys, **table.axes})[column]) for column, names in table.categories.items()]
    if table.quality is not None:
        coded += [(table.quality.libraries, table.quality.library), (table.quality.origins, table.quality.origin)]
    if any(len(codes) and not 0 <= codes.min() <= codes.max() < len(names) for names, codes in coded):
        raise ValueError("a code without a name")
    return table


def _compact(column: Ints) -> NDArray[Any]:
    """The column as int32 where it fits (message sizes reach 2^34 bytes)."""
    return column.astype(np.int32) if not len(column) or np.abs(column).max() < 2**31 else column


def _quality_arrays(quality: Quality) -> dict[str, Any]:
    return {
        "p90_codes": _planes(_codes(quality.p90_s)),
        "spread": quality.spread.astype(np.float32),
        "repeats": quality.repeats.astype(np.int32),
        "library": quality.library.astype(np.int16),
        "origin": quality.origin.astype(np.int16),
    }


def _read_quality(data: Any, header: Mapping[str, Any]) -> Quality | None:
    if "libraries" not in header:
        return None
    return Quality(
        p90_s=header["shortest_s"] * np.exp(_from_planes(data["p90_codes"]) * header["log_step"]),
        spread=data["spread"].astype(np.float64),
        repeats=data["repeats"].astype(np.int64),
        library=data["library"].astype(np.int64),
        origin=data["origin"].astype(np.int64),
        libraries=_names(header["libraries"]),
        origins=_names(header["origins"]),
    )


def quantise(seconds: Floats) -> Floats:
    """`seconds` as they come back from a file: rounded to within 0.05 %."""
    return np.asarray(SHORTEST_S * np.exp(_codes(seconds) * LOG_STEP))


def build_table(
    op: str,
    columns: Mapping[str, Sequence[Any] | NDArray[Any]],
    keys: Sequence[str],
    axes: Sequence[str],
    seconds: NDArray[Any],
    quality: Quality | None = None,
) -> Table:
    """Table from long columns of equal length; string columns become categorical, rows are sorted.

    Rows with the same keys and axes are merged to the fastest: an engine that has two kernels for a shape
    is taken to choose the better one. `quality` has the rows of `columns` and follows them.
    """
    coded: dict[str, Ints] = {}
    categories: dict[str, tuple[str, ...]] = {}
    for name in (*keys, *axes):
        values = np.asarray(columns[name])
        if values.dtype.kind in "OUS":
            names, codes = np.unique(values.astype(str), return_inverse=True)
            categories[name] = tuple(str(n) for n in names)
            coded[name] = codes.astype(np.int64)
        else:
            coded[name] = values.astype(np.int64)
    times = np.asarray(seconds, dtype=np.float64)
    order = np.lexsort((times, *(coded[name] for name in reversed((*keys, *axes)))))
    coded = {name: column[order] for name, column in coded.items()}
    times = times[order]
    fresh = _changes([coded[name] for name in (*keys, *axes)], len(times))
    coded = {name: column[fresh] for name, column in coded.items()}
    times, kept = times[fresh], order[fresh]
    first = np.flatnonzero(_changes([coded[name] for name in keys], len(times)))
    return Table(
        op=op,
        keys={name: coded[name][first] for name in keys},
        axes={name: coded[name] for name in axes},
        start=np.concatenate([first, [len(times)]]).astype(np.int64),
        seconds=times,
        categories=categories,
        quality=None if quality is None else quality.take(kept),
    )


def _changes(columns: Sequence[Ints], rows: int) -> NDArray[np.bool_]:
    """True where any column differs from the row before; the first row is True."""
    changed = np.zeros(rows, dtype=np.bool_)
    changed[:1] = True
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return changed


def _codes(seconds: Floats) -> Ints:
    ratio = np.log(np.maximum(seconds, SHORTEST_S) / SHORTEST_S)
    return np.clip(np.rint(ratio / LOG_STEP), 0, 65535).astype(np.int64)


def _planes(codes: Ints) -> NDArray[np.uint8]:
    delta = np.diff(codes, prepend=0).astype(np.int64) % 65536
    return np.ascontiguousarray(np.stack([delta % 256, delta // 256]).astype(np.uint8))


def _from_planes(planes: NDArray[np.uint8]) -> Ints:
    delta = planes[0].astype(np.int64) + 256 * planes[1].astype(np.int64)
    return np.cumsum(delta) % 65536
