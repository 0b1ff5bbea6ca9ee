"""Families with linear attention or state-space layers.

Qwen3-Next, Qwen3.5, MiniMax-01, Kimi-Linear, Jamba and Nemotron-H.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.model.blocks import Weights, gated_delta, gqa, kimi_delta, lightning, mamba1, mamba2, mla
from planner.model.config import Layer, Mixer, ModelConfig
from planner.model.families.assembly import (
    Block,
    assemble,
    dense_then_moe,
    heads,
    layer,
    mtp_module,
    renamed,
    routed,
    shared_width,
    sparse_block,
)
from planner.model.families.latent import latent_heads
from planner.model.families.softmax import qwen_experts, qwen_layers
from planner.model.feed_forward import dense, norms
from planner.model.keys import Keys


def _is_full(keys: Keys) -> list[bool]:
    """Which layers have softmax attention: `layer_types`, else every `full_attention_interval`-th."""
    kinds = keys.items("layer_types", keys.num_layers)
    if kinds:
        return [kind == "full_attention" for kind in kinds[: keys.num_layers]]
    interval = keys.integer("full_attention_interval", default=4)
    return [(i + 1) % interval == 0 for i in range(keys.num_layers)]


def qwen3_next(keys: Keys) -> ModelConfig:
    """Qwen3-Next; its config does not mention the MTP module it ships."""
    return _qwen_hybrid(keys, split=False, num_mtp=1)


def qwen3_5_moe(keys: Keys) -> ModelConfig:
    """Text part of Qwen3.5 and 3.6."""
    return _qwen_hybrid(keys, split=True, num_mtp=keys.num_mtp)


def _qwen_hybrid(keys: Keys, *, split: bool, num_mtp: int) -> ModelConfig:
    hidden, is_moe = keys.hidden, qwen_layers(keys)
    full: tuple[Mixer, Weights] = gqa(hidden, heads(keys, qk_norm="head", gate="full"))
    linear = gated_delta(
        hidden,
        keys.integer("linear_num_key_heads"),
        keys.integer("linear_num_value_heads"),
        keys.integer("linear_key_head_dim"),
        keys.integer("linear_value_head_dim"),
        keys.integer("linear_conv_kernel_dim"),
        split=split,
    )
    ffns: dict[bool, Block] = {True: qwen_experts(keys)}
    if not all(is_moe):
        ffns[False] = dense(hidden, keys.integer("intermediate_size"))
    layers = [
        layer([full if softmax else linear], [ffns[sparse]], norms(hidden))
        for softmax, sparse in zip(_is_full(keys), is_moe, strict=True)
    ]
    one = layer([full], [ffns[True]], norms(hidden))
    module = mtp_module(keys, one, prefix="mtp.layers.0", num_norms=3, own_embedding=False, own_head=False)
    return assemble(keys, layers, mtp=module * num_mtp)


def minimax_01(keys: Keys) -> ModelConfig:
    """MiniMax-Text-01 and M1: seven lightning layers to one of softmax; routers kept in fp32."""
    listed = keys.items("attn_type_list", keys.num_layers)
    full = [kind == 1 for kind in listed[: keys.num_layers]] if listed else _is_full(keys)
    mixers: dict[bool, tuple[Mixer, Weights]] = {
        True: gqa(keys.hidden, heads(keys)),
        False: lightning(keys.hidden, keys.num_heads, keys.head_dim),
    }
    block = routed(keys, width=keys.integer("intermediate_size"))
    sparse = sparse_block(keys, block, prefix="block_sparse_moe", router_fmt="fp32")
    return assemble(keys, [layer([mixers[flag]], [sparse], norms(keys.hidden)) for flag in full])


def kimi_linear(keys: Keys) -> ModelConfig:
    """Kimi-Linear: KDA layers and MLA layers listed from 1, MLA without rotary embedding."""
    hidden, linear = keys.hidden, keys.object("linear_attn_config")
    if keys.has("routed_expert_hidden_size"):
        raise keys.error("routed_expert_hidden_size", "Kimi-K3 is not supported yet; describe it in a model TOML")
    full = set(linear.items("full_attn_layers") or [])
    delta = kimi_delta(
        hidden, linear.integer("num_heads"), linear.integer("head_dim"), linear.integer("short_conv_kernel_size")
    )
    attention: tuple[Mixer, Weights] = mla(hidden, latent_heads(keys))
    is_moe = dense_then_moe(keys)
    sparse = sparse_block(keys, routed(keys, shared_width=shared_width(keys)), prefix="block_sparse_moe")
    plain = dense(hidden, keys.integer("intermediate_size"))
    layers = [
        layer([attention if i + 1 in full else delta], [sparse if is_moe[i] else plain], norms(hidden))
        for i in range(keys.num_layers)
    ]
    return assemble(keys, layers, router_bias_buffers=sum(is_moe) * keys.integer("num_experts"))


def jamba(keys: Keys) -> ModelConfig:
    """Jamba: one attention layer in eight, experts in every second layer, Mamba-1 elsewhere."""
    hidden, width = keys.hidden, keys.integer("intermediate_size")
    period, offset = keys.integer("attn_layer_period"), keys.integer("attn_layer_offset", minimum=0)
    every, first = keys.integer("expert_layer_period"), keys.integer("expert_layer_offset", minimum=0)
    mamba = mamba1(
        hidden,
        keys.integer("mamba_expand", default=2),
        keys.integer("mamba_d_state", default=16),
        keys.integer("mamba_d_conv", default=4),
        keys.integer("mamba_dt_rank", default=-(-hidden // 16)),
    )
    attention: tuple[Mixer, Weights] = gqa(hidden, heads(keys))
    sparse = sparse_block(keys, routed(keys, width=width), prefix="feed_forward", router="router")
    plain = dense(hidden, width, prefix="feed_forward")
    layers = [
        layer([attention if i % period == offset else mamba], [sparse if i % every == first else plain], norms(hidden))
        for i in range(keys.num_layers)
    ]
    return assemble(keys, layers)


_NEMOTRON = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}


def _nemotron_kinds(keys: Keys, pattern: str, listed: str) -> list[str]:
    kinds = keys.items(listed)
    if kinds is None:
        kinds = [_NEMOTRON.get(letter, letter) for letter in keys.text(pattern)]
    unknown = [kind for kind in kinds if kind not in _NEMOTRON.values()]
    if unknown:
        raise keys.error(pattern, f"{unknown[0]!r:.80} is not a layer kind; use M, E, * or -")
    return kinds


def nemotron_h(keys: Keys) -> ModelConfig:
    """Nemotron-3: every layer is one block, Mamba-2, attention or experts; experts may work in a latent width."""
    hidden, kinds = keys.hidden, _nemotron_kinds(keys, "hybrid_override_pattern", "layers_block_type")
    if not kinds:
        raise keys.error("hybrid_override_pattern", "missing; add it or layers_block_type")
    block = routed(
        keys,
        num_matrices=2,
        shared_width=shared_width(keys),
        expert_hidden=keys.integer("moe_latent_size", default=hidden),
    )
    mamba = mamba2(
        hidden,
        keys.integer("mamba_num_heads"),
        keys.integer("mamba_head_dim"),
        keys.integer("n_groups"),
        keys.integer("ssm_state_size"),
        keys.integer("conv_kernel"),
    )
    parts: dict[str, tuple[list[tuple[Mixer, Weights]], list[Block]]] = {
        "mamba": ([mamba], []),
        "attention": ([gqa(hidden, heads(keys), "mixer")], []),
        "moe": ([], [sparse_block(keys, block, prefix="mixer")]),
        "mlp": ([], [dense(hidden, keys.integer("intermediate_size"), num_matrices=2, prefix="mixer")]),
    }
    built = {kind: layer(*own, norms(hidden, 1)) for kind, own in parts.items()}
    draft = _nemotron_kinds(keys, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
    return assemble(
        keys,
        [built[kind] for kind in kinds],
        mtp=_nemotron_mtp(keys, [built[kind] for kind in draft]),
        router_bias_buffers=kinds.count("moe") * block.num_experts,
        mtp_router_bias_buffers=draft.count("moe") * block.num_experts,
    )


def _nemotron_mtp(keys: Keys, layers: Sequence[Layer]) -> Weights:
    """Draft layers, the projection of [hidden, embedding] and three norms."""
    if not layers or not keys.num_mtp:
        return ()
    module = mtp_module(keys, layers[0], prefix="mtp", num_norms=3, own_embedding=False, own_head=False)
    return module + tuple(w for one in layers[1:] for w in renamed(one.weights, "mtp"))
