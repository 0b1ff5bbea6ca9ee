"""Keep n of E experts: memory and speed of the smaller model, and the share of the traffic whose expert survives.

Merging experts down to the same count costs the same; it only differs in what the kept weights hold. REAP
(Lasby et al., ICLR 2026, openreview.net/forum?id=ukGxWd2aDG) finds pruning better than merging for generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from planner.errors import InputError
from planner.model import ModelConfig
from planner.model.config import Layer, Moe, Weight
from planner.routing import active_experts, inclusion_from_load
from planner.variants.decode import Variant
from planner.variants.ranking import Floats, moe_of, num_picks

_RISK = "merging to as many costs the same; quality is not predicted: evaluate on your own tasks before serving"


def prune(model: ModelConfig, keep: int) -> ModelConfig:
    """`model` with `keep` routed experts in every layer that has more; router rows go with their experts.

    Raises InputError when fewer would be left than a token picks, when nothing is removed, or when router groups
    would become uneven (DeepSeek's eight groups).
    """
    moe = moe_of(model)
    check_keep(moe, keep)
    name = f"{model.name}, {keep} of {moe.num_experts} experts"
    return with_experts(model, lambda num_experts: min(keep, num_experts), name)


def with_experts(model: ModelConfig, count: Callable[[int], int], name: str) -> ModelConfig:
    """`model` with `count(n)` routed experts in every layer that has n; router rows come and go with their experts."""
    layers = {layer: _resized_layer(layer, count) for layer, _ in model.layer_kinds}
    moe = moe_of(model)
    candidates = moe.num_experts + moe.identity_experts
    left = (count(moe.num_experts) + moe.identity_experts) / candidates
    return replace(
        model,
        name=name,
        layers=tuple(layers[layer] for layer in model.layers),
        mtp=_resized_weights(model.mtp, moe, count(moe.num_experts)),
        router_bias_buffers=round(model.router_bias_buffers * left),
        mtp_router_bias_buffers=round(model.mtp_router_bias_buffers * left),
    )


def check_keep(moe: Moe, keep: int) -> None:
    """Raise InputError unless `keep` experts are a valid smaller set of `moe`."""
    step = moe.num_groups
    fewest = max(moe.top_k, step * -(-moe.top_k // moe.top_groups) if step > 1 else moe.top_k)
    if not fewest <= keep < moe.num_experts:
        raise InputError(
            f"keep {keep} of {moe.num_experts} experts: a token picks {moe.top_k}, so keep {fewest} to "
            f"{moe.num_experts - step}"
        )
    if keep % step:
        near = " or ".join(str(n) for n in (keep // step * step, -(-keep // step) * step) if n >= fewest)
        raise InputError(f"keep {keep} leaves the {step} router groups uneven: keep {near}")


def _resized_layer(layer: Layer, count: Callable[[int], int]) -> Layer:
    moe = layer.moe
    if moe is None or count(moe.num_experts) == moe.num_experts:
        return layer
    ffns = tuple(replace(f, num_experts=count(moe.num_experts)) if isinstance(f, Moe) else f for f in layer.ffns)
    return replace(layer, ffns=ffns, weights=_resized_weights(layer.weights, moe, count(moe.num_experts)))


def _resized_weights(weights: tuple[Weight, ...], moe: Moe, num_experts: int) -> tuple[Weight, ...]:
    candidates = moe.num_experts + moe.identity_experts
    resized = []
    for weight in weights:
        if weight.part == "expert" and weight.copies == moe.num_experts:
            weight = replace(weight, copies=num_experts)
        elif weight.part == "router" and weight.rows == candidates:
            weight = replace(weight, rows=num_experts + moe.identity_experts)
        resized.append(weight)
    return tuple(resized)


def traffic_kept(picks: Floats, keep: int) -> float:
    """Share of the assignments whose expert is among the `keep` most popular; `picks` [layers, experts], ranked."""
    return float(picks[:, :keep].sum() / picks.sum())


def experts_read(picks: Floats, keep: int, tokens: Sequence[int]) -> list[float]:
    """Distinct experts per layer that a step of `tokens` reads, tokens of removed experts going to the kept ones."""
    top_k = round(float(picks.sum(axis=1).mean()))
    rerouted = inclusion_from_load(picks[:, :keep], top_k)
    return [float(n) for n in active_experts(np.asarray(tokens, dtype=float), rerouted).mean(axis=0)]


def pruned(model: ModelConfig, keep: int, picks: Floats, batches: Sequence[int]) -> Variant:
    """The variant with the `keep` most popular experts of each layer; `picks` [layers, experts] are ranked."""
    smaller = prune(model, keep)
    kept = traffic_kept(picks, keep)
    return Variant(
        f"keep {keep} of {moe_of(model).num_experts} experts",
        smaller,
        f"{kept:.0%} of assignments keep their expert; {_RISK}",
        details={
            "kept_experts": keep,
            "traffic_kept": kept,
            "picks_per_token": num_picks(moe_of(model)),
            "active_experts_per_layer": experts_read(picks, keep, batches),
        },
    )
