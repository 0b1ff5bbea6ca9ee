"""Compare predictions with measured serving results and write docs/accuracy.md.

Every point is simulated as the benchmark that produced it: a closed loop with forced output lengths, engine
defaults, no warm-up removed, and no constant fitted to any of them. Needs the folder of measured results, which is
not part of the project:

    python benchmarks/accuracy.py ../shared/validation/serving_points.csv
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from planner.deployment import deploy, run
from planner.engine import Limits, engine
from planner.errors import PlannerError
from planner.fit import limits_for
from planner.hardware import Cluster, system
from planner.layout import Layout
from planner.model import ModelConfig, load
from planner.model.precision import override
from planner.workload import load_workload

SYSTEMS = {"H100": "h100-sxm", "H200": "h200-sxm", "B200": "b200-sxm", "B300": "b300-sxm", "GB200": "gb200-nvl72"}
METRICS = ("tpot", "ttft", "output tok/s/GPU")
DOCS = Path(__file__).parents[1] / "docs"
SMALLER = (1.0, 0.5, 0.25)
"""Shares of the default limits tried in turn: operators lower them until the server starts."""


def model_of(row: dict[str, str]) -> ModelConfig:
    """The model in the precision the row is labelled with; checkpoints that already have it stay as they are."""
    model = load(row["model"])
    stored = model.format_of("expert" if model.moe else "dense_ffn")
    if row["precision"] == "fp4" and stored not in ("mxfp4", "nvfp4"):
        parts = {"experts": "nvfp4"} if model.moe else {"attention": "nvfp4", "dense": "nvfp4"}
        return override(model, kv="fp8", **parts)
    if row["precision"] == "fp8" and stored == "bf16":
        parts = {"attention": "fp8", "dense": "fp8"} | ({"experts": "fp8"} if model.moe else {})
        return override(model, **parts)
    return model


def predict(row: dict[str, str]) -> tuple[dict[str, str], list[float] | str]:
    """Ratios predicted / measured of METRICS, or why there is no prediction."""
    try:
        model, serving, chosen = model_of(row), engine(row["engine"]), system(SYSTEMS[row["gpu"]])
        tp, dp, ep, pp, gpus = (int(row[k]) for k in ("tp", "attention_dp", "moe_ep", "pp", "num_gpus"))
        layout = Layout(tp, pp, ep, dp, tp * dp // ep)
        cluster = Cluster(chosen, -(-gpus // chosen.gpus_per_node), min(gpus, chosen.gpus_per_node))
        prompt, output, users = int(row["isl"]), int(row["osl"]), int(row["concurrency"])
        lengths = f"fixed:{prompt}/{output}"
        if row["lengths"] != "fixed":
            lengths = f"uniform:{prompt * 4 // 5}-{prompt}/{output * 4 // 5}-{output}"
        workload = load_workload(lengths, concurrency=users, num_requests=max(4 * users, min(10 * users, 200)))
        backend = "allgather_reducescatter" if dp > 1 else "all_reduce"
        default = limits_for(serving, chosen)
        for share in SMALLER:
            limits = Limits(max(users, int(default.max_num_seqs * share)), int(default.max_batched_tokens * share))
            try:
                deployment = deploy(model, cluster, layout, serving, limits, backend, prompt + output // 2)
                break
            except PlannerError as error:
                reason = str(error)
        else:
            return row, reason
        result = run(deployment, workload)
        summary = result.simulation.summary(warmup=0)
        predicted = (summary.tpot_s.mean * 1e3, summary.ttft_s.mean * 1e3, result.output_tok_per_s / gpus)
        measured = (float(row[k]) for k in ("tpot_mean_ms", "ttft_mean_ms", "output_tok_s_per_gpu"))
        return row, [p / m for p, m in zip(predicted, measured, strict=True)]
    except PlannerError as error:
        return row, str(error)


def kernel_summary() -> list[str]:
    """The summary table of docs/kernel_accuracy.md, which `benchmarks/kernel_accuracy.py` writes."""
    page = (DOCS / "kernel_accuracy.md").read_text("utf-8")
    table = page.split("## All systems together")[1].split("\n## ")[0].strip()
    return [
        "## Kernel times that were left out",
        "",
        "From [kernel_accuracy.md](kernel_accuracy.md), which has every operation, GPU and engine and the published",
        "dispatch and combine between nodes; written by `python benchmarks/kernel_accuracy.py`.",
        "",
        table,
    ]


def line(name: str, ratios: list[list[float]], total: int) -> str:
    cells = [name, str(total), str(len(ratios))]
    for values in np.array(ratios).T:
        error = np.abs(values - 1)
        cells.append(f"{np.median(error):.1%} / {error.mean():.1%} / {np.median(values) - 1:+.0%}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    with Path(sys.argv[1]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(predict, rows, chunksize=8))
    groups: dict[str, list[tuple[dict[str, str], list[float] | str]]] = defaultdict(list)
    for row, ratios in results:
        kind = "MoE" if row["is_moe"] == "True" else "dense"
        for name in (
            f"all {kind}",
            f"{kind}, {row['engine']}",
            f"{row['model']} {row['gpu']} {row['engine']} {row['precision']}",
        ):
            groups[name].append((row, ratios))
    header = ["points", "given", "predicted", *(f"{m}: median / mean error / bias" for m in METRICS)]
    text = [
        "# Accuracy",
        "",
        "## Against measured servers",
        "",
        "Written by `python benchmarks/accuracy.py serving_points.csv`. The points are closed-loop benchmark runs of",
        "vLLM, SGLang and TensorRT-LLM from the end-to-end table of the PyPI package `aiconfigurator-core` 0.12.0",
        "(NVIDIA, Apache-2.0), which in part derives from the public InferenceX benchmark (SemiAnalysis). Each is",
        "simulated with engine defaults; nothing is fitted to any point. Error is |predicted / measured - 1|, bias the",
        "median of predicted / measured - 1.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    order = sorted(groups, key=lambda n: (not n.startswith("all"), "/" in n, n))
    for name in order:
        known = [r for _, r in groups[name] if not isinstance(r, str)]
        text.append(
            line(name, known, len(groups[name])) if known else f"| {name} | {len(groups[name])} | 0 | - | - | - |"
        )
    refused: dict[str, int] = defaultdict(int)
    for _, ratios in results:
        if isinstance(ratios, str):
            refused[ratios.split(";")[0]] += 1
    text += ["", "Not predicted:", "", *[f"- {count} x {reason}" for reason, count in sorted(refused.items())]]
    text += ["", (Path(__file__).parent / "accuracy_reading.md").read_text("utf-8").rstrip(), "", *kernel_summary(), ""]
    (DOCS / "accuracy.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text[10:18]))


if __name__ == "__main__":
    main()
