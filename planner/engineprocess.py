"""The engine of a group as a process: begin a step, let it pass, complete it; stretches of alike steps at once."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator
from typing import Any

import simpy

from planner.clock import Clock
from planner.coasting import MOST_STEPS, CoastingTimer, Stretch
from planner.enginespec import EngineSpec
from planner.errors import InputError
from planner.group import Group
from planner.hostlink import host_links
from planner.pipeline import StageSplit, pipelines
from planner.scheduler import Request
from planner.sharing import found_tokens
from planner.steplog import StepLog

_FEW_STEPS = 3
"""A stretch of fewer steps is not worth it."""


class Engines:
    """The groups of a run at work; `finish` is called with group, rank (of all) and request when a request is done.

    `num_steps` have begun and `now_s` is the end of the last one. `record` keeps them in `log`, with `has_caches` also
    what prefix caches found. `split` cuts steps into pipeline stages that neighbouring groups share. `coasts` lets
    stretches pass at once; without it every step is planned, and the records are the same.
    """

    def __init__(
        self,
        env: Clock,
        finish: Callable[[Group, int, Request], None],
        *,
        spec: EngineSpec,
        record: bool,
        has_caches: bool,
        split: StageSplit | None,
        coasts: bool,
    ) -> None:
        self._env, self._spec, self._finish = env, spec, finish
        self._record_steps, self._has_caches = record, has_caches
        self._coasts, self._is_lone = coasts, spec.num_groups == 1
        self._links, self.pipelines = host_links(spec), pipelines(split, spec.num_groups)
        self.log = StepLog()
        self.num_steps = 0
        self.now_s = 0.0
        self._turn = -1
        """Group that completes a step at this instant, -1 for none; groups whose steps end together take turns."""

    def process(self, group: Group) -> Generator[simpy.Event, Any, None]:
        """One lockstep group: begin a step, let it pass, complete it; asleep without requests."""
        env, ranks, first_rank = self._env, group.ranks, group.index * len(group.ranks)
        group.works = [rank.work for rank in ranks]
        coaster, now_s = self._coaster(group), env.now
        while True:
            if not group.in_flight:
                group.wake = env.event()
                yield group.wake
                group.wake, now_s = None, env.now
            stretch = None if coaster is None else self._stretch(group, coaster, now_s)
            if stretch is not None and not self._is_lone:
                group.stretch = stretch
                stretch.ends = env.at(float(stretch.bounds_s[-1]), 1 + group.index)
                yield stretch.ends
                self.settle(group)
                now_s = env.now
            else:
                if stretch is None:
                    now_s += self._begin_step(group, now_s)
                else:
                    now_s = self._take(group, stretch, stretch.begun(env.peek()))
                if now_s < env.peek():
                    env.advance(now_s)
                else:
                    yield env.at(now_s, 1 + group.index)
            self.now_s, self._turn = now_s, group.index
            for position, rank in enumerate(ranks):
                for request in rank.complete(now_s):
                    self._finish(group, first_rank + position, request)
            self._turn = -1

    def _coaster(self, group: Group) -> CoastingTimer | None:
        """The timer of `group` if its steps depend on nothing but its own batches."""
        if not self._coasts or group.hold is not None or self._links or self.pipelines:
            return None
        return group.timer if isinstance(group.timer, CoastingTimer) else None

    def _begin_step(self, group: Group, start_s: float) -> float:
        """Plan and record the step that starts at `start_s`, which is now; returns its seconds."""
        ranks = group.ranks
        interval = self._spec.receive_interval
        if interval > 1 and (group.unheard >= interval or group.in_flight == len(group.mail)):
            self._deliver(group)
        if group.hold is not None:
            group.hold.decide(ranks)
        for rank in ranks:
            rank.plan(start_s)
        works = group.works
        step_s = group.timer.step_s(works)
        if self._links:
            step_s += self._links[group.index].wait_s(start_s, group.timer.link_s)
        if self.pipelines:
            step_s = self.pipelines[group.index].pass_s(start_s, step_s, ranks)
        if not 0 < step_s < math.inf:
            raise _no_time(step_s)
        if not works[0].prefill_tokens:
            group.decode_step_s = step_s
        if self._record_steps:
            self._record_step(group, start_s, step_s)
        self.num_steps += 1
        if interval > 1:
            # A step without work, or one with prompts, makes the scheduler look at once (SGLang's recv skipper).
            busy = any(work.decode_seqs for work in works) and not any(work.prefill_tokens for work in works)
            group.unheard = group.unheard + 1 if busy else interval
        return step_s

    def _stretch(self, group: Group, timer: CoastingTimer, now_s: float) -> Stretch | None:
        """The steps from `now_s` on if the batches of `group` stay for some time, else None.

        To find out costs as much as planning two or three steps, and in a run of one group the next event ends it.
        """
        ranks = group.ranks
        most = ranks[0].quiet_steps() if len(ranks) == 1 else min([rank.quiet_steps() for rank in ranks])
        if most < _FEW_STEPS or most == sys.maxsize:
            return None
        most = min(most, MOST_STEPS)
        if self._is_lone:
            room_s = self._env.peek() - now_s
            if room_s < most * group.decode_step_s:
                most = int(room_s / group.decode_step_s) + 1
        if group.mail:
            most = min(most, self._spec.receive_interval - group.unheard)
        if most < _FEW_STEPS:
            return None
        batches = [(rank.num_decoding, rank.coming_contexts(most)) for rank in ranks]
        coming = timer.coming(batches, most)
        if coming is None:
            return None
        stretch = Stretch(timer, now_s, batches, *coming)
        if not now_s < stretch.bounds_s[-1] < math.inf:
            raise _no_time((float(stretch.bounds_s[-1]) - now_s) / most)
        return stretch

    def settle(self, group: Group) -> None:
        """End the stretch of `group`, if it is in one, with the step under way, which is left to be completed."""
        stretch, group.stretch = group.stretch, None
        if stretch is None or stretch.ends is None:
            return
        steps = stretch.begun(self._env.now, group.index < self._turn)
        ends_s = self._take(group, stretch, steps)
        if steps < len(stretch.step_s):
            self._env.hasten(stretch.ends, ends_s, 1 + group.index)

    def _take(self, group: Group, stretch: Stretch, steps: int) -> float:
        """Take `steps` of a stretch, the last of them only planned; returns when that ends."""
        ranks, interval = group.ranks, self._spec.receive_interval
        stretch.timer.take(steps)
        used = [rank.coast(steps) for rank in ranks]
        if interval > 1:
            group.unheard = (group.unheard + steps - 1) % interval + 1
        if self._record_steps:
            waiting = sum([len(rank.waiting) for rank in ranks])
            self.log.stretch(stretch, steps, used, group.index, waiting)
        self.num_steps += steps
        if steps > 1:
            self.now_s = max(self.now_s, float(stretch.bounds_s[steps - 1]))
        group.decode_step_s = float(stretch.step_s[steps - 1])
        return float(stretch.bounds_s[steps])

    def _record_step(self, group: Group, start_s: float, step_s: float) -> None:
        prompt = seqs = context = blocks = waiting = 0
        for rank in group.ranks:
            work = rank.work
            prompt += work.prefill_tokens
            seqs += work.decode_seqs
            context += work.decode_context_tokens
            blocks += rank.total_blocks - rank.free_blocks
            waiting += len(rank.waiting)
        found = found_tokens(group.ranks) if self._has_caches else 0
        row = (1, start_s, step_s, group.index, prompt, seqs, context, blocks, waiting, group.timer.draw)
        self.log.step((*row, found))

    def _deliver(self, group: Group) -> None:
        for rank, request in group.mail:
            rank.enqueue(request)
        group.mail.clear()
        group.unheard = 0


def _no_time(step_s: float) -> InputError:
    return InputError(f"the step timer returned {step_s} s for a step; it must be positive and finite.")
