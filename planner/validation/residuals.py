"""Fitting the intervals: quantiles of measured over predicted, shrunk to the parent class, checked on left-out points.

Points of one model, GPU and engine err alike, so such a combination counts as the square root of its points, and a
class of few combinations leans on its parent. For each metric the level is the smallest whose intervals hold 80 % of
the points of combinations that were left out of the fit. Nothing else is fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.errors import InputError
from planner.validation.harness import Validation
from planner.validation.intervals import ANY, BASES, METRIC_NAMES, NOMINAL, IntervalTable, Key, Ratios, basis_of

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_PARENT_COMBINATIONS = 3.0
"""Combinations that a parent class counts for: at three a class of its own is as good as what it comes from."""
_LEVELS = np.arange(0.80, 0.961, 0.01)
_LEAST_COMBINATIONS = 3


@dataclass(frozen=True, slots=True, eq=False)
class Residuals:
    """Points side by side, `[num_points]`: `logs` ln(measured / predicted) `[num_points, metrics]`, NaN if unknown.

    `is_counted` are the points that the held-out share refers to; the others only add to the fit.
    """

    logs: Floats
    basis: NDArray[np.str_]
    experts: NDArray[np.str_]
    engine: NDArray[np.str_]
    combination: NDArray[np.str_]
    is_counted: Mask


def residuals(counted: Validation, others: Sequence[Validation] = ()) -> Residuals:
    """Residuals of the points of `counted` and `others` that have measurements.

    The rows of every one of `others` are those of `counted` under other conditions: they are of the same combinations.
    """
    rows = []
    for validation in (counted, *others):
        for (row, prediction), (named, _) in zip(validation.pairs, counted.pairs, strict=True):
            if row.point is None or named.point is None or not prediction.is_ok:
                continue
            logs = [np.log(m / p) for m, p in zip(row.point.measured, prediction.values, strict=True)]
            experts = "moe" if prediction.is_moe else "dense"
            combination = "|".join(named.point.combination)
            basis = basis_of(prediction.origin_share)
            rows.append((logs, basis, experts, prediction.engine, combination, validation is counted))
    if not rows:
        raise InputError("no point has both a measurement and a prediction: intervals need some")
    logs, *rest = zip(*rows, strict=True)
    return Residuals(np.array(logs, dtype=np.float64), *map(np.array, rest))


def fit_intervals(found: Residuals, *, source: str, as_of: str, command: str) -> IntervalTable:
    """Table of intervals of `found`. InputError with fewer than three combinations: nothing could be left out."""
    counted = sorted(set(found.combination[found.is_counted].tolist()))
    if len(counted) < _LEAST_COMBINATIONS:
        raise InputError(
            f"intervals need points of {_LEAST_COMBINATIONS} combinations of model, GPU and engine or more"
        )
    classes: dict[Key, Ratios] = {}
    held_out: dict[str, float] = {}
    for column, metric in enumerate(METRIC_NAMES):
        share, level = 0.0, 0.0
        for level in _LEVELS.tolist():
            share = _held_out(found, column, level, counted)
            if share >= NOMINAL:
                break
        held_out[metric] = share
        everything = np.ones(len(found.logs), dtype=np.bool_)
        classes |= {(metric, *key): ratios for key, ratios in _classes(found, everything, column, level).items()}
    return IntervalTable(source, as_of, command, held_out, classes)


def _held_out(found: Residuals, column: int, level: float, combinations: Iterable[str]) -> float:
    """Share of the counted points inside the interval fitted without their combination."""
    inside: list[NDArray[np.bool_]] = []
    for name in combinations:
        left_out = found.combination == name
        classes = _classes(found, ~left_out, column, level)
        for i in np.flatnonzero(left_out & found.is_counted & ~np.isnan(found.logs[:, column])):
            ratios = _nearest_class(classes, str(found.basis[i]), str(found.experts[i]), str(found.engine[i]))
            ratio = np.exp(found.logs[i, column])
            inside.append(np.array(ratios is not None and ratios.low <= ratio <= ratios.high))
    return float(np.mean(inside)) if inside else 0.0


def _nearest_class(classes: dict[tuple[str, str, str], Ratios], basis: str, experts: str, engine: str) -> Ratios | None:
    keys = ((basis, experts, engine), (basis, experts, ANY), (basis, ANY, ANY))
    return next((classes[key] for key in keys if key in classes), None)


def _classes(found: Residuals, chosen: Mask, column: int, level: float) -> dict[tuple[str, str, str], Ratios]:
    """Ratios of every class that has a point in `chosen`, parents before children."""
    known = chosen & ~np.isnan(found.logs[:, column])
    classes: dict[tuple[str, str, str], Ratios] = {}
    for basis in BASES:
        of_basis = known & (found.basis == basis)
        whole = _add(classes, found, of_basis, column, level, (basis, ANY, ANY), None)
        for experts in ("moe", "dense"):
            of_experts = of_basis & (found.experts == experts)
            parent = _add(classes, found, of_experts, column, level, (basis, experts, ANY), whole)
            for engine in sorted(set(found.engine[of_experts].tolist())):
                of_engine = of_experts & (found.engine == engine)
                _add(classes, found, of_engine, column, level, (basis, experts, engine), parent)
    return classes


def _add(
    classes: dict[tuple[str, str, str], Ratios],
    found: Residuals,
    chosen: Mask,
    column: int,
    level: float,
    key: tuple[str, str, str],
    parent: Floats | None,
) -> Floats | None:
    """Book the class `key` of the points `chosen`; gives the logarithms of its bounds for its children."""
    if not chosen.any():
        return parent
    _, member, size = np.unique(found.combination[chosen], return_inverse=True, return_counts=True)
    own = _quantiles(found.logs[chosen, column], 1 / np.sqrt(size[member]), level)
    if parent is not None:
        own = (len(size) * own + _PARENT_COMBINATIONS * parent) / (len(size) + _PARENT_COMBINATIONS)
    low, high = np.exp(own).tolist()
    classes[key] = Ratios(low, high, int(chosen.sum()), len(size))
    return own


def _quantiles(values: Floats, weights: Floats, level: float) -> Floats:
    """The two quantiles of weighted `values` `[num]` that enclose `level` of the weight."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) - weights[order] / 2
    tail = (1 - level) / 2
    return np.asarray(np.interp([tail, 1 - tail], reached / weights.sum(), values[order]))
