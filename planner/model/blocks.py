"""Attention and recurrent mixers: the facts the simulator needs and the weights they own.

Shapes follow the published modelling code; every builder returns the mixer and its weights, rows = output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.model.config import Attention, Part, Recurrent, Shard, Weight

Weights = tuple[Weight, ...]


def matrix(
    name: str,
    rows: int,
    cols: int,
    part: Part,
    shard: Shard,
    *,
    copies: int = 1,
    fused: int = 1,
    bias: bool = False,
    quantizable: bool = True,
    fmt: str | None = None,
) -> Weights:
    """A weight matrix [rows, cols] and, with `bias`, its bias [rows]."""
    weight = Weight(name, rows, cols, part, shard, copies, fused=fused, fmt=fmt, is_quantizable=quantizable)
    if not bias:
        return (weight,)
    return weight, vector(name + ".bias", rows, part, "replicated" if shard == "row" else shard, copies=copies)


def vector(
    name: str, size: int, part: Part, shard: Shard = "replicated", *, copies: int = 1, fmt: str | None = None
) -> Weight:
    """A norm, bias, convolution or decay of `size` values: memory, but no GEMM."""
    return Weight(name, size, 1, part, shard, copies, is_matrix=False, fmt=fmt)


@dataclass(frozen=True, slots=True)
class Heads:
    """Grouped-query attention: widths and the small differences between families.

    `qk_norm` is per head or over the full projection; `gate` adds an output gate as wide as the queries
    ("full", Qwen3-Next) or one value per head ("head", Step-3.7); `reuses_kv` has no key and value projections
    and no cache of its own (Hunyuan CLA); `k_is_v` has no value projection (Gemma-4 global layers).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    gate: Literal["none", "head", "full"] = "none"
    sinks: bool = False
    reuses_kv: bool = False
    k_is_v: bool = False
    is_cross: bool = False


def gqa(hidden: int, heads: Heads, prefix: str = "self_attn") -> tuple[Attention, Weights]:
    """Multi-head, grouped-query or multi-query attention."""
    v_dim = heads.v_head_dim or heads.head_dim
    cached = 0 if heads.reuses_kv else heads.num_kv_heads * (heads.head_dim + v_dim)
    mixer = Attention(
        "gqa", heads.num_heads, heads.num_kv_heads, heads.head_dim, v_dim, cached, heads.window, is_cross=heads.is_cross
    )
    q_rows, o_cols = heads.num_heads * heads.head_dim, heads.num_heads * v_dim
    gates = 2 if heads.gate == "full" else 1
    weights = matrix(f"{prefix}.q_proj", gates * q_rows, hidden, "attention", "column", bias=heads.qkv_bias)
    if not heads.reuses_kv:
        weights += _key_value(hidden, heads, v_dim, prefix)
    weights += matrix(f"{prefix}.o_proj", hidden, o_cols, "attention", "row", bias=heads.o_bias)
    if heads.gate == "head":
        weights += matrix(f"{prefix}.g_proj", heads.num_heads, hidden, "attention", "column", quantizable=False)
    if heads.sinks:
        weights += (vector(f"{prefix}.sinks", heads.num_heads, "attention", "column"),)
    if heads.qk_norm != "none":
        full = heads.qk_norm == "full"
        q_size = q_rows if full else heads.head_dim
        k_size = heads.num_kv_heads * heads.head_dim if full else heads.head_dim
        weights += (vector(f"{prefix}.q_norm", q_size, "norm"),)
        weights += () if heads.reuses_kv else (vector(f"{prefix}.k_norm", k_size, "norm"),)
    return mixer, weights


def _key_value(hidden: int, heads: Heads, v_dim: int, prefix: str) -> Weights:
    rows = heads.num_kv_heads * heads.head_dim
    weights = matrix(f"{prefix}.k_proj", rows, hidden, "attention", "kv_column", bias=heads.qkv_bias)
    if heads.k_is_v:
        return weights
    rows = heads.num_kv_heads * v_dim
    return weights + matrix(f"{prefix}.v_proj", rows, hidden, "attention", "kv_column", bias=heads.qkv_bias)


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention; `q_lora_rank` None means a plain query projection (V2-Lite).

    `index_heads` and `index_dim` describe this layer's own sparse-attention indexer (0: none), `index_topk` the
    keys it selects, whether by its own indexer or by the previous layer's (GLM-5.2).
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    index_heads: int = 0
    index_dim: int = 0
    index_topk: int = 0


