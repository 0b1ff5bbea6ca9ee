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
_NO_GAIN = 0.9
UNGATED = {(2688, 1856, 128), (1024, 2688, 512), (2048, 5120, 512), (4096, 2688, 512), (8192, 5120, 512)}
"""hidden, width, experts of Nemotron 3 layers: squared ReLU, two matrices per expert (their config.json)."""


def balanced_assignments(tokens: Floats, experts: Floats, top_k: Floats, ep: Floats, group_limited: Any) -> Floats:
    """Assignments on the timed rank, at least 1, that balanced routing would need for the same work.

    While not all local experts are active that is the number of active ones (weights dominate), afterwards the
    number of rows (see module docstring).
    """
    local = experts / ep
    rows = tokens * (np.minimum(local, _REACHED_EXPERTS) / _STRIDE + np.minimum(local, _HOT_EXPERTS))
    reached = np.minimum(local, _REACHED_EXPERTS)
    active = np.minimum(local, _HOT_EXPERTS) + np.minimum(tokens, _STRIDE) * reached / _STRIDE
    limited = np.where(active < reached, active, rows)
    return np.asarray(np.maximum(np.rint(np.where(group_limited, limited, tokens * top_k / ep)), 1.0))


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
        remote = _computes_remote_assignments(frame)
        rows.drop("EP > 1 of a kernel that computes other ranks' assignments too", remote.sum())
        frame = frame[~remote]
        source.note("expert_gemm", engine, version, frame)
        rows.add(_columns(engine, frame))
    c = rows.joined()
    if not c:
        return None
    ok = _physical(source, c)
    rows.drop("faster than peak FLOP/s or HBM", np.count_nonzero(~ok))
    keys = ("engine", "fmt", "hidden", "width", "local_experts", "num_experts", "top_k", "num_matrices")
    return rows.table("expert_gemm", keys, ("assignments",), ok)


def _computes_remote_assignments(frame: Any) -> Any:
    """EP > 1 rows of shapes where 16,384 tokens take as long on one of 4 EP ranks as on a single rank.

    Such a kernel multiplies the assignments of all ranks (SGLang 0.5.10 on A100, TensorRT-LLM fp8_block on RTX PRO
    6000, a few others), so its rows say nothing about one rank's share. A shape without that pair of measurements
    follows the median of its format.
    """
    import pandas as pd

    shape = ["moe_dtype", "hidden_size", "inter_size", "topk", "num_experts"]
    large = frame[(frame["num_tokens"] == 16384) & frame["moe_ep_size"].isin([1, 4]) & (frame["moe_tp_size"] == 1)]
    times = large.pivot_table(index=shape, columns="moe_ep_size", values="latency", aggfunc="min")
    share = (times[4] / times[1]).dropna() if {1, 4} <= set(times.columns) else pd.Series(dtype=float)
    # Group-limited routing loads rank 0 with everything at small EP, so that shape follows its format too.
    grouped = [(hidden, width, experts, k) == GROUP_LIMITED for _, hidden, width, k, experts in share.index]
    share = share[~np.array(grouped, dtype=np.bool_)]
    expected = frame["moe_dtype"].map(share.groupby(level=0).median().to_dict() if len(share) else {}).fillna(0.0)
    known = pd.Series([share.get(key, np.nan) for key in frame[shape].itertuples(index=False, name=None)], frame.index)
    return (known.fillna(expected) > _NO_GAIN) & (frame["moe_ep_size"] > 1)


def _group_limited(frame: Any) -> Any:
    hidden, width, experts, top_k = GROUP_LIMITED
    same = (frame["hidden_size"] == hidden) & (frame["inter_size"] == width)
    return same & (frame["num_experts"] == experts) & (frame["topk"] == top_k)


def _columns(engine: str, frame: Any) -> dict[str, Any]:
    hidden, inter, experts, top_k, ep, tp = (
        frame[name].to_numpy()
        for name in ("hidden_size", "inter_size", "num_experts", "topk", "moe_ep_size", "moe_tp_size")
    )
    limited = _group_limited(frame).to_numpy()
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
        "assignments": balanced_assignments(frame["num_tokens"].to_numpy().astype(float), experts, top_k, ep, limited),
        "seconds": frame["latency"].to_numpy() * MS,
    }


def _physical(source: Source, c: dict[str, Any]) -> Any:
    """Rows that neither compute nor stream weights faster than the data sheet; short times may hit L2."""
    a, local = c["assignments"], c["local_experts"].astype(np.float64)
    per_expert = c["num_matrices"] * c["hidden"].astype(np.float64) * c["width"]
    weights = np.minimum(a, local) * per_expert * _per_format(c["fmt"], lambda form: form.weight_bytes)
    streamed = np.where(weights > 256e6, weights, 0.0)
    return possible(source.system, c["seconds"], 2 * a * per_expert, streamed, peak_flop_per_s(source.system, c["fmt"]))
