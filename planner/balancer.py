"""Spreads requests: an outside balancer over replicas, the engine's own router over the ranks of one.

vLLM's internal balancer chooses by statistics that are up to 100 ms old, in as many front-end processes as there are
ranks, none of which sees the requests of the others in between. They herd: all send to the rank that looked empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from planner.affinity import PrefixAffinity
from planner.enginespec import EngineSpec
from planner.errors import InputError, nearest
from planner.routers import ROUTERS, Router
from planner.scheduler import Rank, Request

STATISTICS_S = 0.1
"""Least time between two statistics of a rank (min_stats_update_interval_ms of vllm/v1/engine/coordinator.py)."""
RANK_ROUTERS = (*ROUTERS, "vllm_score")
"""What an engine profile may name as `rank_router`."""
_WAITING_WEIGHT, _FREE_USAGE = 6.0, 0.5


@dataclass(slots=True)
class _Statistics:
    """Ranks at `taken_s`: waiting and running requests together, waiting ones, and the share of the KV in use."""

    taken_s: float
    loads: list[int]
    waiting: list[int]
    usage: list[float]

    @classmethod
    def of(cls, ranks: Sequence[Rank], now_s: float) -> _Statistics:
        waiting = [len(rank.waiting) for rank in ranks]
        loads = [len(rank.running) + count for rank, count in zip(ranks, waiting, strict=True)]
        return cls(now_s, loads, waiting, [1.0 - rank.free_blocks / rank.total_blocks for rank in ranks])

    def copy(self) -> _Statistics:
        return _Statistics(self.taken_s, self.loads.copy(), self.waiting.copy(), self.usage)


class VllmScore:
    """vLLM's data-parallel balancer (v1/engine/core_client.py, DPLBAsyncMPClient; handbook serving 2.5).

    A front end sends to the rank of least score max(num_clients x its own in flight, waiting + running)
    + waiting x 6 x max(0, KV usage - 0.5). Ties go to the first rank after a start that moves with every request. By
    default there is one front end per rank (api_server_count), and requests come to them at random. Statistics are
    taken anew by the first request that finds them `statistics_s` old.
    """

    def __init__(
        self,
        ranks: Sequence[Rank],
        rng: np.random.Generator,
        num_clients: int | None = None,
        statistics_s: float = STATISTICS_S,
    ) -> None:
        self._ranks, self._statistics_s = ranks, statistics_s
        count, clients = len(ranks), num_clients or len(ranks)
        self._clients = clients
        self._draws = _client_draws(rng, clients)
        self._start = [count * client // clients for client in range(clients)]
        self._in_flight = [[0] * count for _ in range(clients)]
        self._seen: list[_Statistics | None] = [None] * clients
        """What each front end knows: the newest statistics and what it sent since."""
        self._newest: _Statistics | None = None
        self._sent_by: dict[int, tuple[int, int]] = {}

    def choose(self, request: int, now_s: float, places: Sequence[int] | None = None) -> int:
        """Rank for request number `request`, which comes at `now_s`; one of `places` where given."""
        newest = self._newest
        if newest is None or now_s - newest.taken_s >= self._statistics_s:
            newest = self._newest = _Statistics.of(self._ranks, now_s)
        client = next(self._draws)
        seen = self._seen[client]
        if seen is None or seen.taken_s != newest.taken_s:
            seen = self._seen[client] = newest.copy()
        own = self._in_flight[client]
        chosen = self._best(seen, own, self._start[client], places)
        seen.loads[chosen] += self._clients
        seen.waiting[chosen] += self._clients
        own[chosen] += 1
        self._start[client] = (self._start[client] + 1) % len(self._ranks)
        self._sent_by[request] = (client, chosen)
        return chosen

    def finished(self, request: int) -> None:
        """Request number `request` is answered."""
        client, rank = self._sent_by.pop(request)
        self._in_flight[client][rank] -= 1

    def _best(self, seen: _Statistics, own: list[int], start: int, places: Sequence[int] | None) -> int:
        best, least = 0, math.inf
        loads, waiting, usage, clients = seen.loads, seen.waiting, seen.usage, self._clients
        count = len(loads)
        for place in range(start, start + count):
            rank = place % count
            if places is not None and rank not in places:
                continue
            score: float = max(clients * own[rank], loads[rank])
            if waiting[rank] and usage[rank] > _FREE_USAGE:
                score += waiting[rank] * _WAITING_WEIGHT * (usage[rank] - _FREE_USAGE)
            if score < least:
                best, least = rank, score
        return best


def _client_draws(rng: np.random.Generator, clients: int) -> Iterator[int]:
    """Front ends of the next requests, drawn many at a time."""
    while True:
        yield from rng.integers(clients, size=1024).tolist()


class Balancer:
    """Chooses the rank of every request.

    `router` chooses among all ranks, or, if the deployment has a router of its own, among groups. While `open` is not
    None, only the ranks in it get requests. A router that follows prefixes chooses among all ranks in any case.
    """

    def __init__(self, spec: EngineSpec, router: str, groups: Sequence[Sequence[Rank]], seed: int) -> None:
        if spec.rank_router and spec.rank_router not in RANK_ROUTERS:
            raise InputError(f"unknown rank_router {spec.rank_router!r} ({nearest(spec.rank_router, RANK_ROUTERS)})")
        self.open: list[int] | None = None
        self._per_group = spec.ranks_per_group
        self._outer = ROUTERS[router](np.random.default_rng([seed, 1]))
        self._scores: list[VllmScore] = []
        self._inner: list[Router] = []
        if isinstance(self._outer, PrefixAffinity):
            return
        if spec.rank_router == "vllm_score":
            self._scores = [VllmScore(ranks, np.random.default_rng([seed, 2, i])) for i, ranks in enumerate(groups)]
        elif spec.rank_router:
            self._inner = [
                ROUTERS[spec.rank_router](np.random.default_rng([seed, 2, i])) for i in range(spec.num_groups)
            ]

    @property
    def looks_at_ranks(self) -> bool:
        """Whether a choice may depend on what the ranks hold."""
        return bool(self._scores)

    def choose(self, in_flight: list[int], request: Request, now_s: float) -> int:
        """Rank, counted over all groups, for `request` at `now_s`; `in_flight` by rank."""
        if len(in_flight) == 1:
            return 0
        if isinstance(self._outer, PrefixAffinity):
            return self._outer.route(request.prefix, in_flight, self.open)
        if not self._scores and not self._inner:
            return _pick(self._outer, in_flight, self.open)
        size = self._per_group
        loads = [sum(in_flight[first : first + size]) for first in range(0, len(in_flight), size)]
        groups = places = None
        if self.open is not None:
            groups = sorted({rank // size for rank in self.open})
        group = _pick(self._outer, loads, groups)
        first = group * size
        if self.open is not None:
            places = [rank - first for rank in self.open if first <= rank < first + size]
        if self._scores:
            return first + self._scores[group].choose(request.index, now_s, places)
        return first + _pick(self._inner[group], in_flight[first : first + size], places)

    def finished(self, request: int, rank: int) -> None:
        """Request number `request` has left `rank`."""
        if self._scores:
            self._scores[rank // self._per_group].finished(request)


def _pick(router: Router, in_flight: list[int], places: list[int] | None) -> int:
    """The choice of `router`, among `places` if there are any."""
    return router(in_flight) if places is None else places[router([in_flight[place] for place in places])]
