"""From measured points to calibrations: replay without any, fit, judge on left-out combinations, replay with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.calibration import ANY, OFF, PARAMETERS, Calibration, Calibrations, Entry, Errors
from planner.errors import InputError, nearest
from planner.validation.fitting import Samples, base_values, fit, left_out, refine
from planner.validation.harness import Validation, validate
from planner.validation.points import METRICS, Point, PointsFile

Floats = NDArray[np.float64]
Progress = Callable[[str, float], None]
_LEAST_COMBINATIONS = 3
"""Combinations of model, GPU and engine without which nothing is left out to judge a fit from scratch."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """Calibrations, and the same points without any (`raw`), before (`start`), with them, and left out of the fit.

    `left_out` are values as in `Prediction.values`, `[num_rows, metrics]`, NaN where there is none; None when the fit
    started from other calibrations: those have seen public points of the same combinations.
    """

    found: Calibrations
    start: Calibrations
    raw: Validation
    before: Validation
    after: Validation
    left_out: Floats | None


def calibrate(
    source: PointsFile, *, start: Calibrations, names: Sequence[str] = (), command: str, as_of: str, progress: Progress
) -> Calibrated:
    """Calibrations that fit the measured points of `source`.

    From `OFF` every parameter of every engine and generation is fitted anew; from others those named are moved (all by
    default), separately for each engine and generation in the file. InputError on an unknown name, names where all are
    fitted, points without measurements, and fewer measurements than parameters.
    """
    unknown = next((name for name in names if name not in PARAMETERS), None)
    if unknown:
        raise InputError(f"--parameters {unknown}: {nearest(unknown, PARAMETERS)}")
    if names and start == OFF:
        raise InputError(f"--parameters {','.join(names)}: from scratch all are fitted. Leave one of the two out.")

    def replayed(text: str, used: Calibrations, breaks_down: bool = True) -> Validation:
        return validate(source, calibrations=used, breaks_down=breaks_down, progress=lambda s: progress(text, s))

    raw = replayed("replay uncalibrated", OFF)
    samples, rows = samples_of(raw)
    _check_enough(source, samples, names or PARAMETERS, start)
    outside = None
    if start == OFF:
        before, found = raw, _entries(dict(fit(samples).values), samples)
    else:
        before = replayed("replay before", start)
        found = _refined(samples_of(before)[0], start, names or PARAMETERS)
    # Longer steps change who waits for whom, so the slopes are taken once more where the first fit leads.
    second = replayed("replay with the first fit", replace(start, entry=found))
    samples, rows = samples_of(second)
    if start == OFF:
        found = _entries(dict(fit(samples).values), samples)
        outside = _left_out_values(second, samples, rows)
    else:
        found = _refined(samples, start, names or PARAMETERS)
    new = {(entry.engine, entry.generation) for entry in found}
    kept = tuple(entry for entry in start.entry if (entry.engine, entry.generation) not in new)
    calibrations = Calibrations(source.path.name, as_of, command, (*found, *kept))
    after = replayed("replay calibrated", calibrations, breaks_down=False)
    errors = [_errors(metric, is_moe, raw, after, outside) for is_moe in (True, False) for metric in METRICS]
    calibrations = replace(calibrations, errors=tuple(e for e in errors if e is not None))
    return Calibrated(calibrations, start, raw, before, after, outside)


def _refined(samples: Samples, start: Calibrations, names: Sequence[str]) -> tuple[Entry, ...]:
    """Entries of every engine and generation in `samples`, moved from `start`."""
    values = {}
    for key in sorted(set(zip(samples.engine.tolist(), samples.generation.tolist(), strict=True))):
        mask = (samples.engine == key[0]) & (samples.generation == key[1])
        values[key] = refine(samples.chosen(mask), base_values(entry_of(start, *key)), names)
    return _entries(values, samples)


def samples_of(raw: Validation) -> tuple[Samples, list[int]]:
    """Samples of the points of an uncalibrated validation that were measured, and their rows."""
    rows, columns = [], []
    for index, (row, prediction) in enumerate(raw.pairs):
        point, parts = row.point, prediction.breakdown
        if point is None or parts is None or np.isnan(prediction.values[:2]).any():
            continue
        measured = np.array(point.measured[:2]) / 1e3
        if np.isnan(measured).all():
            continue
        ttft, tpot = np.array(prediction.values[:2]) / 1e3
        keys = (prediction.engine, prediction.generation, "|".join(point.combination))
        rows.append(index)
        columns.append((parts.at, tpot, ttft, parts.tpot, parts.ttft, measured[1], measured[0], *keys))
    if not rows:
        reason = next((f" ({p.status})" for p in raw.predictions if not p.is_ok), "")
        raise InputError(
            f"{raw.source.path}: no point has both a measurement and a prediction{reason}. Fill in ttft_mean_ms or "
            "tpot_mean_ms of servers that are modelled."
        )
    return Samples(*map(np.array, zip(*columns, strict=True))), rows


def _check_enough(source: PointsFile, samples: Samples, names: Sequence[str], start: Calibrations) -> None:
    measured = int((~np.isnan(samples.measured_tpot_s)).sum() + (~np.isnan(samples.measured_ttft_s)).sum())
    pairs = set(zip(samples.engine.tolist(), samples.generation.tolist(), strict=True))
    wanted = len(names) * (1 if start == OFF else len(pairs))
    if measured < wanted:
        each = wanted // len(names)
        few = ",".join(("experts", "layer_s", "frontend_s")[: measured // each])
        fewer = (
            f", or fewer parameters, such as --parameters {few}" if 0 < few.count(",") + 1 < len(names) and few else ""
        )
        raise InputError(
            f"{source.path}: {measured} measurements (TPOT and TTFT) cannot fit {wanted} parameters. "
            f"Give more runs{fewer}"
        )
    num = len(set(samples.combination.tolist()))
    if start == OFF and num < _LEAST_COMBINATIONS:
        raise InputError(
            f"{source.path}: {num} combination{'s' * (num != 1)} of model, GPU and engine; a calibration from scratch "
            f"needs {_LEAST_COMBINATIONS} to be judged on those left out. Without --from-scratch the shipped one is "
            "moved."
        )


def entry_of(start: Calibrations, engine: str, generation: str) -> Calibration:
    """Calibration of an engine on a generation; of any, or neutral, where `start` has none."""
    found = {(entry.engine, entry.generation): entry.values for entry in start.entry}
    return found.get((engine, generation)) or found.get((engine, ANY)) or Calibration()


def _entries(values: dict[tuple[str, str], Floats], samples: Samples) -> tuple[Entry, ...]:
    """Entries of engines; what holds for all engines together is of no engine and left out."""
    entries = []
    for (engine, generation), numbers in sorted(values.items()):
        if engine == ANY:
            continue
        mask = (samples.engine == engine) & ((samples.generation == generation) | (generation == ANY))
        counts = int(mask.sum()), len(set(samples.combination[mask].tolist()))
        calibration = Calibration(**dict(zip(PARAMETERS, numbers.tolist(), strict=True)))
        entries.append(Entry(engine, generation, calibration, *counts))
    return tuple(entries)


def _left_out_values(raw: Validation, samples: Samples, rows: list[int]) -> Floats:
    """Predictions without a point's own combination, as `Prediction.values`."""
    values = np.full((len(raw.predictions), len(METRICS)), np.nan)
    tpot_s, ttft_s = left_out(samples)
    for place, index in enumerate(rows):
        point = raw.source.rows[index].point
        assert point is not None
        values[index] = (ttft_s[place] * 1e3, tpot_s[place] * 1e3, throughput(point, ttft_s[place], tpot_s[place]))
    return values


