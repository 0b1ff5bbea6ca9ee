"""How experts are given to ranks: one function per policy, and `place`, which checks the question and asks one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from planner.errors import InputError, LayoutError, nearest
from planner.placement.eplb import eplb_slots, grouped
from planner.placement.greedy import longest_first, swapped
from planner.placement.mapping import Floats, Ints, Placement, check_groups, checked_load, nearest_divisors

_MOST_SLOTS = 100_000
"""Slots of a layer up to which arrays stay small; the largest published model has 2,048 experts (Switch-C)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Where experts may go: slots per layer over ranks over nodes; experts come in `num_groups` equal groups."""

    num_slots: int
    num_ranks: int
    num_nodes: int
    num_groups: int
    seed: int


def contiguous(load: Floats, shape: Shape) -> Ints:
    """Experts in order of their ids, copies of 0, 1, 2... at the end: what vLLM and SGLang start with."""
    return np.broadcast_to(np.arange(shape.num_slots) % load.shape[1], (len(load), shape.num_slots))


def round_robin(load: Floats, shape: Shape) -> Ints:
    """Expert e on rank e mod ranks (vLLM `--expert-placement-strategy round_robin`)."""
    dealt = np.arange(shape.num_slots).reshape(-1, shape.num_ranks).T.ravel() % load.shape[1]
    return np.broadcast_to(dealt, (len(load), shape.num_slots))


def greedy(load: Floats, shape: Shape) -> Ints:
    """Copies to the hottest experts, then the heaviest first onto the least loaded rank."""
    return longest_first(load, shape.num_slots, shape.num_ranks)[0]


def greedy_swaps(load: Floats, shape: Shape) -> Ints:
    """`greedy`, then swaps between the busiest rank and another until none lowers the maximum."""
    placed, slot_load = longest_first(load, shape.num_slots, shape.num_ranks)
    return swapped(placed, slot_load, shape.num_ranks)


def eplb(load: Floats, shape: Shape) -> Ints:
    """DeepSeek's balancer: hierarchical if the nodes divide the groups, else global."""
    return eplb_slots(load, shape.num_slots, shape.num_ranks, shape.num_nodes, shape.num_groups)


def eplb_global(load: Floats, shape: Shape) -> Ints:
    """DeepSeek's balancer without regard to nodes and groups."""
    return eplb_slots(load, shape.num_slots, shape.num_ranks, 1, 1)


