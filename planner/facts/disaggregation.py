"""Facts of two pools: a simulation of them, a plan with them, and attention-FFN disaggregation."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from planner import __version__
from planner.deployment import Deployment
from planner.disaggregation.deployment import Disaggregated, PoolsRun
from planner.disaggregation.plan import PoolsPlan
from planner.disaggregation.search import Split
from planner.disaggregation.transfer import KvRoute
from planner.facts.basic import Facts, latency_facts, layout_facts, memory_facts
from planner.facts.launch import launch_facts
from planner.facts.prices import price_facts
from planner.metrics import Summary

_ALWAYS = 0.95
"""Share of the time from which something counts as busy without a pause."""
_WAITS = ("reserve_wait", "link_wait", "transfer", "join_wait", "exposed")


def pools_facts(run: PoolsRun, command: str) -> Facts:
    """What `simulate --json` prints for two pools."""
    deployment, summary = run.deployment, run.summary
    prefill, decode = deployment.prefill, deployment.decode
    return {
        "model": prefill.model.name,
        "name": deployment.layouts,
        "num_gpus": run.num_gpus,
        "engine": f"{prefill.engine.name} {prefill.engine.version}",
        "workload": str(run.workload),
        "prefill": _pool_facts(prefill, run.prefill_summary),
        "decode": _pool_facts(decode, summary) | {"mean_seqs_per_rank": _finite(summary.mean_decode_seqs_per_rank)},
        "handover": handover_facts(run),
        "meets_slo": run.meets_slo if run.slo else None,
        "worst_objective": run.worst_objective,
        "worst_ratio": run.worst_ratio,
        "ttft_s": latency_facts(summary, "ttft"),
        "tpot_s": latency_facts(summary, "tpot"),
        "e2e_s": latency_facts(summary, "e2e"),
        "output_tok_per_s": _finite(run.output_tok_per_s),
        "output_tok_per_s_per_gpu": _finite(run.output_tok_per_s / run.num_gpus),
        "requests_per_s": _finite(summary.requests_per_s / run.simulated_share),
        **price_facts(run.token_costs),
        "saturation": summary.saturation,
        "num_preemptions": summary.num_preemptions,
        "num_rejected": summary.num_rejected,
        "num_requests": len(run.simulation.requests),
        "num_measured": summary.num_measured,
        "num_steps": run.simulation.num_steps,
        "simulated_s": run.simulation.simulated_s,
        "simulated_share": run.simulated_share,
        "launch": pool_launches(deployment),
        "warnings": _warnings(run),
        "command": command,
        "versions": {"moeplan": __version__},
    }


def plan_pools_facts(plan: PoolsPlan) -> Facts:
    """What `plan --disaggregate --json` adds under `disaggregation`."""
    winner = plan.winner
    facts: Facts = {
        "verdict": plan.verdict,
        "reason": plan.reason,
        "cluster": plan.cluster_names,
        "meets_slo": plan.meets_slo,
        "considered": plan.num_considered,
        "pairs": len(plan.estimates),
        "sustained_factor": plan.sustained_factor,
        "runs": [_run_row(run) for run in plan.runs],
        "ratio": None if plan.ratio is None else asdict(plan.ratio),
        "curve": [_split_row(split, plan.output_tokens) for split in plan.curve],
        "winner": None,
    }
    if winner is None:
        return facts
    return facts | {
        "winner": {
            "name": winner.deployment.layouts,
            "num_gpus": winner.num_gpus,
            "prefill": _pool_facts(winner.deployment.prefill, winner.prefill_summary),
            "decode": _pool_facts(winner.deployment.decode, winner.summary),
            "handover": handover_facts(winner),
            "ttft_s": latency_facts(winner.summary, "ttft"),
            "tpot_s": latency_facts(winner.summary, "tpot"),
            "output_tok_per_s_per_gpu": winner.output_tok_per_s / winner.num_gpus,
            **price_facts(winner.token_costs),
            "worst_objective": winner.worst_objective,
            "worst_ratio": winner.worst_ratio,
            "simulated_share": winner.simulated_share,
            "launch": pool_launches(winner.deployment),
        }
    }


def pool_launches(deployment: Disaggregated) -> list[Facts]:
    """How to start each pool."""
    return [launch_facts(deployment.prefill, "prefill"), launch_facts(deployment.decode, "decode")]


def _run_row(run: PoolsRun) -> Facts:
    return {
        "name": run.deployment.layouts,
        "prefill": run.deployment.prefill.name,
        "decode": run.deployment.decode.name,
        "prefill_gpus": run.deployment.prefill.layout.num_gpus,
        "decode_gpus": run.deployment.decode.layout.num_gpus,
        "meets_slo": run.meets_slo,
        "ttft_p95_s": latency_facts(run.summary, "ttft")["p95"],
        "tpot_p95_s": latency_facts(run.summary, "tpot")["p95"],
        "output_tok_per_s_per_gpu": run.output_tok_per_s / run.num_gpus,
        "usd_per_mtok_output": run.usd_per_mtok_output,
        "worst_objective": run.worst_objective,
        "worst_ratio": run.worst_ratio,
    }


def _split_row(split: Split, output_tokens: float) -> Facts:
    gpus = split.prefill_gpus + split.decode_gpus
    return asdict(split) | {
        "requests_per_s": split.requests_per_s,
        "output_tok_per_s_per_gpu": split.requests_per_s * output_tokens / gpus,
    }


def _pool_facts(deployment: Deployment, summary: Summary) -> Facts:
    return {
        "cluster": deployment.cluster.name,
        "layout": layout_facts(deployment.layout),
        "max_num_seqs": deployment.limits.max_num_seqs,
        "max_batched_tokens": deployment.limits.max_batched_tokens,
        "moe_backend": deployment.backend,
        "kv_format": deployment.model.kv_format,
        "memory": memory_facts(deployment.memory),
        "busy_share": _finite(summary.busy_share),
        "kv_utilisation": _finite(summary.kv_utilisation),
        "kv_utilisation_peak": _finite(summary.kv_utilisation_peak),
    }


def handover_facts(run: PoolsRun) -> Facts:
    """The way of the KV: its rules, its link, and how long requests took over each part of it."""
    rules, table, summary = run.deployment.handover, run.simulation.handovers, run.summary
    measured = slice(summary.num_warmup, len(table) - summary.num_cooldown)
    tokens = round(run.workload.mean_prompt_tokens)
    return {
        "reserve": rules.reserve,
        "send": rules.send,
        "first_token": rules.first_token,
        "ttft": rules.ttft_text,
        "reserved_decode_tokens": rules.reserved_decode_tokens,
        "source": rules.source,
        "route": route_facts(run.deployment.route, tokens),
        "sender_busy_share": run.simulation.sender_busy_share,
        "receiver_busy_share": run.simulation.receiver_busy_share,
    } | {f"{name}_s": _distribution(getattr(table, f"{name}_s")[measured]) for name in _WAITS}


def route_facts(route: KvRoute, tokens: int) -> Facts:
    """The link between the pools and what a prompt of `tokens` takes on it."""
    return {
        "link": route.name,
        "bytes_per_s_per_gpu": min(route.sender_bytes_per_s, route.receiver_bytes_per_s),
        "prompt_tokens": tokens,
        "moved_bytes": route.moved_bytes(tokens),
        "transfer_s": route.transfer_s(tokens),
    }


def _distribution(values: Any) -> Facts:
    known = values[np.isfinite(values)]
    if not len(known):
        return dict.fromkeys(("mean", "p50", "p95", "p99"))
    p50, p95, p99 = (float(q) for q in np.percentile(known, (50, 95, 99)))
    return {"mean": float(known.mean()), "p50": p50, "p95": p95, "p99": p99}


def _warnings(run: PoolsRun) -> list[str]:
    warnings = [*run.deployment.prefill.model.notes]
    if run.rejection_reason:
        warnings.append(run.rejection_reason)
    if run.summary.saturation == "overloaded":
        warnings.append(f"The queue grows: {_bottleneck(run)}.")
    return warnings


def _bottleneck(run: PoolsRun) -> str:
    """What is too small in an overloaded run, with a remedy.

    Prefill ranks or links that are always busy, else the decode pool, whose full ranks leave KV on the prefill side.
    """
    if run.prefill_summary.busy_share > _ALWAYS:
        return "prefill ranks compute without a pause, so give the prefill pool more GPUs"
    if max(run.simulation.sender_busy_share, run.simulation.receiver_busy_share) > _ALWAYS:
        return "KV is on the links all the time, so use a faster network or fewer cached bytes (--kv fp8)"
    return "prompts wait for room on the decode side, so give the decode pool more GPUs or --decode-max-num-seqs"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
