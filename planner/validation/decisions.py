"""Whether decisions taken on predictions are those that measurements would have led to.

Two are judged. Of two layouts measured on the same model, GPUs and load, the better one must be picked. And of all runs
of one model, GPU, engine and lengths, whatever their number of GPUs, layout and users, the one with the highest
predicted throughput per GPU within a limit on TPOT is picked: its measured throughput is compared with the best that
was measured within the limit, and its measured TPOT with the limit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from planner.validation.points import METRICS, Point

TPOT_LIMITS_MS = (10.0, 15.0, 20.0, 30.0, 50.0, 100.0)
LEAST_GAP = 0.05
"""Layouts whose measured throughputs differ by less are alike."""
_TPOT, _THROUGHPUT = METRICS.index("tpot_mean_ms"), METRICS.index("output_tok_s_per_gpu")
Values = tuple[float, float, float]
Runs = list[tuple[Point, Values]]


@dataclass(frozen=True, slots=True)
class Choices:
    """How often the better of two layouts was picked, by what differs between them (`TP against EP`)."""

    num: int
    num_right: int
    by_kind: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Picks:
    """Picks under TPOT limits: how many, share of the best measured throughput (mean over picks that keep the limit),
    and share of picks whose measured TPOT exceeds it.
    """

    num: int
    share_of_best: float
    violations: float


def layout_choices(runs: Sequence[tuple[Point, Values]]) -> Choices:
    """Choices between two layouts of the same model, precision, GPUs, engine, lengths and users."""
    groups: dict[tuple[object, ...], Runs] = defaultdict(list)
    for point, values in runs:
        if np.isfinite([values[_THROUGHPUT], point.measured[_THROUGHPUT]]).all():
            load = (point.isl, point.osl, point.lengths, point.concurrency)
            groups[(*point.combination, point.precision, point.num_gpus, *load)].append((point, values))
    kinds: dict[str, list[bool]] = defaultdict(list)
    for group in groups.values():
        for (first, a), (second, b) in combinations(group, 2):
            if first.deployed == second.deployed:
                continue
            measured = np.log(first.measured[_THROUGHPUT] / second.measured[_THROUGHPUT])
            if abs(measured) > np.log1p(LEAST_GAP):
                kinds[_kind(first, second)].append(bool(measured * (a[_THROUGHPUT] - b[_THROUGHPUT]) > 0))
    found = {kind: (sum(right), len(right)) for kind, right in sorted(kinds.items())}
    return Choices(sum(n for _, n in found.values()), sum(right for right, _ in found.values()), found)


def _kind(first: Point, second: Point) -> str:
    return " against ".join(sorted({_family(first), _family(second)}, reverse=True))


def _family(point: Point) -> str:
    if point.attention_dp > 1:
        return "attention-DP"
    return "EP" if point.moe_ep > 1 else "TP"


def picks(runs: Sequence[tuple[Point, Values]], margin: float = 1.0) -> Picks:
    """Picks under TPOT_LIMITS_MS; predictions times `margin` must keep the limit; limits no run kept are left out."""
    groups: dict[tuple[object, ...], Runs] = defaultdict(list)
    for point, values in runs:
        if np.isfinite([*values[1:], *point.measured[1:]]).all():
            groups[(*point.combination, point.precision, point.isl, point.osl, point.lengths)].append((point, values))
    shares, violations = [], []
    for group in groups.values():
        if len({(point.deployed, point.concurrency) for point, _ in group}) < 2:
            continue
        for limit in TPOT_LIMITS_MS:
            allowed = [run for run in group if run[1][_TPOT] * margin <= limit]
            kept = [point.measured[_THROUGHPUT] for point, _ in group if point.measured[_TPOT] <= limit]
            if not allowed or not kept:
                continue
            picked = max(allowed, key=lambda run: run[1][_THROUGHPUT])[0]
            is_over = picked.measured[_TPOT] > limit
            violations.append(is_over)
            if not is_over:
                shares.append(picked.measured[_THROUGHPUT] / max(kept))
    mean = float(np.mean(shares)) if shares else float("nan")
    return Picks(len(violations), mean, float(np.mean(violations)) if violations else float("nan"))
