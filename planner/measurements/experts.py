"""Which measured expert layers answer for a shape, and the curve they give.

Utilisation is carried from up to eight series at the same rows per local expert. No more than four of one model
answer, and those that disagree with the weighted median of all weigh less: kernels are tuned model by model, so a
neighbour may be twice as slow as its shape explains (docs/kernel_accuracy.md).
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from planner.measurements import roofline, transfer
from planner.measurements.curves import Curve
from planner.measurements.formats import FORMATS
from planner.measurements.library import Match, find, format_penalty
from planner.measurements.roofline import Ceilings, Roof
from planner.measurements.store import Table

Floats = NDArray[np.float64]
Shape = tuple[int, int, int, int]
"""hidden, width, local experts, matrices"""

_OTHER_MATRICES = 2.0
"""Penalty for an ungated series answering for a gated expert, in units of ln(size ratio)."""
_NEIGHBOURS, _PER_MODEL = 8, 4
_GROUP_LIMITED = (7168, 256, 8)
"""hidden, experts, top_k of DeepSeek-V3, whose series were collected with group-limited routing (importer/experts)."""


def handed_per_kept(hidden: int, local: int, num_experts: int, top_k: int) -> float:
    """Assignments that the measured kernel was handed for each that it kept: experts of the group / local ones.

    DeepSeek-V3 was routed by balanced logits through its group limit: of 8 assignments of a token, rank 0 keeps
    min(local, 128) / 32 + min(local, 4) (importer/experts).

    >>> handed_per_kept(4096, 16, 128, 8), handed_per_kept(7168, 128, 256, 8)
    (8.0, 1.0)
    """
    if (hidden, num_experts, top_k) == _GROUP_LIMITED:
        return top_k / (min(local, 128) / 32 + min(local, 4))
    return num_experts / local


@lru_cache(maxsize=64)
def _handed(table: Table) -> Floats:
    columns = (table.keys[name] for name in ("hidden", "local_experts", "num_experts", "top_k"))
    return np.array([handed_per_kept(*(int(v) for v in row)) for row in zip(*columns, strict=True)])


@lru_cache(maxsize=64)
def _models(table: Table) -> NDArray[np.int64]:
    """A number per series, the same for series of one model."""
    columns = [table.keys[name] for name in ("hidden", "num_experts", "top_k", "num_matrices")]
    _, numbers = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    return np.asarray(numbers.ravel(), dtype=np.int64)


def expert_match(
    table: Table | None, engine: str, fmt: str, shape: Shape, num_experts: int, top_k: int, dispatched: bool
) -> Match | None:
    """Nearest series, or None. `dispatched` keeps those whose kernel saw at most one token per assignment."""
    if table is None:
        return None
    hidden, width, local, matrices = shape
    penalties = format_penalty(table, "fmt", (fmt, *FORMATS[fmt].substitutes))
    penalties = penalties + _OTHER_MATRICES * (table.keys["num_matrices"] != matrices)
    sizes = {"hidden": hidden, "width": width, "local_experts": local, "top_k": top_k}
    wanted = {name: (float(size), 1.0) for name, size in sizes.items()}
    crowd = (_models(table), _PER_MODEL)
    if dispatched:
        few = table.keys["num_experts"] <= table.keys["local_experts"] * table.keys["top_k"]
        return find(table, engine, wanted, penalties, few, _NEIGHBOURS, crowd=crowd)
    handed = handed_per_kept(hidden, local, num_experts, top_k)
    wanted |= {"num_experts": (num_experts, 0.5), "handed": (handed, 1.0)}
    extra = {"handed": _handed(table)}
    return find(table, engine, wanted, penalties, None, _NEIGHBOURS, extra, crowd)


def expert_curve(match: Match, ceilings: Ceilings, fmt: str, shape: Shape, handed: float = 1.0) -> Curve:
    """Curve over assignments; neighbours are read at the same assignments per local expert.

    `handed`: assignments the kernel is handed for each it keeps, 1 behind a dispatch.
    """
    make = partial(roofline.expert_gemm, ceilings)
    keys, all_handed = match.table.keys, _handed(match.table)
    nearest = match.table.label("fmt", match.neighbours[0].series)
    # The same stored weights under another instruction: fp4 weights by bf16 or by fp8 activations.
    compute = nearest if nearest.startswith("mxfp4") and fmt.startswith("mxfp4") else fmt

    def roof_of(series: int) -> Roof:
        hidden, width, local, matrices = (
            int(keys[name][series]) for name in ("hidden", "width", "local_experts", "num_matrices")
        )
        return make(match.table.label("fmt", series), hidden, width, local, matrices, float(all_handed[series]))

    def scale_of(series: int) -> float:
        return float(shape[2] / np.float64(keys["local_experts"][series]))

    return transfer.curve(match, "assignments", make(compute, *shape, handed), roof_of, scale_of)
