"""Families that mix attention of different widths or windows: Gemma-4, MiMo, Step-3, Step-3.7, MiniMax-M3."""

from __future__ import annotations

from dataclasses import replace

from planner.model.blocks import Heads, Weights, gqa, matrix, vector
from planner.model.config import Attention, Mixer, ModelConfig
from planner.model.families.assembly import (
    Block,
    assemble,
    dense_then_moe,
    heads,
    layer,
    routed,
    shared_width,
    sparse_block,
)
from planner.model.feed_forward import dense, norms
from planner.model.keys import Keys
from planner.units import whole_number


def gemma4(keys: Keys) -> ModelConfig:
    """Gemma-4 MoE text model: a dense MLP and experts in parallel, seven norms, global layers without v_proj."""
    hidden, experts = keys.hidden, keys.integer("num_experts")
    block = routed(keys)
    plain = dense(hidden, keys.integer("intermediate_size"))
    ffns: list[Block] = [plain, sparse_block(keys, block, prefix="moe", router="router")]
    scales = (vector("router_scales", hidden + experts, "router"),)
    local = heads(keys, window=keys.window(), qk_norm="head")
    wide = heads(
        keys,
        qk_norm="head",
        head_dim=keys.integer("global_head_dim", default=keys.head_dim),
        num_kv_heads=keys.integer("num_global_key_value_heads", default=keys.num_kv_heads),
        k_is_v=keys.flag("attention_k_eq_v"),
    )
    kinds = keys.items("layer_types", keys.num_layers)
    if kinds is None:
        raise keys.error("layer_types", "missing; add one entry per layer, sliding_attention or full_attention")
    chosen = [wide if kind == "full_attention" else local for kind in kinds[: keys.num_layers]]
    layers = [layer([gqa(hidden, own)], ffns, norms(hidden, 7) + scales) for own in chosen]
    return assemble(keys, layers, tied=True)


def mimo_v2(keys: Keys) -> ModelConfig:
    """MiMo-V2-Flash: few full layers, many with a 128-token window, more KV heads and sinks."""
    pattern = keys.items("hybrid_layer_pattern", keys.num_layers)
    if pattern is None:
        raise keys.error("hybrid_layer_pattern", "missing; add one 0 (full) or 1 (window) per layer")
    wide = heads(keys, v_head_dim=keys.optional("v_head_dim"), sinks=keys.flag("add_full_attention_sink_bias"))
    local = Heads(
        keys.integer("swa_num_attention_heads", default=keys.num_heads),
        keys.integer("swa_num_key_value_heads", default=keys.num_kv_heads),
        keys.integer("swa_head_dim", default=keys.head_dim),
        keys.optional("swa_v_head_dim", "v_head_dim"),
        window=keys.window(),
        sinks=keys.flag("add_swa_attention_sink_bias"),
    )
    is_moe = dense_then_moe(keys)
    sparse = sparse_block(keys, routed(keys, shared_width=shared_width(keys)))
    plain = dense(keys.hidden, keys.integer("intermediate_size"))
    layers = [
        layer([gqa(keys.hidden, local if pattern[i] else wide)], [sparse if is_moe[i] else plain], norms(keys.hidden))
        for i in range(keys.num_layers)
    ]
    biases = sum(is_moe) * keys.integer("n_routed_experts") if keys.text("topk_method") == "noaux_tc" else 0
    return assemble(keys, layers, router_bias_buffers=biases)


def step3(keys: Keys) -> ModelConfig:
    """Step-3: multi-matrix factorisation attention, a low-rank query and one wide KV head (arXiv 2507.19427)."""
    hidden, rank, count = keys.hidden, keys.integer("share_q_dim"), keys.num_heads
    own = heads(keys, num_kv_heads=keys.integer("num_attention_groups", default=1))
    mixer, weights = gqa(hidden, own)
    query: Weights = (
        *matrix("self_attn.q_proj", rank, hidden, "attention", "replicated"),
        vector("self_attn.inter_norm", rank, "norm"),
        *matrix("self_attn.wq", count * own.head_dim, rank, "attention", "column"),
    )
    attention = (mixer, query + tuple(w for w in weights if w.name != "self_attn.q_proj"))
    sparse_layers = {whole_number(text.strip()) for text in keys.text("moe_layers_enum").split(",")}
    block = routed(keys, shared_width=keys.integer("share_expert_dim", default=0, minimum=0))
    sparse = sparse_block(keys, block, prefix="moe", shared="share_expert")
    plain = dense(hidden, keys.integer("intermediate_size"))
    kinds = {flag: layer([attention], [ffn], norms(hidden)) for flag, ffn in ((True, sparse), (False, plain))}
    return assemble(keys, [kinds[i in sparse_layers] for i in range(keys.num_layers)])


def step3p7(keys: Keys) -> ModelConfig:
    """Step-3.5 and 3.7 Flash: one full layer in four, an output gate per head."""
    kinds = keys.items("layer_types", keys.num_layers) or ["full_attention"] * keys.num_layers
    is_moe = dense_then_moe(keys)
    sparse = sparse_block(
        keys, routed(keys, shared_width=keys.integer("share_expert_dim", default=0, minimum=0)), shared="share_expert"
    )
    plain = dense(keys.hidden, keys.integer("intermediate_size"))
    layers = []
    for i in range(keys.num_layers):
        window = None if kinds[i] == "full_attention" else keys.window()
        mixer = gqa(keys.hidden, heads(keys, window=window, qk_norm="head", gate="head"))
        layers.append(layer([mixer], [sparse if is_moe[i] else plain], norms(keys.hidden)))
    return assemble(keys, layers)


def minimax_m3(keys: Keys) -> ModelConfig:
    """MiniMax-M3 text model: an index over blocks of 128 tokens picks 16 of them in the sparse layers."""
    count, hidden, is_moe = keys.num_layers, keys.hidden, dense_then_moe(keys)
    sparse = sparse_block(keys, routed(keys, width=_m3_width(keys), shared_width=_m3_shared(keys)))
    plain = dense(hidden, keys.integer("dense_intermediate_size", "intermediate_size"))
    full = gqa(hidden, heads(keys, qk_norm="head"))
    indexed = _with_index(hidden, full, keys.object("sparse_attention_config"))
    flags = keys.object("sparse_attention_config").items("sparse_attention_freq", count) or is_moe
    layers = [
        layer([indexed if flags[i] else full], [sparse if is_moe[i] else plain], norms(hidden)) for i in range(count)
    ]
    return assemble(keys, layers)


def _m3_width(keys: Keys) -> int:
    return keys.integer("moe_intermediate_size", "intermediate_size")


def _m3_shared(keys: Keys) -> int:
    return keys.integer("shared_intermediate_size", default=0, minimum=0)


def _with_index(hidden: int, full: tuple[Mixer, Weights], index: Keys) -> tuple[Mixer, Weights]:
    """`full` attention that reads only the blocks its index selects."""
    mixer, weights = full
    count, dim = index.integer("sparse_num_index_heads"), index.integer("sparse_index_dim")
    if not isinstance(mixer, Attention):
        return full
    topk = index.integer("sparse_topk_blocks") * index.integer("sparse_block_size")
    sparse = replace(mixer, kv_values=mixer.kv_values + dim, index_heads=count, index_head_dim=dim, index_topk=topk)
    return sparse, (
        *weights,
        *matrix("self_attn.index_q_proj", count * dim, hidden, "attention", "replicated"),
        *matrix("self_attn.index_k_proj", dim, hidden, "attention", "replicated"),
        vector("self_attn.index_norms", 2 * dim, "norm"),
    )