def mla(hidden: int, latent: Latent, prefix: str = "self_attn") -> tuple[Attention, Weights]:
    """DeepSeek-V2 multi-head latent attention (arXiv 2405.04434 2.1), with the V3.2 indexer when present."""
    qk_dim = latent.nope_dim + latent.rope_dim
    mixer = Attention(
        kind="mla",
        num_heads=latent.num_heads,
        num_kv_heads=1,
        qk_head_dim=qk_dim,
        v_head_dim=latent.v_dim,
        kv_values=latent.kv_lora_rank + latent.rope_dim + latent.index_dim,
        q_lora_rank=latent.q_lora_rank,
        kv_lora_rank=latent.kv_lora_rank,
        qk_rope_head_dim=latent.rope_dim,
        index_heads=latent.index_heads,
        index_head_dim=latent.index_dim,
        index_topk=latent.index_topk,
    )
    kv_rows, kv_up = latent.kv_lora_rank + latent.rope_dim, latent.num_heads * (latent.nope_dim + latent.v_dim)
    weights = _latent_queries(hidden, latent, qk_dim, prefix)
    weights += matrix(f"{prefix}.kv_a_proj_with_mqa", kv_rows, hidden, "attention", "replicated")
    weights += (vector(f"{prefix}.kv_a_layernorm", latent.kv_lora_rank, "norm"),)
    weights += matrix(f"{prefix}.kv_b_proj", kv_up, latent.kv_lora_rank, "attention", "column")
    weights += matrix(f"{prefix}.o_proj", hidden, latent.num_heads * latent.v_dim, "attention", "row")
    return mixer, weights + _indexer(hidden, latent, f"{prefix}.indexer")


def _latent_queries(hidden: int, latent: Latent, qk_dim: int, prefix: str) -> Weights:
    rows, rank = latent.num_heads * qk_dim, latent.q_lora_rank
    if rank is None:
        return matrix(f"{prefix}.q_proj", rows, hidden, "attention", "column")
    return (
        *matrix(f"{prefix}.q_a_proj", rank, hidden, "attention", "replicated"),
        vector(f"{prefix}.q_a_layernorm", rank, "norm"),
        *matrix(f"{prefix}.q_b_proj", rows, rank, "attention", "column"),
    )


def _indexer(hidden: int, latent: Latent, prefix: str) -> Weights:
    """Lightning indexer; its key norm is a LayerNorm with bias and its head weights stay 16-bit."""
    if not latent.index_heads:
        return ()
    rows = latent.index_heads * latent.index_dim
    return (
        *matrix(f"{prefix}.wq_b", rows, latent.q_lora_rank or hidden, "attention", "replicated"),
        *matrix(f"{prefix}.wk", latent.index_dim, hidden, "attention", "replicated"),
        vector(f"{prefix}.k_norm", 2 * latent.index_dim, "norm"),
        *matrix(f"{prefix}.weights_proj", latent.index_heads, hidden, "attention", "replicated", quantizable=False),
    )


def gated_delta(
    hidden: int, k_heads: int, v_heads: int, k_dim: int, v_dim: int, kernel: int, *, split: bool
) -> tuple[Recurrent, Weights]:
    """Gated DeltaNet of Qwen3-Next; `split` projections are Qwen3.5's four instead of two, equal in sum."""
    keys, values, prefix = k_heads * k_dim, v_heads * v_dim, "linear_attn"
    channels = 2 * keys + values
    mixer = Recurrent("gated_delta", v_heads * k_dim * v_dim, channels * (kernel - 1), k_heads, v_heads, k_dim, v_dim)
    wide = {"in_proj_qkv": channels, "in_proj_z": values} if split else {"in_proj_qkvz": channels + values}
    narrow = {"in_proj_b": v_heads, "in_proj_a": v_heads} if split else {"in_proj_ba": 2 * v_heads}
    weights: Weights = ()
    for name, rows in wide.items():
        weights += matrix(f"{prefix}.{name}", rows, hidden, "attention", "column")
    for name, rows in narrow.items():
        weights += matrix(f"{prefix}.{name}", rows, hidden, "attention", "column", quantizable=False)
    weights += (
        vector(f"{prefix}.conv1d", channels * kernel, "attention", "column"),
        vector(f"{prefix}.dt_bias", v_heads, "attention", "column"),
        vector(f"{prefix}.A_log", v_heads, "attention", "column"),
        vector(f"{prefix}.norm", v_dim, "norm"),
    )
    return mixer, weights + matrix(f"{prefix}.out_proj", hidden, values, "attention", "row")


