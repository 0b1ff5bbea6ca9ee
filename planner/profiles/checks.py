"""What is wrong with the rows of one operation, each finding with the row named.

impossible   faster than the data sheet allows, with 5 % slack
duplicate    the same case twice, by the same library
falling      less time for more work, beyond the row's own spread
outlier      a time far outside both neighbours, a heavy row far below the speed of its kernel, a window that saves
             nothing, a collective far below the links, or balanced routing slower than skewed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.hardware import System
from planner.measurements.links import INSIDE_SHARE
from planner.profiles.bounds import BUS, SLACK, Peaks, compute_bound, shortest_s, work
from planner.profiles.rows import Rows, group_numbers

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

KINDS = ("impossible", "duplicate", "falling", "outlier")
FALL = 0.10
"""Repeats of one case agree within a few percent; a fall by more is a fault of the measurement."""
SPIKE = 1.5
_HEAVY_FLOP = 1e12
_FAR_SLOWER = 10.0
_SLOW_LINK = 3.0
_FLOOR_S = 10e-6
_SKEWED_FASTER = 1.25
_WINDOW_FLOP = 1e11
"""Shorter prompts are launch-bound, where a window cannot save time."""
_SHOWN_BOUND_DIGITS = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: its kind, the row in words, and why it is one. `factor` ranks findings of a kind."""

    op: str
    kind: str
    row: str
    why: str
    factor: float


def findings(rows: Rows, device: System | None) -> Iterator[Finding]:
    """Every fault of `rows`; without a hardware profile the fastest known device bounds them."""
    peaks = Peaks.fastest() if device is None else Peaks.of(device)
    yield from _impossible(rows, peaks)
    yield from _duplicates(rows)
    yield from _along_axes(rows)
    yield from _slow_for_its_kernel(rows, peaks)
    if rows.op.name == "prefill_attention":
        yield from _idle_windows(rows)
    if rows.op.name == "collective" and device is not None:
        yield from _slow_links(rows, device)
    if rows.op.name == "expert_gemm":
        yield from _skewed_faster(rows)


def _each(rows: Rows, kind: str, where: Ints, factor: Floats, why: Callable[[int], str]) -> Iterator[Finding]:
    for row in where:
        at = int(row)
        yield Finding(rows.op.name, kind, rows.describe(at), why(at), float(factor[at]))


def _impossible(rows: Rows, peaks: Peaks) -> Iterator[Finding]:
    bound = shortest_s(rows, peaks)
    ratio = bound / rows.seconds
    where = np.flatnonzero(ratio > SLACK)
    yield from _each(
        rows,
        "impossible",
        where,
        ratio,
        lambda at: f"{ratio[at]:.{_SHOWN_BOUND_DIGITS}g} x faster than {peaks.name} allows ({bound[at] * 1e6:.4g} us)",
    )


def _duplicates(rows: Rows) -> Iterator[Finding]:
    columns = [rows.columns[column.name] for column in rows.op.columns]
    if rows.quality is not None:
        columns.append(rows.quality.library)
    case = group_numbers(columns, len(rows))
    _, first = np.unique(case, return_index=True)
    again = np.setdiff1d(np.arange(len(rows)), first)
    ratio = np.ones(len(rows))
    yield from _each(rows, "duplicate", again, ratio, lambda at: "the same case, already measured by the same library")


def _along_axes(rows: Rows) -> Iterator[Finding]:
    """Falls and lone spikes along each axis, the other axis and all keys held."""
    for axis in rows.op.axes:
        others = [rows.columns[c.name] for c in rows.op.columns if c.name != axis.name]
        order, inside = _ordered(rows, axis.name, group_numbers(others, len(rows)))
        yield from _falls(rows, order, inside, axis.name)
        yield from _spikes(rows, order, inside, axis.name)


