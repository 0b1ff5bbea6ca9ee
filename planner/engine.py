"""Serving engines as versioned data: scheduler policy, budgets, memory rule, graph sizes, fixed overheads."""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from planner import tomlfile
from planner.calibration import Calibration, Calibrations, shipped
from planner.errors import InputError, nearest
from planner.tomlfile import Tables

MAX_GRAPH = 16_384
"""More sequences than any engine captures."""
Share = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]
Size = Annotated[float, Ge(0)]


@dataclass(frozen=True, slots=True)
class Budget:
    """Default token budget and running-sequence cap of one scheduler rank on devices of at least `min_hbm_bytes`.

    `offline_batched_tokens` is the token budget of batch jobs without a server, 0 where it is the same.
    """

    min_hbm_bytes: Size
    max_batched_tokens: Count
    max_num_seqs: Count
    offline_batched_tokens: Annotated[int, Ge(0)] = 0
    excluded_arch: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, order=True)
class Limits:
    """What one scheduler rank may run in a step: sequences at once and tokens at once."""

    max_num_seqs: int
    max_batched_tokens: int


@dataclass(frozen=True, slots=True)
class Overheads:
    """Fixed costs of a deployment: memory [bytes] and exposed host time [s]; each has its source in the TOML."""

    context_bytes: Size
    nccl_bytes: Size
    deepep_normal_bytes: Size
    low_latency_tokens: Annotated[int, Ge(0)]
    host_s_per_step: Size
    frontend_s: Size
    frontend_s_per_token: Size


@dataclass(frozen=True, slots=True)
class GraphCeiling:
    """Largest captured batch on devices whose `arch` begins so."""

    arch: str
    max_size: Count


@dataclass(frozen=True, slots=True)
class Graphs:
    """CUDA graphs: captured batch sizes as [first, last, step] runs, up to the smaller of two bounds.

    The bounds are `max_size` (by architecture in `max_size_on`) and `seqs_factor` x the sequence limit. The sequence
    limit itself is captured too. `mixed_steps` says whether steps with prompts run as graphs and are padded.
    """

    ranges: tuple[tuple[Count, Count, Count], ...]
    max_size: Annotated[int, Ge(0)]
    bytes_per_graph: Size
    seqs_factor: Count = 1
    mixed_steps: bool = False
    max_size_on: tuple[GraphCeiling, ...] = ()

    def __post_init__(self) -> None:
        listed = [size for first, last, step in self.ranges for size in range(first, last + 1, step)]
        if listed != sorted(set(listed)):
            raise ValueError("ranges must be runs [first, last, step] of ascending sizes")

    def sizes(self, max_num_seqs: int, arch: str = "") -> tuple[int, ...]:
        """Captured batch sizes, ascending, of a server of `max_num_seqs` on `arch`."""
        ceiling = next((c.max_size for c in self.max_size_on if arch.startswith(c.arch)), self.max_size)
        top = min(ceiling, self.seqs_factor * max_num_seqs)
        listed = {size for first, last, step in self.ranges for size in range(first, min(last, top) + 1, step)}
        return tuple(sorted(listed | ({max_num_seqs} if listed and max_num_seqs <= ceiling else set())))


@dataclass(frozen=True, slots=True)
class TokenRatio:
    """SGLang's guess of how much of their output limit running requests will use (new_token_ratio).

    It starts at `start`, falls by equal steps over `decay_steps` decode steps to `settled_share` of the start, and is
    computed anew when KV runs out: tokens produced plus `retract_steps` per request over the sum of output limits.
    What a request is expected to add is at most `clip_tokens`. Attention-DP multiplies the start by
    `attention_dp_factor`.
    """

    start: Share
    settled_share: Share
    decay_steps: Count
    clip_tokens: Count
    retract_steps: Annotated[int, Ge(0)]
    attention_dp_factor: Annotated[float, Gt(0)] = 1.0


