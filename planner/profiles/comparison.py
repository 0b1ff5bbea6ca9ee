"""`moeplan profiles compare`: how much faster one profile is than another, operation by operation.

Rows are paired by all columns but the time. Where the axis grids of a series differ, the other profile's time is
interpolated between its own rows (log-log), never beyond them, so every ratio rests on measurements of both.
Series whose engines differ pair when `any_engine` is set or when the two profiles share no engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.errors import ProfileError
from planner.profiles.inspect import profile_folder, read_profile_rows
from planner.profiles.rows import Rows

Facts = dict[str, Any]
Floats = NDArray[np.float64]
_BY = ("engine", "fmt", "kv_fmt", "op", "mode")
_FAR = 1.2
"""A row that differs by more is counted as a disagreement."""


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Rows of the first profile that the second can answer, and time ratio first / second of each."""

    rows: Rows
    other_s: Floats
    ratio: Floats


def compare(first: str, second: str, *, worst: int = 10) -> tuple[Facts, list[Pairs]]:
    """Facts of `profiles compare --json` and the pairs behind them.

    Raises ProfileError when a profile cannot be read or the two have no row in common.
    """
    names, tables = [], []
    for name in (first, second):
        meta, found, faults = read_profile_rows(profile_folder(name))
        if faults:
            raise ProfileError("\n".join(faults))
        names.append(str(meta.get("system") or name))
        tables.append({rows.op.name: rows for rows in found})
    pairs = []
    for op in sorted(set(tables[0]) & set(tables[1])):
        paired = pair(tables[0][op], tables[1][op])
        if len(paired.rows):
            pairs.append(paired)
    if not pairs:
        raise ProfileError(f"{names[0]} and {names[1]} have no row in common: nothing to compare.")
    return {
        "first": names[0],
        "second": names[1],
        "ratio": f"time of {names[0]} over time of {names[1]}",
        "groups": [group for paired in pairs for group in _groups(paired)],
        "worst": _worst(pairs, worst),
        "only_first": sorted(set(tables[0]) - set(tables[1])),
        "only_second": sorted(set(tables[1]) - set(tables[0])),
    }, pairs


def pair(first: Rows, second: Rows) -> Pairs:
    """Rows of `first` that `second` measured, on its grid or between its points."""
    shared = set(np.unique(first.columns["engine"])) & set(np.unique(second.columns["engine"]))
    without = () if shared else ("engine",)
    axis = first.op.axes[-1].name
    others = [c.name for c in first.op.columns if c.name != axis and c.name not in without]
    ours, theirs = _series(first, others), _series(second, others)
    other_s = np.full(len(first), np.nan)
    for key, mine in ours.items():
        if key in theirs:
            known = theirs[key]
            other_s[mine] = _between(first.columns[axis][mine], second.columns[axis][known], second.seconds[known])
    found = np.isfinite(other_s)
    rows = first.take(np.flatnonzero(found))
    return Pairs(rows, other_s[found], rows.seconds / other_s[found])


def _series(rows: Rows, names: list[str]) -> dict[tuple[Any, ...], NDArray[np.int64]]:
    found: dict[tuple[Any, ...], list[int]] = {}
    columns = [rows.columns[name].tolist() for name in names]
    for at, key in enumerate(zip(*columns, strict=True)):
        found.setdefault(key, []).append(at)
    return {key: np.array(at, dtype=np.int64) for key, at in found.items()}


def _between(x: NDArray[Any], known_x: NDArray[Any], known_s: Floats) -> Floats:
    """Times at `x` on the log-log line through the known points, NaN outside them."""
    order = np.lexsort((known_s, known_x))
    grid, first = np.unique(known_x[order], return_index=True)
    log_s = np.interp(np.log(x), np.log(grid), np.log(known_s[order][first]))
    inside = (x >= grid[0]) & (x <= grid[-1])
    return np.asarray(np.where(inside, np.exp(log_s), np.nan))


def _groups(pairs: Pairs) -> Iterator[Facts]:
    names = [name for name in _BY if name in pairs.rows.columns]
    for key, rows in _series(pairs.rows, names).items():
        ratio = pairs.ratio[rows]
        low, median, high = (float(value) for value in np.quantile(ratio, (0.1, 0.5, 0.9)))
        yield {
            "op": pairs.rows.op.name,
            **dict(zip(names, key, strict=True)),
            "label": " ".join(str(part) for part in key),
            "rows": len(rows),
            "p10": low,
            "median": median,
            "p90": high,
            "share_off_by_20_percent": float(np.mean((ratio > _FAR) | (ratio < 1 / _FAR))),
        }


def _worst(pairs: list[Pairs], worst: int) -> list[Facts]:
    """The rows that differ most in either direction."""
    far = [(abs(float(np.log(r))), p, at) for p in pairs for at, r in _farthest(p, worst)]
    far.sort(key=lambda item: (-item[0], item[1].rows.describe(item[2])))
    return [
        {
            "row": p.rows.describe(at),
            "first_us": float(p.rows.seconds[at] * 1e6),
            "second_us": float(p.other_s[at] * 1e6),
            "ratio": float(p.ratio[at]),
        }
        for _, p, at in far[:worst]
    ]


def _farthest(pairs: Pairs, count: int) -> list[tuple[int, float]]:
    order = np.argsort(-np.abs(np.log(pairs.ratio)), kind="stable")[:count]
    return [(int(at), float(pairs.ratio[at])) for at in order]


def write_comparison(out: Path, facts: Facts, pairs: list[Pairs]) -> list[Path]:
    """Write `ratios.csv` and `ratios.svg` into `out`. Raises ProfileError when that is impossible."""
    import csv

    from planner.profiles.plot import ratio_figure

    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "ratios.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["op", "label", "rows", "p10", "median", "p90", "share_off_by_20_percent"])
            for group in facts["groups"]:
                numbers = [f"{group[name]:.4g}" for name in ("p10", "median", "p90", "share_off_by_20_percent")]
                writer.writerow([group["op"], group["label"], group["rows"], *numbers])
        ratio_figure(out / "ratios.svg", facts, pairs)
    except OSError as error:
        raise ProfileError(f"{out}: {error.strerror}. Choose a folder you may write to.") from error
    return [out / "ratios.csv", out / "ratios.svg"]
