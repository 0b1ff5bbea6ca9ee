"""Families with plain grouped-query attention: Llama, Mistral, Mixtral, Qwen, OLMoE, Phi, Granite, Grok and others.

Names of keys and which bias exists without a key: handbook models.md sections 1 and 6.
"""

from __future__ import annotations

from planner.model.blocks import Heads, gqa
from planner.model.config import ModelConfig
from planner.model.families.assembly import (
    Block,
    assemble,
    dense_then_moe,
    heads,
    layer,
    mixed,
    mtp_module,
    routed,
    shared_width,
    sparse_block,
    uniform,
)
from planner.model.feed_forward import dense, norms
from planner.model.keys import Keys


def llama(keys: Keys) -> ModelConfig:
    """Llama 2 and 3, Mistral."""
    bias = keys.flag("attention_bias")
    attention = heads(keys, window=keys.window(), qkv_bias=bias, o_bias=bias)
    ffn = dense(keys.hidden, keys.integer("intermediate_size"), bias=keys.flag("mlp_bias"))
    return uniform(keys, attention, ffn)


def qwen3(keys: Keys) -> ModelConfig:
    """Dense Qwen3: query and key norms per head."""
    attention = heads(keys, window=keys.window(), qk_norm="head", qkv_bias=keys.flag("attention_bias"))
    return uniform(keys, attention, dense(keys.hidden, keys.integer("intermediate_size")))


def mixtral(keys: Keys) -> ModelConfig:
    """Mixtral: `intermediate_size` is the expert's width."""
    block = routed(keys, width=keys.integer("intermediate_size"))
    return uniform(keys, heads(keys, window=keys.window()), sparse_block(keys, block, prefix="block_sparse_moe"))


def qwen_layers(keys: Keys) -> list[bool]:
    """Qwen's choice of sparse layers: every `decoder_sparse_step`-th, less `mlp_only_layers`."""
    step, dense_only = keys.integer("decoder_sparse_step", default=1), keys.items("mlp_only_layers") or []
    return [i not in dense_only and (i + 1) % step == 0 for i in range(keys.num_layers)]


def qwen_experts(keys: Keys) -> Block:
    """Qwen's experts; the shared one, when it has a width, has a sigmoid gate."""
    width = keys.integer("shared_expert_intermediate_size", default=0, minimum=0)
    return sparse_block(keys, routed(keys, shared_width=width), shared="shared_expert", shared_gate=width > 0)


def qwen2_moe(keys: Keys) -> ModelConfig:
    """Qwen1.5-MoE and Qwen2-MoE: biases on q, k, v that no key announces."""
    attention = heads(keys, window=keys.window(), qkv_bias=True)
    return mixed(keys, attention, qwen_experts(keys), qwen_layers(keys))


def qwen3_moe(keys: Keys) -> ModelConfig:
    """Qwen3-MoE, and the text part of Qwen3-VL-MoE."""
    attention = heads(keys, window=keys.window(), qk_norm="head", qkv_bias=keys.flag("attention_bias"))
    return mixed(keys, attention, qwen_experts(keys), qwen_layers(keys))


def olmoe(keys: Keys) -> ModelConfig:
    """OLMoE: query and key norms over the full projection."""
    block = routed(keys, width=keys.integer("intermediate_size"))
    return uniform(keys, heads(keys, qk_norm="full"), sparse_block(keys, block))


def phimoe(keys: Keys) -> ModelConfig:
    """Phi-3.5-MoE: biases on all attention projections and the head, LayerNorm with bias."""
    bias = keys.flag("attention_bias", default=True)
    attention = heads(keys, window=keys.window(), qkv_bias=bias, o_bias=bias)
    block = sparse_block(keys, routed(keys, width=keys.integer("intermediate_size")), prefix="block_sparse_moe")
    return uniform(keys, attention, block, norm_bias=True, head_bias=keys.flag("lm_head_bias", default=True))


def gpt_oss(keys: Keys) -> ModelConfig:
    """gpt-oss: sinks, biases everywhere, window and full attention in turns (arXiv 2508.10925)."""
    kinds = keys.items("layer_types", keys.num_layers)
    full = [kind == "full_attention" for kind in kinds] if kinds else [i % 2 == 1 for i in range(keys.num_layers)]
    block = sparse_block(
        keys, routed(keys, width=keys.integer("intermediate_size")), router="router", router_bias=True, expert_bias=True
    )
    attention = {
        flag: heads(keys, window=window, qkv_bias=True, o_bias=True, sinks=True)
        for flag, window in ((True, None), (False, keys.window()))
    }
    layers = {flag: layer([gqa(keys.hidden, own)], [block], norms(keys.hidden)) for flag, own in attention.items()}
    return assemble(keys, [layers[flag] for flag in full[: keys.num_layers]])