def throughput(point: Point, ttft_s: float, tpot_s: float) -> float:
    """Output tokens per second and GPU that the source of the points derives from both latencies."""
    tokens = sum(max(1, int(point.osl * share)) for share in point.lengths) / 2
    return point.concurrency * tokens / (ttft_s + tpot_s * (tokens - 1)) / point.num_gpus


def _errors(metric: str, is_moe: bool, raw: Validation, after: Validation, outside: Floats | None) -> Errors | None:
    column = METRICS.index(metric)
    counted = np.array([prediction.is_moe is is_moe for prediction in raw.predictions])
    measured = np.array([row.point.measured[column] if row.point else np.nan for row, _ in raw.pairs])
    first, last = (np.array([p.values[column] for p in v.predictions]) for v in (raw, after))
    measured = np.where(counted & ~np.isnan(last), measured, np.nan)

    def error(values: Floats) -> tuple[float, float]:
        off = np.abs(values / measured - 1)
        off = off[~np.isnan(off)] * 100
        return float(np.median(off)), float(np.mean(off))

    if np.isnan(measured).all():
        return None
    left = None if outside is None else error(outside[:, column])
    models = "moe" if is_moe else "dense"
    return Errors(metric, models, int((~np.isnan(measured)).sum()), error(first), error(last), left)
