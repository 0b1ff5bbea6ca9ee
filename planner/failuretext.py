"""Facts about failures as terminal text."""

from __future__ import annotations

from typing import Any

from planner.tables import table
from planner.units import HOUR_S, format_bytes, format_seconds

Facts = dict[str, Any]


def _seconds(value: float | None) -> str:
    """Seconds as people say them, up to days."""
    if value is None:
        return "-"
    for size, unit in ((172_800.0, "d"), (7200.0, "h"), (600.0, "min")):
        if value >= size:
            per = {"d": 86_400.0, "h": 3600.0, "min": 60.0}[unit]
            return f"{value / per:,.1f} {unit}"
    return "0 s" if value == 0 else format_seconds(value)


def _share(value: float) -> str:
    """A share near one with as many nines as it has."""
    if value == 1.0:
        return "100%"
    if value >= 0.9999995:
        return "> 99.9999%"
    if value >= 0.999995:
        return f"{value:.5%}"
    return f"{value:.3%}" if value > 0.99 else f"{value:.1%}"


def incident_lines(facts: Facts | None) -> list[str]:
    """What failures did to a run; nothing without failures."""
    if not facts:
        return []
    incidents = facts["incidents"]
    if not incidents:
        return ["", "Failures  none happened in this run"]
    fate = {"retry": "retried", "resume": "resumed", "drop": "dropped"}[facts["on_failure"]]
    moved = facts["num_dropped"] if fate == "dropped" else facts["num_retried"]
    lines = [
        "",
        f"Failures  {len(incidents)}, each stops {facts['gpus_per_failure']} GPUs: {moved:,} requests {fate}, "
        f"{facts['lost_output_tokens']:,} output tokens lost, {facts['recomputed_tokens']:,} tokens of KV cache gone",
        f"          {_share(facts['availability'])} of the time something served, "
        f"{_share(facts['capacity_share'])} of the capacity was there, {_seconds(facts['downtime_replica_s'])} of "
        "downtime over all replicas",
        "",
        table(
            ["failed at", "replica", "noticed after", "back after", "requests hit", "lost tokens", "KV lost"],
            [
                (
                    format_seconds(i["failed_s"]) if i["failed_s"] else "0 s",
                    f"{i['replica']}" + (" (one rank)" if i["is_elastic"] else ""),
                    _after(i, "detected_s"),
                    _after(i, "ready_s"),
                    f"{i['num_requests']:,}",
                    f"{i['lost_output_tokens']:,}",
                    f"{i['recomputed_tokens']:,}",
                )
                for i in incidents[:_MOST_ROWS]
            ],
        ),
    ]
    if len(incidents) > _MOST_ROWS:
        lines.append(f"  and {len(incidents) - _MOST_ROWS:,} more (--json lists them)")
    lines += [
        "",
        table(
            ["requests", "number", "TTFT mean", "TTFT p95", "TPOT mean", "TPOT p95"],
            [
                _latency_row(name, facts[key])
                for name, key in (("during an incident", "during"), ("others", "otherwise"))
            ],
        ),
    ]
    return [*lines, "", "Rebuild of a replica", *readiness_lines(facts["rebuild"])]


_MOST_ROWS = 10


def _after(incident: Facts, key: str) -> str:
    return "-" if incident[key] is None else _seconds(incident[key] - incident["failed_s"])


def _latency_row(name: str, facts: Facts) -> tuple[str, ...]:
    keys = ("ttft_mean_s", "ttft_p95_s", "tpot_mean_s", "tpot_p95_s")
    return (name, f"{facts['num_requests']:,}", *["-" if facts[k] is None else format_seconds(facts[k]) for k in keys])


def readiness_lines(facts: Facts) -> list[str]:
    """Time to ready term by term, each with its source."""
    names = [term["name"].replace("_", "-") for term in facts["terms"]]
    shown = [_seconds(term["seconds"]) for term in facts["terms"]]
    width, wide = max(map(len, names)), max(map(len, [*shown, _seconds(facts["total_s"])]))
    rows = [
        f"  {name.ljust(width)}  {seconds.rjust(wide)}  {term['source']}"
        for name, seconds, term in zip(names, shown, facts["terms"], strict=True)
    ]
    return [
        *rows,
        f"  {'ready'.ljust(width)}  {_seconds(facts['total_s']).rjust(wide)}  "
        f"{format_bytes(facts['weight_bytes'])} of weights on all GPUs of a replica",
    ]


