"""What is done to every imported table: drop what physics forbids, put in order, thin, round.

The peaks are data-sheet peaks, not achieved ceilings, with 5 % slack for clocks above nominal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.hardware import System
from planner.measurements.formats import FORMATS
from planner.measurements.store import Table

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

SLACK = 1.05
_SPIKE = float(np.log(1.5))


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A table ready to write and the number of rows dropped per reason."""

    table: Table
    dropped: Mapping[str, int] = field(default_factory=dict)


def peak_flop_per_s(system: System, formats: NDArray[Any]) -> Floats:
    """Data-sheet FLOP/s of each row's format."""
    names, codes = np.unique(formats.astype(str), return_inverse=True)
    rates = np.array([system.gpu.peak_flop_per_s(FORMATS[name].arithmetic) for name in names])
    return np.asarray(rates[codes])


def possible(system: System, seconds: Floats, flop: Floats, bytes_: Floats, flop_per_s: Floats | float) -> Mask:
    """True where neither the FLOP nor the HBM bytes would have to run faster than the data sheet allows."""
    fastest = np.maximum(flop / flop_per_s, bytes_ / system.gpu.hbm_bytes_per_s)
    return np.asarray((seconds * SLACK >= fastest) & (seconds > 0))


def monotone(table: Table) -> tuple[Table, int]:
    """Times that never fall when any axis grows, and how many changed by more than 2 %.

    A series is laid out as a grid; each time becomes the geometric mean of the running maximum from below and
    the running minimum from above, after lone spikes and dips (1.5 x outside both neighbours) are set to a neighbour.
    A monotone series is returned as it was.
    """
    seconds = table.seconds.copy()
    for series in range(len(table.start) - 1):
        rows = table.rows(series)
        grids = [np.unique(axis[rows], return_inverse=True) for axis in table.axes.values()]
        grid = np.full([len(values) for values, _ in grids], np.nan)
        where = tuple(index for _, index in grids)
        grid[where] = np.log(table.seconds[rows])
        seconds[rows] = np.exp(_envelope(_despike(grid))[where])
    changed = int(np.count_nonzero(np.abs(seconds / table.seconds - 1) > 0.02))
    return replace(table, seconds=seconds), changed


def _despike(grid: Floats) -> Floats:
    """Pull a time far outside both neighbours (1.5 x) back to the nearer one, along each axis in turn."""
    for axis in reversed(range(grid.ndim)):
        if grid.shape[axis] < 3:
            continue
        ends = np.full([1 if a == axis else n for a, n in enumerate(grid.shape)], np.nan)
        before = np.concatenate([ends, np.delete(grid, -1, axis)], axis)
        after = np.concatenate([np.delete(grid, 0, axis), ends], axis)
        low, high = np.minimum(before, after), np.maximum(before, after)
        grid = np.where(grid > high + _SPIKE, high, np.where(grid < low - _SPIKE, low, grid))
    return grid


def _envelope(grid: Floats) -> Floats:
    below, above = grid, grid
    for axis in range(grid.ndim):
        below = np.fmax.accumulate(below, axis=axis)
        above = np.flip(np.fmin.accumulate(np.flip(above, axis), axis=axis), axis)
    return np.asarray((below + above) / 2)


def thin(values: NDArray[Any], keep: NDArray[Any]) -> Mask:
    """True where a value is in the kept grid."""
    return np.isin(values, keep)
