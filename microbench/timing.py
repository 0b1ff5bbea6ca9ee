"""Warm-up, repeated samples, and when to stop. All times in seconds.

A sampler takes a number of repeats and returns one time per repeat. On a GPU every repeat is preceded by a flush of
the L2 cache and timed by a pair of CUDA events on the stream; many repeats are queued before the host waits, so the
flush also hides the launch. Method after handbook serving 6.9 (SemiAnalysis InferenceX CollectiveX methodology).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from microbench.device import Device, Stopwatch, side_stream
from microbench.work import Work

Sampler = Callable[[int], list[float]]

MIN_REPEATS, MAX_REPEATS, _BATCH = 5, 200, 5
NARROW = 0.02
"""Stop when the half width of the 95 % interval of the median is within 2 % of the median."""
_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Timing:
    """Summary of the repeats: median, 90th percentile, and relative half width of the median's 95 % interval."""

    median_s: float
    p90_s: float
    spread: float
    repeats: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """Summary of at least one time."""
        return cls(float(np.median(times)), float(np.percentile(times, 90)), half_width(times), len(times))


def half_width(times: Sequence[float]) -> float:
    """Half width of the distribution-free 95 % interval of the median, relative to the median.

    The interval runs between the order statistics n/2 -+ 0.98 sqrt(n) (normal approximation of the binomial law).

    >>> half_width([1.0] * 20)
    0.0
    """
    ordered = sorted(times)
    reach = 0.98 * math.sqrt(len(ordered))
    low = max(0, math.floor(len(ordered) / 2 - reach))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach) - 1)
    median = float(np.median(ordered))
    return (ordered[high] - ordered[low]) / 2 / median if median > 0 else 0.0


def measure(sample: Sampler, budget_s: float, agree: Callable[[bool], bool] = lambda stop: stop) -> Timing:
    """Sample until the median is known to 2 %, or `budget_s` is used, or 200 repeats; at least 5.

    `agree` makes all processes of a group take the same decision.
    """
    sample(_WARM_UP)
    deadline = time.monotonic() + budget_s
    times: list[float] = []
    while True:
        times += sample(_BATCH)
        narrow = len(times) >= MIN_REPEATS and half_width(times) <= NARROW
        if agree(narrow or len(times) >= MAX_REPEATS or time.monotonic() > deadline):
            return Timing.of(times)


def sampler(work: Work, device: Device) -> tuple[Sampler, str]:
    """Sampler of a local operation, and the library label with how it was launched."""
    if work.stopwatch is not None:
        stopwatch = work.stopwatch
        return (lambda count: [stopwatch() for _ in range(count)]), work.library
    if work.on_host or not device.is_cuda:
        return _host_sampler(work.run, device), work.library
    if not work.is_captured:
        return _event_sampler(work.run, device), work.library
    replay = capture(work.run)
    if replay is None:
        return _event_sampler(work.run, device), f"{work.library} (eager)"
    return _event_sampler(replay, device), f"{work.library} (graph)"


def _host_sampler(run: Callable[[], object], device: Device) -> Sampler:
    def once() -> float:
        device.synchronise()
        start = time.perf_counter()
        run()
        device.synchronise()
        return time.perf_counter() - start

    return lambda count: [once() for _ in range(count)]


def _event_sampler(run: Callable[[], object], device: Device) -> Sampler:
    def sample(count: int) -> list[float]:
        stopwatches = [Stopwatch.new() for _ in range(count)]
        for stopwatch in stopwatches:
            device.flush()
            stopwatch.begin.record()
            run()
            stopwatch.end.record()
        device.synchronise()
        return [stopwatch.seconds for stopwatch in stopwatches]

    return sample


def capture(run: Callable[[], object]) -> Callable[[], None] | None:
    """`run` as a CUDA graph; None where it cannot be captured (it synchronises, or the library refuses)."""
    side = side_stream()
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def fastest(works: Sequence[Work], device: Device) -> Work:
    """The quickest of several ways to do the same, by the median of three repeats each."""
    if len(works) == 1:
        return works[0]
    medians = []
    for work in works:
        sample, _ = sampler(work, device)
        sample(1)
        medians.append(float(np.median(sample(3))))
    return works[int(np.argmin(medians))]
