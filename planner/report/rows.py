"""Rows of facts as tables: rows that say themselves what their columns are, and tables without empty columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from planner.report.blocks import Table
from planner.report.wording import described, title

_WORDS = (str, bool)
_FIRST = ("system", "name")


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

    What all rows have in common is left out, dictionaries spread over columns of their own.
    """
    flat = [dict(_flat(row)) for row in rows]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    keys = [key for key in keys if len(flat) == 1 or len({str(row.get(key)) for row in flat}) > 1]
    keys.sort(key=lambda key: key not in _FIRST)
    if not keys:
        return None
    cells = [[described(key, row.get(key)) for key in keys] for row in flat]
    words = {i for i, key in enumerate(keys) if any(isinstance(row.get(key), _WORDS) for row in flat)}
    return without_empty([title(key) for key in keys], cells, words)


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{key} at {name}", item) for name, item in value.items())
        else:
            yield key, value
