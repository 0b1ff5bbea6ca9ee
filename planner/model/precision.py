"""Stored bytes of weights and caches in every supported format, scales included.

Sources: handbook models.md section 4, which quotes the checkpoints themselves (DeepSeek-V3 for `fp8_block`,
gpt-oss for `mxfp4`, ModelOpt for `nvfp4` and `fp8`, Kimi-K2.5 for `int4_g32`) and the AWQ and GPTQ layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from planner.errors import ModelConfigError, nearest

if TYPE_CHECKING:
    from planner.model.config import Attention, ModelConfig, Weight

FP32_BYTES = 4
_KV_BLOCK = 128
"""Values per fp32 scale in the `fp8_ds_mla` cache and in quantised indexer keys (vLLM; 656 and 132 B)."""


def _groups(size: int, group: int) -> int:
    return -(-size // group)


def _fp8_block(rows: int, cols: int) -> int:
    return rows * cols + FP32_BYTES * _groups(rows, 128) * _groups(cols, 128)


def _mxfp4(rows: int, cols: int) -> int:
    return rows * (_groups(cols, 2) + _groups(cols, 32))


def _nvfp4(rows: int, cols: int) -> int:
    """E2M1 pairs, one E4M3 scale per 16 values, and fp32 weight and input scales per matrix."""
    return rows * (_groups(cols, 2) + _groups(cols, 16)) + 2 * FP32_BYTES


def _int4(group: int) -> Callable[[int, int], int]:
    """compressed-tensors pack-quantized: int4 in int32 words, bf16 group scales, int32 shape [2] per matrix."""
    return lambda rows, cols: rows * (4 * _groups(cols, 8) + 2 * _groups(cols, group)) + 8


def _awq(rows: int, cols: int) -> int:
    """int4 weights, fp16 scales and int4 zero points per group of 128 inputs."""
    groups = _groups(cols, 128)
    return cols * _groups(rows, 2) + groups * (2 * rows + _groups(rows, 2))


STORAGE: dict[str, Callable[[int, int], int]] = {
    "bf16": lambda rows, cols: 2 * rows * cols,
    "fp16": lambda rows, cols: 2 * rows * cols,
    "fp32": lambda rows, cols: FP32_BYTES * rows * cols,
    "fp8": lambda rows, cols: rows * cols + 2 * FP32_BYTES,
    "fp8_block": _fp8_block,
    "fp8_channel": lambda rows, cols: rows * cols + 2 * rows,
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
    "int4_g32": _int4(32),
    "int4_g128": _int4(128),
    "awq": _awq,
    "gptq": lambda rows, cols: _awq(rows, cols) + 4 * cols,
    "int8": lambda rows, cols: rows * cols + 2 * rows,
}
"""Weight format -> bytes of one matrix [rows, cols]. Channel scales are 16-bit, tensor scales fp32."""

_COMPUTE = {"fp16": "bf16", "fp32": "bf16", "fp8_channel": "fp8", "int4_g32": "int4", "int4_g128": "int4"}
_COMPUTE |= {"awq": "int4", "gptq": "int4"}

KV_FORMATS = ("bf16", "fp16", "fp8", "fp8_ds_mla")
UNQUANTIZED = ("bf16", "fp16", "fp32")


def check_format(fmt: str) -> str:
    """`fmt` if it is a weight format.

    Raises `ModelConfigError` naming the near formats otherwise.
    """
    if fmt not in STORAGE:
        raise ModelConfigError(f"unknown weight format {fmt!r}; {nearest(fmt, STORAGE)}")
    return fmt


def stored_bytes(weight: Weight, fmt: str) -> int:
    """Bytes of `weight` in a checkpoint whose part is stored in `fmt`, scales included.

    Block scales are counted with a ceiling on each matrix edge. Vectors and matrices that are never quantised
    take 16 bits; a format pinned on the weight wins over `fmt`.
    """
    fmt = check_format(weight.fmt or fmt)
    if fmt not in UNQUANTIZED and not (weight.is_matrix and weight.is_quantizable):
        fmt = "bf16"
    return STORAGE[fmt](weight.rows // weight.fused, weight.cols) * weight.fused * weight.copies


def compute_format(fmt: str) -> str:
    """Kernel family that multiplies weights stored in `fmt`: bf16, fp8, fp8_block, nvfp4, mxfp4, int4 or int8."""
    return _COMPUTE.get(check_format(fmt), fmt)


def kv_bytes_per_layer(attention: Attention, kv_format: str) -> int:
    """Cache bytes of one token in one layer.

    `fp8_ds_mla` (vLLM) keeps the latent in fp8 with an fp32 scale per 128 values and the rotary key in bf16:
    512 + 16 + 128 = 656 B; an indexer key takes 128 + 4 = 132 B.
    """
    if kv_format not in KV_FORMATS:
        raise ModelConfigError(f"unknown KV cache format {kv_format!r}; {nearest(kv_format, KV_FORMATS)}")
    if kv_format == "fp8":
        return attention.kv_values
    if kv_format != "fp8_ds_mla":
        return 2 * attention.kv_values
    if attention.kv_lora_rank is None or attention.qk_rope_head_dim is None:
        raise ModelConfigError("KV cache format 'fp8_ds_mla' is only for MLA layers; use 'fp8' or 'bf16'")
    index = attention.kv_values - attention.kv_lora_rank - attention.qk_rope_head_dim
    scales = _groups(attention.kv_lora_rank, _KV_BLOCK) + _groups(index, _KV_BLOCK)
    return attention.kv_lora_rank + 2 * attention.qk_rope_head_dim + index + FP32_BYTES * scales


def override(
    model: ModelConfig,
    *,
    experts: str | None = None,
    attention: str | None = None,
    dense: str | None = None,
    kv: str | None = None,
) -> ModelConfig:
    """`model` with other formats for its routed experts, attention, dense parts or KV cache.

    `dense` covers dense feed-forward layers and shared experts; router, norms and embeddings keep theirs.
    Formats that the checkpoint pins on single matrices of an overridden part are dropped.
    """
    wanted = {"expert": experts, "attention": attention, "dense_ffn": dense, "shared_expert": dense}
    chosen = {part: check_format(fmt) for part, fmt in wanted.items() if fmt is not None}
    layers = tuple(replace(layer, weights=_unpin(layer.weights, chosen)) for layer in model.layers)
    changed = replace(
        model,
        layers=layers,
        mtp=_unpin(model.mtp, chosen),
        formats=tuple((part, chosen.get(part, fmt)) for part, fmt in model.formats),
        kv_format=kv or model.kv_format,
    )
    for cache in changed.caches():
        kv_bytes_per_layer(cache, changed.kv_format)
    return changed


def _unpin(weights: tuple[Weight, ...], chosen: dict[str, str]) -> tuple[Weight, ...]:
    return tuple(
        replace(w, fmt=None) if w.fmt is not None and w.is_matrix and w.is_quantizable and w.part in chosen else w
        for w in weights
    )
