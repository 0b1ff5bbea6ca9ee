"""What a change of placement costs: expert copies that ranks must fetch, over which link, in what time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.errors import InputError, LayoutError
from planner.placement.mapping import Floats, Ints, Placement


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Expert copies that ranks did not hold before: [layers, ranks], by where the nearest holder is.

    `inside_node`: another rank of the same node held it; `cross_node`: only other nodes did.
    """

    inside_node: Ints
    cross_node: Ints

    @property
    def num_copies(self) -> int:
        """Copies fetched by all ranks in all layers."""
        return int(self.inside_node.sum() + self.cross_node.sum())

    @property
    def copies_per_rank(self) -> Ints:
        """Copies fetched by every rank in all layers [ranks]."""
        return np.asarray((self.inside_node + self.cross_node).sum(axis=0))

    def num_bytes(self, expert_bytes: float) -> float:
        """Bytes fetched by all ranks, `expert_bytes` being one expert of one layer with its scales."""
        return self.num_copies * expert_bytes


def moved(before: Placement, after: Placement) -> Moves:
    """Copies that ranks must fetch to go from `before` to `after`.

    What a rank holds already, in whatever slot, costs nothing; two copies on one rank are fetched once. The number
    of slots may change. Raises LayoutError unless experts, layers, ranks and nodes are the same.
    """
    shapes = [(p.num_experts, p.num_layers, p.num_ranks, p.num_nodes) for p in (before, after)]
    if shapes[0] != shapes[1]:
        said = [f"{e} experts, {n} layers, {r} ranks, {m} nodes" for e, n, r, m in shapes]
        raise LayoutError(f"moves need two placements of one model on the same ranks, got {said[0]} and {said[1]}")
    held = _held(before)
    fetched = _held(after) & ~held
    near = held.reshape(before.num_layers, before.num_nodes, -1, before.num_experts).any(axis=2)
    near = np.repeat(near, before.ranks_per_node, axis=1)
    return Moves((fetched & near).sum(axis=2), (fetched & ~near).sum(axis=2))


def rebalance_seconds(
    moves: Moves,
    expert_bytes: float,
    inside_bytes_per_s: float,
    cross_bytes_per_s: float,
    *,
    layers_at_once: bool = True,
) -> float:
    """Seconds the links need: the slowest rank's bytes in over its link, both links working at the same time [s].

    `layers_at_once`: every rank fetches all layers in one go; else layer by layer, each waiting for its slowest rank
    (vLLM's asynchronous mode moves one layer per forward pass). A floor: an engine also gathers statistics,
    places, and rebuilds its maps. SGLang reported 1.8 s per rebalance (sgl-project/sglang#6739, 2025-06), of which
    about 1 s was work of the host (sglang#7879). Raises InputError on a size or rate that is not positive.
    """
    given = {
        "expert_bytes": expert_bytes,
        "inside_bytes_per_s": inside_bytes_per_s,
        "cross_bytes_per_s": cross_bytes_per_s,
    }
    for name, value in given.items():
        if not (np.isfinite(value) and value > 0):
            raise InputError(f"{name}={value:g}: must be positive and finite")
    seconds: Floats = np.maximum(
        _sum(moves.inside_node, layers_at_once) * (expert_bytes / inside_bytes_per_s),
        _sum(moves.cross_node, layers_at_once) * (expert_bytes / cross_bytes_per_s),
    )
    return float(seconds.max(axis=1).sum())


def _sum(copies: Ints, layers_at_once: bool) -> Ints:
    return copies.sum(axis=0, keepdims=True) if layers_at_once else copies


def _held(placement: Placement) -> NDArray[np.bool_]:
    """Which rank holds which expert [layers, ranks, experts]."""
    slots = placement.physical_to_logical
    held = np.zeros((placement.num_layers, placement.num_ranks, placement.num_experts), dtype=bool)
    rank = np.arange(placement.num_slots) // placement.slots_per_rank
    held[np.arange(placement.num_layers)[:, None], rank[None, :], slots] = True
    return held
