"""Facts of a residency comparison: what `experts residency --json` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.model import ModelConfig
    from planner.small import Comparison, Estimate, Machine

Facts = dict[str, Any]


def residency_facts(model: ModelConfig, machine: Machine, found: Comparison, context: int, batch: int) -> Facts:
    """Policies from fastest to slowest decode, what binds each, and why others are out."""
    from planner.small import PAST_ERROR

    return {
        "model": model.name,
        "system": machine.system.name,
        "num_gpus": machine.num_gpus,
        "context_tokens": context,
        "batch": batch,
        "expert_format": model.format_of("expert"),
        "hbm_bytes_for_experts": round(found.tiers.hbm_bytes),
        "other_hbm_bytes": round(found.estimates[0].other_hbm_bytes),
        "tiers": [
            {
                "name": tier.name,
                "bytes_per_s": tier.bytes_per_s,
                "latency_s": tier.latency_s,
                "capacity_bytes": round(tier.capacity_bytes),
            }
            for tier in found.tiers.backing
        ],
        "cpu_bytes_per_s": found.tiers.cpu.bytes_per_s if found.tiers.cpu else None,
        "policies": [_policy_facts(answer) for answer in found.estimates],
        "rejected": dict(found.rejected),
        "past_error": PAST_ERROR,
    }


def _policy_facts(answer: Estimate) -> Facts:
    return {
        "policy": answer.residency.policy,
        "meaning": answer.residency.row.meaning,
        "decode_tok_per_s": answer.decode_tok_per_s,
        "prefill_tok_per_s": answer.prefill_tok_per_s,
        "resident_experts_per_layer": answer.held.resident,
        "num_experts_per_layer": answer.held.num_experts,
        "hit_rate": answer.hit_rate,
        "miss_bytes_per_token": round(answer.miss_bytes_per_token),
        "bytes_by_tier": {name: round(size) for name, size in answer.bytes_by_tier.items()},
        "decode_s": answer.decode_s,
        "decode_terms_s": dict(answer.terms),
        "bound": answer.bound,
        "prefill_bound": answer.prefill_bound,
        "origin_share": dict(answer.origin_share),
    }
