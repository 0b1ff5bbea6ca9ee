"""Which experts the tokens of a step take: an exact sampler, token by token, and a fast one, count by count.

Both return assignments [draws, layers, experts] of `tokens` tokens whose expected picks are q [layers, experts]
(sum top_k), and both honour group-limited selection. The fast one costs the same for any number of tokens and is
what cached draws are made of; the exact one is the reference it is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.errors import ModelConfigError
from planner.routing.experts import Floats, check_picks
from planner.routing.ranks import assignment_variance, group_limited_counts

_CHUNK = 4_000_000
"""Scores held at once by the exact sampler."""
_EXACT_TOKENS = 8
"""Steps this small are drawn token by token: that a token takes exactly top_k experts still shows."""
_GAUSSIAN_MEAN = 10.0
"""Mean count from which a rounded Gaussian with the binomial's skew stands for the binomial."""


@dataclass(frozen=True, slots=True)
class Selection:
    """How a router picks: `top_k` of all experts, or of the `top_groups` best of `num_groups` equal groups.

    A group scores the sum of its two best experts (DeepSeek-V3); its experts lie next to each other.
    `spread` is the standard deviation of the experts per token around top_k (adaptive top-k), 0 in published models.
    """

    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    spread: float = 0.0

    @property
    def is_limited(self) -> bool:
        """Some groups are out of reach of a token."""
        return self.top_groups < self.num_groups

    def check(self, num_experts: int) -> None:
        """ModelConfigError unless the groups divide the experts and can offer `top_k`."""
        check_picks(num_experts, self.top_k)
        size = num_experts // self.num_groups
        if num_experts % self.num_groups or self.top_groups * size < self.top_k:
            raise ModelConfigError(
                f"{self.top_groups} of {self.num_groups} groups cannot offer {self.top_k} of {num_experts} experts: "
                "num_groups must divide num_experts and the chosen groups must hold at least top_k experts"
            )


Sampler = Callable[[Floats, Selection, Sequence[int], int, np.random.Generator], Floats]


