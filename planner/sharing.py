"""A run whose requests share prefixes or are turns of conversations: what it sends, where to, and what was found."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from planner.prefixcache import Prefix
from planner.scheduler import Rank
from planner.workload import RequestArrays, SharingArrays


class Sharing:
    """State of one run of `num_requests` requests of `sent`.

    Requests are numbered as they are sent. Their rows in `sent` are the same, except that turns of conversations are
    sent when the turn before was answered.
    """

    def __init__(self, sent: RequestArrays, num_requests: int) -> None:
        assert sent.sharing is not None
        self._arrays: SharingArrays = sent.sharing
        columns = (sent.sharing.group, sent.sharing.shared_tokens, sent.sharing.conversation)
        self._shared = list(zip(*(column.tolist() for column in columns), strict=True))
        self._think_s: list[float] = [] if sent.sharing.think_s is None else sent.sharing.think_s.tolist()
        self._first = [row for row, think_s in enumerate(self._think_s) if think_s != think_s]
        if not self._think_s:
            self._first = list(range(num_requests))
        self.starts_s: list[float] = sent.arrival_s[self._first].tolist()
        """When requests, or conversations, begin in an open loop [s]."""
        self._next = 0
        self._rows = array("q")
        self._flying: dict[int, Prefix] = {}
        """What unanswered requests share; of answered ones only the cached tokens stay, which keeps memory flat."""
        self._cached = array("q")

    def send(self, row: int | None) -> tuple[int, Prefix]:
        """Count a request: the turn in `row`, or the next one that follows none; its row and what it shares."""
        if row is None:
            row = self._first[self._next]
            self._next += 1
        prefix = self._flying[len(self._rows)] = Prefix(*self._shared[row])
        self._rows.append(row)
        self._cached.append(0)
        return row, prefix

    def goes_on(self, index: int, env: simpy.Environment, turn: Callable[[int], None]) -> bool:
        """Whether request `index`, now answered, is followed by another turn.

        If so, calls `turn` with its row after the think time.
        """
        self._cached[index] = self._flying.pop(index).cached_tokens
        row = self._rows[index] + 1
        if row >= len(self._think_s) or self._think_s[row] != self._think_s[row]:
            return False
        env.timeout(self._think_s[row]).callbacks.append(lambda _: turn(row))
        return True

    @property
    def rows(self) -> NDArray[np.int64]:
        """Row of each request that was sent."""
        return np.array(self._rows, dtype=np.int64)

    def request_columns(self) -> dict[str, Any]:
        """Columns of the request table that only runs with sharing have."""
        cached = np.array(self._cached, dtype=np.int64)
        for index, prefix in self._flying.items():
            cached[index] = prefix.cached_tokens
        return {
            "prefix_group": self._arrays.group[self.rows],
            "conversation": self._arrays.conversation[self.rows],
            "cached_tokens": cached,
        }


def found_tokens(ranks: Sequence[Rank]) -> int:
    """Prompt tokens that the requests admitted since the last call found in the caches of `ranks`."""
    found = 0
    for rank in ranks:
        if rank.cache is not None:
            found += rank.cache.found_tokens
            rank.cache.found_tokens = 0
    return found
