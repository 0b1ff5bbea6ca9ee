"""Two families of times of an operation that several processes do together (handbook serving 6.9).

fresh    the processes meet, then do the operation once; per repeat the slowest process counts. What an isolated call
         costs.
chained  the operation again and again without meeting, one pair of outer events around many; per trial the median
         process counts. The period that a loop of layers pays.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from microbench.device import Device, Stopwatch
from microbench.ranks import Team

_DROPPED, _CHAIN, _SHORTEST_CHAIN = 16, 112, 4
"""Of 128 repeats the first 16 are dropped; slow operations get fewer, so that a trial stays within its budget."""


@dataclass(slots=True)
class GroupSampler:
    """Sampler of one family. `slowest` and `fastest` collect the extremes over processes of every repeat [s]."""

    run: Callable[[], object]
    device: Device
    team: Team
    family: str
    budget_s: float
    slowest: list[float] = field(default_factory=list)
    fastest: list[float] = field(default_factory=list)
    _chain: int = 0

    def __call__(self, count: int) -> list[float]:
        """`count` repeats (fresh) or trials (chained)."""
        if self.family == "chained":
            self._chain = self._chain or self._chain_length()
            mine = [self._period() for _ in range(count)]
        else:
            mine = self._entries(count)
        times = np.array(self.team.gather(mine))
        self.slowest += times.max(axis=0).tolist()
        self.fastest += times.min(axis=0).tolist()
        merged = np.median(times, axis=0) if self.family == "chained" else times.max(axis=0)
        return [float(value) for value in merged]

    def _entries(self, count: int) -> list[float]:
        if not self.device.is_cuda:
            return [self._host_timed(1) for _ in range(count)]
        token = torch.zeros(1, device=self.device.torch_device)
        stopwatches = [Stopwatch.new() for _ in range(count)]
        self.team.barrier()
        for stopwatch in stopwatches:
            self.device.flush()
            dist.all_reduce(token, group=self.team.data)
            stopwatch.begin.record()
            self.run()
            stopwatch.end.record()
        self.device.synchronise()
        return [stopwatch.seconds for stopwatch in stopwatches]

    def _chain_length(self) -> int:
        seconds = self.team.share(self._host_timed(1))
        return int(np.clip(self.budget_s / 8 / max(seconds, 1e-9), _SHORTEST_CHAIN, _CHAIN))

    def _period(self) -> float:
        dropped = min(_DROPPED, self._chain)
        if not self.device.is_cuda:
            for _ in range(dropped):
                self.run()
            return self._host_timed(self._chain, meet=False) / self._chain
        stopwatch = Stopwatch.new()
        self.team.barrier()
        for _ in range(dropped):
            self.run()
        stopwatch.begin.record()
        for _ in range(self._chain):
            self.run()
        stopwatch.end.record()
        self.device.synchronise()
        return stopwatch.seconds / self._chain

    def _host_timed(self, count: int, meet: bool = True) -> float:
        self.device.synchronise()
        if meet:
            self.team.barrier()
        start = time.perf_counter()
        for _ in range(count):
            self.run()
        self.device.synchronise()
        return time.perf_counter() - start
