"""Ranks that step together, and what times their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import simpy

from planner.coasting import Stretch
from planner.enginespec import EngineSpec
from planner.lockstep import PrefillHold, PromptHold
from planner.scheduler import Rank, RankWork, Request


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


def _hold(spec: EngineSpec) -> PrefillHold | PromptHold | None:
    """Who decides whether prompts may enter a step, None where they always may."""
    if spec.ranks_per_group == 1:
        return None if spec.batch_wait is None else PromptHold(spec.batch_wait)
    balance = spec.prefill_balance
    return PrefillHold(balance) if balance is not None and balance.enabled else None


class Group:
    """Ranks that step together; `wake` is the event it sleeps on while it has no requests.

    Requests wait in `mail` until the scheduler looks for new ones; `unheard` counts its steps since the last time.
    `works` are those of the ranks of its process, `stretch` is what it is in while its batches stay, and `last_step_s`
    how long the last step took outside of one.
    """

    __slots__ = (
        "hold",
        "in_flight",
        "index",
        "last_step_s",
        "mail",
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
        self.timer = timer
        self.mail: list[tuple[Rank, Request]] = []
        self.unheard = spec.receive_interval
        self.ranks = ranks
        self.works: list[RankWork] = []
        self.hold = _hold(spec)
        self.in_flight = 0
        self.last_step_s = 0.0
        self.stretch: Stretch | None = None
        self.wake: simpy.Event | None = None
        self.process: simpy.Process | None = None
