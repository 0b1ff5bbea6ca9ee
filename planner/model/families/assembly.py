"""From layers to a whole model: embeddings, head, norms, expert settings shared by most families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from planner.model.blocks import Heads, Weights, gqa, matrix, vector
from planner.model.config import Ffn, Layer, Mixer, ModelConfig, Moe
from planner.model.feed_forward import dense, moe, norms
from planner.model.keys import Keys

Reader = Callable[[Keys], ModelConfig]
Block = tuple[Ffn, Weights]

PARTS = ("embedding", "lm_head", "attention", "router", "expert", "shared_expert", "dense_ffn", "norm")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def base_format(keys: Keys) -> str:
    """16- or 32-bit format of the unquantised weights; bf16 when the config does not say."""
    dtype = keys.text("dtype", "torch_dtype").removeprefix("torch.")
    if dtype and dtype not in _DTYPES:
        raise keys.error("torch_dtype", f"{dtype!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES.get(dtype, "bf16")


def assemble(
    keys: Keys,
    layers: Sequence[Layer],
    *,
    tied: bool = False,
    norm_bias: bool = False,
    head_bias: bool = False,
    extra: Weights = (),
    **fields: Any,
) -> ModelConfig:
    """Model of `layers` with its embedding, final norm and, unless tied, its head.

    `tied` is the family's default for `tie_word_embeddings`; `extra` are further weights outside the layers;
    `fields` go to `ModelConfig` unchanged.
    """
    hidden, vocab = keys.hidden, keys.integer("vocab_size")
    tied = keys.flag("tie_word_embeddings", default=tied)
    weights = matrix("embed_tokens", vocab, hidden, "embedding", "vocab") + norms(hidden, 1, bias=norm_bias) + extra
    if not tied:
        weights += matrix("lm_head", vocab, hidden, "lm_head", "vocab", bias=head_bias)
    fmt = base_format(keys)
    return ModelConfig(
        name=keys.name,
        architecture=keys.architecture,
        hidden=hidden,
        vocab=vocab,
        layers=tuple(layers),
        weights=weights,
        formats=tuple((part, fmt) for part in PARTS),  # type: ignore[misc]
        tied=tied,
        max_context=keys.max_context,
        **fields,
    )


def layer(mixers: Sequence[tuple[Mixer, Weights]], ffns: Sequence[Block], norm: Weights) -> Layer:
    """Block made of `mixers` and `ffns`, each with its weights, and the norms around them."""
    weights = tuple(w for _, own in (*mixers, *ffns) for w in own) + norm
    return Layer(tuple(m for m, _ in mixers), tuple(f for f, _ in ffns), weights)


def heads(keys: Keys, **fields: Any) -> Heads:
    """Attention widths under their usual keys; `fields` override or add."""
    usual = {"num_heads": keys.num_heads, "num_kv_heads": keys.num_kv_heads, "head_dim": keys.head_dim}
    return Heads(**(usual | fields))


def routed(keys: Keys, *, width: int | None = None, shared_width: int = 0, **fields: Any) -> Moe:
    """Routed experts under their usual keys; `width` where `moe_intermediate_size` is not the expert's."""
    usual = {
        "num_experts": keys.integer("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"),
        "top_k": keys.integer(*_TOP_K),
        "expert_width": width or keys.integer("moe_intermediate_size"),
        "expert_hidden": keys.hidden,
        "shared_width": shared_width,
        "num_groups": keys.integer("n_group", "num_expert_group", default=1),
        "top_groups": keys.integer("topk_group", default=1),
    }
    return Moe(**(usual | fields))


def shared_width(keys: Keys) -> int:
    """Total width of shared experts given as a count of routed-expert widths."""
    count = keys.integer("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", default=0, minimum=0)
    return count * keys.integer("moe_shared_expert_intermediate_size", "moe_intermediate_size")


def dense_then_moe(keys: Keys) -> list[bool]:
    """Which layers have routed experts: `mlp_layer_types`, else `first_k_dense_replace` and `moe_layer_freq`."""
    count = keys.num_layers
    kinds = keys.items("mlp_layer_types", count)
    if kinds is not None:
        return [kind == "sparse" for kind in kinds[:count]]
    if isinstance(keys.get("moe_layer_freq"), list):
        return [bool(flag) for flag in (keys.items("moe_layer_freq", count) or [])[:count]]
    first = keys.integer("first_k_dense_replace", default=0, minimum=0)
    every = keys.integer("moe_layer_freq", default=1)
    return [i >= first and i % every == 0 for i in range(count)]


def uniform(keys: Keys, attention: Heads, ffn: Block, **fields: Any) -> ModelConfig:
    """Model whose layers are all equal."""
    one = layer([gqa(keys.hidden, attention)], [ffn], norms(keys.hidden, bias=fields.get("norm_bias", False)))
    return assemble(keys, [one] * keys.num_layers, **fields)


def mixed(keys: Keys, attention: Heads, sparse: Block, is_moe: Sequence[bool], **fields: Any) -> ModelConfig:
    """Model of equal attention whose layers are dense or sparse as `is_moe` says."""
    ffns = {True: sparse}
    if not all(is_moe):
        ffns[False] = dense(keys.hidden, keys.integer("intermediate_size"))
    kinds = {flag: layer([gqa(keys.hidden, attention)], [ffn], norms(keys.hidden)) for flag, ffn in ffns.items()}
    return assemble(keys, [kinds[flag] for flag in is_moe], **fields)


def sparse_block(keys: Keys, block: Moe, **fields: Any) -> Block:
    """Expert block over the model's hidden width."""
    return moe(keys.hidden, block, **fields)


def mtp_module(keys: Keys, one: Layer, *, prefix: str, num_norms: int, own_embedding: bool, own_head: bool) -> Weights:
    """One multi-token-prediction module: a layer, the projection of [hidden, embedding], norms, own vocabularies.

    `num_norms` are the norms beside the layer's: on the hidden state, on the embedding, before the head. The
    projection stays 16-bit in quantised checkpoints (DeepSeek-V3: handbook models.md 3).
    """
    hidden, vocab = keys.hidden, keys.integer("vocab_size")
    weights = one.weights + matrix("eh_proj", hidden, 2 * hidden, "dense_ffn", "replicated", quantizable=False)
    weights += (vector("mtp_norms", num_norms * hidden, "norm"),)
    if own_embedding:
        weights += matrix("embed_tokens", vocab, hidden, "embedding", "vocab")
    if own_head:
        weights += matrix("shared_head.head", vocab, hidden, "lm_head", "vocab")
    return renamed(weights, prefix)


def renamed(weights: Weights, prefix: str) -> Weights:
    """`weights` under `prefix`, where a quantisation config finds them."""
    return tuple(replace(weight, name=f"{prefix}.{weight.name}") for weight in weights)
