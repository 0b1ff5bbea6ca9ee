"""Serving engines never drop tokens: there a limit is a dispatch buffer, and this is what happens beyond it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.engine import Engine
from planner.errors import Infeasible, InputError

Beyond = Literal["chunks", "error", "fallback"]


@dataclass(frozen=True, slots=True)
class BufferLimit:
    """Most tokens a rank may dispatch at once in low-latency exchange, and what follows when it has more.

    `beyond`: `chunks` repeats dispatch, experts and combine for each part, `error` stops the server, `fallback`
    changes to all-gather and reduce-scatter for that step. `setting` raises the limit; the buffer grows in proportion
    to it and to the experts (DeepEP: 1.8 GiB for 128 tokens of 7,168 values and 256 experts, 14 GiB for 1,024), so
    that raising it too far ends in out of memory. `ceiling` is the most the setting takes, None if unknown.
    """

    engine: str
    max_tokens: int
    beyond: Beyond
    setting: str
    ceiling: int | None
    source: str

    def passes(self, tokens_per_rank: ArrayLike) -> NDArray[np.int64]:
        """Times dispatch, experts and combine run in a step whose ranks send `tokens_per_rank`, same shape."""
        tokens = np.asarray(tokens_per_rank)
        if self.beyond != "chunks":
            return np.ones(tokens.shape, dtype=np.int64)
        return np.asarray(np.maximum(np.ceil(tokens / self.max_tokens), 1)).astype(np.int64)

    def falls_back(self, tokens_per_rank: ArrayLike) -> NDArray[np.bool_]:
        """Whether such a step uses all-gather and reduce-scatter instead, same shape."""
        return np.asarray((self.beyond == "fallback") & (np.asarray(tokens_per_rank) > self.max_tokens))

    def check(self, tokens_per_rank: int, tokens_per_seq: float = 1) -> None:
        """Raise Infeasible where the engine would stop at a step of `tokens_per_rank`, `tokens_per_seq` a sequence."""
        if self.beyond == "error" and tokens_per_rank > self.max_tokens:
            raise Infeasible(self.explain(tokens_per_rank), self.remedies(tokens_per_rank, tokens_per_seq))

    def explain(self, tokens_per_rank: int) -> str:
        """One sentence on a step of `tokens_per_rank` tokens on the busiest rank."""
        if tokens_per_rank <= self.max_tokens:
            return f"{tokens_per_rank} tokens per rank fit the dispatch buffer of {self.engine} ({self.max_tokens})"
        over = f"{tokens_per_rank} tokens per rank exceed the dispatch buffer of {self.engine} ({self.max_tokens}): "
        return (
            over
            + {
                "chunks": f"the MoE layer runs {-(-tokens_per_rank // self.max_tokens)} times, no token is dropped",
                "error": "DeepEP's assertion stops the server, no token is dropped",
                "fallback": "the step uses all-gather and reduce-scatter instead, no token is dropped",
            }[self.beyond]
        )

    def remedies(self, tokens_per_rank: int, tokens_per_seq: float = 1) -> tuple[str, ...]:
        """What lets `tokens_per_rank` through at once, nearest first."""
        seqs = int(self.max_tokens / tokens_per_seq)
        fewer = f"at most {seqs} sequences per rank (--max-num-seqs {seqs})"
        if self.ceiling is not None and tokens_per_rank > self.ceiling:
            return (fewer, f"more ranks, or normal exchange: {self.setting} goes to {self.ceiling} only")
        return (fewer, f"{self.setting}={tokens_per_rank} on the server, which costs buffer memory in proportion")


def buffer_limit(engine: Engine, max_tokens: int | None = None) -> BufferLimit:
    """Dispatch buffer of `engine`, of `max_tokens` per rank or its default.

    Raises InputError on an engine without such exchange, and on a limit below 1 or beyond the engine's ceiling.
    """
    rule = engine.dispatch_buffer
    if rule is None:
        raise InputError(
            f"{engine.name} has no low-latency exchange. Use an engine with DeepEP, such as vllm or sglang."
        )
    setting, ceiling = rule.setting, rule.ceiling
    tokens = engine.overheads.low_latency_tokens if max_tokens is None else max_tokens
    if tokens < 1 or (ceiling is not None and tokens > ceiling):
        raise InputError(f"{setting}={tokens}: {engine.name} takes 1 to {ceiling or 'as many as memory holds'}")
    return BufferLimit(engine.name, tokens, rule.beyond, setting, ceiling, rule.source)


def most_sequences(engine: Engine) -> int | None:
    """Sequences per rank beyond which `engine` would stop in low-latency exchange, None where it goes on."""
    limit = buffer_limit(engine)
    return limit.max_tokens if limit.beyond == "error" else None
