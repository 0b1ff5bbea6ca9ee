"""What one replica of a large fleet does at each load, from the simulation of a few."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.deployment import Deployment, Run, run, with_replicas
from planner.errors import DoesNotFit, InputError
from planner.reliability import load_of
from planner.workload import Objective, Slo, Workload

Floats = NDArray[np.float64]
METRICS = ("ttft", "tpot", "e2e")
CELL_REPLICAS = 4
"""Replicas simulated together. A router that knows the load of all evens it out: one alone sees more waiting than one
of many, four are as good as sixteen (docs/scale.md)."""

_SHARES = (0.05, 0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.86, 0.91, 0.95)
"""Loads that are simulated, as shares of the capacity; between them distributions are interpolated."""
_FULL = 1.4
"""Multiple of the closed-form capacity at which the real one is read off: more than that never comes out."""
_FILL, _MEASURED = 4, 12
"""Mean times in the system that a run takes to fill, and that are measured. Requests in flight are the long ones: with
log-normal lengths they fill the system several times more slowly than the mean request passes it."""
_SLOWER = 1.25
"""How much longer requests may take at the next load; decides only how many are simulated."""
_SHORT = 0.7
"""A run with a smaller share of the requests that turn out to be needed is done again."""
_FEWEST_PER_REPLICA, _MOST = 400, 60_000
_REFINEMENTS, _CLOSE = 3, 0.1
"""Further loads about the highest that keeps the SLO, until its neighbours are this close."""
QUANTILES = (np.arange(400) + 0.5) / 400


@dataclass(frozen=True, slots=True, eq=False)
class Behaviour:
    """One replica at ascending `loads_per_s` [requests/s] `[loads]`.

    `quantiles_s` are the TTFT, TPOT and end-to-end latencies at `QUANTILES`, `[loads, metrics, 400]` [s], `means_s`
    `[loads, metrics]`. `capacity_per_s` is what a full replica answers. `reference` is the run at the highest load,
    `num_requests` how many were simulated.
    """

    slo: Slo
    loads_per_s: Floats
    quantiles_s: Floats
    means_s: Floats
    capacity_per_s: float
    reference: Run
    num_requests: int

    @property
    def top_per_s(self) -> float:
        """The highest load at which no queue grows."""
        return float(self.loads_per_s[-1])

    def at(self, load_per_s: float) -> Floats:
        """Quantiles `[metrics, 400]` at a load [s]; those of the nearest simulated one outside."""
        below, weight = self._place(load_per_s)
        return np.asarray((1 - weight) * self.quantiles_s[below] + weight * self.quantiles_s[below + 1])

    def attained(self, quantiles_s: Floats) -> float:
        """Share of the requests with these latencies `[metrics, 400]` that keep every limit.

        Who misses two limits is counted twice, so the true share is this or higher.
        """
        missed = 0.0
        for metric, limit_s in self.slo.limits_s().items():
            values = quantiles_s[METRICS.index(metric)]
            missed += 1.0 - float(np.interp(limit_s, values, QUANTILES, left=0.0, right=1.0))
        return max(0.0, 1.0 - missed)

    def mean_s(self, metric: str, load_per_s: float) -> float:
        """Mean latency at a load [s]."""
        below, weight = self._place(load_per_s)
        column = self.means_s[:, METRICS.index(metric)]
        return float((1 - weight) * column[below] + weight * column[below + 1])

    def _place(self, load_per_s: float) -> tuple[int, float]:
        loads = self.loads_per_s
        inside = min(max(load_per_s, float(loads[0])), float(loads[-1]))
        below = min(int(np.searchsorted(loads, inside, side="right")) - 1, len(loads) - 2)
        return below, float((inside - loads[below]) / (loads[below + 1] - loads[below]))

    def waiting(self, wait_s: float) -> Floats:
        """Quantiles `[metrics, 400]` at the top load of requests that wait `wait_s` more before they begin [s]."""
        moved = self.at(self.top_per_s)
        moved[METRICS.index("ttft")] += wait_s
        moved[METRICS.index("e2e")] += wait_s
        return moved

    def most_per_s(self, ratios: Mapping[str, float] | None = None, throughput: float = 1.0) -> float:
        """The highest load at which every objective holds; 0 when one never does.

        `ratios` multiply latencies by metric and `throughput` the highest load: what a real server may take and carry
        where this was predicted.
        """
        most = self.top_per_s * throughput
        for objective in self.slo.objectives:
            values = self.statistic(objective) * (ratios or {}).get(objective.metric, 1.0)
            over = np.flatnonzero(values > objective.limit_s)
            if not len(over):
                continue
            first = int(over[0])
            if first == 0:
                return 0.0
            share = (objective.limit_s - values[first - 1]) / (values[first] - values[first - 1])
            loads = self.loads_per_s
            most = min(most, float(loads[first - 1] + share * (loads[first] - loads[first - 1])))
        return most

    def statistic(self, objective: Objective) -> Floats:
        """The statistic that `objective` limits, at each load [s]."""
        row = METRICS.index(objective.metric)
        if objective.statistic == "mean":
            return self.means_s[:, row]
        rank = float(objective.statistic.removeprefix("p")) / 100
        return np.asarray([np.interp(rank, QUANTILES, values) for values in self.quantiles_s[:, row]])


def measure(
    deployment: Deployment,
    workload: Workload,
    slo: Slo,
    *,
    seed: int = 0,
    cell: int = CELL_REPLICAS,
    progress: Callable[[float], None] | None = None,
) -> Behaviour:
    """Behaviour of the replicas of `deployment` under requests of `workload`, judged by `slo`.

    `cell` replicas are simulated behind the router of the deployment. Raises InputError for a closed loop and for
    conversations, whose load is not a rate, and for a router whose effect depends on the size of the fleet; DoesNotFit
    where requests are larger than the KV pool.
    """
    _check(deployment, workload)
    cell = min(cell, deployment.cluster.num_gpus // deployment.layout.replica_gpus)
    group = replace(deployment, layout=with_replicas(deployment.layout, cell))
    trial = _Trial(group, workload, slo, seed, cell)
    capacity = trial.capacity_per_s()
    for number, share in enumerate(_SHARES):
        if trial.measure(share * capacity) and len(trial.points) > 2:
            trial.points.pop()
            break
        if progress:
            progress((number + 1) / (len(_SHARES) + 1))
    found = trial.behaviour(capacity)
    for _ in range(_REFINEMENTS):
        load = _gap(found)
        if load is None:
            break
        trial.measure(load)
        found = trial.behaviour(capacity)
    return found


def _gap(found: Behaviour) -> float | None:
    """A load between the neighbours of the highest that keeps the promise, None where these are close enough."""
    most, loads = found.most_per_s(), found.loads_per_s
    above = int(np.searchsorted(loads, most))
    if not most or above >= len(loads) or loads[above - 1] > (1 - _CLOSE) * loads[above]:
        return None
    low, high = float(loads[above - 1]), float(loads[above])
    # Not too near an end, where a point would tell nothing new.
    return min(max(most, low + 0.25 * (high - low)), high - 0.25 * (high - low))


def _check(deployment: Deployment, workload: Workload) -> None:
    if workload.arrivals.concurrency or workload.turns is not None:
        raise InputError(f"{workload.name}: a fleet needs a rate of independent requests. Use another workload.")
    if deployment.router == "prefix_affinity":
        raise InputError("--router prefix_affinity: its hits depend on how many replicas there are. Use another one.")


@dataclass(frozen=True, slots=True, eq=False)
class _Point:
    """One simulated load: its run, quantiles `[metrics, 400]` and means `[metrics]` [s]."""

    load_per_s: float
    run: Run
    quantiles_s: Floats
    means_s: Floats


class _Trial:
    """Runs of the cell at different loads; `points` in the order they were measured."""

    def __init__(self, group: Deployment, workload: Workload, slo: Slo, seed: int, cell: int) -> None:
        self._group, self._workload, self._slo, self._seed, self._cell = group, workload, slo, seed, cell
        self._sojourn_s = 0.0
        self.num_requests = 0
        self.points: list[_Point] = []

    def behaviour(self, capacity_per_s: float) -> Behaviour:
        """What the points say."""
        points = sorted(self.points, key=lambda point: point.load_per_s)
        return Behaviour(
            self._slo,
            np.array([point.load_per_s for point in points]),
            np.array([point.quantiles_s for point in points]),
            np.array([point.means_s for point in points]),
            max(capacity_per_s, points[-1].load_per_s),
            points[-1].run,
            self.num_requests,
        )

    def measure(self, load_per_s: float) -> bool:
        """Add the point of a cell at `load_per_s` per replica; True when its queue grows."""
        result = self._run(load_per_s * self._cell, self._cell, self._enough(load_per_s))
        self._sojourn_s = float(np.nanmean(result.simulation.requests.e2e_s))
        if len(result.simulation.requests) < _SHORT * min(self._enough(load_per_s), _MOST):
            result = self._run(load_per_s * self._cell, self._cell, self._enough(load_per_s))
        requests = result.simulation.requests
        filled_s = requests.arrival_s[0] + _FILL * self._sojourn_s
        first = min(int(np.searchsorted(requests.arrival_s, filled_s)), len(requests) // 2)
        last = int(np.searchsorted(requests.arrival_s, requests.arrival_s[-1] - self._sojourn_s))
        measured = slice(first, max(last, 3 * len(requests) // 4))
        self.points.append(_Point(load_per_s, result, *_latencies(result, measured)))
        return result.simulation.summary(warmup=first / len(requests)).saturation == "overloaded"

    def _enough(self, load_per_s: float) -> int:
        """Requests of a run, after the time that requests took at the last load."""
        return self._cell * _enough(load_per_s * self._sojourn_s * _SLOWER)

    def _run(self, rate_per_s: float, replicas: int, count: int) -> Run:
        asked = self._workload.with_rate(rate_per_s).with_num_requests(min(count, _MOST))
        group = replace(self._group, layout=with_replicas(self._group.layout, replicas))
        result = run(group, asked, self._slo, seed=self._seed, max_replicas=replicas)
        if result.summary.num_rejected:
            raise DoesNotFit(
                f"{result.simulation.rejection_reason}", ["more GPUs per replica", "a shorter --workload", "--kv fp8"]
            )
        self.num_requests += asked.num_requests
        return result

    def capacity_per_s(self) -> float:
        """Requests per second of a replica that always has more to do: the middle half of a run that is too much."""
        guess = load_of(self._group, self._workload)
        most_per_s = _FULL * guess.capacity_per_s
        finish_s = np.sort(self._run(most_per_s, 1, _enough(guess.sequences)).simulation.requests.finish_s)
        first, last = len(finish_s) // 4, 3 * len(finish_s) // 4
        return float(min((last - first) / (finish_s[last] - finish_s[first]), most_per_s))


def _enough(flying: float) -> int:
    """Requests per replica of which `flying` are in flight at once."""
    return max(_FEWEST_PER_REPLICA, math.ceil((_FILL + _MEASURED + 1) * flying))


def _latencies(result: Run, measured: slice) -> tuple[Floats, Floats]:
    """Quantiles `[metrics, 400]` and means `[metrics]` of the measured requests [s]; 0 for a latency that none has."""
    requests = result.simulation.requests
    quantiles, means = np.zeros((len(METRICS), len(QUANTILES))), np.zeros(len(METRICS))
    for row, metric in enumerate(METRICS):
        values = getattr(requests, f"{metric}_s")[measured]
        values = values[np.isfinite(values)]
        if len(values):
            quantiles[row], means[row] = np.quantile(values, QUANTILES), values.mean()
    return quantiles, means
