"""Time as a function of size: interpolated in log space, with the origin of every answer.

Between measured sizes ln(time) is linear in ln(size). Beyond the last measured size the time follows the roofline
of the operation (the ratio measured / roofline of the last point is kept); below the first it is flat. Both are
baked into the grid when the curve is built, so that evaluation is one `numpy.interp`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Codes = NDArray[np.int8]

_MEASURED_WITHIN = 0.01
_BEYOND = np.log(2.0) * np.array([0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 14, 20, 30])
_SMALLEST = 1e-9


class Origin(IntEnum):
    """Where a time comes from, from best to worst."""

    MEASURED = 0
    INTERPOLATED = 1
    EXTRAPOLATED = 2
    ROOFLINE = 3


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One-dimensional time of an operation.

    `log_x`, `log_s`: [points], natural logarithms of size and seconds; `measured`: [points] bool;
    `first`, `last`: range of ln(size) that the measurements cover; `shape_origin`: how well the shape is known.
    """

    log_x: Floats
    log_s: Floats
    measured: NDArray[np.bool_]
    first: float
    last: float
    shape_origin: Origin

    def seconds(self, x: ArrayLike) -> Floats:
        """Time [s] at size `x`, any shape."""
        size = np.log(np.maximum(np.asarray(x, dtype=np.float64), _SMALLEST))
        return np.asarray(np.exp(np.interp(size, self.log_x, self.log_s)))

    def origin(self, x: ArrayLike) -> Codes:
        """`Origin` codes at size `x`, same shape: the worse of the shape's and the size's."""
        size = np.log(np.maximum(np.asarray(x, dtype=np.float64), _SMALLEST))
        if self.shape_origin == Origin.ROOFLINE:
            return np.full(size.shape, Origin.ROOFLINE, dtype=np.int8)
        codes = _axis_origin(size, self.log_x, self.measured, self.first, self.last)
        return np.maximum(codes, np.int8(self.shape_origin))


@dataclass(frozen=True, slots=True, eq=False)
class Surface:
    """Two-dimensional time of an operation over (batch, length).

    `log_batch`: [b], `log_length`: [l], `log_s`: [b, l]; `measured`: [b, l] bool. `includes_projections` tells
    whether the time covers the whole attention module or the kernel only.
    """

    log_batch: Floats
    log_length: Floats
    log_s: Floats
    measured: NDArray[np.bool_]
    shape_origin: Origin
    includes_projections: bool = False
    _inside: NDArray[np.bool_] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        inside = self.measured
        for axis in (0, 1):
            before = np.logical_or.accumulate(inside, axis)
            after = np.flip(np.logical_or.accumulate(np.flip(inside, axis), axis), axis)
            inside = inside | (before & after)
        object.__setattr__(self, "_inside", inside)

    def seconds(self, batch: ArrayLike, length: ArrayLike) -> Floats:
        """Time [s] of `batch` sequences of `length` tokens; the two broadcast."""
        row, row_part, column, column_part = self._cell(batch, length)
        low = self.log_s[row, column] * (1 - column_part) + self.log_s[row, column + 1] * column_part
        high = self.log_s[row + 1, column] * (1 - column_part) + self.log_s[row + 1, column + 1] * column_part
        return np.asarray(np.exp(low * (1 - row_part) + high * row_part))

    def origin(self, batch: ArrayLike, length: ArrayLike) -> Codes:
        """`Origin` codes, broadcast shape of the two."""
        row, row_part, column, column_part = self._cell(batch, length)
        if self.shape_origin == Origin.ROOFLINE:
            return np.full(row.shape, Origin.ROOFLINE, dtype=np.int8)
        near_row = np.where(row_part > 0.5, row + 1, row)
        near_column = np.where(column_part > 0.5, column + 1, column)
        off_row = np.abs(row_part - (row_part > 0.5)) * np.diff(self.log_batch)[row]
        off_column = np.abs(column_part - (column_part > 0.5)) * np.diff(self.log_length)[column]
        exact = (np.maximum(off_row, off_column) <= _MEASURED_WITHIN) & self.measured[near_row, near_column]
        corners = self._corners(row, row_part, column, column_part)
        codes = np.where(exact, Origin.MEASURED, np.where(corners, Origin.INTERPOLATED, Origin.EXTRAPOLATED))
        return np.maximum(codes.astype(np.int8), np.int8(self.shape_origin))

    def _cell(self, batch: ArrayLike, length: ArrayLike) -> tuple[Any, Floats, Any, Floats]:
        rows, columns = np.broadcast_arrays(np.asarray(batch, np.float64), np.asarray(length, np.float64))
        row, row_part = _locate(np.log(np.maximum(rows, _SMALLEST)), self.log_batch)
        column, column_part = _locate(np.log(np.maximum(columns, _SMALLEST)), self.log_length)
        return row, row_part, column, column_part

    def _corners(self, row: Any, row_part: Floats, column: Any, column_part: Floats) -> NDArray[np.bool_]:
        known = np.ones(np.shape(row), dtype=np.bool_)
        for down in (0, 1):
            for right in (0, 1):
                used = (row_part if down else 1 - row_part) * (column_part if right else 1 - column_part) > 1e-9
                known &= ~used | self._inside[row + down, column + right]
        return known


