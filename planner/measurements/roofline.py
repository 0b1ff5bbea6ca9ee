"""Roofline of every measured operation: time = max(FLOP / ceiling, bytes / bandwidth) + launch.

Two uses: the fallback when nothing is measured, and the arithmetic along which measured utilisation is carried
from one shape to another. Ceilings are measured ones where the hardware profile has them. Launch floors: 3 us for
a GEMM-class kernel (handbook serving 6), 15 us for a tuned fused expert layer (handbook kernels 10).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.measurements.formats import FORMATS, KV_BYTES

Floats = NDArray[np.float64]
Roof = Callable[[Floats], Floats]
Roof2 = Callable[[Floats, Floats], Floats]

GEMM_LAUNCH_S = 3e-6
EXPERT_LAUNCH_S = 15e-6
MODULE_LAUNCH_S = 30e-6
"""An attention module launches about ten kernels of the GEMM class."""
_GEMM_TILE, _FEW_TOKENS = 64, 16
"""Measured GEMM times step at multiples of 64 tokens: with them a token count left out is found with a median error
of 1.1 instead of 1.7 % on H200 and 1.7 instead of 2.5 % on A100. Kernels for up to 16 tokens use small tiles."""
GEMM_STEPS: Floats = _GEMM_TILE * np.arange(1.0, 33.0)
"""Tokens after which a GEMM needs another tile, up to 2,048 where a step is 3 %."""
_EXPERT_TILE = 16
"""Smallest row tile of the grouped GEMM (vLLM and SGLang Triton kernels, handbook serving 6.3)."""
_SPARSE_TOP_K = 2048
"""Tokens attended per query in DeepSeek sparse attention (DeepSeek-V3.2 config.json, index_topk)."""
_INDEX_HEADS, _INDEX_DIM = 64, 128
_MLA_HIDDEN, _MLA_Q_RANK, _MLA_KV_RANK, _MLA_ROPE, _MLA_NOPE, _MLA_V = 7168, 1536, 512, 64, 128, 128
"""DeepSeek-V3 config.json; GLM-5 and Kimi K2 keep the same latent sizes."""


@dataclass(frozen=True, slots=True)
class Fabric:
    """Network between nodes as built: leaf-to-spine `oversubscription` (1 = none) and whether leaves are rails.

    The default is what NVIDIA's and the large clouds' clusters are: one leaf per GPU index and full bisection
    (handbook serving 6.5; DGX SuperPOD reference architecture). Oversubscription divides the bandwidth of whatever
    crosses the spine.
    """

    oversubscription: float = 1.0
    rail_optimised: bool = True


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What one GPU and its links reach at best, already multiplied by measured efficiency.

    `flop_per_s[arithmetic format]`; link rates are per GPU and one direction. `exchange_library` is the library
    whose laws answer for expert exchange nobody measured.
    """

    flop_per_s: Mapping[str, float]
    bytes_per_s: float
    scale_up_bytes_per_s: float
    scale_up_latency_s: float
    scale_up_gpus: int
    scale_out_bytes_per_s: float | None
    scale_out_latency_s: float
    fabric: Fabric = Fabric()
    exchange_library: str = "deepep"

    @classmethod
    def of(cls, system: Any, fabric: Fabric | None = None) -> Ceilings:
        """Ceilings of a `planner.hardware.System` whose nodes are joined by `fabric`."""
        gpu, up, out = system.gpu, system.scale_up, system.scale_out
        formats = ("bf16", "fp8", "fp4", "int8")
        return cls(
            flop_per_s={fmt: gpu.matmul_ceiling_flop_per_s(fmt)[0] for fmt in formats},
            bytes_per_s=gpu.hbm_bytes_per_s * gpu.hbm_efficiency,
            scale_up_bytes_per_s=up.bytes_per_s,
            scale_up_latency_s=up.latency_s or 0.0,
            scale_up_gpus=up.size,
            scale_out_bytes_per_s=None if out is None else out.bytes_per_s,
            scale_out_latency_s=0.0 if out is None else out.latency_s or 0.0,
            fabric=fabric or Fabric(),
            exchange_library="mori" if gpu.vendor == "AMD" else "deepep",
        )

    def rate(self, fmt: str) -> float:
        """FLOP/s of a GEMM in table format `fmt`."""
        return self.flop_per_s[FORMATS[fmt].arithmetic]


