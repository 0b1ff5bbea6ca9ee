"""Simulated time that a process may move on its own while nothing else can happen."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

import simpy
from simpy.events import NORMAL


class Tick(simpy.Event):
    """An event that puts itself off: each time it is due, `again` says when it is due next, or None to happen now."""

    def __init__(self, clock: Clock, again: Callable[[float], float | None]) -> None:
        super().__init__(clock)
        self.again: Callable[[float], float | None] | None = again
        self._ok, self._value = True, None


class Clock(simpy.Environment):
    """A SimPy environment for processes that do many small things one after the other.

    An event costs several times what a short piece of arithmetic does. Up to the next scheduled event no other process
    runs, so whoever runs now may take what lies before it at once (`advance`); and a process whose next steps are known
    need not be resumed for each (`Tick`). Order and times of all events stay what they are.
    """

    def advance(self, now_s: float) -> None:
        """Let time pass until `now_s` [s], which lies before the next event (`peek`)."""
        self._now = now_s

    def at(self, time_s: float, event: simpy.Event | None = None) -> simpy.Event:
        """An event at `time_s` [s] to the last bit; a timeout would come a rounded difference later."""
        if event is None:
            event = simpy.Event(self)
            event._ok, event._value = True, None
        heappush(self._queue, (time_s, NORMAL, next(self._eid), event))
        return event

    def step(self) -> None:
        """Process the next event."""
        queue = self._queue
        if queue and queue[0][3].__class__ is Tick:
            self._now, priority, number, tick = heappop(queue)
            assert isinstance(tick, Tick)
            due_s = tick.again(self._now) if tick.again is not None else None
            if due_s is not None:
                heappush(queue, (due_s, NORMAL, next(self._eid), tick))
                return
            tick.again = None
            heappush(queue, (self._now, priority, number, tick))
        super().step()