def _ordered(rows: Rows, axis: str, series: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Rows sorted by series and axis, and whether each has its predecessor in the same series."""
    order = np.lexsort((rows.seconds, rows.columns[axis], series))
    inside = np.zeros(len(order), dtype=np.bool_)
    same = series[order][1:] == series[order][:-1]
    inside[1:] = same & (rows.columns[axis][order][1:] != rows.columns[axis][order][:-1])
    return order, inside


def _falls(rows: Rows, order: Ints, inside: NDArray[np.bool_], axis: str) -> Iterator[Finding]:
    ratio = np.ones(len(rows))
    ratio[order[1:]] = rows.seconds[order[:-1]] / rows.seconds[order[1:]]
    noise = np.zeros(len(rows)) if rows.quality is None else 2 * rows.quality.spread
    fallen = inside & (ratio[order] > 1 + FALL + noise[order])
    before = np.empty(len(rows), dtype=np.int64)
    before[order[1:]] = order[:-1]

    def why(at: int) -> str:
        size, smaller = rows.columns[axis][at], rows.columns[axis][before[at]]
        return f"{ratio[at]:.3g} x faster at {axis}={size} than at {smaller} ({rows.seconds[before[at]] * 1e6:.4g} us)"

    yield from _each(rows, "falling", order[fallen], ratio, why)


def _spikes(rows: Rows, order: Ints, inside: NDArray[np.bool_], axis: str) -> Iterator[Finding]:
    """A row above both neighbours by `SPIKE`, or under both: the latter also by half."""
    if len(rows) < 3:
        return
    times = rows.seconds[order]
    middle = inside[1:-1] & inside[2:]
    low = np.minimum(times[:-2], times[2:])
    high = np.maximum(times[:-2], times[2:])
    factor = np.maximum(times[1:-1] / high, low / times[1:-1])
    ratio = np.ones(len(rows))
    ratio[order[1:-1]] = factor
    where = order[1:-1][middle & (factor > SPIKE)]
    yield from _each(rows, "outlier", where, ratio, lambda at: f"{ratio[at]:.3g} x outside both neighbours in {axis}")


def _slow_for_its_kernel(rows: Rows, peaks: Peaks) -> Iterator[Finding]:
    """Heavy compute-bound rows at less than a tenth of the median speed of their engine and format."""
    flop = work(rows)
    heavy = (flop > _HEAVY_FLOP) & compute_bound(rows, peaks)
    if not heavy.any():
        return
    names = ("engine", "fmt", "kv_fmt", "gemm_fmt", "head_dim", "window")
    group = group_numbers([rows.columns[name] for name in names if name in rows.columns], len(rows))
    speed = flop / rows.seconds
    typical = np.full(len(rows), np.nan)
    for number in np.unique(group[heavy]):
        mine = group == number
        typical[mine] = np.median(speed[mine & heavy])
    ratio = np.where(heavy, typical / speed, 1.0)
    where = np.flatnonzero(ratio > _FAR_SLOWER)
    yield from _each(
        rows,
        "outlier",
        where,
        ratio,
        lambda at: f"{speed[at] / 1e12:.3g} TFLOP/s, {ratio[at]:.3g} x below the median of its kernel",
    )


def _idle_windows(rows: Rows) -> Iterator[Finding]:
    """Windowed prompts that take as long as full attention although the window hides half of the pairs or more."""
    columns = [rows.columns[c.name] for c in rows.op.columns if c.name != "window"]
    case = group_numbers(columns, len(rows))
    full = rows.columns["window"] == 0
    flop = work(rows)
    full_s, full_flop = (np.full(int(case.max(initial=0)) + 1, np.nan) for _ in range(2))
    full_s[case[full]], full_flop[case[full]] = rows.seconds[full], flop[full]
    saved = full_flop[case] / np.maximum(flop, 1.0)
    slow = rows.seconds / full_s[case] > 0.9
    where = np.flatnonzero(~full & slow & (saved > 2) & (full_flop[case] > _WINDOW_FLOP))
    ratio = saved * rows.seconds / full_s[case]
    yield from _each(
        rows,
        "outlier",
        where,
        ratio,
        lambda at: f"as slow as without a window ({full_s[case[at]] * 1e6:.4g} us) for {saved[at]:.3g} x fewer pairs",
    )


def _slow_links(rows: Rows, device: System) -> Iterator[Finding]:
    """Collectives inside a domain that take three times what floor and links explain."""
    ranks = rows.columns["num_gpus"].astype(np.float64)
    factor = np.array([BUS[str(op)] for op in rows.columns["op"]])
    point = rows.columns["op"] == "send_recv"
    moved = np.where(point, 1.0, (ranks - 1) / ranks) * factor * rows.columns["bytes"]
    rate = device.scale_up.bytes_per_s * INSIDE_SHARE
    expected = max(device.scale_up.latency_s or 0.0, _FLOOR_S) + moved / rate
    # Outside a CUDA graph small messages wait for the host, which says nothing about the links.
    judged = (rows.columns["num_nodes"] == 1) & (rows.columns["graph"] == 1)
    ratio = np.where(judged, rows.seconds / expected, 1.0)
    bus = moved / rows.seconds / 1e9
    where = np.flatnonzero(ratio > _SLOW_LINK)
    yield from _each(
        rows,
        "outlier",
        where,
        ratio,
        lambda at: f"{bus[at]:.3g} GB/s bus bandwidth, {ratio[at]:.3g} x slower than the links explain",
    )


def _skewed_faster(rows: Rows) -> Iterator[Finding]:
    """Balanced rows slower than skewed rows of the same case: the hottest rank cannot be faster."""
    columns = [rows.columns[c.name] for c in rows.op.columns if c.name != "distribution"]
    case = group_numbers(columns, len(rows))
    balanced = rows.columns["distribution"] == "balanced"
    fastest = np.full(int(case.max(initial=0)) + 1, np.inf)
    np.minimum.at(fastest, case[~balanced], rows.seconds[~balanced])
    ratio = np.where(balanced, rows.seconds / fastest[case], 0.0)
    where = np.flatnonzero(ratio > _SKEWED_FASTER)
    yield from _each(
        rows, "outlier", where, ratio, lambda at: f"balanced routing {ratio[at]:.3g} x slower than skewed routing"
    )
