"""Time as a function of size: interpolated between measurements, with the origin of every answer.

Between two measured sizes the time advances as the roofline does: it has covered the same share of the measured
difference as the roofline of its own. Where the roofline is straight that is a straight line in size, at its knees
and for quadratic work it bends with it; measured sizes left out are found again with less error than by a straight
line in log space (docs/kernel_accuracy.md). Beyond the last measured size the ratio measured / roofline of the last
point is kept; below the first the time is flat. All of it is baked into the grid when the curve is built, fine
enough that evaluation is one `numpy.interp` in log space.
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
_CURVE_STEP, _SURFACE_STEP = np.log(2.0) / 4, np.log(2.0) / 2
"""Widest gap of a refined grid in ln(size): straight in log space over it is off by 0.1 % (0.4 %) for work that grows
in proportion to size."""
_MOST_STEPS = 8
_JUMP = 1e-6
_FLAT = 1e-3
"""A roofline that grows by less between two points says nothing about the way between them."""
_SURFACE_ROOF_SHARE = 0.5
"""Attention advances half as its roofline, half in proportion to size: the roofline knows only the kernel's main
loop, while masks, tails and launches grow with size."""


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
    x: Floats,
    seconds: Floats,
    roof: Callable[[Floats], Floats],
    shape_origin: Origin,
    *,
    steps: Floats | None = None,
    monotone: bool = True,
) -> Curve:
    """Curve through measured points (`x` ascending), continued along `roof` beyond the last.

    `steps`: sizes after which `roof` jumps. `monotone` lifts a point that is faster than a smaller one, since
    engines never gain from more work.
    """
    beyond = x[-1] * np.exp(_BEYOND)
    if monotone:
        seconds = np.maximum.accumulate(seconds)
    fine, lower, known = _refined(x, _CURVE_STEP)
    if steps is not None:
        jumps = steps[(steps > x[0]) & (steps < x[-1])]
        fine = np.unique(np.concatenate([fine, jumps, jumps * (1 + _JUMP)]))
        lower = np.clip(np.searchsorted(x, fine, side="right") - 1, 0, len(x) - 2)
        known = (x[lower] == fine) | (fine == x[-1])
    times = roof(np.concatenate([fine, beyond]))
    between = _advance(seconds, times[: len(fine)], times[np.flatnonzero(known)], fine, x, lower)
    log_x = np.log(np.concatenate([fine, beyond]))
    log_s = np.log(np.concatenate([between, seconds[-1] * times[len(fine) :] / times[len(fine) - 1]]))
    if monotone:
        log_s = np.maximum.accumulate(log_s)
    measured = np.concatenate([known, np.zeros(len(beyond), np.bool_)])
    return Curve(log_x, log_s, measured, float(log_x[0]), float(log_x[len(fine) - 1]), shape_origin)


def _refined(grid: Floats, step: float) -> tuple[Floats, NDArray[np.int64], NDArray[np.bool_]]:
    """`grid` with points put into gaps wider than `step`, the gap each point lies in, and which are of `grid`."""
    gaps = np.diff(np.log(grid))
    if not len(gaps):
        return grid, np.zeros(1, np.int64), np.ones(1, np.bool_)
    counts = np.clip(np.ceil(gaps / step - 1e-6), 1, _MOST_STEPS).astype(np.int64)
    lower = np.repeat(np.arange(len(gaps)), counts)
    place = np.arange(len(lower)) - np.repeat(np.cumsum(counts) - counts, counts)
    fine = grid[lower] * np.exp(gaps[lower] * place / counts[lower])
    known = np.append(place == 0, True)
    return np.append(fine, grid[-1]), np.append(lower, len(gaps) - 1), known


def _advance(
    seconds: Floats,
    roof_fine: Floats,
    roof_grid: Floats,
    fine: Floats,
    grid: Floats,
    lower: NDArray[np.int64],
    roof_share: float = 1.0,
) -> Floats:
    """Times at `fine` from those at `grid` along the first axis; other axes are carried along.

    `roof_share` of the way follows the roofline, the rest is in proportion to size.
    """
    if len(grid) == 1:
        return seconds
    upper = lower + 1
    plain = (fine - grid[lower]) / (grid[upper] - grid[lower])
    plain = plain.reshape(plain.shape + (1,) * (seconds.ndim - 1))
    low, high = roof_grid[lower], roof_grid[upper]
    rise = high - low
    flat = rise <= _FLAT * low
    follows = np.where(flat, plain, (roof_fine - low) / np.where(flat, 1.0, rise))
    way = np.clip(roof_share * follows + (1 - roof_share) * plain, 0.0, 1.0)
    return np.asarray(seconds[lower] * (1 - way) + seconds[upper] * way)


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

    `ratio`: [b, l], NaN where nothing was measured. A hole between measurements is closed from both sides, one at
    the rim takes the ratio of the nearest measured length of the same batch, then of the nearest batch; the grid is
    continued along `roof` in both directions.
    """
    fine_batch, in_batch, known_batch = _refined(batch, _SURFACE_STEP)
    fine_length, in_length, known_length = _refined(length, _SURFACE_STEP)
    measured = np.zeros((len(fine_batch), len(fine_length)), np.bool_)
    measured[np.ix_(known_batch, known_length)] = np.isfinite(ratio)
    times = roof(fine_batch[:, None], fine_length[None, :])
    coarse = times[:, known_length]
    seconds = _without_holes(ratio, coarse[known_batch], batch, length)
    shares = (in_batch, _SURFACE_ROOF_SHARE)
    seconds = _advance(seconds, coarse, coarse[known_batch], fine_batch, batch, *shares)
    shares = (in_length, _SURFACE_ROOF_SHARE)
    seconds = _advance(seconds.T, times.T, coarse.T, fine_length, length, *shares).T
    more_batch, more_length = batch[-1] * np.exp(_BEYOND[3::2]), length[-1] * np.exp(_BEYOND[3::2])
    rows, columns = np.concatenate([fine_batch, more_batch]), np.concatenate([fine_length, more_length])
    wide = np.pad(np.log(seconds / times), ((0, len(more_batch)), (0, len(more_length))), mode="edge")
    log_s = wide + np.log(roof(rows[:, None], columns[None, :]))
    known = np.pad(measured, ((0, len(more_batch)), (0, len(more_length))))
    return Surface(np.log(rows), np.log(columns), log_s, known, shape_origin, includes_projections)


