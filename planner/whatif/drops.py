"""What a capacity limit drops at the operating point of a layout."""

from __future__ import annotations

import numpy as np

from planner.deployment import Deployment
from planner.loads import Question as Load
from planner.loads import load_table
from planner.whatif.catalogue import Estimate


def load_of(deployment: Deployment, phase: str = "decode") -> Load:
    """How tokens of `phase` meet the experts of `deployment`."""
    cost = deployment.cost()
    assert deployment.model.moe is not None
    return cost.routed.question(cost.experts.router(deployment.model.moe), phase)


def drop_rate(deployment: Deployment, tokens: float, phase: str = "decode") -> float:
    """Share of token-expert assignments lost in a step of `tokens` of all ranks, mean over layers and draws."""
    table = load_table(load_of(deployment, phase))
    return float(np.interp(np.log(max(1.0, tokens)), np.log(table.question.knots), table.drop_rate.mean(axis=(1, 2))))


def dropped(chosen: Estimate) -> dict[str, float]:
    """Share of assignments lost by phase: decode at the running batch, prefill at the token budget; {} if unlimited."""
    deployment = chosen.candidate.deployment
    if deployment.model.moe is None or deployment.experts.limit is None:
        return {}
    decoding = max(1.0, chosen.candidate.batch) * deployment.layout.attention_dp
    sizes = {"decode": decoding, "prefill": float(deployment.limits.max_batched_tokens)}
    return {phase: drop_rate(deployment, tokens, phase) for phase, tokens in sizes.items()}
