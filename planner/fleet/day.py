"""A fleet through its days, step by step, summed by hour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from planner.economics.demand import HOURS_PER_DAY
from planner.fleet.behaviour import METRICS, QUANTILES, Behaviour, Floats
from planner.fleet.scaling import Autoscaler, Policy
from planner.units import HOUR_S

_LEVELS, _WAITS = 400, 120
"""Loads, and waits of an overloaded fleet, that are told apart in the sums of an hour."""
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.01, 1e5
_NEGLIGIBLE = 1e-9
_WARM_UP_HOURS = 2


@dataclass(frozen=True, slots=True)
class Outage:
    """Failures of replicas: each fails every `mttf_s` on average and is away `mttr_s`, `detect_s` of that unnoticed.

    `blind` says that the router sends requests to a dead replica until the failure is noticed; one that counts
    requests in flight soon stops, because none leaves.
    """

    mttf_s: float
    mttr_s: float
    detect_s: float
    blind: bool

    @property
    def share_down(self) -> float:
        """Share of the time that a replica is away."""
        return self.mttr_s / (self.mttf_s + self.mttr_s)


@dataclass(frozen=True, slots=True)
class Day:
    """Load by hour relative to the busiest, one day or more, and requests per second in the busiest hour."""

    hourly: tuple[float, ...]
    peak_per_s: float
    hour_s: float = HOUR_S
    """Length of an hour of the profile [s]; a validation squeezes the day."""

    def rate_per_s(self, time_s: float) -> float:
        """Requests per second, straight lines between the middles of the hours; the days repeat."""
        place = time_s / self.hour_s - 0.5
        below = math.floor(place)
        first, second = (self.hourly[i % len(self.hourly)] for i in (below, below + 1))
        return self.peak_per_s * (first + (place - below) * (second - first))

    def steepest(self, lead_s: float, step_s: float, least_per_s: float) -> float:
        """The largest growth of the load within `lead_s`, as a factor of 1 or more.

        A load below `least_per_s` counts as that much: one replica is always there.
        """
        times = np.arange(0.0, len(self.hourly) * self.hour_s, step_s)
        return max(1.0, *(self.rate_per_s(t + lead_s) / max(self.rate_per_s(t), least_per_s) for t in times))


@dataclass(frozen=True, slots=True)
class Hour:
    """One hour of the day, mean over the days: load, replicas, what users saw and what failed.

    `replicas` are those that are paid for; `load_share` is the load of one that works over its capacity. Latencies
    are of all requests [s], `attained` the share of them that keep every limit; `hit` requests were on a replica that
    failed, `failures` how many did.
    """

    hour: int
    rate_per_s: float
    replicas: float
    most_replicas: int
    fewest_replicas: int
    load_share: float
    attained: float
    means_s: tuple[float, ...]
    quantiles_s: tuple[tuple[float, ...], ...]
    requests: float
    hit: float
    failures: float
    replica_hours: float
    down_hours: float

    def percentile_s(self, metric: str, rank: float) -> float:
        """Percentile `rank` in (0, 1) of a latency [s]."""
        return float(np.interp(rank, QUANTILES, self.quantiles_s[METRICS.index(metric)]))


def live(
    behaviour: Behaviour,
    day: Day,
    policy: Policy,
    *,
    fixed: int | None = None,
    outage: Outage | None = None,
    num_days: int = 1,
    step_s: float = 60.0,
    watch: Callable[[float, int], None] | None = None,
) -> tuple[Hour, ...]:
    """The 24 hours of a fleet that follows `policy`, or of `fixed` replicas, mean over `num_days`.

    In every step the load spreads evenly over the replicas that work. How many are away is Poisson: independent
    failures, each repaired in its own time (M/G/infinity). A load above capacity becomes a backlog that later steps
    work off, and requests wait for what is before them. `watch` is called with the time and the replicas that serve.
    """
    sums = _Sums(behaviour)
    begin = -_WARM_UP_HOURS * day.hour_s
    scaler = Autoscaler(policy, step_s, day.rate_per_s(begin))
    backlog = 0.0
    first, steps = round(begin / step_s), round(num_days * HOURS_PER_DAY * day.hour_s / step_s)
    for number in range(first, steps):
        time_s = number * step_s
        rate = day.rate_per_s(time_s + step_s / 2)
        scaler.follow(rate)
        serving, held = (fixed, fixed) if fixed is not None else (scaler.serving, scaler.held)
        away = serving * outage.share_down if outage else 0.0
        capacity = max(serving - away, 1e-9) * behaviour.capacity_per_s
        backlog = max(0.0, backlog + (rate - capacity) * step_s)
        if number < 0:
            continue
        if watch:
            watch(time_s, serving)
        hour = int(time_s / day.hour_s + 1e-9) % HOURS_PER_DAY
        sums.add(hour, rate * step_s, serving, held, away, rate, backlog / capacity, outage, step_s)
    return sums.hours(num_days, step_s)


class _Sums:
    """What is kept of the past: by hour, the requests that came at each level of load or of waiting."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._loads = np.linspace(behaviour.loads_per_s[0], behaviour.top_per_s, _LEVELS)
        self._waits = np.geomspace(_SHORTEST_WAIT_S, _LONGEST_WAIT_S, _WAITS)
        rows = [behaviour.at(load) for load in self._loads] + [behaviour.waiting(wait) for wait in self._waits]
        self._quantiles = np.array(rows)
        self._attained = np.array([behaviour.attained(row) for row in rows])
        self._requests = np.zeros((HOURS_PER_DAY, len(rows)))
        self._plain = {
            name: np.zeros(HOURS_PER_DAY) for name in ("rate", "held", "load", "hit", "failures", "down", "steps")
        }
        self._most, self._fewest = [0] * HOURS_PER_DAY, [1 << 60] * HOURS_PER_DAY

    def add(
        self,
        hour: int,
        requests: float,
        serving: int,
        held: int,
        away: float,
        rate_per_s: float,
        wait_s: float,
        outage: Outage | None,
        step_s: float,
    ) -> None:
        """One step of `step_s` in which `serving` replicas, `away` of them down on average, had `rate_per_s`."""
        plain, each = self._plain, rate_per_s / max(serving - away, 1e-9)
        for down, chance in _poisson(away, serving):
            level = self._level(rate_per_s / (serving - down) if down < serving else math.inf, wait_s, outage)
            self._requests[hour, level] += chance * requests
        if outage is not None:
            failures = serving * (1 - outage.share_down) * step_s / outage.mttf_s
            hit = self._hit(rate_per_s, max(serving - away, 1e-9), outage)
            plain["failures"][hour] += failures
            plain["hit"][hour] += min(failures * hit, requests)
        plain["rate"][hour] += rate_per_s
        plain["held"][hour] += held
        plain["load"][hour] += each / self._behaviour.capacity_per_s
        plain["down"][hour] += away
        plain["steps"][hour] += 1
        self._most[hour], self._fewest[hour] = max(self._most[hour], held), min(self._fewest[hour], held)

    def _hit(self, rate_per_s: float, working: float, outage: Outage) -> float:
        """Requests on a replica that fails: those in flight (Little's law).

        A router that counts them keeps the dead replica as full as the others, which get its load. A blind one sends
        it its share until the failure is noticed.
        """
        each = rate_per_s / (working if outage.blind else max(working - 1, 1.0))
        each = min(each, self._behaviour.top_per_s)
        return each * (self._behaviour.mean_s("e2e", each) + (outage.detect_s if outage.blind else 0.0))

    def _level(self, load_per_s: float, wait_s: float, outage: Outage | None) -> int:
        """Row of a replica at `load_per_s` in a fleet whose backlog takes `wait_s`."""
        over = load_per_s / self._behaviour.capacity_per_s - 1.0
        if outage is not None and over > 0 and not wait_s:
            # A queue that grows only while others are away: on average half way through a repair.
            wait_s = min(over, 1.0) * outage.mttr_s / 2
        if wait_s > 0:
            return _LEVELS + min(int(np.searchsorted(self._waits, wait_s)), _WAITS - 1)
        place = (load_per_s - self._loads[0]) / (self._loads[-1] - self._loads[0])
        return int(min(max(place * (_LEVELS - 1) + 0.5, 0), _LEVELS - 1))

    def hours(self, num_days: int, step_s: float) -> tuple[Hour, ...]:
        """The hours so far."""
        return tuple(self._hour(hour, num_days, step_s) for hour in range(HOURS_PER_DAY))

    def _hour(self, hour: int, num_days: int, step_s: float) -> Hour:
        weights, plain = self._requests[hour], {name: float(sums[hour]) for name, sums in self._plain.items()}
        steps, total = plain["steps"], float(weights.sum())
        quantiles = _mixed(self._quantiles, weights)
        means = tuple(float(row.mean()) for row in quantiles)
        kept = float(weights @ self._attained) * (1 - plain["hit"] / total if total else 1.0)
        return Hour(
            hour,
            plain["rate"] / steps,
            plain["held"] / steps,
            self._most[hour],
            self._fewest[hour],
            plain["load"] / steps,
            kept / total if total else 1.0,
            means,
            tuple(tuple(row.tolist()) for row in quantiles),
            total / num_days,
            plain["hit"] / num_days,
            plain["failures"] / num_days,
            plain["held"] * step_s / HOUR_S / num_days,
            plain["down"] * step_s / HOUR_S / num_days,
        )


def _poisson(mean: float, most: int) -> Sequence[tuple[int, float]]:
    """(number, chance) of a Poisson number of at most `most`, without negligible chances."""
    if mean <= 0:
        return ((0, 1.0),)
    found, chance = [], math.exp(-mean)
    for number in range(most + 1):
        if chance > _NEGLIGIBLE:
            found.append((number, chance))
        elif number > mean:
            break
        chance *= mean / (number + 1)
    total = math.fsum(chance for _, chance in found)
    return [(number, chance / total) for number, chance in found]


def _mixed(quantiles: Floats, weights: Floats) -> Floats:
    """Quantiles `[metrics, 400]` of a mixture of rows `[rows, metrics, 400]` with `weights` `[rows]`."""
    used = np.flatnonzero(weights)
    if not len(used):
        return np.zeros(quantiles.shape[1:])
    shares = np.repeat(weights[used], quantiles.shape[2])
    mixed = []
    for metric in range(quantiles.shape[1]):
        values = quantiles[used, metric].ravel()
        order = np.argsort(values, kind="stable")
        reached = np.cumsum(shares[order])
        mixed.append(np.interp(QUANTILES, (reached - 0.5 * shares[order]) / reached[-1], values[order]))
    return np.array(mixed)
