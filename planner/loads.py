"""Load of the ranks of one MoE layer in one step: a draw of the router, through capacity and placement.

Steps are drawn once, at a few sizes, for representative layers; every step of a simulation then looks up one of
these draws, so its cost does not depend on tokens, experts or ranks. The mean over draws is what planning uses.
Tokens are those of all ranks together. Against token-by-token simulation the means are within 2 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.capacity.limit import CapacityLimit
from planner.errors import LayoutError, WorkloadError
from planner.placement import Placement, place
from planner.routing import PROMPT_SPREAD, Law, LogNormal, Measured, Selection, fast_counts, skew_for
from planner.routing.experts import inclusion_from_load
from planner.routing.laws import Hashed, PowerLaw

Floats = NDArray[np.float64]

NUM_DRAWS = 8
"""Cached draws of every step size; successive steps of a simulation take one after the other."""
KNOTS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 131072, 1048576)
"""Tokens per step that are drawn; between them loads are nearly power laws."""
PROMPT_KNOTS = (1, 16, 64, 256, 1024, 4096, 16384, 131072, 1048576)
"""The same where a step holds few prompts: these are long, and what sets them apart hides the luck of few tokens."""
_SMALL, _MORE = 8, 4
"""Steps of up to `_SMALL` tokens are noisy: their means rest on `_MORE` times the draws."""
_LEAST_LAYERS, _NUMBERS = 16, 2**17
"""Fewer layers are drawn, `_LEAST_LAYERS` at least, when draws x layers x experts would exceed `_NUMBERS`."""
_MOST_PROMPTS = 16
"""Prompts of a step that are told apart; more are as even as these."""
_SEED = 20250711
_WIDE = 32
"""Experts per rank from which numpy adds them up faster one rank after the other."""
_ALMOST_ALL = 1 + 1e-9
"""Keeps the logarithm finite when every local expert is active."""


@dataclass(frozen=True, slots=True)
class Question:
    """What decides the loads of a layer: router, traffic, and where experts live.

    `law` is the popularity of mixed traffic, `prompt_spread` how far a single prompt strays from it (None where a
    step mixes many users), `learned` the popularity the placement was made for (None: `law` itself). `num_sources`
    are the attention ranks that route tokens of their own; `limit` is the capacity limit, None for dropless.
    `num_layers` representative layers are drawn, fewer for very many experts, at `knots` tokens per step.
    """

    num_experts: int
    selection: Selection
    law: Law
    num_ranks: int
    prompt_spread: LogNormal | None = None
    placement: str | Placement = "contiguous"
    redundant: int = 0
    num_nodes: int = 1
    learned: Law | None = None
    limit: CapacityLimit | None = None
    num_sources: int = 1
    num_layers: int = 64
    knots: tuple[int, ...] = KNOTS

    @property
    def local_slots(self) -> int:
        """Experts and copies of one rank."""
        return (self.num_experts + self.redundant) // self.num_ranks


@dataclass(frozen=True, slots=True, eq=False)
class LoadTable:
    """Draws at the knots of `question`.

    Arrays are [knots, draws, layers]. `max_load` are the token-expert pairs served by the busiest rank, `max_assigned`
    the rows it computes (padding counts), `max_active` the most experts of a rank whose weights are read; `drop_rate`
    and `fully_dropped_rate` are shares of assignments and tokens, `slot_utilisation` the used share of the slots of a
    limit (1 without). `mean_over_draws` and `active_over_draws` [knots] are the expectations of `max_assigned` over the
    even share of all assignments and of `max_active`.
    """

    question: Question
    max_load: Floats
    max_assigned: Floats
    max_active: Floats
    drop_rate: Floats
    fully_dropped_rate: Floats
    slot_utilisation: Floats
    mean_over_draws: Floats
    active_over_draws: Floats

    def max_over_mean(self, tokens: ArrayLike) -> Floats:
        """Expected rows of the busiest rank over the even share of all assignments, shape of `tokens`."""
        excess = np.log(np.maximum(self.mean_over_draws - 1.0, 1e-12))
        between = np.exp(np.interp(_log(tokens), _log(self.question.knots), excess))
        # Drops can leave the busiest rank less than an even share of what was asked for.
        capped = np.interp(_log(tokens), _log(self.question.knots), self.mean_over_draws)
        return np.asarray(np.where(capped < 1.0, capped, 1.0 + between))

    def active(self, tokens: ArrayLike) -> Floats:
        """Expected `max_active`, shape of `tokens`; exactly linear in these coordinates for uniform routing."""
        local = self.question.local_slots
        missed = np.maximum(1 - self.active_over_draws / (local * _ALMOST_ALL), 1e-12)
        hits = np.log(-np.log(missed))
        share = 1 - np.exp(-np.exp(np.interp(_log(tokens), _log(self.question.knots), hits)))
        return np.asarray(np.minimum(np.asarray(tokens, dtype=float), 1.0) * local * _ALMOST_ALL * share)


@dataclass(frozen=True, slots=True)
class RankLoad:
    """Expected load of the ranks of one layer in one step; arrays follow the shape of the asked tokens.

    `max_assignments` and `mean_assignments` count token-expert pairs on the most loaded and the average rank,
    `active_on_busiest` is the largest number of experts with at least one token on any rank.
    """

    max_assignments: Floats
    mean_assignments: Floats
    active_on_busiest: Floats


def rank_load(table: LoadTable, tokens: ArrayLike) -> RankLoad:
    """Expected rank loads for `tokens` per step (all ranks together), per layer on average.

    Raises WorkloadError on negative or infinite tokens.
    """
    t = np.asarray(tokens, dtype=float)
    if t.size and not (np.isfinite(t).all() and t.min() >= 0):
        raise WorkloadError(f"tokens per step must be finite and >= 0, got {tokens!r}")
    mean = t * (table.question.selection.top_k / table.question.num_ranks)
    return RankLoad(mean * table.max_over_mean(t), mean, table.active(t))


def nearest_knot(tokens: ArrayLike) -> NDArray[np.int64]:
    """Index of the knot next to each number of tokens, on a logarithmic scale."""
    edges = np.sqrt(np.multiply(KNOTS[1:], KNOTS[:-1]))
    return np.asarray(np.searchsorted(edges, np.asarray(tokens)), dtype=np.int64)


def on_knots(values: Floats, knots: tuple[int, ...]) -> Floats:
    """`values` [knots, ...] of other knots at `KNOTS`, linear in the logarithm of tokens, constant beyond the ends."""
    position = np.interp(_log(KNOTS), _log(knots), np.arange(len(knots)))
    low = np.minimum(position.astype(int), len(knots) - 2)
    share = (position - low).reshape(-1, *(1,) * (values.ndim - 1))
    return np.asarray(values[low] * (1 - share) + values[low + 1] * share)


def traffic(num_experts: int, phase: str, skew: Law | None) -> tuple[Law, LogNormal | None]:
    """Popularity of a step in `phase` and the spread of its prompts: `skew` as given, or what real records suggest.

    A prefill step works on one prompt per attention rank, each of a domain that the placement does not know; decode
    mixes many users. Laws that are one domain already, level, or copied from another tool have no spread of their own.
    """
    law = skew or skew_for(num_experts, "decode")
    if phase != "prefill" or num_experts <= 8:
        return law, None
    if isinstance(law, Measured) and law.prompt_spread is not None:
        return law, law.prompt_spread
    whole = isinstance(law, PowerLaw | Hashed) or law.name in ("uniform", "single-domain", "aux-balanced-8-experts")
    return law, None if whole else PROMPT_SPREAD


@lru_cache(maxsize=512)
def load_table(question: Question) -> LoadTable:
    """Draws of `question`. Raises LayoutError if experts and copies do not divide over the ranks."""
    placed = placement_of(question)
    table = _reduced(question, placed, question.knots, 1)
    small = [size for size in question.knots if size <= _SMALL]
    if not small or question.prompt_spread is not None:  # prompts are longer than that
        return table
    noisy = _reduced(question, placed, small, _MORE)
    mean = (table.mean_over_draws, table.active_over_draws)
    for values, better in zip(mean, (noisy.mean_over_draws, noisy.active_over_draws), strict=True):
        values[: len(small)] = better
    return replace(table, mean_over_draws=mean[0], active_over_draws=mean[1])


def rank_shares(question: Question) -> Floats:
    """Lasting load of every rank over the even share, [layers, ranks]; draws of single steps scatter around it.

    Copies of an expert take equal parts of its tokens; a capacity limit is not applied.
    """
    weights = weights_of(question.law, question.num_experts, question.num_layers)
    ranks = placement_of(question).rank_loads(inclusion_from_load(weights, question.selection.top_k))
    return np.asarray(ranks / ranks.mean(axis=-1, keepdims=True))


def placement_of(question: Question) -> Placement:
    """Where the experts of the representative layers are put, for the popularity the placement was learned on.

    A placement from a file must be made for these experts, copies and ranks (LayoutError).
    """
    if isinstance(question.placement, Placement):
        return _given(question, question.placement)
    return _placed(
        question.placement,
        question.learned or question.law,
        question.num_experts,
        question.num_layers,
        question.num_ranks,
        question.num_nodes,
        question.selection.num_groups,
        question.redundant,
    )


def _given(question: Question, given: Placement) -> Placement:
    """Rows of a given placement for the representative layers, spread evenly over its own."""
    wanted = (question.num_experts, question.redundant, question.num_ranks)
    found = (given.num_experts, given.num_redundant, given.num_ranks)
    if wanted != found:
        said = [f"{e} experts + {r} copies on {n} ranks" for e, r, n in (found, wanted)]
        raise LayoutError(
            f"the placement file is of {said[0]}, the layout has {said[1]}: use the layout it was made for"
        )
    layers = len(weights_of(question.law, question.num_experts, question.num_layers))
    rows = np.linspace(0, given.num_layers - 1, layers).round().astype(int)
    return Placement(given.policy, given.physical_to_logical[rows], *found[:1], given.num_ranks, given.num_nodes)


@lru_cache(maxsize=64)
def _placed(
    policy: str, learned: Law, num_experts: int, layers: int, ranks: int, nodes: int, groups: int, redundant: int
) -> Placement:
    load = weights_of(learned, num_experts, layers)
    return place(policy, load, ranks, num_nodes=nodes, num_groups=groups, redundant=redundant)


def _reduced(question: Question, placed: Placement, tokens: Sequence[int], more: int) -> LoadTable:
    prompts = min(question.num_sources, _MOST_PROMPTS) if question.prompt_spread is not None else 1
    router = (question.num_experts, question.selection, question.law, question.prompt_spread, prompts)
    counts = _counts(*router, question.num_layers, tuple(tokens), more)
    rates = [np.zeros(counts.shape[:3]), np.zeros(counts.shape[:3]), np.ones(counts.shape[:3])]
    padded = np.zeros(len(tokens))
    # A budget per device counts what its slots get; the other limits cap an expert before its copies share it.
    by_device = question.limit is not None and question.limit.rule_for(question.selection.top_k).scope == "device"
    if question.limit is not None and not by_device:
        counts, rates, padded = _limited(counts, question, tokens, question.num_sources)
    if by_device:
        slots, rates, padded = _limited(_split(placed, counts), question, tokens, question.num_ranks)
        served, active = _extremes(slots, question)
    else:
        # Step by step, so that the slots of a step stay in the cache of the processor.
        split = partial(_split, placed) if not _is_plain(question) else np.asarray
        steps = [_extremes(split(step), question) for step in counts]
        served, active = (np.stack([step[kind] for step in steps]) for kind in (0, 1))
    active = np.maximum(active, 1.0)
    # Padded experts compute all their slots, so the weights of every one are read.
    active = np.where(padded[:, None, None] > 0, question.local_slots, active)
    rows = np.maximum(served, padded[:, None, None])
    even = np.array(tokens) * question.selection.top_k / question.num_ranks
    busiest, most = rows.mean(axis=(1, 2)) / even, active.mean(axis=(1, 2))
    return LoadTable(question, served, rows, active, rates[0], rates[1], rates[2], busiest, most)


def _limited(
    counts: Floats, question: Question, tokens: Sequence[int], num_sources: int
) -> tuple[Floats, list[Floats], Floats]:
    """Served counts; drop rate, share of tokens without any expert, used slots [knots, draws, layers]; padded rows."""
    limit, top_k = question.limit, question.selection.top_k
    assert limit is not None
    results = [limit.apply(counts[i], size, top_k, num_sources) for i, size in enumerate(tokens)]
    names = ("drop_rate", "fully_dropped_rate", "slot_utilisation")
    rates = [np.stack([getattr(result, name) for result in results]) for name in names]
    rows = np.array([float(result.processed_rows.max()) for result in results]) / question.num_ranks
    return (
        np.stack([result.kept for result in results]),
        rates,
        rows if limit.is_padded(top_k) else np.zeros(len(tokens)),
    )


def _is_plain(question: Question) -> bool:
    return question.placement == "contiguous" and not question.redundant


def _split(placed: Placement, counts: Floats) -> Floats:
    """Assignments per slot; each token of an expert with copies takes one of them at random."""
    slots = placed.slot_loads(counts)
    if not placed.num_redundant:
        return slots
    share, z = _chances(placed, slots.shape[-3:])
    return np.asarray(np.maximum(slots + np.sqrt(slots * (1 - share)) * z, 0.0))


@lru_cache(maxsize=2)
def _chances(placed: Placement, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Chance that a token of an expert takes the copy of a slot [layers, slots], and the luck of each [*shape]."""
    share = np.take_along_axis(1.0 / placed.copies, placed.physical_to_logical, axis=1).astype(np.float32)
    return share, np.random.default_rng(_SEED).standard_normal(shape, dtype=np.float32)


