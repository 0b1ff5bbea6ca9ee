"""Simulated time that a process may move on its own while nothing else can happen."""

from __future__ import annotations

from heapq import heappush

import simpy
from simpy.events import NORMAL


class Clock(simpy.Environment):
    """A SimPy environment in which a process need not wait for an event to let time pass.

    An event costs several times what a short piece of arithmetic does. Up to the next scheduled event no other process
    runs, so whoever runs now may take what lies before it at once: order and times of all events stay what they are.
    """

    def advance(self, now_s: float) -> None:
        """Let time pass until `now_s` [s], which lies before the next event (`peek`)."""
        self._now = now_s

    def at(self, time_s: float) -> simpy.Event:
        """An event at `time_s` [s] to the last bit; a timeout would come a rounded difference later."""
        event = simpy.Event(self)
        event._ok, event._value = True, None
        heappush(self._queue, (time_s, NORMAL, next(self._eid), event))
        return event
