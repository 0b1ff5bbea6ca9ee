"""Write docs/published.md: the product against published numbers that are no fitting points.

    python benchmarks/published.py [../shared/validation]

Targets of handbook serving 10.3, DeepSeek's economics and Step-3's tables (10.2), and, where the folder of measured
results is there, published_points.csv replayed and memory_points.csv. Nothing is tuned to any of them.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import published_memory
import published_points
import published_tables
import published_targets
from published_points import Outcome, Published

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "published.md"
FOLDER = HERE.parents[1] / "shared" / "validation"
LABELS = {
    "output_tok_s_total": "output tok/s",
    "output_tok_s_per_gpu": "output tok/s/GPU",
    "total_tok_s": "prompt + output tok/s",
    "itl_mean_ms": "ITL mean",
    "tpot_mean_ms": "TPOT mean",
    "ttft_mean_ms": "TTFT mean",
    "ttft_p99_ms": "TTFT p99",
    "latency_mean_ms": "end to end mean",
    "latency_per_output_token_ms": "end to end per token",
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in ([*header], ["---"] * len(header), *rows)]
    return "\n".join(lines)


def yes(met: bool) -> str:
    """Whether a row is within its band."""
    return "yes" if met else "**no**"


def targets_section() -> str:
    """Rows of 10.3 and a sentence for every missed one."""
    found = published_targets.targets()
    header = ("target", "published", "ours", "deviation", "band", "met", "dominates our time")
    rows = [
        (
            one.name,
            one.published,
            one.ours,
            one.deviation,
            one.band,
            "-" if one.band == "none" else yes(one.met),
            one.dominant,
        )
        for one in found
    ]
    missed = [f"- **{one.name}**: {one.why}" for one in found if not one.met and one.why]
    parts = ["## Wider targets (handbook serving 10.3)", table(header, rows), "### Missed, and why"]
    return "\n\n".join([*parts, "\n".join(missed) or "None."])


def tables_section() -> str:
    """E1 to E8 and S1 to S7."""
    parts = []
    for title, rows in (
        ("## DeepSeek's economics (E1 to E8)", published_tables.economics()),
        ("## Step-3 (S1 to S7)", published_tables.step3()),
    ):
        cells = [
            (r.name, r.what, f"{r.published:,.6g}", f"{r.ours:,.6g}", f"{r.deviation:+.3%}", f"{r.tolerance:.2g}")
            for r in rows
        ]
        whole = [(*cell, yes(r.met), r.how) for cell, r in zip(cells, rows, strict=True)]
        header = ("id", "what", "published", "ours", "deviation", "tolerance", "met", "by")
        parts += [title, table(header, whole)]
    return "\n\n".join([*parts, published_tables.LEFT_OUT])


def score(ratios: Sequence[float]) -> tuple[str, str, str, str]:
    """Number, median and mean of the absolute error, median ratio of predicted to published."""
    errors = np.abs(np.asarray(ratios) - 1)
    bias = float(np.median(ratios))
    return str(len(errors)), f"{np.median(errors):.1%}", f"{errors.mean():.1%}", f"{bias:.2f}"


def ratios(runs: Sequence[Published], outcomes: Mapping[str, Outcome]) -> dict[tuple[str, ...], list[float]]:
    """Predicted over published by source, engine, model, GPU and metric."""
    found: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for one in runs:
        place = (one.source, one.fields["engine"], one.fields["model"].split("/")[-1], one.fields["gpu"])
        for metric, value in outcomes[one.group].predicted.items():
            found[(*place, metric)].append(value / one.values[metric])
    return found


def points_section(runs: Sequence[Published], outcomes: Mapping[str, Outcome]) -> str:
    """Errors by source and metric, by model and GPU, and what is left out."""
    found = ratios(runs, outcomes)
    by_source: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (source, *_, metric), values in found.items():
        by_source[source, metric] += values
    ordered = sorted(by_source, key=lambda key: (key[0], list(LABELS).index(key[1])))
    models: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(dict)
    for (source, serving, model, gpu, metric), values in sorted(found.items()):
        models[source, serving.split(" (")[0], model, gpu][metric] = values
    covered = sum(len(outcome.predicted) for outcome in outcomes.values())
    total = sum(len(one.values) for one in runs)
    replayed = sum(bool(outcome.predicted) for outcome in outcomes.values())
    per_model = [(*key, *_model_cells(metrics)) for key, metrics in models.items()]
    header = ("source", "engine", "model", "GPU", "runs", "output tok/s: median", "mean", "bias", "ITL: median", "bias")
    return "\n\n".join(
        [
            "## Published points",
            f"{covered:,} of {total:,} values are replayed, in {replayed} of {len(runs)} runs: all that can be, no "
            "subsample. Errors are the absolute value of predicted / published - 1, bias is the median of predicted / "
            "published.",
            (HERE / "published_reading.md").read_text("utf-8").strip(),
            table(("source", "metric", "values", "median", "mean", "bias"), _source_rows(ordered, by_source)),
            "### By model and GPU",
            table(header, per_model),
            "### Not covered",
            table(("values", "reason"), _left_out(runs, outcomes)),
        ]
    )


def _source_rows(ordered: Sequence[tuple[str, str]], values: Mapping[tuple[str, str], list[float]]) -> list[list[str]]:
    return [[source, LABELS[metric], *score(values[source, metric])] for source, metric in ordered]


def _model_cells(metrics: Mapping[str, list[float]]) -> list[str]:
    rates = score(metrics["output_tok_s_total"])
    gaps = metrics.get("itl_mean_ms") or metrics.get("tpot_mean_ms")
    itl = score(gaps) if gaps else ("", "-", "-", "-")
    return [*rates, itl[1], itl[3]]


def _left_out(runs: Sequence[Published], outcomes: Mapping[str, Outcome]) -> list[tuple[str, str]]:
    counts: Counter[str] = Counter()
    for one in runs:
        missing = len(one.values) - len(outcomes[one.group].predicted)
        if missing:
            counts[outcomes[one.group].reason or "metric without a prediction"] += missing
    return [(str(count), reason) for reason, count in counts.most_common()]


def memory_section(path: Path) -> str:
    """Ours against measured, every row."""
    rows = [
        (
            row.name,
            row.what,
            f"{row.measured:,.6g} {row.unit}",
            "-" if row.ours is None else f"{row.ours:,.6g}",
            "-" if row.deviation is None else f"{row.deviation:+.1%}",
            row.note,
        )
        for row in published_memory.rows(path)
    ]
    header = ("id", "what", "measured", "ours", "deviation", "note")
    return "\n\n".join(["## Memory", table(header, rows), (HERE / "published_memory.md").read_text("utf-8").strip()])


def page(folder: Path) -> str:
    """The whole page; without the folder only what needs no files."""
    parts = [
        "# Published numbers",
        "Written by `python benchmarks/published.py [../shared/validation]`. These numbers are nowhere used to fit or "
        "tune anything; a missed one stays missed. Calibrations are the shipped ones ([accuracy](accuracy.md)).",
        targets_section(),
        tables_section(),
    ]
    points = folder / "published_points.csv"
    if points.is_file():
        runs = published_points.read(points)
        parts += [points_section(runs, published_points.replay_all(runs))]
    if (folder / "memory_points.csv").is_file():
        parts += [memory_section(folder / "memory_points.csv")]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER), encoding="utf-8")
