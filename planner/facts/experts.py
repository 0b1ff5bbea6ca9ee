"""Facts of the routed experts of a run: how they were treated, how even the ranks were, what was dropped."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from planner.deployment import Run
    from planner.experts import ExpertSettings
    from planner.outside import Outside

Facts = dict[str, Any]
_BINDING_GAIN = 0.03
"""Capacity another placement would add from which placement is named as a constraint."""
BINDING_DROPS = 0.01
"""Share of dropped assignments from which a capacity limit is named as a constraint."""


def settings_facts(settings: ExpertSettings) -> Facts:
    """What the user chose, None where records or the engine decide."""
    from planner.facts.residency import reuse_name

    limit = settings.limit
    return {
        "skew": settings.skew.name if settings.skew else None,
        "placement": settings.placement_name,
        "capacity_rule": limit.rule if limit else None,
        "capacity_factor": limit.factor if limit else None,
        "top_k": settings.top_k,
        "top_k_spread": settings.top_k_spread,
        "drift": asdict(settings.drift) if settings.drift else None,
        "rebalance_steps": settings.rebalance_steps,
        "rebalance_async": settings.rebalance_async,
        "residency_policy": settings.residency.policy if settings.residency else None,
        "dram_bytes": settings.dram_bytes,
        "nvme_bytes": settings.nvme_bytes,
        "gpus_per_root": settings.gpus_per_root,
        "reuse": reuse_name(settings.reuse),
        "host": settings.host.name if settings.host else None,
    }


def expert_facts(run: Run) -> Facts | None:
    """How the ranks shared the experts in the steps of `run`; None for dense models.

    Loads are means over decode steps and over steps with prompts, drop rates means over tokens.
    """
    drawn, steps = run.expert_steps, run.simulation.steps
    if drawn is None or not len(steps):
        return None
    tokens = steps.prefill_tokens + steps.decode_seqs * run.deployment.tactics.query_tokens
    phases = {"decode": steps.prefill_tokens == 0, "prefill": steps.prefill_tokens > 0}
    mean = {name: _means(drawn, rows) for name, rows in phases.items() if rows.any()}
    weight = tokens / max(int(tokens.sum()), 1)
    return settings_facts(run.deployment.experts) | {
        "redundant_experts": run.deployment.layout.redundant_experts,
        "ep": run.deployment.layout.ep,
        "experts_per_rank": _local(run),
        **{f"{key}_{phase}": value for phase, values in mean.items() for key, value in values.items()},
        "drop_rate": float((drawn.drop_rate * weight).sum()),
        "drop_rate_worst_step": float(drawn.drop_rate.max()),
        "fully_dropped_rate": float((drawn.fully_dropped_rate * weight).sum()),
        "drop_rate_worst_layer": drawn.worst_layer_drop_rate,
        "slot_utilisation": float((drawn.slot_utilisation * weight).sum()),
        "residency": _residency(run),
        "num_rebalances": run.num_rebalances,
        "rebalance_stall_s": run.rebalance_stall_s,
        "rebalance_moved_bytes": run.rebalance_moved_bytes,
    }


def _residency(run: Run) -> Facts | None:
    """Where the experts lie and what fetching them came to; None when all are in HBM."""
    away, drawn, steps = run.deployment.offload, run.expert_steps, run.simulation.steps
    if away is None or drawn is None:
        return None
    decoding = steps.prefill_tokens == 0
    generated = max(int(steps.decode_seqs[decoding].sum()), 1)
    return {
        "policy": away.residency.policy,
        "resident_experts_per_layer": away.held.resident,
        "num_experts_per_layer": away.held.num_experts,
        "bytes_by_tier": {k: round(v) for k, v in away.bytes_by_tier().items()},
        "hit_rate_decode": float(drawn.hit_rate[decoding].mean()) if decoding.any() else None,
        "miss_bytes_per_output_token": float(drawn.miss_bytes[decoding].sum()) / generated,
        "cpu_bytes_per_output_token": float(drawn.cpu_bytes[decoding].sum()) / generated,
    }


def expert_warnings(run: Run) -> list[str]:
    """Why a capacity limit is doubtful for the model of `run`, and what a dropless engine's buffer does."""
    from planner.capacity import QUALITY_NOTE, caution

    deployment = run.deployment
    doubt = caution(deployment.model, deployment.experts.limit)
    warnings = [f"{doubt.level.upper()}: {doubt.text}."] if doubt else []
    if deployment.offload is not None:
        policy = deployment.offload.residency
        warnings.append(
            f"Experts outside HBM by {policy.policy} ({policy.row.meaning}) is what {policy.row.engines} offers; the "
            f"times rest on kernels and memory rule of {deployment.engine.name}."
        )
    dropped = run.expert_steps is not None and bool(run.expert_steps.drop_rate.max(initial=0.0) > 0)
    return warnings + ([QUALITY_NOTE] if dropped else [])


