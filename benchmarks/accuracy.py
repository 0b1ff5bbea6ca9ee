"""Compare predictions with measured serving results and write docs/accuracy.md.

Every point is replayed by `planner.validation` as the benchmark that produced it, with engine defaults. Needs the
folder of measured results, which is not part of the project:

    python benchmarks/accuracy.py ../shared/validation/serving_points.csv [--write]

With --write the shipped calibrations (`planner/calibrations.toml`) and the 80 % intervals
(`planner/validation/intervals.toml`) are those of this fit. For the class of intervals that rests on rooflines every
point is predicted once more on a copy of its GPU without measured kernels.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure

from planner import validation
from planner.calibration import CLASS_OF, OFF, PARAMETERS, Calibrations, shipped, to_toml
from planner.figures import svg
from planner.hardware.catalogue import profile_path
from planner.validation.calibrating import Calibrated, calibrate
from planner.validation.decisions import layout_choices, picks
from planner.validation.intervals import ANY, METRIC_NAMES, interval_table, write_table
from planner.validation.names import system_of
from planner.validation.points import METRICS, Point, PointsFile, read_points
from planner.validation.replay import Prediction
from planner.validation.residuals import fit_intervals, residuals
from planner.validation.scores import SLICES, Pair, Score, score, slices, worst

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
CALIBRATIONS = HERE.parent / "planner" / "calibrations.toml"
INTERVALS = HERE.parent / "planner" / "validation" / "intervals.toml"
COMMAND = "python benchmarks/accuracy.py serving_points.csv --write"
SOURCE = (
    "end-to-end table of the PyPI package aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0), "
    "which in part derives from the public InferenceX benchmark (SemiAnalysis)"
)
LABELS = {"tpot_mean_ms": "TPOT", "ttft_mean_ms": "TTFT", "output_tok_s_per_gpu": "output tok/s/GPU"}
WORST = 8
TRIED = (1.0, 1.3)
"""Factors on data sheets between which the right one is interpolated."""
LEAST_POINTS = 10
"""Points without which a slice gets no bar."""
COLOURS = {True: "#0b5cad", False: "#e3a857"}


def write_fitted(found: Calibrated, judged: validation.Validation) -> None:
    """Write the calibrations, and the intervals fitted to predictions of left-out combinations."""
    fit = replace(found.found, source=SOURCE)
    fit = replace(fit, data_sheets=data_sheets_factor(judged.source, fit))
    CALIBRATIONS.write_text(to_toml(fit), encoding="utf-8")
    shipped.cache_clear()
    unmeasured = on_unmeasured_gpus(judged.source, fit)
    fitted = fit_intervals(
        residuals(judged, [unmeasured]), source=SOURCE, as_of=date.today().isoformat(), command=COMMAND
    )
    INTERVALS.write_text(write_table(fitted), encoding="utf-8")
    interval_table.cache_clear()


def left_out(found: Calibrated) -> validation.Validation:
    """The points as predicted by a calibration without their combination of model, GPU and engine."""
    assert found.left_out is not None
    predictions = [
        prediction if np.isnan(values).all() else replace(prediction, values=tuple(values.tolist()))
        for prediction, values in zip(found.after.predictions, found.left_out, strict=True)
    ]
    return replace(found.after, predictions=tuple(predictions))


def data_sheets_factor(source: PointsFile, fit: Calibrations) -> float:
    """Factor on operations of GPUs without measured kernels at which the median TPOT is as measured.

    One number for all engines and GPUs: it is interpolated between two factors, in logarithms.
    """
    bias = [_tpot_bias(on_unmeasured_gpus(source, replace(fit, data_sheets=factor))) for factor in TRIED]
    share = bias[0] / (bias[0] - bias[1])
    return float(f"{np.exp(np.log(TRIED[0]) + share * np.log(TRIED[1] / TRIED[0])):.3g}")


def _tpot_bias(found: validation.Validation) -> float:
    """Median of log measured over predicted TPOT."""
    column = METRICS.index("tpot_mean_ms")
    pairs = [(row.point, p.values[column]) for row, p in found.pairs if row.point is not None and p.is_ok]
    return float(np.nanmedian([np.log(point.measured[column] / value) for point, value in pairs]))


def on_unmeasured_gpus(source: PointsFile, fit: Calibrations) -> validation.Validation:
    """Predictions of all points on copies of their GPUs under names that no measured table knows."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for row in source.rows:
            if row.point is not None:
                row = replace(row, point=replace(row.point, gpu=_unmeasured(row.point.gpu, Path(folder))))
            rows.append(row)
        return validation.validate(replace(source, rows=tuple(rows)), calibrations=fit)


