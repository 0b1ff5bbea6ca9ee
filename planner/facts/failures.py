"""Facts of failures: what they did to a run, what they cost in the long run, how long a replica takes to start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from planner.facts.basic import layout_facts
from planner.failures.recovery import recovery

if TYPE_CHECKING:
    from planner.deployment import Deployment, Run
    from planner.failures.readiness import Readiness
    from planner.failures.settings import RecoverySettings
    from planner.outages import FailureReport, Latencies
    from planner.reliability import Reliability
    from planner.workload import Workload

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


def reliability_facts(answer: Reliability, command: str) -> Facts:
    """What `failures --json` prints."""
    of, layout, load = answer.deployment, answer.deployment.layout, answer.load
    moe = of.model.moe
    return {
        "model": of.model.name,
        "cluster": of.cluster.name,
        "layout": layout_facts(layout),
        "engine": f"{of.engine.name} {of.engine.version}",
        "mtbf_gpu_s": answer.mtbf_gpu.value,
        "mtbf_gpu_source": answer.mtbf_gpu.source,
        "blast_gpus": answer.blast_gpus,
        "blast_share": answer.blast_share,
        "mttf_replica_s": answer.mttf_s,
        "mttr_s": answer.mttr_s,
        "detect_s": answer.recovery.detect.value,
        "detect_source": answer.recovery.detect.source,
        "rebuild": readiness_facts(answer.readiness),
        "availability_replica": answer.availability,
        "failures_per_month": answer.failures_per_month,
        "downtime_replica_s_per_month": answer.failures_per_month * answer.mttr_s,
        "all_replicas_up": answer.all_up,
        "any_replica_up": answer.any_up,
        "target": answer.target,
        "replicas_wanted": answer.replicas_wanted,
        "spare_nodes": answer.spare_nodes,
        "capacity_requests_per_s_per_replica": load.capacity_per_s,
        "in_flight_per_failure": load.sequences,
        "kv_tokens_lost_per_failure": load.kv_tokens,
        "output_tokens_lost_per_failure": load.output_tokens,
        "num_experts": moe.num_experts * math.ceil(of.model.num_moe_layers / layout.pp) if moe else 0,
        "survival": [
            {"unit": unit, "dead": s.dead, "all_covered": s.all_covered, "lost_experts": s.lost_experts}
            | {"num_sets": s.num_sets, "is_exact": s.is_exact}
            for unit, found in (("rank", answer.ranks), ("node", answer.nodes))
            for s in found
        ],
        "placement": of.experts.placement_name,
        "redundant_experts": layout.redundant_experts,
        "ranks_tolerated_elastic": answer.tolerated,
        "reload_bytes_per_dead_rank": answer.reload_bytes,
        "elastic_pause_s": answer.elastic_s,
        "sizes": [
            {
                "layout": str(size.layout),
                "replica_gpus": size.layout.replica_gpus,
                "replicas": size.layout.replicas,
                "blast_share": size.blast_share,
                "mttf_s": size.mttf_s,
                "mttr_s": size.mttr_s,
                "availability": size.availability,
                "capacity_lost": 1.0 - size.availability,
                "gpus_wanted": size.replicas_wanted * size.layout.replica_gpus,
                "requests_per_s_per_gpu": size.requests_per_s_per_gpu,
            }
            for size in answer.sizes
        ],
        "command": command,
    }


def scale_out_facts(
    deployment: Deployment,
    workload: Workload,
    settings: RecoverySettings,
    ready: dict[str, Readiness],
    capacity_per_s: float,
    growth: float | None,
    command: str,
) -> Facts:
    """What `scale-out --json` prints; `growth` is in requests per second per minute."""
    chosen = ready[settings.load_from]
    arriving = None if growth is None else growth * chosen.total_s / 60.0
    is_group = deployment.layout.ep > 1 and deployment.layout.attention_dp > 1
    drain = recovery(deployment.engine).drain if is_group else None
    return {
        "model": deployment.model.name,
        "cluster": deployment.cluster.name,
        "layout": layout_facts(deployment.layout),
        "engine": f"{deployment.engine.name} {deployment.engine.version}",
        "workload": f"{workload.name}: {workload.mean_prompt_tokens:,.0f} tokens in, "
        f"{workload.mean_output_tokens:,.0f} out",
        "unit_gpus": deployment.layout.replica_gpus,
        "load_from": settings.load_from,
        "ready": readiness_facts(chosen),
        "ready_s_by_source": {name: found.total_s for name, found in ready.items()},
        "weights_s_by_source": {name: found.terms[1].seconds for name, found in ready.items()},
        "capacity_requests_per_s_per_replica": capacity_per_s,
        "growth_requests_per_s_per_min": growth,
        "growth_until_ready_requests_per_s": arriving,
        "reserve_replicas": None if arriving is None else math.ceil(arriving / capacity_per_s),
        "drain_s": drain.value if drain else None,
        "drain_source": drain.source if drain else None,
        "command": command,
    }
