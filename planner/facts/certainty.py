"""How sure an answer is: 80 % intervals of its latencies and the chance that each objective holds on a real server.

Intervals are those of measured over predicted on runs that calibrations had not seen (`planner.validation.intervals`);
means were measured, so percentiles are taken to be off by the same ratio. A chance reads the interval as that of a
log-normal error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import erf, inf, isfinite, log, sqrt
from typing import Any

from planner.calibration import Errors
from planner.deployment import UNSUSTAINED, Deployment, Run
from planner.units import format_chance, format_seconds
from planner.validation.intervals import BASES, Ratios, basis_of, interval_table

Facts = dict[str, Any]
_MEASURED_SERVERS = {"h100-sxm", "h200-sxm", "b200-sxm", "b300-sxm"}
_METRIC = {"ttft": "ttft", "tpot": "tpot", "itl": "tpot", "e2e": "tpot"}
"""Whose error a latency has; an answer is mostly waiting for tokens."""
_LABELS = {"tpot_mean_ms": "TPOT", "ttft_mean_ms": "TTFT"}


def is_unlike_measured(deployment: Deployment) -> bool:
    """No measured server had this kind of GPU, or one replica on several nodes, or an encoder."""
    layout, system = deployment.layout, deployment.cluster.system
    encoder = any(layer.stack == "encoder" for layer in deployment.model.layers)
    return system.name not in _MEASURED_SERVERS or layout.replica_gpus > system.gpus_per_node or encoder


def ratios_of(deployment: Deployment, metric: str, share: Mapping[str, float]) -> Ratios:
    """Bounds of measured over predicted `metric` of a deployment whose time has the origin `share`.

    Where no measured server was like it, the bounds hold those of the next less certain origin too.
    """
    table = interval_table()
    has_experts, engine = deployment.model.moe is not None, deployment.engine.kernels
    basis = basis_of(share)
    found = table.ratios(metric, basis, has_experts, engine)
    if not is_unlike_measured(deployment):
        return found
    worse = table.ratios(metric, BASES[min(BASES.index(basis) + 1, len(BASES) - 1)], has_experts, engine)
    return replace(found, low=min(found.low, worse.low), high=max(found.high, worse.high))


def chance(value: float, limit: float, ratios: Ratios) -> float:
    """Chance that a server for which `value` is predicted keeps `limit`.

    >>> round(chance(40.0, 50.0, Ratios(0.8, 1.25, 100, 10)), 2)
    0.9
    """
    return 0.5 * (1 + erf((log(limit / value) - ratios.log_middle) / ratios.log_spread / sqrt(2)))


def meets_chance(run: Run, share: Mapping[str, float]) -> float | None:
    """Chance that the least sure objective of a run holds; None without objectives, 0 where the queue grows."""
    if run.worst_objective == UNSUSTAINED:
        return 0.0
    chances = [row["chance"] for row in _objectives(run, share)]
    return min(chances) if chances else None


def certainty_facts(run: Run, share: Mapping[str, float], sustained_factor: float | None = None) -> Facts:
    """Intervals of mean latencies and objectives, chances, and the interval of the load that can be carried.

    `sustained_factor` is how many times the demand the layout was found to carry.
    """
    facts: Facts = {"objectives": _objectives(run, share), "meets_slo": meets_chance(run, share)}
    for metric in ("ttft", "tpot"):
        mean = getattr(run.summary, f"{metric}_s").value("mean")
        ratios = ratios_of(run.deployment, metric, share)
        known = isfinite(mean)
        facts[f"{metric}_mean_s"] = {"low": mean * ratios.low, "high": mean * ratios.high} if known else None
    ratios = ratios_of(run.deployment, "output_tok_s_per_gpu", share)
    facts["capacity"] = None
    if sustained_factor:
        facts["capacity"] = {"low": sustained_factor * ratios.low, "high": sustained_factor * ratios.high}
    facts["sentence"] = _sentence(facts)
    facts["basis"] = basis_of(share) + (
        ", no measured server was like it" if is_unlike_measured(run.deployment) else ""
    )
    facts["num_points"], facts["num_combinations"] = ratios.num_points, ratios.num_combinations
    return facts


def _sentence(facts: Facts) -> str:
    """Intervals in words."""
    parts = [
        f"{row['objective']} {format_seconds(row['low_s'])} to {format_seconds(row['high_s'])} "
        f"(limit {format_seconds(row['limit_s'])}, holds in {format_chance(row['chance'])})"
        for row in facts["objectives"]
    ]
    if facts["capacity"] is not None:
        low, high = facts["capacity"]["low"], facts["capacity"]["high"]
        parts.append(f"load carried {low:.2g} to {high:.2g} x the demand")
    return f"80 % intervals: {', '.join(parts)}." if parts else "No objective to be sure of."


def _objectives(run: Run, share: Mapping[str, float]) -> list[Facts]:
    rows = []
    for result in run.summary.objectives:
        value, limit = result.value_s, result.objective.limit_s
        if not isfinite(value) or value <= 0:
            continue
        ratios = ratios_of(run.deployment, _METRIC.get(result.objective.metric, "tpot"), share)
        rows.append(
            {
                "objective": f"{result.objective.metric.upper()} {result.objective.statistic}",
                "value_s": value,
                "low_s": value * ratios.low,
                "high_s": value * ratios.high,
                "limit_s": limit,
                "chance": chance(value, limit, ratios) if limit < inf else 1.0,
            }
        )
    return rows


def past_errors(run: Run) -> str:
    """How far predictions were off on measured servers that the calibration in use had not seen."""
    deployment = run.deployment
    models = "moe" if deployment.model.moe is not None else "dense"
    found = [deployment.engine.fitted.error(metric, models) for metric in _LABELS]
    known: list[Errors] = [errors for errors in found if errors is not None]
    if not known:
        return "The calibration in use does not say how far predictions were off on measured servers."
    parts = []
    for errors in known:
        median, mean = errors.left_out or errors.calibrated
        parts.append(f"{_LABELS[errors.metric]} was off by {median:.0f} % (median; mean {mean:.0f} %)")
    kind = "MoE" if models == "moe" else "dense"
    unseen = " that the calibration had not seen" if known[0].left_out else ""
    return f"On {known[0].num_points:,} measured points of {kind} servers{unseen}, {' and '.join(parts)}."
