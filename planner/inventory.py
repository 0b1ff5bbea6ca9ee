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


_ONCE_PER_PROMPT = ("cross_attn.k_proj", "cross_attn.v_proj")
"""Multiplied by the encoder's output once, not by every generated token."""


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
        if not weight.is_matrix or weight.part not in LABELS or weight.name in _ONCE_PER_PROMPT:
            continue
        rows, cols = _shard_shape(weight, layer, layout)
        label, fmt = LABELS[weight.part], _format(model, weight)
        if weight.shard == "row":
            single.append(Gemm(label, rows, cols, fmt, weight.copies))
        else:
            side = "split" if weight.shard in ("column", "kv_column") else "whole"
            key = (label, cols, f"{weight.name.rpartition('.')[0]} {side}", fmt)
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


def reduced_rows(layer: Layer, layout: Layout) -> tuple[int, ...]:
    """Widths of the outputs that one `layer` sums over TP: one all-reduce each.

    Row-sharded projections of attention and dense FFN are reduced; routed and shared experts together once, unless
    they lie behind dispatch and combine, when a shared expert cut over TP is reduced alone.
    """
    split = [w for w in layer.weights if w.is_matrix and w.shard == "row" and w.name not in _ONCE_PER_PROMPT]
    rows = [w.rows for w in split if w.part in ("attention", "dense_ffn")]
    shared = [w.rows for w in split if w.part == "shared_expert"]
    if layer.moe is None:
        return tuple(rows + shared)
    together = [layer.moe.expert_hidden] if layout.attention_dp == 1 else shared[:1]
    return tuple(rows + together)