@dataclass(frozen=True, slots=True)
class PrefillBalance:
    """TensorRT-LLM's attention-DP balance: prompts wait until every rank has one, `timeout_steps` at most.

    When all have one and all are decoding, `batching_wait_steps` more steps pass to gather more.
    """

    enabled: bool
    timeout_steps: Count
    batching_wait_steps: Annotated[int, Ge(0)]


@dataclass(frozen=True, slots=True)
class BatchWait:
    """TensorRT-LLM's batch waiting, for servers without attention-DP: prompts wait while others decode until the step
    would hold `token_share` of the token budget, `timeout_steps` at most.
    """

    timeout_steps: Count
    token_share: Share


@dataclass(frozen=True, slots=True)
class DispatchBuffer:
    """What low-latency exchange does with more than `overheads.low_latency_tokens`; see `capacity.buffers`."""

    beyond: Literal["chunks", "error", "fallback"]
    setting: str
    source: str
    ceiling: Count | None = None


@dataclass(frozen=True)
class Engine:
    """One engine version. Defaults change monthly, so they live in `planner/engines/*.toml`, dated.

    `policy` says what a step may hold: prompts and decodes (`mixed`), or prompts alone whenever there are any
    (`prefill_first`). `capacity_policy` says when a request is admitted: when its prompt fits, with preemption later
    (`max_utilization`), when its whole answer fits (`guaranteed_no_evict`), or between the two (`new_token_ratio`).
    `kv_fraction_of` says what `kv_fraction` multiplies: `total` device memory minus all other uses (vLLM),
    memory `free` after weights and activations (TensorRT-LLM), or a `static` reserve formula (SGLang).
    `kv_slots` cuts the KV pool into one equal part per sequence (llama.cpp).
    `rank_router` spreads the requests of a replica over its attention-DP ranks; see `planner.balancer`.
    `receive_interval` is after how many decode steps the scheduler looks for new requests.
    `frontend_workers` says that answers are post-processed in processes of their own.
    `calibrations` are the user's, None for the shipped ones.
    `prefix_caching` says whether blocks of `block_tokens` are found again by prompts that begin alike.
    `static_fraction` is the operator's choice of SGLang's mem_fraction_static, None for its own formula.
    `mxfp4_by_fp8` are the architectures on which MXFP4 weights meet FP8 activations, on others bf16 ones.
    `ubatch_tokens` is the most tokens of one pass over the weights, 0 for a whole step.
    `kernels` names the engine whose measured tables are this one's; with `other` the nearest of any engine stand in.
    Without `moe_backends` there is no attention-DP.
    """

    name: str
    version: str
    as_of: str
    source: str
    policy: Literal["mixed", "prefill_first"]
    capacity_policy: Literal["max_utilization", "guaranteed_no_evict", "new_token_ratio"]
    block_tokens: Count
    kv_fraction: Annotated[float, Gt(0), Le(1)]
    kv_fraction_of: Literal["total", "free", "static"]
    expert_parallel: Literal["all_or_none", "any", "none"]
    moe_backends: tuple[Literal["allgather_reducescatter", "deepep"], ...]
    budgets: tuple[Budget, ...]
    graphs: Graphs
    overheads: Overheads
    kernels: Literal["vllm", "sglang", "trtllm", "other"] = "other"
    usage: Literal["server", "offline"] = "server"
    rank_router: Literal["least_requests", "round_robin", "power_of_two", "vllm_score"] = "least_requests"
    divides_prefill_by_attention_dp: bool = False
    frontend_workers: bool = True
    calibrations: Calibrations | None = None
    static_fraction: Annotated[float, Gt(0), Le(1)] | None = None
    mxfp4_by_fp8: tuple[str, ...] = ()
    receive_interval: Count = 1
    kv_slots: bool = False
    prefix_caching: bool = False
    ubatch_tokens: Annotated[int, Ge(0)] = 0
    token_ratio: TokenRatio | None = None
    prefill_balance: PrefillBalance | None = None
    batch_wait: BatchWait | None = None
    dispatch_buffer: DispatchBuffer | None = None

    def __post_init__(self) -> None:
        if not self.budgets or self.budgets[-1].min_hbm_bytes or self.budgets[-1].excluded_arch:
            raise ValueError("budgets: the last row must be for every device (min_hbm_bytes = 0, no excluded_arch)")
        if self.capacity_policy == "new_token_ratio" and self.token_ratio is None:
            raise ValueError('capacity_policy "new_token_ratio" needs the table [token_ratio]')
        if "deepep" in self.moe_backends and self.dispatch_buffer is None:
            raise ValueError("moe_backends has deepep: say in [dispatch_buffer] what happens beyond low_latency_tokens")

    @property
    def admission_reserve(self) -> float:
        """Share of the unwritten KV of running requests that admission keeps free, where it is a constant."""
        if self.admission_ratio is not None:
            return self.admission_ratio.start * self.admission_ratio.settled_share
        return 1.0 if self.capacity_policy == "guaranteed_no_evict" else 0.0

    @property
    def fitted(self) -> Calibrations:
        """The calibrations in use."""
        return self.calibrations or shipped()

    def calibration(self, arch: str, is_measured: bool = True) -> Calibration:
        """What servers of this engine take beyond the tables on `arch`, of which kernels were measured or not."""
        name = self.name if self.kernels == "other" else self.kernels
        return self.fitted.of(name, arch, is_measured)

    def frontend(self, arch: str) -> tuple[float, float]:
        """Seconds from sending a request to its queue: constant, and per prompt token (tokenising)."""
        fitted = self.calibration(arch)
        alone_s = 0.0 if self.frontend_workers else fitted.unassisted_frontend_s
        constant_s = self.overheads.frontend_s + fitted.frontend_s + alone_s
        return constant_s, self.overheads.frontend_s_per_token + fitted.frontend_s_per_token

    def with_memory_fraction(self, fraction: float) -> Engine:
        """The engine told to use this share of the memory its rule is about (--mem-fraction-static and the like)."""
        if self.kv_fraction_of == "static":
            return replace(self, static_fraction=fraction)
        return replace(self, kv_fraction=fraction)

    @property
    def admission_ratio(self) -> TokenRatio | None:
        """The ratio by which admission goes, None where it goes by `admission_reserve`."""
        return self.token_ratio if self.capacity_policy == "new_token_ratio" else None

    def budget(self, hbm_bytes: float, arch: str = "") -> Limits:
        """Default limits on a device of `arch` with `hbm_bytes` of memory."""
        row = next(
            b for b in self.budgets if hbm_bytes >= b.min_hbm_bytes and not arch.startswith(b.excluded_arch or "\0")
        )
        offline = row.offline_batched_tokens if self.usage == "offline" else 0
        return Limits(row.max_num_seqs, offline or row.max_batched_tokens)

    def padded_batch(self, num_tokens: int, arch: str = "") -> int:
        """Batch after padding to the next of all graphs that a server may have; unchanged above the largest."""
        return _longest_padding(self.graphs, arch)[num_tokens] if num_tokens <= MAX_GRAPH else num_tokens

    def num_graphs(self, max_num_seqs: int, arch: str = "") -> int:
        """Decode graphs of a server of `max_num_seqs`; those for steps with prompts share their memory in vLLM."""
        return sum(size <= max_num_seqs for size in self.graphs.sizes(max_num_seqs, arch))


