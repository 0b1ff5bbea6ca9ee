"""Which experts are left when ranks of a group die: counted over a placement, exactly where that is possible.

An expert is lost when every rank that holds a copy of it is dead. With f dead ranks out of R, all sets of f ranks
are equally likely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from planner.errors import InputError
from planner.placement import Placement

_MOST_SETS = 200_000
"""Sets of dead ranks that are enumerated."""
_DRAWN_SETS = 20_000
"""Sets that are drawn where there are more."""
_SEED = 20261122


@dataclass(frozen=True, slots=True)
class Survival:
    """After `dead` of the ranks or nodes: probability that every expert of every layer has a copy left.

    `lost_experts` is the mean number of experts without a copy, summed over layers. `num_sets` sets of dead ranks were
    looked at; `is_exact` says whether those are all there are.
    """

    dead: int
    all_covered: float
    lost_experts: float
    num_sets: int
    is_exact: bool


def hosts(placement: Placement, *, by_node: bool = False) -> NDArray[np.bool_]:
    """Whether an expert has a copy on a rank, or on a node: [layers, experts, ranks or nodes]."""
    layers, slots = placement.physical_to_logical.shape
    units = placement.num_nodes if by_node else placement.num_ranks
    held = np.zeros((layers, placement.num_experts, units), dtype=bool)
    unit = np.arange(slots) // (slots // units)
    held[np.arange(layers)[:, None], placement.physical_to_logical, unit[None, :]] = True
    return held


def survival(placement: Placement, dead: int, *, by_node: bool = False) -> Survival:
    """What is left after `dead` ranks (or nodes) of `placement` died. InputError unless some are left."""
    held = hosts(placement, by_node=by_node)
    units = held.shape[2]
    what = "nodes" if by_node else "ranks"
    if not 0 <= dead < units:
        raise InputError(f"{dead} dead {what} of {units}: from 0 to {units - 1}, so that some are left")
    sets, weight = np.unique(held.reshape(-1, units), axis=0, return_counts=True)
    copies = sets.sum(axis=1)
    # The mean is exact whatever is enumerated: an expert on c units is lost in C(R - c, f - c) of the C(R, f) sets.
    lost = sum(
        int(w) * math.comb(units - int(c), dead - int(c)) for c, w in zip(copies, weight, strict=True) if c <= dead
    )
    sets = sets[copies <= dead]
    total = math.comb(units, dead)
    covered, num_sets = _covered(sets, units, dead, total)
    return Survival(dead, covered, lost / total, num_sets, num_sets == total)


def _covered(sets: NDArray[np.bool_], units: int, dead: int, total: int) -> tuple[float, int]:
    """Share of the sets of dead units that contain none of `sets` [num, units], and how many were looked at."""
    if not len(sets):
        return 1.0, total
    if total <= _MOST_SETS:
        drawn = np.array(list(combinations(range(units), dead)), dtype=np.int64)
    else:
        rng = np.random.default_rng(_SEED)
        drawn = np.argsort(rng.random((_DRAWN_SETS, units)), axis=1)[:, :dead]
    alive = np.ones((len(drawn), units), dtype=np.float32)
    np.put_along_axis(alive, drawn, 0.0, axis=1)
    # A product of matrices: an expert of one row of `sets` has that many copies on living units.
    left = alive @ sets.T.astype(np.float32)
    return float((left > 0).all(axis=1).mean()), len(drawn)


def tolerated_ranks(num_experts: int, redundant: int, num_ranks: int) -> int:
    """Ranks that may die while the slots of the others still hold every expert.

    Survivors have (E + r) / R slots each and need E of them in all: f <= R r / (E + r). SGLang states 16 of 32 ranks
    for 256 experts with 256 copies (LMSYS blog 2026-03-25).

    >>> tolerated_ranks(256, 256, 32)
    16
    """
    return num_ranks * redundant // (num_experts + redundant)
