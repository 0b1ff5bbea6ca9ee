"""Throughput per GPU against interactivity, and who leads in each band: steady states, before any SLO on tails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.compare.standing import Standing
from planner.economics import usd_per_mtok
from planner.sizing import Replica

BAND_TOK_PER_S = 10.0
_MOST_BANDS = 40


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """Best output tokens per second and GPU at one interactivity, and the layout that gives it."""

    tok_per_s_per_user: float
    output_tok_per_s_per_gpu: float
    layout: str


@dataclass(frozen=True, slots=True)
class Band:
    """One interactivity: the best of every offer (None where no layout is that fast), the leader, and by how much.

    `usd_per_mtok_output` are at full load and the price of a billed GPU-hour. `leader` is the cheapest where prices
    are known, else the fastest. `over_baseline` is tokens per second and GPU of the leader over the baseline, less 1.
    """

    tok_per_s_per_user: float
    output_tok_per_s_per_gpu: dict[str, float | None]
    usd_per_mtok_output: dict[str, float | None]
    leader: str
    over_baseline: float | None


def front(one: Standing, index: int = 0) -> tuple[FrontPoint, ...]:
    """Best point of `one` for the model `index` in every band it reaches."""
    every = one.entrants[index].curves.every
    fastest = max((1.0 / float(replica.tpot_s[0]) for replica in every), default=0.0)
    speeds = np.arange(BAND_TOK_PER_S, min(fastest, BAND_TOK_PER_S * _MOST_BANDS) + 1e-9, BAND_TOK_PER_S)
    points = []
    for speed in speeds:
        rated = [(_per_gpu(replica, float(speed)), replica) for replica in every]
        best, replica = max(rated, key=lambda pair: (pair[0], -pair[1].num_gpus))
        if best > 0:
            points.append(FrontPoint(float(speed), best, str(replica.layout)))
    return tuple(points)


def _per_gpu(replica: Replica, tok_per_s_per_user: float) -> float:
    """Output tokens per second and GPU of the largest batch whose users still get that many; 0 where none do."""
    rising = np.maximum.accumulate(replica.tpot_s) + np.arange(len(replica.tpot_s)) * 1e-12
    batch = np.interp(1.0 / tok_per_s_per_user, rising, replica.batch, left=0.0)
    if batch < 1.0:
        return 0.0
    return float(np.interp(batch, replica.batch, replica.tok_per_s)) / replica.num_gpus


def bands(standings: Sequence[Standing], fronts: dict[str, tuple[FrontPoint, ...]], baseline: str) -> tuple[Band, ...]:
    """Every band that some offer reaches, slowest first."""
    by_name = {name: {p.tok_per_s_per_user: p for p in points} for name, points in fronts.items()}
    speeds = sorted({speed for points in by_name.values() for speed in points})
    hourly = {one.name: None if one.bill is None else one.bill.usd_per_gpu_hour for one in standings}
    return tuple(_band(speed, by_name, hourly, baseline) for speed in speeds)


def _band(
    speed: float, points: dict[str, dict[float, FrontPoint]], hourly: dict[str, float | None], baseline: str
) -> Band:
    rates = {name: of[speed].output_tok_per_s_per_gpu if speed in of else None for name, of in points.items()}
    usd = {name: _usd_per_mtok(hourly[name], rate) for name, rate in rates.items()}
    reached = [name for name, rate in rates.items() if rate is not None]
    leader = min(reached, key=lambda name: (usd[name] is None, usd[name] or 0.0, -(rates[name] or 0.0)))
    own, other = rates[leader], rates.get(baseline)
    return Band(speed, rates, usd, leader, own / other - 1 if own and other else None)


def _usd_per_mtok(usd_per_gpu_hour: float | None, tok_per_s_per_gpu: float | None) -> float | None:
    return None if tok_per_s_per_gpu is None else usd_per_mtok(usd_per_gpu_hour, 1, tok_per_s_per_gpu)
