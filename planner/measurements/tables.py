"""`open_tables(system, engine)`: time of every operation, measured where possible, roofline elsewhere.

Each method returns a `Curve` or `Surface`. The order of trust: the engine's own table, interpolated; another
engine's table of the same GPU or another number format, its utilisation carried over (EXTRAPOLATED); roofline.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import numpy as np

from planner.errors import InputError
from planner.hardware import System
from planner.measurements import links, roofline, transfer
from planner.measurements.collectives import all_reduce_curve, collective_curve, exchange_curve
from planner.measurements.curves import Curve, Origin, Surface, roofline_curve, roofline_surface
from planner.measurements.dense import gemm_match
from planner.measurements.exchange import Exchange
from planner.measurements.experts import expert_curve, expert_match, handed_per_kept
from planner.measurements.formats import FORMATS, canonical, kv_format
from planner.measurements.library import Library, Match, find, format_penalty, measured_directory
from planner.measurements.roofline import Ceilings, Fabric

Phase = Literal["prefill", "decode"]
Mode = Literal["normal", "low_latency"]
ENGINES = ("vllm", "sglang", "trtllm", "other")
"""Whose kernels are meant; `other` has none of its own, so every table counts as another engine's."""
DEFAULT_FABRIC = Fabric()

P = ParamSpec("P")
R = TypeVar("R")


def _memoised(method: Callable[Concatenate[Tables, P], R]) -> Callable[Concatenate[Tables, P], R]:
    """Remember a method's answers on the instance; arguments are hashable."""

    @wraps(method)
    def remembered(self: Tables, /, *args: P.args, **kwargs: P.kwargs) -> R:
        key = (method.__name__, args, tuple(sorted(kwargs.items())))
        if key not in self._memo:
            self._memo[key] = method(self, *args, **kwargs)
        return self._memo[key]  # type: ignore[no-any-return]

    return remembered


