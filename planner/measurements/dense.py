"""Which measured GEMMs answer for a weight matrix: bilinear in ln(rows) and ln(cols)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from planner.measurements.curves import Origin
from planner.measurements.formats import FORMATS
from planner.measurements.library import Match, Neighbour
from planner.measurements.store import Table

_ENGINES = ("vllm", "sglang", "trtllm")
Block = tuple[NDArray[np.int64], NDArray[np.int64], dict[tuple[int, int], int]]


def gemm_match(table: Table | None, engine: str, fmt: str, rows: int, cols: int) -> Match | None:
    """Up to four series around (rows, cols); None when no engine has the format or a substitute.

    The engine's own table is preferred, then the same format of another engine, then substitutes.
    """
    if table is None:
        return None
    for label in (fmt, *FORMATS[fmt].substitutes):
        for owner in dict.fromkeys((engine, *_ENGINES, *table.categories["engine"])):
            block = _block(table, owner, label)
            if block is None:
                continue
            neighbours, inside = _corners(block, rows, cols)
            exact = len(neighbours) == 1 and inside
            origin = Origin.MEASURED if exact else Origin.INTERPOLATED if inside else Origin.EXTRAPOLATED
            if owner != engine or label != fmt:
                origin = Origin.EXTRAPOLATED
            return Match(table, neighbours, origin, owner)
    return None


@lru_cache(maxsize=256)
def _block(table: Table, engine: str, fmt: str) -> Block | None:
    """Grid of one engine and format: values of rows, values of cols, series of each pair."""
    mine = (table.keys["engine"] == table.code("engine", engine)) & (table.keys["fmt"] == table.code("fmt", fmt))
    series = np.flatnonzero(mine)
    if not len(series):
        return None
    rows, cols = table.keys["rows"][series], table.keys["cols"][series]
    pairs = {(int(r), int(c)): int(s) for r, c, s in zip(rows, cols, series, strict=True)}
    return np.unique(rows), np.unique(cols), pairs


def _corners(block: Block, rows: int, cols: int) -> tuple[tuple[Neighbour, ...], bool]:
    """Corners of the grid cell around (rows, cols), nearest first, and whether the cell contains it."""
    row_values, col_values, pairs = block
    found: dict[int, float] = {}
    inside = True
    for row, row_weight in _around(row_values, rows):
        for col, col_weight in _around(col_values, cols):
            if row_weight * col_weight <= 0:
                continue
            if (row, col) in pairs:
                series = pairs[row, col]
                found[series] = found.get(series, 0.0) + row_weight * col_weight
            else:
                inside = False
    if not found:
        nearest = min(pairs, key=lambda pair: (np.log(pair[0] / rows) ** 2 + np.log(pair[1] / cols) ** 2, pair))
        return (Neighbour(pairs[nearest], 1.0),), False
    total = sum(found.values())
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    inside &= bool(row_values[0] <= rows <= row_values[-1] and col_values[0] <= cols <= col_values[-1])
    return tuple(Neighbour(series, weight / total) for series, weight in ordered), inside


def _around(values: NDArray[np.int64], wanted: int) -> list[tuple[int, float]]:
    """The two grid values around `wanted` with their weights in log space; the nearest edge outside."""
    above = int(np.searchsorted(values, wanted))
    if above == len(values):
        return [(int(values[-1]), 1.0)]
    if above == 0 or values[above] == wanted:
        return [(int(values[above]), 1.0)]
    low, high = int(values[above - 1]), int(values[above])
    part = float(np.log(wanted / low) / np.log(high / low))
    return [(low, 1 - part), (high, part)]
