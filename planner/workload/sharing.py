"""What requests have in common: prefixes of groups, and the history of conversations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.errors import WorkloadError
from planner.workload.lengths import Lengths

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NONE = -1
"""Group or conversation of a request that has none."""
_MAX_GROUPS = 1_000_000
_MAX_TURNS = 1000
_MAX_THINK_S = 86_400.0


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Every request, or every conversation, begins with the prefix of one of `num_groups` groups.

    `tokens` is the distribution of the prefix length, drawn once per group; it comes in front of what
    `Workload.prompt` draws, as in the prefix benchmarks of vLLM (`prefix_repetition`) and SGLang
    (`generated-shared-prefix`). Group k of 1, 2, ... has a popularity proportional to k^-`zipf`: 0 makes all alike.
    """

    num_groups: int
    tokens: Lengths
    zipf: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_groups <= _MAX_GROUPS:
            raise WorkloadError(f"prefix: {self.num_groups} groups: use 1 to {_MAX_GROUPS:,}.")
        if not 0 <= self.zipf <= 10:
            raise WorkloadError(
                f"prefix: zipf {self.zipf:g} must lie in [0, 10]. Use 0 for even groups, 1 for Zipf's law."
            )

    @property
    def popularity(self) -> Floats:
        """Share of the requests by group `[num_groups]`, descending."""
        weights = np.arange(1, self.num_groups + 1, dtype=float) ** -self.zipf
        return np.asarray(weights / weights.sum())

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Ints, Ints]:
        """Group and shared tokens of `count` requests or conversations."""
        lengths = self.tokens.sample(rng, self.num_groups)
        groups = np.searchsorted(np.cumsum(self.popularity), rng.random(count)).clip(max=self.num_groups - 1)
        return groups, lengths[groups]

    def __str__(self) -> str:
        law = f", zipf {self.zipf:g}" if self.zipf else ""
        return f"{self.num_groups:,} shared prefix{'es' * (self.num_groups > 1)} of {self.tokens} tokens{law}"


@dataclass(frozen=True, slots=True)
class Turns:
    """Conversations: each turn sends the whole history, all prompts and answers before it, and new text.

    `count` is the number of turns. The next turn comes a think time after the answer, gamma-distributed with mean
    `think_s` [s] and coefficient of variation `think_cv` (0 fixed, 1 exponential). A conversation ends before the turn
    whose prompt and answer would exceed `max_context_tokens`.
    """

    count: Lengths
    think_s: float
    think_cv: float = 1.0
    max_context_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.count.maximum > _MAX_TURNS:
            raise WorkloadError(f"turns: up to {self.count.maximum:,} turns: use at most {_MAX_TURNS:,}.")
        if not 0 <= self.think_s <= _MAX_THINK_S:
            raise WorkloadError(f"turns: think_s {self.think_s:g} must lie in [0, {_MAX_THINK_S:g}] s.")
        if not 0 <= self.think_cv <= 100:
            raise WorkloadError(f"turns: think_cv {self.think_cv:g} must lie in [0, 100]. Use 1 for exponential times.")
        if self.max_context_tokens is not None and self.max_context_tokens < 2:
            raise WorkloadError(f"turns: max_context_tokens {self.max_context_tokens} leaves no room for a turn.")

    def think(self, rng: np.random.Generator, count: int) -> Floats:
        """Think times [s] of `count` turns."""
        if not self.think_s or not self.think_cv:
            return np.full(count, self.think_s)
        shape = 1.0 / self.think_cv**2
        return np.asarray(rng.gamma(shape, self.think_s / shape, count))

    def __str__(self) -> str:
        return f"conversations of {self.count} turns, {self.think_s:g} s between them"


@dataclass(frozen=True, slots=True)
class RecordedSharing:
    """Sharing of the rows of a trace: group (`NONE` without), shared tokens, conversation (`NONE` without)."""

    groups: tuple[int, ...]
    shared_tokens: tuple[int, ...]
    conversations: tuple[int, ...]

    def arrays(self, num_requests: int) -> SharingArrays:
        """Sharing of `num_requests` rows; a trace that is repeated repeats its groups, not its conversations."""
        copy, row = np.divmod(np.arange(num_requests), len(self.groups))
        conversation = np.asarray(self.conversations, dtype=np.int64)[row]
        apart = np.where(conversation == NONE, NONE, conversation + copy * (max(self.conversations) + 1))
        return SharingArrays(
            np.asarray(self.groups, dtype=np.int64)[row], np.asarray(self.shared_tokens, dtype=np.int64)[row], apart
        )


@dataclass(frozen=True, slots=True, eq=False)
class SharingArrays:
    """What each request shares, `[num_requests]`: group, the tokens of its prefix, conversation; `NONE` without.

    `think_s` [s] is None where every request has its own arrival time. Otherwise rows of a conversation are
    neighbours, and a turn comes `think_s` after the answer to the row before it; NaN marks first turns.
    """

    group: Ints
    shared_tokens: Ints
    conversation: Ints
    think_s: Floats | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Dialogues:
    """Turns of `num` conversations, one after the other: lengths and sharing `[turns]`, and where each one starts."""

    prompt_tokens: Ints
    output_tokens: Ints
    sharing: SharingArrays
    first: Ints


def draw_dialogues(
    turns: Turns,
    prefix: SharedPrefix | None,
    prompt: Lengths,
    output: Lengths,
    num: int,
    streams: Sequence[np.random.Generator],
) -> Dialogues:
    """`num` conversations; `streams` draw new texts, answers, prefixes, counts and think times.

    The prompt of turn k has the prefix, the new texts of turns 1 to k and the answers of turns 1 to k - 1.
    """
    counts = turns.count.sample(streams[3], num)
    total = int(counts.sum())
    conversation = np.repeat(np.arange(num), counts)
    first = np.cumsum(counts) - counts
    texts, answers = prompt.sample(streams[0], total), output.sample(streams[1], total)
    group, shared = (
        (np.full(num, NONE), np.zeros(num, dtype=np.int64)) if prefix is None else prefix.draw(streams[2], num)
    )
    spoken = np.cumsum(texts + answers)
    before = (spoken - texts - answers)[first]
    prompts = shared[conversation] + spoken - answers - before[conversation]
    think_s = turns.think(streams[4], total)
    think_s[first] = math.nan
    kept = np.ones(total, dtype=bool)
    if turns.max_context_tokens is not None:
        kept = prompts + answers <= turns.max_context_tokens
        kept[first] = True
    sharing = SharingArrays(group[conversation][kept], shared[conversation][kept], conversation[kept], think_s[kept])
    return Dialogues(prompts[kept], answers[kept], sharing, np.flatnonzero(np.isnan(think_s[kept])))
