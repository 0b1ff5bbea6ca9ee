"""What times the steps of a simulation, and stretches in which the batch of a group does not change.

Until a request comes or one is done, every step is a decode of the same requests, whose contexts grow by one token
each. Such steps need no scheduler: their times are worked out together, and what they do to the ranks is applied once.
The records are those of planning every step, to the last bit.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol, runtime_checkable

import numpy as np
import simpy
from numpy.typing import NDArray

from planner.scheduler import RankWork

Batch = tuple[int, Sequence[int]]
"""What one rank decodes in a stretch: how many sequences, and their context tokens in step after step."""
Floats = list[float] | NDArray[np.float64]
Draws = list[int] | NDArray[np.int64]
FEW = 12
"""Seconds and draws of fewer steps are lists, of more arrays: numpy is slower for few."""
MOST_STEPS = 512
"""Longest stretch taken at once; a longer one is several."""


class StepTimer(Protocol):
    """The cost model, as the simulation sees it.

    `draw` numbers the cached draw of the router that the last step used, 0 where there is none; `link_s` is how long
    the last step's fetches of experts keep the host link busy [s].
    """

    draw: int
    link_s: float

    def step_s(self, ranks: Sequence[RankWork]) -> float:
        """Seconds of one lockstep step in which each rank of a group does its work; called once per step.

        The entries of `ranks` are reused by the next step.
        """
        ...


@runtime_checkable
class CoastingTimer(StepTimer, Protocol):
    """A step timer that knows beforehand what steps take while the batches of a group stay."""

    def coming(self, batches: Sequence[Batch], steps: int) -> tuple[Floats, Draws] | None:
        """Seconds and draws that calls of `step_s` would give for the next `steps` steps of `batches`, those of ranks.

        At most `MOST_STEPS`; nothing counts as taken yet. None where every step must be asked for.
        """
        ...

    def take(self, steps: int) -> None:
        """Count `steps` steps as taken."""
        ...

    def of_group(self, group: int) -> CoastingTimer:
        """The timer of a group of a run, whose draws are its own."""
        ...


class Stretch:
    """Coming steps of `batches` by `timer`, the first from `now_s` [s] on: `step_s`, `draws` and, one more, `bounds_s`.

    Step i takes `step_s[i]` from `bounds_s[i]` to `bounds_s[i + 1]`. `ends` is the event at which the last is over.
    """

    __slots__ = ("batches", "bounds_s", "draws", "ends", "step_s", "timer")

    def __init__(
        self, timer: CoastingTimer, now_s: float, batches: Sequence[Batch], step_s: Floats, draws: Draws
    ) -> None:
        self.timer, self.batches, self.step_s, self.draws = timer, batches, step_s, draws
        self.ends: simpy.Event | None = None
        self.bounds_s: Floats
        if isinstance(step_s, list):
            self.bounds_s = list(accumulate(step_s, initial=now_s))
            return
        self.bounds_s = np.empty(len(step_s) + 1)
        self.bounds_s[0] = now_s
        self.bounds_s[1:] = step_s
        np.add.accumulate(self.bounds_s, out=self.bounds_s)

    def begun(self, time_s: float, is_included: bool = False) -> int:
        """How many of the steps begin before `time_s` [s], or at it too if it `is_included`; the first always does."""
        bisect = bisect_right if is_included else bisect_left
        return min(max(1, bisect(self.bounds_s, time_s)), len(self.step_s))
