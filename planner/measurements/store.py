"""Compact measured tables on disk: one `.npz` per (system, operation), numpy only.

A table is a set of series. A series has constant key columns (engine, format, shape ...) and rows of one or two
axis columns (`tokens`, or `batch` and `length`) with a time. Times are stored as whole multiples of `LOG_STEP` in
ln(time / `SHORTEST_S`), so the rounding error is at most 0.05 %; the codes are delta-coded and split into byte
planes because that is what deflate compresses well (about 1.2 bytes per time).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.errors import ProfileError

SCHEMA_VERSION = 1
LOG_STEP = 1e-3
SHORTEST_S = 1e-7

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One operation of one system.

    `keys[name]`: [series] int64, categorical columns coded by `categories[name]`.
    `axes[name]`: [rows] int64. `seconds`: [rows]. Rows of series i are `start[i]:start[i + 1]`.
    """

    op: str
    keys: Mapping[str, Ints]
    axes: Mapping[str, Ints]
    start: Ints
    seconds: Floats
    categories: Mapping[str, tuple[str, ...]]

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


def write_table(path: Path, table: Table) -> None:
    """Write `table` to `path` (npz, no pickles)."""
    header = {
        "schema_version": SCHEMA_VERSION,
        "op": table.op,
        "log_step": LOG_STEP,
        "shortest_s": SHORTEST_S,
        "keys": list(table.keys),
        "axes": list(table.axes),
        "categories": {name: list(values) for name, values in table.categories.items()},
    }
    arrays: dict[str, Any] = {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
    arrays |= {f"key_{name}": column.astype(np.int32) for name, column in table.keys.items()}
    arrays |= {f"axis_{name}": column.astype(np.int32) for name, column in table.axes.items()}
    arrays["counts"] = np.diff(table.start).astype(np.int32)
    arrays["codes"] = _planes(_codes(table.seconds))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def read_table(path: Path) -> Table:
    """Read a table. Raises ProfileError when the file is missing, malformed or of another schema version."""
    try:
        with np.load(path, allow_pickle=False) as data:
            header = json.loads(bytes(data["header"]).decode())
            if header["schema_version"] != SCHEMA_VERSION:
                raise ProfileError(
                    f"{path}: schema version {header['schema_version']}, this program reads {SCHEMA_VERSION}. "
                    "Run `moeplan profiles import` again."
                )
            codes = _from_planes(data["codes"])
            return Table(
                op=header["op"],
                keys={name: data[f"key_{name}"].astype(np.int64) for name in header["keys"]},
                axes={name: data[f"axis_{name}"].astype(np.int64) for name in header["axes"]},
                start=np.concatenate([[0], np.cumsum(data["counts"].astype(np.int64))]),
                seconds=header["shortest_s"] * np.exp(codes * header["log_step"]),
                categories={name: tuple(values) for name, values in header["categories"].items()},
            )
    except (OSError, KeyError, ValueError) as error:
        raise ProfileError(f"{path}: not a measured table ({error}). Run `moeplan profiles import` again.") from error


def quantise(seconds: Floats) -> Floats:
    """`seconds` as they come back from a file: rounded to within 0.05 %."""
    return np.asarray(SHORTEST_S * np.exp(_codes(seconds) * LOG_STEP))


def build_table(
    op: str,
    columns: Mapping[str, Sequence[Any] | NDArray[Any]],
    keys: Sequence[str],
    axes: Sequence[str],
    seconds: NDArray[Any],
) -> Table:
    """Table from long columns of equal length; string columns become categorical, rows are sorted.

    Rows with the same keys and axes are merged to the fastest: an engine that has two kernels for a shape
    is taken to choose the better one.
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
    times = times[fresh]
    first = np.flatnonzero(_changes([coded[name] for name in keys], len(times)))
    return Table(
        op=op,
        keys={name: coded[name][first] for name in keys},
        axes={name: coded[name] for name in axes},
        start=np.concatenate([first, [len(times)]]).astype(np.int64),
        seconds=times,
        categories=categories,
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
