"""Is the winner the winner? Thousands of worlds drawn alike for all offers, and one input moved at a time.

Errors of predicted times are log-normal with the 80 % intervals of combinations that no calibration had seen. Of 27
such combinations, errors of one model and engine on two GPUs correlate 0.21 and errors of TPOT and TTFT 0.33
(docs/compare.md): `_SHARED` and `_TIME_WITH_TTFT`. Demand errors are log-normal and common to all offers. Prices are
triangular over the dated quotes of a system (`planner.economics.ranges`), and firm where the buyer states them; terms
of owning are triangular over the published ranges.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray

from planner.compare.question import DemandError
from planner.compare.standing import Standing, World
from planner.economics import RANGES, Terms, gpu_hour, it_power_w_per_gpu, owned_cost, price_range, ranges_around
from planner.validation.intervals import Z_80, Ratios

Floats = NDArray[np.float64]

DRAWS = 2000
LIMIT_STEP = 0.2
"""Step of the SLO limits in the tornado, as a share."""
_SHARED = 0.2
_TIME_WITH_TTFT = 0.33
_SURE = 0.9
_TIE = 1e-9
"""Bills that differ by less are equal: offers of the same hardware share a world."""
_MOST_INPUTS = 10


@dataclass(frozen=True, slots=True)
class Odds:
    """One offer over all worlds. Money and GPUs are 80 % intervals over the worlds it can serve.

    `best` is the share of worlds in which it is the cheapest, shared among equals, None without a price; `enough` the
    share in which the GPUs of the plan suffice; `cannot` the share in which no number of GPUs does. `sure_gpus` suffice
    in 90 % of the worlds, None where no number does. `regret_usd_per_month` is what it costs beyond the cheapest offer
    of the same world: mean and 90th percentile.
    """

    best: float | None
    enough: float
    cannot: float
    usd_per_month: tuple[float, float] | None
    num_gpus: tuple[int, int] | None
    sure_gpus: int | None
    regret_usd_per_month: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Swing:
    """The winner's bill, and who is cheapest, with one input at the ends of its 80 % range."""

    name: str
    low: str
    high: str
    usd_low: float
    usd_high: float
    winner_low: str
    winner_high: str

    @property
    def width_usd(self) -> float:
        """Distance between the ends; infinite where the winner cannot serve one of them."""
        return abs(self.usd_high - self.usd_low)


def odds(standings: Sequence[Standing], errors: DemandError, seed: int, draws: int = DRAWS) -> dict[str, Odds]:
    """Odds of every offer by name."""
    world = _drawn(standings, errors, seed, draws)
    gpus = {s.name: np.broadcast_to(s.gpus_in(world), draws) for s in standings if s.bill is not None}
    usd = {s.name: s.usd_in(world, gpus[s.name]) for s in standings if s.bill is not None}
    priced = {name: np.broadcast_to(cost, draws) for name, cost in usd.items() if cost is not None}
    cheapest = np.min(list(priced.values()), axis=0) if priced else np.full(draws, np.inf)
    best = {name: np.isfinite(cost) & (cost <= cheapest * (1 + _TIE)) for name, cost in priced.items()}
    ties = np.maximum(np.sum(list(best.values()), axis=0), 1) if best else 1
    shares = {name: float((won / ties).mean()) for name, won in best.items()}
    return {
        s.name: _odds(s, gpus[s.name], priced.get(s.name), cheapest, shares.get(s.name))
        for s in standings
        if s.name in gpus
    }


def _odds(one: Standing, gpus: NDArray[np.int64], usd: Floats | None, cheapest: Floats, best: float | None) -> Odds:
    served = gpus > 0
    enough, cannot = float((served & (gpus <= one.num_gpus)).mean()), float((~served).mean())
    counts = tuple(int(n) for n in np.quantile(gpus[served], (0.1, 0.9), method="nearest")) if served.any() else None
    most = np.quantile(np.where(served, gpus, np.iinfo(np.int64).max), _SURE, method="inverted_cdf")
    sure = int(most) if most < np.iinfo(np.int64).max else None
    if usd is None or not served.any():
        return Odds(best, enough, cannot, None, counts, sure, None)  # type: ignore[arg-type]
    regret = usd[served] - cheapest[served]
    low, high = (float(value) for value in np.quantile(usd[served], (0.1, 0.9)))
    return Odds(
        best,
        enough,
        cannot,
        (low, high),
        counts,  # type: ignore[arg-type]
        sure,
        (float(regret.mean()), float(np.quantile(regret, 0.9))),
    )


