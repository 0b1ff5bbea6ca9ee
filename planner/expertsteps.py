"""What the router did in the steps of a run: the cached draws that the steps used, as columns and as means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.loads import NUM_DRAWS, LoadTable, nearest_knot, on_knots
from planner.records import StepTable

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertSteps:
    """Mean over MoE layers for every step; each column is [num_steps].

    `max_over_mean` is the load of the busiest rank over the even share of all assignments, `active_experts` the most
    experts with a token on any rank, `drop_rate` the share of assignments beyond capacity and `fully_dropped_rate`
    the share of tokens that lost all of theirs. `hit_rate` is the share of needed experts found in HBM, `miss_bytes`
    what the step fetched of the others (all layers).
    """

    max_over_mean: Floats
    active_experts: Floats
    drop_rate: Floats
    fully_dropped_rate: Floats
    hit_rate: Floats
    miss_bytes: Floats

    def columns(self) -> dict[str, Floats]:
        """The columns by name."""
        return {name: getattr(self, name) for name in self.__slots__}


def expert_steps(
    loads: Sequence[Mapping[str, LoadTable]], misses: Mapping[str, Mapping[str, Floats]], steps: StepTable
) -> ExpertSteps:
    """Columns for `steps`, whose draws count through the epochs of `loads` (each prefill and decode).

    `misses` are those of `planner.routedcost.RoutedCost.misses`, empty where all experts are in HBM.
    """
    tokens = steps.prefill_tokens + steps.decode_seqs
    knot, is_prefill = nearest_knot(tokens), (steps.prefill_tokens > 0).astype(int)
    epoch, draw = np.divmod(steps.draw, NUM_DRAWS)
    at = (epoch, is_prefill, knot, draw)
    tables = [[_summary(epoch[phase]) for phase in ("decode", "prefill")] for epoch in loads]
    stacked = {name: np.array([[t[name] for t in phases] for phases in tables]) for name in tables[0][0]}
    columns = {name: values[at] for name, values in stacked.items()}
    columns |= {"hit_rate": np.ones(len(steps)), "miss_bytes": np.zeros(len(steps))}
    if misses:
        by_phase = [misses[phase] for phase in ("decode", "prefill")]
        missed_at = (is_prefill, nearest_knot(tokens), draw)
        columns |= {
            name: np.array([found[name] for found in by_phase])[missed_at] for name in ("hit_rate", "miss_bytes")
        }
    return ExpertSteps(**columns)


def _summary(table: LoadTable) -> dict[str, Floats]:
    """Layer means [KNOTS, draws]."""
    question = table.question
    even = np.array(question.knots, dtype=float)[:, None] * question.selection.top_k / question.num_ranks
    found = {
        "max_over_mean": table.max_assigned.mean(axis=-1) / even,
        "active_experts": table.max_active.mean(axis=-1),
        "drop_rate": table.drop_rate,
        "fully_dropped_rate": table.fully_dropped_rate,
    }
    return {name: on_knots(values, question.knots) for name, values in found.items()}
