"""Facts of failures: what they did to a run, what they cost in the long run, how long a replica takes to start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.deployment import Run
    from planner.failures.readiness import Readiness
    from planner.outages import FailureReport, Latencies

Facts = dict[str, Any]
_FEW_FAILURES = 1.0


def readiness_facts(ready: Readiness) -> Facts:
    """Time to ready of one replica, term by term with sources."""
    return {
        "total_s": ready.total_s,
        "weight_bytes": round(ready.weight_bytes),
        "terms": [{"name": t.name, "seconds": t.seconds, "source": t.source} for t in ready.terms],
    }


def incident_facts(report: FailureReport) -> Facts:
    """What failures did to a run."""
    plan = report.plan
    return {
        "incidents": [
            {
                "replica": incident.replica,
                "failed_s": incident.failed_s,
                "detected_s": _finite(incident.detected_s),
                "ready_s": _finite(incident.ready_s),
                "is_elastic": incident.is_elastic,
                "num_requests": incident.num_requests,
                "lost_output_tokens": incident.lost_output_tokens,
                "recomputed_tokens": incident.recomputed_tokens,
            }
            for incident in report.incidents
        ],
        "on_failure": plan.on_failure,
        "gpus_per_failure": plan.gpus_per_replica,
        "detect_s": plan.detect_s,
        "rebuild": readiness_facts(report.readiness),
        "num_retried": report.num_retried,
        "num_dropped": report.num_dropped,
        "num_ignored": report.num_ignored,
        "lost_output_tokens": report.lost_output_tokens,
        "recomputed_tokens": report.recomputed_tokens,
        "downtime_replica_s": report.downtime_s,
        "availability": report.availability,
        "capacity_share": report.capacity_share,
        "during": _latency_facts(report.during),
        "otherwise": _latency_facts(report.otherwise),
        "expected_failures": report.expected_failures,
    }


def incident_warnings(run: Run) -> list[str]:
    """What a reader of a run with failures must know."""
    report = run.failures
    if report is None:
        return []
    warnings = []
    if len(report.incidents) and run.deployment.layout.replicas == 1:
        warnings.append("there is one replica: nothing was served while it was away. A second one would have gone on.")
    if report.num_ignored:
        warnings.append(
            f"{report.num_ignored} failure(s) had no effect: the replica was down already or every request answered"
        )
    if report.expected_failures is not None and report.expected_failures < _FEW_FAILURES:
        warnings.append(
            f"the run is short: {report.expected_failures:.2g} random failures are expected in it. Force one with "
            "--fail-at, or ask `moeplan failures` for the long run."
        )
    return warnings


def _latency_facts(latencies: Latencies) -> Facts:
    return {
        "num_requests": latencies.num,
        "ttft_mean_s": _finite(latencies.ttft_mean_s),
        "ttft_p95_s": _finite(latencies.ttft_p95_s),
        "tpot_mean_s": _finite(latencies.tpot_mean_s),
        "tpot_p95_s": _finite(latencies.tpot_p95_s),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
