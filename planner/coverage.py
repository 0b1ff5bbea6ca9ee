"""Which measurements a prediction rests on, and which to make next.

The cost model itself is asked: its tables are wrapped so that every look-up is recorded, and one look-up at a time
is then made a little faster. A step is a sum of look-ups, so what the step loses is that look-up's exact share of it,
split by origin; a look-up that the model made but did not choose loses nothing. Nothing here repeats what
`planner.cost` knows about models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from planner.calibration import OFF
from planner.cost import StepCost
from planner.engine import Engine
from planner.errors import InputError
from planner.hardware import Cluster, parse_cluster
from planner.layout import Layout, layout_problem
from planner.measurements import Origin, Tables
from planner.model import ModelConfig
from planner.steptime import StepTime

Facts = dict[str, Any]
Floats = NDArray[np.float64]

DECODE_SEQS = (1.0, 4.0, 16.0, 64.0, 256.0)
DECODE_CONTEXT = (1024.0, 8192.0)
PREFILL_TOKENS = (256.0, 1024.0, 4096.0, 8192.0)
"""A usual range of steps; every step weighs the same, whatever its length."""
_GUESSED = (Origin.EXTRAPOLATED, Origin.ROOFLINE)
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "gemm": ("fmt", "rows", "cols"),
    "expert_gemm": ("fmt", "hidden", "width", "local_experts", "num_experts", "top_k", "num_matrices"),
    "prefill_attention": ("num_heads", "num_kv_heads", "head_dim", "kv_fmt", "window"),
    "decode_attention": ("num_heads", "num_kv_heads", "head_dim", "kv_fmt", "window"),
    "mla_prefill": ("num_heads", "kv_fmt", "gemm_fmt"),
    "mla_decode": ("num_heads", "kv_fmt", "gemm_fmt"),
    "sparse_mla_prefill": ("num_heads", "kv_fmt", "gemm_fmt"),
    "sparse_mla_decode": ("num_heads", "kv_fmt", "gemm_fmt"),
    "linear_attention": ("phase", "k_heads", "v_heads", "k_dim", "v_dim"),
    "all_reduce": ("num_gpus",),
    "all_gather": ("num_gpus",),
    "reduce_scatter": ("num_gpus",),
    "all_to_all": ("num_gpus",),
    "dispatch": ("mode", "num_gpus", "num_nodes", "hidden", "top_k", "num_experts", "fmt"),
    "combine": ("mode", "num_gpus", "num_nodes", "hidden", "top_k", "num_experts", "fmt"),
}
"""Look-up methods of `Tables` and the names of their positional arguments."""
_SHAPED = ("gemm", "expert_gemm", "prefill_attention", "decode_attention", "mla_prefill", "mla_decode")
_NUDGE = 1e-3
"""Small enough to change no choice between two kernels, large beside rounding."""
_ROUNDING = 1e-9
_INSTANT_S = 1e-15
"""Nothing beside a kernel, but still a time: the cost model fits curves through ratios."""
_REFERENCE = "h200-sxm:1x8"
"""Shapes do not depend on the GPU; the cost model wants one all the same."""


@dataclass(frozen=True, slots=True)
class Call:
    """One look-up: the method of `Tables` and its arguments by column name."""

    method: str
    keys: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        shape = " ".join(f"{name}={value}" for name, value in self.keys)
        return f"{self.method} {shape}"


class _Nudged:
    """A curve or surface that is a little faster; everything else is the real one's."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def seconds(self, *where: Any) -> Floats:
        """Real time, a little less."""
        return np.asarray(self._real.seconds(*where) * (1.0 - _NUDGE))


class _Blank:
    """A curve or surface for recording shapes only: no time, and never a whole module."""

    includes_projections = False

    def seconds(self, *where: Any) -> Floats:
        """Next to nothing, in the shape asked for."""
        return np.full(np.broadcast_shapes(*(np.shape(part) for part in where)), _INSTANT_S)

    def origin(self, *where: Any) -> NDArray[np.int8]:
        """Nothing is measured."""
        return np.full(self.seconds(*where).shape, int(Origin.ROOFLINE), dtype=np.int8)