def granite(keys: Keys) -> ModelConfig:
    """Granite-MoE: tied head, `intermediate_size` per expert."""
    block = sparse_block(keys, routed(keys, width=keys.integer("intermediate_size")), prefix="block_sparse_moe")
    return uniform(keys, heads(keys), block, tied=True)


def llama4(keys: Keys) -> ModelConfig:
    """Llama 4 text model: one shared expert that no key names, chunked attention in three layers of four."""
    hidden, width = keys.hidden, keys.integer("intermediate_size")
    step, listed = keys.integer("interleave_moe_layer_step", default=1), keys.items("moe_layers")
    ropes = keys.items("no_rope_layers") or [int((i + 1) % 4 != 0) for i in range(keys.num_layers)]
    sparse = sparse_block(
        keys,
        routed(keys, width=width, shared_width=width),
        prefix="feed_forward",
        router="router",
        shared="shared_expert",
    )
    plain = dense(hidden, keys.integer("intermediate_size_mlp", default=width), prefix="feed_forward")
    layers = []
    for i in range(keys.num_layers):
        window = keys.window("attention_chunk_size") if ropes[i] else None
        is_moe = i in listed if listed else (i + 1) % step == 0
        mixer = gqa(hidden, heads(keys, window=window, qkv_bias=keys.flag("attention_bias")))
        layers.append(layer([mixer], [sparse if is_moe else plain], norms(hidden)))
    return assemble(keys, layers)


def grok(keys: Keys) -> ModelConfig:
    """Grok-1 (tied) and Grok-2 (dense MLP beside the experts); four norms per layer in both."""
    residual = keys.integer("intermediate_size") if keys.flag("residual_moe") else 0
    width = keys.integer("moe_intermediate_size", "intermediate_size")
    block = sparse_block(keys, routed(keys, width=width, shared_width=residual), prefix="moe_block", shared="mlp")
    one = layer([gqa(keys.hidden, heads(keys))], [block], norms(keys.hidden, 4))
    return assemble(keys, [one] * keys.num_layers)


def glm4_moe(keys: Keys) -> ModelConfig:
    """GLM-4.5, 4.6 and 4.7: `attention_bias` covers q, k and v only; one MTP module."""
    norm = "head" if keys.flag("use_qk_norm") else "none"
    attention = heads(keys, qkv_bias=keys.flag("attention_bias"), qk_norm=norm)
    is_moe = dense_then_moe(keys)
    sparse = sparse_block(keys, routed(keys, shared_width=shared_width(keys)))
    experts, count = keys.integer("n_routed_experts"), keys.num_mtp
    one = layer([gqa(keys.hidden, attention)], [sparse], norms(keys.hidden))
    # GLM-4.6 ships its MTP module without embedding and head, 4.5 with both (handbook models.md 3); only the
    # longer context tells their configs apart.
    own = keys.max_context <= 131072
    prefix = f"layers.{keys.num_layers}"
    module = mtp_module(keys, one, prefix=prefix, num_norms=3, own_embedding=own, own_head=own)
    return mixed(
        keys,
        attention,
        sparse,
        is_moe,
        mtp=module * count,
        router_bias_buffers=sum(is_moe) * experts,
        mtp_router_bias_buffers=count * experts,
    )


def minimax_m2(keys: Keys) -> ModelConfig:
    """MiniMax-M2: query and key norms over the full projection; MTP modules declared, not shipped."""
    norm = "full" if keys.flag("use_qk_norm", default=True) else "none"
    block = routed(keys, width=keys.integer("intermediate_size"))
    biases = keys.num_layers * block.num_experts if keys.flag("use_routing_bias", default=True) else 0
    sparse = sparse_block(keys, block, prefix="block_sparse_moe")
    return uniform(keys, heads(keys, qk_norm=norm, window=keys.window()), sparse, router_bias_buffers=biases)


