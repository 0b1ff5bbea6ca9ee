"""Facts of a residency comparison: what `experts residency --json` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.experts import ExpertSettings
    from planner.model import ModelConfig
    from planner.residency import Reuse
    from planner.small import Comparison, Estimate, Machine

Facts = dict[str, Any]


def residency_facts(
    model: ModelConfig, machine: Machine, found: Comparison, context: int, batch: int, experts: ExpertSettings
) -> Facts:
    """Policies from fastest to slowest decode, what binds each, and why others are out.

    `best` is the fastest that an engine offers, the fastest of all where none does.
    """
    from planner.small import PAST_ERROR

    cpu, offered = found.tiers.cpu, [e for e in found.estimates if e.residency.row.is_offered]
    return {
        "model": model.name,
        "system": machine.system.name,
        "num_gpus": machine.num_gpus,
        "context_tokens": context,
        "batch": batch,
        "expert_format": model.format_of("expert"),
        "skew": experts.skew.name if experts.skew else None,
        "top_k": experts.top_k,
        "reuse": reuse_name(experts.reuse),
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
        "host": cpu.host if cpu else None,
        "cpu_bytes_per_s": cpu.bytes_per_s if cpu else None,
        "llama_bytes_per_s": cpu.llama_bytes_per_s / cpu.num_sockets if cpu else None,
        "best": (offered or found.estimates)[0].residency.policy,
        "policies": [_policy_facts(answer) for answer in found.estimates],
        "rejected": dict(found.rejected),
        "past_error": PAST_ERROR,
    }


def reuse_name(reuse: Reuse) -> str:
    """Name of the preset, or how often the routing of a record repeats itself."""
    from planner.residency import REUSES

    return next((name for name, preset in REUSES.items() if preset == reuse), f"a record (repeat {reuse.repeat:g})")


def _policy_facts(answer: Estimate) -> Facts:
    row = answer.residency.row
    return {
        "policy": answer.residency.policy,
        "meaning": row.meaning,
        "offered_by": row.engines,
        "is_offered": row.is_offered,
        "decode_tok_per_s": answer.decode_tok_per_s,
        "tok_per_s_by_reuse": dict(answer.tok_per_s_by_reuse),
        "prefill_tok_per_s": answer.prefill_tok_per_s,
        "resident_experts_per_layer": answer.held.resident,
        "num_experts_per_layer": answer.held.num_experts,
        "hit_rate": answer.hit_rate,
        "miss_bytes_per_token": round(answer.miss_bytes_per_token),
        "cpu_bytes_per_token": round(answer.cpu_bytes_per_token),
        "bytes_by_tier": {name: round(size) for name, size in answer.bytes_by_tier.items()},
        "decode_s": answer.decode_s,
        "decode_terms_s": dict(answer.terms),
        "bound": answer.bound,
        "prefill_bound": answer.prefill_bound,
        "origin_share": dict(answer.origin_share),
    }
