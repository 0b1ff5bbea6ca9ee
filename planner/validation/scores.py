"""Errors of predictions beside measurements, per metric and slice of the points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.validation.harness import Validation
from planner.validation.intervals import bounds
from planner.validation.points import METRICS, Point, Row
from planner.validation.replay import Prediction

Floats = NDArray[np.float64]
Pair = tuple[Row, Prediction]

_BANDS = ((8, "1-8"), (32, "9-32"), (128, "33-128"))
_LAST_BAND = "129 and more"


@dataclass(frozen=True, slots=True)
class Score:
    """How far one metric is off over the points of a slice.

    `num` points were measured and predicted; `coverage` is the share of the rows that have a prediction. Errors are
    |predicted / measured - 1| in percent: mean, median and 90th percentile; `bias_pct` is the median of
    predicted / measured - 1, `interval_coverage_pct` the share of measurements inside the 80 % interval. NaN at 0.
    """

    num: int
    coverage: float
    mape_pct: float
    median_ape_pct: float
    p90_ape_pct: float
    bias_pct: float
    interval_coverage_pct: float


def score(pairs: Sequence[Pair], metric: str) -> Score:
    """Score of `metric` over `pairs`."""
    column = METRICS.index(metric)
    predicted = np.array([prediction.values[column] for _, prediction in pairs])
    covered = float(np.mean(~np.isnan(predicted))) if len(predicted) else 0.0
    measured = np.array([row.point.measured[column] if row.point else np.nan for row, _ in pairs])
    known = ~np.isnan(predicted) & ~np.isnan(measured)
    if not known.any():
        return Score(0, covered, *[float("nan")] * 5)
    error = predicted[known] / measured[known] - 1
    limits = np.array([bounds(metric, prediction) for _, prediction in pairs])[known]
    inside = (limits[:, 0] <= measured[known]) & (measured[known] <= limits[:, 1])
    size = np.abs(error) * 100
    spread = (size.mean(), np.median(size), np.quantile(size, 0.9), np.median(error) * 100, inside.mean() * 100)
    return Score(int(known.sum()), covered, *map(float, spread))


def _band(point: Point) -> str:
    return next((name for most, name in _BANDS if point.concurrency <= most), _LAST_BAND)


SLICES: dict[str, Callable[[Point, Prediction], str]] = {
    "kind": lambda point, prediction: {True: "MoE", False: "dense", None: "unknown"}[prediction.is_moe],
    "engine": lambda point, prediction: point.engine,
    "gpu": lambda point, prediction: point.gpu,
    "layout": lambda point, prediction: prediction.family or "unknown",
    "concurrency": lambda point, prediction: _band(point),
    "model": lambda point, prediction: point.model,
}
"""What points are grouped by, and the group of a point."""


def slices(validation: Validation) -> list[tuple[str, str, dict[str, Score], int]]:
    """Slice, its value, scores by metric and number of rows; rows that state no point are in no slice."""
    found = []
    for name, group_of in SLICES.items():
        groups: dict[str, list[Pair]] = {}
        for row, prediction in validation.pairs:
            if row.point is not None:
                groups.setdefault(group_of(row.point, prediction), []).append((row, prediction))
        for value in sorted(groups, key=_in_order):
            pairs = groups[value]
            found.append((name, value, {metric: score(pairs, metric) for metric in METRICS}, len(pairs)))
    return found


def _in_order(value: str) -> tuple[int, str]:
    bands = [*(name for _, name in _BANDS), _LAST_BAND]
    return (bands.index(value) if value in bands else 0, value)


def worst(validation: Validation, metric: str, num: int) -> list[tuple[Row, Prediction, float]]:
    """The `num` points whose `metric` is furthest off by ratio, with predicted / measured."""
    column = METRICS.index(metric)
    ratios = [
        (row, prediction, prediction.values[column] / row.point.measured[column])
        for row, prediction in validation.pairs
        if row.point is not None
    ]
    known = [item for item in ratios if item[2] == item[2]]
    return sorted(known, key=lambda item: -abs(np.log(item[2])))[:num]
