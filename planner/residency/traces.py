"""Exact caches on real expert ids: one pass gives the hit rate of every capacity at once.

An expert is in a cache of C slots exactly if fewer than C others rank above it, so the rank of each pick before it
is taken (its stack distance) answers for all C. Ranks go by last use (LRU) or by uses so far, ties by last use (LFU).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import InputError, WorkloadError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Order = Literal["lru", "lfu"]

_NEVER = -1


def stack_distances(ids: ArrayLike, sequence_lengths: ArrayLike, num_experts: int, order: Order = "lru") -> Ints:
    """Distance of each pick [layers, tokens, top_k]; a cache of C slots per layer hits where it is below C.

    `ids` [layers, tokens, top_k] are expert ids of sequences laid end to end, `sequence_lengths` their tokens. Every
    sequence starts with an empty cache: a first use has distance `num_experts`. The picks of a token enter the cache
    one after the other, as in the published tables. Raises WorkloadError on ids or lengths that do not match.
    """
    picks, lengths = checked_ids(ids, sequence_lengths, num_experts)
    longest_first = np.argsort(-lengths, kind="stable")
    padded = _padded(picks, lengths)[:, longest_first]
    layers, sequences, longest, top_k = padded.shape
    keys = np.full((layers, sequences, num_experts), _NEVER, dtype=np.int64)
    found = np.full(padded.shape, num_experts, dtype=np.int64)
    running = np.searchsorted(-lengths[longest_first], -np.arange(longest), side="left")
    weight = longest * top_k if order == "lfu" else 0
    for token, live in enumerate(running.tolist()):
        for pick in range(top_k):
            expert = padded[:, :live, token, pick, None]
            own = np.take_along_axis(keys[:, :live], expert, axis=2)
            ahead = (keys[:, :live] > own).sum(axis=2)
            found[:, :live, token, pick] = np.where(own[..., 0] == _NEVER, num_experts, ahead)
            # A use counts `weight` above the last one's count, so that counts dominate and the stamp breaks ties.
            uses = np.where(own == _NEVER, 0, own // max(weight, 1) + 1) if weight else 0
            np.put_along_axis(keys[:, :live], expert, uses * weight + token * top_k + pick, axis=2)
    back = np.argsort(longest_first)
    return np.asarray(found[:, back][:, np.arange(longest)[None, :] < lengths[:, None]])


def hits_by_capacity(distances: ArrayLike, num_experts: int) -> Floats:
    """Share of picks that a cache of 0, 1, ... `num_experts` slots holds, [num_experts + 1]."""
    counts = np.bincount(np.asarray(distances).ravel(), minlength=num_experts + 1)[: num_experts + 1]
    return np.asarray(np.concatenate([[0.0], np.cumsum(counts[:num_experts])]) / max(1, counts.sum()))


def step_hits(active: NDArray[np.bool_], ages: Floats) -> Floats:
    """Hits by capacity, [num_experts + 1], of an LRU cache that serves whole steps.

    `active` [layers, steps, experts] says which experts a step needs: an engine knows them all before it loads any,
    so what is resident at the start is used first. `ages` [layers, experts] are the steps since the last use before
    the first step; give stationary ones and the cache is warm.
    """
    layers, steps, num_experts = active.shape
    keys = -np.asarray(ages, dtype=float)
    counts = np.zeros(num_experts, dtype=np.int64)
    ranks = np.empty((layers, num_experts), dtype=np.int64)
    place = np.broadcast_to(np.arange(num_experts), (layers, num_experts))
    for step in range(steps):
        np.put_along_axis(ranks, np.argsort(-keys, axis=1, kind="stable"), place, axis=1)
        needed = active[:, step]
        counts += np.bincount(ranks[needed], minlength=num_experts)
        keys[needed] = step + 1.0
    return np.asarray(np.concatenate([[0.0], np.cumsum(counts)]) / max(1, counts.sum()))


def next_token_reuse(ids: ArrayLike, sequence_lengths: ArrayLike, num_experts: int, lag: int = 1) -> float:
    """Share of picks whose expert was also picked `lag` tokens before, in the same layer and sequence."""
    picks, lengths = checked_ids(ids, sequence_lengths, num_experts)
    if picks.shape[1] <= lag:
        return 0.0
    place = np.arange(picks.shape[1]) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    now, before = picks[:, lag:], picks[:, :-lag]
    repeated = (now[..., :, None] == before[..., None, :]).any(axis=-1)
    inside = place[lag:] >= lag
    return float(repeated[:, inside].mean()) if inside.any() else 0.0


def checked_ids(ids: ArrayLike, sequence_lengths: ArrayLike, num_experts: int) -> tuple[Ints, Ints]:
    """Both as integers. Raises WorkloadError naming what does not match."""
    if num_experts < 1:
        raise InputError(f"num_experts {num_experts}: at least 1 is needed")
    picks, lengths = np.asarray(ids), np.asarray(sequence_lengths)
    if picks.ndim != 3 or not np.issubdtype(picks.dtype, np.integer) or picks.size == 0:
        raise WorkloadError(f"expert ids must be integers [layers, tokens, top_k], got {picks.dtype} {picks.shape}")
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer) or (lengths < 1).any():
        raise WorkloadError("sequence lengths must be positive whole numbers in one row")
    if int(lengths.sum()) != picks.shape[1]:
        raise WorkloadError(
            f"sequence lengths sum to {int(lengths.sum()):,}, but the ids have {picks.shape[1]:,} tokens"
        )
    low, high = int(picks.min()), int(picks.max())
    if low < 0 or high >= num_experts:
        raise WorkloadError(
            f"expert id {low if low < 0 else high} is outside 0 to {num_experts - 1}: is this a trace of another model?"
        )
    return picks.astype(np.int64), lengths.astype(np.int64)


def _padded(picks: Ints, lengths: Ints) -> Ints:
    """Sequences side by side [layers, sequences, longest, top_k]; the rest is 0 and never read."""
    layers, _, top_k = picks.shape
    out = np.zeros((layers, len(lengths), int(lengths.max()), top_k), dtype=np.int64)
    out[:, np.arange(out.shape[2])[None, :] < lengths[:, None]] = picks
    return out
