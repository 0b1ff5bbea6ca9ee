"""Finds measured tables of a system, loads them when first asked, and picks the series nearest to a shape.

Nearness is a distance in log space with a penalty for another engine and for another number format, so one rule
decides between "this engine, another shape" and "another engine, this shape".
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.errors import ProfileError
from planner.measurements.curves import Origin
from planner.measurements.store import Table, read_table
from planner.textfile import is_file, read_json

Floats = NDArray[np.float64]

OTHER_ENGINE = 1.0
"""Penalty in units of ln(size ratio): another engine's kernel is as far as a shape of 2.7 x the size."""
OTHER_FORMAT = 1.5
_FARTHEST = 6.0
_SAME = 1e-9


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A measured series and its weight (weights of a query sum to 1)."""

    series: int
    weight: float


@dataclass(frozen=True, slots=True)
class Match:
    """Neighbours of a query, and how well they answer it. `fmt` and `engine` are those of the nearest."""

    table: Table
    neighbours: tuple[Neighbour, ...]
    origin: Origin
    engine: str


class Library:
    """Measured tables of one system; a table is read when first asked for."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._tables: dict[str, Table | None] = {}

    def table(self, op: str) -> Table | None:
        """Table of an operation, or None when it was not measured."""
        if op not in self._tables:
            path = None if self.directory is None else self.directory / f"{op}.npz"
            self._tables[op] = read_table(path) if path is not None and is_file(path) else None
        return self._tables[op]

    @cached_property
    def meta(self) -> Mapping[str, Any]:
        """Contents of meta.json, empty for a system that was not measured."""
        path = None if self.directory is None else self.directory / "meta.json"
        found = read_json(path, ProfileError) if path is not None and is_file(path) else {}
        if not isinstance(found, dict):
            raise ProfileError(f"{path}: a JSON object is expected, not {type(found).__name__}. Import it again.")
        return found

    def version(self, op: str, engine: str) -> str:
        """Version of `engine` whose kernels are in table `op`."""
        return str(self.meta.get("versions", {}).get(op, {}).get(engine, ""))


def measured_directory(name: str) -> Path | None:
    """Folder of measured tables of system `name`: user directories of MOEPLAN_PROFILES first, then the bundled one."""
    listed = [Path(part) for part in os.environ.get("MOEPLAN_PROFILES", "").split(os.pathsep) if part]
    for directory in (*listed, Path(str(resources.files("hardware_profiles")))):
        for folder in (directory / "measured" / name, directory / name):
            if is_file(folder / "meta.json"):
                return folder
    return None


def find(
    table: Table | None,
    engine: str,
    shape: Mapping[str, tuple[float, float]],
    penalties: Floats | None = None,
    mask: NDArray[np.bool_] | None = None,
    count: int = 4,
    derived: Mapping[str, NDArray[Any]] | None = None,
    crowd: tuple[NDArray[np.int64], int] | None = None,
) -> Match | None:
    """Nearest series to `shape` = {column: (value, weight)}; None when nothing is near enough.

    An exact series answers alone. Otherwise up to `count` series share the answer with weights 1 / distance^2;
    the origin is INTERPOLATED when the query lies within the chosen series in every dimension. `derived` adds
    columns [series] that the table does not store; `crowd` = (group of each series, most of one group).
    """
    if table is None or not len(table.start) - 1:
        return None
    distance = _engine_penalty(table, engine)
    extra = distance.copy() if penalties is None else distance + penalties
    columns = {**table.keys, **(derived or {})}
    missing = ", ".join(shape.keys() - columns.keys())
    if missing:
        raise ProfileError(
            f"measured table {table.op} lacks the column {missing}. Run `moeplan profiles import` again."
        )
    squared = np.zeros(len(distance))
    for column, (value, weight) in shape.items():
        squared += (weight * np.log(columns[column] / value)) ** 2
    distance = np.sqrt(squared) + extra
    if mask is not None:
        distance = np.where(mask, distance, np.inf)
    nearest = int(np.argmin(distance))
    if distance[nearest] > _FARTHEST:
        return None
    name = table.label("engine", nearest) if "engine" in table.keys else engine
    if distance[nearest] - extra[nearest] < _SAME:
        origin = Origin.MEASURED if extra[nearest] == 0 else Origin.EXTRAPOLATED
        return Match(table, (Neighbour(nearest, 1.0),), origin, name)
    near = np.flatnonzero(distance <= distance[nearest] + 1.0)
    near = near[np.argsort(distance[near], kind="stable")]
    chosen = (near if crowd is None else _thinned(near, *crowd))[:count]
    weights = 1.0 / distance[chosen] ** 2
    weights /= weights.sum()
    own = extra[chosen] == 0
    inside = bool(own.any()) and all(_bracketed(columns[c][chosen[own]], v) for c, (v, _) in shape.items())
    neighbours = tuple(Neighbour(int(s), float(w)) for s, w in zip(chosen, weights, strict=True))
    return Match(table, neighbours, Origin.INTERPOLATED if inside else Origin.EXTRAPOLATED, name)


def _thinned(series: NDArray[np.int64], groups: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """`series` without those that follow `most` others of their group."""
    mine = groups[series]
    earlier = np.tril(mine[:, None] == mine[None, :], -1).sum(axis=1)
    return np.asarray(series[earlier < most])


def _bracketed(values: NDArray[Any], wanted: float) -> bool:
    return bool(values.min() <= wanted <= values.max())


def _engine_penalty(table: Table, engine: str) -> Floats:
    """0 for the engine's own series, else `OTHER_ENGINE` plus a hair so that ties always break the same way."""
    if "engine" not in table.keys:
        return np.zeros(len(table.start) - 1)
    order = ("vllm", "sglang", "trtllm", "deepep", "nccl")
    cost = [
        0.0 if name == engine else OTHER_ENGINE + 1e-6 * order.index(name) if name in order else OTHER_ENGINE
        for name in table.categories["engine"]
    ]
    return np.array(cost)[table.keys["engine"]]


def format_penalty(table: Table, column: str, wanted: Sequence[str]) -> Floats:
    """Penalty of each series for its format: 0 for `wanted[0]`, growing along the list, infinite off it."""
    cost = [
        OTHER_FORMAT * (wanted.index(name) > 0) + 0.25 * wanted.index(name) if name in wanted else np.inf
        for name in table.categories[column]
    ]
    return np.array(cost)[table.keys[column]]