def kimi_delta(hidden: int, heads: int, dim: int, kernel: int) -> tuple[Recurrent, Weights]:
    """Kimi Delta Attention: per-channel decay from a low-rank projection of rank `dim` (arXiv 2510.26692)."""
    width, prefix = heads * dim, "self_attn"
    mixer = Recurrent("kda", heads * dim * dim, 3 * width * (kernel - 1), heads, heads, dim, dim)
    weights: Weights = ()
    for name in ("q_proj", "k_proj", "v_proj"):
        weights += matrix(f"{prefix}.{name}", width, hidden, "attention", "column")
    for name in ("f", "g"):
        weights += matrix(f"{prefix}.{name}_a_proj", dim, hidden, "attention", "replicated")
        weights += matrix(f"{prefix}.{name}_b_proj", width, dim, "attention", "column")
    weights += (
        *matrix(f"{prefix}.b_proj", heads, hidden, "attention", "column"),
        vector(f"{prefix}.conv1d", 3 * width * kernel, "attention", "column"),
        vector(f"{prefix}.A_log", heads, "attention", "column"),
        vector(f"{prefix}.dt_bias", width, "attention", "column"),
        vector(f"{prefix}.o_norm", dim, "norm"),
    )
    return mixer, weights + matrix(f"{prefix}.o_proj", hidden, width, "attention", "row")


def lightning(hidden: int, heads: int, dim: int) -> tuple[Recurrent, Weights]:
    """Lightning attention of MiniMax-01: fused q, k, v, an output gate and a norm over all heads."""
    width, prefix = heads * dim, "self_attn"
    mixer = Recurrent("lightning", heads * dim * dim, 0, heads, heads, dim, dim)
    return mixer, (
        *matrix(f"{prefix}.qkv_proj", 3 * width, hidden, "attention", "column", fused=3),
        *matrix(f"{prefix}.output_gate", width, hidden, "attention", "column"),
        vector(f"{prefix}.norm", width, "norm"),
        *matrix(f"{prefix}.out_proj", hidden, width, "attention", "row"),
    )


def mamba1(hidden: int, expand: int, state: int, kernel: int, dt_rank: int) -> tuple[Recurrent, Weights]:
    """Jamba's Mamba-1 mixer: convolution and dt biases, norms on dt, B and C."""
    inner, prefix = expand * hidden, "mamba"
    mixer = Recurrent("mamba1", inner * state, inner * (kernel - 1))
    return mixer, (
        *matrix(f"{prefix}.in_proj", 2 * inner, hidden, "attention", "column"),
        vector(f"{prefix}.conv1d", inner * (kernel + 1), "attention", "column"),
        *matrix(f"{prefix}.x_proj", dt_rank + 2 * state, inner, "attention", "row"),
        *matrix(f"{prefix}.dt_proj", inner, dt_rank, "attention", "column", bias=True),
        vector(f"{prefix}.A_log", inner * state, "attention", "column"),
        vector(f"{prefix}.D", inner, "attention", "column"),
        vector(f"{prefix}.layernorms", dt_rank + 2 * state, "norm"),
        *matrix(f"{prefix}.out_proj", hidden, inner, "attention", "row"),
    )


def mamba2(hidden: int, heads: int, dim: int, groups: int, state: int, kernel: int) -> tuple[Recurrent, Weights]:
    """Nemotron-H's Mamba-2 mixer, with a convolution bias and a gated norm."""
    inner, prefix = heads * dim, "mixer"
    channels = inner + 2 * groups * state
    mixer = Recurrent("mamba2", inner * state, channels * (kernel - 1), groups, heads, state, dim)
    return mixer, (
        *matrix(f"{prefix}.in_proj", inner + channels + heads, hidden, "attention", "column"),
        vector(f"{prefix}.conv1d", channels * (kernel + 1), "attention", "column"),
        vector(f"{prefix}.dt_bias_A_log_D", 3 * heads, "attention", "column"),
        vector(f"{prefix}.norm", inner, "norm"),
        *matrix(f"{prefix}.out_proj", hidden, inner, "attention", "row"),
    )
