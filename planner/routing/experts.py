"""From load shares to picks: chances without replacement, active experts.

q_i is the probability that a token picks expert i, so that sum(q) = top_k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import ModelConfigError, WorkloadError

Floats = NDArray[np.float64]


def inclusion_from_load(load: ArrayLike, top_k: int) -> Floats:
    """q [..., experts] in proportion to observed `load` [..., experts], capped at 1, sum exactly top_k.

    A token takes an expert at most once: what exceeds 1 goes to the others in proportion to their load.
    """
    load_ = np.asarray(load, dtype=float)
    check_picks(load_.shape[-1], top_k)
    _check_positive(load_)
    capped = np.zeros(load_.shape, dtype=bool)
    while True:
        free_load = np.where(capped, 0.0, load_)
        free_picks = top_k - capped.sum(axis=-1, keepdims=True)
        total = free_load.sum(axis=-1, keepdims=True)
        q = np.where(capped, 1.0, free_load * (free_picks / np.where(total > 0, total, 1.0)))
        if not (q > 1.0 + 1e-12).any():
            return np.minimum(q, 1.0)
        capped |= q > 1.0


def inclusion_from_weights(weights: ArrayLike, top_k: int) -> Floats:
    """q [..., experts] when k experts are drawn without replacement with chances proportional to `weights`.

    Plackett-Luce as a race of exponential clocks: expert i is picked if its clock rings before the k-th ring.
    That time is replaced by a constant t with sum(1 - exp(-t w)) = k. Error in q below 0.02 for two picks
    of five experts, below 0.005 for six of 64.
    """
    w = np.asarray(weights, dtype=float)
    check_picks(w.shape[-1], top_k)
    _check_positive(w)
    if top_k == w.shape[-1]:
        return np.ones(w.shape)
    w = w / w.sum(axis=-1, keepdims=True)
    t = np.full((*w.shape[:-1], 1), float(top_k))
    # Newton on a concave increasing function climbs from the left without overshoot.
    for _ in range(100):
        short = top_k + np.expm1(-t * w).sum(axis=-1, keepdims=True)
        t = t + short / (w * np.exp(-t * w)).sum(axis=-1, keepdims=True)
        if float(np.abs(short).max()) < 1e-12 * top_k:
            break
    return np.asarray(-np.expm1(-t * w))


def active_experts(tokens: ArrayLike, q: ArrayLike) -> Floats:
    """Expected number of distinct experts hit by `tokens` [points], sum_i 1 - (1 - q_i)^T.

    `q` [..., experts]; the result is [..., points], or [...] for a scalar `tokens`.

    >>> round(float(active_experts(64, np.full(256, 8 / 256))), 1)
    222.4
    """
    q_ = np.asarray(q, dtype=float)
    missed = log_missed(q_)
    t = np.asarray(tokens, dtype=float)
    out = -np.expm1(np.multiply.outer(t, missed)).sum(axis=-1)
    return np.asarray(np.moveaxis(out, 0, -1) if t.ndim else out)


def log_missed(q: Floats) -> Floats:
    """log(1 - q), the log-probability that one token misses an expert, finite also for a certain pick."""
    return np.asarray(np.log1p(-np.minimum(q, 1.0 - 1e-15)))


def check_picks(num_experts: int, top_k: int) -> None:
    """Raise ModelConfigError unless 1 <= top_k <= num_experts."""
    if not 1 <= top_k <= num_experts:
        raise ModelConfigError(f"top_k={top_k} of {num_experts} experts: a token takes 1 to {num_experts} experts")


def _check_positive(weights: Floats) -> None:
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise WorkloadError("expert loads must be finite and positive; add one token to experts that were never used")
