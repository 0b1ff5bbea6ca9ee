"""A routing process with temporal reuse: popularity, and a habit of repeating what was used a moment ago.

Each pick repeats, with probability `repeat`, a pick of an earlier token, chosen by age with weight age^-decay within
the window; otherwise it is drawn by popularity. Double picks are drawn again, which is drawing without replacement.

Fitted to the prompt tokens of DeepSeek-V2-Lite (deepseek-ai/ESFT@579a7711), where an expert of one token is used by
the next with probability 0.26 to 0.29 (0.094 if uniform): `repeat` follows from that number alone. With the decay of
1.5 the process then gives the LRU hit rates of the four tasks at seven capacities within 6.5 points, 2.2 on average;
within 4 points but for translation, whose reuse does not fade with age.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import WorkloadError
from planner.residency.traces import Floats, Ints, checked_ids, next_token_reuse
from planner.routing.experts import check_picks

_BISECTIONS = 7
_CALIBRATION_TOKENS = 1500
_TRIES_PER_PICK = 4
_SPARE_TRIES = 4


@dataclass(frozen=True, slots=True)
class Reuse:
    """How often a pick repeats an earlier one, over how many tokens, and how fast the past fades."""

    repeat: float
    window_tokens: int = 64
    decay: float = 1.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.repeat < 1.0:
            raise WorkloadError(f"reuse: repeat {self.repeat:g} is no probability from 0 to below 1")
        if self.window_tokens < 1 or not 0.0 <= self.decay <= 10.0:
            raise WorkloadError(f"reuse: window {self.window_tokens} and decay {self.decay:g} must be >= 1 and 0 to 10")


REUSES: dict[str, Reuse] = {
    "none": Reuse(0.0),
    "records": Reuse(0.35),
    "decode-reports": Reuse(0.73),
}
"""`records`: mean over the four ESFT tasks (0.22 translation to 0.44 law), prompt tokens. `decode-reports`: what an LRU
cache counted while generating, 67 % with 64 and 81 % with 128 of 512 slots (ggml-org/llama.cpp pull request 27861);
one report, of the model Qwen3.8-Flash-Next."""


def sample_ids(
    popularity: ArrayLike, top_k: int, reuse: Reuse, sequences: int, tokens: int, rng: np.random.Generator
) -> NDArray[np.int16]:
    """Expert ids [layers, sequences, tokens, top_k] drawn from `popularity` [layers, experts] and `reuse`."""
    weights = np.asarray(popularity, dtype=float)
    layers, num_experts = weights.shape
    check_picks(num_experts, top_k)
    tries = _TRIES_PER_PICK * top_k + _SPARE_TRIES
    shape = (layers * sequences, tokens, tries)
    fresh = _fresh(weights, sequences, tokens, tries, rng).reshape(shape)
    repeats = rng.random(shape, dtype=np.float32) < reuse.repeat
    slots = rng.integers(0, top_k, shape, dtype=np.int16)
    chance = rng.random(shape, dtype=np.float32)
    ages = np.cumsum(np.arange(1, reuse.window_tokens + 1) ** -reuse.decay)
    earlier = np.tril(np.ones((tries, tries), dtype=bool), -1)
    out = np.zeros((layers * sequences, tokens * top_k), dtype=np.int16)
    for token in range(tokens):
        drawn = fresh[:, token]
        reach = min(token, reuse.window_tokens)
        if reach and reuse.repeat:
            age = 1 + np.minimum(np.searchsorted(ages[:reach], chance[:, token] * ages[reach - 1]), reach - 1)
            old = np.take_along_axis(out, (token - age) * top_k + slots[:, token], axis=1)
            drawn = np.where(repeats[:, token], old, drawn)
        double = ((drawn[:, :, None] == drawn[:, None, :]) & earlier).any(axis=2)
        first = np.argsort(double, axis=1, kind="stable")[:, :top_k]
        picks = np.take_along_axis(drawn, first, axis=1)
        short = np.take_along_axis(double, first, axis=1).any(axis=1)
        if short.any():
            picks[short] = _all_different(drawn[short], double[short], top_k, num_experts, rng)
        out[:, token * top_k : (token + 1) * top_k] = picks
    return out.reshape(layers, sequences, tokens, top_k)


def calibrate(ids: ArrayLike, sequence_lengths: ArrayLike, num_experts: int, seed: int = 0) -> Reuse:
    """The reuse that gives the records' popularity their next-token reuse; `repeat` 0 where popularity suffices.

    `ids` [layers, tokens, top_k] as in `traces.stack_distances`. Raises WorkloadError on ids that do not match.
    """
    picks, lengths = checked_ids(ids, sequence_lengths, num_experts)
    wanted = next_token_reuse(picks, lengths, num_experts)
    popularity = np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in picks]) + 0.0
    tokens = max(2, int(np.median(lengths)))
    sequences = max(4, _CALIBRATION_TOKENS // tokens)
    low, high = 0.0, 0.98
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        drawn = sample_ids(popularity, picks.shape[2], Reuse(middle), sequences, tokens, np.random.default_rng(seed))
        flat = drawn.reshape(drawn.shape[0], -1, drawn.shape[3])
        found = next_token_reuse(flat, np.full(sequences, tokens), num_experts)
        low, high = (middle, high) if found < wanted else (low, middle)
    return Reuse(round((low + high) / 2, 3))


def _fresh(weights: Floats, sequences: int, tokens: int, tries: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """Draws by popularity [layers, sequences x tokens x tries]."""
    chance = rng.random((len(weights), sequences * tokens * tries), dtype=np.float32)
    ends = np.cumsum(weights, axis=1)
    drawn = [np.searchsorted(end, u * end[-1], side="right") for end, u in zip(ends, chance, strict=True)]
    return np.asarray(np.minimum(np.stack(drawn), weights.shape[1] - 1), dtype=np.int16)


def _all_different(
    drawn: NDArray[np.int16], double: NDArray[np.bool_], top_k: int, num_experts: int, rng: np.random.Generator
) -> NDArray[np.int16]:
    """The distinct ones of `drawn` [rows, tries] in order, filled up with experts not drawn, at random."""
    score = rng.random((len(drawn), num_experts)) - 2.0
    rows = np.broadcast_to(np.arange(len(drawn))[:, None], drawn.shape)
    place = np.broadcast_to(-np.arange(drawn.shape[1], dtype=float), drawn.shape) + drawn.shape[1]
    score[rows[~double], drawn[~double]] = place[~double]
    return np.asarray(np.argsort(-score, axis=1)[:, :top_k], dtype=np.int16)


def union(ids: Ints | NDArray[np.int16], num_experts: int) -> NDArray[np.bool_]:
    """Which experts a decode step over all sequences needs: [layers, tokens, experts] from ids [l, s, t, k]."""
    layers, sequences, tokens, top_k = ids.shape
    active = np.zeros((layers, tokens, num_experts), dtype=bool)
    flat = np.moveaxis(ids, 1, 2).reshape(layers, tokens, sequences * top_k)
    np.put_along_axis(active, flat.astype(np.int64), True, axis=2)
    return active