def padding(sizes: tuple[int, ...], most: int) -> list[int]:
    """Batch after padding to the next of the captured `sizes`, for 0 to `most`; unchanged above the largest (eager)."""
    largest = sizes[-1] if sizes else 0
    return [0] + [n if n > largest else sizes[bisect_left(sizes, n)] for n in range(1, most + 1)]


@lru_cache
def _longest_padding(graphs: Graphs, arch: str) -> list[int]:
    return padding(graphs.sizes(MAX_GRAPH, arch), MAX_GRAPH)


def _files() -> dict[tuple[str, str], Tables]:
    """Tables of the bundled profiles by name and version, oldest version first."""
    found = {}
    for file in resources.files("planner.engines").iterdir():
        if file.name.endswith(".toml"):
            tables = tomlfile.parse(file.read_text("utf-8"), file.name)
            found[tables["name"], tables["version"]] = tables
    return dict(sorted(found.items(), key=lambda item: (item[0][0], _order(item[0][1]))))


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"[0-9]+", version))


@lru_cache
def _bundled() -> dict[str, Tables]:
    """Tables of the bundled profiles by `name-version`."""
    return {f"{name}-{version}": tables for (name, version), tables in _files().items()}


def engines() -> tuple[str, ...]:
    """Names of the bundled engines."""
    return tuple(dict.fromkeys(tables["name"] for tables in _bundled().values()))


