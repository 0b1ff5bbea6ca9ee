"""Ranks that die during a simulation: replicas stop, requests move, replicas come back.

A dead rank hangs the collectives of its whole replica, all pipeline stages included (handbook serving 8.3). Nothing
happens until the failure is noticed; requests keep arriving at the replica. Then the router leaves it out, its
requests start anew elsewhere (or wait, when nothing else works), and after the rebuild it is empty and healthy again.
An elastic expert-parallel group instead pauses, goes on without the rank, and takes a new one in later.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from planner.coasting import StepTimer
from planner.errors import InputError
from planner.failures.choices import OnFailure
from planner.group import Group
from planner.records import LOST
from planner.scheduler import RankWork, Request
from planner.simulation import _Run

_SEED_STREAM = 3
"""Failures draw from a stream of their own, so that arrivals stay what they are without them."""


@dataclass(frozen=True, slots=True)
class ElasticPlan:
    """How an expert-parallel group shrinks and grows [s]; tuples are indexed by dead ranks, 0 to as many as tolerated.

    Steps take `slowdown` times as long, and the pause is `reload_s` longer for experts that lost every copy.
    """

    detect_s: float
    pause_s: float
    join_s: float
    slowdown: tuple[float, ...]
    reload_s: tuple[float, ...]

    @property
    def tolerated(self) -> int:
        """Ranks that may be dead at the same time."""
        return len(self.slowdown) - 1


@dataclass(frozen=True, slots=True)
class OutagePlan:
    """When ranks die and how long it takes to come back.

    `fixed` are (seconds, replica); at random, GPUs fail every `mtbf_gpu_s` on average (None: never) while their
    replica works. A replica is `groups_per_replica` neighbouring groups on `gpus_per_replica` GPUs; it is noticed
    dead after `detect_s` and rebuilt `rebuild_s` later.
    """

    fixed: tuple[tuple[float, int], ...]
    mtbf_gpu_s: float | None
    gpus_per_replica: int
    groups_per_replica: int
    detect_s: float
    rebuild_s: float
    on_failure: OnFailure = "retry"
    elastic: ElasticPlan | None = None


@dataclass(slots=True)
class Incident:
    """One failure: when, where, when noticed and when the replica served again (NaN if the run ended before).

    `num_requests` were on the dead replica or rank when it was noticed; `lost_output_tokens` had been generated and
    are generated again or never, `recomputed_tokens` were in its KV cache.
    """

    replica: int
    failed_s: float
    is_elastic: bool
    detected_s: float = math.nan
    ready_s: float = math.nan
    num_requests: int = 0
    lost_output_tokens: int = 0
    recomputed_tokens: int = 0


class SlowTimer:
    """A step timer whose steps take `factor` times as long."""

    def __init__(self, timer: StepTimer, factor: float) -> None:
        self._timer, self._factor = timer, factor
        self.draw, self.link_s = 0, 0.0

    def step_s(self, ranks: Sequence[RankWork]) -> float:
        """Seconds of one lockstep step."""
        seconds = self._factor * self._timer.step_s(ranks)
        self.draw, self.link_s = self._timer.draw, self._timer.link_s
        return seconds


@dataclass(slots=True)
class _Replica:
    """State of one replica: its groups, dead ranks of an elastic one, and how often it was built.

    It is down from the failure on, and shut once the router knows.
    """

    index: int
    groups: list[Group]
    is_down: bool = False
    is_shut: bool = False
    dead: set[int] = field(default_factory=set)
    generation: int = 0


class Outages:
    """Failures of one run; give it to `simulate` as `disturb` and read it afterwards.

    `capacity` logs (seconds, replica, share of its ranks that work) at every change; `retried` and `dropped` are
    indices of requests; `num_ignored` of the fixed failures hit a replica that was down already or came too late.
    """

    def __init__(self, plan: OutagePlan, seed: int = 0) -> None:
        self.plan, self.seed = plan, seed
        self.incidents: list[Incident] = []
        self.capacity: list[tuple[float, int, float]] = []
        self.retried: set[int] = set()
        self.dropped: set[int] = set()
        self.num_ignored = 0
        self._parked: list[Request] = []

    def __call__(self, run: _Run) -> None:
        """Take part in `run`. Raises InputError when a replica to fail does not exist."""
        self.run, self.env, plan = run, run.env, self.plan
        size = plan.groups_per_replica
        starts = range(0, len(run.groups), size)
        self.replicas = [_Replica(i, run.groups[start : start + size]) for i, start in enumerate(starts)]
        for time_s, index in plan.fixed:
            if index >= len(self.replicas):
                raise InputError(
                    f"--fail-at {time_s:g}s,{index}: the run has replicas 0 to {len(self.replicas) - 1}. "
                    "Add replicas to --layout or fail another one."
                )
        self._open = list(range(len(run.in_flight)))
        run.gate = self._admit
        for time_s, index in plan.fixed:
            self.env.process(self._fixed(self.replicas[index], time_s))
        if plan.mtbf_gpu_s is not None:
            for replica in self.replicas:
                self.env.process(self._random(replica, plan.mtbf_gpu_s / plan.gpus_per_replica))

    # --- who gets requests ---

    def _admit(self, request: Request) -> bool:
        if self._open:
            return True
        self._parked.append(request)
        return False

    def _reopen(self) -> None:
        """Ranks open to requests from the state of all replicas; parked requests go on when there is one."""
        per_group = self.run.spec.ranks_per_group
        self._open = [
            group.index * per_group + position
            for replica in self.replicas
            if not replica.is_shut
            for group in replica.groups
            for position in range(per_group)
            if position not in replica.dead
        ]
        self.run.balancer.open = self._open if len(self._open) < len(self.run.in_flight) else None
        parked, self._parked = (self._parked, []) if self._open else ([], self._parked)
        for request in parked:
            self.run._accept(request)

    # --- when ---

    @property
    def _is_over(self) -> bool:
        return self.run.num_done == self.run.num_requests

    def _fixed(self, replica: _Replica, time_s: float) -> Generator[simpy.Event, Any, None]:
        yield self.env.timeout(time_s)
        if replica.is_down or self._is_over:
            self.num_ignored += 1
        else:
            yield from self._fail(replica)

    def _random(self, replica: _Replica, mttf_s: float) -> Generator[simpy.Event, Any, None]:
        """A renewal process: the clock of the next failure starts when the replica works again."""
        rng = np.random.default_rng([self.seed, _SEED_STREAM, replica.index])
        while not self._is_over:
            yield self.env.timeout(float(rng.exponential(mttf_s)))
            if not replica.is_down and not self._is_over:
                yield from self._fail(replica)

    def _fail(self, replica: _Replica) -> Generator[simpy.Event, Any, None]:
        elastic = self.plan.elastic
        is_elastic = elastic is not None and len(replica.dead) < elastic.tolerated
        incident = Incident(replica.index, self.env.now, is_elastic)
        self.incidents.append(incident)
        replica.is_down = True
        if elastic is not None and is_elastic:
            yield from self._shrink(replica, incident, elastic)
        else:
            yield from self._rebuild(replica, incident)
        incident.ready_s = self.env.now

    # --- the whole replica ---

    def _rebuild(self, replica: _Replica, incident: Incident) -> Generator[simpy.Event, Any, None]:
        self._stop(replica)
        yield self.env.timeout(self.plan.detect_s)
        replica.dead.clear()
        replica.generation += 1
        ranks = [(group, position) for group in replica.groups for position in _positions(group)]
        self._notice(replica, incident, ranks)
        yield self.env.timeout(self.plan.rebuild_s)
        self._start(replica)

    def _notice(self, replica: _Replica, incident: Incident, ranks: list[tuple[Group, int]]) -> None:
        """The router leaves the replica out; what the dead ranks held starts anew."""
        incident.detected_s = self.env.now
        replica.is_shut = True
        self._reopen()
        found = [request for group, position in ranks for request in self._emptied(group, position)]
        for request in sorted(found, key=lambda request: request.index):
            self._again(request, incident)

    def _emptied(self, group: Group, position: int) -> list[Request]:
        """Requests of a rank, which is empty afterwards."""
        rank = group.ranks[position]
        found = rank.unfinished() + [request for there, request in group.mail if there is rank]
        group.mail = [(there, request) for there, request in group.mail if there is not rank]
        group.ranks[position] = self.run.new_rank()
        index = group.index * len(group.ranks) + position
        for request in found:
            self.run.balancer.finished(request.index, index)
        self.run.in_flight[index] -= len(found)
        group.in_flight -= len(found)
        return found

    def _again(self, request: Request, incident: Incident) -> None:
        """Retry, resume or drop a request whose KV cache is gone."""
        is_prefilled = request.computed >= request.target
        incident.num_requests += 1
        incident.recomputed_tokens += (
            request.prompt_tokens + request.produced if is_prefilled else max(0, request.computed)
        )
        if self.plan.on_failure == "drop":
            incident.lost_output_tokens += request.produced
            self.dropped.add(request.index)
            self.run._end(request, LOST)
            return
        self.retried.add(request.index)
        if request.prefix is not None:
            request.prefix.forget()
        if self.plan.on_failure == "resume":
            request.target = request.prompt_tokens + request.produced
            request.computed = 0
            self.run._accept(request)
            return
        incident.lost_output_tokens += request.produced
        fresh = Request(request.index, request.prompt_tokens, request.output_tokens, request.arrival_s)
        fresh.num_preemptions, fresh.prefix = request.num_preemptions, request.prefix
        self.run._accept(fresh)

    # --- one rank of an elastic group ---

    def _shrink(self, replica: _Replica, incident: Incident, elastic: ElasticPlan) -> Generator[simpy.Event, Any, None]:
        """Pause, go on without one rank; which one matters to nobody, so it is the first that lives."""
        (group,) = replica.groups
        position = next(p for p in _positions(group) if p not in replica.dead)
        was_busy = self._stop(replica)
        yield self.env.timeout(elastic.detect_s)
        replica.dead.add(position)
        generation = replica.generation
        self._notice(replica, incident, [(group, position)])
        yield self.env.timeout(elastic.pause_s + elastic.reload_s[len(replica.dead)])
        self._resume(replica, elastic, was_busy)
        self.env.process(self._join(replica, position, generation, elastic))

    def _join(
        self, replica: _Replica, position: int, generation: int, elastic: ElasticPlan
    ) -> Generator[simpy.Event, Any, None]:
        """A new rank is ready `rebuild_s` later; the group pauses once more to take it in."""
        yield self.env.timeout(self.plan.rebuild_s)
        while replica.is_down and replica.generation == generation:
            yield self.env.timeout(elastic.pause_s)
        if replica.generation != generation or self._is_over:
            return
        replica.is_down = replica.is_shut = True
        self._reopen()
        was_busy = self._stop(replica)
        yield self.env.timeout(elastic.join_s)
        replica.dead.discard(position)
        self._resume(replica, elastic, was_busy)

    def _resume(self, replica: _Replica, elastic: ElasticPlan, was_busy: bool) -> None:
        """The step that was cut is done again within the pause; then the group goes on with the ranks it has."""
        (group,) = replica.groups
        if was_busy:
            for position, rank in enumerate(group.ranks):
                for request in rank.complete(self.env.now):
                    self.run._finish(group, group.index * len(group.ranks) + position, request)
        self._start(replica, elastic.slowdown[len(replica.dead)])

    # --- groups ---

    def _stop(self, replica: _Replica) -> bool:
        """The groups hang; True if a step was under way."""
        self.capacity.append((self.env.now, replica.index, 0.0))
        was_busy = False
        for group in replica.groups:
            was_busy = was_busy or group.wake is None
            self.run.engines.settle(group)
            group.wake = None
            assert group.process is not None and group.process.callbacks is not None
            group.process.callbacks.append(_defuse)
            group.process.interrupt()
        return was_busy

    def _start(self, replica: _Replica, slowdown: float = 1.0) -> None:
        share = 1.0 - len(replica.dead) / self.run.spec.ranks_per_group
        self.capacity.append((self.env.now, replica.index, share))
        replica.is_down = replica.is_shut = False
        for group in replica.groups:
            if self.run.engines.pipelines:
                self.run.engines.pipelines[group.index].clear()
            group.timer = SlowTimer(group.own_timer, slowdown) if replica.dead else group.own_timer
            group.unheard = self.run.spec.receive_interval
            group.process = self.env.process(self.run.engines.process(group))
        self._reopen()


def _positions(group: Group) -> range:
    return range(len(group.ranks))


def _defuse(event: simpy.Event) -> None:
    """An engine that ends by interruption is no error."""
    event.defused = True
