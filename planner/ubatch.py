"""Steps in several passes over the weights: llama.cpp computes a batch as micro-batches of `n_ubatch` tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from planner.coasting import Batch, Draws, Floats
from planner.scheduler import RankWork
from planner.timer import CostTimer


class UbatchTimer:
    """Times a step of more than `ubatch_tokens` tokens as the sum of its passes by `timer`; for groups of one rank."""

    def __init__(self, timer: CostTimer, ubatch_tokens: int) -> None:
        self._timer, self._ubatch_tokens = timer, ubatch_tokens
        self.loads, self.misses = timer.loads, timer.misses
        self.draw, self.link_s = 0, 0.0

    def use_factors(self, factors: dict[str, np.ndarray] | None) -> None:
        """As `CostTimer.use_factors`."""
        self._timer.use_factors(factors)

    def step_s(self, ranks: Sequence[RankWork]) -> float:
        """Seconds of one step of the only rank, all passes together."""
        seconds = self.link_s = 0.0
        for part in passes(ranks[0], self._ubatch_tokens):
            seconds += self._timer.step_s([part])
            self.link_s += self._timer.link_s
        self.draw = self._timer.draw
        return seconds

    def coming(self, batches: Sequence[Batch], steps: int) -> tuple[Floats, Draws] | None:
        """As `planner.coasting.CoastingTimer`, where the batch is one pass."""
        if any(seqs > self._ubatch_tokens for seqs, _ in batches):
            return None
        return self._timer.coming(batches, steps)

    def take(self, steps: int) -> None:
        """As `planner.coasting.CoastingTimer`."""
        self._timer.take(steps)
        self.draw = self._timer.draw

    def of_group(self, group: int) -> UbatchTimer:
        """As `planner.coasting.CoastingTimer`."""
        return UbatchTimer(self._timer.of_group(group), self._ubatch_tokens)


def passes(work: RankWork, ubatch_tokens: int) -> Iterator[RankWork]:
    """`work` cut into passes of at most `ubatch_tokens` tokens, decodes first; query-key pairs by share of tokens."""
    seqs, prompt = work.decode_seqs, work.prefill_tokens
    if seqs + prompt <= ubatch_tokens:
        yield work
        return
    while seqs or prompt:
        decodes = min(seqs, ubatch_tokens)
        chunk = min(prompt, ubatch_tokens - decodes)
        part = RankWork(decode_seqs=decodes)
        if decodes:
            part.decode_context_tokens = work.decode_context_tokens * decodes // work.decode_seqs
        if chunk:
            share = chunk / work.prefill_tokens
            part.prefill_tokens, part.prefill_pairs = chunk, int(work.prefill_pairs * share)
            part.num_prefills = max(1, round(work.num_prefills * share))
        seqs, prompt = seqs - decodes, prompt - chunk
        yield part