def _unmeasured(gpu: str, folder: Path) -> str:
    name = system_of(gpu).name
    copy = folder / f"{name}-unmeasured.toml"
    if not copy.exists():
        text = profile_path(name).read_text("utf-8")
        copy.write_text(text.replace(f'name = "{name}"', f'name = "{name}-unmeasured"', 1), encoding="utf-8")
    return str(copy)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def cells(found: Score) -> str:
    if not found.num:
        return "-"
    return f"{found.median_ape_pct:.1f} / {found.mape_pct:.1f} / {found.bias_pct:+.0f} %"


def group_rows(pairs: Sequence[Pair], group_of: Callable[[Point, Prediction], str]) -> list[list[str]]:
    groups: dict[str, list[Pair]] = {}
    for row, prediction in pairs:
        if row.point is not None:
            groups.setdefault(group_of(row.point, prediction), []).append((row, prediction))
    rows = []
    for name in sorted(groups):
        scores = [score(groups[name], metric) for metric in LABELS]
        rows.append([name, f"{len(groups[name]):,}", f"{scores[0].coverage:.0%}", *map(cells, scores)])
    return rows


def kind_of(prediction: Prediction) -> str:
    return SLICES["kind"](None, prediction)  # type: ignore[arg-type]


def summary(found: Calibrated, judged: validation.Validation) -> list[str]:
    """Errors without calibration, with it, and of left-out combinations; MoE and dense apart."""
    rows = []
    for is_moe in (True, False):
        kind = "MoE" if is_moe else "dense"
        for metric, label in LABELS.items():
            raw, after, out = (
                score([pair for pair in each.pairs if pair[1].is_moe is is_moe], metric)
                for each in (found.raw, found.after, judged)
            )
            errors = [f"{e.median_ape_pct:.1f} / {e.mape_pct:.1f} %" for e in (raw, after, out)]
            target = "{} / {} %".format(*TARGETS[metric]) if is_moe else ("8 / - %" if label == "TPOT" else "-")
            others = PEERS[metric] if is_moe else ("-", "-")
            inside = f"{out.interval_coverage_pct:.0f} %"
            rows.append([kind, label, f"{out.num:,}", f"{out.coverage:.1%}", *errors, target, inside, *others])
    head = ["models", "metric", "points", "coverage", "uncalibrated", "calibrated", "left out", "target"]
    return table([*head, "in interval", "AIConfigurator 0.12", "AISimulate 0.13 dev"], rows)


def decision_rows(judged: validation.Validation) -> list[str]:
    """Whether left-out predictions would have led to the right decisions."""
    rows = []
    for is_moe in (True, False):
        runs = [(row.point, p.values) for row, p in judged.pairs if row.point is not None and p.is_moe is is_moe]
        kind = "MoE" if is_moe else "dense"
        for kept, text in ((runs, "all"), (same_version(judged, is_moe), "of one engine version")):
            choices = layout_choices(kept)
            if choices.num:
                by = ", ".join(f"{name} {right} of {num}" for name, (right, num) in choices.by_kind.items())
                rows.append([kind, f"better of two layouts, {text}", f"{choices.num_right} of {choices.num}", by])
        for margin in (1.0, 1.1):
            found = picks(runs, margin)
            text = f"{found.share_of_best:.1%} of the best throughput, {found.violations:.0%} over the limit"
            rows.append([kind, f"picks under a TPOT limit, {margin:.0%} of the prediction", text, f"{found.num} picks"])
    return table(["models", "decision", "result", ""], rows)


def same_version(judged: validation.Validation, is_moe: bool) -> list[tuple[Point, tuple[float, float, float]]]:
    """Runs with the engine version as part of their name, so that only runs of one version are compared."""
    return [
        (replace(row.point, precision=f"{row.point.precision} {row.fields.get('engine_version', '')}"), p.values)
        for row, p in judged.pairs
        if row.point is not None and p.is_moe is is_moe and row.fields.get("engine_version")
    ]


