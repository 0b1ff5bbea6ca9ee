"""Stretches of a simulation in which the batch does not change: many decode steps taken at once.

Between two events nothing arrives, and between two finishes every step is a decode of the same requests whose
contexts grow by one token each. Their times still differ, because attention grows and the router draws anew, so they
are added one after the other as stepping would: the records are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Batch:
    """What one rank decodes in a stretch: `seqs` sequences, and the context tokens of step after step."""

    seqs: int
    context_tokens: Iterable[int]


class Coast(NamedTuple):
    """Steps of a stretch: when each starts, how long it takes [s], its draw of the router; the last ends at `end_s`."""

    start_s: list[float]
    step_s: list[float]
    draw: list[int]
    end_s: float


@runtime_checkable
class CoastingTimer(Protocol):
    """A step timer that can time a stretch at once."""

    def coast(self, batches: Sequence[Batch], most: int, start_s: float, until_s: float) -> Coast | None:
        """Up to `most` steps from `start_s` on that end before `until_s`; `batches` are those of the ranks of a group.

        Equal to as many calls of `step_s`. A timer may stop early, and returns None where it must be asked step by
        step.
        """
        ...


def walk(step_s: Iterable[float], draw: list[int], start_s: float, until_s: float) -> Coast:
    """The steps of `step_s` that end before `until_s`, one after the other from `start_s` on; `draw` are theirs."""
    starts: list[float] = []
    taken: list[float] = []
    now_s = start_s
    for seconds in step_s:
        end_s = now_s + seconds
        if not now_s < end_s < until_s:
            break
        starts.append(now_s)
        taken.append(seconds)
        now_s = end_s
    return Coast(starts, taken, draw[: len(taken)], now_s)
