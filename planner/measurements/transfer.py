"""Builds curves and surfaces for a shape from neighbouring measured series, by carrying over utilisation.

time(shape, x) = roofline(shape, x) x product over neighbours of (measured / roofline)(neighbour, x')^weight, where
a neighbour that disagrees with the others weighs less,
with x' the same arithmetic position (tokens, assignments per local expert, (batch, length)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from planner.measurements.curves import Curve, Origin, Surface, curve_of, surface_of
from planner.measurements.library import Match
from planner.measurements.roofline import Roof, Roof2
from planner.measurements.store import Table

Floats = NDArray[np.float64]

_ANY_LENGTH = 2**40
_FEWEST_TO_DISAGREE = 3
_STRAY = 0.15
"""A neighbour this far (in ln of utilisation) from the median of all counts half."""


def curve(
    match: Match,
    axis: str,
    roof: Roof,
    roof_of: Callable[[int], Roof],
    scale_of: Callable[[int], float] | None = None,
    steps: Floats | None = None,
) -> Curve:
    """Curve of the query whose roofline is `roof` and jumps after `steps`; `scale_of`: query / neighbour size."""
    table = match.table
    scales = [1.0 if scale_of is None else scale_of(n.series) for n in match.neighbours]
    nearest = match.neighbours[0].series
    x: Floats = np.asarray(table.axes[axis][table.rows(nearest)] * scales[0], dtype=np.float64)
    if match.origin == Origin.MEASURED:
        return curve_of(x, table.seconds[table.rows(nearest)], roof, match.origin, steps=steps)
    ratios = np.empty((len(scales), len(x)))
    for i, (neighbour, scale) in enumerate(zip(match.neighbours, scales, strict=True)):
        rows = table.rows(neighbour.series)
        own_x = table.axes[axis][rows].astype(np.float64)
        ratio = np.log(table.seconds[rows] / roof_of(neighbour.series)(own_x))
        ratios[i] = np.interp(np.log(x / scale), np.log(own_x), ratio)
    weights = _agreeing(np.array([n.weight for n in match.neighbours]), ratios)
    return curve_of(x, roof(x) * np.exp(weights @ ratios), roof, match.origin, steps=steps)


def _agreeing(weights: Floats, ratios: Floats) -> Floats:
    """`weights` [n], less for a neighbour whose `ratios` [n, points] stray from the weighted median; they sum to 1."""
    if len(weights) < _FEWEST_TO_DISAGREE:
        return weights
    order = np.argsort(ratios, axis=0)
    passed = np.cumsum(weights[order], axis=0) >= 0.5
    middle = np.take_along_axis(ratios, np.take_along_axis(order, passed.argmax(axis=0)[None], 0), 0)
    strayed = np.sqrt(((ratios - middle) ** 2).mean(axis=1))
    trusted = weights / (1.0 + (strayed / _STRAY) ** 2)
    return np.asarray(trusted / trusted.sum())


def surface(match: Match, roof: Roof2, roof_of: Callable[[int], Roof2], includes_projections: bool = False) -> Surface:
    """Surface of the query over (batch, length)."""
    grids = [_grid(match.table, n.series, roof_of(n.series)) for n in match.neighbours]
    batch, length, ratio = grids[0]
    ratios = []
    for other_batch, other_length, other in grids:
        same = np.array_equal(other_batch, batch) and np.array_equal(other_length, length)
        values = other if same else _resample(other_batch, other_length, other, batch, length)
        ratios.append(np.where(np.isfinite(values), values, ratio))
    layers = np.stack(ratios)
    known = np.isfinite(ratio)
    weights = _agreeing(np.array([n.weight for n in match.neighbours]), layers[:, known])
    return surface_of(batch, length, np.tensordot(weights, layers, 1), roof, match.origin, includes_projections)


def _grid(table: Table, series: int, roof: Roof2) -> tuple[Floats, Floats, Floats]:
    """Batches, lengths and ln(measured / roofline) [b, l] of a series; NaN where it has no row."""
    rows = table.rows(series)
    batch, at_batch = np.unique(table.axes["batch"][rows], return_inverse=True)
    length, at_length = np.unique(table.axes["length"][rows], return_inverse=True)
    ratio = np.full((len(batch), len(length)), np.nan)
    at = roof(table.axes["batch"][rows].astype(np.float64), table.axes["length"][rows].astype(np.float64))
    ratio[at_batch, at_length] = np.log(table.seconds[rows] / at)
    if len(batch) == 1:
        batch, ratio = np.append(batch, 2 * batch), np.repeat(ratio, 2, axis=0)
    if len(length) == 1:
        # A recurrent state does not grow: one measured length stands for all.
        length, ratio = np.append(length, _ANY_LENGTH), np.repeat(ratio, 2, axis=1)
    return batch.astype(np.float64), length.astype(np.float64), ratio


def _resample(batch: Floats, length: Floats, values: Floats, to_batch: Floats, to_length: Floats) -> Floats:
    """`values` at another grid, nearest in log space."""
    rows = _nearest(batch, to_batch)
    columns = _nearest(length, to_length)
    return values[np.ix_(rows, columns)]


def _nearest(grid: Floats, wanted: Sequence[float] | Floats) -> NDArray[np.int64]:
    return np.asarray(np.argmin(np.abs(np.log(np.asarray(wanted))[:, None] - np.log(grid)[None, :]), axis=1))
