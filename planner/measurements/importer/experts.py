"""Fused expert layers, normalised to assignments on the timed rank.

The published `num_tokens` is the whole expert-parallel group's, with balanced routing: each rank of EP ranks gets
num_tokens x top_k / EP assignments, spread evenly over its E / EP experts. One shape is different.

DeepSeek-V3 (hidden 7168, width 2048, 256 experts, top 8) was routed through its group-limited top-k (8 groups, 4 kept).
Balanced logits name one expert in each of the 8 groups; the limit keeps 4 of them and fills the other 4 places with
the lowest-numbered experts of the kept groups. So experts 0-3 each get every token, experts 0-127 share the other
half, experts 128-255 get nothing, and the timed rank 0 of EP ranks gets

    A(T) = T x min(E_local, 128) / 32 + T x min(E_local, 4),      active on at most min(E_local, 128) experts.

With this count the achieved FLOP/s of 16,384 tokens is the same at every EP (H200 vLLM fp8: 0.57 to 0.63 PFLOP/s at
EP 1 to 256; read as per-rank tokens it would run from 0.57 to 1.22), and no row streams weights faster than HBM.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.measurements.formats import canonical
from planner.measurements.importer.clean import Cleaned, peak_flop_per_s, possible
from planner.measurements.importer.kernels import MS, Rows, _per_format
from planner.measurements.importer.source import ENGINES, Source
from planner.measurements.roofline import Ceilings

Floats = NDArray[np.float64]

GROUP_LIMITED = (7168, 2048, 256, 8)
"""hidden, width, experts, top_k of the shape whose collector applied group-limited routing."""
_HOT_EXPERTS, _REACHED_EXPERTS, _STRIDE = 4, 128, 32
UNGATED = {(2688, 1856, 128), (1024, 2688, 512), (2048, 5120, 512), (4096, 2688, 512), (8192, 5120, 512)}
"""hidden, width, experts of Nemotron 3 layers: squared ReLU, two matrices per expert (their config.json)."""


def assignments(tokens: Floats, experts: Floats, top_k: Floats, ep: Floats, group_limited: Any) -> Floats:
    """Assignments on the timed rank for `tokens` of the whole group, at least 1 (see module docstring)."""
    even = tokens * top_k / ep
    local = experts / ep
    limited = tokens * (np.minimum(local, _REACHED_EXPERTS) / _STRIDE + np.minimum(local, _HOT_EXPERTS))
    return np.asarray(np.maximum(np.rint(np.where(group_limited, limited, even)), 1.0))


def expert_gemm(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """Keys: hidden, width per rank, local experts, experts, top_k, matrices. Axis: assignments on the rank."""
    rows = Rows.empty()
    for engine in ENGINES:
        found = source.newest("moe", engine, "moe")
        if found is None:
            continue
        version, frame = found
        frame = frame[frame["distribution"] == "balanced"]
        if not len(frame):
            continue
        source.note("expert_gemm", engine, version, frame)
        rows.add(_columns(engine, frame))
    c = rows.joined()
    if not c:
        return None
    ok = _physical(source, c)
    rows.drop("faster than peak FLOP/s or HBM", np.count_nonzero(~ok))
    keys = ("engine", "fmt", "hidden", "width", "local_experts", "num_experts", "top_k", "num_matrices")
    return rows.table("expert_gemm", keys, ("assignments",), ok)


def _columns(engine: str, frame: Any) -> dict[str, Any]:
    hidden, inter, experts, top_k, ep, tp = (
        frame[name].to_numpy()
        for name in ("hidden_size", "inter_size", "num_experts", "topk", "moe_ep_size", "moe_tp_size")
    )
    limited = (hidden == GROUP_LIMITED[0]) & (inter == GROUP_LIMITED[1])
    limited &= (experts == GROUP_LIMITED[2]) & (top_k == GROUP_LIMITED[3])
    ungated = np.zeros(len(frame), dtype=np.bool_)
    for shape in UNGATED:
        ungated |= (hidden == shape[0]) & (inter == shape[1]) & (experts == shape[2])
    local = experts // ep
    names, codes = np.unique(frame["moe_dtype"].to_numpy().astype(str), return_inverse=True)
    return {
        "engine": engine,
        "fmt": np.array([canonical(str(name)) for name in names])[codes],
        "hidden": hidden,
        "width": inter // tp,
        "local_experts": np.where(limited, np.minimum(local, _REACHED_EXPERTS), local),
        "num_experts": experts,
        "top_k": top_k,
        "num_matrices": np.where(ungated, 2, 3),
        "assignments": assignments(frame["num_tokens"].to_numpy().astype(float), experts, top_k, ep, limited),
        "group_limited": limited,
        "seconds": frame["latency"].to_numpy() * MS,
    }


def _physical(source: Source, c: dict[str, Any]) -> Any:
    """Rows that neither compute nor stream weights faster than the data sheet; short times may hit L2."""
    a, local = c["assignments"], c["local_experts"].astype(np.float64)
    per_expert = c["num_matrices"] * c["hidden"].astype(np.float64) * c["width"]
    # Group-limited routing wakes 4 new experts per token next to the 4 hot ones: about half as many as assignments.
    active = np.where(c["group_limited"], np.minimum(a / 2, local), np.minimum(a, local))
    weights = active * per_expert * _per_format(c["fmt"], lambda form: form.weight_bytes)
    streamed = np.where(weights > 256e6, weights, 0.0)
    return possible(
        source.system, c["seconds"], 2 * a * per_expert, streamed, peak_flop_per_s(source.system, c["fmt"])
    )
