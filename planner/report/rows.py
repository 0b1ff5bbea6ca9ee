"""Rows of facts as tables: rows that say themselves what their columns are, and tables without empty columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from planner.report.blocks import Table
from planner.report.wording import described, title

_WORDS = (str, bool)
_FIRST = ("system", "name")
_LABELS = ("topic", "model")
"""Columns that only tell rows apart."""
_BOUND = "room_at_least"
"""Says of a row that its numbers are bounds from below: more demand was not tried."""


def named(facts: Mapping[str, Any], name: object) -> Mapping[str, Any]:
    """The system called `name`, empty when there is none."""
    return next((row for row in facts.get("systems") or () if name is not None and row.get("name") == name), {})


def without_empty(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: Iterable[int] = (0,)) -> Table:
    """A table without the columns of which nothing is known; the first stays. ValueError on rows of another width."""
    cells = [tuple(cell for cell, _ in zip(row, header, strict=True)) for row in rows]
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] not in ("–", "") for row in cells)]
    words = frozenset(position for position, i in enumerate(kept) if i in set(text_columns))
    return Table(tuple(header[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in cells), words)


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """A table whose columns are the keys of `rows`, the system first; None without rows.

    Dictionaries spread over columns of their own. Labels that all rows share are left out, results never.
    """
    flat = [dict(_flat(row)) for row in rows]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    keys = [key for key in keys if key not in _LABELS or len({str(row.get(key)) for row in flat}) > 1]
    keys = sorted((key for key in keys if key != _BOUND), key=lambda key: key not in _FIRST)
    if not keys:
        return None
    cells = [[_result(key, row) for key in keys] for row in flat]
    words = {i for i, key in enumerate(keys) if any(isinstance(row.get(key), _WORDS) for row in flat)}
    return without_empty([title(key) for key in keys], cells, words)


def _result(key: str, row: Mapping[str, Any]) -> str:
    """The cell of `key`; a number after a change says so where nothing changed or nothing can be had any more.

    A number of a row of bounds says that it is one.
    """
    value, before = row.get(key), row.get(f"{key.removesuffix('_after')}_before")
    if key.endswith("_after") and before is not None:
        if value is None:
            return "not possible"
        if value == before:
            return "no change"
    is_bound = row.get(_BOUND) and isinstance(value, int | float)
    return f"{'at least ' if is_bound else ''}{described(key, value)}"


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{key} at {name}", item) for name, item in value.items())
        else:
            yield key, value
