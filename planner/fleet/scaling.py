"""How many replicas a load wants, and how an autoscaler follows it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

HOLD_S = 300.0
"""A fleet shrinks to the most it wanted in this time: the default of Kubernetes (downscale stabilisation of
HorizontalPodAutoscaler v2, `HPAScalingRules`, read 2026-11-22)."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Replicas wanted: as many as take the load times `headroom` at `per_replica_per_s` each, and `spare` more.

    Never fewer than one and the spare ones, never more than `most`. A new replica serves `ready_s` after it was
    ordered and is paid from then on; a leaving one is paid until its requests are answered, `drain_s`. The load is
    known `delay_s` late.
    """

    per_replica_per_s: float
    headroom: float
    spare: int
    most: int
    ready_s: float
    drain_s: float
    delay_s: float
    hold_s: float = HOLD_S

    def wanted(self, rate_per_s: float) -> int:
        """Replicas for `rate_per_s` [requests/s]."""
        # The margin is for the rounding of the division: a load of exactly n replicas wants n.
        loaded = max(1, math.ceil(rate_per_s * self.headroom / self.per_replica_per_s - 1e-9))
        return min(self.most, loaded + self.spare)


class Autoscaler:
    """State of a fleet that follows its load: replicas that serve, start and leave. One call per step of `step_s`."""

    def __init__(self, policy: Policy, step_s: float, rate_per_s: float) -> None:
        self._policy, self._step_s = policy, step_s
        self.serving = policy.wanted(rate_per_s)
        self._starting: deque[tuple[int, int]] = deque()
        self._leaving: deque[tuple[int, int]] = deque()
        self._recent: deque[int] = deque(maxlen=max(1, round(policy.hold_s / step_s)))
        self._delayed: deque[float] = deque(maxlen=1 + round(policy.delay_s / step_s))
        self._step = 0

    @property
    def held(self) -> int:
        """Replicas that are paid for: those that serve, start and leave."""
        return self.serving + sum(n for _, n in self._starting) + sum(n for _, n in self._leaving)

    def follow(self, rate_per_s: float) -> None:
        """One step at `rate_per_s`: what is ready serves, and what the load of a while ago wants is ordered."""
        self._step += 1
        while self._starting and self._starting[0][0] <= self._step:
            self.serving += self._starting.popleft()[1]
        while self._leaving and self._leaving[0][0] <= self._step:
            self._leaving.popleft()
        self._delayed.append(rate_per_s)
        wanted = self._policy.wanted(self._delayed[0])
        self._recent.append(wanted)
        have = self.serving + sum(n for _, n in self._starting)
        if wanted > have:
            self._starting.append((self._step + self._steps(self._policy.ready_s), wanted - have))
        elif max(self._recent) < have:
            gone = min(have - max(self._recent), self.serving - 1)
            self.serving -= gone
            self._leaving.append((self._step + self._steps(self._policy.drain_s), gone))

    def _steps(self, seconds: float) -> int:
        return math.ceil(seconds / self._step_s - 1e-9)