def _drawn(standings: Sequence[Standing], errors: DemandError, seed: int, draws: int) -> World:
    rate, prompt, output, common, common_ttft = np.random.default_rng(seed).standard_normal((5, draws))
    time: dict[str, Floats] = {}
    ttft: dict[str, Floats] = {}
    price: dict[str, Floats] = {}
    terms = _drawn_terms(standings, seed, draws)
    for one in standings:
        # Errors are those of the GPU, whoever pays for it and how many are offered.
        own, own_ttft = _generator(seed, one.system.name).standard_normal((2, draws))
        basis = one.bill.basis if one.bill else ""
        uniform = _generator(seed, f"price of {one.system.name}, {basis}").uniform(size=draws)
        slow = _mixed(common, own)
        late = _TIME_WITH_TTFT * slow + (1 - _TIME_WITH_TTFT**2) ** 0.5 * _mixed(common_ttft, own_ttft)
        time[one.name], ttft[one.name] = _factor(_widest(one, "time"), slow), _factor(_widest(one, "ttft"), late)
        price[one.name] = _price_factor(one, uniform, terms)
    return World(
        np.exp(rate * log(1 + errors.rate) / Z_80),
        np.exp(prompt * log(1 + errors.prompt) / Z_80),
        np.exp(output * log(1 + errors.output) / Z_80),
        time,
        ttft,
        price,
    )


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _mixed(common: Floats, own: Floats) -> Floats:
    mixed: Floats = _SHARED**0.5 * common + (1 - _SHARED) ** 0.5 * own
    return mixed


def _widest(one: Standing, metric: str) -> Ratios | None:
    """Interval of the least sure of the models."""
    known = [ratios for ratios in (getattr(entrant, metric) for entrant in one.entrants) if ratios is not None]
    return max(known, key=lambda ratios: ratios.high / ratios.low, default=None)


def _factor(ratios: Ratios | None, z: Floats) -> Floats:
    if ratios is None:
        return np.ones_like(z)
    factors: Floats = np.exp(ratios.log_middle + ratios.log_spread * z)
    return factors


def _price_factor(one: Standing, uniform: Floats, terms: Sequence[Terms]) -> Floats:
    """Price of a GPU-hour over that of the bill, `[draws]`."""
    bounds = price_bounds(one)
    if bounds is None:
        return np.ones_like(uniform)
    return _hourly_factor(one, triangular(uniform, *bounds), terms or [one.terms] * len(uniform))


def _hourly_factor(one: Standing, quotes: Floats, terms: Sequence[Terms]) -> Floats:
    """Price of a GPU-hour at `quotes` under `terms` over that of the bill, `[draws]`."""
    base, power_w = gpu_hour(one.system, one.terms), it_power_w_per_gpu(one.system)
    assert base is not None
    if base.basis == "rental":
        return quotes * (1 - one.terms.renting.commit_discount) / base.usd
    assert power_w is not None
    hourly = [owned_cost(usd, power_w, drawn).usd_per_gpu_hour for usd, drawn in zip(quotes, terms, strict=True)]
    return np.array(hourly) / base.usd


def price_bounds(one: Standing) -> tuple[float, float, float] | None:
    """Low, used and high quote of the basis of the bill, equal where the buyer stated it; None without a price."""
    if one.bill is None or one.bill.price is None:
        return None
    found = price_range(one.system, one.terms, "rental" if one.bill.basis == "rental" else "purchase")
    return None if found is None else (found.low, found.mode, found.high)


def _drawn_terms(standings: Sequence[Standing], seed: int, draws: int) -> list[Terms]:
    """Terms of owning in each world, the same for all offers; none when nothing is owned."""
    owners = [one for one in standings if one.bill is not None and one.bill.basis == "owned"]
    if not owners:
        return []
    terms, rng = owners[0].terms, np.random.default_rng([seed, len(RANGES)])
    ranges = {name: r for name, r in ranges_around(terms).items() if not name.startswith("renting")}
    drawn = {name: triangular(rng.uniform(size=draws), r.low, r.mode, r.high) for name, r in ranges.items()}
    return [terms.varied({name: float(values[i]) for name, values in drawn.items()}) for i in range(draws)]


def triangular(uniform: Floats, low: float, mode: float, high: float) -> Floats:
    """Triangular deviates from uniform ones by inversion.

    >>> triangular(np.array([0.0, 0.5, 1.0]), 0.0, 0.5, 1.0).tolist()
    [0.0, 0.5, 1.0]
    """
    if high <= low:
        return np.full_like(uniform, mode)
    share = (mode - low) / (high - low)
    rising = low + np.sqrt(uniform * (high - low) * (mode - low))
    falling = high - np.sqrt((1 - uniform) * (high - low) * (high - mode))
    return np.where(uniform < share, rising, falling)


