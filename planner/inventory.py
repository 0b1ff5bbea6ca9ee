"""What one rank multiplies in one step: the GEMMs of every kind of layer after sharding and fusion.

Derived from the model's weights, so a new family needs no code here. Engines fuse projections that read the
same input (q, k, v; gate and up; q_a and kv_a), which changes the shape the kernel sees and therefore its time.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.layout import Layout
from planner.memory import shards
from planner.model import ModelConfig
from planner.model.config import Layer, Part, Weight

LABELS = {
    "attention": "attention_projections",
    "dense_ffn": "dense_ffn",
    "shared_expert": "shared_experts",
    "router": "router",
    "lm_head": "lm_head",
}
"""Breakdown term of each weight part that is multiplied by every token."""


@dataclass(frozen=True, slots=True)
class Gemm:
    """`count` products of [tokens, cols] by [cols, rows] on one rank, stored in weight format `fmt`."""

    label: str
    rows: int
    cols: int
    fmt: str
    count: int = 1

    @property
    def flop_per_token(self) -> float:
        """FLOP for one token, all `count` products."""
        return 2.0 * self.rows * self.cols * self.count


def layer_gemms(model: ModelConfig, layer: Layer, layout: Layout) -> tuple[Gemm, ...]:
    """Dense GEMMs of one `layer` on one rank: everything except routed experts and attention kernels."""
    fused: dict[tuple[str, int, str, str], int] = {}
    single: list[Gemm] = []
    for weight in layer.weights:
        if not weight.is_matrix or weight.part not in LABELS or weight.part == "expert":
            continue
        rows, cols = _shard_shape(weight, layer, layout)
        label, fmt = LABELS[weight.part], _format(model, weight)
        if weight.shard == "row":
            single.append(Gemm(label, rows, cols, fmt, weight.copies))
        else:
            side = "split" if weight.shard in ("column", "kv_column") else "whole"
            key = (label, cols, side, fmt)
            fused[key] = fused.get(key, 0) + rows * weight.copies
    return tuple(Gemm(label, rows, cols, fmt) for (label, cols, _, fmt), rows in fused.items()) + tuple(single)


def head_gemm(model: ModelConfig, layout: Layout) -> Gemm:
    """The lm_head product (tied or not), sharded by vocabulary over TP."""
    part: Part = "embedding" if model.tied else "lm_head"
    return Gemm("lm_head", -(-model.vocab // layout.tp), model.hidden, model.format_of(part))


def _format(model: ModelConfig, weight: Weight) -> str:
    """Format the kernel reads: the checkpoint's own choice for this weight first, 16 bits where none is quantised."""
    fmt = weight.fmt or model.format_of(weight.part)
    return fmt if weight.is_quantizable else "bf16"


def _shard_shape(weight: Weight, layer: Layer, layout: Layout) -> tuple[int, int]:
    cut = shards(weight, layer, layout.tp, layout.ep, layout.moe_tp)
    if weight.shard == "row":
        return weight.rows, -(-weight.cols // cut)
    return -(-weight.rows // cut), weight.cols
