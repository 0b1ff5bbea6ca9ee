"""The event simulation: users send, a router spreads, lockstep groups step, until every request is answered.

Processes over a `simpy.Environment`: one for the arrivals and one per group. The time unit is the second. One engine
step is one event; what happens inside a step is arithmetic of `planner.scheduler`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy
from numpy.typing import NDArray

from planner.balancer import Balancer
from planner.clock import Clock
from planner.coasting import StepTimer
from planner.engineprocess import Engines
from planner.enginespec import EngineSpec
from planner.errors import InputError, nearest
from planner.frontend import FrontEnd
from planner.group import Group
from planner.metrics import Summary, summarise
from planner.pipeline import StageSplit
from planner.prefixcache import PrefixCache
from planner.ranks import rank_of
from planner.records import FINISHED, REJECTED, UNFINISHED, RequestTable, StepTable
from planner.routers import ROUTERS
from planner.scheduler import Rank, Request
from planner.sharing import Sharing
from planner.speculation import AcceptanceWalk
from planner.workload import RequestArrays, Slo, Workload

if TYPE_CHECKING:
    import pandas as pd

_PROGRESS_CALLS = 100


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """What one run left behind; equal inputs and seeds give equal bytes.

    `steps` is empty when the run was told not to record them; `num_steps` counts them all the same. `simulated_s` is
    the end of the last step [s].
    """

    spec: EngineSpec
    workload: Workload
    seed: int
    requests: RequestTable
    steps: StepTable
    num_steps: int
    simulated_s: float

    @property
    def num_rejected(self) -> int:
        """Requests larger than the KV pool of a rank."""
        return int((self.requests.status == REJECTED).sum())

    @property
    def rejection_reason(self) -> str | None:
        """Why requests were rejected, with the largest of them; None when none was."""
        if not self.num_rejected:
            return None
        largest = int((self.requests.prompt_tokens + self.requests.output_tokens - 1).max())
        holder = "a slot of the pool" if self.spec.max_request_tokens else "the pool of a rank"
        return (
            f"{self.num_rejected:,} of {len(self.requests):,} requests need up to {largest:,} KV tokens; {holder} "
            f"holds {self.spec.largest_request_tokens:,}. "
            "Shorten the requests or give a rank more KV memory."
        )

    def requests_frame(self) -> pd.DataFrame:
        """One row per request, columns of `RequestTable` plus its latencies."""
        return self.requests.frame()

    def steps_frame(self) -> pd.DataFrame:
        """One row per recorded step, columns of `StepTable`."""
        return self.steps.frame()

    def summary(self, slo: Slo | None = None, *, warmup: float | None = None) -> Summary:
        """Percentiles, rates and verdict of the steady part of the run; see `planner.metrics.summarise`."""
        arrivals = self.workload.arrivals
        concurrency = arrivals.concurrency if arrivals.kind == "closed" else None
        talk = self.workload.mean_turns, self.workload.conversation_think_s
        run = self.requests, self.steps, self.spec, self.simulated_s
        return summarise(*run, concurrency=concurrency, slo=slo, warmup=warmup, conversation=talk)


def simulate(
    spec: EngineSpec,
    timer: StepTimer,
    workload: Workload,
    *,
    seed: int = 0,
    router: str = "least_requests",
    max_simulated_s: float | None = None,
    progress: Callable[[float], None] | None = None,
    record_steps: bool = True,
    split: StageSplit | None = None,
    disturb: Callable[[_Run], None] | None = None,
    coasts: bool = True,
) -> Simulation:
    """Send `workload` to the deployment `spec` whose steps take what `timer` says.

    `seed` draws lengths, arrivals and random routers; `router` is a key of `planner.routers.ROUTERS` and spreads
    requests over the ranks of all groups, or over groups if these have a `rank_router`. What is not answered by
    `max_simulated_s` [s] stays unfinished. `progress` is called with the share of answered requests, at most a hundred
    times. `record_steps` keeps the step table (36 to 64 bytes per step). `split` cuts steps into pipeline stages, which
    neighbouring groups share. `disturb` is called with the run before its first event (`planner.incidents`). `coasts`
    lets stretches of alike steps pass at once (`planner.coasting`); without it the same records take longer. Raises
    InputError on an unknown router, a time limit that is not positive, or a timer that returns no positive time.
    """
    if router not in ROUTERS:
        raise InputError(f"unknown router {router!r} ({nearest(router, ROUTERS)})")
    if max_simulated_s is not None and not max_simulated_s > 0:
        raise InputError(f"max_simulated_s = {max_simulated_s:g} s must be positive.")
    requests = workload.requests(seed)
    engines = partial(
        Engines, spec=spec, record=record_steps, has_caches=requests.sharing is not None, split=split, coasts=coasts
    )
    run = _Run(spec, timer, workload, requests, (router, seed), engines)
    run.progress = progress
    if disturb is not None:
        disturb(run)
    run.cut_s = max_simulated_s or math.inf
    run.env.run(until=max_simulated_s)
    table = run.request_table()
    steps = run.engines.log.table(spec.block_tokens, has_caches=requests.sharing is not None)
    return Simulation(spec, workload, seed, table, steps, run.engines.num_steps, run.engines.now_s)


class _Run:
    """State of one simulation: the groups, the requests still to send, and the columns of the tables."""

    def __init__(
        self,
        spec: EngineSpec,
        timer: StepTimer,
        workload: Workload,
        sent: RequestArrays,
        routing: tuple[str, int],
        engines: Callable[[Clock, Callable[[Group, int, Request], None]], Engines],
    ) -> None:
        self.env = Clock()
        self.spec = spec
        self.progress: Callable[[float], None] | None = None
        self.gate: Callable[[Request], bool] | None = None  # False for a request that must wait outside
        self.sharing = Sharing(sent, workload.num_requests) if sent.sharing else None
        self.walk = AcceptanceWalk(spec.acceptance, [routing[1], 2]) if spec.acceptance else None
        ranks = [[self.new_rank() for _ in range(spec.ranks_per_group)] for _ in range(spec.num_groups)]
        self.groups = [Group(i, spec, timer, ranks[i]) for i in range(spec.num_groups)]
        self.in_flight = [0] * (spec.num_groups * spec.ranks_per_group)
        self.engines = engines(self.env, self._finish)
        self.balancer = Balancer(spec, routing[0], ranks, routing[1])
        self.num_sent = self.num_done = 0
        self.front_end = FrontEnd(spec)
        self.cut_s = math.inf
        self.is_closed, self.num_requests = workload.arrivals.kind == "closed", workload.num_requests
        self._allocate(sent)
        if self.is_closed:
            for _ in range(workload.arrivals.concurrency):
                self._send_next()
        else:
            self.env.process(self._arrivals() if self.sharing is None else self._conversations())
        for group in self.groups:
            group.process = self.env.process(self.engines.process(group))

    def new_rank(self) -> Rank:
        """An empty rank; the ranks of a run draw acceptance from one walk."""
        rank = rank_of(self.spec, self.walk)
        if self.sharing is not None and self.spec.prefix_caching:
            rank.cache = PrefixCache(self.spec.block_tokens)
        return rank

    def _allocate(self, sent: RequestArrays) -> None:
        """Plain lists and arrays: element access in the loop is several times faster than with numpy."""
        self.sent = sent
        self.prompts: list[int] = sent.prompt_tokens.tolist()
        self.outputs: list[int] = sent.output_tokens.tolist()
        count = self.num_requests
        self.arrival_s = array("d", [math.nan]) * count
        self.admitted_s = array("d", [math.nan]) * count
        self.first_token_s = array("d", [math.nan]) * count
        self.finish_s = array("d", [math.nan]) * count
        self.produced = array("q", [0]) * count
        self.num_preemptions = array("q", [0]) * count
        self.rank = array("q", [-1]) * count
        self.status = array("b", [UNFINISHED]) * count

    def _conversations(self) -> Generator[simpy.Event, Any, None]:
        """Open loop of requests that share prefixes: each, or each conversation, at its time."""
        env = self.env
        assert self.sharing is not None
        for arrival_s in self.sharing.starts_s:
            if arrival_s > env.now:
                yield env.timeout(arrival_s - env.now)
            if self.num_sent == self.num_requests:
                return
            self._send()

    def _arrivals(self) -> Generator[simpy.Event, Any, None]:
        """Open loop: every request at its time, whether or not earlier ones are answered.

        To arrive changes nothing, so there is one event per request, when the front end passes it on.
        """
        env, reached_s = self.env, self._reached_s()
        for index in np.argsort(reached_s, kind="stable").tolist():
            time_s = float(reached_s[index])
            if time_s > env.now:
                yield env.at(time_s)
            request = Request(index, self.prompts[index], self.outputs[index], self.arrival_s[index])
            if self._may_come(request):
                self._accept(request)

    def _reached_s(self) -> NDArray[np.float64]:
        """When each request of an open loop reaches a queue, or is rejected [s]; fills `arrival_s`."""
        arrival_s, reached_s, now_s = self.arrival_s, np.empty(self.num_requests), self.env.now
        holds, request = self.groups[0].ranks[0].can_ever_hold, Request(0, 1, 1, 0.0)
        for index, time_s in enumerate(self.sent.arrival_s.tolist()):
            if time_s > now_s:
                now_s += time_s - now_s
            arrival_s[index] = now_s
            request.prompt_tokens, request.output_tokens = self.prompts[index], self.outputs[index]
            delay_s = self.front_end.delay_s(index, request.prompt_tokens, now_s) if holds(request) else 0.0
            reached_s[index] = now_s + delay_s
        return reached_s

    def _send(self, turn: int | None = None) -> bool:
        """The next request, or that `turn`, enters a queue; False if it is too large for any and was rejected."""
        index = self.num_sent
        self.num_sent += 1
        row, prefix = (index, None) if self.sharing is None else self.sharing.send(turn)
        request = Request(index, self.prompts[row], self.outputs[row], self.env.now)
        request.prefix = prefix
        self.arrival_s[index] = self.env.now
        if not self._may_come(request):
            return False
        delay_s = self.front_end.delay_s(index, request.prompt_tokens, self.env.now)
        if delay_s > 0:
            arrival = self.env.timeout(delay_s)
            arrival.callbacks.append(lambda _: self._accept(request))
        else:
            self._accept(request)
        return True

    def _may_come(self, request: Request) -> bool:
        """False if the request is too large for any rank; it is rejected then."""
        if self.groups[0].ranks[0].can_ever_hold(request):
            return True
        self.status[request.index] = REJECTED
        self._count_done()
        return False

    def _accept(self, request: Request) -> None:
        """The request reaches the rank that the router chooses."""
        if self.gate is not None and not self.gate(request):
            return
        if self.balancer.looks_at_ranks:
            for group in self.groups:
                self.engines.settle(group)
        chosen = self.balancer.choose(self.in_flight, request, self.env.now)
        group = self.groups[chosen // self.spec.ranks_per_group]
        if group.stretch is not None:
            self.engines.settle(group)
        rank = group.ranks[chosen % self.spec.ranks_per_group]
        if self.spec.receive_interval > 1:
            group.mail.append((rank, request))
        else:
            rank.enqueue(request)
        self.in_flight[chosen] += 1
        self.rank[request.index] = chosen
        group.in_flight += 1
        if group.wake is not None and not group.wake.triggered:
            group.wake.succeed()

    def _send_next(self) -> None:
        """Closed loop: a user sends until one of its requests is accepted or none is left."""
        while self.num_sent < self.num_requests and not self._send():
            pass

    def _turn(self, row: int) -> None:
        """A user has thought; one of a closed loop whose turn is too large begins another conversation."""
        if self.num_sent < self.num_requests and not self._send(row) and self.is_closed:
            self._send_next()

    def _finish(self, group: Group, rank: int, request: Request) -> None:
        self.in_flight[rank] -= 1
        self.balancer.finished(request.index, rank)
        group.in_flight -= 1
        self.finish_s[request.index] = self.env.now
        self._end(request, FINISHED)

    def _end(self, request: Request, status: int) -> None:
        """Nothing more happens to the request; in a closed loop its user sends the next."""
        self.status[request.index] = status
        self._write(request)
        self._count_done()
        shares = self.sharing if status == FINISHED else None
        if shares is not None and shares.goes_on(request.index, self.env, self._turn):
            return
        if self.is_closed:
            self._send_next()

    def _write(self, request: Request) -> None:
        index = request.index
        self.admitted_s[index] = request.admitted_s
        self.first_token_s[index] = request.first_token_s
        self.produced[index] = request.produced
        self.num_preemptions[index] = request.num_preemptions

    def _count_done(self) -> None:
        self.num_done += 1
        if self.progress is not None:
            total = self.num_requests
            if self.num_done == total or self.num_done % -(-total // _PROGRESS_CALLS) == 0:
                self.progress(self.num_done / total)

    def request_table(self) -> RequestTable:
        """Columns of the requests that were sent."""
        for group in self.groups:
            self.engines.settle(group)
            for rank in group.ranks:
                for request in rank.unfinished():
                    self._write(request)
        if not self.is_closed and self.sharing is None:
            self.num_sent = int(np.searchsorted(np.array(self.arrival_s), self.cut_s))
        sent = slice(0, self.num_sent)
        rows = sent if self.sharing is None else self.sharing.rows
        return RequestTable(
            arrival_s=np.array(self.arrival_s)[sent],
            admitted_s=np.array(self.admitted_s)[sent],
            first_token_s=np.array(self.first_token_s)[sent],
            finish_s=np.array(self.finish_s)[sent],
            prompt_tokens=self.sent.prompt_tokens[rows],
            output_tokens=self.sent.output_tokens[rows],
            produced_tokens=np.array(self.produced)[sent],
            num_preemptions=np.array(self.num_preemptions)[sent],
            rank=np.array(self.rank)[sent],
            status=np.array(self.status)[sent],
            **(self.sharing.request_columns() if self.sharing else {}),
        )
