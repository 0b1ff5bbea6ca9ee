"""Experts of each layer from the most to the least popular."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import ModelConfigError, WorkloadError
from planner.model import ModelConfig
from planner.model.config import Moe
from planner.routing import Law, inclusion_from_load, popularity, skew_for

Floats = NDArray[np.float64]

_LAYERS = 64
"""Representative layers of a skew law."""


def moe_of(model: ModelConfig) -> Moe:
    """The routed experts of `model`. Raises ModelConfigError when it is dense."""
    if model.moe is None:
        raise ModelConfigError(f"{model.name} is dense: it has no experts to change. Choose a mixture of experts.")
    return model.moe


def num_picks(moe: Moe) -> int:
    """Experts with weights that a token uses: `top_k` less the picks that fall on identity experts."""
    return max(1, round(moe.active_experts))


def ranked_picks(moe: Moe, skew: Law | str | None = None, counts: ArrayLike | None = None) -> Floats:
    """Chance that a token picks an expert [layers, experts], most popular first; rows sum to the picks of a token.

    From `counts` of assignments [layers, experts] or [experts] when given, else from the skew law, by default that
    of decode traffic. Raises WorkloadError on counts of another number of experts, negative ones, NaN, or a layer
    without any.
    """
    top_k = num_picks(moe)
    if counts is None:
        law = skew or skew_for(moe.num_experts, "decode")
        picks = top_k * popularity(moe.num_experts, top_k, law, _LAYERS)
    else:
        picks = inclusion_from_load(_checked(counts, moe.num_experts), top_k)
    return np.asarray(-np.sort(-picks, axis=-1))


def _checked(counts: ArrayLike, num_experts: int) -> Floats:
    load = np.atleast_2d(np.asarray(counts, dtype=float))
    if load.ndim != 2 or load.shape[1] != num_experts:
        raise WorkloadError(
            f"counts have the shape {load.shape}, the model has {num_experts} experts per layer: give one row per "
            f"layer with {num_experts} numbers, or the model that was traced"
        )
    if not np.isfinite(load).all() or (load < 0).any():
        raise WorkloadError("counts of assignments must be finite and not negative; check the file")
    empty = np.flatnonzero(load.sum(axis=1) == 0)
    if empty.size:
        raise WorkloadError(f"layer {empty[0]} of the counts has no assignment at all; leave it out")
    # An expert that was never seen is rare, not impossible.
    return np.where(load == 0, 1.0, load)
