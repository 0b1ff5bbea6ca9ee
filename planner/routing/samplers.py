"""Which experts the tokens of a step take: an exact sampler, token by token, and a fast one, count by count.

Both return assignments [draws, layers, experts] of `tokens` tokens whose expected picks are q [layers, experts]
(sum top_k), group-limited or not, and both hand out exactly top_k picks per token. The fast one costs the same for any
number of tokens and is what cached draws are made of; the exact one is the reference it is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.errors import ModelConfigError
from planner.routing.experts import Floats, check_picks, inclusion_from_load
from planner.routing.ranks import assignment_variance, group_limited_counts

_CHUNK = 4_000_000
"""Scores held at once by the exact sampler."""
_EXACT_TOKENS, _EXACT_SCORES = 8, 2048
"""Steps of so few tokens, or tokens x experts, are drawn token by token: that a token takes an expert once shows."""
_GAUSSIAN_MEAN = 10.0
"""Mean count from which a rounded Gaussian with the binomial's skew stands for the binomial."""
_LEAN_TOKENS, _LEAN = 8192, 0.5
"""Tokens and change of log-preference behind the two exponents of a group-limited router (noise 0.01 to 0.03)."""
_HALF_STEP, _TINY = np.float32(2.0**-25), np.float32(1e-30)
"""Keep logarithms finite: random numbers in single precision are multiples of twice the first, 0 included."""
_ROUNDS = 30
"""Of a fixed point that halves its error each time or better."""
_CALIBRATION_STEPS, _CALIBRATION_TOKENS = 8, 2048
"""Leave 4 % of noise in the picks of a mean expert of DeepSeek-V3, 1 % in those of its groups."""
_SEED = 20261122


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


def exact_counts(
    q: Floats, selection: Selection, tokens: Sequence[int], draws: int, rng: np.random.Generator
) -> Floats:
    """Assignments [len(tokens), draws, layers, experts], every token picking for itself; `tokens` ascending.

    Picks are without replacement with inclusion probabilities q (Pareto sampling, Rosen 1997). Under a group limit
    the router's preferences are chosen so that q is what remains after it. The smaller steps are the first tokens of
    the largest.
    """
    selection.check(q.shape[-1])
    return _token_by_token(_calibrated(q, selection), selection, tokens, draws, rng)


def _token_by_token(
    odds: Floats, selection: Selection, tokens: Sequence[int], draws: int, rng: np.random.Generator
) -> Floats:
    layers, experts = odds.shape
    counts = np.zeros((len(tokens), draws, layers, experts))
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
    score = _noise(selection, shape, rng)
    score += odds.astype(np.float32)
    if selection.is_limited:
        score = _barred(score, selection)
    if not selection.spread:
        limit = np.partition(score, -selection.top_k, axis=-1)[..., -selection.top_k, None]
        picked = np.asarray(score >= limit)
        if np.count_nonzero(picked) > limit.size * selection.top_k:  # two scores of a token are equal
            picked = np.zeros(shape, dtype=bool)
            best = np.argpartition(score, -selection.top_k, axis=-1)[..., -selection.top_k :]
            np.put_along_axis(picked, best, True, axis=-1)
        return picked
    wanted = np.rint(rng.normal(selection.top_k, selection.spread, shape[:-1])).clip(1, shape[-1]).astype(int)
    ordered = -np.sort(-score, axis=-1)
    return np.asarray(score >= np.take_along_axis(ordered, wanted[..., None] - 1, axis=-1))


