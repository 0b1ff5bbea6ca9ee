"""Stretches of a simulation in which the batch of a group does not change.

Until a request comes or one is done, every step is a decode of the same requests, whose contexts grow by one token
each. Such steps need no scheduler: their times follow one after the other, and what they did to the ranks is applied
when the stretch ends or somebody looks. The records are those of planning every step, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

Batch = tuple[int, Iterable[int]]
"""What one rank decodes in a stretch: how many sequences, and their context tokens in step after step."""


class Stretch:
    """Steps of a stretch so far: number within the run, start [s], duration [s] and draw of the router."""

    __slots__ = ("draw", "number", "start_s", "step_s")

    def __init__(self) -> None:
        self.number: list[int] = []
        self.start_s: list[float] = []
        self.step_s: list[float] = []
        self.draw: list[int] = []


@runtime_checkable
class CoastingTimer(Protocol):
    """A step timer that knows beforehand that the batches of a group will stay."""

    draw: int

    def coast(self, batches: Sequence[Batch]) -> Iterator[float] | None:
        """Seconds of one step of `batches`, those of the ranks of a group, after the other, until contexts end.

        Each is asked for when the step begins, and equal to a call of `step_s`. None where that must be called.
        """
        ...
