"""The event simulation: users send, a router spreads, lockstep groups step, until every request is answered.

Processes over a `simpy.Environment`: one for the arrivals and one per group. The time unit is the second. One engine
step is one event; what happens inside a step is arithmetic of `planner.scheduler`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import simpy

from planner.errors import InputError, nearest
from planner.metrics import Summary, summarise
from planner.records import FINISHED, REJECTED, UNFINISHED, RequestTable, StepTable
from planner.routers import ROUTERS, Router
from planner.scheduler import EngineSpec, Rank, RankWork, Request
from planner.sharing import Sharing, route
from planner.workload import RequestArrays, Slo, Workload

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EngineSpec", "RankWork", "Simulation", "StepTimer", "simulate"]

_NUM_STEP_COLUMNS = 9
_PROGRESS_CALLS = 100


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
        return (
            f"{self.num_rejected:,} of {len(self.requests):,} requests need up to {largest:,} KV tokens; the pool of a "
            f"rank holds {self.spec.kv_blocks_per_rank * self.spec.block_tokens:,}. "
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
) -> Simulation:
    """Send `workload` to the deployment `spec` whose steps take what `timer` says.

    `seed` draws lengths, arrivals and random routers; `router` is a key of `planner.routers.ROUTERS` and spreads
    requests over the ranks of all groups. What is not answered by `max_simulated_s` [s] stays unfinished. `progress`
    is called with the share of answered requests, at most a hundred times. `record_steps` keeps the step table (72
    bytes per step). Raises InputError on an unknown router, a time limit that is not positive, or a timer that
    returns no positive time.
    """
    if router not in ROUTERS:
        raise InputError(f"unknown router {router!r} ({nearest(router, ROUTERS)})")
    if max_simulated_s is not None and not max_simulated_s > 0:
        raise InputError(f"max_simulated_s = {max_simulated_s:g} s must be positive.")
    requests = workload.requests(seed)
    run = _Run(spec, timer, workload, requests, ROUTERS[router](np.random.default_rng([seed, 1])), record_steps)
    run.progress = progress
    run.env.run(until=max_simulated_s)
    return Simulation(spec, workload, seed, run.request_table(), run.step_table(), run.num_steps, run.now_s)


class HostLink:
    """A link over which groups fetch experts, first come first served; a step's fetches are one job.

    Same waits as a `simpy.Resource` of capacity 1, without an event of its own.
    """

    __slots__ = ("free_s",)

    def __init__(self) -> None:
        self.free_s = 0.0

    def wait_s(self, now_s: float, busy_s: float) -> float:
        """How long a job of `busy_s` that comes at `now_s` waits for those before it [s]."""
        wait_s = max(0.0, self.free_s - now_s)
        self.free_s = now_s + wait_s + busy_s
        return wait_s


def _host_links(spec: EngineSpec) -> list[HostLink]:
    """Link of each group; empty without fetching. Neighbours share one, groups of two nodes never do."""
    if not spec.groups_per_link:
        return []
    places = [divmod(group, spec.groups_per_node) for group in range(spec.num_groups)]
    roots = [(node, place // spec.groups_per_link) for node, place in places]
    links = {root: HostLink() for root in roots}
    return [links[root] for root in roots]


class _Group:
    """Ranks that step together; `wake` is the event it sleeps on while it has no requests.

    Requests wait in `mail` until the scheduler looks for new ones; `unheard` counts its steps since the last time.
    """

    __slots__ = ("in_flight", "index", "mail", "ranks", "unheard", "wake")

    def __init__(self, index: int, spec: EngineSpec) -> None:
        self.index = index
        self.mail: list[tuple[Rank, Request]] = []
        self.unheard = spec.receive_interval
        self.ranks = [Rank(spec) for _ in range(spec.ranks_per_group)]
        self.in_flight = 0
        self.wake: simpy.Event | None = None


class _Run:
    """State of one simulation: the groups, the requests still to send, and the columns of the tables."""

    def __init__(
        self,
        spec: EngineSpec,
        timer: StepTimer,
        workload: Workload,
        sent: RequestArrays,
        router: Router,
        record_steps: bool,
    ) -> None:
        self.env = simpy.Environment()
        self.spec = spec
        self.timer = timer
        self.router = router
        self.record_steps = record_steps
        self.progress: Callable[[float], None] | None = None
        self.groups = [_Group(i, spec) for i in range(spec.num_groups)]
        self.links = _host_links(spec)
        self.in_flight = [0] * (spec.num_groups * spec.ranks_per_group)
        self.num_steps = self.num_sent = self.num_done = 0
        self.now_s = 0.0
        self.is_closed, self.num_requests = workload.arrivals.kind == "closed", workload.num_requests
        ranks = [rank for group in self.groups for rank in group.ranks]
        self.sharing = Sharing(sent, self.num_requests, spec, ranks) if sent.sharing else None
        self._allocate(sent)
        if self.is_closed:
            for _ in range(workload.arrivals.concurrency):
                self._send_next()
        else:
            self.env.process(self._arrivals())
        for group in self.groups:
            self.env.process(self._engine(group))

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
        self.step_rows = array("d")

    def _arrivals(self) -> Generator[simpy.Event, Any, None]:
        """Open loop: every request at its time, whether or not earlier ones are answered."""
        env = self.env
        for arrival_s in self.sharing.starts_s if self.sharing else self.sent.arrival_s.tolist():
            if arrival_s > env.now:
                yield env.timeout(arrival_s - env.now)
            if self.num_sent == self.num_requests:
                return
            self._send()

    def _engine(self, group: _Group) -> Generator[simpy.Event, Any, None]:
        """One lockstep group: plan, take the time of the slowest, complete; asleep without requests."""
        env, ranks, timer = self.env, group.ranks, self.timer
        works = [rank.work for rank in ranks]
        link = self.links[group.index] if self.links else None
        interval = self.spec.receive_interval
        while True:
            if not group.in_flight:
                group.wake = env.event()
                yield group.wake
                group.wake = None
            start_s = env.now
            if interval > 1 and (group.unheard >= interval or group.in_flight == len(group.mail)):
                self._deliver(group)
            for rank in ranks:
                rank.plan(start_s)
            step_s = timer.step_s(works)
            if link is not None:
                step_s += link.wait_s(start_s, timer.link_s)
            if not 0 < step_s < math.inf:
                raise InputError(f"the step timer returned {step_s} s for a step; it must be positive and finite.")
            self.num_steps += 1
            if self.record_steps:
                self._record_step(group, start_s, step_s)
            if interval > 1:
                # A step without work, or one with prompts, makes the scheduler look at once (SGLang's recv skipper).
                busy = any(work.decode_seqs for work in works) and not any(work.prefill_tokens for work in works)
                group.unheard = group.unheard + 1 if busy else interval
            yield env.timeout(step_s)
            self.now_s = env.now
            for position, rank in enumerate(ranks):
                for request in rank.complete(env.now):
                    self._finish(group, group.index * len(ranks) + position, request)

    def _record_step(self, group: _Group, start_s: float, step_s: float) -> None:
        prefill_tokens = decode_seqs = context_tokens = blocks = waiting = 0
        for rank in group.ranks:
            work = rank.work
            prefill_tokens += work.prefill_tokens
            decode_seqs += work.decode_seqs
            context_tokens += work.decode_context_tokens
            blocks += rank.total_blocks - rank.free_blocks
            waiting += len(rank.waiting)
        kv_tokens = blocks * self.spec.block_tokens
        self.step_rows.extend(
            (
                start_s,
                step_s,
                group.index,
                prefill_tokens,
                decode_seqs,
                context_tokens,
                kv_tokens,
                waiting,
                self.timer.draw,
            )
        )
        if self.sharing is not None:
            self.sharing.record_step(group.ranks)

    def _send(self, turn: int | None = None) -> bool:
        """The next request, or that `turn`, enters a queue; False if it is too large for any and was rejected."""
        index = self.num_sent
        self.num_sent += 1
        row, prefix = (index, None) if self.sharing is None else self.sharing.send(turn)
        request = Request(index, self.prompts[row], self.outputs[row], self.env.now)
        request.prefix = prefix
        self.arrival_s[index] = self.env.now
        if not self.groups[0].ranks[0].can_ever_hold(request):
            self.status[index] = REJECTED
            self._count_done()
            return False
        delay_s = self.spec.frontend_s + self.spec.frontend_s_per_token * request.prompt_tokens
        if delay_s > 0:
            arrival = self.env.timeout(delay_s)
            arrival.callbacks.append(lambda _: self._accept(request))
        else:
            self._accept(request)
        return True

    def _accept(self, request: Request) -> None:
        """The request reaches the rank that the router chooses."""
        chosen = route(self.router, request.prefix, self.in_flight)
        group = self.groups[chosen // self.spec.ranks_per_group]
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

    def _deliver(self, group: _Group) -> None:
        for rank, request in group.mail:
            rank.enqueue(request)
        group.mail.clear()
        group.unheard = 0

    def _send_next(self) -> None:
        """Closed loop: a user sends until one of its requests is accepted or none is left."""
        while self.num_sent < self.num_requests and not self._send():
            pass

    def _turn(self, row: int) -> None:
        """A user has thought; one of a closed loop whose turn is too large begins another conversation."""
        if self.num_sent < self.num_requests and not self._send(row) and self.is_closed:
            self._send_next()

    def _finish(self, group: _Group, rank: int, request: Request) -> None:
        self.in_flight[rank] -= 1
        group.in_flight -= 1
        self.finish_s[request.index] = self.env.now
        self.status[request.index] = FINISHED
        self._write(request)
        self._count_done()
        goes_on = self.sharing is not None and self.sharing.goes_on(request.index, self.env, self._turn)
        if self.is_closed and not goes_on:
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
            for rank in group.ranks:
                for request in rank.unfinished():
                    self._write(request)
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

    def step_table(self) -> StepTable:
        """Columns of the recorded steps."""
        found = self.sharing.step_column if self.sharing else None
        return StepTable.from_rows(np.array(self.step_rows).reshape(-1, _NUM_STEP_COLUMNS), found)
