"""Packing loads into equal numbers of slots, copying the hottest experts, swapping what is left; all layers at once."""

from __future__ import annotations

import numpy as np

from planner.placement.mapping import Floats, Ints

_GAIN = 1e-9
"""Smallest fall of the maximum, relative to the mean rank, that is worth a swap."""


def most_copied(load: Floats, num_slots: int) -> Ints:
    """Experts that get the slots beyond the first of each [layers, num_slots - experts], in the order chosen.

    Every next copy goes to the expert with the highest load per copy (the lowest id among equals), which
    minimises the largest load per copy. `load`: [layers, experts].
    """
    rows = np.arange(len(load))
    copies = np.ones(load.shape, dtype=np.int64)
    chosen = np.empty((len(load), num_slots - load.shape[1]), dtype=np.int64)
    for i in range(chosen.shape[1]):
        chosen[:, i] = np.argmax(load / copies, axis=1)
        copies[rows, chosen[:, i]] += 1
    return chosen


def with_copies(load: Floats, num_slots: int) -> tuple[Ints, Floats]:
    """Experts to place, copies included, and the load of each [layers, num_slots].

    First every expert once, then the copies of `most_copied`; the copies of an expert share its load equally.
    """
    layers, experts = load.shape
    once = np.broadcast_to(np.arange(experts), load.shape)
    items = np.concatenate([once, most_copied(load, num_slots)], axis=1)
    cell = np.arange(layers)[:, None] * experts + items
    copies = np.bincount(cell.ravel(), minlength=load.size)
    return items, load.ravel()[cell] / copies[cell]


def packed(weight: Floats, num_packs: int, order: Ints) -> tuple[Ints, Ints]:
    """Pack and seat of every item [layers, items]: each in turn to the lightest pack with a free seat.

    `weight`: [layers, items]; `order`: [layers, items], which item comes when. Every pack has items / packs seats.
    """
    rows = np.arange(len(weight))
    seats = weight.shape[1] // num_packs
    pack = np.empty(weight.shape, dtype=np.int64)
    seat = np.empty(weight.shape, dtype=np.int64)
    taken = np.zeros((len(weight), num_packs), dtype=np.int64)
    total = np.zeros((len(weight), num_packs))
    # A full pack weighs infinity, so that the lightest is always one with room.
    for item in order.T:
        lightest = np.argmin(total, axis=1)
        pack[rows, item] = lightest
        seat[rows, item] = taken[rows, lightest]
        taken[rows, lightest] += 1
        total[rows, lightest] += weight[rows, item]
        total[rows[taken[rows, lightest] == seats], lightest[taken[rows, lightest] == seats]] = np.inf
    return pack, seat


def heaviest_first(weight: Floats) -> Ints:
    """Item ids by falling weight [layers, items], the higher id first among equals.

    That order is the one behind the measured table of stale placements (handbook routing.md section 4).
    """
    return np.argsort(weight, axis=1, kind="stable")[:, ::-1]


def longest_first(load: Floats, num_slots: int, num_ranks: int) -> tuple[Ints, Floats]:
    """Greedy placement [layers, slots] of experts and copies, and the load of every slot.

    Heaviest copy first, onto the least loaded rank with a free slot (Graham's longest processing time rule).
    """
    items, weight = with_copies(load, num_slots)
    rank, seat = packed(weight, num_ranks, heaviest_first(weight))
    slot = rank * (num_slots // num_ranks) + seat
    placed = np.empty_like(items)
    loads = np.empty_like(weight)
    np.put_along_axis(placed, slot, items, axis=1)
    np.put_along_axis(loads, slot, weight, axis=1)
    return placed, loads


def swapped(placed: Ints, slot_load: Floats, num_ranks: int) -> Ints:
    """`placed` [layers, slots] after swaps between the busiest rank and another, while a swap lowers the busiest.

    `slot_load`: [layers, slots]. Of all pairs the one that leaves the lighter pair of ranks is swapped. At most four
    swaps per slot, far beyond what was ever needed.
    """
    placed, load = placed.copy(), slot_load.copy()
    width = placed.shape[1] // num_ranks
    if num_ranks == 1:
        return placed
    least = _GAIN * np.maximum(load.sum(axis=1), 1e-300) / num_ranks
    live = np.arange(len(placed))
    for _ in range(4 * placed.shape[1]):
        if not live.size:
            break
        ours, theirs, after, top = _best_swap(load[live], width)
        better = after < top - least[live]
        live, ours, theirs = live[better], ours[better], theirs[better]
        for table in (placed, load):
            table[live, ours], table[live, theirs] = table[live, theirs], table[live, ours]
    return placed


def _best_swap(load: Floats, width: int) -> tuple[Ints, Ints, Floats, Floats]:
    """Per layer: a slot of the busiest rank, its best partner, the larger rank load after, the busiest before."""
    rows = np.arange(len(load))
    ranks = load.reshape(len(load), -1, width).sum(axis=2)
    busiest = ranks.argmax(axis=1)
    top = ranks[rows, busiest]
    ours = busiest[:, None] * width + np.arange(width)
    moved = load[rows[:, None], ours][:, :, None] - load[:, None, :]
    larger = np.maximum(top[:, None, None] - moved, np.repeat(ranks, width, axis=1)[:, None, :] + moved)
    best = larger.reshape(len(load), -1).argmin(axis=1)
    slot = ours[rows, best // load.shape[1]]
    return slot, best % load.shape[1], larger.reshape(len(load), -1)[rows, best], top
