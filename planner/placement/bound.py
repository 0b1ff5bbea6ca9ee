"""What no placement can beat: lower bounds on the load of the busiest rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from planner.placement.greedy import with_copies
from planner.placement.mapping import Floats, checked_load
from planner.placement.policies import check_slots


def balance_bound(load: ArrayLike, num_ranks: int, redundant: int = 0) -> Floats:
    """Lower bound [layers] of max over mean rank load for any placement of `load` [layers, experts] in those slots.

    The largest of three: 1; the largest load per copy when copies are shared out at best, since some rank holds
    that copy; and, without copies, pigeonholes: of the k R + 1 heaviest experts some rank holds k + 1, and it
    fills its slots with the lightest. Copies of an expert share its tokens equally. Raises LayoutError as `place`.
    """
    table = checked_load(load)
    check_slots(table.shape[1], num_ranks, redundant)
    weight = with_copies(table, table.shape[1] + redundant)[1]
    mean = table.sum(axis=1) / num_ranks
    least = np.maximum(mean, weight.max(axis=1))
    if not redundant:
        least = np.maximum(least, _pigeonholes(np.sort(table, axis=1)[:, ::-1], num_ranks))
    return np.asarray(np.divide(least, mean, out=np.ones_like(mean), where=mean > 0))


def within(max_over_mean: ArrayLike, bound: ArrayLike) -> Floats:
    """How far a placement may be from the best possible: max over mean / bound, 1 is proved optimal."""
    return np.asarray(np.asarray(max_over_mean, dtype=float) / np.asarray(bound, dtype=float))


def _pigeonholes(weight: Floats, num_ranks: int) -> Floats:
    """`weight`: [layers, experts], falling."""
    seats = weight.shape[1] // num_ranks
    least = np.zeros(len(weight))
    for k in range(seats):
        crowded = weight[:, k * num_ranks - k : k * num_ranks + 1].sum(axis=1)
        rest = seats - k - 1
        filling = weight[:, weight.shape[1] - rest :].sum(axis=1) if rest else 0.0
        least = np.maximum(least, crowded + filling)
    return least
