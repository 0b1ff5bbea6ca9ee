"""Time of steps by operation and by origin, and the grids on which costs are tabulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from planner.measurements import Curve, Origin, Surface

Floats = NDArray[np.float64]
Codes = NDArray[np.int8]

TOKENS: Floats = np.unique(np.round(np.geomspace(1, 2**25, 201)))
"""Grid of tokens at which token-wise terms are tabulated; its end is beyond any group of ranks."""
SEQS: Floats = np.unique(np.round(np.geomspace(1, 4096, 37)))
LENGTHS: Floats = np.round(np.geomspace(16, 2**20, 49))
_TOKEN_GAPS = np.append(np.diff(TOKENS), 1.0)
_ORIGINS = tuple(o.name.lower() for o in Origin)


class Part(Protocol):
    """Part of a step."""

    def terms(self) -> Mapping[str, Floats]:
        """Seconds by operation."""
        ...

    def origin(self) -> Mapping[str, Floats]:
        """Seconds by origin."""
        ...


class StepTime:
    """Time of steps by operation: `terms[op]` and `origin[code]` are seconds, arrays of one shape.

    Made of `parts`, whose origins are looked up only when they are asked for: a search of layouts never does.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    @cached_property
    def terms(self) -> Mapping[str, Floats]:
        """Seconds by operation."""
        return _added(part.terms() for part in self.parts)

    @cached_property
    def origin(self) -> Mapping[str, Floats]:
        """Seconds by origin."""
        found = _added(part.origin() for part in self.parts)
        return {name: found.get(name, np.zeros(())) for name in _ORIGINS}

    @cached_property
    def total_s(self) -> Floats:
        """Step time [s]."""
        return np.asarray(np.sum(list(self.terms.values()), axis=0))

    def origin_share(self) -> dict[str, float]:
        """Share of the summed time by origin; sums to 1."""
        seconds = {name: float(np.sum(values)) for name, values in self.origin.items()}
        total = sum(seconds.values()) or 1.0
        return {name: value / total for name, value in seconds.items()}


def _added(parts: Iterable[Mapping[str, Floats]]) -> dict[str, Floats]:
    found: dict[str, Floats] = {}
    for part in parts:
        for name, seconds in part.items():
            found[name] = found[name] + seconds if name in found else seconds
    return found


