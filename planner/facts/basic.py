"""Facts of single things: a model, a layout, a memory ledger, a fit, a simulation, a hardware profile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from planner import __version__

if TYPE_CHECKING:
    from planner.deployment import Run
    from planner.engine import Engine
    from planner.fit import Fit
    from planner.hardware import System
    from planner.layout import Layout
    from planner.memory import MemoryUse
    from planner.metrics import Summary
    from planner.model import ModelConfig
    from planner.workload import Slo

Facts = dict[str, Any]
_STATISTICS = ("mean", "p50", "p95", "p99")


def model_facts(model: ModelConfig) -> Facts:
    """What `describe --json` prints."""
    from planner.model import describe_layers

    return {
        "name": model.name,
        "architecture": model.architecture,
        "total_params": model.total_params,
        "active_params_with_embeddings": model.active_params_with_embeddings,
        "active_params_without_input_embedding": model.active_params_without_input_embedding,
        "active_params_without_embeddings": model.active_params_without_embeddings,
        "params_by_part": dict(model.params_by_part()),
        "mtp_params": model.mtp_params,
        "weight_bytes": model.weight_bytes,
        "mtp_bytes": model.mtp_bytes,
        "formats": dict(model.formats),
        "kv_format": model.kv_format,
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "kv_growing_bytes_per_token": model.kv_growing_bytes_per_token,
        "state_bytes_per_sequence": model.state_bytes_per_sequence,
        "num_layers": model.num_layers,
        "num_moe_layers": model.num_moe_layers,
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "hidden": model.hidden,
        "vocab": model.vocab,
        "max_context": model.max_context,
        "layers": [{"count": count, "kind": text} for count, text in describe_layers(model)],
        "notes": list(model.notes),
        "source": model.source,
    }


def layout_facts(layout: Layout) -> Facts:
    """Degrees of parallelism and GPU count of a layout."""
    return {
        "name": str(layout),
        "family": layout.family,
        "tp": layout.tp,
        "pp": layout.pp,
        "ep": layout.ep,
        "attention_dp": layout.attention_dp,
        "moe_tp": layout.moe_tp,
        "replicas": layout.replicas,
        "num_gpus": layout.num_gpus,
    }


def whole_bytes(terms: Mapping[str, float]) -> dict[str, int]:
    """Ledger terms rounded to bytes; the reserve takes up the rounding so that they still sum to the whole."""
    rounded = {term: round(value) for term, value in terms.items()}
    if rounded.get("reserve"):
        rounded["reserve"] += round(sum(terms.values())) - sum(rounded.values())
    return rounded


def slo_facts(slo: Slo | None) -> list[Facts]:
    """Objectives as metric, statistic and limit [s]."""
    return [
        {"metric": o.metric, "statistic": o.statistic, "limit_s": o.limit_s} for o in (slo.objectives if slo else ())
    ]


def memory_facts(use: MemoryUse) -> Facts:
    """Ledger of one GPU."""
    return {
        "terms": whole_bytes(use.terms),
        "capacity_bytes": round(use.capacity_bytes),
        "budget_bytes": round(use.budget_bytes),
        "kv_tokens_per_rank": use.kv_tokens,
        "kv_bytes_per_token": use.kv_bytes_per_token,
    }


def latency_facts(summary: Summary, metric: str) -> Facts:
    """Mean and percentiles [s] of one latency metric, None where nothing was measured."""
    statistics = getattr(summary, f"{metric}_s")
    values = {name: statistics.value(name) for name in _STATISTICS}
    low, high = statistics.mean_interval
    values |= {"mean_low": low, "mean_high": high}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def fit_facts(model: ModelConfig, system: System, engine: Engine, answer: Fit) -> Facts:
    """What `fit --json` prints."""
    smaller = answer.smaller
    return {
        "model": model.name,
        "system": system.name,
        "engine": f"{engine.name} {engine.version}",
        "fits": answer.fits,
        "num_gpus_min": answer.num_gpus if answer.fits else None,
        "layout": layout_facts(answer.layout),
        "bytes_per_gpu": whole_bytes(answer.use.terms),
        "capacity_bytes": round(answer.use.capacity_bytes),
        "budget_bytes": round(answer.use.budget_bytes),
        "kv_tokens": answer.kv_tokens if answer.fits else 0,
        "context_tokens": answer.context_tokens,
        "concurrent_requests": answer.concurrent_requests if answer.fits else 0,
        "breaking_term": answer.breaking_term,
        "breaking_num_gpus": (smaller[0].replica_gpus if smaller else None) if answer.fits else answer.num_gpus,
        "breaking_bytes_per_gpu": whole_bytes(smaller[1].terms) if smaller else None,
        "alternatives": [
            {"layout": str(layout), "family": layout.family, "kv_tokens": use.kv_tokens * layout.attention_dp}
            for layout, use in answer.alternatives
        ],
        "max_num_seqs": answer.limits.max_num_seqs,
        "max_batched_tokens": answer.limits.max_batched_tokens,
        "weight_bytes": model.weight_bytes,
        "notes": list(model.notes),
    }


def simulation_facts(run: Run, command: str) -> Facts:
    """What `simulate --json` prints."""
    from planner.facts.experts import expert_facts, expert_warnings
    from planner.facts.failures import incident_facts, incident_warnings
    from planner.facts.launch import launch_facts
    from planner.facts.prices import price_facts
    from planner.facts.series import cdf_facts, timeline_facts
    from planner.facts.sharing import sharing_facts, sharing_warnings
    from planner.facts.tactics import run_tactic_facts, tactic_warnings

    summary, deployment = run.summary, run.deployment
    return {
        "model": deployment.model.name,
        "cluster": deployment.cluster.name,
        "layout": layout_facts(deployment.layout),
        "engine": f"{deployment.engine.name} {deployment.engine.version}",
        "workload": str(run.workload),
        "settings": {
            "max_num_seqs": deployment.limits.max_num_seqs,
            "max_batched_tokens": deployment.limits.max_batched_tokens,
            "moe_backend": deployment.backend,
            "kv_format": deployment.model.kv_format,
        },
        "meets_slo": run.meets_slo if run.slo else None,
        "worst_objective": run.worst_objective,
        "worst_ratio": run.worst_ratio,
        "ttft_s": latency_facts(summary, "ttft"),
        "tpot_s": latency_facts(summary, "tpot"),
        "e2e_s": latency_facts(summary, "e2e"),
        "output_tok_per_s": _finite(run.output_tok_per_s),
        "output_tok_per_s_per_gpu": _finite(run.output_tok_per_s / run.num_gpus),
        "requests_per_s": _finite(summary.requests_per_s),
        "goodput_requests_per_s": _finite(summary.goodput_requests_per_s),
        **price_facts(run.token_costs),
        "saturation": summary.saturation,
        "mean_decode_seqs_per_rank": _finite(summary.mean_decode_seqs_per_rank),
        "kv_utilisation_peak": summary.kv_utilisation_peak,
        "num_preemptions": summary.num_preemptions,
        "num_rejected": summary.num_rejected,
        "num_requests": len(run.simulation.requests),
        "num_measured": summary.num_measured,
        "num_steps": run.simulation.num_steps,
        "simulated_s": run.simulation.simulated_s,
        "memory": memory_facts(deployment.memory),
        "experts": expert_facts(run),
        **run_tactic_facts(run),
        **sharing_facts(run),
        **({"failures": incident_facts(run.failures)} if run.failures else {}),
        "cdf": cdf_facts(run),
        "timeline": timeline_facts(run),
        "slo": slo_facts(run.slo),
        "launch": [launch_facts(deployment)],
        "warnings": [
            *expert_warnings(run),
            *tactic_warnings(deployment.tactics),
            *sharing_warnings(run),
            *incident_warnings(run),
        ],
        "command": command,
        "versions": {"moeplan": __version__},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def profile_rows() -> list[Facts]:
    """What `profiles list --json` prints."""
    from planner.economics import gpu_hour
    from planner.hardware import measured_engines, system, systems

    rows = []
    for name in systems():
        profile, engines = system(name), measured_engines(name)
        price = gpu_hour(profile)
        rows.append(
            {
                "name": name,
                "vendor": profile.gpu.vendor,
                "measured": bool(engines),
                "engines": list(engines),
                "hbm_bytes": profile.gpu.hbm_bytes,
                "hbm_bytes_per_s": profile.gpu.hbm_bytes_per_s,
                "flop_per_s": dict(profile.gpu.flop_per_s),
                "gpus_per_node": profile.gpus_per_node,
                "rental_usd_per_gpu_hour": price.usd if price else None,
                "price_as_of": price.as_of if price else None,
            }
        )
    return rows


def profile_facts(name: str) -> Facts:
    """What `profiles show --json` prints: every number of the profile with its source."""
    from dataclasses import asdict

    from planner.hardware import measured_engines, system

    profile = system(name)
    facts = asdict(profile)
    facts["gpu"]["flop_per_s"] = dict(profile.gpu.flop_per_s)
    facts["gpu"]["matmul_flop_per_s"] = dict(profile.gpu.matmul_flop_per_s)
    facts["sources"] = dict(profile.sources)
    return facts | {"measured_engines": list(measured_engines(profile.name))}