@dataclass(slots=True, eq=False)
class _Recorder:
    """Stands in for `Tables`: passes look-ups on, remembers them, and may nudge one."""

    tables: Tables
    nudged: Call | None = None
    blank: bool = False
    calls: dict[Call, None] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if name not in _ARGUMENTS:
            return getattr(self.tables, name)
        return lambda *args, **named: self._look_up(name, args, named)

    def _look_up(self, method: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        names = _ARGUMENTS[method]
        keys = tuple(zip(names, args, strict=False)) + tuple((n, v) for n, v in named.items() if n in names)
        call = Call(method, keys)
        self.calls[call] = None
        if self.blank:
            return _Blank()
        found = getattr(self.tables, method)(*args, **named)
        return _Nudged(found) if call == self.nudged and found is not None else found


@dataclass(frozen=True, slots=True)
class Case:
    """What is deployed: the arguments of `StepCost`."""

    model: ModelConfig
    layout: Layout
    cluster: Cluster
    engine: Engine
    backend: str = "allgather_reducescatter"

    def on_enough_nodes(self) -> Case:
        """The same on as many whole nodes as the layout needs, where the cluster is smaller than that."""
        if self.layout.replica_gpus <= self.cluster.num_gpus:
            return self
        node = self.cluster.system.gpus_per_node
        return replace(self, cluster=Cluster(self.cluster.system, -(-self.layout.replica_gpus // node), node))

    def steps(self, recorder: Callable[[Tables], _Recorder]) -> tuple[list[StepTime], _Recorder]:
        """The usual range of steps, and what was looked up on the way."""
        # Tables are asked about; what servers take beyond them was measured on others.
        tables_only = replace(self.engine, calibrations=OFF)
        cost = StepCost(self.model, self.layout, self.cluster, tables_only, self.backend)
        tables = recorder(cost.tables)
        cost.tables = cast(Tables, tables)
        seqs, context = (axis.ravel() for axis in np.meshgrid(DECODE_SEQS, DECODE_CONTEXT))
        return [cost.decode(seqs, context), cost.prefill(np.array(PREFILL_TOKENS))], tables


def coverage_facts(case: Case) -> Facts:
    """What `profiles coverage --json` prints: shares by origin per look-up, and what to measure next."""
    whole, recorder = case.steps(_Recorder)
    full = _mean_share(whole, whole)
    calls: list[tuple[Call, Floats]] = []
    for call in recorder.calls:
        nudged, _ = case.steps(partial(_Recorder, nudged=call))
        share = np.maximum(full - _mean_share(nudged, whole), 0.0) / _NUDGE
        if share.sum() > _ROUNDING:
            calls.append((call, share))
    calls.sort(key=lambda item: (-float(item[1].sum()), str(item[0])))
    rest = np.maximum(full - sum((share for _, share in calls), np.zeros(len(Origin))), 0.0)
    return {
        "model": case.model.name,
        "system": case.cluster.system.name,
        "engine": case.engine.name,
        "layout": str(case.layout),
        "steps": {
            "decode_sequences": list(DECODE_SEQS),
            "decode_context": list(DECODE_CONTEXT),
            "prefill_tokens": list(PREFILL_TOKENS),
        },
        "total": _shares(full),
        "operations": _by_operation(calls) | {"not looked up (norms, sampling, host, links)": _shares(rest)},
        "calls": [_call_facts(call, share) for call, share in calls],
        "next": _next(calls),
    }


def _mean_share(steps: Sequence[StepTime], whole: Sequence[StepTime]) -> Floats:
    """Mean over steps of the seconds of each origin over the whole step's seconds: [origins]."""
    shares = []
    for step, reference in zip(steps, whole, strict=True):
        total = reference.total_s
        shares += [np.broadcast_to(step.origin[origin.name.lower()], total.shape) / total for origin in Origin]
    rows = [np.concatenate([shares[i], shares[i + len(Origin)]]) for i in range(len(Origin))]
    return np.array([float(np.mean(row)) for row in rows])


def _shares(share: Floats) -> Facts:
    return {origin.name.lower(): float(share[origin]) for origin in Origin} | {"step": float(share.sum())}


def _by_operation(calls: Sequence[tuple[Call, Floats]]) -> dict[str, Facts]:
    summed: dict[str, Floats] = {}
    for call, share in calls:
        summed[call.method] = summed.get(call.method, np.zeros(len(Origin))) + share
    return {name: _shares(share) for name, share in sorted(summed.items(), key=lambda item: -item[1].sum())}


def _call_facts(call: Call, share: Floats) -> Facts:
    return {"op": call.method, "shape": dict(call.keys)} | _shares(share)


def _next(calls: Sequence[tuple[Call, Floats]]) -> list[Facts]:
    """Look-ups whose time is guessed, by the share of the step that measuring them would settle."""
    guessed = [(call, float(sum(share[origin] for origin in _GUESSED))) for call, share in calls]
    ranked = sorted((item for item in guessed if item[1] > 1e-4), key=lambda item: (-item[1], str(item[0])))
    return [{"op": call.method, "shape": dict(call.keys), "would_settle": share} for call, share in ranked]


def shapes_facts(models: Sequence[ModelConfig], tps: Sequence[int], eps: Sequence[int], engine: Engine) -> Facts:
    """Shapes file of the microbenchmark: key columns of every operation that `models` need at these degrees.

    A degree that a model cannot be split by is left out and named; InputError when none is left for a model.
    """
    cases: dict[tuple[tuple[str, Any], ...], None] = {}
    left_out: dict[str, list[str]] = {}
    for model in models:
        found = 0
        for layout in _degrees(tps, eps):
            problem = layout_problem(model, layout)
            if problem:
                left_out.setdefault(model.name, []).append(problem)
                continue
            found += 1
            calls = _recorded(Case(model, layout, parse_cluster(_REFERENCE), engine))
            cases |= dict.fromkeys(_shape_cases(calls))
        if not found:
            raise InputError(f"{model.name}: no layout of --tp and --ep is possible: {left_out[model.name][0]}")
    for model in models:
        cases |= {(("op", "norm"), ("kind", "rmsnorm"), ("hidden", model.hidden)): None}
        cases |= {(("op", "head"), ("kind", "sampling"), ("vocab", model.vocab)): None}
    return {"models": [m.name for m in models], "left_out": left_out, "cases": [dict(case) for case in cases]}


def _degrees(tps: Sequence[int], eps: Sequence[int]) -> list[Layout]:
    """TP of every degree; expert parallelism of every degree under TP attention and under data-parallel attention."""
    found = [Layout(tp=tp, moe_tp=tp) for tp in tps]
    for ep in (ep for ep in eps if ep > 1):
        found += [Layout(tp=ep, ep=ep), Layout(attention_dp=ep, ep=ep)]
    return list(dict.fromkeys(found))


def _recorded(case: Case) -> list[Call]:
    _, recorder = case.steps(partial(_Recorder, blank=True))
    return list(recorder.calls)


def _shape_cases(calls: Sequence[Call]) -> list[tuple[tuple[str, Any], ...]]:
    """Key columns as the microbenchmark spells them; the MoE layer first, it is what nobody else measures."""
    rank = {op: place for place, op in enumerate(("expert_gemm", "mla_decode", "decode_attention", "gemm"))}
    chosen = sorted((c for c in calls if c.method in _SHAPED), key=lambda c: rank.get(c.method, len(rank)))
    return [tuple({"op": call.method, **_microbench_keys(call)}.items()) for call in chosen]


def _microbench_keys(call: Call) -> Facts:
    keys = dict(call.keys)
    if "fmt" in keys:
        # Torch multiplies bf16 and fp8; other formats borrow the utilisation of the nearest one.
        keys["fmt"] = "fp8" if str(keys["fmt"]).startswith("fp8") else "bf16"
    if "gemm_fmt" in keys:
        keys["gemm_fmt"] = "kernel"
    if "head_dim" in keys:
        keys["window"] = keys.get("window") or 0
    if call.method == "expert_gemm":
        keys.setdefault("num_matrices", 3)
    return keys
