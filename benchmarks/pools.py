"""How far the estimates of two pools are from their simulation: `python benchmarks/pools.py`."""

from __future__ import annotations

import random

from planner.disaggregation.deployment import run_pools
from planner.disaggregation.handover import handover
from planner.disaggregation.search import candidates, deployed, search_pools
from planner.engine import engine
from planner.hardware import parse_cluster
from planner.model import load
from planner.workload import load_workload, parse_slo

QUESTIONS = (
    ("deepseek-v3", "h200-sxm:4x8", "lognormal:4096~0.5/512~0.6", 6.0, "vllm", "ttft_p95=2s,tpot_p95=50ms"),
    ("mixtral-8x7b", "h100-sxm:1x8", "chat", 8.0, "sglang", "ttft_p95=1s,tpot_p95=30ms"),
    ("qwen3-235b-a22b", "h200-sxm:2x8", "fixed:4000/400", 4.0, "trtllm", "ttft_p95=2s,tpot_p95=40ms"),
)
PAIRS_PER_QUESTION = 8


def main() -> None:
    random.seed(1)
    for model, cluster_name, shape, rate, engine_name, limits in QUESTIONS:
        workload, slo = load_workload(shape, rate=rate, num_requests=1000), parse_slo(limits)
        cluster, rules = parse_cluster(cluster_name), handover(engine_name)
        found = search_pools(load(model), cluster, engine(engine_name), workload, rules)
        pairs = candidates(found, (cluster, cluster), rules, slo)
        print(f"{model} on {cluster_name}, {engine_name}: {len(pairs)} pairs")
        for pair in random.sample(pairs, min(PAIRS_PER_QUESTION, len(pairs))):
            run = run_pools(deployed(pair, rules), workload, slo)
            ttft_s, tpot_s = run.summary.ttft_s.mean, run.summary.tpot_s.mean
            print(
                f"  score {pair.score:.2f} simulated {run.worst_ratio:.2f}  "
                f"TTFT {pair.ttft_s:.3f} {ttft_s:.3f} s ({pair.ttft_s / ttft_s - 1:+.0%})  "
                f"TPOT {pair.decode.latency_s * 1e3:.1f} {tpot_s * 1e3:.1f} ms "
                f"({pair.decode.latency_s / tpot_s - 1:+.0%})  {run.deployment.layouts}"
            )


if __name__ == "__main__":
    main()