def breakdown_rows(raw: validation.Validation) -> list[str]:
    """Mean share of measured TPOT and TTFT that each class of operations explains without calibration, MoE points."""
    names = ("experts", "gemm", "attention", "exchange", "other")
    rows = []
    for metric, index in (("TPOT", 1), ("TTFT", 0)):
        shares: dict[str, list[list[float]]] = {}
        for row, prediction in raw.pairs:
            parts = prediction.breakdown
            if row.point is None or parts is None or not prediction.is_moe or np.isnan(row.point.measured[index]):
                continue
            terms = dict.fromkeys(names, 0.0)
            for label, seconds in (parts.tpot_terms if index else parts.ttft_terms).items():
                terms[CLASS_OF.get(label, "other")] += seconds * 1e3 / row.point.measured[index]
            shares.setdefault(prediction.engine, []).append([terms[name] for name in names])
        for engine, values in sorted(shares.items()):
            middle = np.median(values, axis=0)
            left = 1 - np.median(np.sum(values, axis=1))
            rows.append([metric, engine, f"{len(values):,}", *(f"{share:.0%}" for share in middle), f"{left:+.0%}"])
    return table(["metric", "engine", "points", *names, "not explained"], rows)


def calibration_rows() -> list[str]:
    """Every fitted parameter by engine and generation."""
    entries = shipped().entry
    head = ["", *(f"{entry.engine} {entry.generation}" for entry in entries)]
    rows = [["points", *(f"{entry.num_points:,}" for entry in entries)]]
    rows += [["combinations", *(str(entry.num_combinations) for entry in entries)]]
    for name in PARAMETERS:
        unit = 1e6 if name.endswith(("layer_s", "sequence_s", "per_token")) else 1e3 if name.endswith("_s") else 1.0
        label = f"{name} [{'us' if unit == 1e6 else 'ms'}]" if unit > 1 else name
        rows.append([label, *(f"{getattr(entry.values, name) * unit:.3g}" for entry in entries)])
    return table(head, rows)


def worst_rows(found: validation.Validation) -> list[str]:
    rows = []
    for metric, label in LABELS.items():
        for row, prediction, ratio in worst(found, metric, WORST):
            point = row.point
            assert point is not None
            shape = f"{point.isl}/{point.osl}, {point.concurrency} users, {prediction.family}"
            column = METRICS.index(metric)
            pair = (f"{prediction.values[column]:.4g}", f"{point.measured[column]:.4g}")
            where = f"{point.model} {point.gpu} x{point.num_gpus} {point.engine}"
            rows.append([label, row.name, where, shape, *pair, f"{ratio:.2f}"])
    return table(["metric", "id", "server", "load", "predicted", "measured", "ratio"], rows)


def interval_rows() -> list[str]:
    """Every class with the bounds of measured / predicted."""
    classes = interval_table().classes
    keys = list(dict.fromkeys(key[1:] for key in classes))
    rows = []
    for key in keys:
        each = {metric: classes.get((metric, *key)) for metric in METRIC_NAMES}
        bounds = [f"{r.low:.2f} to {r.high:.2f}" if r else "-" for r in each.values()]
        most = max((r for r in each.values() if r), key=lambda r: r.num_points)
        names = ["all" if part == ANY else part for part in key]
        rows.append([*names, f"{most.num_points:,}", str(most.num_combinations), *bounds])
    return table(["rests on", "models", "engine", "points", "combinations", *METRIC_NAMES], rows)


def scatter(pairs: Sequence[Pair]) -> str:
    """Predicted over measured for every metric, MoE and dense apart."""
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, len(LABELS)), LABELS.items(), strict=True):
        column = METRICS.index(metric)
        for is_moe in (False, True):
            points = np.array(
                [
                    (row.point.measured[column], prediction.values[column])
                    for row, prediction in pairs
                    if row.point is not None and prediction.is_moe is is_moe
                ]
            ).reshape(-1, 2)
            name = "MoE" if is_moe else "dense"
            axes.scatter(*points.T, s=4, lw=0, alpha=0.6, color=COLOURS[is_moe], label=name, rasterized=True)
        axes.set(xscale="log", yscale="log", title=label, xlabel="measured", ylabel="predicted")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,g}")
        ends = axes.get_xlim()
        axes.plot(ends, ends, color="#5b6570", lw=0.8)
        axes.legend(loc="upper left", fontsize=8, markerscale=2, handletextpad=0.2)
    return svg(figure, "accuracy", "Predicted against measured TPOT, TTFT and output tokens per second and GPU")


