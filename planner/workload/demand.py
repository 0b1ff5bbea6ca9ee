"""A workload: how long requests are, when they come, how many of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.errors import WorkloadError
from planner.workload.arrivals import Arrivals
from planner.workload.lengths import Lengths


@dataclass(frozen=True, slots=True, eq=False)
class RequestArrays:
    """Requests in order of arrival: `arrival_s` [s], `prompt_tokens`, `output_tokens`, each `[num_requests]`."""

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]


MAX_REQUESTS = 5_000_000


@dataclass(frozen=True, slots=True)
class Workload:
    """What users send: prompt and output lengths, arrivals, and how many requests one simulation sends.

    Output lengths are the tokens really generated, as in a benchmark that ignores the end-of-sequence token.
    """

    name: str
    prompt: Lengths
    output: Lengths
    arrivals: Arrivals
    num_requests: int

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

    def with_num_requests(self, num_requests: int) -> Workload:
        """The same mix with another number of requests."""
        return replace(self, num_requests=num_requests)

    @property
    def mean_prompt_tokens(self) -> float:
        """Mean prompt length [tokens]."""
        return self.prompt.mean

    @property
    def mean_output_tokens(self) -> float:
        """Mean output length [tokens]."""
        return self.output.mean

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that can occur [tokens]."""
        return self.prompt.maximum

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
        streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3)]
        return RequestArrays(
            arrival_s=self.arrivals.times(streams[0], self.num_requests),
            prompt_tokens=self.prompt.sample(streams[1], self.num_requests),
            output_tokens=self.output.sample(streams[2], self.num_requests),
        )

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.prompt} tokens in, {self.output} out, {self.arrivals}, {self.num_requests:,} requests"
        )
