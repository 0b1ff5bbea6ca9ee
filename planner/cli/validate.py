"""The command `validate`: predictions beside measurements."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cli.terminal import progress_bar, show

if TYPE_CHECKING:
    from planner.validation import Validation

Facts = dict[str, Any]
_LABELS = {"ttft_mean_ms": "TTFT", "tpot_mean_ms": "TPOT", "output_tok_s_per_gpu": "output tok/s/GPU"}
_SHOWN = 10
"""Rows without a prediction that the text lists; JSON and --out have all."""


def validate(points: Path, *, calibration: str | None = None, out: Path | None = None, json: bool = False) -> None:
    """Replay measured serving points as the benchmark that produced them and report the errors.

    Parameters
    ----------
    points
        CSV with the columns model, gpu, engine, num_gpus, tp, isl, osl, concurrency; optional are id, precision,
        attention_dp, moe_ep, pp, lengths (fixed or uniform_0.8_1.0) and what was measured: ttft_mean_ms, tpot_mean_ms,
        output_tok_s_per_gpu. Points without measurements are predicted all the same.
    calibration
        Factors and host times of measured servers: a TOML of `moeplan calibrate --out`, or off; the shipped otherwise.
    out
        CSV for the predictions: the input columns, pred_METRIC with _low and _high (80 % interval), status,
        measured_share.
    json
        Print the facts as JSON.
    """
    from planner.calibration import calibrations
    from planner.facts.validation import validation_facts
    from planner.validation import check_out, read_points, write_predictions
    from planner.validation import validate as replay_all

    started = time.perf_counter()
    source, used = read_points(points), calibrations(calibration)
    if out is not None:
        check_out(out, points)
    with progress_bar() as progress:
        found = replay_all(source, calibrations=used, progress=lambda share: progress("replaying points", share))
    if out is not None:
        write_predictions(found, out)
    _check_any(found)
    show(validation_facts(found), json, validation_text, wall_s=time.perf_counter() - started)


def _check_any(found: Validation) -> None:
    """Infeasible or InputError when not one point has a prediction, with the first reason."""
    from planner.errors import Infeasible, InputError

    reasons = [(row.name, prediction.status) for row, prediction in found.pairs]
    if any(status == "ok" for _, status in reasons):
        return
    shown = "; ".join(f"{name}: {status}" for name, status in reasons[:3])
    message = f"{found.source.path}: none of {len(reasons):,} points could be predicted: {shown}"
    if all(status.startswith("infeasible") for _, status in reasons):
        raise Infeasible(message, ["more GPUs per replica", "a lower precision"])
    raise InputError(message)


def validation_text(facts: Facts) -> str:
    """Text of `validate`: the errors, by slice, the worst points, rows without a prediction."""
    lines = [_headline(facts), "", *_errors(facts["metrics"])]
    if any(scores["n"] for scores in facts["metrics"].values()):
        lines += ["", "By slice: median error / mean error / bias", _slices(facts["slices"])]
        lines += ["", "Furthest off (predicted / measured)", _worst(facts["worst"])]
    missing = facts["not_predicted"]
    if missing:
        lines += ["", f"Without a prediction ({len(missing):,})"]
        lines += [f"  {row['id']}: {row['status']}" for row in missing[:_SHOWN]]
        lines += [f"  and {len(missing) - _SHOWN:,} more"] if len(missing) > _SHOWN else []
    held = ", ".join(f"{name} {share:.0%}" for name, share in facts["intervals"]["held_out"].items())
    lines += ["", f"Intervals  80 %, fitted {facts['intervals']['as_of']}; they held of left-out points: {held}"]
    return "\n".join(lines)


def _headline(facts: Facts) -> str:
    text = f"{facts['num_predicted']:,} of {facts['num_points']:,} points predicted"
    errors = [
        f"{label} off by {_percent(facts['metrics'][metric]['median_ape_pct'])}"
        for metric, label in _LABELS.items()
        if facts["metrics"][metric]["n"]
    ]
    return f"{text}; median: {', '.join(errors)}" if errors else f"{text}; none of them was measured"


def _errors(metrics: Facts) -> list[str]:
    from planner.tables import table

    header = ["", "points", "coverage", "median error", "mean", "p90", "bias", "in 80 % interval"]
    rows = [
        [
            label,
            f"{metrics[metric]['n']:,}",
            f"{metrics[metric]['coverage']:.1%}",
            *(_percent(metrics[metric][name]) for name in ("median_ape_pct", "mape_pct", "p90_ape_pct")),
            _percent(metrics[metric]["bias_pct"], "+"),
            _percent(metrics[metric]["interval_coverage_pct"]),
        ]
        for metric, label in _LABELS.items()
    ]
    return [table(header, rows)]


def _slices(rows: list[Facts]) -> str:
    from planner.tables import table

    shown = []
    for row in rows:
        scores = [row["metrics"][metric] for metric in _LABELS]
        cells = [
            f"{_percent(s['median_ape_pct'])} / {_percent(s['mape_pct'])} / {_percent(s['bias_pct'], '+')}"
            for s in scores
        ]
        shown.append([row["slice"], row["value"], f"{row['num_points']:,}", f"{scores[0]['coverage']:.0%}", *cells])
    return table(["slice", "", "points", "covered", *_LABELS.values()], shown, left=2)


def _worst(worst: dict[str, list[Facts]]) -> str:
    from planner.tables import table

    shown = [
        [_LABELS[metric], row["id"], row["point"], f"{row['predicted']:.4g}", f"{row['measured']:.4g}", _ratio(row)]
        for metric, rows in worst.items()
        for row in rows
    ]
    return table(["", "id", "point", "predicted", "measured", "ratio"], shown, left=3)


def _ratio(row: Facts) -> str:
    return f"{row['ratio']:.2f}"


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.1f} %"