class Tables:
    """Times of one engine on one system. Lookups are memoised; `sources` tells what answered, per operation."""

    def __init__(self, system: System, engine: str, library: Library, ceilings: Ceilings) -> None:
        self.system, self.engine, self.library, self.ceilings = system, engine, library, ceilings
        self.sources: dict[str, str] = {}
        self._memo: dict[Any, Any] = {}

    @property
    def is_measured(self) -> bool:
        """Some kernel of this system was measured, by whichever engine."""
        return self.library.directory is not None

    @_memoised
    def gemm(self, fmt: str, rows: int, cols: int) -> Curve:
        """y[x, rows] = input[x, cols] times weights[cols, rows]; x tokens."""
        name = canonical(fmt)
        roof = roofline.gemm(self.ceilings, name, rows, cols)
        match = gemm_match(self.library.table("gemm"), self.engine, name, rows, cols)
        self._note("gemm", match)
        if match is None:
            return roofline_curve(roof)
        keys = match.table.keys

        def roof_of(series: int) -> roofline.Roof:
            measured = match.table.label("fmt", series)
            return roofline.gemm(self.ceilings, measured, int(keys["rows"][series]), int(keys["cols"][series]))

        return transfer.curve(match, "tokens", roof, roof_of, steps=roofline.GEMM_STEPS)

    @_memoised
    def expert_gemm(
        self,
        fmt: str,
        hidden: int,
        width: int,
        local_experts: int,
        num_experts: int,
        top_k: int,
        num_matrices: int = 3,
        dispatched: bool = False,
    ) -> Curve:
        """Fused expert layer of one rank (GEMMs, activation, permute); x assignments on the rank, balanced.

        `width` is the expert width on the rank, `local_experts` the experts on it. The published kernels at EP > 1
        were handed all tokens of the group and pay for sorting them; so do TP and all-gather layouts. `dispatched`
        says that the rank receives only what is routed to it (DeepEP): then utilisation comes from series that
        were handed at most one token per assignment.
        """
        shape = (hidden, width, local_experts, num_matrices)
        match = expert_match(
            self.library.table("expert_gemm"), self.engine, canonical(fmt), shape, num_experts, top_k, dispatched
        )
        self._note("expert_gemm", match)
        handed = 1.0 if dispatched else handed_per_kept(hidden, local_experts, num_experts, top_k)
        if match is None:
            return roofline_curve(roofline.expert_gemm(self.ceilings, canonical(fmt), *shape, handed))
        return expert_curve(match, self.ceilings, canonical(fmt), shape, handed)

    @_memoised
    def prefill_attention(
        self, num_heads: int, num_kv_heads: int, head_dim: int, kv_fmt: str, window: int | None = None
    ) -> Surface:
        """Causal attention over (batch of equal prompts, prompt length), from an empty cache; heads per rank."""
        return self._attention("prefill_attention", num_heads, num_kv_heads, head_dim, kv_format(kv_fmt), window or 0)

    @_memoised
    def decode_attention(
        self, num_heads: int, num_kv_heads: int, head_dim: int, kv_fmt: str, window: int | None = None
    ) -> Surface:
        """One token each of (sequences, context length); heads per rank."""
        return self._attention("decode_attention", num_heads, num_kv_heads, head_dim, kv_format(kv_fmt), window or 0)

    def _attention(self, op: str, heads: int, kv_heads: int, dim: int, kv_fmt: str, window: int) -> Surface:
        make = roofline.prefill_attention if op == "prefill_attention" else roofline.decode_attention
        roof = make(self.ceilings, heads, kv_heads, dim, kv_fmt, window)
        table = self.library.table(op)
        penalties = None
        if table is not None:
            other = "fp8" if kv_fmt == "bf16" else "bf16"
            windows = np.where(table.keys["window"] > 0, table.keys["window"], 2**20)
            penalties = format_penalty(table, "kv_fmt", (kv_fmt, other))
            penalties = penalties + 0.5 * np.abs(np.log(windows / (window or 2**20)))
        shape = {"heads": (heads, 1.0), "kv_heads": (kv_heads, 1.0), "head_dim": (dim, 1.5)}
        match = find(table, self.engine, shape, penalties)
        self._note(op, match)
        if match is None:
            return roofline_surface(roof)
        keys = match.table.keys

        def roof_of(series: int) -> roofline.Roof2:
            h, kv, d, w = (int(keys[name][series]) for name in ("heads", "kv_heads", "head_dim", "window"))
            return make(self.ceilings, h, kv, d, match.table.label("kv_fmt", series), w)

        return transfer.surface(match, roof, roof_of)

    @_memoised
    def mla_prefill(self, num_heads: int, kv_fmt: str, gemm_fmt: str) -> Surface:
        """MLA over (prompts, prompt length); the whole module where the engine's was measured, else the kernel."""
        return self._mla("mla_prefill", roofline.mla_prefill, num_heads, kv_format(kv_fmt), canonical(gemm_fmt))

    @_memoised
    def mla_decode(self, num_heads: int, kv_fmt: str, gemm_fmt: str) -> Surface:
        """MLA over (sequences, context length), as `mla_prefill`."""
        return self._mla("mla_decode", roofline.mla_decode, num_heads, kv_format(kv_fmt), canonical(gemm_fmt))

    def _mla(
        self,
        op: str,
        make: Callable[[Ceilings, int, str, str | None], roofline.Roof2],
        heads: int,
        kv_fmt: str,
        gemm_fmt: str,
    ) -> Surface:
        table = self.library.table(op)
        match = self._mla_match(op, heads, kv_fmt, gemm_fmt, module=True)
        if match is None or match.engine != self.engine:
            kernel = self._mla_match(op, heads, kv_fmt, gemm_fmt, module=False)
            match = kernel if kernel is not None and (match is None or kernel.engine == self.engine) else match
        self._note(op, match)
        if match is None or table is None:
            return roofline_surface(make(self.ceilings, heads, kv_fmt, None))
        module = table.label("gemm_fmt", match.neighbours[0].series) != "kernel"

        def roof_of(series: int) -> roofline.Roof2:
            label = table.label("gemm_fmt", series)
            measured = None if label == "kernel" else label
            return make(self.ceilings, int(table.keys["heads"][series]), table.label("kv_fmt", series), measured)

        roof = make(self.ceilings, heads, kv_fmt, gemm_fmt if module else None)
        return transfer.surface(match, roof, roof_of, module)

    def _mla_match(self, op: str, heads: int, kv_fmt: str, gemm_fmt: str, module: bool) -> Match | None:
        table = self.library.table(op)
        if table is None:
            return None
        other = "fp8" if kv_fmt == "bf16" else "bf16"
        penalties = format_penalty(table, "kv_fmt", (kv_fmt, other))
        labels = (gemm_fmt, *FORMATS[gemm_fmt].substitutes, "fp8_block", "bf16") if module else ("kernel",)
        penalties = penalties + format_penalty(table, "gemm_fmt", labels)
        if not np.isfinite(penalties).any():
            return None
        return find(table, self.engine, {"heads": (heads, 1.0)}, penalties, count=2)

    @_memoised
    def sparse_mla_prefill(self, num_heads: int, kv_fmt: str, gemm_fmt: str) -> Surface | None:
        """DeepSeek sparse attention module over (prompts, prompt length); None where nobody measured it."""
        return self._sparse("prefill", num_heads, kv_format(kv_fmt), canonical(gemm_fmt))

    @_memoised
    def sparse_mla_decode(self, num_heads: int, kv_fmt: str, gemm_fmt: str) -> Surface | None:
        """DeepSeek sparse attention module over (sequences, context length); None where nobody measured it."""
        return self._sparse("decode", num_heads, kv_format(kv_fmt), canonical(gemm_fmt))

    def _sparse(self, phase: Phase, heads: int, kv_fmt: str, gemm_fmt: str) -> Surface | None:
        op = f"sparse_mla_{phase}"
        match = self._mla_match(op, heads, kv_fmt, gemm_fmt, module=True)
        self._note(op, match)
        if match is None:
            return None
        table = match.table

        def roof_of(series: int) -> roofline.Roof2:
            labels = table.label("kv_fmt", series), table.label("gemm_fmt", series)
            return roofline.sparse_mla(self.ceilings, phase, int(table.keys["heads"][series]), *labels)

        roof = roofline.sparse_mla(self.ceilings, phase, heads, kv_fmt, gemm_fmt)
        return transfer.surface(match, roof, roof_of, includes_projections=True)

    @_memoised
    def linear_attention(
        self, phase: Phase, num_k_heads: int, num_v_heads: int, k_head_dim: int, v_head_dim: int
    ) -> Surface | None:
        """Gated delta net (convolution and recurrence) over (sequences, tokens per sequence); None if unmeasured."""
        op = f"linear_{phase}"
        shape = {"k_heads": (num_k_heads, 1.0), "v_heads": (num_v_heads, 1.0)}
        shape |= {"k_dim": (k_head_dim, 1.0), "v_dim": (v_head_dim, 1.0)}
        match = find(self.library.table(op), self.engine, shape, count=3)
        self._note(op, match)
        if match is None:
            return None
        make, keys = partial(roofline.linear_attention, self.ceilings, phase), match.table.keys
        names = ("k_heads", "v_heads", "k_dim", "v_dim")
        return transfer.surface(
            match,
            make(num_k_heads, num_v_heads, k_head_dim, v_head_dim),
            lambda s: make(*(int(keys[name][s]) for name in names)),
        )

    @_memoised
    def all_reduce(self, num_gpus: int, graph: bool = True) -> Curve:
        """x bytes of the tensor on one rank; the faster of the engine's own kernel and NCCL."""
        curve, source = all_reduce_curve(self.library.table("collective"), self.ceilings, self.engine, num_gpus, graph)
        self.sources["all_reduce"] = source
        return curve

    def all_gather(self, num_gpus: int) -> Curve:
        """x bytes of the gathered tensor (num_gpus times one rank's part)."""
        return self._collective("all_gather", num_gpus)

    def reduce_scatter(self, num_gpus: int) -> Curve:
        """x bytes of the tensor on one rank before scattering."""
        return self._collective("reduce_scatter", num_gpus)

    def all_to_all(self, num_gpus: int) -> Curve:
        """x bytes one rank sends to all ranks together, its own part included."""
        return self._collective("all_to_all", num_gpus)

    @_memoised
    def _collective(self, op: links.Op, num_gpus: int) -> Curve:
        curve, source = collective_curve(self.library.table("collective"), self.ceilings, op, num_gpus)
        self.sources[op] = source
        return curve

    def dispatch(
        self,
        mode: Mode,
        num_gpus: int,
        nodes: int,
        hidden: int,
        top_k: int,
        num_experts: int,
        fmt: str,
        node_limit: float = 0,
    ) -> Curve:
        """Tokens to their experts over `num_gpus` ranks in `nodes` scale-up domains; x tokens per rank.

        `node_limit` is the most domains a token visits under group-limited routing, or their mean; 0 for no limit.
        """
        return self._exchange("dispatch", mode, num_gpus, nodes, hidden, top_k, num_experts, fmt, node_limit)

    def combine(
        self,
        mode: Mode,
        num_gpus: int,
        nodes: int,
        hidden: int,
        top_k: int,
        num_experts: int,
        fmt: str,
        node_limit: float = 0,
    ) -> Curve:
        """Expert outputs back to their tokens, as `dispatch`."""
        return self._exchange("combine", mode, num_gpus, nodes, hidden, top_k, num_experts, fmt, node_limit)

    @_memoised
    def _exchange(
        self,
        step: str,
        mode: Mode,
        num_gpus: int,
        nodes: int,
        hidden: int,
        top_k: int,
        num_experts: int,
        fmt: str,
        node_limit: float,
    ) -> Curve:
        what = Exchange(step, mode, num_gpus, nodes, hidden, top_k, num_experts, fmt, node_limit)
        curve, source = exchange_curve(self.library.table("dispatch"), self.ceilings, self.engine, what)
        self.sources[step] = source
        return curve

    def _note(self, op: str, match: Match | None) -> None:
        if match is None:
            self.sources[op] = "roofline"
            return
        version = self.library.version(op, match.engine)
        how = "" if match.origin == Origin.MEASURED else f", {match.origin.name.lower()} from other shapes"
        self.sources[op] = f"{match.engine} {version}{how}"


def open_tables(system: System, engine: str, fabric: Fabric = DEFAULT_FABRIC) -> Tables:
    """Tables of `engine` on `system`; roofline only when the system was not measured.

    `fabric` describes the network between nodes. Raises InputError for an engine that is none of ENGINES, or an
    oversubscription below 1.
    """
    if engine not in ENGINES:
        raise InputError(f"engine {engine!r} is unknown. Use one of {', '.join(ENGINES)}.")
    if not fabric.oversubscription >= 1.0:
        raise InputError(f"oversubscription {fabric.oversubscription} is below 1. Give leaf down- over uplinks.")
    return _open(system, engine, fabric)


@lru_cache(maxsize=64)
def _open(system: System, engine: str, fabric: Fabric) -> Tables:
    return Tables(system, engine, _library(system.name), Ceilings.of(system, fabric))


@lru_cache(maxsize=32)
def _library(name: str) -> Library:
    return Library(measured_directory(name))
