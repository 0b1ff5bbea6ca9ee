"""Experts in two formats: the popular ones precise, the rest small.

Memory falls with the number of cold experts; bytes read per step fall less, because hot experts are read more
often. Each layer then runs two grouped GEMMs, one per format, which small batches feel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from planner.cost import StepCost
from planner.errors import InputError
from planner.measurements import Curve
from planner.model import ModelConfig, compute_format
from planner.model.config import Layer, Moe, Part, Weight
from planner.model.precision import check_format, stored_bytes
from planner.routing import active_experts
from planner.variants.decode import Variant
from planner.variants.ranking import Floats, moe_of, num_picks

DEFAULT_COLD = "int4_g128"


@dataclass(frozen=True, slots=True)
class Mix:
    """The `num_hot` most popular experts of each layer in format `hot`, the others in `cold`."""

    num_hot: int
    hot: str
    cold: str


def parse_mix(text: str, model: ModelConfig) -> Mix:
    """Mix from `0.25:fp8/int4_g128`, a share or (from 1 on) a number of hot experts, then both formats.

    Without formats the hot experts keep the checkpoint's and the cold ones take int4 in groups of 128. Raises
    InputError when the number cannot be read or leaves no hot or no cold expert, ModelConfigError on a format.
    """
    moe = moe_of(model)
    number, _, formats = text.strip().partition(":")
    hot, _, cold = formats.partition("/")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if 1 <= value < math.inf and value != int(value):
        raise InputError(f"hot experts {text!r}: {number} is no whole number; give a share below 1 or a count")
    num_hot = int(value) if 1 <= value < math.inf else round(value * moe.num_experts) if 0 < value < 1 else 0
    if not 1 <= num_hot < moe.num_experts:
        raise InputError(
            f"hot experts {text!r}: give a share between 0 and 1 or 1 to {moe.num_experts - 1} of the "
            f"{moe.num_experts} experts, such as 0.25:fp8/int4_g128"
        )
    return Mix(num_hot, check_format(hot or model.format_of("expert")), check_format(cold or DEFAULT_COLD))


def split_formats(model: ModelConfig, mix: Mix) -> ModelConfig:
    """`model` whose expert matrices are stored in the two formats of `mix`."""
    split = {layer: _split_layer(layer, mix) for layer, _ in model.layer_kinds}
    formats: tuple[tuple[Part, str], ...] = tuple(
        (part, mix.hot if part == "expert" else fmt) for part, fmt in model.formats
    )
    return replace(
        model,
        name=f"{model.name}, {mix.num_hot} experts {mix.hot}, others {mix.cold}",
        layers=tuple(split[layer] for layer in model.layers),
        formats=formats,
    )


def _split_layer(layer: Layer, mix: Mix) -> Layer:
    moe = layer.moe
    if moe is None or moe.num_experts <= mix.num_hot:
        return layer
    weights: list[Weight] = []
    for weight in layer.weights:
        if weight.part == "expert" and weight.is_matrix:
            weights.append(replace(weight, copies=mix.num_hot, fmt=mix.hot))
            weights.append(replace(weight, copies=weight.copies - mix.num_hot, fmt=mix.cold))
        else:
            weights.append(weight)
    return replace(layer, weights=tuple(weights))


def expert_bytes_read(model: ModelConfig, mix: Mix, picks: Floats, tokens: Sequence[int]) -> list[float]:
    """Bytes of expert weights that a step of `tokens` reads over all layers and ranks, each read expert once.

    sum over layers and formats of bytes per expert x sum_i (1 - (1 - q_i)^T) (handbook serving 6.3); `picks`
    [layers, experts] are ranked.
    """
    steps = np.asarray(tokens, dtype=float)
    hot = active_experts(steps, picks[:, : mix.num_hot]).mean(axis=0)
    cold = active_experts(steps, picks[:, mix.num_hot :]).mean(axis=0)
    total = np.zeros(len(tokens))
    for layer, count in model.layer_kinds:
        if layer.moe:
            total += count * (hot * expert_bytes(layer, mix.hot) + cold * expert_bytes(layer, mix.cold))
    return [float(n) for n in total]


def expert_bytes(layer: Layer, fmt: str) -> float:
    """Bytes of one routed expert of `layer` with its matrices in `fmt`."""
    moe = layer.moe
    if moe is None:
        return 0.0
    own = [replace(w, copies=1, fmt=fmt if w.is_matrix else w.fmt) for w in layer.weights if _is_counted(w, moe)]
    return float(sum(stored_bytes(w, fmt) for w in own))


def _is_counted(weight: Weight, moe: Moe) -> bool:
    return weight.part == "expert" and weight.copies == moe.num_experts


def mixed_step_s(mix: Mix, picks: Floats, cost: StepCost, seqs: Floats, context: Floats) -> Floats:
    """Seconds of a decode step whose expert term is stretched by what two grouped GEMMs take instead of one."""
    step = cost.decode(seqs, context)
    stretch = expert_stretch(mix, picks, cost, seqs * cost.layout.attention_dp)
    return np.asarray(step.total_s + step.terms["experts"] * (stretch - 1.0))


def expert_stretch(mix: Mix, picks: Floats, cost: StepCost, tokens: Floats) -> Floats:
    """Time of the experts in both formats over that in the hot format alone, for `tokens` of the whole group.

    Compared on a rank with the mean load, so that imbalance stays what `cost` says; hot experts are taken to be
    spread evenly over the ranks. Each GEMM is looked up as the cost model does: active experts while weights bind,
    assignments beyond (handbook serving 7.5).
    """
    hot, cold = picks[:, : mix.num_hot], picks[:, mix.num_hot :]
    alone, both = np.zeros_like(tokens), np.zeros_like(tokens)
    for layer, count in cost.model.layer_kinds:
        if layer.moe:
            alone += count * _gemm_s(cost, layer.moe, picks, mix.hot, tokens)
            both += count * (_gemm_s(cost, layer.moe, hot, mix.hot, tokens))
            both += count * (_gemm_s(cost, layer.moe, cold, mix.cold, tokens))
    return np.asarray(both / alone)


def _gemm_s(cost: StepCost, moe: Moe, picks: Floats, fmt: str, tokens: Floats) -> Floats:
    """Seconds of the grouped GEMM over the experts of `picks` [layers, experts] in `fmt` on a rank of mean load."""
    ep = cost.layout.ep
    local = max(1, round(picks.shape[1] / ep))
    active = np.clip(active_experts(tokens, picks).mean(axis=0) / ep, 1.0, local)
    assigned = np.maximum(tokens * float(picks.sum(axis=1).mean()) / ep, 1.0)
    curve = _curve(cost, moe, local, fmt)
    return curve.seconds(active) + curve.seconds(assigned) - curve.seconds(np.minimum(assigned, local))


def _curve(cost: StepCost, moe: Moe, local: int, fmt: str) -> Curve:
    """Fused experts in `fmt`; other 8-bit ones through block-scaled kernels where faster, as `StepCost` chooses."""
    stored = compute_format(fmt)
    width = moe.expert_width // cost.layout.moe_tp
    dispatched = cost.backend == "deepep" and cost.layout.attention_dp > 1
    shape = (moe.expert_hidden, width, local, moe.num_experts, num_picks(moe), moe.num_matrices)
    formats = (stored, "fp8_block") if stored in ("fp8", "int8") else (stored,)
    curves = [cost.tables.expert_gemm(name, *shape, dispatched=dispatched) for name in formats]
    return min(curves, key=lambda curve: float(curve.seconds(np.array(float(local)))))


def mixed(model: ModelConfig, mix: Mix, picks: Floats, batches: Sequence[int]) -> Variant:
    """The variant with hot experts in one format and cold ones in another; `picks` [layers, experts] are ranked."""
    share = float(picks[:, : mix.num_hot].sum() / picks.sum())
    read = expert_bytes_read(model, mix, picks, batches)
    return Variant(
        f"{mix.num_hot} hot {mix.hot}, {moe_of(model).num_experts - mix.num_hot} cold {mix.cold}",
        split_formats(model, mix),
        f"hot experts serve {share:.0%} of assignments; two expert GEMMs per layer; quality not predicted",
        step_s=partial(mixed_step_s, mix, picks),
        details={"hot_experts": mix.num_hot, "hot_share": share, "expert_bytes_read_per_step": read},
    )
