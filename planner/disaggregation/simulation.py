"""The event simulation of two pools: prompts are computed in one, their KV travels, the other decodes.

Processes over one `simpy.Environment`: the arrivals, one per group of each pool. One event per engine step and one per
transfer; everything else is arithmetic of the ranks. A request goes

    sent -> [room on a decode rank] -> prefill rank -> [room on a decode rank] -> links -> decode rank -> answered

where room is asked for before or after the prompt, as the engine's `Handover` says. While KV waits or travels it holds
memory on both sides.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from planner.coasting import StepTimer
from planner.disaggregation.handover import Handover
from planner.disaggregation.pool import AnyRank, Group, Journey, Pool
from planner.disaggregation.ranks import DecodeRank, PrefillRank
from planner.disaggregation.records import HandoverTable
from planner.disaggregation.transfer import KvRoute, arrival_s, send
from planner.enginespec import EngineSpec
from planner.errors import InputError, nearest
from planner.frontend import FrontEnd
from planner.pipeline import StageSplit
from planner.records import FINISHED, REJECTED, UNFINISHED, RequestTable, StepTable
from planner.routers import ROUTERS
from planner.workload import Workload

_PROGRESS_CALLS = 100
_TIMES = ("queued_s", "prefilled_s", "asked_s", "reserved_s", "sent_s", "arrived_s", "joined_s")


@dataclass(frozen=True, slots=True, eq=False)
class PoolsSimulation:
    """What one run left behind; equal inputs and seeds give equal bytes.

    `requests.rank` is the decode rank. `sender_busy_share` and `receiver_busy_share` are the busy shares of the links
    of the busiest rank of each pool.
    """

    prefill: EngineSpec
    decode: EngineSpec
    workload: Workload
    seed: int
    requests: RequestTable
    handovers: HandoverTable
    prefill_steps: StepTable
    decode_steps: StepTable
    num_steps: int
    simulated_s: float
    sender_busy_share: float
    receiver_busy_share: float

    @property
    def num_rejected(self) -> int:
        """Requests larger than the KV pool of a rank of either pool."""
        return int((self.requests.status == REJECTED).sum())


def simulate_pools(
    prefill: EngineSpec,
    decode: EngineSpec,
    timers: tuple[StepTimer, StepTimer],
    route: KvRoute,
    handover: Handover,
    workload: Workload,
    *,
    splits: tuple[StageSplit | None, StageSplit | None] = (None, None),
    seed: int = 0,
    router: str = "least_requests",
    max_simulated_s: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> PoolsSimulation:
    """Send `workload` to two pools of ranks joined by `route`; `timers` and `splits` are (prefill, decode).

    The front end and its delay are those of the prefill spec; `seed`, `router`, `max_simulated_s` and `progress` are as
    in `planner.simulation.simulate`. Raises InputError on an unknown router, a time limit that is not positive, or a
    timer that returns no positive time.
    """
    if router not in ROUTERS:
        raise InputError(f"unknown router {router!r} ({nearest(router, ROUTERS)})")
    if max_simulated_s is not None and not max_simulated_s > 0:
        raise InputError(f"max_simulated_s = {max_simulated_s:g} s must be positive.")
    choose = [ROUTERS[router](np.random.default_rng([seed, stream])) for stream in (1, 2)]
    pools = (
        Pool(prefill, timers[0], splits[0], lambda: PrefillRank(prefill), choose[0]),
        Pool(decode, timers[1], splits[1], lambda: DecodeRank(decode, handover), choose[1]),
    )
    run = _PoolsRun(pools, route, handover, workload, seed)
    run.progress = progress
    run.env.run(until=max_simulated_s)
    return PoolsSimulation(
        prefill,
        decode,
        workload,
        seed,
        run.request_table(),
        run.handover_table(),
        pools[0].step_table(),
        pools[1].step_table(),
        run.num_steps,
        run.now_s,
        pools[0].busy_share(run.now_s),
        pools[1].busy_share(run.now_s),
    )


class _PoolsRun:
    """State of one simulation: the pools, the requests under way, and the columns of the tables."""

    def __init__(
        self, pools: tuple[Pool, Pool], route: KvRoute, handover: Handover, workload: Workload, seed: int
    ) -> None:
        self.env = simpy.Environment()
        self.prefill, self.decode = pools
        self.route, self.handover = route, handover
        self.progress: Callable[[float], None] | None = None
        self.num_steps = self.num_sent = self.num_done = 0
        self.now_s = 0.0
        self.front_end = FrontEnd(self.prefill.spec)
        self.journeys: dict[int, Journey] = {}
        self.is_closed = workload.arrivals.kind == "closed"
        self._allocate(workload, seed)
        if self.is_closed:
            for _ in range(workload.arrivals.concurrency):
                self._send_next()
        else:
            self.env.process(self._arrivals())
        for group in self.prefill.groups:
            self.env.process(self._engine(self.prefill, group, self._end_prefill_step))
        for group in self.decode.groups:
            self.env.process(self._engine(self.decode, group, self._end_decode_step))

    def _allocate(self, workload: Workload, seed: int) -> None:
        self.sent = workload.requests(seed)
        self.prompts: list[int] = self.sent.prompt_tokens.tolist()
        self.outputs: list[int] = self.sent.output_tokens.tolist()
        count = len(self.prompts)
        names = (*_TIMES, "arrival_s", "admitted_s", "first_token_s", "finish_s", "kv_bytes")
        self.at = {name: array("d", [math.nan]) * count for name in names}
        self.counts = {
            "produced": array("q", [0]) * count,
            "preemptions": array("q", [0]) * count,
            "prefill_rank": array("q", [-1]) * count,
            "decode_rank": array("q", [-1]) * count,
            "status": array("q", [UNFINISHED]) * count,
        }

    def _arrivals(self) -> Generator[simpy.Event, Any, None]:
        env = self.env
        for arrival in self.sent.arrival_s.tolist():
            if arrival > env.now:
                yield env.timeout(arrival - env.now)
            self._send()

    def _engine(self, pool: Pool, group: Group, end: Callable[[Group], None]) -> Generator[simpy.Event, Any, None]:
        """One lockstep group of either pool: plan, take the time of the slowest, complete; asleep without work."""
        env, ranks, timer = self.env, group.ranks, pool.timer
        works = [rank.work for rank in ranks]
        pipeline = pool.pipelines[group.index] if pool.pipelines else None
        while True:
            start_s = env.now
            for rank in ranks:
                if rank.arrived:
                    self._join(rank)
                rank.plan(start_s)
            for work in works:
                if work.prefill_tokens or work.decode_seqs:
                    break
            else:
                group.wake = env.event()
                yield group.wake
                group.wake = None
                continue
            step_s = timer.step_s(works)
            if pipeline is not None:
                step_s = pipeline.pass_s(start_s, step_s, ranks)
            if not 0 < step_s < math.inf:
                raise InputError(f"the step timer returned {step_s} s for a step; it must be positive and finite.")
            self.num_steps += 1
            pool.record(group, start_s, step_s)
            yield env.timeout(step_s)
            self.now_s = env.now
            end(group)

    # --- the way of a request ------------------------------------------------------------------------------

    def _send(self) -> bool:
        """The next request sets out; False if it is too large for a rank of either pool and was rejected."""
        index = self.num_sent
        self.num_sent += 1
        journey = Journey(index, self.prompts[index], self.outputs[index], self.env.now)
        self.at["arrival_s"][index] = self.env.now
        fits = self.prefill.ranks[0].can_ever_hold(journey.prefill)
        if not (fits and self.decode.ranks[0].can_ever_hold(journey.decode)):
            self.counts["status"][index] = REJECTED
            self._count_done()
            return False
        delay_s = self.front_end.delay_s(index, journey.prefill.prompt_tokens, self.env.now)
        if delay_s > 0:
            self.env.timeout(delay_s).callbacks.append(lambda _: self._accept(journey))
        else:
            self._accept(journey)
        return True

    def _accept(self, journey: Journey) -> None:
        self.journeys[journey.index] = journey
        if self.handover.reserve == "arrival":
            self._ask(journey)
        else:
            self._queue(journey)

    def _queue(self, journey: Journey) -> None:
        """The prompt enters the queue of a prefill rank."""
        chosen = journey.prefill_rank = self.prefill.take()
        self._mark("queued_s", journey.index)
        self.counts["prefill_rank"][journey.index] = chosen
        self.prefill.ranks[chosen].enqueue(journey.prefill)
        self.prefill.group_of(chosen).rouse()

    def _end_prefill_step(self, group: Group) -> None:
        now_s = self.env.now
        for rank in group.ranks:
            for request in rank.complete(now_s):
                self._prefilled(rank, self.journeys[request.index])

    def _prefilled(self, rank: AnyRank, journey: Journey) -> None:
        """The prompt is computed; its KV stays until it has arrived on the decode side."""
        index = journey.index
        self._mark("prefilled_s", index)
        self.prefill.in_flight[journey.prefill_rank] -= 1
        if self.handover.first_token == "prefilled":
            journey.decode.first_token_s = self.env.now
            if journey.decode.output_tokens == 1:
                journey.decode.produced = 1
                self._finish(journey)
                return
        assert isinstance(rank, PrefillRank)
        rank.hold(journey.prefill.prompt_tokens)
        if self.handover.reserve == "arrival":
            self._transfer(journey)
        else:
            self._ask(journey)

    def _ask(self, journey: Journey) -> None:
        """Ask a decode rank for room."""
        chosen = journey.decode_rank = self.decode.take()
        self._mark("asked_s", journey.index)
        self.counts["decode_rank"][journey.index] = chosen
        rank = self.decode.ranks[chosen]
        assert isinstance(rank, DecodeRank)
        rank.asking.append(journey.decode)
        self._reserve(rank)

    def _reserve(self, rank: AnyRank) -> None:
        """Give room to those that ask, as far as there is some; their KV can come, or be computed."""
        assert isinstance(rank, DecodeRank)
        for request in rank.reserve():
            journey = self.journeys[request.index]
            self._mark("reserved_s", request.index)
            if self.handover.reserve == "arrival":
                self._queue(journey)
            else:
                self._transfer(journey)

    def _transfer(self, journey: Journey) -> None:
        """Put the KV on the links; it is prefilled and has room."""
        tokens, index, route, now_s = journey.prefill.prompt_tokens, journey.index, self.route, self.env.now
        nics = self.prefill.nics[journey.prefill_rank], self.decode.nics[journey.decode_rank]
        pieces = self._pieces(tokens)
        # Pieces go only where room was reserved before the prompt, which is then complete just now.
        begun_s = journey.prefill.admitted_s if pieces > 1 else now_s
        start_s = send(route, *nics, tokens, begun_s, now_s, pieces)
        arrived_s = arrival_s(route, tokens, start_s, now_s, pieces)
        self.at["sent_s"][index] = start_s
        self.at["kv_bytes"][index] = route.moved_bytes(tokens)
        self.env.timeout(max(0.0, arrived_s - now_s)).callbacks.append(lambda _: self._arrived(journey))

    def _pieces(self, tokens: int) -> int:
        """Pieces in which the KV of a prompt is sent."""
        if self.handover.send == "whole":
            return 1
        if self.handover.send == "chunks":
            return -(-tokens // self.prefill.spec.max_batched_tokens)
        return self.route.num_layers

    def _arrived(self, journey: Journey) -> None:
        """The KV is on the decode side: the prefill side is rid of it, the request waits for its place."""
        self._mark("arrived_s", journey.index)
        sender = self.prefill.ranks[journey.prefill_rank]
        receiver = self.decode.ranks[journey.decode_rank]
        assert isinstance(sender, PrefillRank) and isinstance(receiver, DecodeRank)
        sender.release(journey.prefill.prompt_tokens)
        self.prefill.group_of(journey.prefill_rank).rouse()
        receiver.arrived.append(journey.decode)
        self.decode.group_of(journey.decode_rank).rouse()

    def _join(self, rank: AnyRank) -> None:
        """Arrived requests enter the batch of the step that starts now."""
        assert isinstance(rank, DecodeRank)
        joined, finished = rank.join(self.env.now)
        for request in joined:
            self._mark("joined_s", request.index)
        for request in finished:
            self._finish(self.journeys[request.index])
        if finished:
            self._reserve(rank)

    def _end_decode_step(self, group: Group) -> None:
        now_s = self.env.now
        for rank in group.ranks:
            for request in rank.complete(now_s):
                self._finish(self.journeys[request.index])
        for rank in group.ranks:
            if rank.asking:
                self._reserve(rank)

    def _finish(self, journey: Journey) -> None:
        index = journey.index
        self._mark("finish_s", index)
        self.counts["status"][index] = FINISHED
        if journey.decode_rank >= 0:
            self.decode.in_flight[journey.decode_rank] -= 1
        self._write(journey)
        del self.journeys[index]
        self._count_done()
        if self.is_closed:
            self._send_next()

    def _send_next(self) -> None:
        """Closed loop: a user sends until one of its requests is accepted or none is left."""
        while self.num_sent < len(self.prompts) and not self._send():
            pass

    # --- tables --------------------------------------------------------------------------------------------

    def _mark(self, name: str, index: int) -> None:
        self.at[name][index] = self.env.now

    def _write(self, journey: Journey) -> None:
        index, decode = journey.index, journey.decode
        self.at["admitted_s"][index] = journey.prefill.admitted_s
        self.at["first_token_s"][index] = decode.first_token_s
        self.counts["produced"][index] = decode.produced
        self.counts["preemptions"][index] = journey.prefill.num_preemptions + decode.num_preemptions

    def _count_done(self) -> None:
        self.num_done += 1
        if self.progress is not None:
            total = len(self.prompts)
            if self.num_done == total or self.num_done % -(-total // _PROGRESS_CALLS) == 0:
                self.progress(self.num_done / total)

    def request_table(self) -> RequestTable:
        """Columns of the requests that were sent."""
        for rank in self.decode.ranks:
            rank.unfinished()
        for journey in self.journeys.values():
            self._write(journey)
        sent, at, counts = slice(0, self.num_sent), self.at, self.counts
        return RequestTable(
            **{name: np.array(at[name])[sent] for name in ("arrival_s", "admitted_s", "first_token_s", "finish_s")},
            prompt_tokens=self.sent.prompt_tokens[sent],
            output_tokens=self.sent.output_tokens[sent],
            produced_tokens=np.array(counts["produced"])[sent],
            num_preemptions=np.array(counts["preemptions"])[sent],
            rank=np.array(counts["decode_rank"])[sent],
            status=np.array(counts["status"], dtype=np.int8)[sent],
        )

    def handover_table(self) -> HandoverTable:
        """What the requests did between the pools."""
        sent = slice(0, self.num_sent)
        return HandoverTable(
            **{name: np.array(self.at[name])[sent] for name in (*_TIMES, "kv_bytes")},
            **{name: np.array(self.counts[name])[sent] for name in ("prefill_rank", "decode_rank")},
        )
