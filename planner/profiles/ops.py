"""The operations a profile may hold: key columns, axis columns and what a time of theirs means.

This is the one place that knows the format. CSV files, compiled tables, the JSON schema, the checks and the
comparison all read it. Names are the CSV's; `stored` is the shorter name inside the compiled `.npz` where it differs.

A `facet` is a key column the planner's own tables do not have (skewed routing, several nodes, fresh-entry timing).
Rows at the facet's plain value are compiled to `<op>.npz`, which the planner reads; all others to
`<op>_detail.npz`, which it never mistakes for a plain answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DETAIL = "_detail"
TIME_COLUMN = "time_us"
QUALITY_COLUMNS = ("p90_us", "spread", "repeats", "library", "origin")
UNMEASURED_ORIGIN = "imported"
"""Origin of a row whose source states no statistics."""


@dataclass(frozen=True, slots=True)
class Column:
    """A key or axis column: `text` or whole number; `default` stands in when a CSV leaves the column out."""

    name: str
    meaning: str
    text: bool = False
    stored: str = ""
    default: str | int | None = None
    choices: tuple[str, ...] = ()
    facet: str | int | None = None
    least: int = 0

    @property
    def key(self) -> str:
        """Name inside the compiled table."""
        return self.stored or self.name


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: its columns, and whether the cost model reads its plain table."""

    name: str
    meaning: str
    keys: tuple[Column, ...]
    axes: tuple[Column, ...]
    used: bool = True

    @property
    def columns(self) -> tuple[Column, ...]:
        """Keys, then axes."""
        return self.keys + self.axes

    @property
    def facets(self) -> tuple[Column, ...]:
        """Columns only the detail table has."""
        return tuple(column for column in self.keys if column.facet is not None)


def _text(name: str, meaning: str, *choices: str, **more: Any) -> Column:
    return Column(name, meaning, text=True, choices=choices, **more)


def _axis(name: str, meaning: str, **more: Any) -> Column:
    return Column(name, meaning, least=1, **more)


ENGINE = _text("engine", "serving engine or library whose kernel was timed: vllm, sglang, trtllm, torch, nccl ...")
FMT = _text("fmt", "number format of the weights: bf16, fp8, fp8_block, nvfp4, mxfp4, int8, int4 ...")
KV_FMT = _text("kv_fmt", "number format of the KV cache", "bf16", "fp8")
GEMM_FMT = _text("gemm_fmt", "format of the module's projections, or `kernel` when only the attention kernel was timed")
HEADS = Column("num_heads", "query heads on the rank", stored="heads", least=1)
TOKENS = _axis("tokens", "tokens of one call")
BATCH = _axis("batch", "sequences of one call")
LENGTH = _axis("length", "tokens per sequence: prompt length, or context in decode")
DISTRIBUTION = _text("distribution", "how assignments spread over experts", facet="balanced", default="balanced")
FAMILY = _text(
    "family", "chained: period in a busy stream; fresh: entry to last rank's exit", facet="chained", default="chained"
)
NUM_GPUS = Column("num_gpus", "ranks that take part", least=2)
NUM_NODES = Column("num_nodes", "scale-up domains they span", least=1, default=1)
_SHAPE = (
    Column("hidden", "hidden size", least=1),
    Column("width", "expert width on the rank", least=1),
    Column("local_experts", "experts on the rank", least=1),
    Column("num_experts", "experts of the layer", least=1),
    Column("top_k", "experts per token", least=1),
    Column("num_matrices", "matrices per expert: 3 gated, 2 plain", default=3, least=1),
)
_GQA = (
    ENGINE,
    KV_FMT,
    Column("window", "sliding window in tokens, 0 for none", default=0),
    Column("head_dim", "values per head", least=1),
    Column("num_kv_heads", "KV heads on the rank", stored="kv_heads", least=1),
    HEADS,
)
_MLA = (ENGINE, GEMM_FMT, KV_FMT, HEADS)
_LINEAR = (
    ENGINE,
    Column("k_heads", "key heads", least=1),
    Column("v_heads", "value heads", least=1),
    Column("k_dim", "key width", least=1),
    Column("v_dim", "value width", least=1),
)
_PAIR = (BATCH, LENGTH)

