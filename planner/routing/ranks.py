"""Distinct destinations of a token and the spread of assignments over ranks, for uniform routing."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from planner.errors import LayoutError, ModelConfigError
from planner.routing.experts import check_picks

_SEED = 20250711
_GROUP_TOKENS = 2048
"""Simulated tokens behind group-limited statistics; the standard error of distinct ranks is 0.005."""


def distinct_ranks(num_experts: int, top_k: int, num_ranks: int, num_groups: int = 1, top_groups: int = 1) -> float:
    """Expected number of distinct ranks (or nodes) a token is sent to, uniform routing, contiguous placement.

    D_R = R (1 - C(E - E/R, k) / C(E, k)). With group-limited routing (DeepSeek-V3: a group scores the sum of its
    two best experts, and only the best `top_groups` groups are eligible) the mean of a seeded simulation with
    independent scores. Raises LayoutError if the ranks do not divide the experts.

    >>> round(distinct_ranks(256, 8, 32), 3)
    7.267
    """
    check_picks(num_experts, top_k)
    local = _experts_per_rank(num_experts, num_ranks)
    if top_groups >= num_groups:
        return num_ranks * (1 - math.comb(num_experts - local, top_k) / math.comb(num_experts, top_k))
    counts = group_limited_counts(num_experts, top_k, num_ranks, num_groups, top_groups)
    return float((counts > 0).sum(axis=1).mean())


def assignment_variance(num_experts: int, top_k: int, num_ranks: int, tokens: float = 1.0) -> float:
    """Variance of the assignments one rank gets from `tokens` uniform tokens: T k/R (1 - 1/R) (E - k)/(E - 1).

    >>> round(assignment_variance(8, 2, 8, tokens=64), 9)
    12.0
    """
    _experts_per_rank(num_experts, num_ranks)
    check_picks(num_experts, top_k)
    share = 1.0 / num_ranks
    finite = (num_experts - top_k) / (num_experts - 1) if num_experts > 1 else 0.0
    return tokens * top_k * share * (1 - share) * finite


def group_limited_counts(
    num_experts: int, top_k: int, num_ranks: int, num_groups: int, top_groups: int
) -> NDArray[np.int64]:
    """Picks per simulated token and rank [tokens, ranks]."""
    picks = _group_limited_picks(num_experts, top_k, num_groups, top_groups)
    local = _experts_per_rank(num_experts, num_ranks)
    cell = np.arange(_GROUP_TOKENS)[:, None] * num_ranks + picks // local
    return np.bincount(cell.ravel(), minlength=_GROUP_TOKENS * num_ranks).reshape(_GROUP_TOKENS, num_ranks)


@lru_cache(maxsize=64)
def _group_limited_picks(num_experts: int, top_k: int, num_groups: int, top_groups: int) -> NDArray[np.int64]:
    """Expert ids [tokens, top_k] under independent uniform scores."""
    size = num_experts // num_groups
    if num_experts % num_groups or top_groups * size < top_k:
        raise ModelConfigError(
            f"{top_groups} of {num_groups} groups cannot offer {top_k} of {num_experts} experts: "
            "num_groups must divide num_experts and the chosen groups must hold at least top_k experts"
        )
    score = np.random.default_rng(_SEED).random((_GROUP_TOKENS, num_groups, size), dtype=np.float32)
    best_two = np.partition(score, max(size - 2, 0), axis=2)[:, :, -2:].sum(axis=2)
    groups = np.argpartition(-best_two, top_groups - 1, axis=1)[:, :top_groups]
    offered = np.take_along_axis(score, groups[:, :, None], axis=1).reshape(_GROUP_TOKENS, -1)
    place = np.argpartition(-offered, top_k - 1, axis=1)[:, :top_k]
    return np.take_along_axis(groups, place // size, axis=1).astype(np.int64) * size + place % size


def _experts_per_rank(num_experts: int, num_ranks: int) -> int:
    if num_ranks < 1 or num_experts % num_ranks:
        divisors = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
        near = sorted(sorted(divisors, key=lambda d: abs(d - num_ranks))[:2])
        raise LayoutError(f"ep={num_ranks} does not divide {num_experts} experts. Use {' or '.join(map(str, near))}.")
    return num_experts // num_ranks
