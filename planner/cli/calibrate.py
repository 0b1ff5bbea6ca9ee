"""The command `calibrate`: factors and host times that make predictions meet measured servers."""

from __future__ import annotations

import time
from datetime import date
from pathlib import Path
from typing import Any

from planner.cli.terminal import command_line, progress_bar, show

Facts = dict[str, Any]
_LABELS = {"ttft_mean_ms": "TTFT", "tpot_mean_ms": "TPOT", "output_tok_s_per_gpu": "output tok/s/GPU"}


def calibrate(
    *,
    points: Path,
    start: str | None = None,
    from_scratch: bool = False,
    parameters: str | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Fit a few factors and host times to measured runs of your own servers, and see what they change.

    Parameters
    ----------
    points
        CSV of measured runs, as `moeplan validate` reads it; ttft_mean_ms or tpot_mean_ms is needed.
    start
        Calibration to move from, a TOML of an earlier `--out`; the shipped one otherwise.
    from_scratch
        Forget every calibration and fit all parameters of all engines, judged on combinations left out.
    parameters
        Names of the parameters to fit, such as experts,layer_s,frontend_s; all otherwise.
    out
        TOML for the result, for `--calibration` of plan, simulate and validate. Must be new.
    json
        Print the facts as JSON.
    """
    from planner.calibration import OFF, calibrations, to_toml
    from planner.errors import InputError
    from planner.facts.calibration import calibration_facts
    from planner.validation import read_points
    from planner.validation.calibrating import calibrate as fit_all

    began = time.perf_counter()
    if from_scratch and start is not None:
        raise InputError(f"--start {start} and --from-scratch exclude each other: give one")
    if out is not None:
        _check_new(out)
    first = OFF if from_scratch else calibrations(start, "--start")
    names = tuple(name.strip() for name in parameters.split(",")) if parameters else ()
    with progress_bar() as progress:
        found = fit_all(
            read_points(points),
            start=first,
            names=names,
            command=command_line(),
            as_of=date.today().isoformat(),
            progress=progress,
        )
    if out is not None:
        out.write_text(to_toml(found.found), encoding="utf-8")
    facts = calibration_facts(found, None if out is None else str(out))
    show(facts, json, calibration_text, wall_s=time.perf_counter() - began)


def _check_new(out: Path) -> None:
    from planner.errors import InputError

    if out.suffix != ".toml":
        raise InputError(f"--out {out}: give a name that ends in .toml")
    if out.exists():
        raise InputError(f"--out {out} exists: give a new name, or remove it first")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")


def calibration_text(facts: Facts) -> str:
    """Text of `calibrate`: errors before and after, and every parameter that moved."""
    from planner.tables import table

    rows = []
    for error in facts["errors"]:
        pairs = [error[name] for name in ("uncalibrated", "before", "calibrated", "left_out")]
        cells = ["-" if pair is None else f"{pair['median_pct']:.1f} / {pair['mean_pct']:.1f} %" for pair in pairs]
        rows.append([_LABELS[error["metric"]], f"{error['n']:,}", *cells])
    head = ["", "points", "uncalibrated", "before", "calibrated", "left out of the fit"]
    lines = ["Error: median / mean", table(head, rows)]
    for entry in facts["entries"]:
        where = f"{entry['engine']} on {entry['generation']} GPUs"
        lines += ["", f"{where}: {entry['num_points']:,} points of {entry['num_combinations']} model, GPU and engine"]
        moved = [[row["name"], row["before"], row["after"]] for row in entry["parameters"] if row["moved"]]
        lines += [table(["", "before", "after"], moved) if moved else "  nothing moved"]
    if facts["out"]:
        lines += ["", f"Written to {facts['out']}; use it with --calibration {facts['out']}"]
    else:
        lines += ["", "Not written: give --out mine.toml to use it with --calibration mine.toml"]
    return "\n".join(lines)