def slice_bars(judged: validation.Validation) -> str:
    """Median error of left-out points by engine, GPU, layout and users, one panel per metric."""
    found = [
        (f"{name} {value}", num, scores)
        for name, value, scores, num in slices(judged)
        if name not in ("model", "kind") and num >= LEAST_POINTS
    ]
    figure = Figure(figsize=(9.0, 0.24 * len(found) + 0.9), layout="constrained")
    places = np.arange(len(found))[::-1]
    for axes, (metric, label) in zip(figure.subplots(1, len(LABELS), sharey=True), LABELS.items(), strict=True):
        errors = [scores[metric].median_ape_pct for _, _, scores in found]
        axes.barh(places, errors, color=COLOURS[True], height=0.7)
        for place, error in zip(places, errors, strict=True):
            axes.text(error, place, f" {error:.0f}", va="center", fontsize=8)
        axes.axvline(TARGETS[metric][0], color="#b3261e", lw=0.8)
        axes.set(title=f"{label}, median error [%]", xlim=(0, 1.15 * max(errors)))
        axes.set_yticks(places, [f"{name} ({num:,})" for name, num, _ in found], fontsize=8)
    return svg(figure, "accuracy-slices", "Median error of left-out points by slice; the red line is the aim for MoE")


def kernel_summary() -> list[str]:
    """The summary table of docs/kernel_accuracy.md, which `benchmarks/kernel_accuracy.py` writes."""
    page = (DOCS / "kernel_accuracy.md").read_text("utf-8")
    found = page.split("## All systems together")[1].split("\n## ")[0].strip()
    return [
        "## Kernel times that were left out",
        "",
        "From [kernel_accuracy.md](kernel_accuracy.md), which has every operation, GPU and engine and the published",
        "dispatch and combine between nodes; written by `python benchmarks/kernel_accuracy.py`.",
        "",
        found,
    ]


TARGETS = {"tpot_mean_ms": (9, 15), "ttft_mean_ms": (22, 35), "output_tok_s_per_gpu": (9, 15)}
"""Median and mean error [%] that this project set itself for left-out combinations of MoE models."""
PEERS = {
    "tpot_mean_ms": ("19 / 44 %", "12.7 / 26 %"),
    "ttft_mean_ms": ("47 / 63 %", "38 / 46 %"),
    "output_tok_s_per_gpu": ("21 / 29 %", "13.2 / 24 %"),
}
"""Median / mean error of NVIDIA's tools on comparable MoE points (shared/validation/README.md, measured by others)."""
WRITTEN = (
    "Written by `python benchmarks/accuracy.py serving_points.csv`. The points are closed-loop benchmark runs of vLLM, "
    f"SGLang and TensorRT-LLM from the {SOURCE}."
)
METHOD = (
    "Each is replayed as its client ran it: an empty server, all users at once, ten requests each, means over all of "
    "them, engine defaults and the flags of its start script (`planner/validation/flags.toml`). Throughput is derived "
    "from TTFT and TPOT as the source derives it. Error is |predicted / measured - 1|: median / mean. Uncalibrated: "
    "tables and scheduler alone. Calibrated: with the parameters below, fitted to these points. Left out: every "
    "combination of model, GPU and engine predicted by a fit without it; this is what to expect of a server that "
    "nobody measured, and every figure further down is of such predictions. The last two columns are NVIDIA's tools on "
    "comparable points."
)
INTERVAL_TEXT = (
    "Bounds of measured / predicted that hold 80 % of left-out points, fitted {} by `{}`. A class with few "
    "combinations of model, GPU and engine leans on the class above it. With one combination left out at a time the "
    "intervals held: {}. Operations of a GPU without any measured kernel take {:.3g} times their rooflines: one number "
    "for all engines, at which the median TPOT of all points predicted without measured kernels is as measured."
)
HEAD = ["points", "given", "predicted", *(f"{label}: median / mean / bias" for label in LABELS.values())]