def _noise(selection: Selection, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """What is added to the log-odds: of one pick Gumbel, otherwise logistic noise, in single precision."""
    if selection.top_k == 1:
        return np.asarray(-np.log(rng.standard_exponential(shape, dtype=np.float32) + _TINY))
    chance = rng.random(shape, dtype=np.float32)
    return np.asarray(np.log((chance + _HALF_STEP) / (1 - chance)))


def _barred(score: NDArray[np.float32], selection: Selection) -> NDArray[np.float32]:
    """`score` with the experts of groups out of reach at minus infinity."""
    grouped = score.reshape(*score.shape[:-1], selection.num_groups, -1)
    affinity = 1 / (1 + np.exp(-grouped))  # groups are compared by affinity, which is bounded, not by its logit
    best = np.partition(affinity, -min(2, grouped.shape[-1]), axis=-1)[..., -2:].sum(axis=-1)
    limit = np.partition(best, -selection.top_groups, axis=-1)[..., -selection.top_groups, None]
    return np.where((best >= limit)[..., None], grouped, np.float32(-np.inf)).reshape(score.shape)


def _calibrated(q: Floats, selection: Selection) -> Floats:
    """Log-odds [layers, experts] of a router whose picks come out as q, also under a group limit.

    From `_leaning` the odds move by what drawn tokens miss, ever less so that the noise averages out. Where the few
    hottest experts of a skewed layer (log-normal sigma 0.9) are asked for more than the limit lets through, they stay
    2 % short (four of eight groups; two of eight: 10 %).
    """
    odds = _leaning(q, selection)
    rng = np.random.default_rng(_SEED)
    for step in range(_CALIBRATION_STEPS if selection.is_limited else 0):
        picks = _picked(odds, selection, (_CALIBRATION_TOKENS, 1, *q.shape), rng).sum(axis=(0, 1))
        odds = odds + np.log((_CALIBRATION_TOKENS * q + 1) / (picks + 1)) / (step + 1)
    return odds


def _leaning(q: Floats, selection: Selection) -> Floats:
    """Log-odds for picks q, under a group limit from two exponents.

    A limit makes popular groups more popular and levels the experts inside them: log-picks grow `group` times as fast
    as the log-preference of a group and `inside` times as fast as that of an expert in its group. Few very popular
    experts get up to 7 % less than asked (four of eight groups, log-normal sigma 0.9; two of eight: 25 %).
    """
    if not selection.is_limited:
        return _odds(q, selection)
    group, inside = _leans(q.shape[-1], selection.top_k, selection.num_groups, selection.top_groups)
    grouped = q.reshape(len(q), selection.num_groups, -1)
    total = grouped.sum(axis=-1, keepdims=True)
    preferred = (total ** (1 / group) * (grouped / total) ** (1 / inside)).reshape(q.shape)
    return _odds(inclusion_from_load(preferred, selection.top_k), selection)


@lru_cache(maxsize=64)
def _leans(num_experts: int, top_k: int, num_groups: int, top_groups: int) -> tuple[float, float]:
    """Exponents of groups, and of experts in their group, from picks to which half of them is preferred."""
    selection = Selection(top_k, num_groups, top_groups)
    size = num_experts // num_groups
    half_of_groups = np.arange(num_experts) // size % 2
    half_of_experts = np.arange(num_experts) % size % 2
    found = []
    for half in (half_of_groups, half_of_experts):
        q = inclusion_from_load(np.exp(_LEAN * half), top_k)[None]
        rng = np.random.default_rng(_SEED)
        picks = _picked(_odds(q, selection), selection, (_LEAN_TOKENS, 1, 1, num_experts), rng).sum(axis=(0, 1, 2))
        found.append(float(np.log(picks[half == 1].mean() / picks[half == 0].mean())) / _LEAN if half.any() else 1.0)
    return found[0], found[1]


def _odds(q: Floats, selection: Selection) -> Floats:
    """What noise is added to: one pick is the Gumbel maximum, for which log-weights are exact."""
    return np.log(q) if selection.top_k == 1 else np.log(q) - np.log1p(-np.minimum(q, 1 - 1e-12))


def fast_counts(q: Floats, selection: Selection, tokens: Sequence[int], draws: int, rng: np.random.Generator) -> Floats:
    """Assignments [len(tokens), draws, layers, experts], drawn count by count; `tokens` ascending.

    Experts are drawn independently and then brought to the picks there are, which gives them the correlation of picks
    without replacement. A larger step holds the draws of the smaller ones, as a longer batch would.
    """
    layers, experts = q.shape
    selection.check(experts)
    most = max(_EXACT_TOKENS, _EXACT_SCORES // experts)
    small = [size for size in tokens if size <= most]
    counts = np.empty((len(tokens), draws, layers, experts))
    counts[: len(small)] = _token_by_token(_leaning(q, selection), selection, small, draws, rng) if small else 0.0
    law = _Increments(q, selection)
    at, total = (small[-1], counts[len(small) - 1].copy()) if small else (0, np.zeros((draws, layers, experts)))
    for i, size in enumerate(tokens[len(small) :], len(small)):
        total += law.draw(size - at, total.shape, rng)
        at = size
        counts[i] = total
    return counts


class _Increments:
    """Assignments of some more tokens.

    Picks without replacement have variances d = q (1 - q) and sum to top_k. Independent counts of variance c, from
    whose sum every expert takes its share c / sum(c) away, have variance c (1 - c / sum(c)): c is solved for d.
    With one pick that is the multinomial law, otherwise Hajek's approximation. A group limit moves whole groups
    besides, by the relative deviation `sway`.
    """

    def __init__(self, q: Floats, selection: Selection) -> None:
        self.q, self.selection = q, selection
        own = q * (1 - q)
        self.sway = _group_sway(q, selection) if selection.is_limited else 0.0
        own = np.maximum(own - (self.sway * q) ** 2 * (1 - 1 / selection.num_groups), 0.0)
        self.variance = own.copy()
        for _ in range(_ROUNDS):
            self.variance = own + self.variance**2 / np.maximum(self.variance.sum(axis=-1, keepdims=True), 1e-300)

    def draw(self, tokens: int, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
        """Assignments of `tokens` more tokens, whole numbers, [draws, layers, experts]."""
        chance = self._chance(tokens, shape, rng) if self.selection.is_limited else np.broadcast_to(self.q, shape)
        mean = tokens * chance
        few = mean < _GAUSSIAN_MEAN
        if few.all():
            counts = self._binomial(tokens, chance, ..., rng)
        else:
            sd = np.sqrt(tokens * self.variance)
            z = rng.standard_normal(shape, dtype=np.float32)
            counts = (mean + sd * z + (z * z - 1) * (1 - 2 * chance) / 6).clip(0.0, tokens)
            counts[few] = self._binomial(tokens, chance, few, rng)
        picks = tokens * self.selection.top_k
        if not self.selection.spread:
            return self._settled(counts, mean, tokens, np.array(picks), rng)
        varied = rng.normal(picks, self.selection.spread * np.sqrt(tokens), (*shape[:-1], 1))
        return self._settled(counts, mean, tokens, np.rint(varied).clip(tokens, tokens * shape[-1]), rng)

    def _binomial(self, tokens: int, chance: Floats, cells: Any, rng: np.random.Generator) -> Floats:
        """Counts of `cells` of [draws, layers, experts]; under a limit only tokens that chose the group try."""
        if not self.selection.is_limited:
            return np.asarray(rng.binomial(tokens, chance[cells]), dtype=float)
        # An expert so popular that most tokens of its group take it is no rare event in any number of tries.
        reach = np.clip(2 * self.q, self.selection.top_groups / self.selection.num_groups, 1.0)
        tries = np.floor((tokens * chance / self.q * reach)[cells] + rng.random(chance[cells].shape))
        once = np.broadcast_to(self.q / reach, chance.shape)[cells]
        return np.asarray(rng.binomial(tries.astype(np.int64), once), dtype=float)

    def _chance(self, tokens: int, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
        """q [draws, layers, experts] after as many tokens chose each group as would by chance."""
        groups = self.selection.num_groups
        share = self.selection.top_groups / groups
        weight = self.q.reshape(len(self.q), groups, -1).sum(axis=-1) / self.selection.top_k
        chosen = rng.binomial(tokens, share, (*shape[:2], groups)) / tokens - share
        chosen = (chosen - (chosen * weight).sum(axis=-1, keepdims=True)) / np.sqrt(share * (1 - share))
        swayed = self.q * np.repeat(1 + self.sway * chosen, shape[-1] // groups, axis=-1)
        return np.asarray(swayed.clip(0.0, 1.0))

    def _settled(self, counts: Floats, mean: Floats, tokens: int, picks: Floats, rng: np.random.Generator) -> Floats:
        """`counts` as whole numbers with sum `picks`, each within 0 to `tokens`; `mean` is what they were drawn for.

        Experts give back what is too much in proportion to their counts, so that none without tokens loses any, and
        get what is missing in proportion to their mean; both times weighted to take their share of the variance.
        """
        share = self.variance / self.q
        counts = _towards(picks, counts, counts * share, mean * share)
        if counts.min() < 0 or counts.max() > tokens:
            counts = counts.clip(0.0, tokens)
            counts = _towards(picks, counts, counts, tokens - counts)
        # One random offset per row rounds every count up or down with the right chance and keeps their sum.
        whole = np.floor(np.cumsum(counts, axis=-1) + rng.random((*counts.shape[:-1], 1)))
        whole[..., -1:] = picks
        return np.asarray(np.diff(whole, axis=-1, prepend=0.0))


def _towards(picks: Floats, counts: Floats, taken: Floats, added: Floats) -> Floats:
    """`counts` with sum `picks`: what is too much is shared like `taken`, what is missing like `added`."""
    over = counts.sum(axis=-1, keepdims=True) - picks
    share = np.where(over > 0, taken, added)
    return np.asarray(counts - share * (over / np.maximum(share.sum(axis=-1, keepdims=True), 1e-300)))


def _group_sway(q: Floats, selection: Selection) -> float:
    """Relative deviation of a group's picks, times sqrt(tokens), that the group limit adds to independent ones."""
    experts, groups, top_k = q.shape[-1], selection.num_groups, selection.top_k
    limited = group_limited_counts(experts, top_k, groups, groups, selection.top_groups).var(axis=0).mean()
    extra = max(float(limited) - assignment_variance(experts, top_k, groups), 0.0)
    # Groups lose one in `groups` of it when the sum is settled, and experts of a group one in their number.
    size = experts // groups
    return float(np.sqrt(extra * groups / (groups - 1) * size / max(size - 1, 1)) * groups / top_k)
