"""Facts about failures as terminal text."""

from __future__ import annotations

from typing import Any

from planner.tables import table
from planner.units import format_bytes, format_seconds

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
    if value >= 0.999995:
        return f"{value:.6%}"
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
