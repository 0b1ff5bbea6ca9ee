"""Compare predictions with measured serving results and write docs/accuracy.md.

Every point is replayed by `planner.validation` as the benchmark that produced it, with engine defaults. Needs the
folder of measured results, which is not part of the project:

    python benchmarks/accuracy.py ../shared/validation/serving_points.csv [--write-intervals]

With --write-intervals the 80 % intervals of `planner/validation/intervals.toml` are fitted anew, first of all. For the
class that rests on rooflines every point is predicted once more on a copy of its GPU without measured kernels.
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
from planner.figures import svg
from planner.hardware.catalogue import profile_path
from planner.validation.intervals import ANY, METRIC_NAMES, interval_table, write_table
from planner.validation.names import system_of
from planner.validation.points import METRICS, Point, PointsFile, read_points
from planner.validation.replay import Prediction
from planner.validation.residuals import fit_intervals, residuals
from planner.validation.scores import SLICES, Pair, Score, score, slices, worst

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
INTERVALS = HERE.parent / "planner" / "validation" / "intervals.toml"
COMMAND = "python benchmarks/accuracy.py serving_points.csv --write-intervals"
SOURCE = (
    "end-to-end table of the PyPI package aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0), "
    "which in part derives from the public InferenceX benchmark (SemiAnalysis)"
)
LABELS = {"tpot_mean_ms": "TPOT", "ttft_mean_ms": "TTFT", "output_tok_s_per_gpu": "output tok/s/GPU"}
WORST = 8
COLOURS = {True: "#0b5cad", False: "#e3a857"}


def write_intervals(found: validation.Validation) -> None:
    """Fit the intervals to `found` and to the same points without measured kernels, and write them."""
    unmeasured = on_unmeasured_gpus(found.source)
    fitted = fit_intervals(
        residuals(found, [unmeasured]), source=SOURCE, as_of=date.today().isoformat(), command=COMMAND
    )
    INTERVALS.write_text(write_table(fitted), encoding="utf-8")
    interval_table.cache_clear()


def on_unmeasured_gpus(source: PointsFile) -> validation.Validation:
    """Predictions of all points on copies of their GPUs under names that no measured table knows."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for row in source.rows:
            if row.point is not None:
                row = replace(row, point=replace(row.point, gpu=_unmeasured(row.point.gpu, Path(folder))))
            rows.append(row)
        return validation.validate(replace(source, rows=tuple(rows)))


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


def summary(found: validation.Validation) -> list[str]:
    """Overall errors, MoE and dense apart, with the share inside the intervals."""
    rows = []
    for is_moe in (True, False):
        pairs = [pair for pair in found.pairs if pair[1].is_moe is is_moe]
        for metric, label in LABELS.items():
            each = score(pairs, metric)
            spread = (each.median_ape_pct, each.mape_pct, each.p90_ape_pct)
            numbers = [*(f"{value:.1f} %" for value in spread), f"{each.bias_pct:+.1f} %"]
            inside = f"{each.interval_coverage_pct:.0f} %"
            rows.append(
                ["MoE" if is_moe else "dense", label, f"{each.num:,}", f"{each.coverage:.1%}", *numbers, inside]
            )
    return table(["models", "metric", "points", "coverage", "median", "mean", "p90", "bias", "in interval"], rows)


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


WRITTEN = (
    "Written by `python benchmarks/accuracy.py serving_points.csv`. The points are closed-loop benchmark runs of vLLM, "
    f"SGLang and TensorRT-LLM from the {SOURCE}."
)
METHOD = (
    "Each is replayed as its client ran it: an empty server, all users at once, ten requests each, means over all of "
    "them, engine defaults. Throughput is derived from TTFT and TPOT as the source derives it. Nothing is fitted to "
    "any point but the intervals. Error is |predicted / measured - 1|, bias the median of predicted / measured - 1."
)
INTERVAL_TEXT = (
    "Bounds of measured / predicted that hold 80 % of left-out points, fitted {} by `{}`. A class with few "
    "combinations of model, GPU and engine leans on the class above it. With one combination left out at a time the "
    "intervals held: {}."
)
HEAD = ["points", "given", "predicted", *(f"{label}: median / mean / bias" for label in LABELS.values())]


def page(found: validation.Validation) -> str:
    """docs/accuracy.md."""
    pairs = found.pairs
    sliced = [
        [name, value, f"{num:,}", *(cells(scores[metric]) for metric in LABELS)]
        for name, value, scores, num in slices(found)
        if name not in ("model", "kind")
    ]
    by_engine = group_rows(pairs, lambda point, prediction: f"{kind_of(prediction)}, {point.engine}")
    by_server = group_rows(pairs, lambda p, _: f"{p.model} {p.gpu} {p.engine} {p.precision}".strip())
    ids = [f"- {row.name}: {prediction.status}" for row, prediction in pairs if not prediction.is_ok]
    held = interval_table()
    shares = ", ".join(f"{name} {share:.0%}" for name, share in held.held_out.items())
    parts = [
        *["# Accuracy", "", "## Against measured servers", "", fill(WRITTEN, 120), "", fill(METHOD, 120), ""],
        *[*summary(found), "", "![Predicted against measured](figures/accuracy.svg)", ""],
        *["### By slice", "", *table(["slice", "", "given", *HEAD[3:]], sliced), ""],
        *["### By server", "", *table(HEAD, by_engine + by_server), ""],
        *["### Furthest off", "", "Predicted / measured.", "", *worst_rows(found), ""],
        *["### Not predicted", "", *(ids or ["Every point is predicted."]), ""],
        *["### Intervals", "", fill(INTERVAL_TEXT.format(held.as_of, held.command, shares), 120)],
        *["", *interval_rows(), ""],
        *[(HERE / "accuracy_reading.md").read_text("utf-8").rstrip(), "", *kernel_summary(), ""],
    ]
    return "\n".join(parts)


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--write-intervals"]
    if len(arguments) != 1:
        sys.exit("usage: python benchmarks/accuracy.py POINTS.csv [--write-intervals]")
    found = validation.validate(read_points(Path(arguments[0])))
    if "--write-intervals" in sys.argv:
        write_intervals(found)
    (DOCS / "figures" / "accuracy.svg").write_text(scatter(found.pairs), encoding="utf-8")
    (DOCS / "accuracy.md").write_text(page(found), encoding="utf-8")
    print("\n".join(summary(found)))


if __name__ == "__main__":
    main()
