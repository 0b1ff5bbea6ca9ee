"""Service-level objectives: what the users are promised."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from planner.errors import WorkloadError, nearest
from planner.units import MS, US, format_seconds

SLO_METRICS = ("ttft", "tpot", "e2e")
"""Time to first token, time per output token after the first, end to end; all per request [s]."""

SLO_STATISTICS = ("mean", "p50", "p90", "p95", "p99")

_UNIT_S = {"s": 1.0, "ms": MS, "us": US}
_LIMIT = re.compile(r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(?P<unit>[a-z]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Objective:
    """One promise: `statistic` of `metric` over all requests is at most `limit_s` [s]."""

    metric: str
    statistic: str
    limit_s: float

    @property
    def name(self) -> str:
        """The metric and its statistic, as written: `ttft_p95`."""
        return f"{self.metric}_{self.statistic}"

    def __str__(self) -> str:
        return f"{self.name} <= {format_seconds(self.limit_s)}"


@dataclass(frozen=True, slots=True)
class Slo:
    """All promises; a deployment meets the SLO when it keeps every one."""

    objectives: tuple[Objective, ...]

    def limits_s(self) -> dict[str, float]:
        """The tightest limit per metric [s]: what one request must keep to count as goodput."""
        limits: dict[str, float] = {}
        for objective in self.objectives:
            limits[objective.metric] = min(objective.limit_s, limits.get(objective.metric, math.inf))
        return limits

    def __str__(self) -> str:
        return ", ".join(str(o) for o in self.objectives)


def parse_slo(text: str) -> Slo:
    """Slo from `ttft_p95=2s,tpot_p95=50ms`: metric, statistic, and a limit with its unit (s, ms or us).

    Raises WorkloadError on an unknown metric or statistic, a limit without unit or not positive, and a promise
    made twice.
    """
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise WorkloadError(f"SLO {text!r} is empty. Write for example ttft_p95=2s,tpot_p95=50ms.")
    objectives = tuple(_objective(item) for item in items)
    names = [o.name for o in objectives]
    for name in names:
        if names.count(name) > 1:
            raise WorkloadError(f"SLO {text!r}: {name} is given twice. Keep one limit.")
    return Slo(objectives)


def _objective(item: str) -> Objective:
    name, equals, limit = (part.strip() for part in item.partition("="))
    metric, _, statistic = name.partition("_")
    if not equals:
        raise WorkloadError(f"SLO {item!r}: no limit. Write for example {item}=2s.")
    if metric not in SLO_METRICS:
        raise WorkloadError(f"SLO {item!r}: unknown metric {metric!r} ({nearest(metric, SLO_METRICS)})")
    if statistic not in SLO_STATISTICS:
        shown = f"unknown statistic {statistic!r}" if statistic else "no statistic"
        raise WorkloadError(f"SLO {item!r}: {shown}. Write {metric}_p95; known: {', '.join(SLO_STATISTICS)}.")
    return Objective(metric, statistic, _seconds(item, limit))


def _seconds(item: str, limit: str) -> float:
    match = _LIMIT.fullmatch(limit)
    if match is None:
        raise WorkloadError(f"SLO {item!r}: {limit!r} is not a time. Write for example 50ms.")
    unit = match["unit"].lower()
    if unit not in _UNIT_S:
        problem = f"unknown unit {unit!r}" if unit else "no unit"
        raise WorkloadError(f"SLO {item!r}: {problem}. Write {match['number']}ms or {match['number']}s.")
    value_s = float(match["number"]) * _UNIT_S[unit]
    if not (math.isfinite(value_s) and value_s > 0):
        raise WorkloadError(f"SLO {item!r}: a limit is a positive time, not {limit}.")
    return value_s
