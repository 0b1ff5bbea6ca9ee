"""Routing to the rank that has a prefix in its cache."""

from __future__ import annotations

import numpy as np

from planner.prefixcache import Prefix

_MOST_REQUESTS_APART = 64
_MOST_RATIO = 1.5
"""A rank counts as overloaded when it has so many more requests than the least loaded one, and so many times its
number: the defaults `balance_abs_threshold` and `balance_rel_threshold` of the cache-aware policy of SGLang's model
gateway (sgl-model-gateway, router_args.py)."""
_MOST_KEYS = 1 << 20
_CLOSED = 1 << 40
"""Requests of a rank that gets none: more than of any other."""


class PrefixAffinity:
    """Sends a request where its conversation, else its group, was served before, unless that rank is overloaded.

    Of several ranks that served a group the least loaded is taken. Requests that share nothing, are the first of their
    kind, or find their ranks overloaded go to a rank with the fewest requests, which from then on is one of theirs.
    Nothing is known of evictions; what was not asked for longest is forgotten beyond a million names.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._ranks: dict[tuple[str, int], list[int]] = {}
        self._last = -1

    def __call__(self, in_flight: list[int]) -> int:
        """A rank with the fewest requests, ties in turn."""
        fewest = min(in_flight)
        try:
            self._last = in_flight.index(fewest, self._last + 1)
        except ValueError:
            self._last = in_flight.index(fewest)
        return self._last

    def route(self, prefix: Prefix | None, in_flight: list[int], places: list[int] | None = None) -> int:
        """Rank for a request that shares `prefix`; one of `places` where given."""
        if places is not None:
            open_ranks = set(places)
            in_flight = [load if rank in open_ranks else _CLOSED for rank, load in enumerate(in_flight)]
        names = [] if prefix is None else [key for key, _, _ in reversed(prefix.segments)]
        known = next((self._ranks[name] for name in names if name in self._ranks), None)
        chosen = min(known, key=in_flight.__getitem__) if known else self(in_flight)
        fewest = min(in_flight)
        excess = in_flight[chosen] - fewest
        if excess > _MOST_REQUESTS_APART and in_flight[chosen] > _MOST_RATIO * fewest:
            chosen = self(in_flight)
        for name in names:
            served = self._ranks.pop(name, [])
            if chosen not in served:
                # The blocks of a conversation grow where it is served last; those of a group stay the same everywhere.
                served = [chosen] if name[0] == "conversation" else [*served, chosen]
            self._ranks[name] = served
        while len(self._ranks) > _MOST_KEYS:
            del self._ranks[next(iter(self._ranks))]
        return chosen
