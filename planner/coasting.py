"""Stretches of a simulation in which the batch does not change: many decode steps taken at once.

Between two events nothing arrives, and between two finishes every step is a decode of the same requests whose
contexts grow by one token each. Their times still differ, because attention grows and the router draws anew, so they
are added one after the other as stepping would: the records are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

Batch = tuple[int, Iterable[int]]
"""What one rank decodes in a stretch: how many sequences, and their context tokens in step after step."""


class Coast(NamedTuple):
    """Steps of a stretch: when each starts, how long it takes [s], and its draw of the router."""

    start_s: list[float]
    step_s: list[float]
    draw: list[int]


@runtime_checkable
class CoastingTimer(Protocol):
    """A step timer that can time a stretch at once."""

    def coast(self, batches: Sequence[Batch], most: int, start_s: float, until_s: float) -> Coast | None:
        """Up to `most` steps from `start_s` on, all but the last of which end before `until_s`.

        `batches` are those of the ranks of a group. Equal to as many calls of `step_s`. Returns None where it must be
        asked step by step.
        """
        ...


def walk(step_s: Iterable[float], draw: list[int], start_s: float, until_s: float) -> Coast:
    """The steps of `step_s` from `start_s` on until one ends at `until_s` or later; `draw` are theirs."""
    starts: list[float] = []
    taken: list[float] = []
    now_s = start_s
    for seconds in step_s:
        starts.append(now_s)
        taken.append(seconds)
        now_s += seconds
        if not now_s < until_s:
            break
    return Coast(starts, taken, draw[: len(taken)])