def _time(ceilings: Ceilings, flop_s: Floats, bytes_: Floats, launch_s: float) -> Floats:
    return np.maximum(flop_s, bytes_ / ceilings.bytes_per_s) + launch_s


def gemm(ceilings: Ceilings, fmt: str, rows: int, cols: int) -> Roof:
    """[x, cols] by [cols, rows]; x tokens, padded to whole tiles."""
    form, rate = FORMATS[fmt], ceilings.rate(fmt)

    def seconds(x: Floats) -> Floats:
        padded = np.where(x > _FEW_TOKENS, _GEMM_TILE * np.ceil(x / _GEMM_TILE - 1e-9), x)
        bytes_ = form.weight_bytes * rows * cols + padded * (form.activation_bytes * cols + 2.0 * rows)
        return _time(ceilings, 2.0 * padded * rows * cols / rate, bytes_, GEMM_LAUNCH_S)

    return seconds


def expert_gemm(
    ceilings: Ceilings, fmt: str, hidden: int, width: int, local: int, num_matrices: int, handed: float = 1.0
) -> Roof:
    """Fused expert layer; x assignments, balanced: min(local, x) experts stream their weights.

    Rows per expert are padded to the smallest tile; each assignment reads and writes its hidden row and the
    intermediate once (permute and weighted sum included). A kernel that was handed all assignments of the group,
    `handed` for each that it keeps, still passes over the rows of the others: activation and weighted sum run over
    the whole [tokens x top_k] buffers of bf16 (vLLM and SGLang fused_moe).
    """
    form, rate = FORMATS[fmt], ceilings.rate(fmt)
    weights = num_matrices * hidden * width

    def seconds(x: Floats) -> Floats:
        active = np.clip(x, 1.0, local)
        padded = active * _EXPERT_TILE * np.ceil(x / active / _EXPERT_TILE - 1e-9)
        moved = x * (hidden * (2.0 * form.activation_bytes + 8.0) + 4.0 * width)
        moved = moved + x * (handed - 1.0) * (2.0 * hidden + 4.0 * width)
        bytes_ = active * weights * form.weight_bytes + moved
        return _time(ceilings, 2.0 * padded * weights / rate, bytes_, EXPERT_LAUNCH_S)

    return seconds


def pairs(length: Floats, window: int) -> Floats:
    """Query-key pairs of causal attention from an empty cache; `window` 0 means unlimited."""
    full = length * (length + 1) / 2
    if not window:
        return full
    outside = np.maximum(length - window, 0.0)
    return np.asarray(full - outside * (outside + 1) / 2)


def prefill_attention(ceilings: Ceilings, heads: int, kv_heads: int, dim: int, kv_fmt: str, window: int) -> Roof2:
    """Causal GQA over whole prompts: 4 x heads x dim FLOP per pair (handbook serving 6.4)."""
    rate = ceilings.flop_per_s["bf16"]

    def seconds(batch: Floats, length: Floats) -> Floats:
        flop_s = 4.0 * heads * dim * batch * pairs(length, window) / rate
        bytes_ = batch * length * dim * (4.0 * heads + 2.0 * kv_heads * KV_BYTES[kv_fmt])
        return _time(ceilings, flop_s, bytes_, GEMM_LAUNCH_S)

    return seconds


def decode_attention(ceilings: Ceilings, heads: int, kv_heads: int, dim: int, kv_fmt: str, window: int) -> Roof2:
    """One query token per sequence: the whole (windowed) KV cache is read once."""
    rate = ceilings.flop_per_s["bf16"]

    def seconds(batch: Floats, length: Floats) -> Floats:
        seen = np.minimum(length, window) if window else length
        bytes_ = batch * dim * (2.0 * kv_heads * KV_BYTES[kv_fmt] * seen + 4.0 * heads)
        return _time(ceilings, 4.0 * heads * dim * batch * seen / rate, bytes_, GEMM_LAUNCH_S)

    return seconds


def _mla_projections(heads: int) -> float:
    """Weights of the projections of one MLA layer with `heads` heads on the rank."""
    query = _MLA_HIDDEN * _MLA_Q_RANK + _MLA_Q_RANK * heads * (_MLA_NOPE + _MLA_ROPE)
    latent = _MLA_HIDDEN * (_MLA_KV_RANK + _MLA_ROPE) + _MLA_KV_RANK * heads * (_MLA_NOPE + _MLA_V)
    return float(query + latent + heads * _MLA_V * _MLA_HIDDEN)