def roofline_surface(roof: Callable[[Floats, Floats], Floats], includes_projections: bool = False) -> Surface:
    """Surface of a closed formula over batch 1..2^16 and length 1..2^24."""
    batch, length = 2.0 ** np.arange(0, 16.5, 0.5), 2.0 ** np.arange(0, 24.5, 0.5)
    log_s = np.log(roof(batch[:, None], length[None, :]))
    nothing = np.zeros(log_s.shape, np.bool_)
    return Surface(np.log(batch), np.log(length), log_s, nothing, Origin.ROOFLINE, includes_projections)


def _without_holes(ratio: Floats, roofs: Floats, batch: Floats, length: Floats) -> Floats:
    """Seconds [b, l] on the grid; holes between two measurements advance between them, along both axes if they can."""
    if np.isfinite(ratio).all():
        return np.asarray(np.exp(ratio) * roofs)
    seconds = np.exp(ratio) * roofs
    one, other = _closed(seconds, roofs, length), _closed(seconds.T, roofs.T, batch).T
    both = np.where(np.isfinite(one) & np.isfinite(other), np.sqrt(one * other), np.where(np.isfinite(one), one, other))
    return np.asarray(np.exp(_fill(_fill(np.log(both / roofs), 1), 0)) * roofs)


def _closed(seconds: Floats, roofs: Floats, grid: Floats) -> Floats:
    """`seconds` [rows, grid] with NaN between two measurements of a row replaced."""
    out = seconds.copy()
    finite = np.isfinite(seconds)
    before = np.logical_or.accumulate(finite, axis=1)
    after = np.logical_or.accumulate(finite[:, ::-1], axis=1)[:, ::-1]
    between = before & after & ~finite
    for row in np.flatnonzero(between.any(axis=1)):
        known, holes = np.flatnonzero(finite[row]), np.flatnonzero(between[row])
        lower = np.searchsorted(known, holes) - 1
        ends = seconds[row, known], roofs[row, holes], roofs[row, known]
        out[row, holes] = _advance(*ends, grid[holes], grid[known], lower, _SURFACE_ROOF_SHARE)
    return out


def _fill(values: Floats, axis: int) -> Floats:
    """Replace NaN by the last finite value along `axis`, leading NaN by the first."""
    moved = np.moveaxis(values, axis, 1)
    position = np.where(np.isfinite(moved), np.arange(moved.shape[1])[None, :], -1)
    last = np.maximum.accumulate(position, axis=1)
    first = np.argmax(np.isfinite(moved), axis=1)[:, None]
    chosen = np.where(last >= 0, last, first)
    return np.moveaxis(np.take_along_axis(moved, chosen, axis=1), 1, axis)
