"""Facts of two pools as terminal text."""

from __future__ import annotations

from typing import Any

from planner.facts.prices import rule_note
from planner.launchtext import launch_lines
from planner.tables import table
from planner.text import plan_text
from planner.units import format_bytes, format_seconds, format_usd, significant

Facts = dict[str, Any]
_WAITS = {
    "reserve_wait_s": "wait for KV room on the decode side",
    "link_wait_s": "wait for the links",
    "transfer_s": "first byte sent to last received",
    "join_wait_s": "wait for a place in the batch",
    "exposed_s": "prompt computed to decode batch",
}
_ANSWERS = {"two pools": "Yes", "one pool": "No", "neither": "Neither way"}
_CURVE_ROWS = 12


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
            f"  {_usd(facts['usd_per_mtok_output'])}{rule_note(facts['allocation'])}, "
            f"{_number(facts['requests_per_s'])} requests/s, "
            f"{_number(facts['decode']['mean_seqs_per_rank'])} sequences per decode rank, "
            f"{facts['num_preemptions']:,} preemptions, {facts['num_rejected']:,} rejected",
            f"  {facts['num_requests']:,} requests ({facts['num_measured']:,} measured), {facts['num_steps']:,} steps, "
            f"{format_seconds(facts['simulated_s'])} simulated",
            *[f"  ! {warning}" for warning in facts["warnings"]],
            "",
            *launch_lines(facts)[:-1],
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
        f"{links:.1%}",
    )


def plan_pools_text(facts: Facts) -> str:
    """Text of `plan --disaggregate`: the verdict, the plan in one pool, then two pools."""
    pools = facts["disaggregation"]
    return "\n".join(
        [
            f"Prefill and decode apart? {_ANSWERS[pools['verdict']]}: {pools['reason']}.",
            "",
            "In one pool: " + plan_text(facts),
            "",
            *_two_pools_lines(pools),
        ]
    )


def _two_pools_lines(pools: Facts) -> list[str]:
    winner = pools["winner"]
    if winner is None:
        return [f"In two pools: no pair of {pools['considered']:,} pools comes near the SLO on {pools['cluster']}."]
    verdict = "meets the SLO" if pools["meets_slo"] else "misses the SLO"
    lines = [
        f"In two pools: {winner['name']} on {winner['num_gpus']} GPUs of {pools['cluster']}: {verdict}, "
        f"{winner['worst_objective']} at {winner['worst_ratio']:.0%} of its limit, "
        f"{_usd(winner['usd_per_mtok_output'])}{rule_note(winner['allocation'])}",
        "",
        table(
            ["", "mean", "p50", "p95", "p99"],
            [("TTFT", *_latency(winner["ttft_s"])), ("TPOT", *_latency(winner["tpot_s"]))],
        ),
        "",
        table(
            ["prefill", "decode", "GPUs", "SLO", "TTFT p95", "TPOT p95", "out tok/s/GPU", "tightest"],
            [_run_row(row) for row in pools["runs"]],
            left=2,
        ),
        *route_lines(winner["handover"]["route"]),
        f"  {winner['handover']['ttft']}",
    ]
    if pools["sustained_factor"]:
        grows = f"Demand can grow to at least {pools['sustained_factor']:g} x on this pair"
        lines.append(f"  {grows if pools['sustained_factor'] > 1 else 'There is less than 10 % room for growth'}")
    return [*lines, "", *_curve_lines(pools), "", *launch_lines(winner)[:-1]]


def _run_row(row: Facts) -> tuple[str, ...]:
    return (
        row["prefill"],
        row["decode"],
        f"{row['prefill_gpus']} + {row['decode_gpus']}",
        "meets" if row["meets_slo"] else "misses",
        "-" if row["ttft_p95_s"] is None else format_seconds(row["ttft_p95_s"]),
        "-" if row["tpot_p95_s"] is None else format_seconds(row["tpot_p95_s"]),
        significant(row["output_tok_per_s_per_gpu"]),
        f"{row['worst_objective']} at {row['worst_ratio']:.0%} of its limit",
    )


def _curve_lines(pools: Facts) -> list[str]:
    """The ratio curve: what each split of the offered GPUs could answer within the SLO, thinned to a few rows."""
    curve, ratio_lines = pools["curve"], _ratio_lines(pools["ratio"])
    if not curve:
        return ratio_lines or ["No split of the offered GPUs keeps the SLO at any load (estimates)."]
    best = max(curve, key=lambda row: row["requests_per_s"])
    step = -(-len(curve) // _CURVE_ROWS)
    shown = [row for i, row in enumerate(curve) if i % step == 0 or row is best]
    lines = [
        f"How to split {best['prefill_gpus'] + best['decode_gpus']} GPUs (estimates within the SLO)",
        table(
            ["prefill GPUs", "decode GPUs", "prefill req/s", "decode req/s", "out tok/s/GPU", ""],
            [
                (
                    str(row["prefill_gpus"]),
                    str(row["decode_gpus"]),
                    significant(row["prefill_per_s"]),
                    significant(row["decode_per_s"]),
                    significant(row["output_tok_per_s_per_gpu"]),
                    "best" if row is best else "",
                )
                for row in shown
            ],
            left=0,
        ),
    ]
    return lines + ratio_lines


def _ratio_lines(ratio: Facts | None) -> list[str]:
    if ratio is None:
        return []
    return [
        f"  Matched exactly: {ratio['prefill_gpus_per_decode_gpu']:.2f} prefill GPUs per decode GPU, "
        f"{significant(ratio['output_tok_per_s_per_gpu'])} output tok/s per GPU "
        f"({ratio['prefill_layout']}; {ratio['decode_layout']})"
    ]
