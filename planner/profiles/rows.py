"""Rows of one operation as plain columns, between CSV text and compiled tables.

`Rows.columns[name]` holds CSV column names, [rows]: text as str arrays, numbers as int64, `seconds` and the quality
columns beside them. Splitting by facet and joining again is done here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.errors import ProfileError
from planner.measurements.store import Quality, Table, build_table
from planner.profiles.ops import DETAIL, OPS, Column, Op

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of one operation: `columns` by CSV name, times in seconds, quality where it is known."""

    op: Op
    columns: Mapping[str, NDArray[Any]]
    seconds: Floats
    quality: Quality | None = None

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, rows: NDArray[Any]) -> Rows:
        """The chosen rows, by index or mask."""
        quality = None if self.quality is None else self.quality.take(rows)
        return Rows(self.op, {n: c[rows] for n, c in self.columns.items()}, self.seconds[rows], quality)

    def describe(self, row: int) -> str:
        """One row in words: `vllm bf16 rows=4096 cols=4096 tokens=8: 12.3 us`."""
        words = []
        for column in self.op.columns:
            value = self.columns[column.name][row]
            words.append(str(value) if column.text else f"{column.name}={value}")
        return f"{self.op.name}: {' '.join(words)}: {self.seconds[row] * 1e6:.4g} us"

    def groups(self, *without: str) -> NDArray[np.int64]:
        """Number of the group of each row; rows of a group agree in all key columns except those in `without`."""
        keys = [self.columns[c.name] for c in self.op.keys if c.name not in without]
        return group_numbers(keys, len(self))


def group_numbers(columns: Sequence[NDArray[Any]], rows: int) -> NDArray[np.int64]:
    """Dense group number per row of rows that are equal in all `columns`."""
    number = np.zeros(rows, dtype=np.int64)
    for column in columns:
        _, codes = np.unique(column, return_inverse=True)
        _, number = np.unique(number * (int(codes.max(initial=0)) + 1) + codes, return_inverse=True)
    return number


def tables_of(rows: Rows) -> dict[str, Table]:
    """Compiled tables by file stem: the plain one, and `<op>_detail` for rows off a facet's plain value."""
    plain = np.ones(len(rows), dtype=np.bool_)
    for column in rows.op.facets:
        plain &= rows.columns[column.name] == column.facet
    found = {}
    for stem, mask, keys in (
        (rows.op.name, plain, [c for c in rows.op.keys if c.facet is None]),
        (rows.op.name + DETAIL, ~plain, list(rows.op.keys)),
    ):
        if mask.any():
            found[stem] = _table(rows.take(mask), stem, keys)
    return found


def _table(rows: Rows, stem: str, keys: Sequence[Column]) -> Table:
    columns = {column.key: rows.columns[column.name] for column in (*keys, *rows.op.axes)}
    axes = [column.key for column in rows.op.axes]
    return build_table(stem, columns, [c.key for c in keys], axes, rows.seconds, rows.quality)


def rows_of(table: Table) -> Rows:
    """Rows of a compiled table under their CSV names; missing facets get their plain value."""
    op = OPS[table.op.removesuffix(DETAIL)]
    count = len(table.seconds)
    columns: dict[str, NDArray[Any]] = {}
    for column in op.keys:
        if column.key in table.keys:
            values = table.spread_keys(column.key)
            named = column.key in table.categories
            columns[column.name] = np.array(table.categories[column.key])[values] if named else values
        else:
            plain = column.facet if column.facet is not None else column.default
            if plain is None:
                raise ProfileError(f"{table.op}: column {column.key} is missing. Run `moeplan profiles import` again.")
            columns[column.name] = np.full(count, plain)
    columns |= {column.name: table.axes[column.key] for column in op.axes}
    return Rows(op, columns, table.seconds, table.quality)


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of several tables of one operation; quality survives when every part has it."""
    first = parts[0]
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in first.columns}
    seconds = np.concatenate([part.seconds for part in parts])
    known = [part.quality for part in parts if part.quality is not None]
    quality = _joined_quality(known) if len(known) == len(parts) else None
    return Rows(first.op, columns, seconds, quality)


def _joined_quality(parts: Sequence[Quality]) -> Quality:
    libraries = [np.array(q.libraries, dtype=object)[q.library] for q in parts]
    origins = [np.array(q.origins, dtype=object)[q.origin] for q in parts]
    return quality_of(
        np.concatenate([q.p90_s for q in parts]),
        np.concatenate([q.spread for q in parts]),
        np.concatenate([q.repeats for q in parts]),
        np.concatenate(libraries),
        np.concatenate(origins),
    )


def quality_of(
    p90_s: Floats, spread: Floats, repeats: NDArray[np.int64], library: Sequence[str] | Any, origin: Sequence[str] | Any
) -> Quality:
    """`Quality` from plain columns; names are coded in sorted order."""
    libraries, library_codes = np.unique(np.asarray(library, dtype=str), return_inverse=True)
    origins, origin_codes = np.unique(np.asarray(origin, dtype=str), return_inverse=True)
    return Quality(
        np.asarray(p90_s, np.float64),
        np.asarray(spread, np.float64),
        np.asarray(repeats, np.int64),
        library_codes.astype(np.int64),
        origin_codes.astype(np.int64),
        tuple(str(name) for name in libraries),
        tuple(str(name) for name in origins),
    )
