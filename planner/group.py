"""Ranks that step together."""

from __future__ import annotations

import simpy

from planner.coasting import CoastingTimer, StepTimer, Stretch
from planner.enginespec import EngineSpec
from planner.lockstep import PrefillHold, PromptHold
from planner.scheduler import Rank, RankWork, Request


def _hold(spec: EngineSpec) -> PrefillHold | PromptHold | None:
    """Who decides whether prompts may enter a step, None where they always may."""
    if spec.ranks_per_group == 1:
        return None if spec.batch_wait is None else PromptHold(spec.batch_wait)
    balance = spec.prefill_balance
    return PrefillHold(balance) if balance is not None and balance.enabled else None


class Group:
    """Ranks that step together; `wake` is the event it sleeps on while it has no requests.

    Requests wait in `mail` until the scheduler looks for new ones; `unheard` counts its steps since the last time.
    `works` are those of the ranks of its process, `stretch` is what it is in while its batches stay. `timer` is that of
    its steps, `own_timer` while nothing slows it down; `decode_step_s` is about what a step without prompts takes, 0
    while unknown.
    """

    __slots__ = (
        "decode_step_s",
        "hold",
        "in_flight",
        "index",
        "mail",
        "own_timer",
        "process",
        "ranks",
        "stretch",
        "timer",
        "unheard",
        "wake",
        "works",
    )

    def __init__(self, index: int, spec: EngineSpec, timer: StepTimer, ranks: list[Rank]) -> None:
        self.index = index
        self.own_timer = self.timer = timer.of_group(index) if isinstance(timer, CoastingTimer) else timer
        self.mail: list[tuple[Rank, Request]] = []
        self.unheard = spec.receive_interval
        self.ranks = ranks
        self.works: list[RankWork] = []
        self.hold = _hold(spec)
        self.in_flight = 0
        self.decode_step_s = 0.0
        self.stretch: Stretch | None = None
        self.wake: simpy.Event | None = None
        self.process: simpy.Process | None = None
