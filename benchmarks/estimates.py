"""How far the closed-form estimate that ranks layouts is from the simulation that judges them.

    python benchmarks/estimates.py

Simulates random survivors of eight searches and prints the quantiles of simulated over estimated, and the survivors
that met their SLO although they were estimated to miss it.
"""

from __future__ import annotations

import random

import numpy as np

from planner.deployment import run
from planner.engine import engine
from planner.hardware import parse_cluster
from planner.model import load
from planner.options import plan_demand
from planner.search import Search
from planner.workload import parse_slo

SLO = parse_slo("ttft_p95=2s,tpot_p95=50ms")
QUESTIONS = (
    ("llama-2-70b", "h100-sxm:4x8", 32.0),
    ("deepseek-v3", "h200-sxm:4x8", 32.0),
    ("mixtral-8x7b", "a100-80-sxm:2x8", 16.0),
    ("qwen3-235b-a22b-fp8", "h100-sxm:2x8", 16.0),
    ("gpt-oss-120b", "b200-sxm:1x8", 64.0),
)
PER_QUESTION = 14


def main() -> None:
    chosen = random.Random(0)
    pairs = []
    for serving in ("vllm", "sglang"):
        for model, cluster, rate in QUESTIONS:
            workload = plan_demand("chat", rate, None, 1000, SLO)
            found = Search(parse_cluster(cluster), engine(serving), workload, SLO).run([load(model)])
            best = {c.deployment.layout: c for c in reversed(found.survivors)}
            for candidate in chosen.sample(list(best.values()), min(PER_QUESTION, len(best))):
                result = run(candidate.deployment, workload, SLO)
                pairs.append((candidate.score, result.worst_ratio, candidate.name))
    scores, ratios = (np.array([p[i] for p in pairs]) for i in (0, 1))
    near = scores < 3
    quantiles = np.quantile(ratios[near] / scores[near], [0.05, 0.25, 0.5, 0.75, 0.95])
    print(
        f"{len(pairs)} layouts; simulated over estimated below a score of 3, p5 p25 p50 p75 p95: {quantiles.round(2)}"
    )
    late = sorted((score, ratio, name) for score, ratio, name in pairs if score > 1 and ratio <= 1)
    print(f"{len(late)} met their SLO although estimated to miss it; the highest estimates:")
    for score, ratio, name in late[-5:]:
        print(f"  estimated {score:.2f}, simulated {ratio:.2f}  {name}")


if __name__ == "__main__":
    main()