def dbrx(keys: Keys) -> ModelConfig:
    """DBRX: nested attention and expert settings."""
    attention, ffn = keys.object("attn_config"), keys.object("ffn_config")
    own = heads(keys, num_kv_heads=attention.integer("kv_n_heads", default=1))
    block = routed(Keys(dict(keys.raw) | dict(ffn.raw), keys.name), width=ffn.integer("ffn_hidden_size"))
    return uniform(keys, own, sparse_block(keys, block, prefix="ffn", router="router.layer"))


def dots1(keys: Keys) -> ModelConfig:
    """dots.llm1: full multi-head attention with query and key norms per head."""
    is_moe = dense_then_moe(keys)
    sparse = sparse_block(keys, routed(keys, shared_width=shared_width(keys)))
    biases = sum(is_moe) * keys.integer("n_routed_experts")
    return mixed(keys, heads(keys, qk_norm="head"), sparse, is_moe, router_bias_buffers=biases)


def deepseek(keys: Keys) -> ModelConfig:
    """DeepSeek-MoE-16B (V1): plain attention, first layer dense."""
    sparse = sparse_block(keys, routed(keys, shared_width=shared_width(keys)))
    return mixed(keys, heads(keys), sparse, dense_then_moe(keys))


def ernie(keys: Keys) -> ModelConfig:
    """ERNIE-4.5 text models; the MTP layer is dense and uses the embedding of the model."""
    first = keys.integer("moe_layer_start_index", default=0, minimum=0)
    last = keys.integer("moe_layer_end_index", default=keys.num_layers - 1, minimum=0)
    every, bias = keys.integer("moe_layer_interval", default=1), keys.flag("use_bias")
    is_moe = [first <= i <= last and (i + 1) % every == 0 for i in range(keys.num_layers)]
    attention = heads(keys, qkv_bias=bias, o_bias=bias)
    block = routed(keys, shared_width=shared_width(keys))
    sparse = sparse_block(keys, block, trained_correction=keys.flag("moe_use_aux_free", default=True))
    one = layer(
        [gqa(keys.hidden, attention)], [dense(keys.hidden, keys.integer("intermediate_size"))], norms(keys.hidden)
    )
    module = mtp_module(keys, one, prefix="mtp", num_norms=2, own_embedding=False, own_head=False)
    count = keys.num_mtp
    return mixed(keys, attention, sparse, is_moe, mtp=module * count)


def hunyuan(keys: Keys) -> ModelConfig:
    """Hunyuan-A13B and Hunyuan-Large: settings once or per layer, key-value reuse across layers (CLA)."""
    norm = "head" if keys.flag("use_qk_norm") else "none"
    share = keys.integer("cla_share_factor", default=1) if keys.flag("use_cla") else 1
    width = keys.integer("intermediate_size")
    layers = []
    for i in range(keys.num_layers):
        own = keys.per_layer("moe_intermediate_size", i, width)
        shared = keys.per_layer("num_shared_expert", i, 0) * own if keys.flag("use_mixed_mlp_moe") else 0
        block = routed(keys.at_layer(i), width=own, shared_width=shared)
        mixer = gqa(keys.hidden, heads(keys, qk_norm=norm, reuses_kv=i % share != 0))
        layers.append(layer([mixer], [sparse_block(keys, block, shared="shared_mlp")], norms(keys.hidden)))
    return assemble(keys, layers, tied=True)


def arctic(keys: Keys) -> ModelConfig:
    """Snowflake Arctic: a dense residual MLP as wide as the model beside the experts, a third norm."""
    width = keys.hidden if keys.flag("use_residual", default=True) else 0
    block = routed(keys, width=keys.integer("intermediate_size"), shared_width=width)
    sparse = sparse_block(keys, block, prefix="block_sparse_moe", shared="residual_mlp")
    one = layer([gqa(keys.hidden, heads(keys))], [sparse], norms(keys.hidden, 3))
    return assemble(keys, [one] * keys.num_layers)


def bailing(keys: Keys) -> ModelConfig:
    """Ling and Ring: 2.0 adds query and key norms and a trained correction bias."""
    attention = Heads(
        keys.num_heads,
        keys.num_kv_heads,
        keys.head_dim,
        qkv_bias=keys.flag("use_qkv_bias"),
        o_bias=keys.flag("use_bias"),
        qk_norm="head" if keys.flag("use_qk_norm") else "none",
    )
    correction = keys.flag("moe_router_enable_expert_bias")
    sparse = sparse_block(keys, routed(keys, shared_width=shared_width(keys)), trained_correction=correction)
    return mixed(keys, attention, sparse, dense_then_moe(keys))
