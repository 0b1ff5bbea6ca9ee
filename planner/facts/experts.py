"""Facts of the routed experts of a run: how they were treated, how even the ranks were, what was dropped."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from planner.balance import BalanceOption, Staleness
    from planner.deployment import Run
    from planner.experts import ExpertSettings

Facts = dict[str, Any]


def settings_facts(settings: ExpertSettings) -> Facts:
    """What the user chose, None where records or the engine decide."""
    limit = settings.limit
    return {
        "skew": settings.skew.name if settings.skew else None,
        "placement": settings.placement,
        "capacity_rule": limit.rule if limit else None,
        "capacity_factor": limit.factor if limit else None,
        "top_k": settings.top_k,
        "top_k_spread": settings.top_k_spread,
        "drift": asdict(settings.drift) if settings.drift else None,
        "rebalance_steps": settings.rebalance_steps,
        "rebalance_async": settings.rebalance_async,
    }


def expert_facts(run: Run) -> Facts | None:
    """How the ranks shared the experts in the steps of `run`; None for dense models.

    Loads are means over decode steps and over steps with prompts, drop rates means over tokens.
    """
    drawn, steps = run.expert_steps, run.simulation.steps
    if drawn is None or not len(steps):
        return None
    tokens = steps.prefill_tokens + steps.decode_seqs
    phases = {"decode": steps.prefill_tokens == 0, "prefill": steps.prefill_tokens > 0}
    mean = {name: _means(drawn, rows) for name, rows in phases.items() if rows.any()}
    weight = tokens / max(int(tokens.sum()), 1)
    return settings_facts(run.deployment.experts) | {
        "redundant_experts": run.deployment.layout.redundant_experts,
        "experts_per_rank": _local(run),
        **{f"{key}_{phase}": value for phase, values in mean.items() for key, value in values.items()},
        "drop_rate": float((drawn.drop_rate * weight).sum()),
        "drop_rate_worst_step": float(drawn.drop_rate.max()),
        "fully_dropped_rate": float((drawn.fully_dropped_rate * weight).sum()),
        "num_rebalances": run.num_rebalances,
        "rebalance_stall_s": run.rebalance_stall_s,
    }


def expert_warnings(run: Run) -> list[str]:
    """Why a capacity limit is doubtful for the model of `run`, and what a dropless engine's buffer does."""
    from planner.capacity import QUALITY_NOTE, caution

    deployment = run.deployment
    doubt = caution(deployment.model, deployment.experts.limit)
    warnings = [f"{doubt.level.upper()}: {doubt.text}."] if doubt else []
    dropped = run.expert_steps is not None and bool(run.expert_steps.drop_rate.max(initial=0.0) > 0)
    return warnings + ([QUALITY_NOTE] if dropped else [])


def _means(drawn: Any, rows: Any) -> dict[str, float]:
    return {name: float(np.mean(getattr(drawn, name)[rows])) for name in ("max_over_mean", "active_experts")}


def _local(run: Run) -> int:
    moe, layout = run.deployment.model.moe, run.deployment.layout
    return (moe.num_experts + layout.redundant_experts) // layout.ep if moe else 0


def balance_facts(options: tuple[BalanceOption, ...], stale: Staleness | None) -> Facts | None:
    """Placements around the winner, and what a change of traffic does to a learned one; None where all is on one rank.

    `gain` is the capacity over that of the winner's own placement, less 1.
    """
    if not options or stale is None:
        return None
    own = options[0]
    return {
        "options": [
            {
                "placement": option.deployment.experts.placement,
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
