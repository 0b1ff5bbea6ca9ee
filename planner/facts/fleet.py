"""Facts of a fleet through a day."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from planner import __version__
from planner.facts.basic import layout_facts
from planner.facts.certainty import past_errors, ratios_of
from planner.facts.failures import readiness_facts
from planner.facts.plan import origin_share_of
from planner.fleet.behaviour import CELL_REPLICAS
from planner.reliability import MONTH_S
from planner.units import DAY_S

if TYPE_CHECKING:
    from planner.fleet import Fleet, Hour

Facts = dict[str, Any]


def fleet_facts(fleet: Fleet, command: str) -> Facts:
    """What `fleet --json` prints."""
    deployment, policy = fleet.question.deployment, fleet.policy
    low, high = certain_replicas(fleet)
    return {
        "question": _question_facts(fleet),
        "layout": layout_facts(deployment.layout),
        "meets_slo": fleet.meets_slo,
        "replica": _replica_facts(fleet),
        "peak": {
            "replicas": fleet.wanted,
            "gpus": fleet.wanted * fleet.replica_gpus,
            "gpus_low": None if low is None else low * fleet.replica_gpus,
            "gpus_high": None if high is None else high * fleet.replica_gpus,
            "gpus_available": fleet.available * fleet.replica_gpus,
            "spare_replicas": policy.spare,
        },
        "autoscaler": {
            "headroom": policy.headroom,
            "ready_s": policy.ready_s,
            "drain_s": policy.drain_s,
            "hold_s": policy.hold_s,
            "delay_s": policy.delay_s,
            "ready": readiness_facts(fleet.readiness),
        },
        "hours": [_hour_facts(fleet, hour, fixed) for hour, fixed in zip(fleet.scaled, fleet.fixed, strict=True)],
        "scaled": _fleet_facts(fleet, fleet.scaled),
        "fixed": _fleet_facts(fleet, fleet.fixed) | {"gpus": fleet.num_fixed * fleet.replica_gpus},
        "failures": _failure_facts(fleet),
        "price": _price_facts(fleet),
        "past_error": past_errors(fleet.behaviour.reference),
        "warnings": _warnings(fleet),
        "command": command,
        "versions": {"moeplan": __version__},
    }


def _question_facts(fleet: Fleet) -> Facts:
    question, deployment, sent = fleet.question, fleet.question.deployment, fleet.question.workload
    return {
        "model": deployment.model.name,
        "cluster": deployment.cluster.name,
        "workload": f"{sent.name}: {sent.prompt} tokens in, {sent.output} out",
        "slo": [str(objective) for objective in question.slo.objectives],
        "engine": f"{deployment.engine.name} {deployment.engine.version}",
        "router": deployment.router,
        "peak_requests_per_s": question.day.peak_per_s,
        "hourly": list(question.day.hourly),
        "num_days": question.num_days,
        "availability": question.availability,
        "seed": question.seed,
    }


def _replica_facts(fleet: Fleet) -> Facts:
    behaviour = fleet.behaviour
    return {
        "gpus": fleet.replica_gpus,
        "capacity_requests_per_s": behaviour.capacity_per_s,
        "planned_requests_per_s": fleet.policy.per_replica_per_s,
        "loads_requests_per_s": behaviour.loads_per_s.tolist(),
        "attained": [behaviour.attained(row) for row in behaviour.quantiles_s],
        **{str(o.name) + "_s": behaviour.statistic(o).tolist() for o in fleet.question.slo.objectives},
        "num_requests_simulated": behaviour.num_requests,
    }


def certain_replicas(fleet: Fleet) -> tuple[int | None, int | None]:
    """80 % interval of the replicas at the peak: all latencies and the throughput at either end of theirs.

    None at an end where no load keeps the promise.
    """
    reference, share = fleet.behaviour.reference, origin_share_of(fleet.behaviour.reference)
    metrics = {"ttft": "ttft", "tpot": "tpot", "e2e": "tpot"}
    ratios = {metric: ratios_of(reference.deployment, of, share) for metric, of in metrics.items()}
    carried = ratios_of(reference.deployment, "output_tok_s_per_gpu", share)
    ends: list[int | None] = []
    for end, throughput in (("low", max(1.0, carried.high)), ("high", min(1.0, carried.low))):
        latencies = {metric: getattr(found, end) for metric, found in ratios.items()}
        most = fleet.behaviour.most_per_s(latencies, throughput)
        peak = fleet.question.day.peak_per_s
        ends.append(math.ceil(peak / most) + fleet.policy.spare if most else None)
    return ends[0], ends[1]


def _hour_facts(fleet: Fleet, hour: Hour, fixed: Hour) -> Facts:
    gpus = fleet.replica_gpus
    objectives = fleet.question.slo.objectives
    return {
        "hour": hour.hour,
        "requests_per_s": hour.rate_per_s,
        "gpus": hour.replicas * gpus,
        "gpus_most": hour.most_replicas * gpus,
        "gpus_fewest": hour.fewest_replicas * gpus,
        "load_share": hour.load_share,
        "slo_attainment": hour.attained,
        "meets_slo": fleet.meets(hour),
        **{f"{o.name}_s": fleet.value_s(hour, o.metric, o.statistic) for o in objectives},
        "failures": hour.failures,
        "requests_hit": hour.hit,
        "fixed_slo_attainment": fixed.attained,
        "fixed_meets_slo": fleet.meets(fixed),
    }


def _fleet_facts(fleet: Fleet, hours: tuple[Hour, ...]) -> Facts:
    requests = math.fsum(hour.requests for hour in hours)
    usd = fleet.usd_per_day(hours)
    mtok = requests * fleet.question.workload.mean_output_tokens / 1e6
    return {
        "gpu_hours_per_day": fleet.gpu_hours(hours),
        "gpus_most": max(hour.most_replicas for hour in hours) * fleet.replica_gpus,
        "usd_per_day": usd,
        "usd_per_mtok_output": usd / mtok if usd is not None and mtok else None,
        "requests_per_day": requests,
        "slo_attainment": math.fsum(hour.attained * hour.requests for hour in hours) / requests,
        "hours_meeting_slo": sum(fleet.meets(hour) for hour in hours),
    }


def _failure_facts(fleet: Fleet) -> Facts:
    """What failures cost the fleet with an autoscaler, against one in which nothing fails."""
    outage, question = fleet.outage, fleet.question
    with_them, without = _fleet_facts(fleet, fleet.scaled), _fleet_facts(fleet, fleet.unfailing)
    per_day = math.fsum(hour.failures for hour in fleet.scaled)
    usd, free = with_them["usd_per_day"], without["usd_per_day"]
    return {
        "mtbf_gpu_s": question.mtbf_gpu.value,
        "mtbf_gpu_source": question.mtbf_gpu.source,
        "mttf_replica_s": outage.mttf_s,
        "detect_s": outage.detect_s,
        "mttr_s": outage.mttr_s,
        "failures_per_day": per_day,
        "failures_per_month": per_day * MONTH_S / DAY_S,
        "requests_hit_per_day": math.fsum(hour.hit for hour in fleet.scaled),
        "gpu_hours_down_per_day": math.fsum(hour.down_hours for hour in fleet.scaled) * fleet.replica_gpus,
        "gpu_hours_more_per_day": with_them["gpu_hours_per_day"] - without["gpu_hours_per_day"],
        "usd_more_per_day": None if usd is None or free is None else usd - free,
        "slo_attainment_without": without["slo_attainment"],
    }


def _price_facts(fleet: Fleet) -> Facts | None:
    price = fleet.price
    if price is None:
        return None
    return {
        "usd_per_gpu_hour": price.usd,
        "basis": price.basis,
        "as_of": price.as_of,
        "provider": price.provider,
        "source": price.source,
    }


def _warnings(fleet: Fleet) -> list[str]:
    warnings = []
    gpus = fleet.replica_gpus
    if fleet.wanted > fleet.available:
        warnings.append(
            f"the peak wants {fleet.wanted * gpus:,} GPUs and the cluster holds {fleet.available * gpus:,}: offer more "
            f"nodes, or at most {fleet.question.day.peak_per_s * fleet.available / fleet.wanted:,.0f} requests/s"
        )
    if fleet.wanted < _FEW_REPLICAS:
        warnings.append(
            f"{fleet.wanted} replicas are few for averages: failures and fluctuations of single ones decide. Simulate "
            "them all (`moeplan simulate ... replicas=N --mtbf-gpu 50000h`)."
        )
    fewest = min(hour.fewest_replicas for hour in fleet.scaled)
    if fleet.wanted >= _FEW_REPLICAS and fewest < CELL_REPLICAS:
        warnings.append(
            f"at the least load {fewest} replicas are left: with fewer than {CELL_REPLICAS} the TTFT of those hours is "
            "underestimated, by up to a quarter (docs/scale.md)"
        )
    if fleet.price is not None and fleet.price.basis == "owned":
        warnings.append("own hardware costs its peak all day: autoscaling frees GPUs for other work, it saves no money")
    lowest = float(fleet.behaviour.loads_per_s[0])
    if min(hour.rate_per_s / hour.replicas for hour in fleet.fixed) < lowest:
        warnings.append(f"below {lowest:.3g} requests/s per replica latencies are those at that load")
    return warnings


_FEW_REPLICAS = 10