def exact_counts(
    q: Floats, selection: Selection, tokens: Sequence[int], draws: int, rng: np.random.Generator
) -> Floats:
    """Assignments [len(tokens), draws, layers, experts], every token picking for itself; `tokens` ascending.

    Picks are without replacement with inclusion probabilities q (Pareto sampling, Rosen 1997). The smaller steps are
    the first tokens of the largest.
    """
    layers, experts = q.shape
    selection.check(experts)
    counts = np.zeros((len(tokens), draws, layers, experts))
    odds = np.log(q) - np.log1p(-np.minimum(q, 1 - 1e-12))
    at_once = max(1, _CHUNK // (draws * layers * experts))
    done, running = 0, np.zeros((draws, layers, experts))
    for i, size in enumerate(tokens):
        while done < size:
            chunk = min(at_once, size - done)
            running += _picked(odds, selection, (chunk, draws, layers, experts), rng).sum(axis=0)
            done += chunk
        counts[i] = running
    return counts


def _picked(odds: Floats, selection: Selection, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which experts each token takes, shape [tokens, draws, layers, experts]."""
    score = odds.astype(np.float32) + rng.logistic(size=shape).astype(np.float32)
    if selection.is_limited:
        score = _barred(score, selection)
    if not selection.spread:
        limit = np.partition(score, -selection.top_k, axis=-1)[..., -selection.top_k, None]
        return np.asarray(score >= limit)
    wanted = np.rint(rng.normal(selection.top_k, selection.spread, shape[:-1])).clip(1, shape[-1]).astype(int)
    ordered = -np.sort(-score, axis=-1)
    return np.asarray(score >= np.take_along_axis(ordered, wanted[..., None] - 1, axis=-1))


def _barred(score: NDArray[np.float32], selection: Selection) -> NDArray[np.float32]:
    """`score` with the experts of groups out of reach at minus infinity."""
    grouped = score.reshape(*score.shape[:-1], selection.num_groups, -1)
    affinity = 1 / (1 + np.exp(-grouped))  # groups are compared by affinity, which is bounded, not by its logit
    best = np.partition(affinity, -min(2, grouped.shape[-1]), axis=-1)[..., -2:].sum(axis=-1)
    limit = np.partition(best, -selection.top_groups, axis=-1)[..., -selection.top_groups, None]
    return np.where((best >= limit)[..., None], grouped, -np.inf).reshape(score.shape).astype(np.float32)


def fast_counts(q: Floats, selection: Selection, tokens: Sequence[int], draws: int, rng: np.random.Generator) -> Floats:
    """Assignments [len(tokens), draws, layers, experts] from one binomial per expert; `tokens` ascending.

    Experts are drawn independently. With deviations widened by sqrt(E / (E - 1)) the largest of them has the same
    expectation as under the true correlation -1 / (E - 1) (exact for equal Gaussians). A larger step holds the draws
    of the smaller ones, as a longer batch would.
    """
    layers, experts = q.shape
    selection.check(experts)
    small = [size for size in tokens if size <= _EXACT_TOKENS]
    counts = np.empty((len(tokens), draws, layers, experts))
    counts[: len(small)] = exact_counts(q, selection, small, draws, rng) if small else 0.0
    shape = (draws, layers, experts)
    total = np.zeros(shape)
    at = 0
    for i, size in enumerate(tokens[len(small) :], len(small)):
        total += _increment(q, selection, size - at, shape, rng)
        at = size
        counts[i] = _widened(total, at * q, at)
    return counts


def _widened(total: Floats, mean: Floats, tokens: int) -> Floats:
    experts = total.shape[-1]
    wider = np.sqrt(experts / max(experts - 1, 1))
    return np.where(total > 0, (mean + (total - mean) * wider).clip(0.0, tokens), 0.0)


def _increment(
    q: Floats, selection: Selection, tokens: int, shape: tuple[int, ...], rng: np.random.Generator
) -> Floats:
    """Assignments of `tokens` more tokens, [draws, layers, experts]."""
    chance = np.broadcast_to(q, shape)
    if selection.is_limited:
        size = shape[-1] // selection.num_groups
        sway = _group_sway(shape[-1], selection.top_k, selection.num_groups, selection.top_groups) / np.sqrt(tokens)
        swayed = 1 + sway * rng.standard_normal((*shape[:2], selection.num_groups))
        chance = (chance * np.repeat(swayed, size, axis=-1)).clip(0.0, 1.0)
    if selection.spread:
        swayed = 1 + rng.standard_normal((*shape[:-1], 1)) * selection.spread / selection.top_k / np.sqrt(tokens)
        chance = (chance * swayed).clip(0.0, 1.0)
    mean = tokens * chance
    if float(mean.mean()) < _GAUSSIAN_MEAN:
        return rng.binomial(tokens, chance).astype(float)
    sd = np.sqrt(mean * (1 - chance))
    z = rng.standard_normal(shape, dtype=np.float32)
    skewed = z + (z * z - 1) * (1 - 2 * chance) / np.maximum(6 * sd, 1e-9)
    return np.asarray(np.rint(mean + sd * skewed).clip(0.0, tokens))


def _group_sway(num_experts: int, top_k: int, num_groups: int, top_groups: int) -> float:
    """Relative deviation of a group's picks, times sqrt(tokens), that the group limit adds to independent picks."""
    limited = group_limited_counts(num_experts, top_k, num_groups, num_groups, top_groups).var(axis=0).mean()
    extra = float(limited) - assignment_variance(num_experts, top_k, num_groups)
    return float(np.sqrt(max(extra, 0.0) * num_groups / max(num_groups - 1, 1))) * num_groups / top_k


SAMPLERS: dict[str, Sampler] = {"exact": exact_counts, "fast": fast_counts}
