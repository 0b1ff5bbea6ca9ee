"""One case is one shape of one operation: the key columns and the axis columns of one row of its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Value = int | str


@dataclass(frozen=True, slots=True)
class Op:
    """Columns of an operation's table. `filled` keys are set by the run, not by a shapes file."""

    keys: tuple[str, ...]
    axes: tuple[str, ...]
    filled: tuple[str, ...] = ("engine",)
    collective: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys, then axes."""
        return (*self.keys, *self.axes)


_HEADS = ("engine", "kv_fmt", "num_heads", "num_kv_heads", "head_dim", "window")
_MLA = ("engine", "kv_fmt", "gemm_fmt", "num_heads")
_EXPERTS = ("hidden", "width", "local_experts", "num_experts", "top_k", "num_matrices", "distribution")
_GROUP = ("num_gpus", "num_nodes")
_EXCHANGE = ("hidden", "top_k", "num_experts", "fmt", "distribution", "family")

OPS: dict[str, Op] = {
    "gemm": Op(("engine", "fmt", "rows", "cols"), ("tokens",)),
    "expert_gemm": Op(("engine", "fmt", *_EXPERTS), ("assignments",), ("engine", "distribution")),
    "expert_parts": Op(("engine", "part", "fmt", "hidden", "width", "num_experts", "top_k"), ("tokens",)),
    "prefill_attention": Op(_HEADS, ("batch", "length")),
    "decode_attention": Op(_HEADS, ("batch", "length")),
    "mla_prefill": Op(_MLA, ("batch", "length")),
    "mla_decode": Op(_MLA, ("batch", "length")),
    "norm": Op(("engine", "kind", "hidden"), ("tokens",)),
    "head": Op(("engine", "kind", "vocab"), ("tokens",)),
    "host": Op(("engine", "kind", "kernels"), ("tokens",)),
    "memory": Op(("engine", "kind"), ("bytes",)),
    "collective": Op(("engine", "op", *_GROUP, "family"), ("bytes",), ("engine", *_GROUP, "family"), True),
    "exchange": Op(
        ("engine", "step", *_GROUP, *_EXCHANGE),
        ("tokens",),
        ("engine", "step", *_GROUP, "distribution", "family"),
        True,
    ),
}

CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "gemm": {"fmt": ("bf16", "fp8")},
    "expert_gemm": {"fmt": ("bf16", "fp8"), "distribution": ("balanced", "lognormal", "one_hot")},
    "expert_parts": {"part": ("swiglu", "permute", "unpermute", "router_topk"), "fmt": ("bf16",)},
    "mla_prefill": {"gemm_fmt": ("kernel",)},
    "mla_decode": {"gemm_fmt": ("kernel",)},
    "norm": {"kind": ("rmsnorm",)},
    "head": {"kind": ("sampling",)},
    "host": {"kind": ("eager_step", "graph_replay", "kernel_launch")},
    "memory": {
        "kind": (
            "hbm_copy",
            "hbm_read",
            "h2d_pinned",
            "d2h_pinned",
            "h2d_overlapped",
            "h2d_pageable",
            "d2h_pageable",
            "nvme_read",
        )
    },
    "collective": {
        "op": ("all_reduce", "all_to_all", "all_gather", "reduce_scatter", "send_recv"),
        "family": ("fresh", "chained"),
    },
    "exchange": {
        "step": ("dispatch", "combine", "layer", "layer_overlapped"),
        "distribution": ("balanced", "lognormal", "one_hot"),
        "family": ("fresh", "chained"),
    },
}
"""Closed vocabularies of text columns. Formats that torch cannot run are accepted and recorded as unsupported."""

TEXT = frozenset({"engine", "fmt", "kv_fmt", "gemm_fmt", "kind", "part", "distribution", "op", "step", "family"})
"""Columns that hold words; all others hold integers."""


@dataclass(frozen=True, slots=True)
class Case:
    """`values` in the order of `OPS[op].columns`.

    `level` is the refinement class (0 first). `width` is the expert width of an exchange layer, which is no column
    of its table and is told in the library column.
    """

    op: str
    values: tuple[Value, ...]
    level: int = field(default=0, compare=False)
    width: int = field(default=0, compare=False)

    @classmethod
    def of(cls, op: str, columns: Mapping[str, Value], level: int = 0, width: int = 0) -> Case:
        """A case from named columns."""
        return cls(op, tuple(columns[name] for name in OPS[op].columns), level, width)

    def _value(self, name: str) -> Value:
        return self.values[OPS[self.op].columns.index(name)]

    def number(self, name: str) -> int:
        """Integer column."""
        return int(self._value(name))

    def text(self, name: str) -> str:
        """Text column."""
        return str(self._value(name))

    def __str__(self) -> str:
        pairs = zip(OPS[self.op].columns, self.values, strict=True)
        words = (str(value) if name in TEXT else f"{name}={value}" for name, value in pairs if name != "engine")
        return f"{self.op} {' '.join(words)}"
