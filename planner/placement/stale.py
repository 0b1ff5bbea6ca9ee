"""Placements learned on one traffic and served on another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from planner.errors import LayoutError, WorkloadError
from planner.placement.mapping import Floats, checked_load
from planner.placement.policies import contiguous_max_over_mean, place
from planner.routing.records import Record


@dataclass(frozen=True, slots=True, eq=False)
class Staleness:
    """Busiest rank over the mean on the served traffic, per layer [layers].

    `stale`: under the placement learned elsewhere; `fresh`: under the same policy with the served traffic known;
    `contiguous`: without any placement.
    """

    stale: Floats
    fresh: Floats
    contiguous: Floats

    @property
    def worse_than_contiguous(self) -> int:
        """Layers in which the stale placement is worse than none."""
        return int((self.stale > self.contiguous).sum())


def stale(
    load_place: ArrayLike,
    load_serve: ArrayLike,
    num_ranks: int,
    *,
    policy: str = "greedy",
    num_nodes: int = 1,
    num_groups: int = 1,
    redundant: int = 0,
    seed: int = 0,
) -> Staleness:
    """Judge on `load_serve` [layers, experts] what `policy` made of `load_place` [layers, experts].

    The other arguments, and what is raised, are those of `place`; LayoutError also if the loads differ in shape.
    """
    learned, served = checked_load(load_place), checked_load(load_serve)
    if learned.shape != served.shape:
        raise LayoutError(f"loads of shape {learned.shape} and {served.shape}: use two records of one model")
    shape = {"num_nodes": num_nodes, "num_groups": num_groups, "redundant": redundant, "seed": seed}
    old, new = (place(policy, load, num_ranks, **shape) for load in (learned, served))
    return Staleness(old.max_over_mean(served), new.max_over_mean(served), contiguous_max_over_mean(served, num_ranks))


def stale_table(loads: ArrayLike, num_ranks: int, *, policy: str = "greedy", redundant: int = 0) -> Floats:
    """Busiest rank over the mean [traffic placed on, traffic served, layers]; `loads` [traffics, layers, experts]."""
    given = np.asarray(loads, dtype=float)
    return np.stack([place(policy, load, num_ranks, redundant=redundant).max_over_mean(given) for load in given])


def check_same_model(placed: Record, served: Record) -> None:
    """Raise WorkloadError unless both records have the same experts and layers."""
    ours, theirs = (f"{r.num_experts} experts in layers {r.layers.tolist()}" for r in (placed, served))
    if ours != theirs:
        raise WorkloadError(f"{served.source} has {theirs}, {placed.source} has {ours}. Use two records of one model.")
