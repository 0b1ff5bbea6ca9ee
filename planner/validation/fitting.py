"""Fitting calibrations to measured points: few parameters, each held back by what is known before.

Parameters of one engine on one GPU generation are a common value, plus what the engine adds, plus what the generation
adds, plus what the pair adds; every part is held near zero by a normal prior (ridge), so that engines with few
combinations lean on the others. Residuals are logarithms of predicted over measured TPOT and TTFT; large ones count
linearly (Huber), and a combination of model, GPU and engine counts as the square root of its points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.calibration import ANY, NEUTRAL, PARAMETERS, Calibration

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

PRIOR = {
    "experts": 0.2,
    "gemm": 0.2,
    "attention": 0.2,
    "exchange": 0.2,
    "prompts": 0.3,
    "layer_s": 10e-6,
    "prompt_layer_s": 100e-6,
    "step_s": 0.5e-3,
    "sequence_s": 5e-6,
    "frontend_s": 100e-3,
    "frontend_s_per_token": 4e-6,
    "unassisted_frontend_s": 200e-3,
}
"""Standard deviation of each parameter before any point is seen: 20 % of a kernel, some kernels of 2 us per layer, half
a millisecond of scheduling, a tenth of a second of HTTP."""
_SHARES = {"common": 1.0, "engine": 1.5, "generation": 0.5, "pair": 0.5}
"""Of that, what each level may add; chosen among four on left-out combinations."""
_HUBER = {"tpot": 0.15, "ttft": 0.30}
"""Residual beyond which a point counts linearly: what repeats across engine versions differ by (p90 of the points'
README: 14 % TPOT, 43 % TTFT)."""
_SPREAD = {"tpot": 0.14 / 1.645, "ttft": 0.43 / 1.645}
"""Standard deviation of a measured mean, of which those repeats are the p90."""
_ROUNDS = 12
_LEAST_SHARE = 0.2
"""Predictions are kept above this share of the simulated ones while fitting."""


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Simulated means [s] `[num_points]` of every point, the values of the parameters in that simulation and the slopes
    of the means in them `[num_points, parameters]` (`PARAMETERS`), and what was measured [s], NaN where nothing was.
    """

    at: Floats
    tpot_s: Floats
    ttft_s: Floats
    tpot_slopes: Floats
    ttft_slopes: Floats
    measured_tpot_s: Floats
    measured_ttft_s: Floats
    engine: NDArray[np.str_]
    generation: NDArray[np.str_]
    combination: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.tpot_s)

    def chosen(self, mask: Mask) -> Samples:
        """The samples where `mask` holds."""
        return Samples(**{name: getattr(self, name)[mask] for name in self.__slots__})


@dataclass(frozen=True, slots=True)
class Fit:
    """Values of all parameters by (engine, generation); ANY stands for what was not seen."""

    values: Mapping[tuple[str, str], Floats]

    def of(self, engine: str, generation: str) -> Floats:
        """Values `[parameters]` of an engine on a generation, or of the nearest that was fitted."""
        for key in ((engine, generation), (engine, ANY), (ANY, generation), (ANY, ANY)):
            if key in self.values:
                return self.values[key]
        raise KeyError(engine)

    def calibration(self, engine: str, generation: str) -> Calibration:
        """As a calibration."""
        return Calibration(**dict(zip(PARAMETERS, self.of(engine, generation).tolist(), strict=True)))


def base_values(calibration: Calibration = NEUTRAL) -> Floats:
    """Values of `calibration` in the order of PARAMETERS."""
    return np.array([getattr(calibration, name) for name in PARAMETERS])


def fit(samples: Samples) -> Fit:
    """Values of every engine and generation in `samples`, of every engine, and of all together."""
    levels = _levels(samples)
    member = np.stack([mask for _, _, mask in levels], axis=1).astype(float)
    scale = np.array([[PRIOR[name] * _SHARES[kind] for name in PARAMETERS] for kind, _, _ in levels])
    added = _solve(samples, member, scale, base_values())
    by_level = {key: added[i] for i, (_, key, _) in enumerate(levels)}
    nothing = np.zeros(len(PARAMETERS))

    def total(engine: str, generation: str) -> Floats:
        keys = dict.fromkeys(((ANY, ANY), (engine, ANY), (ANY, generation), (engine, generation)))
        return _bounded(base_values() + sum((by_level.get(key, nothing) for key in keys), nothing))

    engines, generations = sorted(set(samples.engine.tolist())), sorted(set(samples.generation.tolist()))
    wanted = [(ANY, ANY), *((ANY, g) for g in generations), *((e, ANY) for e in engines)]
    wanted += [(e, g) for e in engines for g in generations]
    return Fit({key: total(*key) for key in dict.fromkeys(wanted)})


