"""A workload: how long requests are, when they come, how many of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from planner.errors import WorkloadError
from planner.workload.arrivals import Arrivals
from planner.workload.lengths import Lengths
from planner.workload.sharing import Dialogues, RecordedSharing, SharedPrefix, SharingArrays, Turns, draw_dialogues


@dataclass(frozen=True, slots=True, eq=False)
class RequestArrays:
    """Requests in order of arrival: `arrival_s` [s], `prompt_tokens`, `output_tokens`, each `[num_requests]`.

    `sharing` is None when no request shares anything. Conversations come one after the other and are more than a run
    sends; `arrival_s` of their later turns is NaN.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    sharing: SharingArrays | None = None


MAX_REQUESTS = 5_000_000
MIN_REQUESTS = 1000
"""Requests below which a p95 means little."""
_SAMPLED_CONVERSATIONS = 4096
"""Conversations over which the lengths of turns are averaged."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What users send: prompt and output lengths, arrivals, and how many requests one simulation sends.

    Output lengths are the tokens really generated, as in a benchmark that ignores the end-of-sequence token. `prompt`
    draws what is new in a prompt; the shared `prefix` and, with `turns`, the history come before it. A rate counts
    requests: conversations start at the rate over their mean number of turns. `recorded` is the sharing of a trace.
    """

    name: str
    prompt: Lengths
    output: Lengths
    arrivals: Arrivals
    num_requests: int
    prefix: SharedPrefix | None = None
    turns: Turns | None = None
    recorded: RecordedSharing | None = None

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise WorkloadError(f"{self.name}: {self.num_requests} requests: at least 1 is needed. Use 1000 or more.")
        if max(self.num_requests, self.arrivals.concurrency) > MAX_REQUESTS:
            raise WorkloadError(
                f"{self.name}: {self.num_requests:,} requests, {self.arrivals.concurrency:,} users: a simulation takes "
                f"at most {MAX_REQUESTS:,} of each. A shorter run gives the same percentiles."
            )

    def with_rate(self, rate_per_s: float) -> Workload:
        """The same requests at `rate_per_s` requests per second."""
        return replace(self, arrivals=self.arrivals.with_rate(rate_per_s))

    def with_concurrency(self, concurrency: int) -> Workload:
        """The same requests from `concurrency` users in a closed loop."""
        return replace(self, arrivals=Arrivals.closed(concurrency))

    def with_lengths(self, prompt: float = 1.0, output: float = 1.0) -> Workload:
        """The same traffic with prompts (what is new in them) and outputs times a factor each."""
        return replace(self, prompt=self.prompt.scaled(prompt), output=self.output.scaled(output))

    def with_num_requests(self, num_requests: int) -> Workload:
        """The same mix with another number of requests."""
        return replace(self, num_requests=num_requests)

    @property
    def shares(self) -> bool:
        """Whether prompts have anything in common that a prefix cache could find."""
        return self.prefix is not None or self.turns is not None or self.recorded is not None

    @property
    def mean_turns(self) -> float:
        """Mean number of turns of a conversation; 1 without conversations."""
        if self.turns is None:
            return 1.0
        sample = _sampled_dialogues(self)
        return len(sample.prompt_tokens) / len(sample.first)

    @property
    def conversation_think_s(self) -> float:
        """Mean think time between the first and the last turn of a conversation [s]."""
        return 0.0 if self.turns is None else (self.mean_turns - 1) * self.turns.think_s

    @property
    def mean_prompt_tokens(self) -> float:
        """Mean prompt length [tokens]."""
        if self.turns is not None:
            return float(_sampled_dialogues(self).prompt_tokens.mean())
        return self.prompt.mean + (self.prefix.tokens.mean if self.prefix else 0.0)

    @property
    def mean_output_tokens(self) -> float:
        """Mean output length [tokens]."""
        return self.output.mean

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that can occur [tokens]; with conversations the longest of a large sample."""
        if self.turns is not None:
            return int(_sampled_dialogues(self).prompt_tokens.max())
        return self.prompt.maximum + (self.prefix.tokens.maximum if self.prefix else 0)

    @property
    def max_output_tokens(self) -> int:
        """Longest output that can occur [tokens]."""
        return self.output.maximum

    def requests(self, seed: int) -> RequestArrays:
        """All requests of one run; arrivals, prompts and outputs have random streams of their own.

        Changing the rate therefore leaves the lengths as they are, and the other way round. Raises WorkloadError on
        a negative seed.
        """
        if seed < 0:
            raise WorkloadError(f"seed {seed} is negative. Use 0 or more.")
        streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(6)]
        if self.turns is not None:
            return self._conversations(streams)
        prompt_tokens = self.prompt.sample(streams[1], self.num_requests)
        sharing = None if self.recorded is None else self.recorded.arrays(self.num_requests)
        if self.prefix is not None:
            group, shared = self.prefix.draw(streams[3], self.num_requests)
            prompt_tokens += shared
            sharing = SharingArrays(group, shared, np.full(self.num_requests, -1))
        return RequestArrays(
            arrival_s=self.arrivals.times(streams[0], self.num_requests),
            prompt_tokens=prompt_tokens,
            output_tokens=self.output.sample(streams[2], self.num_requests),
            sharing=sharing,
        )

    def _conversations(self, streams: list[np.random.Generator]) -> RequestArrays:
        """As many conversations as requests: enough even if no second turn comes within the run."""
        drawn = _dialogues(self, self.num_requests, streams)
        starts_s = self.arrivals.times(streams[0], self.num_requests) * self.mean_turns
        arrival_s = np.full(len(drawn.prompt_tokens), np.nan)
        arrival_s[drawn.first] = starts_s
        return RequestArrays(arrival_s, drawn.prompt_tokens, drawn.output_tokens, drawn.sharing)

    def __str__(self) -> str:
        more = "".join(f", {part}" for part in (self.prefix, self.turns) if part is not None)
        tokens = "new tokens" if more else "tokens"
        return (
            f"{self.name}: {self.prompt} {tokens} in, {self.output} out{more}, {self.arrivals}, "
            f"{self.num_requests:,} requests"
        )


def _dialogues(workload: Workload, num: int, streams: list[np.random.Generator]) -> Dialogues:
    assert workload.turns is not None
    return draw_dialogues(workload.turns, workload.prefix, workload.prompt, workload.output, num, streams[1:])


def _sampled_dialogues(workload: Workload) -> Dialogues:
    plain = replace(workload, arrivals=Arrivals.closed(1), num_requests=1, name="")
    return _sample(plain)


@lru_cache(maxsize=8)
def _sample(workload: Workload) -> Dialogues:
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(0).spawn(6)]
    return _dialogues(workload, _SAMPLED_CONVERSATIONS, streams)