class Sum:
    """Accumulates seconds by operation and by origin on one grid; origins are worked out when they are asked for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.terms: dict[str, Floats] = {}
        self._shape = shape
        self._bookings: list[Callable[[Floats], Floats]] = []
        self._origin: Floats | None = None
        self._stacked: Floats | None = None

    @property
    def origin(self) -> Floats:
        """Seconds by origin code, [codes, *shape]."""
        # Threads share sums: what is kept is whole before any of them can see it.
        if self._origin is None:
            found = np.zeros((len(Origin), *self._shape))
            for book in self._bookings:
                found = book(found)
            self._origin = found
        return self._origin

    @property
    def total(self) -> Floats:
        """Seconds of all operations together, [*shape]."""
        return np.asarray(self.stacked.sum(axis=0))

    @property
    def stacked(self) -> Floats:
        """Seconds by operation in the order of `terms`, [operations, *shape]."""
        if self._stacked is None:
            found = np.zeros((len(self.terms), *self._shape))
            for row, seconds in enumerate(self.terms.values()):
                found[row] = seconds
            self._stacked = found
        return self._stacked

    def add(self, label: str, seconds: Floats, origin: Codes | Origin | Callable[[], Codes]) -> None:
        """Add `seconds` to the term `label`, booked under one origin or under a code per grid point."""
        self._add(label, seconds)

        def book(before: Floats) -> Floats:
            codes = origin() if callable(origin) else origin
            for code in range(len(Origin)):
                before[code] += np.where(codes == code, seconds, 0.0)
            return before

        self._book(book)

    def add_sum(self, other: Sum, count: float = 1.0, label: str | None = None) -> None:
        """Add `count` times `other`, as the one term `label` if it is given."""
        if label is None:
            for name, seconds in other.terms.items():
                self._add(name, count * seconds)
        elif other.terms:
            self._add(label, count * other.total)
        self._book(lambda before: before + count * other.origin)

    def _book(self, book: Callable[[Floats], Floats]) -> None:
        self._bookings.append(book)
        self._origin = None

    def _add(self, label: str, seconds: Floats) -> None:
        self.terms[label] = self.terms[label] + seconds if label in self.terms else np.asarray(seconds)
        self._stacked = None

    def scaled(self, factor: Callable[[str], float]) -> Sum:
        """This sum with every operation times `factor` of its label; origins keep their shares."""
        factors = {label: factor(label) for label in self.terms}
        if all(value == 1.0 for value in factors.values()):
            return self
        before = self.total
        self.terms = {label: seconds * factors[label] for label, seconds in self.terms.items()}
        self._stacked = None
        ratio = np.where(before > 0, self.total / np.where(before > 0, before, 1.0), 1.0)
        self._book(lambda origin: origin * ratio)
        return self

    def curve(self, label: str, curve: Curve, x: Floats, count: float | Floats = 1.0) -> None:
        """Add `count` times the `curve` at `x`; `count` may differ from point to point."""
        self.add(label, curve.seconds(x) * count, lambda: curve.origin(x))

    def on_tokens(self, label: str, curve: Curve, count: float = 1.0, each: float = 1.0) -> None:
        """Add `count` times the `curve` at `each` times TOKENS; layouts share most curves, so answers are kept."""
        self.add(label, _on_tokens(curve, each) * count, lambda: curve.origin(TOKENS * each))

    def on_plane(
        self, label: str, surface: Surface, count: float = 1.0, ratio: float = 1.0, least: Origin = Origin.MEASURED
    ) -> None:
        """Add `count` times the `surface` at SEQS x LENGTHS / `ratio`, trusted no more than `least`; also kept."""
        x, y = SEQS[:, None], LENGTHS[None, :] / ratio
        self.add(label, _on_plane(surface, ratio) * count, lambda: np.maximum(surface.origin(x, y), np.int8(least)))

    def copy(self) -> Sum:
        """The same sum, to add more to."""
        found = Sum(self._shape)
        found.terms = dict(self.terms)
        found._bookings.append(lambda _: self.origin.copy())
        return found

    @classmethod
    def of(cls, part: Part) -> Sum:
        """`part` of a step as a sum on the grid on which it was read."""
        terms = dict(part.terms())
        found = cls(np.shape(next(iter(terms.values()))))
        found.terms = terms
        found._bookings.append(lambda _: np.array([part.origin()[name] for name in _ORIGINS]))
        return found


@lru_cache(maxsize=4096)
def _on_tokens(curve: Curve, each: float) -> Floats:
    return curve.seconds(TOKENS * each)


@lru_cache(maxsize=512)
def _on_plane(surface: Surface, ratio: float) -> Floats:
    return surface.seconds(SEQS[:, None], LENGTHS[None, :] / ratio)


@dataclass(frozen=True, slots=True)
class Fixed:
    """Seconds of one operation of one origin."""

    label: str
    seconds: Floats
    code: Origin

    def terms(self) -> Mapping[str, Floats]:
        """Seconds by operation."""
        return {self.label: self.seconds}

    def origin(self) -> Mapping[str, Floats]:
        """Seconds by origin."""
        return {self.code.name.lower(): self.seconds}


@dataclass(frozen=True, slots=True)
class Known:
    """Seconds by operation, and how to work out those by origin."""

    by_term: Mapping[str, Floats]
    by_origin: Callable[[], Mapping[str, Floats]]

    def terms(self) -> Mapping[str, Floats]:
        """Seconds by operation."""
        return self.by_term

    def origin(self) -> Mapping[str, Floats]:
        """Seconds by origin."""
        return self.by_origin()


@dataclass(frozen=True, slots=True)
class Line:
    """A sum on TOKENS read at tokens `x`."""

    table: Sum
    x: Floats

    def terms(self) -> Mapping[str, Floats]:
        """Seconds by operation."""
        return dict(zip(self.table.terms, linear(self.x, self.table.stacked), strict=True))

    def origin(self) -> Mapping[str, Floats]:
        """Seconds by origin."""
        return dict(zip(_ORIGINS, linear(self.x, self.table.origin), strict=True))


@dataclass(frozen=True, slots=True)
class Plane:
    """`share` times a sum on SEQS x LENGTHS read at sequences `x` and lengths `y`."""

    table: Sum
    x: Floats
    y: Floats
    share: float = 1.0

    def terms(self) -> Mapping[str, Floats]:
        """Seconds by operation."""
        return dict(zip(self.table.terms, self.share * bilinear(self.x, self.y, self.table.stacked), strict=True))

    def origin(self) -> Mapping[str, Floats]:
        """Seconds by origin."""
        return dict(zip(_ORIGINS, self.share * bilinear(self.x, self.y, self.table.origin), strict=True))


def linear(x: Floats, values: Floats) -> Floats:
    """`values` [rows, TOKENS] at tokens `x`: linear within the grid, clamped outside; [rows, *x.shape]."""
    x = np.minimum(np.maximum(x, TOKENS[0]), TOKENS[-1])
    i = np.searchsorted(TOKENS, x, side="right") - 1
    j = np.minimum(i + 1, len(TOKENS) - 1)
    low = values[:, i]
    return np.asarray((values[:, j] - low) / _TOKEN_GAPS[i] * (x - TOKENS[i]) + low)


def bilinear(x: Floats, y: Floats, values: Floats) -> Floats:
    """`values` [..., SEQS, LENGTHS] at points (x, y), linear in both within the grid, clamped outside."""
    i, u = _between(SEQS, x)
    j, v = _between(LENGTHS, y)
    low = values[..., i, j] * (1 - v) + values[..., i, j + 1] * v
    high = values[..., i + 1, j] * (1 - v) + values[..., i + 1, j + 1] * v
    return np.asarray(low * (1 - u) + high * u)


def _between(grid: Floats, x: Floats) -> tuple[Any, Floats]:
    """Lower grid index and share of the way to the next, clamped to the grid."""
    i = np.minimum(np.maximum(np.searchsorted(grid, x, side="right") - 1, 0), len(grid) - 2)
    return i, np.minimum(np.maximum((x - grid[i]) / (grid[i + 1] - grid[i]), 0.0), 1.0)
