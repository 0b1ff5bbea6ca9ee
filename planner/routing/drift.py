"""How the popularity of experts moves while a deployment runs.

Log-loads follow a first-order autoregression, whose correlation halves every half-life, and jump when the mix of
tasks changes (handbook serving 7.4: hot sets are stable for tens to hundreds of iterations, a change of dataset
moves them). Layers move independently.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from planner.errors import InputError
from planner.routing.experts import Floats
from planner.routing.laws import PROMPT_SPREAD

_SEED = 20261122


@dataclass(frozen=True, slots=True)
class Drift:
    """`half_life_steps` of the correlation of log-loads, `switch_steps` between changes of the dominant task.

    None leaves either out. A task strays from mixed traffic as far as a prompt does (`laws.PROMPT_SPREAD`).
    """

    half_life_steps: float | None = None
    switch_steps: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("half-life", self.half_life_steps), ("switch", self.switch_steps)):
            if value is not None and not 1 <= value < float("inf"):
                raise InputError(f"drift {name} of {value:g} steps: use 1 step or more")

    @property
    def epoch_steps(self) -> int:
        """Steps over which popularity may be taken as constant."""
        parts = [self.half_life_steps / 2 if self.half_life_steps else np.inf, self.switch_steps or np.inf]
        return int(max(1.0, min(parts))) if np.isfinite(min(parts)) else 2**31

    def path(self, base: Floats, epoch_steps: int) -> Iterator[Floats]:
        """Loads [layers, experts] every `epoch_steps` steps, without end; at first `base`, unless a task dominates."""
        log = np.log(base)
        centre = log.mean(axis=1, keepdims=True)
        sigma = log.std(axis=1, keepdims=True)
        kept = 2.0 ** (-epoch_steps / self.half_life_steps) if self.half_life_steps else 1.0
        rng = np.random.default_rng(_SEED)
        moved = log - centre
        for epoch in count():
            yield np.exp(centre + moved) * self._task(epoch * epoch_steps, log.shape)
            moved = kept * moved + np.sqrt(1 - kept**2) * sigma * rng.standard_normal(log.shape)

    def _task(self, step: int, shape: tuple[int, ...]) -> Floats:
        if not self.switch_steps:
            return np.ones(shape)
        rng = np.random.default_rng([_SEED, step // self.switch_steps])
        return PROMPT_SPREAD.weights(shape[1], shape[0], rng)
