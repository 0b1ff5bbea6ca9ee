"""What a routing record says: skew per layer, load of ranks, reuse by the next token, correlation within requests.

Definitions follow the routing statistics derived from deepseek-ai/ESFT@579a7711 and allenai/OLMoE@357454f, so that
published values can be compared to the last digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import LayoutError, WorkloadError
from planner.routing.experts import Floats, active_experts
from planner.routing.records import Record, mixture

_MIN_WINDOWS = 4
"""Fewer windows give no correlation worth a number."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadSpread:
    """How unevenly the experts of each layer are loaded; every field is [layers].

    Attributes
    ----------
    max_over_mean
        Load of the most popular expert over the mean.
    cv
        Coefficient of variation (population standard deviation over mean).
    sigma_cv
        sqrt(ln(1 + cv^2)), the sigma of a log-normal with this cv.
    log_std
        Standard deviation of ln(load); dead experts count as one assignment. It overstates the skew of ranks where
        experts are nearly dead, which `sigma_cv` does not.
    gini
        0 for equal loads, towards 1 for one expert that takes all.
    zipf_exponent
        Minus the slope of ln(load) over ln(rank), all experts with the same weight.
    """

    max_over_mean: Floats
    cv: Floats
    sigma_cv: Floats
    log_std: Floats
    gini: Floats
    zipf_exponent: Floats


def load_spread(counts: ArrayLike) -> LoadSpread:
    """Spread of `counts` [layers, experts].

    >>> spread = load_spread([[1.0, 1.0, 1.0, 5.0]])
    >>> [round(float(x[0]), 3) for x in (spread.max_over_mean, spread.cv, spread.gini)]
    [2.5, 0.866, 0.375]
    """
    loads = np.asarray(counts, dtype=float)
    num_experts = loads.shape[1]
    mean = loads.mean(axis=1)
    cv = loads.std(axis=1) / mean
    ascending = np.sort(loads, axis=1)
    place = np.arange(1, num_experts + 1)
    gini = ascending @ (2.0 * place - num_experts - 1) / (num_experts * loads.sum(axis=1))
    logs = np.log(np.maximum(ascending[:, ::-1], 1.0))
    log_rank = np.log(place) - np.log(place).mean()
    slope = logs @ log_rank / max(float(log_rank @ log_rank), 1e-300)
    return LoadSpread(loads.max(axis=1) / mean, cv, np.sqrt(np.log1p(cv**2)), logs.std(axis=1), gini, -slope)


def rank_max_over_mean(counts: ArrayLike, ep: int) -> Floats:
    """Load of the busiest of `ep` ranks over the mean [layers], contiguous placement, a batch without noise.

    `counts` [layers, experts]. Raises LayoutError if `ep` does not divide the experts.
    """
    ranks = _by_rank(counts, ep).sum(axis=2)
    return np.asarray(ranks.max(axis=1) / ranks.mean(axis=1))


def best_max_over_mean(counts: ArrayLike, ep: int) -> Floats:
    """Lower bound of `rank_max_over_mean` [layers] over all placements of as many experts on each rank.

    No rank can have less than the mean, and the most popular expert shares its rank with others, at best with the
    least popular ones. Only redundant experts go below.
    """
    local = _by_rank(counts, ep).shape[2]
    ascending = np.sort(np.asarray(counts, dtype=float), axis=1)
    hottest = ascending[:, -1] + ascending[:, : local - 1].sum(axis=1)
    return np.asarray(np.maximum(1.0, hottest / (ascending.mean(axis=1) * local)))


def sampling_cv(record: Record) -> float | None:
    """The cv that uniform routing of as many tokens would show by chance, sqrt((1 - k/E) / (T k/E)).

    A record whose cv is not well above it is too short. None where the tokens per expert are unknown.
    """
    if record.top_k is None or not record.num_tokens:
        return None
    share = record.top_k / record.num_experts
    return float(np.sqrt((1 - share) / (record.num_tokens * share)))


def expected_active(record: Record, batches: Sequence[int]) -> Floats | None:
    """Distinct experts used by a batch of random tokens of the record [batches], mean over layers.

    Exact for tokens drawn with replacement. None where counts alone do not tell the tokens.
    """
    if record.top_k is None:
        return None
    chance = record.counts * (record.top_k / record.counts.sum(axis=1, keepdims=True))
    return np.asarray(active_experts(np.asarray(batches, dtype=float), np.minimum(chance, 1.0)).mean(axis=0))


def reuse(record: Record) -> Floats | None:
    """Probability that an expert of a token is picked again by the next token of its sequence [layers].

    Mean over sequences of two and more tokens, each with the same weight; uniform routing gives top_k / experts.
    None without token ids or without such a sequence.
    """
    if record.expert_ids is None or record.sequence_lengths is None or record.sequence_lengths.max() < 2:
        return None
    lengths = record.sequence_lengths
    sequence = np.repeat(np.arange(lengths.size), lengths)
    inside = sequence[1:] == sequence[:-1]
    weight = np.where(inside, 1.0 / np.maximum(lengths[sequence[1:]] - 1, 1), 0.0) / (lengths > 1).sum()
    return np.array([_repeats(layer) @ weight for layer in record.expert_ids])


