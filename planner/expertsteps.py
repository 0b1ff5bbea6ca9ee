"""What the router did in the steps of a run: the cached draws that the steps used, as columns and as means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.loads import NUM_DRAWS, LoadTable, nearest_knot
from planner.records import StepTable

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertSteps:
    """Mean over MoE layers for every step; each column is [num_steps].

    `max_over_mean` is the load of the busiest rank over the even share of all assignments, `active_experts` the most
    experts with a token on any rank, `drop_rate` the share of assignments beyond capacity and `fully_dropped_rate`
    the share of tokens that lost all of theirs.
    """

    max_over_mean: Floats
    active_experts: Floats
    drop_rate: Floats
    fully_dropped_rate: Floats

    def columns(self) -> dict[str, Floats]:
        """The columns by name."""
        return {name: getattr(self, name) for name in self.__slots__}


def expert_steps(loads: Sequence[Mapping[str, LoadTable]], steps: StepTable) -> ExpertSteps:
    """Columns for `steps`, whose draws count through the epochs of `loads` (each prefill and decode)."""
    tokens = steps.prefill_tokens + steps.decode_seqs
    knot, is_prefill = nearest_knot(tokens, loads[0]["decode"].question.knots), (steps.prefill_tokens > 0).astype(int)
    epoch, draw = np.divmod(steps.draw, NUM_DRAWS)
    at = (epoch, is_prefill, knot, draw)
    tables = [[_summary(epoch[phase]) for phase in ("decode", "prefill")] for epoch in loads]
    stacked = {name: np.array([[t[name] for t in phases] for phases in tables]) for name in ExpertSteps.__slots__}
    return ExpertSteps(**{name: values[at] for name, values in stacked.items()})


def _summary(table: LoadTable) -> dict[str, Floats]:
    """Layer means [knots, draws]."""
    question = table.question
    even = np.array(question.knots, dtype=float)[:, None] * question.selection.top_k / question.num_ranks
    return {
        "max_over_mean": table.max_assigned.mean(axis=-1) / even,
        "active_experts": table.max_active.mean(axis=-1),
        "drop_rate": table.drop_rate,
        "fully_dropped_rate": table.fully_dropped_rate,
    }
