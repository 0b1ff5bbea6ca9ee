"""Simulated time that a process may move on its own while nothing else can happen."""

from __future__ import annotations

from heapq import heappop, heappush

import simpy
from simpy.events import NORMAL, EventPriority


class Clock(simpy.Environment):
    """A SimPy environment for processes that do many small things one after the other.

    An event costs several times what a short piece of arithmetic does. Up to the next scheduled event no other process
    runs, so whoever runs now may take what lies before it at once (`advance`). Who has taken more than that, because
    nobody was expected, may be called back sooner (`hasten`). Order and times of all events stay what they are.
    """

    def advance(self, now_s: float) -> None:
        """Let time pass until `now_s` [s], which lies before the next event (`peek`)."""
        self._now = now_s

    def at(self, time_s: float, place: int = 0) -> simpy.Event:
        """An event at `time_s` [s] to the last bit; a timeout would come a rounded difference later.

        Of events of the same time those of lesser `place` come first, whenever they were made; others have place 0.
        """
        event = simpy.Event(self)
        event._ok, event._value = True, None
        heappush(self._queue, (time_s, EventPriority(NORMAL + place), next(self._eid), event))
        return event

    def hasten(self, event: simpy.Event, time_s: float, place: int = 0) -> None:
        """Let an event made by `at` happen at `time_s` [s], sooner than it was to."""
        heappush(self._queue, (time_s, EventPriority(NORMAL + place), next(self._eid), event))

    def step(self) -> None:
        """Process the next event, and nothing where a hastened one was to be."""
        queue = self._queue
        while queue and queue[0][3].callbacks is None:
            heappop(queue)
        super().step()
