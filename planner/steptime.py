"""Time of steps by operation and by origin, and the grids on which costs are tabulated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.measurements import Curve, Origin, Surface

Floats = NDArray[np.float64]

TOKENS: Floats = np.unique(np.round(np.geomspace(1, 2**25, 201)))
"""Grid of tokens at which token-wise terms are tabulated; its end is beyond any group of ranks."""
SEQS: Floats = np.unique(np.round(np.geomspace(1, 4096, 37)))
LENGTHS: Floats = np.round(np.geomspace(16, 2**20, 49))


@dataclass(frozen=True, slots=True)
class StepTime:
    """Time of steps by operation: `terms[op]` and `origin[code]` are seconds, arrays of one shape."""

    terms: Mapping[str, Floats]
    origin: Mapping[str, Floats]

    @property
    def total_s(self) -> Floats:
        """Step time [s]."""
        return np.asarray(np.sum(list(self.terms.values()), axis=0))

    def origin_share(self) -> dict[str, float]:
        """Share of the summed time by origin; sums to 1."""
        seconds = {name: float(np.sum(values)) for name, values in self.origin.items()}
        total = sum(seconds.values()) or 1.0
        return {name: value / total for name, value in seconds.items()}


Part = tuple[dict[str, Floats], dict[str, Floats]]
"""Part of a step: seconds by operation, and by origin."""


class Sum:
    """Accumulates seconds by operation and by origin on one grid."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.terms: dict[str, Floats] = {}
        self.origin = np.zeros((len(Origin), *shape))

    def add(self, label: str, seconds: Floats, origin: NDArray[np.int8] | Origin) -> None:
        """Add `seconds` to the term `label`, booked under one origin or under a code per grid point."""
        self.terms[label] = self.terms.get(label, 0.0) + seconds
        if isinstance(origin, Origin):
            self.origin[int(origin)] += seconds
        else:
            for code in range(len(Origin)):
                self.origin[code] += np.where(origin == code, seconds, 0.0)

    def scaled(self, factor: Callable[[str], float]) -> Sum:
        """This sum with every operation times `factor` of its label; origins keep their shares."""
        before = np.sum(list(self.terms.values()), axis=0) if self.terms else 0.0
        self.terms = {label: seconds * factor(label) for label, seconds in self.terms.items()}
        after = np.sum(list(self.terms.values()), axis=0) if self.terms else 0.0
        self.origin = self.origin * np.where(before > 0, after / np.where(before > 0, before, 1.0), 1.0)
        return self

    def curve(self, label: str, curve: Curve, x: Floats, count: float | Floats = 1.0) -> None:
        """Add `count` times the `curve` at `x`; `count` may differ from point to point."""
        self.add(label, curve.seconds(x) * count, curve.origin(x))

    def surface(
        self, label: str, surface: Surface, x: Floats, y: Floats, count: float = 1.0, least: Origin = Origin.MEASURED
    ) -> None:
        """Add `count` times the `surface` at (`x`, `y`), trusted no more than `least`."""
        self.add(label, surface.seconds(x, y) * count, np.maximum(surface.origin(x, y), np.int8(least)))


def bilinear(x: Floats, y: Floats, values: Floats) -> Floats:
    """`values` [SEQS, LENGTHS] at points (x, y), linear in both within the grid, clamped outside."""
    i = np.clip(np.searchsorted(SEQS, x, side="right") - 1, 0, len(SEQS) - 2)
    j = np.clip(np.searchsorted(LENGTHS, y, side="right") - 1, 0, len(LENGTHS) - 2)
    u = np.clip((x - SEQS[i]) / (SEQS[i + 1] - SEQS[i]), 0.0, 1.0)
    v = np.clip((y - LENGTHS[j]) / (LENGTHS[j + 1] - LENGTHS[j]), 0.0, 1.0)
    low = values[i, j] * (1 - v) + values[i, j + 1] * v
    high = values[i + 1, j] * (1 - v) + values[i + 1, j + 1] * v
    return np.asarray(low * (1 - u) + high * u)


def join(parts: list[Part]) -> StepTime:
    """One step from `parts`."""
    terms: dict[str, Floats] = {}
    origin: dict[str, Floats] = {o.name.lower(): np.zeros(()) for o in Origin}
    for part_terms, part_origin in parts:
        for label, seconds in part_terms.items():
            terms[label] = terms.get(label, 0.0) + seconds
        for name, seconds in part_origin.items():
            origin[name] = origin[name] + seconds
    return StepTime(terms, origin)