def refine(samples: Samples, start: Floats, names: Sequence[str]) -> Floats:
    """`start` values `[parameters]` moved in the parameters `names` to fit `samples`, all of one engine and GPU.

    Unlike in `fit` every run counts whole, with the spread of a measurement: a few of a user's own servers outweigh
    what is known of others.
    """
    scale = np.array([[PRIOR[name] if name in names else 0.0 for name in PARAMETERS]])
    member = np.ones((len(samples), 1))
    return _bounded(start + _solve(samples, member, scale, start, _SPREAD)[0])


def predicted(samples: Samples, values: Floats) -> tuple[Floats, Floats]:
    """Mean TPOT and TTFT [s] of every point with `values` `[parameters]` or `[num_points, parameters]`."""
    moved = values - samples.at
    tpot_s = samples.tpot_s + np.sum(samples.tpot_slopes * moved, axis=1)
    ttft_s = samples.ttft_s + np.sum(samples.ttft_slopes * moved, axis=1)
    return np.maximum(tpot_s, _LEAST_SHARE * samples.tpot_s), np.maximum(ttft_s, _LEAST_SHARE * samples.ttft_s)


def values_of(samples: Samples, found: Fit) -> Floats:
    """Values of each point `[num_points, parameters]`."""
    pairs = zip(samples.engine.tolist(), samples.generation.tolist(), strict=True)
    return np.stack([found.of(engine, generation) for engine, generation in pairs])


def left_out(samples: Samples) -> tuple[Floats, Floats]:
    """Mean TPOT and TTFT [s] of every point, by a fit without its combination of model, GPU and engine."""
    tpot, ttft = np.zeros(len(samples)), np.zeros(len(samples))
    for name in sorted(set(samples.combination.tolist())):
        out = samples.combination == name
        part = samples.chosen(out)
        tpot[out], ttft[out] = predicted(part, values_of(part, fit(samples.chosen(~out))))
    return tpot, ttft


def _levels(samples: Samples) -> list[tuple[str, tuple[str, str], Mask]]:
    """Kind, key and members of every part of the parameters."""
    engines, generations = sorted(set(samples.engine.tolist())), sorted(set(samples.generation.tolist()))
    levels = [("common", (ANY, ANY), np.ones(len(samples), dtype=np.bool_))]
    levels += [("engine", (e, ANY), samples.engine == e) for e in engines]
    levels += [("generation", (ANY, g), samples.generation == g) for g in generations if g != ANY]
    for e in engines:
        pairs = [(g, (samples.engine == e) & (samples.generation == g)) for g in generations if g != ANY]
        levels += [("pair", (e, g), mask) for g, mask in pairs if mask.any()]
    return levels


def _solve(
    samples: Samples, member: Floats, scale: Floats, start: Floats, spread: Mapping[str, float] | None = None
) -> Floats:
    """What each level adds `[levels, parameters]` to `start`: Gauss-Newton on the residuals, reweighted every round.

    Points weigh by the `spread` of their metric; without one, by the size of their combination.
    """
    shape = scale.shape
    designs, bases, logs, weights, bounds = [], [], [], [], []
    _, place, counts = np.unique(samples.combination, return_inverse=True, return_counts=True)
    by_size = 1 / np.sqrt(counts)[place.ravel()]
    for metric in ("tpot", "ttft"):
        measured = getattr(samples, f"measured_{metric}_s")
        known = ~np.isnan(measured)
        slopes = getattr(samples, f"{metric}_slopes")[known]
        simulated = getattr(samples, f"{metric}_s")[known]
        design = (member[known][:, :, None] * slopes[:, None, :] * scale[None]).reshape(known.sum(), scale.size)
        designs.append(design)
        bases.append(simulated + np.sum(slopes * (start - samples.at[known]), axis=1))
        bounds.append(_LEAST_SHARE * simulated)
        logs.append(np.log(measured[known]))
        weights.append(by_size[known] if spread is None else np.full(known.sum(), spread[metric] ** -2))
    moved = np.zeros(shape[0] * shape[1])
    for _round in range(_ROUNDS):
        normal, right = np.eye(len(moved)), moved.copy()
        for design, base, bound, log, weight, metric in zip(
            designs, bases, bounds, logs, weights, ("tpot", "ttft"), strict=True
        ):
            now = np.maximum(base + design @ moved, bound)
            residual = np.log(now) - log
            w = weight * np.minimum(1.0, _HUBER[metric] / np.maximum(np.abs(residual), 1e-9))
            slope = design / now[:, None]
            normal += slope.T @ (w[:, None] * slope)
            right += slope.T @ (w * residual)
        moved = moved - np.linalg.solve(normal, right)
    return np.asarray(moved.reshape(shape) * scale)


def _bounded(values: Floats) -> Floats:
    """`values` with factors between a half and two and times that `Calibration` takes."""
    is_factor = base_values() == 1.0
    return np.where(is_factor, np.clip(values, 0.5, 2.0), np.clip(values, 0.0, 10.0))
