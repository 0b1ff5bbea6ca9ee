"""What a finished simulation shows: verdict, latencies, how requests fared and how the queue went over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.units import format_bytes, format_seconds, format_usd, significant
from planner.whatif.analytic import Tile
from planner.whatif.jobs import Job
from planner.workload import parse_slo

_SATURATION = {
    "stable": "Stable: the queue stays short.",
    "backlogged": "Backlogged: requests wait, but the queue does not grow without end.",
    "overloaded": "Overloaded: the queue grows for as long as the load lasts.",
}
Facts = Mapping[str, Any]
SERIES = {"queue": "Waiting", "batch": "In the batch", "kv_share": "KV cache in use"}


def verdict(facts: Facts) -> str:
    """The answer of the run in one line."""
    if facts.get("headline"):
        return str(facts["headline"])
    layout, meets = facts["layout"], facts.get("meets_slo")
    said = "meets the SLO" if meets else "misses the SLO"
    return f"{layout['name']} on {layout['num_gpus']} GPUs: {said}, {facts['worst_objective']} at " + (
        f"{facts['worst_ratio']:.0%} of its limit"
    )


def saturation(facts: Facts) -> str:
    """Whether the queue was stable, in words; empty where the run does not say."""
    found = facts.get("saturation")
    return _SATURATION.get(str(found), str(found)) if found else ""


def tiles(facts: Facts) -> list[Tile]:
    """Latencies, throughput and price as simulated."""
    shown = []
    for metric in ("ttft", "tpot"):
        values = facts.get(f"{metric}_s") or {}
        if values.get("p95") is not None:
            rest = ", ".join(f"{s} {format_seconds(values[s])}" for s in ("mean", "p50", "p99") if values.get(s))
            shown.append(Tile(f"{metric.upper()} p95", format_seconds(values["p95"]), rest, "", ""))
    per_gpu, usd = facts.get("output_tok_per_s_per_gpu"), facts.get("usd_per_mtok_output")
    if per_gpu:
        whole = significant(facts["output_tok_per_s"])
        shown.append(Tile("Throughput", f"{significant(per_gpu)} tok/s/GPU", f"{whole} output tok/s in all", "", ""))
    if usd:
        shown.append(Tile("Price per Mtok", format_usd(usd), "output tokens at the demanded load", "", ""))
    return shown


def sure(facts: Facts) -> str:
    """Intervals and past errors of the run, where it states them."""
    certainty = facts.get("certainty") or {}
    return " ".join(str(part) for part in (certainty.get("sentence"), facts.get("past_error")) if part)


def sentences(facts: Facts) -> str:
    """Saturation, memory and certainty of the run."""
    return " ".join(text for text in (saturation(facts), memory_note(facts), sure(facts)) if text)


def limit_s(job: Job, metric: str) -> float | None:
    """The SLO's limit of `metric` (TTFT or TPOT) in the scenario of the run."""
    return parse_slo(job.scenario.slo).limits_s().get(metric.lower())


def quantiles(facts: Facts) -> dict[str, list[float]]:
    """101 quantiles [s] of TTFT and TPOT, where the run states them."""
    return {name.removesuffix("_s").upper(): list(values) for name, values in (facts.get("cdf") or {}).items()}


def timeline(facts: Facts) -> dict[str, list[float]]:
    """Waiting requests, batch and share of the KV cache over `time_s`, where the run states them."""
    return {name: list(values) for name, values in (facts.get("timeline") or {}).items()}


def memory_note(facts: Facts) -> str:
    """Peak use of the cache, and requests that had to wait for it."""
    if "kv_utilisation_peak" not in facts:
        return ""
    pool = format_bytes((facts.get("memory") or {}).get("terms", {}).get("kv_cache", 0.0))
    return (
        f"KV cache at most {facts['kv_utilisation_peak']:.0%} full ({pool} per GPU), {facts['num_preemptions']:,} "
        f"preemptions, {facts['num_rejected']:,} rejected, {facts['num_requests']:,} requests in "
        f"{facts['num_steps']:,} steps."
    )
