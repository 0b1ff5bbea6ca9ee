"""Demand over the hours of a week and over months: utilisation is computed from it, never stated.

Reserved and owned fleets are sized for the busiest hour and idle in the others; GPUs rented by the hour follow the
demand in whole replicas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.economics.refusal import positive, refuse_unless, within
from planner.errors import nearest
from planner.units import HOUR_S

HOURS_PER_DAY = 24
HOURS_PER_MONTH = 730.0
_WORKDAYS, _WEEKEND_DAYS = 5, 2

_PEAK_HOUR = 21
_WAVE = tuple((1 + math.cos(2 * math.pi * (hour - _PEAK_HOUR) / HOURS_PER_DAY)) / 2 for hour in range(HOURS_PER_DAY))
"""One raised cosine: 1 at the peak hour, 0 twelve hours away, 0.5 in the mean."""
_STEEPEST = 256.0
_MAX_LOAD = 1e15


def _smooth_day(mean: float) -> tuple[float, ...]:
    """A day with one smooth peak of 1 and that mean: a raised cosine on a floor, or a power of it below 0.5.

    >>> round(math.fsum(_smooth_day(0.8)) / 24, 6), round(math.fsum(_smooth_day(0.3)) / 24, 6)
    (0.8, 0.3)
    """
    floor = 2 * mean - 1
    if floor >= 0:
        return tuple(floor + (1 - floor) * load for load in _WAVE)
    low, high = 1.0, _STEEPEST
    for _ in range(60):
        power = (low + high) / 2
        low, high = (power, high) if math.fsum(load**power for load in _WAVE) / HOURS_PER_DAY > mean else (low, power)
    return tuple(load**low for load in _WAVE)


_OFFICE = (
    *(0.05, 0.05, 0.05, 0.05, 0.05, 0.10, 0.20, 0.45, 0.80, 0.95, 1.00, 0.95),
    *(0.75, 0.90, 1.00, 0.95, 0.85, 0.60, 0.35, 0.20, 0.15, 0.10, 0.08, 0.06),
)
_DEEPSEEK_MEAN = 226.75 / 278

SHAPES: dict[str, tuple[tuple[float, ...], str]] = {
    "flat": ((1.0,) * HOURS_PER_DAY, "assumed: the same load in every hour"),
    "office": (_OFFICE, "assumed: one time zone, busy from 8 to 17 h, a twentieth of that at night"),
    "consumer": (
        _smooth_day(_DEEPSEEK_MEAN),
        "assumed: a sinusoid with its peak at 21 h; mean over peak 0.816 is DeepSeek's mean of 226.75 nodes over its "
        "peak of 278 (open-infra-index day 6, 2025-03)",
    ),
}
"""Named shapes: load of each hour of a day relative to the busiest, and where that comes from."""


@dataclass(frozen=True, slots=True)
class DemandProfile:
    """Load over a week relative to its busiest hour, and its growth: the table `[demand]` of a terms file."""

    shape: str | tuple[float, ...] = "flat"
    """A name of `SHAPES`, or 24 numbers in any unit, one per hour."""
    peak_to_mean: float | None = None
    """Busiest hour of a day over its mean hour, instead of a shape: a smooth day with one peak."""
    weekend_factor: float = 1.0
    """Load on Saturday and Sunday over that of a workday."""
    growth_per_year: float = 0.0
    """0.5 is half as much again after twelve months."""
    source: str = ""
    """Where own numbers come from."""

    def __post_init__(self) -> None:
        if isinstance(self.shape, str):
            refuse_unless(self.shape in SHAPES, f"shape {self.shape!r} is unknown: {nearest(self.shape, SHAPES)}")
        else:
            count = len(self.shape)
            refuse_unless(count == HOURS_PER_DAY, f"shape has {count} numbers: write 24, one per hour of the day")
            refuse_unless(
                all(0 <= load <= _MAX_LOAD for load in self.shape) and max(self.shape) > 0,
                f"shape: loads lie in 0 to {_MAX_LOAD:g}, and one of them is above 0",
            )
        if self.peak_to_mean is not None:
            within("peak_to_mean", self.peak_to_mean, 1.0, 8.0)
            refuse_unless(self.shape == "flat", "peak_to_mean and shape both describe the day: state one of them")
        within("weekend_factor", self.weekend_factor, 0.0, 10.0)
        within("growth_per_year", self.growth_per_year, -0.95, 100.0)

    @property
    def name(self) -> str:
        """The shape as people call it."""
        if self.peak_to_mean is not None:
            return f"one smooth peak at {self.peak_to_mean:g} x the mean"
        return self.shape if isinstance(self.shape, str) else "own shape"

    @property
    def origin(self) -> str:
        """Where the shape comes from, or that it is assumed."""
        is_named = isinstance(self.shape, str) and self.peak_to_mean is None
        return self.source or (SHAPES[str(self.shape)][1] if is_named else "stated by the user")

    @property
    def hourly(self) -> tuple[float, ...]:
        """Load of each hour of a week, workdays first, relative to the busiest hour, `[168]`."""
        day = SHAPES[self.shape][0] if isinstance(self.shape, str) else self.shape
        if self.peak_to_mean is not None:
            day = _smooth_day(1 / self.peak_to_mean)
        week = [*day] * _WORKDAYS + [load * self.weekend_factor for load in day] * _WEEKEND_DAYS
        busiest = max(week)
        return tuple(load / busiest for load in week)

    @property
    def mean_over_peak(self) -> float:
        """Mean load over the load of the busiest hour: the busy share of a fleet that the peak fills."""
        return math.fsum(self.hourly) / len(self.hourly)

    def fleet(self, num_gpus: int, step_gpus: int = 1) -> tuple[int, ...]:
        """GPUs that each hour of a week needs where the busiest needs `num_gpus`, in whole replicas, `[168]`.

        At least one replica stays up, since starting one takes minutes.
        """
        steps = num_gpus / step_gpus
        return tuple(min(num_gpus, step_gpus * max(1, math.ceil(steps * load - 1e-9))) for load in self.hourly)

    def fleet_share(self, num_gpus: int, step_gpus: int = 1) -> float:
        """Mean of `fleet` over its peak."""
        needed = self.fleet(num_gpus, step_gpus)
        return math.fsum(needed) / (len(needed) * num_gpus)

    def utilisation(self, peak_per_s: float, capacity_per_s: float) -> float:
        """Busy share of a fleet that could carry `capacity_per_s` and is asked for `peak_per_s` in the busiest hour.

        >>> round(DemandProfile("consumer").utilisation(20.0, 25.0), 4)
        0.6525
        """
        positive("capacity", capacity_per_s)
        within("peak demand", peak_per_s, 0.0, capacity_per_s)
        return self.mean_over_peak * peak_per_s / capacity_per_s

    def per_month(self, peak_per_s: float) -> float:
        """What comes in a month (730 h) when `peak_per_s` come in the busiest hour: requests, or tokens."""
        return peak_per_s * self.mean_over_peak * HOURS_PER_MONTH * HOUR_S

    def growth(self, months: float) -> float:
        """Demand after `months` over demand now: (1 + growth per year)^(months / 12).

        >>> round(20.0 * DemandProfile(growth_per_year=0.5).growth(24), 6)
        45.0
        """
        return float((1 + self.growth_per_year) ** (months / 12))


FLAT = DemandProfile()
"""The same load in every hour."""