def _locate(values: Floats, grid: Floats) -> tuple[Any, Floats]:
    """Lower grid index and fraction towards the next, clamped to the grid."""
    index = np.clip(np.searchsorted(grid, values, side="right") - 1, 0, len(grid) - 2)
    return index, np.clip((values - grid[index]) / (grid[index + 1] - grid[index]), 0.0, 1.0)


def _axis_origin(values: Floats, grid: Floats, measured: NDArray[np.bool_], first: float, last: float) -> Codes:
    index = np.clip(np.searchsorted(grid, values), 1, len(grid) - 1)
    nearer_low = np.abs(values - grid[index - 1]) <= np.abs(values - grid[index])
    nearest = np.where(nearer_low, index - 1, index)
    exact = (np.abs(values - grid[nearest]) <= _MEASURED_WITHIN) & measured[nearest]
    inside = (values >= first - _MEASURED_WITHIN) & (values <= last + _MEASURED_WITHIN)
    codes = np.where(exact, Origin.MEASURED, np.where(inside, Origin.INTERPOLATED, Origin.EXTRAPOLATED))
    return codes.astype(np.int8)


def curve_of(
    x: Floats, seconds: Floats, roof: Callable[[Floats], Floats], shape_origin: Origin, *, monotone: bool = True
) -> Curve:
    """Curve through measured points (`x` ascending), continued along `roof` beyond the last.

    `monotone` lifts a point that is faster than a smaller one, since engines never gain from more work.
    """
    beyond = x[-1] * np.exp(_BEYOND)
    tail = roof(np.concatenate([x[-1:], beyond]))
    log_x = np.log(np.concatenate([x, beyond]))
    log_s = np.log(np.concatenate([seconds, seconds[-1] * tail[1:] / tail[0]]))
    if monotone:
        log_s = np.maximum.accumulate(log_s)
    measured = np.arange(len(log_x)) < len(x)
    return Curve(log_x, log_s, measured, float(log_x[0]), float(log_x[len(x) - 1]), shape_origin)


def roofline_curve(roof: Callable[[Floats], Floats], largest: float = 2.0**40) -> Curve:
    """Curve of a closed formula, sampled four times per octave up to `largest`."""
    x = np.exp(np.arange(0.0, np.log(largest), np.log(2.0) / 4))
    log_s = np.maximum.accumulate(np.log(roof(x)))
    return Curve(np.log(x), log_s, np.zeros(len(x), np.bool_), 0.0, float(np.log(largest)), Origin.ROOFLINE)


def surface_of(
    batch: Floats,
    length: Floats,
    ratio: Floats,
    roof: Callable[[Floats, Floats], Floats],
    shape_origin: Origin,
    includes_projections: bool,
) -> Surface:
    """Surface from ln(measured / roofline) on a grid.

    `ratio`: [b, l], NaN where nothing was measured. Holes take the ratio of the nearest measured length of the
    same batch, then of the nearest batch; the grid is continued along `roof` in both directions.
    """
    measured = np.isfinite(ratio)
    filled = _fill(_fill(ratio, 1), 0)
    more_batch, more_length = batch[-1] * np.exp(_BEYOND[3::2]), length[-1] * np.exp(_BEYOND[3::2])
    rows, columns = np.concatenate([batch, more_batch]), np.concatenate([length, more_length])
    wide = np.pad(filled, ((0, len(more_batch)), (0, len(more_length))), mode="edge")
    log_s = wide + np.log(roof(rows[:, None], columns[None, :]))
    known = np.pad(measured, ((0, len(more_batch)), (0, len(more_length))))
    return Surface(np.log(rows), np.log(columns), log_s, known, shape_origin, includes_projections)


def roofline_surface(roof: Callable[[Floats, Floats], Floats], includes_projections: bool = False) -> Surface:
    """Surface of a closed formula over batch 1..2^16 and length 1..2^24."""
    batch, length = 2.0 ** np.arange(0, 16.5, 0.5), 2.0 ** np.arange(0, 24.5, 0.5)
    log_s = np.log(roof(batch[:, None], length[None, :]))
    nothing = np.zeros(log_s.shape, np.bool_)
    return Surface(np.log(batch), np.log(length), log_s, nothing, Origin.ROOFLINE, includes_projections)


def _fill(values: Floats, axis: int) -> Floats:
    """Replace NaN by the last finite value along `axis`, leading NaN by the first."""
    moved = np.moveaxis(values, axis, 1)
    position = np.where(np.isfinite(moved), np.arange(moved.shape[1])[None, :], -1)
    last = np.maximum.accumulate(position, axis=1)
    first = np.argmax(np.isfinite(moved), axis=1)[:, None]
    chosen = np.where(last >= 0, last, first)
    return np.moveaxis(np.take_along_axis(moved, chosen, axis=1), 1, axis)