def _extremes(slots: NDArray[Any], question: Question) -> tuple[NDArray[Any], NDArray[Any]]:
    """Assignments and active slots of the busiest rank [...], for `slots` [..., ranks x width]."""
    width, halved = question.local_slots, not question.redundant and question.limit is None
    seen: NDArray[Any] = np.minimum(slots, 1.0)
    return _busiest(slots, width, halved), _busiest(seen, width, halved)


def _busiest(slots: NDArray[Any], width: int, halved: bool) -> NDArray[Any]:
    """Largest sum over ranks [...] of `slots` [..., ranks x width]; adding seat by seat is fast for narrow ranks.

    Where slots hold whole numbers, whose sum is the same in any order, wide ranks are summed one by one and others may
    be `halved` first.
    """
    if halved and width >= _WIDE:
        return np.asarray(slots.reshape(*slots.shape[:-1], -1, width).sum(axis=-1).max(axis=-1))
    while halved and width % 2 == 0:
        slots, width = slots[..., ::2] + slots[..., 1::2], width // 2
    ranks = slots[..., ::width].copy()
    for seat in range(1, width):
        ranks += slots[..., seat::width]
    return np.asarray(ranks.max(axis=-1))


@lru_cache(maxsize=6)
def _counts(
    num_experts: int,
    selection: Selection,
    law: Law,
    prompt_spread: LogNormal | None,
    prompts: int,
    num_layers: int,
    tokens: tuple[int, ...],
    more: int,
) -> Floats:
    """Assignments [knots, draws, layers, experts] of `more` times `NUM_DRAWS` draws, `prompts` prompts in each."""
    rng, draws = np.random.default_rng(_SEED), NUM_DRAWS * more
    weights = weights_of(law, num_experts, num_layers)
    if prompt_spread is None:
        q = inclusion_from_load(weights, selection.top_k)
        return _single(fast_counts(q, selection, tokens, draws, rng))
    layers = len(weights)
    base, q = np.tile(weights, (draws, 1)), np.zeros((draws * layers, num_experts))
    for _ in range(prompts):
        strayed = np.concatenate([prompt_spread.weights(num_experts, layers, rng) for _ in range(draws)])
        q += inclusion_from_load(base * strayed, selection.top_k) / prompts
    counts = fast_counts(q, selection, tokens, 1, rng)
    return _single(counts).reshape(len(tokens), draws, layers, num_experts)


@lru_cache(maxsize=64)
def weights_of(law: Law, num_experts: int, num_layers: int) -> Floats:
    """Loads of the representative layers [layers, experts]."""
    layers = min(num_layers, max(_LEAST_LAYERS, _NUMBERS // (NUM_DRAWS * num_experts)))
    return law.weights(num_experts, layers, np.random.default_rng(_SEED))


def _single(counts: Floats) -> Floats:
    """In single precision, which halves what is kept."""
    return np.asarray(counts, dtype=np.float32)


def _log(tokens: ArrayLike) -> Floats:
    return np.asarray(np.log(np.maximum(np.asarray(tokens, dtype=float), 1.0)))