def page(found: Calibrated, judged: validation.Validation) -> str:
    """docs/accuracy.md."""
    pairs = judged.pairs
    sliced = [
        [name, value, f"{num:,}", *(cells(scores[metric]) for metric in LABELS)]
        for name, value, scores, num in slices(judged)
        if name not in ("model", "kind")
    ]
    by_engine = group_rows(pairs, lambda point, prediction: f"{kind_of(prediction)}, {point.engine}")
    by_server = group_rows(pairs, lambda p, _: f"{p.model} {p.gpu} {p.engine} {p.precision}".strip())
    ids = [f"- {row.name}: {prediction.status}" for row, prediction in pairs if not prediction.is_ok]
    held = interval_table()
    shares = ", ".join(f"{name} {share:.0%}" for name, share in held.held_out.items())
    parts = [
        *["# Accuracy", "", "## Against measured servers", "", fill(WRITTEN, 120), "", fill(METHOD, 120), ""],
        *[*summary(found, judged), "", "![Predicted against measured](figures/accuracy.svg)", ""],
        *["### Decisions", "", fill(DECISION_TEXT, 120), "", *decision_rows(judged), ""],
        *["### Calibration", "", fill(CALIBRATION_TEXT, 120), "", *calibration_rows(), ""],
        *["### What the times are made of", "", fill(BREAKDOWN_TEXT, 120), "", *breakdown_rows(found.raw), ""],
        *[
            "### By slice",
            "",
            "![Median error by slice](figures/accuracy_slices.svg)",
            "",
            *table(["slice", "", "given", *HEAD[3:]], sliced),
            "",
        ],
        *["### By server", "", *table(HEAD, by_engine + by_server), ""],
        *["### Furthest off", "", "Predicted / measured.", "", *worst_rows(judged), ""],
        *["### Not predicted", "", *(ids or ["Every point is predicted."]), ""],
        *[
            "### Intervals",
            "",
            fill(INTERVAL_TEXT.format(held.as_of, held.command, shares, shipped().data_sheets), 120),
        ],
        *["", *interval_rows(), ""],
        *[(HERE / "accuracy_reading.md").read_text("utf-8").rstrip(), "", *kernel_summary(), ""],
    ]
    return "\n".join(parts)


DECISION_TEXT = (
    "Of two layouts measured on the same model, GPUs and load, whose throughputs differ by more than 5 %, the better "
    "one should be picked (the aim is 80 %; AIConfigurator 16 of 36). And of all runs of one model, GPU, engine and "
    "lengths the one with the highest predicted throughput per GPU among those predicted to keep a TPOT limit (10, 15, "
    "20, 30, 50 and 100 ms) is compared with the best that was measured (the aim is 96 % with at most 5 % over the "
    "limit; AIConfigurator 91.8 % and 9 %)."
)
BREAKDOWN_TEXT = (
    "Share of the measured time that each class of operations explains without calibration, medians over the MoE "
    "points. A request pays for the steps that run while it waits for its first token or between tokens; what is not "
    "explained is front end, host time and kernels that no table times, which the calibration stands for."
)
CALIBRATION_TEXT = (
    "Fitted by `moeplan calibrate --points serving_points.csv --from-scratch`; planner/calibration.py says what each "
    "does. An engine on `any` GPU is what a generation without points gets."
)


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--write"]
    if len(arguments) != 1:
        sys.exit("usage: python benchmarks/accuracy.py POINTS.csv [--write]")
    found = calibrate(
        read_points(Path(arguments[0])),
        start=OFF,
        command=COMMAND,
        as_of=date.today().isoformat(),
        progress=lambda text, share: None,
    )
    judged = left_out(found)
    if "--write" in sys.argv:
        write_fitted(found, judged)
    (DOCS / "figures" / "accuracy.svg").write_text(scatter(judged.pairs), encoding="utf-8")
    (DOCS / "figures" / "accuracy_slices.svg").write_text(slice_bars(judged), encoding="utf-8")
    (DOCS / "accuracy.md").write_text(page(found, judged), encoding="utf-8")
    print("\n".join([*summary(found, judged), *decision_rows(judged)]))


if __name__ == "__main__":
    main()
