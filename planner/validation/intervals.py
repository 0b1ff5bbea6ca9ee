"""How far a prediction may be off: 80 % intervals from what was left over on measured points.

`intervals.toml` holds quantiles of measured / predicted by metric and class. A class is what the prediction rests on
(`basis_of`), whether the model has experts, and the engine; where an engine was not measured, its parent answers.
Written by `python benchmarks/accuracy.py POINTS.csv --write-intervals` with `planner.validation.residuals`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from math import log

from planner.errors import InputError, nearest
from planner.validation.points import METRICS
from planner.validation.replay import Prediction

BASES = ("measured", "extrapolated", "roofline")
"""What most of the predicted time rests on: kernels measured on this GPU with this engine, those of another engine or
shape, or rooflines alone."""

ANY = "any"
NOMINAL = 0.8
"""Share of the measurements that an interval shall hold."""

METRIC_NAMES = tuple(metric.removesuffix("_mean_ms") for metric in METRICS)
"""`ttft`, `tpot` and `output_tok_s_per_gpu`: intervals are ratios, so the unit of a value does not matter."""

Key = tuple[str, str, str, str]
"""Metric, basis, `moe` or `dense`, engine; the last two may be ANY."""


Z_80 = 1.2815515655446004
"""Standard normal quantile of 0.9: 80 % lie within this many standard deviations."""


@dataclass(frozen=True, slots=True)
class Ratios:
    """Bounds of measured / predicted in one class, and the points and combinations behind them."""

    low: float
    high: float
    num_points: int
    num_combinations: int

    @property
    def log_middle(self) -> float:
        """Mean of the log ratio when the bounds are read as those of a log-normal error."""
        return (log(self.high) + log(self.low)) / 2

    @property
    def log_spread(self) -> float:
        """Standard deviation of the log ratio, read likewise."""
        return (log(self.high) - log(self.low)) / (2 * Z_80)


@dataclass(frozen=True, slots=True)
class IntervalTable:
    """Ratios by class, where they come from, and the share of left-out measurements they held, by metric."""

    source: str
    as_of: str
    command: str
    held_out: Mapping[str, float]
    classes: Mapping[Key, Ratios]

    def ratios(self, metric: str, basis: str, is_moe: bool, engine: str) -> Ratios:
        """The class, or its nearest parent; InputError on an unknown metric."""
        if metric not in METRIC_NAMES:
            raise InputError(f"no interval for metric {metric!r}: {nearest(metric, METRIC_NAMES)}")
        experts = "moe" if is_moe else "dense"
        for key in ((metric, basis, experts, engine), (metric, basis, experts, ANY), (metric, basis, ANY, ANY)):
            if key in self.classes:
                return self.classes[key]
        # A basis that no point had is less certain than any that had some.
        return max(
            (self.classes[metric, b, ANY, ANY] for b in BASES if (metric, b, ANY, ANY) in self.classes), key=_width
        )


def _width(ratios: Ratios) -> float:
    return ratios.high / ratios.low


def basis_of(origin_share: Mapping[str, float]) -> str:
    """Which of BASES holds at least half of the time; `extrapolated` when neither of the others does."""
    if origin_share.get("measured", 0.0) + origin_share.get("interpolated", 0.0) >= 0.5:
        return "measured"
    return "roofline" if not origin_share or origin_share.get("roofline", 0.0) >= 0.5 else "extrapolated"


def interval(
    metric: str, value: float, origin_share: Mapping[str, float], is_moe: bool, engine: str
) -> tuple[float, float]:
    """80 % interval of what would be measured where `value` was predicted, in its unit.

    `metric` is one of METRIC_NAMES, `origin_share` the share of the predicted time by origin, `engine` the name of a
    profile. Where predictions were biased the interval lies to one side of `value`. InputError on an unknown metric.
    """
    found = interval_table().ratios(metric, basis_of(origin_share), is_moe, engine)
    return value * found.low, value * found.high


def bounds(metric: str, prediction: Prediction) -> tuple[float, float]:
    """80 % interval of the column `metric` of METRICS of a prediction; NaN where it has no value."""
    value = prediction.values[METRICS.index(metric)]
    name = metric.removesuffix("_mean_ms")
    return interval(name, value, prediction.origin_share, bool(prediction.is_moe), prediction.engine)


@lru_cache(maxsize=1)
def interval_table() -> IntervalTable:
    """The fitted table of this version."""
    text = resources.files("planner.validation").joinpath("intervals.toml").read_text("utf-8")
    return read_table(text)


def read_table(text: str) -> IntervalTable:
    """Table from its TOML."""
    facts = tomllib.loads(text)
    classes = {(row[0], row[1], row[2], row[3]): Ratios(*row[4:]) for row in facts["classes"]}
    return IntervalTable(facts["source"], facts["as_of"], facts["command"], facts["held_out"], classes)


def write_table(table: IntervalTable) -> str:
    """TOML of a table; `read_table` gives it back."""
    lines = [
        "# Quantiles of measured / predicted by class; planner/validation/intervals.py says how they are used.",
        *(f'{name} = "{getattr(table, name)}"' for name in ("source", "as_of", "command")),
        "",
        "# metric, basis, experts, engine, low, high, points, combinations of model, GPU and engine",
        "classes = [",
        *(
            "    ["
            + ", ".join([*(f'"{part}"' for part in key), f"{r.low:.4f}", f"{r.high:.4f}"])
            + f", {r.num_points}, {r.num_combinations}],"
            for key, r in table.classes.items()
        ),
        "]",
        "",
        "# Share of the points that the interval held when their combination was left out of the fit.",
        "[held_out]",
        *(f"{metric} = {share:.3f}" for metric, share in table.held_out.items()),
    ]
    return "\n".join(lines) + "\n"
