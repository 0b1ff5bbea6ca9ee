"""Encoder-decoder families with capacity-limited experts: Switch Transformer and NLLB-MoE.

Encoder attention keeps no cache; cross-attention caches the source tokens once.
"""

from __future__ import annotations

from dataclasses import replace

from planner.model.blocks import Heads, Weights, gqa, vector
from planner.model.config import Attention, Layer, ModelConfig, Moe
from planner.model.families.assembly import Block, assemble
from planner.model.feed_forward import dense, moe, norms
from planner.model.keys import MOST_LAYERS, Keys

_SWITCH_CAPACITY = 1.25
"""Slots per expert over the even share in the paper (arXiv 2101.03961; handbook models.md 6: 1.0 and 1.25)."""
_NLLB_TOP_K = 2


def _block(hidden: int, own: Heads, ffn: Block, *, encoder: bool, bias: bool, extra: Weights = ()) -> Layer:
    """Encoder block (attention, feed-forward) or decoder block (attention, cross-attention, feed-forward)."""
    mixer, weights = gqa(hidden, own)
    if encoder:
        # Nothing is read again after the encoder pass, so its attention caches nothing.
        kept = replace(mixer, kv_values=0)
        norm = norms(hidden, 2, bias=bias)
        return Layer((kept,), (ffn[0],), weights + ffn[1] + norm + extra, "encoder")
    cross, cross_weights = gqa(hidden, replace(own, is_cross=True), "cross_attn")
    mixers: tuple[Attention, ...] = (mixer, cross)
    norm = norms(hidden, 3, bias=bias)
    return Layer(mixers, (ffn[0],), weights + cross_weights + ffn[1] + norm + extra)


def switch(keys: Keys) -> ModelConfig:
    """Switch Transformers on T5: top-1, experts in every second layer (C: in every layer), relative positions."""
    hidden, count = keys.hidden, keys.integer("num_heads")
    own = Heads(count, count, keys.integer("d_kv"))
    matrices = 3 if keys.flag("is_gated_act") else 2
    block = Moe(
        keys.integer("num_experts"), 1, keys.integer("d_ff"), hidden, matrices, capacity_factor=_SWITCH_CAPACITY
    )
    ffns: dict[bool, Block] = {
        True: moe(hidden, block, router="router.classifier"),
        False: dense(hidden, block.expert_width, num_matrices=matrices),
    }
    buckets = keys.integer("relative_attention_num_buckets", default=32)
    positions: Weights = (vector("relative_attention_bias", buckets * count, "attention", "column"),)
    layers: list[Layer] = []
    encoders = keys.integer("num_layers", maximum=MOST_LAYERS)
    decoders = keys.integer("num_decoder_layers", default=encoders, maximum=MOST_LAYERS)
    for encoder, total, sparse in (
        (True, encoders, keys.integer("num_sparse_encoder_layers", default=0, minimum=0)),
        (False, decoders, keys.integer("num_sparse_decoder_layers", default=0, minimum=0)),
    ):
        step = total // sparse if sparse else 0
        for i in range(total):
            is_moe = step == 1 or (step > 1 and i % step == 1)
            extra = positions if i == 0 else ()
            layers.append(_block(hidden, own, ffns[is_moe], encoder=encoder, bias=False, extra=extra))
    return assemble(keys, layers, tied=True, extra=norms(hidden, 1), notes=_notes(keys))


def nllb(keys: Keys) -> ModelConfig:
    """NLLB-MoE: top-2, experts in every fourth layer, biases everywhere, LayerNorm."""
    hidden, layers = keys.hidden, []
    for side, encoder in (("encoder", True), ("decoder", False)):
        count, width = keys.integer(f"{side}_attention_heads"), keys.integer(f"{side}_ffn_dim")
        own = Heads(count, count, hidden // count, qkv_bias=True, o_bias=True)
        experts = keys.integer("num_experts")
        block = Moe(experts, _NLLB_TOP_K, width, hidden, 2, capacity_factor=_nllb_capacity(keys, experts))
        sparse = moe(hidden, block, router="router.classifier", expert_bias=True)
        plain = dense(hidden, width, num_matrices=2, bias=True)
        step = keys.integer(f"{side}_sparse_step")
        for i in range(keys.integer(f"{side}_layers", maximum=MOST_LAYERS)):
            ffn: Block = sparse if (i + 1) % step == 0 else plain
            layers.append(_block(hidden, own, ffn, encoder=encoder, bias=True))
    return assemble(keys, layers, tied=True, norm_bias=True, extra=norms(hidden, 1, bias=True), notes=_notes(keys))


def _nllb_capacity(keys: Keys, experts: int) -> float | None:
    """At evaluation an expert takes a fraction of all tokens, whatever their number of experts."""
    fraction = keys.get("moe_eval_capacity_token_fraction")
    if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        return None
    return float(fraction) * experts / _NLLB_TOP_K


def _notes(keys: Keys) -> tuple[str, ...]:
    capacity = keys.get("expert_capacity")
    return (f"expert_capacity {capacity} of the config is a cap per expert and call",) if capacity else ()
