"""Serving engines as versioned data: scheduler policy, budgets, memory rule, graph sizes, fixed overheads."""

from __future__ import annotations

import tomllib
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from typing import Any, Literal

from planner.errors import InputError, nearest


@dataclass(frozen=True, slots=True)
class Budget:
    """Default token budget and running-sequence cap of one scheduler rank on devices of at least `min_hbm_bytes`."""

    min_hbm_bytes: float
    max_batched_tokens: int
    max_num_seqs: int
    excluded_arch: str = ""


@dataclass(frozen=True, slots=True, order=True)
class Limits:
    """What one scheduler rank may run in a step: sequences at once and tokens at once."""

    max_num_seqs: int
    max_batched_tokens: int


@dataclass(frozen=True, slots=True)
class Overheads:
    """Fixed costs of a deployment: memory [bytes] and exposed host time [s]; each has its source in the TOML."""

    context_bytes: float
    nccl_bytes: float
    deepep_normal_bytes: float
    low_latency_tokens: int
    host_s_per_step: float
    frontend_s: float
    frontend_s_per_token: float


@dataclass(frozen=True)
class Engine:
    """One engine version. Defaults change monthly, so they live in `planner/engines/*.toml`, dated.

    `kv_fraction_of` says what `kv_fraction` multiplies: `total` device memory minus all other uses (vLLM),
    memory `free` after weights and activations (TensorRT-LLM), or a `static` reserve formula (SGLang).
    `receive_interval` is after how many decode steps the scheduler looks for new requests.
    `prefix_caching` says whether blocks of `block_tokens` are found again by prompts that begin alike.
    `admission_reserve` is the share of the KV that running requests have yet to write that admission keeps free.
    """

    name: str
    version: str
    as_of: str
    source: str
    policy: Literal["mixed", "prefill_first"]
    block_tokens: int
    kv_fraction: float
    kv_fraction_of: Literal["total", "free", "static"]
    expert_parallel: Literal["all_or_none", "any"]
    moe_backends: tuple[str, ...]
    budgets: tuple[Budget, ...]
    graph_ranges: tuple[tuple[int, int, int], ...]
    bytes_per_graph: float
    overheads: Overheads
    admission_reserve: float
    prefix_caching: bool
    divides_prefill_by_attention_dp: bool = False
    receive_interval: int = 1

    def budget(self, hbm_bytes: float, arch: str = "") -> Budget:
        """Default budget on a device of `arch` with `hbm_bytes` of memory."""
        return next(
            b
            for b in self.budgets
            if hbm_bytes >= b.min_hbm_bytes and not (b.excluded_arch and arch.startswith(b.excluded_arch))
        )

    @cached_property
    def graph_sizes(self) -> tuple[int, ...]:
        """Captured decode batch sizes, ascending."""
        return tuple(size for first, last, step in self.graph_ranges for size in range(first, last + 1, step))

    def padded_batch(self, num_seqs: int) -> int:
        """Decode batch after padding to a captured graph; unchanged above the largest graph (eager)."""
        sizes = self.graph_sizes
        return num_seqs if num_seqs > sizes[-1] else sizes[bisect_left(sizes, num_seqs)]

    def num_graphs(self, max_num_seqs: int) -> int:
        """Graphs captured for decode batches up to `max_num_seqs`."""
        return bisect_left(self.graph_sizes, max_num_seqs + 1)


def engines() -> tuple[str, ...]:
    """Names of the bundled engine profiles."""
    files = resources.files("planner.engines").iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")))


@lru_cache
def engine(name: str) -> Engine:
    """The bundled profile called `name`; InputError lists the known ones."""
    if name not in engines():
        raise InputError(f"unknown engine {name!r}: {nearest(name, engines())}")
    table = tomllib.loads(resources.files("planner.engines").joinpath(f"{name}.toml").read_text("utf-8"))
    return _engine(table)


def _engine(table: dict[str, Any]) -> Engine:
    overheads = table["overheads"]
    plain = {key: value for key, value in table.items() if key not in ("budgets", "graphs", "overheads")}
    plain["moe_backends"] = tuple(plain["moe_backends"])
    return Engine(
        **plain,
        budgets=tuple(Budget(**row) for row in table["budgets"]),
        graph_ranges=tuple((first, last, step) for first, last, step in table["graphs"]["ranges"]),
        bytes_per_graph=table["graphs"]["bytes_per_graph"],
        overheads=Overheads(**{key: overheads[key] for key in Overheads.__slots__}),
    )
