"""Which assignments keep their place, token by token: the reference, exact for every rule and policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.capacity.limit import CapacityLimit, check_devices
from planner.capacity.rules import Floats, Ints, Policy, Rule
from planner.errors import WorkloadError
from planner.routing.experts import check_picks

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where the picks of one step ended up.

    `experts` [tokens, k] are the experts that serve, -1 where a pick was dropped; `gates` [tokens, k] their weights
    after the rule's normalisation, 0 where dropped. `asked` and `kept` [experts] count assignments before and after.
    `capacity` are the slots per expert of the largest block (per device for a budget), `slots` all of them.
    `rerouted_rate` is the share of assignments that another expert took over.
    """

    experts: Ints
    gates: Floats
    asked: Ints
    kept: Ints
    capacity: int
    slots: int
    processed_rows: int
    rerouted_rate: float

    @property
    def served(self) -> Bools:
        """Picks that an expert serves, [tokens, k]."""
        return self.experts >= 0

    @property
    def drop_rate(self) -> float:
        """Lost assignments over assignments."""
        return 1.0 - float(self.served.mean()) if self.experts.size else 0.0

    @property
    def fully_dropped_rate(self) -> float:
        """Tokens with no expert left over tokens; they keep the residual stream and shared experts only."""
        return 1.0 - float(self.served.any(axis=1).mean()) if self.experts.size else 0.0

    @property
    def slot_utilisation(self) -> float:
        """Used slots over all slots; the rest is wasted when experts are padded."""
        return float(self.kept.sum()) / max(self.slots, 1)


@dataclass(frozen=True, slots=True)
class _Places:
    """Slots of one step: the first bin of every token's block, the bin of every expert in it, slots per bin."""

    first_bin: Ints
    bin_of_expert: Ints
    slots: Ints

    def of(self, experts: Ints, tokens: Ints | slice = slice(None)) -> Ints:
        """Bins of `experts` [tokens, ...] wanted by `tokens`."""
        first = self.first_bin[tokens]
        return np.asarray(first.reshape(-1, *[1] * (experts.ndim - 1)) + self.bin_of_expert[experts])


def assign(
    ranking: ArrayLike,
    gates: ArrayLike,
    num_experts: int,
    limit: CapacityLimit,
    *,
    top_k: int | None = None,
    num_sources: int = 1,
    reroute: bool = False,
    seed: int = 0,
) -> Assignment:
    """Serve the picks of one step within `limit`, token by token.

    Parameters
    ----------
    ranking
        Expert ids [tokens, m], best first; the first `top_k` (all m by default) are the picks.
    gates
        Router probabilities of `ranking` [tokens, m].
    num_experts
        Experts of the layer.
    limit
        Rule, factor, policy.
    top_k
        Picks per token if `ranking` lists more.
    num_sources
        Contiguous blocks of tokens with slots of their own (source ranks, groups), or devices of a budget.
    reroute
        A dropped pick goes to the token's next-ranked expert with room (GShard-style second choice; Hunyuan-Large
        trains with random recycling, arXiv 2411.02265). Needs a ranking longer than `top_k`.
    seed
        Seed of the random policy.

    Raises WorkloadError on ids out of range, shapes that differ and gates that are not finite.
    """
    order, gate = _checked(ranking, gates, num_experts)
    picks_per_token = order.shape[1] if top_k is None else top_k
    check_picks(min(num_experts, order.shape[1]), picks_per_token)
    rule, policy = limit.rule_for(picks_per_token), limit.policy_for(picks_per_token)
    rng = np.random.default_rng(seed)
    picks, weight = order[:, :picks_per_token], gate[:, :picks_per_token]
    places = _places(limit, rule, picks, num_experts, num_sources)
    queue = _queue(policy, weight, gate.max(axis=1, initial=0.0), rule.choices_first, rng)
    kept = _first_served(places.of(picks), queue, places.slots)
    final, final_gate = np.where(kept, picks, -1), weight.copy()
    moved = _reroute(final, final_gate, order, gate, places, policy, rng) if reroute else 0
    slots = int(places.slots.sum())
    counts = np.bincount(final[final >= 0], minlength=num_experts)
    return Assignment(
        final,
        _weights(rule, weight, final_gate, final >= 0),
        np.bincount(picks.ravel(), minlength=num_experts),
        counts,
        int(places.slots[0]) if places.slots.size else 0,
        slots,
        slots if limit.is_padded(picks_per_token) else int(counts.sum()),
        moved / max(picks.size, 1),
    )


