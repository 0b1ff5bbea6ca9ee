"""What a calibration changed, as plain data."""

from __future__ import annotations

from typing import Any

import numpy as np

from planner.calibration import PARAMETERS
from planner.validation.calibrating import Calibrated, entry_of
from planner.validation.harness import Validation
from planner.validation.points import METRICS

Facts = dict[str, Any]
_UNITS = (("_s_per_token", 1e6, "us/token"), ("frontend_s", 1e3, "ms"), ("step_s", 1e3, "ms"), ("_s", 1e6, "us"))


def calibration_facts(found: Calibrated, out: str | None) -> Facts:
    """Errors and parameters before and after, and where the result was written."""
    entries = []
    touched = {(p.engine, p.generation) for p in found.after.predictions if p.is_ok}
    for entry in found.found.entry:
        if (entry.engine, entry.generation) not in touched:
            continue
        before = entry_of(found.start, entry.engine, entry.generation)
        rows = []
        for name in PARAMETERS:
            first, last = getattr(before, name), getattr(entry.values, name)
            moved = abs(last - first) > 1e-3 * max(abs(first), 1e-9)
            rows.append({"name": name, "before": _shown(name, first), "after": _shown(name, last), "value": last})
            rows[-1]["moved"] = bool(moved)
        facts = {"engine": entry.engine, "generation": entry.generation, "parameters": rows}
        entries.append(facts | {"num_points": entry.num_points, "num_combinations": entry.num_combinations})
    return {
        "source": found.found.source,
        "command": found.found.command,
        "errors": [_errors(found, metric) for metric in METRICS if not np.isnan(_measured(found.after, metric)).all()],
        "entries": entries,
        "out": out,
    }


def _shown(name: str, value: float) -> str:
    for ending, factor, unit in _UNITS:
        if name.endswith(ending):
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3f}"


def _measured(validation: Validation, metric: str) -> np.ndarray:
    """What was measured of every row, NaN where nothing was or nothing is predicted."""
    column = METRICS.index(metric)
    pairs = validation.pairs
    return np.array([row.point.measured[column] if row.point and p.is_ok else np.nan for row, p in pairs])


def _errors(found: Calibrated, metric: str) -> Facts:
    column, measured = METRICS.index(metric), _measured(found.after, metric)

    def error(values: np.ndarray) -> Facts:
        off = np.abs(values / measured - 1) * 100
        off = off[~np.isnan(off)]
        return {"median_pct": float(np.median(off)), "mean_pct": float(np.mean(off))}

    def of(validation: Validation) -> Facts:
        return error(np.array([p.values[column] for p in validation.predictions]))

    return {
        "metric": metric,
        "n": int((~np.isnan(measured)).sum()),
        "uncalibrated": of(found.raw),
        "before": of(found.before),
        "calibrated": of(found.after),
        "left_out": None if found.left_out is None else error(found.left_out[:, column]),
    }
