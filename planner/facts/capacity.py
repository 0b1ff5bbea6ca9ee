"""Facts of a capacity limit: what `experts drops` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.capacity import POLICIES, QUALITY_NOTE, CapacityLimit, DrawnDrops, simulate
from planner.errors import InputError
from planner.routing import inclusion_from_load, popularity, skew_for
from planner.routing.experts import check_picks

Facts = dict[str, Any]
Floats = NDArray[np.float64]
_LAYERS = 16
"""Layers behind a named skew: each has its own popularity."""
_ENGINES_NOTE = "vLLM, SGLang and TensorRT-LLM serve every token: there a limit is a dispatch buffer, not a drop."


@dataclass(frozen=True, slots=True)
class Step:
    """The step to judge: `tokens` of all `num_sources` together, `top_k` of `num_experts` per token."""

    num_experts: int
    top_k: int
    tokens: int
    num_sources: int = 1

    def __post_init__(self) -> None:
        for name, value in (("experts", self.num_experts), ("tokens", self.tokens), ("sources", self.num_sources)):
            if value < 1:
                raise InputError(f"--{name} {value}: a positive whole number is needed")
        check_picks(self.num_experts, self.top_k)
        if self.num_sources > self.tokens:
            raise InputError(f"--sources {self.num_sources}: at most one per token, {self.tokens} here")


def drops_facts(
    step: Step,
    limit: CapacityLimit,
    *,
    skew: str = "uniform",
    record: tuple[str, list[int], Floats] | None = None,
    reroute: bool = False,
    seed: int = 0,
) -> Facts:
    """What `limit` does to `step`, token by token, under a named skew or a `record` (source, layers, counts)."""
    uniform = record is None and skew == "uniform"
    layers = 1 if uniform else _LAYERS
    load = popularity(step.num_experts, step.top_k, skew, layers, seed) if record is None else record[2]
    drawn = simulate(limit, load, step.tokens, step.top_k, num_sources=step.num_sources, reroute=reroute, seed=seed)
    rule, policy = limit.rule_for(step.top_k), limit.policy_for(step.top_k)
    return {
        "capacity": drawn.capacity,
        "drop_rate": float(drawn.drop_rate.mean()),
        "fully_dropped_rate": float(drawn.fully_dropped_rate.mean()),
        "slot_utilisation": float(drawn.slot_utilisation.mean()),
        "capacity_scope": _scope(step, limit),
        "rule": limit.rule,
        "capacity_factor": limit.factor,
        "policy": policy,
        "experts": step.num_experts,
        "top_k": step.top_k,
        "tokens": step.tokens,
        "sources": step.num_sources,
        "popularity": skew if record is None else record[0],
        "padded": limit.is_padded(step.top_k),
        "processed_rows": float(drawn.processed_rows.mean()),
        "rerouted_rate": float(drawn.rerouted_rate.mean()),
        "max_over_mean": float(drawn.max_over_mean.mean()),
        "dropped_token_keeps": rule.lost,
        "gates": rule.gates,
        "interval": _interval(drawn),
        "if_skewed": _if_skewed(step, limit, seed) if uniform and not reroute else None,
        "per_layer": None if record is None else _per_layer(record[1], drawn),
        "note": _notes(step, limit, drawn, reroute),
        "source": rule.source,
    }


def _scope(step: Step, limit: CapacityLimit) -> str:
    rule = limit.rule_for(step.top_k)
    largest = int(limit.blocks(step.tokens, step.num_sources).max())
    if rule.scope == "device":
        return f"per device, all its {step.num_experts // step.num_sources} experts together"
    return f"per expert and {rule.scope} of {largest:,} tokens"


def _interval(drawn: DrawnDrops) -> Facts:
    """Where the middle 90 % of the simulated batches lie."""
    low, high = np.quantile(drawn.drop_rate, [0.05, 0.95])
    return {"share": 0.9, "drop_rate": [float(low), float(high)], "batches": int(drawn.drop_rate.size)}


def _per_layer(layers: list[int], drawn: DrawnDrops) -> list[Facts]:
    columns = ("drop_rate", "fully_dropped_rate", "slot_utilisation", "max_over_mean")
    means = {name: getattr(drawn, name).mean(axis=1) for name in columns}
    return [{"layer": layer, **{name: float(means[name][i]) for name in columns}} for i, layer in enumerate(layers)]


def _if_skewed(step: Step, limit: CapacityLimit, seed: int) -> Facts:
    """Drop rate of the skew real decode traffic shows, in expectation over layers."""
    law = skew_for(step.num_experts, "decode")
    q = inclusion_from_load(popularity(step.num_experts, step.top_k, law, _LAYERS, seed), step.top_k)
    counts = np.random.default_rng(seed).binomial(step.tokens, q)
    drops = limit.apply(counts, step.tokens, step.top_k, step.num_sources)
    return {"skew": law.name, "drop_rate": float(drops.drop_rate.mean())}


def _notes(step: Step, limit: CapacityLimit, drawn: DrawnDrops, reroute: bool) -> list[str]:
    rule, policy = limit.rule_for(step.top_k), limit.policy_for(step.top_k)
    largest, notes = int(limit.blocks(step.tokens, step.num_sources).max()), []
    if policy not in rule.policies:
        offered = " or ".join(rule.policies)
        notes.append(f"{limit.rule} offers {offered} only; {policy} ({POLICIES[policy]}) is a what-if.")
    if limit.factor <= 0:
        notes.append("Tutel's slots follow the largest need" + (", up to the factor's bound." if limit.factor else "."))
    elif not rule.factor_per_pick and step.top_k > 1:
        notes.append(f"{limit.rule} does not multiply by top-k: the even share needs a factor of {step.top_k}.")
    if rule.group_tokens is not None and largest > rule.group_tokens:
        sources = -(-step.tokens // rule.group_tokens)
        notes.append(f"{limit.rule} groups {rule.group_tokens:,} tokens by default: that is --sources {sources} here.")
    if step.num_sources > 1 and rule.scope != "device" and drawn.drop_rate.any():
        notes.append(f"Each {rule.scope} has slots of its own: one may drop while another's stay empty.")
    if reroute:
        notes.append("Rerouting to the next-ranked expert with room is a what-if on top of the rule.")
    if drawn.drop_rate.any():
        notes += [QUALITY_NOTE, _ENGINES_NOTE]
    return notes
