"""What the host adds to a step: launching kernels one by one, or replaying a captured graph."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from microbench.cases import Case
from microbench.device import Device
from microbench.errors import Unsupported, WrongResult
from microbench.timing import capture
from microbench.work import Work

_LAUNCHES = 500
_VALUES_PER_TOKEN = 64
"""Small enough that the kernels are shorter than their launches."""


def host(case: Case, device: Device) -> Work:
    """`eager_step` and `graph_replay`: wall time of a step of `kernels` small dependent kernels, until the device is
    idle. `kernel_launch`: host time per launch while the queue is not full.
    """
    kernels, kind = case.number("kernels"), case.text("kind")
    values = device.random(case.number("tokens"), _VALUES_PER_TOKEN, dtype=torch.float32)
    before = values.clone()

    def step() -> None:
        for _ in range(kernels):
            values.add_(1.0)

    step()
    device.synchronise()
    if not torch.allclose(values, before + kernels, rtol=1e-3, atol=1e-2):
        raise WrongResult("a step of additions does not add up")
    if kind == "eager_step":
        return Work(step, "torch eager", on_host=True)
    if not device.is_cuda:
        raise Unsupported(f"{kind} needs a GPU")
    if kind == "graph_replay":
        replay = capture(step)
        if replay is None:
            raise Unsupported("the step cannot be captured in a graph")
        return Work(replay, "torch CUDA graph", on_host=True)
    return Work(step, "torch eager", stopwatch=_launch_stopwatch(step, device))


def _launch_stopwatch(step: Callable[[], None], device: Device) -> Callable[[], float]:
    """Host time of one launch, averaged over a queue of launches that the host does not wait for."""

    def once() -> float:
        device.synchronise()
        start = time.perf_counter()
        for _ in range(_LAUNCHES):
            step()
        spent = time.perf_counter() - start
        device.synchronise()
        return spent / _LAUNCHES

    return once
