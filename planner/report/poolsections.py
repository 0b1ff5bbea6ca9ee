"""Sections about prefill and decode in two pools: the verdict beside one pool, and the pools themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.report.blocks import Section
from planner.report.rows import without_empty
from planner.report.wording import duration, number
from planner.units import format_bytes

Facts = Mapping[str, Any]


def pools(facts: Facts) -> Section | None:
    """Two pools as simulated, or as planned beside one; None where nobody asked for two."""
    planned = facts.get("disaggregation")
    if planned:
        found = planned.get("winner")
        finding = f"Prefill and decode apart: {planned['verdict']}. {planned['reason']}."
        if not found:
            return Section("Prefill and decode in two pools", finding)
        finding += f" The best pair is {found['name']} on {found['num_gpus']:,} GPUs."
    elif facts.get("prefill") and facts.get("decode"):
        found, finding = facts, f"{facts.get('name')} on {facts.get('num_gpus'):,} GPUs."
    else:
        return None
    header = ("Pool", "Layout", "Cluster", "GPUs", "Busy", "KV mean", "KV peak")
    cells = [
        (
            name,
            str(pool["layout"]["name"]),
            str(pool["cluster"]),
            number(pool["layout"]["num_gpus"], whole=True),
            *(_percent(pool.get(key)) for key in ("busy_share", "kv_utilisation", "kv_utilisation_peak")),
        )
        for name, pool in (("prefill", found["prefill"]), ("decode", found["decode"]))
    ]
    return Section(
        "Prefill and decode in two pools", finding, (without_empty(header, cells, {0, 1, 2}),), items=_route(found)
    )


def _route(found: Facts) -> tuple[str, ...]:
    handover = found.get("handover") or {}
    route = handover.get("route")
    if not route:
        return ()
    moved = f"{format_bytes(route['moved_bytes'])} over {route['link']} in {duration(route['transfer_s'])}"
    return (f"A prompt of {route['prompt_tokens']:,} tokens moves {moved}.", str(handover.get("ttft", "")))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
