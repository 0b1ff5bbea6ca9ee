"""What a finished simulation shows: verdict, latencies, how requests fared and how the queue went over time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.units import format_bytes, format_seconds, format_usd, significant
from planner.whatif import charts, rows
from planner.whatif.analytic import Tile
from planner.workload import parse_slo

_SATURATION = {
    "stable": "Stable: the queue stays short.",
    "backlogged": "Backlogged: requests wait, but the queue does not grow without end.",
    "overloaded": "Overloaded: the queue grows for as long as the load lasts.",
}
Facts = Mapping[str, Any]
SERIES = {"queue": "Waiting", "batch": "Running", "kv_share": "KV in use"}


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """A chart with its text for people who cannot see it."""

    spec: charts.Spec
    alt: str
    table: list[dict[str, str]]


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
    goodput = facts.get("goodput_requests_per_s")
    if goodput is not None:
        served = significant(facts["requests_per_s"])
        shown.append(Tile("Goodput", f"{significant(goodput)} req/s", f"within all limits, of {served} served", "", ""))
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


def figures(facts: Facts, slo: str) -> list[list[Figure]]:
    """Rows of figures: how requests fared against the limits of `slo`, then queue, batch and cache over time."""
    limits = parse_slo(slo).limits_s()
    samples = {name.removesuffix("_s"): list(values) for name, values in (facts.get("cdf") or {}).items()}
    shares = [
        Figure(charts.cdf(q, m.upper(), limits.get(m)), f"Share of requests within a {m.upper()}", rows.quantiles(q))
        for m, q in samples.items()
    ]
    series = facts.get("timeline") or {}
    times = [
        Figure(charts.timeline(series, name, title), f"{title} over time", rows.over_time(series, name))
        for name, title in SERIES.items()
        if name in series
    ]
    return [row for row in (shares, *([figure] for figure in times)) if row]


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
