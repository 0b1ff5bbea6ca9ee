"""Plan five models on four GPUs at three sizes and write docs/plans.md; the judgements stand in plans_reading.toml.

python benchmarks/plans.py
"""

from __future__ import annotations

import tomllib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from planner.deployment import UNSUSTAINED
from planner.engine import engine
from planner.hardware import parse_cluster
from planner.model import load
from planner.options import plan_demand
from planner.recommend import recommend
from planner.workload import parse_slo

MODELS = ("mixtral-8x7b", "deepseek-v3", "qwen3-235b-a22b-fp8", "gpt-oss-120b", "llama-2-70b")
SYSTEMS = ("a100-80-sxm", "h100-sxm", "h200-sxm", "b200-sxm")
SIZES = {8: "1x8", 16: "2x8", 32: "4x8"}
SLO = "ttft_p95=2s,tpot_p95=50ms"
Case = tuple[str, str, int]


def answer(case: Case) -> tuple[Case, str, float]:
    model, name, gpus = case
    workload = plan_demand("chat", float(gpus), None, None, parse_slo(SLO))
    found = recommend(load(model), [parse_cluster(f"{name}:{SIZES[gpus]}")], workload, parse_slo(SLO), engine("vllm"))
    if found.winner is None:
        return case, "does not fit" if not found.feasible else "no layout near the SLO", found.wall_s
    run = found.winner
    price = "-" if run.usd_per_mtok_output is None else f"${run.usd_per_mtok_output:.2f}"
    verdict = "" if run.meets_slo else f" (misses: {run.worst_objective} {run.worst_ratio:.1f}x)"
    if run.worst_objective == UNSUSTAINED:
        verdict = " (misses: the queue grows)"
    tpot, ttft = run.summary.tpot_s.p95, run.summary.ttft_s.p95
    text = (
        f"{run.deployment.layout}, {run.num_gpus} GPUs{verdict}, TPOT {tpot * 1e3:.0f} ms, TTFT {ttft:.2f} s, {price}"
    )
    return case, text, found.wall_s


def main() -> None:
    cases = [(m, s, g) for m in MODELS for s in SYSTEMS for g in SIZES]
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(answer, cases))
    texts = {case: text for case, text, _ in results}
    judgements = tomllib.loads((Path(__file__).parent / "plans_reading.toml").read_text("utf-8"))
    lines = [
        "# Five models on four GPUs, judged",
        "",
        "Written by `python benchmarks/plans.py`. Each cell is the recommendation for `moeplan plan MODEL --cluster",
        f"SYSTEM:NODESx8 --workload chat --rate GPUS --slo {SLO}` under vLLM defaults: one request per second and GPU",
        "offered. Percentiles are p95; prices are output tokens at the demanded load and dated rent.",
        "",
    ]
    for model in MODELS:
        lines += [f"## {model}", "", "| system | 8 GPUs, 8/s | 16 GPUs, 16/s | 32 GPUs, 32/s |", "|---|---|---|---|"]
        lines += [f"| {s} | " + " | ".join(texts[model, s, g] for g in SIZES) + " |" for s in SYSTEMS]
        lines += ["", *[f"- **{s}**: {judgements[model][s]}" for s in SYSTEMS], ""]
    Path(__file__).parents[1].joinpath("docs", "plans.md").write_text("\n".join(lines), encoding="utf-8")
    walls = [wall_s for *_, wall_s in results]
    print(f"{len(results)} plans, {sum(walls):.0f} s of planning, slowest {max(walls):.1f} s")


if __name__ == "__main__":
    main()