def node_limited(load: Floats, shape: Shape) -> Ints:
    """Whole groups on nodes, `greedy_swaps` inside a node.

    A token of a group-limited router that picks from g groups then reaches at most g nodes. Raises LayoutError
    unless the nodes divide the groups.
    """
    if shape.num_groups % shape.num_nodes:
        raise LayoutError(
            f"node-limited placement keeps groups whole: {shape.num_groups} groups do not divide over "
            f"{shape.num_nodes} nodes. Use {nearest_divisors(shape.num_groups, shape.num_nodes)} nodes, or policy eplb."
        )
    layers, experts = load.shape
    nodes = shape.num_nodes
    on_node = grouped(load, nodes, shape.num_groups)
    node_load = np.take_along_axis(load, on_node, axis=1).reshape(layers * nodes, -1)
    placed, slot_load = longest_first(node_load, shape.num_slots // nodes, shape.num_ranks // nodes)
    placed = swapped(placed, slot_load, shape.num_ranks // nodes)
    first = np.arange(nodes)[None, :, None] * (experts // nodes)
    return np.take_along_axis(on_node, (placed.reshape(layers, nodes, -1) + first).reshape(layers, -1), axis=1)


def random(load: Floats, shape: Shape) -> Ints:
    """Experts shuffled per layer; the copies are of random experts, of different ones while that is possible."""
    rng = np.random.default_rng(shape.seed)
    layers, experts = load.shape
    rounds = -(-shape.num_slots // experts)
    shuffled = [np.tile(np.arange(experts), (layers, 1))]
    shuffled += [rng.permuted(shuffled[0], axis=1) for _ in range(rounds - 1)]
    return np.asarray(rng.permuted(np.concatenate(shuffled, axis=1)[:, : shape.num_slots], axis=1))


def exact(load: Floats, shape: Shape) -> Ints:
    """The best placement there is, by the CP-SAT solver of OR-tools; for small cases and for certifying others."""
    from planner.placement.exact import solve

    return solve(load, shape.num_ranks, shape.num_slots - load.shape[1], seed=shape.seed).physical_to_logical


PLACEMENTS: dict[str, Callable[[Floats, Shape], Ints]] = {
    "contiguous": contiguous,
    "round-robin": round_robin,
    "greedy": greedy,
    "greedy-swaps": greedy_swaps,
    "eplb": eplb,
    "eplb-global": eplb_global,
    "node-limited": node_limited,
    "random": random,
    "exact": exact,
}
"""Policy name -> function of load [layers, experts] and shape that returns the experts in slots [layers, slots]."""


def place(
    policy: str,
    load: ArrayLike,
    num_ranks: int,
    *,
    num_nodes: int = 1,
    num_groups: int = 1,
    redundant: int = 0,
    seed: int = 0,
) -> Placement:
    """Place the experts of every layer on ranks.

    Parameters
    ----------
    policy
        A name of `PLACEMENTS`.
    load
        Tokens per expert [layers, experts], from a window of traffic.
    num_ranks
        Ranks that share the experts (EP).
    num_nodes
        Nodes of the ranks; ranks of a node are consecutive.
    num_groups
        Groups of a group-limited router; consecutive experts.
    redundant
        Copies beyond the first, per layer on all ranks together.
    seed
        Of the policy random.

    Raises
    ------
    LayoutError
        Slots, ranks, nodes or groups do not divide.
    WorkloadError
        A load is negative or not finite.
    InputError
        The policy is unknown.
    """
    if policy not in PLACEMENTS:
        raise InputError(f"placement policy {policy!r} is unknown: {nearest(policy, PLACEMENTS)}")
    table = checked_load(load)
    num_experts = table.shape[1]
    check_slots(num_experts, num_ranks, redundant)
    if num_nodes < 1 or num_ranks % num_nodes:
        near = nearest_divisors(num_ranks, num_nodes)
        raise LayoutError(f"{num_ranks} ranks do not divide over {num_nodes} nodes. Use {near} nodes.")
    check_groups(num_experts, num_groups)
    slots = PLACEMENTS[policy](table, Shape(num_experts + redundant, num_ranks, num_nodes, num_groups, seed))
    return Placement(policy, slots, num_experts, num_ranks, num_nodes)


def check_slots(num_experts: int, num_ranks: int, redundant: int) -> None:
    """Raise LayoutError unless experts and copies divide over the ranks with at most one copy per rank each."""
    if num_ranks < 1:
        raise LayoutError(f"{num_ranks} ranks: a placement needs at least one rank")
    short = -num_experts % num_ranks
    most = num_experts * (num_ranks - 1)
    if redundant < 0 or redundant > most:
        raise LayoutError(
            f"{redundant} redundant experts: {num_experts} experts on {num_ranks} ranks allow {short} to {most}. "
            f"Use {short if redundant < 0 else most}."
        )
    if (num_experts + redundant) % num_ranks:
        below = redundant - (num_experts + redundant) % num_ranks
        near = [r for r in (below, below + num_ranks) if 0 <= r <= most]
        raise LayoutError(
            f"{num_experts} experts + {redundant} redundant do not divide over {num_ranks} ranks. "
            f"Use {' or '.join(map(str, near))} redundant experts, "
            f"or {nearest_divisors(num_experts + redundant, num_ranks)} ranks."
        )
    if num_experts + redundant > _MOST_SLOTS:
        raise LayoutError(f"{num_experts + redundant:,} slots in a layer: at most {_MOST_SLOTS:,} are placed")


def contiguous_max_over_mean(load: ArrayLike, num_ranks: int) -> Floats:
    """Busiest rank over the mean [layers] without placement and copies, for `load` [layers, experts].

    Where the ranks do not divide the experts the first ranks take one more, as vLLM does.
    """
    table = checked_load(load)
    if num_ranks < 1:
        raise LayoutError(f"{num_ranks} ranks: a placement needs at least one rank")
    base, extra = divmod(table.shape[1], num_ranks)
    edge = np.concatenate([[0], np.cumsum(base + (np.arange(num_ranks) < extra))])
    total = np.concatenate([np.zeros((len(table), 1)), np.cumsum(table, axis=1)], axis=1)
    ranks = np.diff(total[:, edge], axis=1)
    mean = ranks.mean(axis=1)
    return np.asarray(np.divide(ranks.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0))
