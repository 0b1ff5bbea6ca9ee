"""Families with multi-head latent attention: DeepSeek V2 to V4, Kimi K2, GLM-5, LongCat-Flash."""

from __future__ import annotations

from planner.model.blocks import Latent, Weights, matrix, mla, vector
from planner.model.config import Attention, Mixer, ModelConfig
from planner.model.families.assembly import (
    assemble,
    dense_then_moe,
    layer,
    mtp_module,
    routed,
    shared_width,
    sparse_block,
)
from planner.model.feed_forward import dense, norms
from planner.model.keys import Keys


def latent_heads(keys: Keys, indexer: str = "none") -> Latent:
    """MLA widths; `indexer` is "full" for a layer with its own, "shared" for one that reuses a selection."""
    own = indexer == "full"
    return Latent(
        num_heads=keys.num_heads,
        q_lora_rank=keys.optional("q_lora_rank"),
        kv_lora_rank=keys.integer("kv_lora_rank"),
        nope_dim=keys.integer("qk_nope_head_dim"),
        rope_dim=keys.integer("qk_rope_head_dim"),
        v_dim=keys.integer("v_head_dim"),
        index_heads=keys.integer("index_n_heads") if own else 0,
        index_dim=keys.integer("index_head_dim") if own else 0,
        index_topk=keys.integer("index_topk") if indexer != "none" else 0,
    )


def _indexers(keys: Keys) -> list[str]:
    if not keys.has("index_topk"):
        return ["none"] * keys.num_layers
    return keys.items("indexer_types", keys.num_layers) or ["full"] * keys.num_layers


def deepseek(keys: Keys) -> ModelConfig:
    """DeepSeek V2, V3, V3.1, V3.2, R1, Kimi K2 and GLM-5: dense layers first, then experts.

    The multi-token-prediction module is a layer of the sparse kind.
    """
    hidden, is_moe, indexers = keys.hidden, dense_then_moe(keys), _indexers(keys)
    sparse = sparse_block(keys, routed(keys, shared_width=shared_width(keys)))
    plain = dense(hidden, keys.integer("intermediate_size"))
    attention = {kind: mla(hidden, latent_heads(keys, kind)) for kind in set(indexers)}
    layers = [
        layer([attention[indexers[i]]], [sparse if is_moe[i] else plain], norms(hidden)) for i in range(len(is_moe))
    ]
    experts = keys.integer("n_routed_experts") if keys.text("topk_method") == "noaux_tc" else 0
    count = keys.num_mtp
    one = layer([attention[indexers[0]]], [sparse], norms(hidden))
    prefix = f"layers.{keys.num_layers}"
    # DeepSeek ships copies of embedding and head with the module, GLM-5 does not (its Hugging Face element count).
    own = keys.architecture != "GlmMoeDsaForCausalLM"
    module = mtp_module(keys, one, prefix=prefix, num_norms=3, own_embedding=own, own_head=own)
    return assemble(
        keys,
        layers,
        mtp=module * count,
        router_bias_buffers=sum(is_moe) * experts,
        mtp_router_bias_buffers=count * experts,
    )


def longcat(keys: Keys) -> ModelConfig:
    """LongCat-Flash: each layer has two MLA, two dense MLPs and one expert block with identity experts."""
    hidden, width = keys.hidden, keys.integer("ffn_hidden_size")
    block = routed(
        keys,
        width=keys.integer("expert_ffn_hidden_size"),
        identity_experts=keys.integer("zero_expert_num", default=0, minimum=0),
    )
    sparse = sparse_block(keys, block, router="router.classifier")
    mixers = [mla(hidden, latent_heads(keys), f"self_attn.{i}") for i in range(2)]
    mlps = [dense(hidden, width, prefix=f"mlps.{i}") for i in range(2)]
    one = layer(mixers, [*mlps, sparse], norms(hidden, 4))
    candidates = block.num_experts + block.identity_experts
    draft = layer(mixers[:1], mlps[:1], norms(hidden))
    module = mtp_module(keys, draft, prefix="mtp", num_norms=3, own_embedding=True, own_head=False)
    count = keys.num_mtp
    return assemble(keys, [one] * keys.num_layers, mtp=module * count, router_bias_buffers=keys.num_layers * candidates)