def reliability_text(facts: Facts) -> str:
    """Text of `failures`."""
    layout, rebuild = facts["layout"], facts["rebuild"]
    wanted, replicas = facts["replicas_wanted"], layout["replicas"]
    more = "as many as there are" if wanted == replicas else f"{wanted - replicas} more than there are"
    enough = f"{wanted} replica{'s' if wanted > 1 else ''} ({wanted * facts['blast_gpus']} GPUs)"
    return "\n".join(
        [
            f"{layout['name']} on {facts['cluster']}: one failed GPU stops {facts['blast_gpus']} GPUs, "
            f"{facts['blast_share']:.1%} of the capacity, for {_seconds(facts['mttr_s'])}; "
            f"{facts['failures_per_month']:.2g} times in 30 days",
            "",
            f"  GPU fails every    {facts['mtbf_gpu_s'] / HOUR_S:>8,.0f} h  {facts['mtbf_gpu_source']}",
            f"  replica fails every{_seconds(facts['mttf_replica_s']):>11}  the GPU's over {facts['blast_gpus']} GPUs",
            f"  noticed after      {_seconds(facts['detect_s']):>10}  {facts['detect_source']}",
            f"  rebuilt after      {_seconds(rebuild['total_s']):>10}  see below",
            f"  a replica works    {_share(facts['availability_replica']):>10}  of the time; "
            f"{_seconds(facts['downtime_replica_s_per_month'])} of downtime in 30 days over all replicas",
            f"  all replicas work  {_share(facts['all_replicas_up']):>10}  of the time; at least one "
            f"{_share(facts['any_replica_up'])}",
            "",
            f"  Lost per failure: {facts['in_flight_per_failure']:,.0f} requests in flight, "
            f"{facts['output_tokens_lost_per_failure']:,.0f} output tokens, "
            f"{facts['kv_tokens_lost_per_failure']:,.0f} tokens of KV cache to compute again",
            f"  To serve the whole load {_share(facts['target'])} of the time: {enough}, {more}",
            *_spare_lines(facts),
            *_survival_lines(facts),
            "",
            "Other sizes of a replica on as many GPUs",
            table(
                ["layout", "one failure stops", "fails every", "capacity lost", "GPUs for target", "requests/s/GPU"],
                [
                    (
                        size["layout"],
                        f"{size['blast_share']:.1%}",
                        _seconds(size["mttf_s"]),
                        f"{size['capacity_lost']:.4%}",
                        f"{size['gpus_wanted']}",
                        f"{size['requests_per_s_per_gpu']:#.3g}",
                    )
                    for size in facts["sizes"]
                ],
            ),
            "",
            "Rebuild of a replica",
            *readiness_lines(rebuild),
        ]
    )


def _spare_lines(facts: Facts) -> list[str]:
    if facts["spare_nodes"] is None:
        return ["  Assumes that a spare GPU is at hand; --repair 24h counts the spare nodes for that"]
    return [f"  Spare nodes so that a replacement is at hand as often: {facts['spare_nodes']}, shared by all replicas"]


def _survival_lines(facts: Facts) -> list[str]:
    rows = facts["survival"]
    if not rows:
        return []
    copies = facts["redundant_experts"]
    return [
        "",
        f"Experts with a copy left ({facts['placement']} placement, {copies} redundant per layer)",
        table(
            ["dead", "every expert lives", "experts lost", "counted"],
            [
                (
                    f"{row['dead']} {row['unit']}{'s' if row['dead'] > 1 else ''}",
                    f"{row['all_covered']:.1%}",
                    f"{row['lost_experts']:,.1f} of {facts['num_experts']:,}",
                    f"all {row['num_sets']:,} cases" if row["is_exact"] else f"{row['num_sets']:,} cases drawn",
                )
                for row in rows
            ],
        ),
        f"  After one dead rank {format_bytes(facts['reload_bytes_per_dead_rank'])} of experts are loaded again; the "
        f"slots of the others hold all experts with up to {facts['ranks_tolerated_elastic']} dead ranks",
        *_elastic_lines(facts),
    ]


def _elastic_lines(facts: Facts) -> list[str]:
    pause_s = facts["elastic_pause_s"]
    if pause_s is None:
        return []
    return [
        f"  As an elastic group (simulate --elastic) it would pause for {_seconds(pause_s)} per failure, not "
        f"{_seconds(facts['mttr_s'])}, and serve with one rank less meanwhile"
    ]


def scale_out_text(facts: Facts) -> str:
    """Text of `scale-out`."""
    ready = facts["ready"]
    lines = [
        f"One more replica of {facts['layout']['name']} ({facts['unit_gpus']} GPUs of {facts['cluster']}) is ready "
        f"after {_seconds(ready['total_s'])} and adds {facts['capacity_requests_per_s_per_replica']:.3g} requests/s",
        "",
        *readiness_lines(ready),
        "",
        "Weights from elsewhere (--load-from)",
        table(
            ["source", "weights", "ready after"],
            [
                (name, _seconds(facts["weights_s_by_source"][name]), _seconds(total_s))
                for name, total_s in facts["ready_s_by_source"].items()
            ],
        ),
        "",
        f"  The unit of growth is a whole group of {facts['unit_gpus']} GPUs"
        + (
            f"; elastic EP can also add or take ranks and waits up to {_seconds(facts['drain_s'])} for their requests:"
            if facts["drain_s"] is not None
            else ""
        ),
        *([f"    {facts['drain_source']}"] if facts["drain_s"] is not None else []),
    ]
    if facts["reserve_replicas"] is not None:
        lines.append(
            f"  While it starts the load grows by {facts['growth_until_ready_requests_per_s']:.3g} requests/s: keep "
            f"{facts['reserve_replicas']} replica(s) in reserve"
        )
    lines += ["", f"Workload  {facts['workload']}; capacity by the closed form, without queueing"]
    return "\n".join(lines)