def _module(ceilings: Ceilings, fmt: str, heads: int, tokens: Floats) -> tuple[Floats, Floats]:
    """FLOP seconds and bytes of the projections over `tokens` tokens."""
    weights, form = _mla_projections(heads), FORMATS[fmt]
    bytes_ = weights * form.weight_bytes + tokens * 4.0 * (_MLA_HIDDEN + heads * _MLA_NOPE)
    return 2.0 * tokens * weights / ceilings.rate(fmt), bytes_


def mla_prefill(ceilings: Ceilings, heads: int, kv_fmt: str, fmt: str | None) -> Roof2:
    """Expanded MLA over whole prompts; with the projections when `fmt` is given."""
    rate = ceilings.flop_per_s["bf16"]
    per_pair = 2.0 * heads * (_MLA_NOPE + _MLA_ROPE + _MLA_V)

    def seconds(batch: Floats, length: Floats) -> Floats:
        tokens = batch * length
        bytes_ = tokens * (heads * 2.0 * (2 * _MLA_NOPE + _MLA_ROPE + 2 * _MLA_V) + 576 * KV_BYTES[kv_fmt])
        kernel = _time(ceilings, per_pair * batch * pairs(length, 0) / rate, bytes_, GEMM_LAUNCH_S)
        if fmt is None:
            return kernel
        return np.asarray(kernel + _time(ceilings, *_module(ceilings, fmt, heads, tokens), MODULE_LAUNCH_S))

    return seconds


def mla_decode(ceilings: Ceilings, heads: int, kv_fmt: str, fmt: str | None) -> Roof2:
    """Absorbed MLA, one token per sequence: the latent cache is read once for all heads."""
    rate = ceilings.flop_per_s["bf16"]
    latent = _MLA_KV_RANK + _MLA_ROPE

    def seconds(batch: Floats, length: Floats) -> Floats:
        flop_s = 2.0 * heads * (latent + _MLA_KV_RANK) * batch * length / rate
        bytes_ = batch * (latent * KV_BYTES[kv_fmt] * length + 4.0 * heads * latent)
        kernel = _time(ceilings, flop_s, bytes_, GEMM_LAUNCH_S)
        if fmt is None:
            return kernel
        tokens = batch * np.ones_like(length)
        return np.asarray(kernel + _time(ceilings, *_module(ceilings, fmt, heads, tokens), MODULE_LAUNCH_S))

    return seconds


def sparse_mla(ceilings: Ceilings, phase: str, heads: int, kv_fmt: str, fmt: str) -> Roof2:
    """DeepSeek sparse attention module: indexer over all pairs, attention over the selected 2,048."""
    rate = ceilings.flop_per_s["bf16"]
    latent = _MLA_KV_RANK + _MLA_ROPE
    per_pair = 2.0 * heads * (latent + _MLA_KV_RANK)

    def seconds(batch: Floats, length: Floats) -> Floats:
        tokens = batch * (length if phase == "prefill" else np.ones_like(length))
        every = pairs(length, 0) if phase == "prefill" else length
        chosen = pairs(length, _SPARSE_TOP_K) if phase == "prefill" else np.minimum(length, _SPARSE_TOP_K)
        flop_s = batch * (per_pair * chosen + 2.0 * _INDEX_HEADS * _INDEX_DIM * every) / rate
        bytes_ = batch * (latent * KV_BYTES[kv_fmt] * (chosen if phase == "decode" else length) + _INDEX_DIM * length)
        kernel = _time(ceilings, flop_s, bytes_, GEMM_LAUNCH_S)
        return np.asarray(kernel + _time(ceilings, *_module(ceilings, fmt, heads, tokens), MODULE_LAUNCH_S))

    return seconds


def linear_attention(ceilings: Ceilings, phase: str, k_heads: int, v_heads: int, k_dim: int, v_dim: int) -> Roof2:
    """Gated delta rule: fp32 state read and written per step (decode) or 6 FLOP per state value and token."""
    rate = ceilings.flop_per_s["bf16"]
    state = float(v_heads * k_dim * v_dim)
    moved = 2.0 * (2 * k_heads * k_dim + 3 * v_heads * v_dim)

    def seconds(batch: Floats, length: Floats) -> Floats:
        tokens = batch * (length if phase == "prefill" else np.ones_like(length))
        bytes_ = 8.0 * state * batch * np.ones_like(length) + 3.0 * moved * tokens
        return _time(ceilings, 6.0 * tokens * state / rate, bytes_, 2 * GEMM_LAUNCH_S)

    return seconds
