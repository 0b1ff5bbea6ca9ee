"""When requests arrive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.errors import WorkloadError

ArrivalKind = Literal["poisson", "gamma", "closed", "trace"]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Arrival process; build one with the constructors below, which check their arguments.

    `rate_per_s` is the mean number of requests per second (0 for a closed loop, whose rate is an outcome, and
    infinite for a trace whose rows all arrive at once), `cv` the coefficient of variation of the gaps between
    arrivals, `concurrency` the number of users of a closed loop, `times_s` the recorded times of a trace.
    """

    kind: ArrivalKind
    rate_per_s: float = 0.0
    cv: float = 1.0
    concurrency: int = 0
    times_s: tuple[float, ...] = ()

    @classmethod
    def poisson(cls, rate_per_s: float) -> Arrivals:
        """Independent users: exponential gaps with mean 1 / `rate_per_s`."""
        _check_rate(rate_per_s)
        return cls("poisson", rate_per_s)

    @classmethod
    def gamma(cls, rate_per_s: float, cv: float) -> Arrivals:
        """Gamma gaps with coefficient of variation `cv`: 1 is Poisson, above 1 bursty, below 1 smoother.

        The shape is 1 / cv^2, the quantity vLLM's benchmark client calls burstiness.
        """
        _check_rate(rate_per_s)
        if not 1e-6 <= cv <= 100:
            raise WorkloadError(f"gamma arrivals: cv {cv:g} must lie in (0, 100]. Use 1 for Poisson, 2 for bursts.")
        return cls("gamma", rate_per_s, cv=cv)

    @classmethod
    def closed(cls, concurrency: int) -> Arrivals:
        """Closed loop: `concurrency` users start together and each sends its next request on the last answer."""
        if concurrency < 1:
            raise WorkloadError(f"concurrency {concurrency}: a closed loop needs at least 1 user.")
        return cls("closed", concurrency=concurrency)

    @classmethod
    def trace(cls, times_s: Sequence[float]) -> Arrivals:
        """Recorded, ascending times [s], shifted so that the first request arrives at 0."""
        if not times_s:
            raise WorkloadError("trace arrivals: no times. Give at least one arrival.")
        first = times_s[0]
        for row, (before, after) in enumerate(pairwise(times_s), start=2):
            if not after >= before:
                raise WorkloadError(f"trace arrivals: time {row} ({after:g} s) precedes {before:g} s. Sort the times.")
        span_s = times_s[-1] - first
        if not math.isfinite(span_s):
            raise WorkloadError("trace arrivals: every time must be a finite number of seconds.")
        rate = (len(times_s) - 1) / span_s if span_s > 0 else math.inf
        return cls("trace", rate, times_s=tuple(t - first for t in times_s))

    def with_rate(self, rate_per_s: float) -> Arrivals:
        """The same process at another mean rate; a trace is stretched and keeps its bursts, a closed loop opens."""
        _check_rate(rate_per_s)
        if self.kind == "gamma":
            return Arrivals.gamma(rate_per_s, self.cv)
        if self.kind != "trace":
            return Arrivals.poisson(rate_per_s)
        if not math.isfinite(self.rate_per_s):
            raise WorkloadError("a rate cannot be set: all requests of the trace arrive at once. Use a concurrency.")
        stretch = self.rate_per_s / rate_per_s
        return Arrivals("trace", rate_per_s, times_s=tuple(t * stretch for t in self.times_s))

    def times(self, rng: np.random.Generator, num_requests: int) -> NDArray[np.float64]:
        """Arrival times [s], ascending, `[num_requests]`; zeros for a closed loop, whose times the simulation makes.

        One seed gives one sequence of unit gaps, so another rate only stretches time. A trace shorter than asked is
        repeated, with its mean gap between the copies.
        """
        if self.kind == "closed":
            return np.zeros(num_requests)
        if self.kind == "trace":
            return self._repeated(num_requests)
        shape = 1.0 / self.cv**2
        gaps = rng.gamma(shape, 1.0 / shape, num_requests)
        return np.asarray(np.cumsum(gaps) / self.rate_per_s, dtype=np.float64)

    def _repeated(self, num_requests: int) -> NDArray[np.float64]:
        recorded = np.asarray(self.times_s)
        period_s = recorded[-1] + (1 / self.rate_per_s if self.rate_per_s else 0.0)
        copy, row = np.divmod(np.arange(num_requests), len(recorded))
        return np.asarray(recorded[row] + copy * period_s, dtype=np.float64)

    def __str__(self) -> str:
        if self.kind == "closed":
            return f"closed loop of {self.concurrency:,} users"
        burstiness = f", cv {self.cv:g}" if self.kind == "gamma" else ""
        return f"{self.rate_per_s:g} requests/s ({self.kind}{burstiness})"


def _check_rate(rate_per_s: float) -> None:
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise WorkloadError(f"rate {rate_per_s:g} requests/s: a rate is a positive number. Use for example 2.5.")