def versions() -> tuple[str, ...]:
    """All bundled profiles as `name-version`, the newest of an engine last."""
    return tuple(_bundled())


def engine_tables(text: str) -> Tables:
    """Tables of a profile as written, its base included; `text` as in `engine`."""
    if text.endswith(".toml") or os.sep in text:
        return _on_base(tomlfile.read(Path(text)), text)
    return _bundled()[_resolve(text)]


def engine_text(text: str) -> str:
    """TOML of a profile, `text` as in `engine`: the bundled file with its comments, or a user's with its base."""
    if text.endswith(".toml") or os.sep in text:
        return tomlfile.to_toml(*tomlfile.split_sources(engine_tables(text)))
    file = resources.files("planner.engines").joinpath(f"{_resolve(text)}.toml")
    return file.read_text("utf-8").rstrip()


def engine(text: str) -> Engine:
    """Profile of an engine (`vllm`: its newest version), of a version (`vllm-0.33.0`, `vllm-0.33`) or of a TOML file.

    InputError lists the known ones, or every fault of the file.
    """
    return _from_file(text) if text.endswith(".toml") or os.sep in text else _from_bundle(_resolve(text))


def _resolve(text: str) -> str:
    wanted = text.strip().lower()
    found = [key for key in versions() if _bundled()[key]["name"] == wanted or f"{key}.".startswith(f"{wanted}.")]
    if found:
        return found[-1]
    name, dash, _ = wanted.partition("-")
    if dash and name in engines():
        known = ", ".join(key for key in versions() if _bundled()[key]["name"] == name)
        raise InputError(
            f"engine {text!r}: no profile of that version is bundled, there is {known}. Write your own with "
            f'base = "{name}" and give the file.'
        )
    raise InputError(f"unknown engine {text!r}: {nearest(wanted, engines())} Or give a profile TOML.")


@lru_cache
def _from_bundle(key: str) -> Engine:
    return tomlfile.bundled(Engine, tomlfile.split_sources(_bundled()[key])[0])


def _from_file(text: str) -> Engine:
    return tomlfile.checked(Engine, tomlfile.split_sources(engine_tables(text))[0], text)


def _on_base(tables: Tables, where: str) -> Tables:
    """`tables` over those of the bundled profile that they name as `base`."""
    if "base" not in tables:
        return tables
    if not isinstance(tables["base"], str) or tables["base"].endswith(".toml"):
        raise InputError(f"{where}: base = {tables['base']!r} must name a bundled engine: {', '.join(engines())}")
    missing = [key for key in ("name", "version") if key not in tables]
    if missing:
        raise InputError(f"{where}: a profile with a base needs its own {' and '.join(missing)}")
    changes = {key: value for key, value in tables.items() if key != "base"}
    return tomlfile.merged(engine_tables(tables["base"]), changes)
