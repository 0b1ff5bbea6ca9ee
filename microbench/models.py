"""Shapes of five published MoE models at tensor and expert parallelism 1, 4 and 8.

Sizes are those of the config.json files on Hugging Face, read 2026-11: mistralai/Mixtral-8x7B-v0.1,
deepseek-ai/DeepSeek-V3, Qwen/Qwen3-30B-A3B, Qwen/Qwen3-235B-A22B, openai/gpt-oss-120b.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from microbench.cases import CHOICES, Value

Shape = dict[str, Value]
DEGREES = (8, 4, 1)
_HOST_STEPS = (1000, 100)
"""Kernels per step that host overhead is measured with; it is linear in them, so two points give both terms."""


@dataclass(frozen=True, slots=True)
class Moe:
    """Sizes of one model; `latent` is true for multi-head latent attention (DeepSeek-V3: q rank 1536, KV 512 + 64)."""

    hidden: int
    width: int
    num_experts: int
    top_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    latent: bool = False
    dense_width: int = 0
    window: int = 0


MODELS = {
    "DeepSeek-V3": Moe(7168, 2048, 256, 8, 128, 128, 128, 129280, latent=True, dense_width=18432),
    "Qwen3-30B-A3B": Moe(2048, 768, 128, 8, 32, 4, 128, 151936),
    "gpt-oss-120b": Moe(2880, 2880, 128, 4, 64, 8, 64, 201088, window=128),
    "Mixtral-8x7B": Moe(4096, 14336, 8, 2, 32, 8, 128, 32000),
    "Qwen3-235B-A22B": Moe(4096, 1536, 128, 8, 64, 4, 128, 151936),
}


def built_in_shapes() -> list[tuple[str, Shape]]:
    """(operation, key columns) without the columns that a run fills; most informative first, no duplicates."""
    shapes: dict[tuple[str, tuple[tuple[str, Value], ...]], None] = {}
    for degree in DEGREES:
        for model in MODELS.values():
            for op, shape in _model_shapes(model, degree):
                shapes.setdefault((op, tuple(shape.items())))
    for op, shape in _machine_shapes():
        shapes.setdefault((op, tuple(shape.items())))
    return [(op, dict(items)) for op, items in shapes]


def _model_shapes(model: Moe, degree: int) -> Iterator[tuple[str, Shape]]:
    """Operations of one layer and the head with `degree`-way tensor and expert parallelism."""
    yield from _experts(model, degree)
    for rows, cols in _gemms(model, degree):
        for fmt in ("bf16", "fp8"):
            yield "gemm", {"fmt": fmt, "rows": rows, "cols": cols}
    yield from _attention(model, degree)
    yield "norm", {"kind": "rmsnorm", "hidden": model.hidden}
    yield "head", {"kind": "sampling", "vocab": model.vocab}


def _experts(model: Moe, degree: int) -> Iterator[tuple[str, Shape]]:
    splits = {(model.width, model.num_experts // degree), (model.width // degree, model.num_experts)}
    for width, local in sorted(splits, reverse=True):
        for fmt in ("bf16", "fp8"):
            shape: Shape = {"fmt": fmt, "hidden": model.hidden, "width": width, "local_experts": local}
            yield "expert_gemm", shape | {"num_experts": model.num_experts, "top_k": model.top_k, "num_matrices": 3}
    for part in CHOICES["expert_parts"]["part"]:
        shape = {"part": part, "fmt": "bf16", "hidden": model.hidden, "width": model.width}
        yield "expert_parts", shape | {"num_experts": model.num_experts, "top_k": model.top_k}
    exchanged: Shape = {"hidden": model.hidden, "top_k": model.top_k, "num_experts": model.num_experts}
    yield "exchange", exchanged | {"fmt": "bf16", "width": model.width}


def _gemms(model: Moe, degree: int) -> Iterator[tuple[int, int]]:
    """(rows, cols) of the dense weights of one layer, of the router and of the head."""
    heads = max(1, model.num_heads // degree)
    if model.latent:
        yield 1536 + 512 + 64, model.hidden
        yield heads * 192, 1536
        yield heads * 256, 512
        yield model.hidden, heads * 128
    else:
        yield (heads + 2 * max(1, model.num_kv_heads // degree)) * model.head_dim, model.hidden
        yield model.hidden, heads * model.head_dim
    if model.dense_width:
        yield 2 * model.dense_width // degree, model.hidden
        yield model.hidden, model.dense_width // degree
    yield model.num_experts, model.hidden
    yield model.vocab // degree, model.hidden


def _attention(model: Moe, degree: int) -> Iterator[tuple[str, Shape]]:
    heads = max(1, model.num_heads // degree)
    if model.latent:
        for op in ("mla_prefill", "mla_decode"):
            yield op, {"kv_fmt": "bf16", "gemm_fmt": "kernel", "num_heads": heads}
        return
    for window in sorted({0, model.window}):
        for op in ("prefill_attention", "decode_attention"):
            shape: Shape = {"kv_fmt": "bf16", "num_heads": heads, "num_kv_heads": max(1, model.num_kv_heads // degree)}
            yield op, shape | {"head_dim": model.head_dim, "window": window}


def _machine_shapes() -> Iterator[tuple[str, Shape]]:
    """Operations that depend on the machine only; measured whatever the model."""
    for kind in CHOICES["memory"]["kind"]:
        yield "memory", {"kind": kind}
    yield "host", {"kind": "kernel_launch", "kernels": 1}
    for kernels in _HOST_STEPS:
        for kind in ("eager_step", "graph_replay"):
            yield "host", {"kind": kind, "kernels": kernels}
    for op in CHOICES["collective"]["op"]:
        yield "collective", {"op": op}


def machine_shapes() -> list[tuple[str, Shape]]:
    """Shapes of memory, host and collective, which a shapes file need not list."""
    return list(_machine_shapes())
