"""The dense model to compare a mixture of experts with: same attention, depth and width, one dense FFN instead.

Everything but the feed-forward blocks stays, KV cache included, so a difference is the experts' doing. The FFN is
as wide as the size asks for, which for large sizes is wider than anybody builds (3.5 to 7 times the hidden width
is usual); its bytes and FLOP, which decide the step time, are those of the size all the same.
"""

from __future__ import annotations

import math
from dataclasses import replace

from planner.errors import InputError
from planner.model import ModelConfig
from planner.model.config import Layer, Moe, Weight
from planner.model.feed_forward import dense
from planner.variants.ranking import moe_of

_STEP = 16
"""Widths are multiples of this, as kernels want them."""


def equivalent_params(model: ModelConfig) -> float:
    """Parameters of a dense model of about the same quality: sqrt(total x active).

    A rule of thumb of practitioners, no law: discussed with examples (Qwen1.5-MoE near 7B, DBRX near 70B) in
    r/LocalLLaMA, "Geometric Mean Prediction of MoE performance", 2024-03-28. Training data moves it at will.

    >>> from planner.model import load
    >>> round(equivalent_params(load("mixtral-8x7b")) / 1e9, 1)
    24.5
    """
    moe_of(model)
    return math.sqrt(float(model.total_params) * float(model.active_params_with_embeddings))


def dense_of_active(model: ModelConfig) -> ModelConfig:
    """The dense model that computes what one token of `model` computes, routers left out.

    Its FFN is as wide as the picked and the shared experts together: 18,432 for DeepSeek-V3, the width of its own
    dense layers.
    """
    moe_of(model)
    built = {layer: _dense_layer(model, layer, _active_width(model, layer)) for layer, _ in model.layer_kinds}
    return _assembled(model, built, f"dense of {model.name}'s active parameters")


def dense_of_size(model: ModelConfig, total_params: float) -> ModelConfig:
    """The dense model with the attention and depth of `model` and `total_params` parameters.

    Raises InputError when attention, embeddings and dense layers alone have more.
    """
    moe_of(model)
    fixed = dense_params_beside_moe(model)
    per_width = sum(model.hidden * layer.moe.num_matrices for layer in model.layers if layer.moe)
    width = round((total_params - fixed) / per_width / _STEP) * _STEP
    if width < _STEP:
        raise InputError(
            f"a dense model of {total_params / 1e9:g}B on the attention and embeddings of {model.name}: they alone "
            f"have {fixed / 1e9:.3g}B. Ask for more than {(fixed + _STEP * per_width) / 1e9:.3g}B."
        )
    built = {layer: _dense_layer(model, layer, width) for layer, _ in model.layer_kinds}
    return _assembled(model, built, f"dense {total_params / 1e9:.3g}B on {model.name}'s attention")


def dense_params_beside_moe(model: ModelConfig) -> int:
    """Parameters of `model` that a dense version keeps: all but routers, experts, shared experts and latent maps."""
    kept = sum(w.params for layer in model.layers for w in layer.weights if not _is_moe_weight(layer, w))
    return kept + sum(w.params for w in model.weights)


def _active_width(model: ModelConfig, layer: Layer) -> int:
    moe = layer.moe
    if moe is None:
        return 0
    return round(moe.active_experts * moe.expert_width * moe.expert_hidden / model.hidden) + moe.shared_width


def _dense_layer(model: ModelConfig, layer: Layer, width: int) -> Layer:
    """`layer` with a dense FFN of `width`, in the experts' format, instead of its routed experts."""
    moe = layer.moe
    if moe is None:
        return layer
    block, weights = dense(model.hidden, width, num_matrices=moe.num_matrices)
    fmt = next((w.fmt for w in layer.weights if w.part == "expert" and w.fmt), model.format_of("expert"))
    kept = tuple(w for w in layer.weights if not _is_moe_weight(layer, w))
    ffns = tuple(block if isinstance(f, Moe) else f for f in layer.ffns)
    return replace(layer, ffns=ffns, weights=kept + tuple(replace(w, fmt=fmt) for w in weights))


def _is_moe_weight(layer: Layer, weight: Weight) -> bool:
    return layer.moe is not None and (
        weight.part in ("router", "expert", "shared_expert") or "latent_proj" in weight.name
    )


def _assembled(model: ModelConfig, built: dict[Layer, Layer], name: str) -> ModelConfig:
    return replace(
        model,
        name=name,
        layers=tuple(built[layer] for layer in model.layers),
        mtp=(),
        router_bias_buffers=0,
        mtp_router_bias_buffers=0,
    )
