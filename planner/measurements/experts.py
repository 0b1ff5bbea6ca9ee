"""Which measured expert layers answer for a shape, and the curve they give."""

from __future__ import annotations

from functools import partial

import numpy as np

from planner.measurements import roofline, transfer
from planner.measurements.curves import Curve
from planner.measurements.formats import FORMATS
from planner.measurements.library import Match, find, format_penalty
from planner.measurements.roofline import Ceilings, Roof
from planner.measurements.store import Table

Shape = tuple[int, int, int, int]
"""hidden, width, local experts, matrices"""

_OTHER_MATRICES = 2.0
"""Penalty for an ungated series answering for a gated expert, in units of ln(size ratio)."""


def expert_match(
    table: Table | None, engine: str, fmt: str, shape: Shape, num_experts: int, top_k: int, dispatched: bool
) -> Match | None:
    """Nearest series, or None. `dispatched` keeps those whose kernel saw at most one token per assignment.

    The weights are those with the least error when a series is left out (H200: median 5 %, nine in ten under 21 %).
    """
    if table is None:
        return None
    hidden, width, local, matrices = shape
    penalties = format_penalty(table, "fmt", (fmt, *FORMATS[fmt].substitutes))
    penalties = penalties + _OTHER_MATRICES * (table.keys["num_matrices"] != matrices)
    wanted = {"hidden": (hidden, 1.0), "width": (width, 1.0), "local_experts": (local, 1.0)}
    if not dispatched:
        return find(table, engine, wanted | {"num_experts": (num_experts, 1.5), "top_k": (top_k, 0.5)}, penalties)
    handed = table.keys["num_experts"] <= table.keys["local_experts"] * table.keys["top_k"]
    return find(table, engine, wanted | {"top_k": (top_k, 0.5)}, penalties, handed)


def expert_curve(match: Match, ceilings: Ceilings, fmt: str, shape: Shape) -> Curve:
    """Curve over assignments; neighbours are read at the same assignments per local expert."""
    make = partial(roofline.expert_gemm, ceilings)
    keys = match.table.keys
    nearest = match.table.label("fmt", match.neighbours[0].series)
    # The same stored weights under another instruction: fp4 weights by bf16 or by fp8 activations.
    compute = nearest if nearest.startswith("mxfp4") and fmt.startswith("mxfp4") else fmt

    def roof_of(series: int) -> Roof:
        hidden, width, local, matrices = (
            int(keys[name][series]) for name in ("hidden", "width", "local_experts", "num_matrices")
        )
        return make(match.table.label("fmt", series), hidden, width, local, matrices)

    def scale_of(series: int) -> float:
        return float(shape[2] / np.float64(keys["local_experts"][series]))

    return transfer.curve(match, "assignments", make(compute, *shape), roof_of, scale_of)
