"""Popularity and placement over the steps of a run: a run is cut into epochs within which both stand still.

Traffic drifts from epoch to epoch; a placement stays what it was learned on until the next rebalance learns it anew
from the popularity seen since the last one. A rebalance moves experts over the links and, unless asynchronous, the
ranks wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from planner.cost import StepCost
from planner.loads import NUM_DRAWS, LoadTable, Question, on_knots, placement_of, weights_of
from planner.model.precision import stored_bytes
from planner.placement import Placement, moved, rebalance_seconds
from planner.routing import Measured
from planner.routing.drift import Drift
from planner.scheduler import RankWork
from planner.timer import CostTimer
from planner.ubatch import UbatchTimer

_LAYERS = 8
_KNOTS = (1, 4, 32, 512, 8192)
"""Representative layers and step sizes of an epoch; factors are ratios to the same layers at rest."""
HOST_S = 1.0
"""Host work of a rebalance (statistics, placing, maps): about 1 of 1.8 s on SGLang (sgl-project/sglang#6739, #7879)."""
_DISTINCT = 16
"""Different epochs of a run, half a half-life apart: more than the correlation of the loads reaches."""
_PHASES = ("prefill", "decode")


class EpochTimer:
    """A `StepTimer` that changes the expert part of `timer` from epoch to epoch.

    `num_groups` step in turn, so an epoch of n steps is n steps of each; `num_rebalances` and `stalled_s` add up what
    rebalancing cost every group so far, `moved_bytes` what the ranks of a replica fetched. Asynchronous moves take no
    time here: the link they share with the exchange is not contended.
    """

    def __init__(self, timer: CostTimer | UbatchTimer, cost: StepCost, num_groups: int) -> None:
        self._timer, self._cost, self._groups = timer, cost, num_groups
        settings = cost.experts
        drift = settings.drift or Drift()
        self._epoch_steps, self._epochs_between = drift.epoch_steps, 0
        if settings.rebalance_steps:
            self._epochs_between = -(-settings.rebalance_steps // drift.epoch_steps)
            self._epoch_steps = settings.rebalance_steps // self._epochs_between
        moe = next(layer.moe for layer, _ in cost.model.layer_kinds if layer.moe)
        self._kinds = [(layer, count) for layer, count in cost.model.layer_kinds if layer.stack == "decoder"]
        self._ask = {
            phase: replace(cost.routed.question(cost.experts.router(moe), phase), num_layers=_LAYERS, knots=_KNOTS)
            for phase in _PHASES
        }
        self._rest = {phase: cost.routed.drawn_seconds(phase, self._kinds, self._asked) for phase in _PHASES}
        question = self._ask["decode"]
        self._base = weights_of(question.law, question.num_experts, _LAYERS)
        self._path = drift.path(self._base, self._epoch_steps)
        self._placed, self._learned = placement_of(question), Measured("start", self._base)
        self._laws: list[Measured] = []
        self._seen: list[Measured] = []
        self._windows: dict[tuple[Measured, ...], Measured] = {}
        self._left, self._epoch = 0, -1
        self._paid_s: dict[int, float] = {}
        self.num_rebalances, self.stalled_s, self.moved_bytes = 0, 0.0, 0.0
        self.draw, self.link_s, self.misses = 0, 0.0, timer.misses
        self.loads: list[dict[str, LoadTable]] = []

    def step_s(self, ranks: Sequence[RankWork]) -> float:
        """Seconds of one lockstep step, with the wait for a rebalance where one is due."""
        if not self._left:
            self._advance()
        self._left -= 1
        seconds = self._timer.step_s(ranks)
        self.link_s = self._timer.link_s
        self.draw = self._epoch * NUM_DRAWS + self._timer.draw
        # Every group waits once for a rebalance, in its next step; the loop hands over the same list each time.
        owed_s = self.stalled_s - self._paid_s.get(id(ranks), 0.0)
        self._paid_s[id(ranks)] = self.stalled_s
        return seconds + owed_s

    def _advance(self) -> None:
        self._epoch += 1
        self._left = self._epoch_steps * self._groups
        law = self._traffic()
        if self._epochs_between and self._epoch and self._epoch % self._epochs_between == 0:
            self._rebalance()
        self._seen.append(law)
        factors = {}

        def ask(question: Question) -> Question:
            return replace(self._asked(question), law=law, learned=self._learned)

        self.loads.append(self._cost.routed.loads(ask))
        for phase in _PHASES:
            seconds = self._cost.routed.drawn_seconds(phase, self._kinds, ask)
            mean = self._rest[phase].mean(axis=1, keepdims=True)
            factors[phase] = on_knots(seconds / np.maximum(mean, 1e-300), _KNOTS)
        self._timer.use_factors(factors)

    def _traffic(self) -> Measured:
        """Popularity of this epoch; a long run walks the path to its end and back, so it is not drawn anew."""
        turn = self._epoch % (2 * _DISTINCT - 2)
        index = min(turn, 2 * _DISTINCT - 2 - turn)
        while len(self._laws) <= index:
            self._laws.append(Measured(f"epoch {len(self._laws)}", next(self._path)))
        return self._laws[index]

    def _asked(self, question: Question) -> Question:
        return replace(question, num_layers=_LAYERS, knots=_KNOTS)

    def _rebalance(self) -> None:
        """Learn the placement anew from the epochs since the last time."""
        window = tuple(sorted(self._seen, key=self._laws.index))
        if window not in self._windows:
            self._windows[window] = Measured("window", np.mean([law.load for law in window], axis=0))
        self._learned, self._seen = self._windows[window], []
        placed = placement_of(replace(self._ask["decode"], learned=self._learned))
        stall_s, moved_bytes = rebalance(self._cost, self._placed, placed)
        self._placed = placed
        self.num_rebalances += 1
        self.moved_bytes += moved_bytes
        self.stalled_s += 0.0 if self._cost.experts.rebalance_async else stall_s


def rebalance(cost: StepCost, before: Placement, after: Placement) -> tuple[float, float]:
    """Seconds that ranks wait while experts of all layers move from `before` to `after`, host work included, and bytes.

    The placements are of representative layers; bytes are those of all ranks of one replica. Only for models with
    experts.
    """
    system, layout, model = cost.cluster.system, cost.layout, cost.model
    layer = next(layer for layer, _ in model.layer_kinds if layer.moe)
    assert layer.moe is not None
    stored = sum(stored_bytes(w, model.format_of(w.part)) for w in layer.weights if w.shard == "expert")
    expert_bytes = stored / (layer.moe.num_experts * layout.moe_tp)
    cross = (system.scale_out or system.scale_up).bytes_per_s
    moves, layers = moved(before, after), model.num_moe_layers / after.num_layers
    seconds = rebalance_seconds(moves, expert_bytes, system.scale_up.bytes_per_s, cross)
    return HOST_S + seconds * layers / layout.pp, moves.num_bytes(expert_bytes) * layers