def request_concentration(record: Record) -> Floats | None:
    """kappa [layers] of the law p_request ~ Dirichlet(kappa p) of the load shares of single requests.

    Over-dispersion by moments: with q = k p, two tokens of one request share sum(q^2) + (k^2 - sum(q^2)) /
    (kappa + 1) experts on average, two of different requests sum(q^2). Requests weigh by their tokens. Infinite
    where requests do not differ; None without token ids or fewer than two requests of two tokens.
    """
    if record.expert_ids is None or record.sequence_lengths is None or record.top_k is None:
        return None
    lengths = record.sequence_lengths.astype(float)
    if (lengths > 1).sum() < 2:
        return None
    sequence = np.repeat(np.arange(lengths.size), record.sequence_lengths)
    weight = lengths * (lengths > 1) / lengths[lengths > 1].sum()
    pairs = np.maximum(lengths * (lengths - 1), 1.0)
    inverse = []
    for ids, counts in zip(record.expert_ids, record.counts, strict=True):
        cell = sequence[:, None] * record.num_experts + ids
        own = np.bincount(cell.ravel(), minlength=lengths.size * record.num_experts)
        own = own.reshape(lengths.size, -1).astype(float)
        same = float(weight @ ((own * (own - 1)).sum(axis=1) / pairs))
        other = float((counts**2 - (own**2).sum(axis=0)).sum() / (lengths.sum() ** 2 - (lengths**2).sum()))
        inverse.append((same - other) / (record.top_k**2 - other))
    with np.errstate(divide="ignore"):
        return np.asarray(np.maximum(1.0 / np.maximum(inverse, 0.0) - 1.0, 0.0))


def window_correlation(record: Record, window_tokens: int = 512) -> float | None:
    """Lag-1 correlation of ln(load) in successive windows of time, over all experts and layers.

    Windows of the recording, or of `window_tokens` tokens in the order of the file. Each expert is compared with
    its own mean over the windows. Sampling noise lowers it. None with fewer than four windows.
    """
    windows = record.windows if record.windows is not None else _windows(record, window_tokens)
    if windows is None or len(windows) < _MIN_WINDOWS:
        return None
    share = (windows + 0.5) / (windows + 0.5).sum(axis=2, keepdims=True)
    away = np.log(share) - np.log(share).mean(axis=0)
    variance = float((away**2).mean())
    return float((away[1:] * away[:-1]).mean() / variance) if variance > 0 else None


def load_correlation(records: Sequence[Record]) -> Floats:
    """Correlation of ln(load) between records [records, records + 1], mean over layers; the last is their mixture.

    Near 1 the same experts are hot in both, so a placement learned on one suits the other. Dead experts count as
    one assignment. NaN where all loads of a record are equal.
    """
    logs = np.stack([np.log(np.maximum(r.counts, 1.0)) for r in [*records, mixture(records)]])
    away = logs - logs.mean(axis=2, keepdims=True)
    size = np.sqrt((away**2).sum(axis=2))
    with np.errstate(invalid="ignore", divide="ignore"):
        pairs = np.einsum("ale,ble->abl", away[:-1], away) / (size[:-1, None] * size[None])
    return np.asarray(pairs.mean(axis=2))


def ep_sizes(num_experts: int) -> tuple[int, ...]:
    """EP sizes worth a look: powers of two that divide the experts, or all divisors where those are fewer than three.

    >>> ep_sizes(64), ep_sizes(18)
    ((2, 4, 8, 16, 32, 64), (2, 3, 6, 9, 18))
    """
    divisors = [d for d in range(2, num_experts + 1) if num_experts % d == 0]
    powers = [d for d in divisors if d & (d - 1) == 0]
    return tuple(powers if len(powers) >= 3 else divisors)


def _by_rank(counts: ArrayLike, ep: int) -> Floats:
    """[layers, ranks, experts per rank]."""
    loads = np.asarray(counts, dtype=float)
    if ep < 1 or loads.shape[1] % ep:
        fits = [d for d in range(1, loads.shape[1] + 1) if loads.shape[1] % d == 0]
        near = sorted(sorted(fits, key=lambda d: abs(d - ep))[:2])
        raise LayoutError(f"ep={ep} does not divide {loads.shape[1]} experts. Use {' or '.join(map(str, near))}.")
    return loads.reshape(loads.shape[0], ep, -1)


def _repeats(ids: NDArray[np.unsignedinteger[Any]]) -> Floats:
    """Share of the experts of each token but the last that the next token picks again [tokens - 1]."""
    return np.asarray((ids[1:, :, None] == ids[:-1, None, :]).any(axis=2).mean(axis=1))


def _windows(record: Record, window_tokens: int) -> Floats | None:
    """Counts [windows, layers, experts] of full windows of tokens, None without ids."""
    if window_tokens < 1:
        raise WorkloadError(f"window of {window_tokens} tokens; use at least 1")
    if record.expert_ids is None:
        return None
    layers, tokens, top_k = record.expert_ids.shape
    num = tokens // window_tokens
    cells = np.arange(num).repeat(window_tokens * top_k) * record.num_experts
    flat = record.expert_ids[:, : num * window_tokens].reshape(layers, -1)
    counts = [np.bincount(cells + layer, minlength=num * record.num_experts) for layer in flat]
    return np.stack(counts, axis=1).reshape(num, record.num_experts, layers).swapaxes(1, 2).astype(float)
