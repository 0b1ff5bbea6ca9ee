"""Facts of a placement of experts: how even the ranks are before and after, what is possible, what it moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.placement import Placement
    from planner.placement.mapping import Floats

Facts = dict[str, Any]
_EVEN = 1.02
"""Max over mean below which more copies are not worth their memory."""
_MOST_COPIES_PER_RANK = 4
"""More experts per rank up to which advice searches; DeepSeek's own deployments use 1 (arXiv 2412.19437, 3.4)."""


def placement_facts(
    load: Floats,
    layers: Sequence[int],
    placement: Placement,
    *,
    num_groups: int = 1,
    served: Floats | None = None,
    fresh: Placement | None = None,
) -> Facts:
    """What `experts place --json` prints.

    `load`: [layers, experts], the traffic that was placed on; `layers`: their numbers in the model; `served`:
    [layers, experts], other traffic to judge the placement on, `fresh` being the placement made for that.
    `max_over_mean_before` is contiguous without copies; numbers without a layer are means over layers.
    """
    from planner.placement import balance_bound, contiguous_max_over_mean

    before = contiguous_max_over_mean(load, placement.num_ranks)
    after = placement.max_over_mean(load)
    bound = balance_bound(load, placement.num_ranks, placement.num_redundant)
    return {
        "policy": placement.policy,
        "num_experts": placement.num_experts,
        "num_layers": len(load),
        "num_ranks": placement.num_ranks,
        "num_nodes": placement.num_nodes,
        "num_groups": num_groups,
        "redundant": placement.num_redundant,
        "slots_per_rank": placement.slots_per_rank,
        "max_over_mean_before": float(before.mean()),
        "max_over_mean_after": float(after.mean()),
        "bound": float(bound.mean()),
        "within_of_bound_pct": 100 * (float(after.mean() / bound.mean()) - 1),
        "within_of_perfect_pct": 100 * (float(after.mean()) - 1),
        "moved": _moved_facts(placement),
        "per_layer": [
            {"layer": int(n), "before": float(b), "after": float(a), "bound": float(low)}
            for n, b, a, low in zip(layers, before, after, bound, strict=True)
        ],
        "served": None if served is None else _served_facts(placement, served, fresh),
        "next": _next(load, placement, float(after.mean()), float(bound.mean())),
        "placement": placement.physical_to_logical.tolist(),
    }


def _moved_facts(placement: Placement) -> Facts:
    """Copies that ranks fetch when an engine that started contiguous takes this placement."""
    import numpy as np

    from planner.placement import moved, place

    uniform = np.ones((placement.num_layers, placement.num_experts))
    shape = {"num_nodes": placement.num_nodes, "redundant": placement.num_redundant}
    moves = moved(place("contiguous", uniform, placement.num_ranks, **shape), placement)
    return {
        "copies": moves.num_copies,
        "copies_inside_node": int(moves.inside_node.sum()),
        "copies_cross_node": int(moves.cross_node.sum()),
        "copies_of_busiest_rank": int(moves.copies_per_rank.max()),
    }


def _served_facts(placement: Placement, served: Floats, fresh: Placement | None) -> Facts:
    from planner.placement import contiguous_max_over_mean

    contiguous = contiguous_max_over_mean(served, placement.num_ranks)
    stale = placement.max_over_mean(served)
    return {
        "max_over_mean": float(stale.mean()),
        "max_over_mean_contiguous": float(contiguous.mean()),
        "max_over_mean_fresh": None if fresh is None else float(fresh.max_over_mean(served).mean()),
        "num_layers_worse_than_contiguous": int((stale > contiguous).sum()),
    }


def _next(load: Floats, placement: Placement, after: float, bound: float) -> list[str]:
    """What would even the ranks further, the larger step first."""
    from planner.placement import balance_bound, place

    said = []
    ranks = placement.num_ranks
    if bound > _EVEN:
        for more in range(1, _MOST_COPIES_PER_RANK + 1):
            redundant = placement.num_redundant + more * ranks
            if redundant > placement.num_experts * (ranks - 1):
                break
            low = float(balance_bound(load, ranks, redundant).mean())
            if low <= (1 + bound) / 2:
                better = place("greedy-swaps", load, ranks, redundant=redundant).max_over_mean(load).mean()
                said.append(
                    f"the hottest experts bind: --redundant {redundant} --policy greedy-swaps reaches {better:.3f}x "
                    f"for the memory of {more} more expert{'s' * (more > 1)} per rank and layer"
                )
                break
    if after > bound * _EVEN and placement.policy != "greedy-swaps":
        better = place("greedy-swaps", load, ranks, redundant=placement.num_redundant).max_over_mean(load).mean()
        if better < after - 0.005:
            said.append(f"--policy greedy-swaps reaches {better:.3f}x with the same slots, without regard to groups")
    return said