_ALL = (
    Op(
        "gemm",
        "y[tokens, rows] = x[tokens, cols] w[cols, rows]",
        (ENGINE, FMT, Column("rows", "outputs", least=1), Column("cols", "inputs", least=1)),
        (TOKENS,),
    ),
    Op(
        "expert_gemm",
        "fused expert layer of one rank: permute, grouped GEMMs, activation, unpermute",
        (ENGINE, FMT, *_SHAPE, DISTRIBUTION),
        (_axis("assignments", "token-expert pairs on the timed rank"),),
    ),
    Op(
        "expert_gemm_masked",
        "grouped GEMMs on the fixed buffers of DeepEP low-latency dispatch, no permute",
        (ENGINE, FMT, *_SHAPE),
        (_axis("assignments", "token-expert pairs on the timed rank"),),
        used=False,
    ),
    Op(
        "expert_parts",
        "a part of the expert layer alone",
        (
            ENGINE,
            _text("part", "which part", "swiglu", "permute", "unpermute", "router_topk"),
            FMT,
            Column("hidden", "hidden size"),
            Column("width", "expert width on the rank"),
            Column("num_experts", "experts of the layer"),
            Column("top_k", "experts per token"),
        ),
        (TOKENS,),
        used=False,
    ),
    Op("prefill_attention", "causal attention over whole prompts, empty cache", _GQA, _PAIR),
    Op("decode_attention", "one new token per sequence against its cache", _GQA, _PAIR),
    Op("mla_prefill", "multi-head latent attention over whole prompts", _MLA, _PAIR),
    Op("mla_decode", "multi-head latent attention, one token per sequence", _MLA, _PAIR),
    Op("sparse_mla_prefill", "DeepSeek sparse attention module over prompts", _MLA, _PAIR),
    Op("sparse_mla_decode", "DeepSeek sparse attention module, one token per sequence", _MLA, _PAIR),
    Op(
        "mla_bmm",
        "one absorbed MLA projection (into or out of the latent space)",
        (ENGINE, FMT, _text("part", "before or after attention", "pre", "post"), HEADS),
        (TOKENS,),
        used=False,
    ),
    Op("linear_prefill", "gated delta net over prompts", _LINEAR, _PAIR),
    Op("linear_decode", "gated delta net, one token per sequence", _LINEAR, _PAIR),
    Op(
        "quantize",
        "quantising activations [tokens, cols]",
        (
            ENGINE,
            FMT,
            _text("kind", "finding the scale, or applying it", "compute_scale", "scale_matrix"),
            Column("cols", "values per token", least=1),
        ),
        (TOKENS,),
        used=False,
    ),
    Op(
        "norm",
        "normalisation of the residual stream",
        (ENGINE, _text("kind", "which one", "rmsnorm"), Column("hidden", "hidden size", least=1)),
        (TOKENS,),
        used=False,
    ),
    Op(
        "head",
        "sampling from logits",
        (ENGINE, _text("kind", "which part", "sampling"), Column("vocab", "vocabulary", least=1)),
        (TOKENS,),
        used=False,
    ),
    Op(
        "host",
        "host time of a step",
        (
            ENGINE,
            _text("kind", "what is timed", "eager_step", "graph_replay", "kernel_launch"),
            Column("kernels", "kernels per step", least=1),
        ),
        (TOKENS,),
        used=False,
    ),
    Op(
        "memory",
        "moving bytes within the GPU, to the host, or from a drive",
        (
            ENGINE,
            _text(
                "kind",
                "path",
                "hbm_copy",
                "hbm_read",
                "h2d_pinned",
                "h2d_pageable",
                "d2h_pinned",
                "d2h_pageable",
                "h2d_overlapped",
                "nvme_read",
            ),
        ),
        (_axis("bytes", "bytes moved", stored="size"),),
        used=False,
    ),
    Op(
        "collective",
        "collective of nccl-tests sizes: all_reduce one rank's tensor, all_gather the gathered one, "
        "reduce_scatter the one before, all_to_all what a rank sends",
        (
            ENGINE,
            _text("op", "which", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"),
            Column("graph", "1 when captured in a CUDA graph", default=1),
            NUM_GPUS,
            Column("num_nodes", "scale-up domains they span", least=1, default=1, facet=1),
            FAMILY,
        ),
        (_axis("bytes", "bytes as the op counts them", stored="size"),),
    ),
    Op(
        "dispatch",
        "expert dispatch or combine by an expert-parallel library",
        (
            ENGINE,
            _text("mode", "kernel family", "normal", "low_latency"),
            _text("step", "direction", "dispatch", "combine"),
            FMT,
            NUM_GPUS,
            Column("num_nodes", "scale-up domains they span", stored="nodes", least=1, default=1),
            Column("hidden", "hidden size", least=1),
            Column("top_k", "experts per token", least=1),
            Column("num_experts", "experts of the layer", least=1),
        ),
        (_axis("tokens", "tokens per rank"),),
    ),
    Op(
        "exchange",
        "MoE exchange over plain all-to-all: a baseline, not an expert-parallel library",
        (
            ENGINE,
            _text("step", "which part", "dispatch", "combine", "layer", "layer_overlapped"),
            NUM_GPUS,
            NUM_NODES,
            Column("hidden", "hidden size", least=1),
            Column("top_k", "experts per token", least=1),
            Column("num_experts", "experts of the layer", least=1),
            FMT,
            _text("distribution", "how assignments spread over experts", default="balanced"),
            _text("family", "chained or fresh, as in `collective`", default="chained"),
        ),
        (_axis("tokens", "tokens per rank"),),
        used=False,
    ),
)
OPS: dict[str, Op] = {op.name: op for op in _ALL}


def tables_schema() -> dict[str, Any]:
    """JSON schema of one row of every operation's CSV and of meta.json."""
    from planner.profiles.meta import META_SCHEMA

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Measured profile: <op>.csv rows and meta.json",
        "type": "object",
        "properties": {"meta": META_SCHEMA, **{op.name: _row_schema(op) for op in _ALL}},
        "required": ["meta"],
        "additionalProperties": False,
    }


def _row_schema(op: Op) -> dict[str, Any]:
    properties = {column.name: _column_schema(column) for column in op.columns}
    properties |= {
        TIME_COLUMN: {"type": "number", "exclusiveMinimum": 0, "description": "median time of one call [us]"},
        "p90_us": {"type": "number", "exclusiveMinimum": 0, "description": "90th percentile of the repeats [us]"},
        "spread": {
            "type": "number",
            "minimum": 0,
            "description": "half the width of the 95 % interval of the median over the median",
        },
        "repeats": {"type": "integer", "minimum": 1, "description": "timed iterations"},
        "library": {"type": "string", "description": "kernel or library that ran, with its version"},
        "origin": {"type": "string", "description": "`measured` on the device, `imported` from elsewhere"},
    }
    required = [column.name for column in op.columns if column.default is None] + [TIME_COLUMN]
    row = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"description": op.meaning, "type": "array", "items": row}


def _column_schema(column: Column) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string" if column.text else "integer", "description": column.meaning}
    if column.choices:
        schema["enum"] = list(column.choices)
    if not column.text:
        schema["minimum"] = column.least
    if column.default is not None:
        schema["default"] = column.default
    return schema
