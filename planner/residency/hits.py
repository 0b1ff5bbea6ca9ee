"""Hit rate of K resident experts of E per layer: hot ones, recently used ones, often used ones.

A step needs the distinct experts of all its tokens; a hit is one of them that is already in HBM. Rates come from
the routing process (popularity and temporal reuse), never from a constant.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import InputError
from planner.residency.reuse import REUSES, Reuse, sample_ids, union
from planner.residency.traces import Floats, step_hits
from planner.routing.experts import log_missed
from planner.routing.laws import Law, named_skew, popularity

Choice = Literal["uniform", "static", "lru", "lfu"]
"""Which experts are resident: whole layers or any, those hot on average, recently used, most used so far."""

_SEED = 20250711
_LAYERS = 8
_STEPS = 160
_MOST_SEQUENCES = 32
"""Larger batches need nearly every expert and mix many users: independent references answer for them."""
_BISECTIONS = 40


def needed(q: ArrayLike, tokens: float = 1.0) -> Floats:
    """Probability [..., experts] that a step of `tokens` tokens needs an expert: 1 - (1 - q)^tokens.

    `q` [..., experts] is the probability that one token picks it, summing to top_k.
    """
    return np.asarray(-np.expm1(tokens * log_missed(np.asarray(q, dtype=float))))


def static_hits(q: ArrayLike, slots: ArrayLike, tokens: float = 1.0) -> Floats:
    """Hit rate of the `slots` most popular experts, the sum of their shares: [..., capacities].

    `q` [..., experts], `slots` [capacities] or a number. Of the distinct experts a step of `tokens` needs.
    """
    chance = np.sort(needed(q, tokens), axis=-1)[..., ::-1]
    total = np.cumsum(chance, axis=-1) / chance.sum(axis=-1, keepdims=True)
    padded = np.concatenate([np.zeros((*total.shape[:-1], 1)), total], axis=-1)
    return np.asarray(np.take(padded, _whole(slots, chance.shape[-1]), axis=-1))


def che_hits(q: ArrayLike, slots: ArrayLike, tokens: float = 1.0) -> Floats:
    """Hit rate of LRU when steps are independent, [..., capacities] (Che, Tung and Wang 2002).

    A cache of C slots forgets after t_C steps, sum_i 1 - (1 - a_i)^t_C = C with a_i the chance that a step needs
    expert i; it hits with probability sum_i a_i (1 - (1 - a_i)^t_C) / sum_i a_i. All layers and capacities at once.
    """
    chance = needed(q, tokens)[..., None, :]
    missed = log_missed(chance)
    wanted = np.atleast_1d(_whole(slots, chance.shape[-1])).astype(float)[:, None]
    shape = np.broadcast_shapes((*chance.shape[:-1], 1), wanted.shape)
    low, high = np.full(shape, -20.0), np.full(shape, 60.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        held = -np.expm1(np.exp(middle) * missed).sum(axis=-1, keepdims=True)
        low, high = np.where(held < wanted, middle, low), np.where(held < wanted, high, middle)
    kept = -np.expm1(np.exp(low) * missed)
    rate = (chance * kept).sum(axis=-1) / chance.sum(axis=-1)
    rate = np.where(wanted[:, 0] <= 0, 0.0, np.where(wanted[:, 0] >= chance.shape[-1], 1.0, rate))
    return np.asarray(rate if np.ndim(slots) else rate[..., 0])


def hit_curve(
    choice: Choice,
    num_experts: int,
    top_k: int,
    tokens: int = 1,
    skew: Law | str = "single-domain",
    reuse: Reuse | None = None,
) -> tuple[float, ...]:
    """Hit rate of 0, 1, ... E resident experts per layer, the mean over representative layers.

    `tokens` are the sequences of a decode step or the tokens of a prefill chunk, `skew` the popularity law of the
    traffic, `reuse` how it repeats itself (None: as in the records). LRU is simulated step by step on the process;
    chunks and batches beyond 32 sequences take the independent formula. LFU in the long run keeps the hottest of
    its own traffic. Raises WorkloadError on an unknown skew, ModelConfigError on an impossible top_k.
    """
    if tokens < 1:
        raise InputError(f"{tokens} tokens in a step: at least 1 is needed")
    law: Any = named_skew(skew)
    if choice != "lru" or tokens > _MOST_SEQUENCES:
        reuse = None  # only the simulation asks for it: one answer for all
    elif reuse is None:
        reuse = REUSES["records"]
    return _curve(choice, num_experts, top_k, tokens, law, reuse)


@lru_cache(maxsize=512)
def _curve(
    choice: Choice, num_experts: int, top_k: int, tokens: int, law: Any, reuse: Reuse | None
) -> tuple[float, ...]:
    slots = np.arange(num_experts + 1)
    q = popularity(num_experts, top_k, law, _LAYERS, _SEED) * top_k
    if choice == "uniform":
        curve = slots / num_experts
    elif choice in ("static", "lfu"):
        curve = static_hits(q, slots, tokens).mean(axis=0)
    elif reuse is None:
        curve = che_hits(q, slots, tokens).mean(axis=0)
    else:
        curve = _simulated_lru(q, top_k, tokens, reuse)
    curve[-1] = 1.0
    return tuple(np.maximum.accumulate(np.clip(curve, 0.0, 1.0)).tolist())


def _simulated_lru(q: Floats, top_k: int, sequences: int, reuse: Reuse) -> Floats:
    """Hits by capacity of a warm cache over `_STEPS` steps, after the window of the process has filled."""
    rng = np.random.default_rng(_SEED)
    ids = sample_ids(q, top_k, reuse, sequences, _STEPS + reuse.window_tokens, rng)
    active = union(ids, q.shape[1])
    # The time since the last use of an independent expert is geometric; the first steps correct the rest.
    ages = rng.exponential(1.0, q.shape) / np.maximum(-log_missed(needed(q, sequences)), 1e-9)
    before, counted = active[:, : reuse.window_tokens], active[:, reuse.window_tokens :]
    age = np.where(before, np.arange(before.shape[1], 0, -1)[None, :, None], np.inf).min(axis=1)
    return step_hits(counted, np.where(np.isfinite(age), age, ages + before.shape[1]))


def _whole(slots: ArrayLike, num_experts: int) -> NDArray[np.int64]:
    """`slots` as whole numbers. Raises InputError outside 0 to `num_experts`."""
    wanted = np.asarray(slots)
    if not np.issubdtype(wanted.dtype, np.integer) or (wanted < 0).any() or (wanted > num_experts).any():
        raise InputError(f"resident experts {slots!r}: whole numbers from 0 to {num_experts} are needed")
    return wanted.astype(np.int64)