def expert_binding(experts: Facts | None, balance: Facts | None) -> str:
    """What of the experts binds besides the step: their placement, a capacity limit, or where they live."""
    said = ""
    best = max(balance["options"], key=lambda option: float(option["gain"])) if balance else None
    if best and best["gain"] > _BINDING_GAIN:
        copies = f" with {best['redundant_experts']} redundant experts" if best["redundant_experts"] else ""
        said += f"; placement binds too: {best['placement']}{copies} would serve {best['gain']:.0%} more"
    if experts and experts["drop_rate"] > BINDING_DROPS:
        said += f"; capacity binds: {experts['drop_rate']:.1%} of assignments are dropped"
    if experts and experts["residency"]:
        away = experts["residency"]
        held = f"{away['resident_experts_per_layer']} of {away['num_experts_per_layer']}"
        said += f"; memory binds: {held} experts per layer are in HBM"
    return said


def _means(drawn: Any, rows: Any) -> dict[str, float]:
    return {name: float(np.mean(getattr(drawn, name)[rows])) for name in ("max_over_mean", "active_experts")}


def _local(run: Run) -> int:
    moe, layout = run.deployment.model.moe, run.deployment.layout
    return (moe.num_experts + layout.redundant_experts) // layout.ep if moe else 0


def outside_facts(found: Outside) -> Facts:
    """Residency policies on one cluster, fastest decode first, and why the others are out."""
    policies = found.comparison.estimates if found.comparison else ()
    return {
        "cluster": found.cluster.name,
        "batch": found.batch,
        "context_tokens": found.context,
        "policies": [
            {
                "policy": e.residency.policy,
                "meaning": e.residency.row.meaning,
                "is_offered": e.residency.row.is_offered,
                "offered_by": e.residency.row.engines,
                "decode_tok_per_s": e.decode_tok_per_s,
                "prefill_tok_per_s": e.prefill_tok_per_s,
                "resident_experts_per_layer": e.held.resident,
                "num_experts_per_layer": e.held.num_experts,
                "hit_rate": e.hit_rate,
                "bytes_by_tier": {name: round(size) for name, size in e.bytes_by_tier.items()},
                "bound": e.bound,
            }
            for e in policies
        ],
        "rejected": dict(found.comparison.rejected) if found.comparison else {},
        "reason": found.reason,
    }


def balance_facts(run: Run) -> Facts | None:
    """Placements around `run`, and what a change of traffic does to a learned one; None where all is on one rank.

    `uneven_s` is what uneven experts cost of a decode step, `gain` the capacity over that of the own placement, less 1.
    """
    from planner.balance import balance_options, staleness, uneven_s

    options, stale = balance_options(run), staleness(run)
    if not options or stale is None:
        return None
    own = options[0]
    return {
        "uneven_s": uneven_s(run),
        "options": [
            {
                "placement": option.deployment.experts.placement_name,
                "redundant_experts": option.deployment.layout.redundant_experts,
                "max_over_mean": option.max_over_mean,
                "decode_s": option.decode_s,
                "kv_tokens": option.kv_tokens,
                "requests_per_s": option.capacity_per_s,
                "gain": option.capacity_per_s / own.capacity_per_s - 1 if own.capacity_per_s else 0.0,
            }
            for option in options
        ],
        "staleness": asdict(stale),
    }
