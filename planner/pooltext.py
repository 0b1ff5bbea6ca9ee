"""Facts of two pools as terminal text."""

from __future__ import annotations

from typing import Any

from planner.tables import table
from planner.units import format_bytes, format_seconds, format_usd, significant

Facts = dict[str, Any]
_WAITS = {
    "reserve_wait_s": "wait for KV room on the decode side",
    "link_wait_s": "wait for the links",
    "transfer_s": "transfer",
    "join_wait_s": "wait for a place in the batch",
    "exposed_s": "prompt computed to decode batch",
}


def _latency(values: Facts) -> list[str]:
    return ["-" if values[k] is None else format_seconds(values[k]) for k in ("mean", "p50", "p95", "p99")]


def _number(value: float | None) -> str:
    return "-" if value is None else significant(value)


def _usd(value: float | None) -> str:
    return "price unknown" if value is None else f"{format_usd(value)} per Mtok output"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def pools_text(facts: Facts) -> str:
    """Text of `simulate` with two pools."""
    verdict = {True: "meets the SLO", False: "misses the SLO", None: "no SLO given"}[facts["meets_slo"]]
    handover = facts["handover"]
    return "\n".join(
        [
            f"{facts['name']} on {facts['num_gpus']} GPUs: {_number(facts['output_tok_per_s'])} output tok/s "
            f"({_number(facts['output_tok_per_s_per_gpu'])} per GPU), {verdict}, {facts['saturation']}",
            "",
            table(
                ["", "mean", "p50", "p95", "p99"],
                [
                    ("TTFT", *_latency(facts["ttft_s"])),
                    ("TPOT", *_latency(facts["tpot_s"])),
                    ("end to end", *_latency(facts["e2e_s"])),
                ],
            ),
            "",
            table(
                ["between the pools", "mean", "p50", "p95", "p99"],
                [(label, *_latency(handover[name])) for name, label in _WAITS.items()],
            ),
            *route_lines(handover["route"]),
            f"  {handover['ttft']}",
            "",
            table(
                ["pool", "layout", "cluster", "GPUs", "busy", "KV mean", "KV peak", "links busy"],
                [
                    _pool_row("prefill", facts["prefill"], handover["sender_busy_share"]),
                    _pool_row("decode", facts["decode"], handover["receiver_busy_share"]),
                ],
                left=3,
            ),
            "",
            f"  {_usd(facts['usd_per_mtok_output'])}, {_number(facts['requests_per_s'])} requests/s, "
            f"{_number(facts['decode']['mean_seqs_per_rank'])} sequences per decode rank, "
            f"{facts['num_preemptions']:,} preemptions, {facts['num_rejected']:,} rejected",
            f"  {facts['num_requests']:,} requests ({facts['num_measured']:,} measured), {facts['num_steps']:,} steps, "
            f"{format_seconds(facts['simulated_s'])} simulated",
            *[f"  ! {warning}" for warning in facts["warnings"]],
        ]
    )


def route_lines(route: Facts) -> list[str]:
    """What a prompt of mean length takes on its way."""
    return [
        f"  A prompt of {route['prompt_tokens']:,} tokens moves {format_bytes(route['moved_bytes'])} over "
        f"{route['link']} in {format_seconds(route['transfer_s'])} "
        f"({format_bytes(route['bytes_per_s_per_gpu'])}/s per GPU)"
    ]


def _pool_row(name: str, pool: Facts, links: float) -> tuple[str, ...]:
    return (
        name,
        pool["layout"]["name"],
        pool["cluster"],
        str(pool["layout"]["num_gpus"]),
        _percent(pool["busy_share"]),
        _percent(pool["kv_utilisation"]),
        _percent(pool["kv_utilisation_peak"]),
        _percent(links),
    )