def swings(standings: Sequence[Standing], winner: Standing, errors: DemandError) -> list[Swing]:
    """The inputs that move the winner's bill most, or change who is cheapest; at most ten."""
    runners = [one for one in standings if one is not winner and one.usd_per_month is not None and one.meets_slo]
    runner = min(runners, key=lambda one: one.usd_per_month or 0.0, default=None)
    found = [_swing(standings, winner, *moved) for moved in _moves(winner, runner, errors)]
    known = [swing for swing in found if swing is not None]
    moving = [s for s in known if s.width_usd > 0 or s.winner_low != s.winner_high]
    return sorted(moving, key=lambda s: (-s.width_usd, s.name))[:_MOST_INPUTS]


_Move = tuple[str, str, str, World, World]


def _moves(winner: Standing, runner: Standing | None, errors: DemandError) -> Iterator[_Move]:
    for name, half in (("rate", errors.rate), ("prompt", errors.prompt), ("output", errors.output)):
        label = {"rate": "request rate", "prompt": "prompt length", "output": "output length"}[name]
        low, high = 1 / (1 + half), 1 + half
        yield label, f"x{low:.2f}", f"x{high:.2f}", World(**{name: low}), World(**{name: high})  # type: ignore[arg-type]
    for one in (winner, runner) if runner else (winner,):
        yield from _moves_of(one)
    for metric in sorted({o.metric for demand in winner.demands for o in demand.slo.objectives}):
        low, high = 1 - LIMIT_STEP, 1 + LIMIT_STEP
        limits = [World(limits={metric: factor}) for factor in (low, high)]
        yield f"{metric.upper()} limit", f"x{low:.2f}", f"x{high:.2f}", limits[0], limits[1]
    yield from _changes(winner)
    yield from _term_moves(winner)


def _moves_of(one: Standing) -> Iterator[_Move]:
    for label, metric in (("step time", "time"), ("TTFT", "ttft")):
        ratios = _widest(one, metric)
        if ratios is not None:
            low, high = (World(**{metric: {one.name: factor}}) for factor in (ratios.low, ratios.high))  # type: ignore[arg-type]
            name = f"{label} of {one.name} (measured over predicted)"
            yield name, f"x{ratios.low:.2f}", f"x{ratios.high:.2f}", low, high
    bounds = price_bounds(one)
    if bounds is not None:
        ends = triangular(np.array([0.1, 0.9]), *bounds)
        low, high = (World(price={one.name: factor}) for factor in _hourly_factor(one, ends, [one.terms] * 2))
        what = "rent" if one.bill and one.bill.basis == "rental" else "purchase price"
        yield f"{what} of {one.name}", f"${ends[0]:,.2f}", f"${ends[1]:,.2f}", low, high


def _changes(winner: Standing) -> Iterator[_Move]:
    known = {change for entrant in winner.entrants for change, _ in entrant.curves.changed}
    if "even_experts" in known:
        yield "routing of tokens to experts", "even", "as assumed", World(changes=("even_experts",)), World()
    if "oversubscription" in known:
        yield "oversubscription", "as stated", "doubled", World(), World(changes=("oversubscription",))


def _term_moves(winner: Standing) -> Iterator[_Move]:
    if winner.bill is None:
        return
    is_owned = winner.bill.basis == "owned"
    for name, spread in ranges_around(winner.terms).items():
        if name.startswith("renting") == is_owned or spread.low == spread.high:
            continue
        ends = [float(triangular(np.array(share), spread.low, spread.mode, spread.high)) for share in (0.1, 0.9)]
        worlds = [World(terms=winner.terms.varied({name: end})) for end in ends]
        label = name.split(".")[-1].replace("_", " ")
        yield (
            label,
            f"{ends[0]:.3g} {spread.unit}".strip(),
            f"{ends[1]:.3g} {spread.unit}".strip(),
            worlds[0],
            worlds[1],
        )


def _swing(
    standings: Sequence[Standing], winner: Standing, name: str, low: str, high: str, at_low: World, at_high: World
) -> Swing | None:
    usd, cheapest = [], []
    for world in (at_low, at_high):
        costs = {one.name: float(cost) for one in standings if (cost := _usd(one, world)) is not None}
        if winner.name not in costs:
            return None
        usd.append(costs[winner.name])
        best = min(costs, key=lambda offer: (costs[offer], offer != winner.name))
        cheapest.append(best if np.isfinite(costs[best]) else "none")
    return Swing(name, low, high, usd[0], usd[1], cheapest[0], cheapest[1])


def _usd(one: Standing, world: World) -> Floats | None:
    return None if one.bill is None else one.usd_in(world)
