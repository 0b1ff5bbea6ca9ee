"""Synthetic tokens with a given popularity, and what a limit does to them in several seeded draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.capacity.assignment import assign
from planner.capacity.limit import CapacityLimit
from planner.capacity.rules import Floats, Ints
from planner.errors import InputError
from planner.routing import inclusion_from_load

_AT_ONCE = 4_000_000
"""Router scores held at once."""
_USUAL_SCORES = 30_000_000
"""Router scores of a whole answer, about two seconds."""
_MOST_SCORES = 600_000_000
_MOST_DRAWS, _FEWEST_DRAWS = 32, 3


@dataclass(frozen=True, slots=True)
class DrawnDrops:
    """Exact drops of seeded batches; arrays are [layers, draws], `capacity` is the largest of all draws."""

    capacity: int
    drop_rate: Floats
    fully_dropped_rate: Floats
    slot_utilisation: Floats
    processed_rows: Floats
    rerouted_rate: Floats
    max_over_mean: Floats


def num_draws(tokens: int, num_experts: int, layers: int) -> int:
    """Draws per layer that answer in about two seconds. Raises InputError if one step is too large to simulate."""
    scores = tokens * num_experts * layers
    if scores * _FEWEST_DRAWS > _MOST_SCORES:
        most = _MOST_SCORES // (_FEWEST_DRAWS * num_experts * layers)
        raise InputError(
            f"{tokens:,} tokens x {num_experts:,} experts x {layers} layers are too many to simulate token by token. "
            f"Ask about one step of at most {most:,} tokens: drop rates hardly change beyond."
        )
    return max(_FEWEST_DRAWS, min(_MOST_DRAWS, _USUAL_SCORES // max(scores, 1)))


def routed_tokens(q: Floats, tokens: int, depth: int, rng: np.random.Generator) -> tuple[Ints, Floats]:
    """Ranked experts [tokens, depth] and their gate probabilities of tokens that pick expert i with chance q_i.

    Pareto sampling (Rosen 1997): score = logit(q) + logistic noise, the highest scores are picked, which keeps the
    inclusion probabilities; for a single pick log(q) + Gumbel noise keeps them exactly. The scores stand for the
    router's logits: gates are their softmax over all experts.
    """
    single = round(float(q.sum())) == 1
    odds = np.log(q) - (0.0 if single else np.log1p(-np.minimum(q, 1 - 1e-12)))
    ranking, gates = np.empty((tokens, depth), dtype=np.int64), np.empty((tokens, depth))
    step = max(1, _AT_ONCE // q.size)
    for start in range(0, tokens, step):
        size = min(step, tokens - start)
        uniform = rng.random((size, q.size), dtype=np.float32).clip(1e-7, 1 - 1e-7)
        noise = -np.log(-np.log(uniform)) if single else np.log(uniform) - np.log1p(-uniform)
        score = odds.astype(np.float32) + noise
        best = np.argpartition(-score, depth - 1, axis=1)[:, :depth] if depth < q.size else None
        chosen = score if best is None else np.take_along_axis(score, best, axis=1)
        by_score = np.argsort(-chosen, axis=1)
        ranking[start : start + size] = by_score if best is None else np.take_along_axis(best, by_score, axis=1)
        top = np.take_along_axis(chosen, by_score, axis=1)
        weight = np.exp(score - score.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)
        gates[start : start + size] = np.exp(top - top[:, :1]) / weight
    return ranking, gates


def simulate(
    limit: CapacityLimit,
    popularity: Floats,
    tokens: int,
    top_k: int,
    *,
    num_sources: int = 1,
    draws: int | None = None,
    reroute: bool = False,
    seed: int = 0,
) -> DrawnDrops:
    """Drops of `draws` batches of `tokens` tokens per layer, `popularity` [layers, experts] being load shares.

    Every token picks `top_k` experts by itself; experts of no load are never picked unless too few are left.
    """
    layers, num_experts = popularity.shape
    times = num_draws(tokens, num_experts, layers) if draws is None else draws
    shares = np.maximum(popularity, popularity.sum(axis=1, keepdims=True) * 1e-12)
    seeds = np.random.SeedSequence(seed).spawn(layers * times)
    rows, capacity = np.empty((layers, times, 6)), 0
    for layer in range(layers):
        q = inclusion_from_load(shares[layer], top_k)
        for draw in range(times):
            rng = np.random.default_rng(seeds[layer * times + draw])
            ranking, gates = routed_tokens(q, tokens, num_experts if reroute else top_k, rng)
            found = assign(
                ranking, gates, num_experts, limit, top_k=top_k, num_sources=num_sources, reroute=reroute, seed=draw
            )
            busiest = found.asked.max() * num_experts / max(found.asked.sum(), 1)
            rates = (found.drop_rate, found.fully_dropped_rate, found.slot_utilisation)
            rows[layer, draw] = (*rates, found.processed_rows, found.rerouted_rate, busiest)
            capacity = max(capacity, found.capacity)
    return DrawnDrops(capacity, *np.moveaxis(rows, 2, 0))