def _checked(ranking: ArrayLike, gates: ArrayLike, num_experts: int) -> tuple[Ints, Floats]:
    order, gate = np.asarray(ranking, dtype=np.int64), np.asarray(gates, dtype=float)
    if order.ndim != 2 or order.shape != gate.shape or not order.shape[1]:
        raise WorkloadError(f"expert ids {order.shape} and gates {gate.shape}: both must be [tokens, picks]")
    if order.size and not 0 <= order.min() <= order.max() < num_experts:
        wrong = int(order.min() if order.min() < 0 else order.max())
        raise WorkloadError(f"expert id {wrong} is out of range: {num_experts} experts are 0 to {num_experts - 1}")
    if not np.isfinite(gate).all():
        raise WorkloadError("gate probabilities must be finite")
    return order, gate


def _places(limit: CapacityLimit, rule: Rule, picks: Ints, num_experts: int, num_sources: int) -> _Places:
    tokens, top_k = picks.shape
    experts = np.arange(num_experts)
    if rule.scope == "device":
        per_device = check_devices(num_experts, num_sources)
        budget = limit.capacity(tokens, num_experts, top_k, num_sources)
        return _Places(np.zeros(tokens, dtype=np.int64), experts // per_device, np.full(num_sources, budget))
    sizes = limit.blocks(tokens, num_sources)
    first = np.repeat(np.arange(len(sizes)) * num_experts, sizes)
    load = np.bincount((first[:, None] + picks).ravel(), minlength=len(sizes) * num_experts)
    slots = rule.slots(
        sizes,
        num_experts,
        top_k,
        limit.factor,
        needed=int(load.max(initial=0)),
        minimum=limit.minimum,
        multiple=limit.multiple,
    )
    return _Places(first, experts, np.repeat(slots, num_experts))


def _queue(policy: Policy, gates: Floats, best: Floats, choices_first: bool, rng: np.random.Generator) -> Ints:
    """Order in which the assignments [tokens, k] are placed, as indices into the flat array."""
    tokens, top_k = gates.shape
    if policy == "position":
        flat = np.arange(tokens * top_k)
        return flat.reshape(tokens, top_k).T.ravel() if choices_first else flat
    key = {"probs": -gates, "bpr": np.broadcast_to(-best[:, None], gates.shape)}.get(policy)
    if key is None:
        key = rng.random(gates.shape)
    if choices_first:
        return np.asarray((np.argsort(key, axis=0, kind="stable") * top_k + np.arange(top_k)).T.ravel())
    return np.asarray(np.argsort(key, axis=None, kind="stable"))


def _first_served(bins: Ints, queue: Ints, slots: Ints) -> Bools:
    """Whether each assignment (shape of `bins`) finds a slot in its bin when placed in the order of `queue`."""
    wanted = bins.ravel()[queue]
    # Sorting sixteen-bit keys is a radix sort, ten times faster than sorting wide ones.
    by_bin = np.argsort(wanted.astype(np.uint16) if slots.size <= 2**16 else wanted, kind="stable")
    count = np.bincount(wanted, minlength=slots.size)
    place = np.arange(wanted.size) - np.repeat(np.cumsum(count) - count, count)
    served = np.empty(wanted.size, dtype=bool)
    served[queue[by_bin]] = place < np.repeat(slots, count)
    return served.reshape(bins.shape)


def _reroute(
    final: Ints, weight: Floats, order: Ints, gate: Floats, places: _Places, policy: Policy, rng: np.random.Generator
) -> int:
    """Send dropped picks to later ranks of their tokens while there is room; returns how many moved.

    `final` and `weight` [tokens, k] are completed in place; `order` and `gate` [tokens, m] are the whole ranking.
    """
    used = np.bincount(places.of(final)[final >= 0], minlength=places.slots.size)
    room, moved = places.slots - used, 0
    waiting = np.flatnonzero((final < 0).any(axis=1))
    for rank in range(final.shape[1], order.shape[1]):
        if not waiting.size or not room.any():
            break
        wanted = order[waiting, rank]
        bins = places.of(wanted, waiting)[:, None]
        queue = _queue(policy, gate[waiting, rank, None], gate[waiting].max(axis=1), True, rng)
        taken = _first_served(bins, queue, room)[:, 0]
        tokens = waiting[taken]
        hole = (final[tokens] < 0).argmax(axis=1)
        final[tokens, hole], weight[tokens, hole] = wanted[taken], gate[tokens, rank]
        room = room - np.bincount(bins[taken, 0], minlength=room.size)
        moved += tokens.size
        waiting = waiting[(final[waiting] < 0).any(axis=1)]
    return moved


def _weights(rule: Rule, chosen: Floats, weight: Floats, served: Bools) -> Floats:
    """Gates after the limit [tokens, k]: `chosen` of the picks, `weight` of the experts that serve."""
    kept = np.where(served, weight, 0.0)
    if rule.gates == "unchanged":
        return kept
    total = (chosen if rule.gates == "before" else kept).sum(axis=1, keepdims=True)
    return kept / np.where(total > 0, total, 1.0)