def deepseek_v4(keys: Keys) -> ModelConfig:
    """DeepSeek-V4: a 128-token window in every layer plus a cache compressed 4 or 128 times in most.

    Shapes as in transformers 5 `deepseek_v4`: shared key-value head, grouped low-rank output, hyper-connections.
    """
    hidden, count, streams = keys.hidden, keys.num_layers, keys.integer("hc_mult", default=1)
    ratios = [keys.per_layer("compress_ratios", i, 0) for i in range(count)]
    block = routed(keys, shared_width=shared_width(keys))
    sparse = sparse_block(keys, block, prefix="ffn")
    layers = []
    for i in range(count):
        hyper = _hyper("hc", hidden, streams, (2 + streams) * streams, 2)
        layers.append(layer(_compressed(keys, ratios[i]), [sparse], norms(hidden) + hyper))
    hashed = keys.integer("num_hash_layers", default=0, minimum=0)
    draft = layer(_compressed(keys, 0), [sparse], norms(hidden))
    # V4 Base ships copies of embedding and head, the instruct models do not; both leave the rest of the module
    # open (handbook models.md 9), so the count is that of the layer, the projection and its norms.
    module = mtp_module(keys, draft, prefix="mtp.0", num_norms=3, own_embedding=False, own_head=False)
    return assemble(
        keys,
        layers,
        extra=_hyper("hc_head", hidden, streams, streams, 1),
        mtp=module * keys.num_mtp,
        router_bias_buffers=(count - hashed) * block.num_experts,
        notes=("DeepSeek-V4: totals agree with transformers, not yet with a published element count",),
    )


def _hyper(name: str, hidden: int, streams: int, mixes: int, sites: int) -> Weights:
    """Hyper-connection of `sites` places: projection of all streams to `mixes`, its base, and scales."""
    scales = 3 if sites > 1 else 1
    size = sites * (mixes * streams * hidden + mixes + scales)
    return (vector(name, size, "dense_ffn", fmt="fp32"),)


def _compressed(keys: Keys, ratio: int) -> list[tuple[Mixer, Weights]]:
    """Window attention and, for `ratio` > 0, attention over the compressed cache."""
    hidden, count, dim = keys.hidden, keys.num_heads, keys.integer("head_dim")
    rank, groups = keys.integer("q_lora_rank"), keys.integer("o_groups")
    out = groups * keys.integer("o_lora_rank")
    window = Attention("gqa", count, 1, dim, dim, dim, keys.window(), q_lora_rank=rank)
    weights: Weights = (
        *matrix("attn.wq_a", rank, hidden, "attention", "replicated"),
        vector("attn.q_norm", rank, "norm"),
        *matrix("attn.wq_b", count * dim, rank, "attention", "column"),
        *matrix("attn.wkv", dim, hidden, "attention", "replicated"),
        vector("attn.kv_norm", dim, "norm"),
        *matrix("attn.wo_a", out, count * dim // groups, "attention", "column"),
        *matrix("attn.wo_b", hidden, out, "attention", "row"),
        vector("attn.sinks", count, "attention", "column"),
    )
    return [(window, weights), _compressed_cache(keys, ratio)] if ratio else [(window, weights)]


def _compressed_cache(keys: Keys, ratio: int) -> tuple[Mixer, Weights]:
    """Attention over one entry per `ratio` tokens; at ratio 4 an indexer selects among them."""
    hidden, dim, rank = keys.hidden, keys.integer("head_dim"), keys.integer("q_lora_rank")
    indexed = ratio <= 4
    index_dim = keys.integer("index_head_dim") if indexed else 0
    index_heads = keys.integer("index_n_heads") if indexed else 0
    mixer = Attention(
        kind="gqa",
        num_heads=keys.num_heads,
        num_kv_heads=1,
        qk_head_dim=dim,
        v_head_dim=dim,
        kv_values=(dim + index_dim) // ratio,
        q_lora_rank=rank,
        compress_ratio=ratio,
        index_heads=index_heads,
        index_head_dim=index_dim,
        index_topk=keys.integer("index_topk") if indexed else 0,
    )
    # Overlapping windows of the 4-fold compressor need two series per token.
    weights = _compressor("attn.compressor", hidden, dim, ratio, 2 if indexed else 1)
    if indexed:
        name = "attn.indexer"
        weights += _compressor(f"{name}.compressor", hidden, index_dim, ratio, 2)
        weights += matrix(f"{name}.wq_b", index_heads * index_dim, rank, "attention", "replicated")
        weights += matrix(f"{name}.weights_proj", index_heads, hidden, "attention", "replicated", quantizable=False)
    return mixer, weights


def _compressor(name: str, hidden: int, dim: int, ratio: int, series: int) -> Weights:
    return (
        *matrix(f"{name}.wkv", series * dim, hidden, "attention", "replicated", quantizable=False),
        *matrix(f"{name}.wgate", series * dim, hidden, "attention", "replicated", quantizable=False),
        vector(f"{name}.ape", ratio * series * dim, "attention"),
        vector(f"{name}.norm", dim, "norm"),
    )
