"""How far the estimates of two pools are from their simulation, and pools from a published deployment.

    python benchmarks/pools.py

The deployment is SGLang's of DeepSeek-V3 on 12 x 8 H100 (LMSYS blog 2025-05-05, handbook serving 8.1): tokens per
second and node of prefill at EP32 and of decode at EP72, 256 sequences per GPU of 2K tokens. It ran with two-batch
overlap and balanced experts.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from planner.deployment import Deployment, deploy
from planner.disaggregation.deployment import run_pools
from planner.disaggregation.handover import handover
from planner.disaggregation.rates import Demand, prefill_rate
from planner.disaggregation.search import candidates, deployed, search_pools
from planner.engine import Limits, engine
from planner.experts import AS_SERVED
from planner.hardware import parse_cluster
from planner.layout import parse_layout
from planner.model import load
from planner.steptime import StepTime
from planner.tacticcost import step_cost
from planner.tactics import PLAIN, Tactics
from planner.workload import load_workload, parse_slo

QUESTIONS = (
    ("deepseek-v3", "h200-sxm:4x8", "lognormal:4096~0.5/512~0.6", 6.0, "vllm", "ttft_p95=2s,tpot_p95=50ms"),
    ("mixtral-8x7b", "h100-sxm:1x8", "chat", 8.0, "sglang", "ttft_p95=1s,tpot_p95=30ms"),
    ("qwen3-235b-a22b", "h200-sxm:2x8", "fixed:4000/400", 4.0, "trtllm", "ttft_p95=2s,tpot_p95=40ms"),
)
PAIRS_PER_QUESTION = 8


PREFILL_PER_NODE = {1024: 57_674, 2048: 54_543, 4096: 50_302}
DECODE_PER_NODE = 22_282
DECODE_SEQS = 256
MODEL, BALANCED = "deepseek-v3", replace(AS_SERVED, placement="eplb")


def prefill_pool(length: int, tactics: Tactics = PLAIN) -> Deployment:
    """SGLang's prefill at EP32 for prompts of `length` tokens, experts balanced."""
    layout, limits = parse_layout("attention_dp=32,ep=32,redundant_experts=32"), Limits(64, 8192)
    cluster = parse_cluster("h100-sxm:4x8")
    return deploy(load(MODEL), cluster, layout, engine("sglang"), limits, "deepep", length, BALANCED, tactics)


def prefill_per_node(length: int, tactics: Tactics = PLAIN, kernels: str = "sglang") -> float:
    """Prompt tokens per second and node of `prefill_pool`, with the measured tables of the engine `kernels`."""
    pool = prefill_pool(length, tactics)
    pool = replace(pool, engine=replace(pool.engine, kernels=kernels))
    rate = prefill_rate(pool.cost(), pool, Demand.of(load_workload(f"fixed:{length}/10", rate=1.0)))
    return rate.requests_per_s * length / 4


def decode_step(tactics: Tactics = PLAIN) -> StepTime:
    """SGLang's decode at EP72: 256 sequences per GPU of 2,000 tokens, experts balanced."""
    layout, cluster = parse_layout("attention_dp=72,ep=72,redundant_experts=32"), parse_cluster("h100-sxm:9x8")
    cost = step_cost(load(MODEL), layout, cluster, engine("sglang"), "deepep", BALANCED, None, tactics)
    return cost.decode(np.array(float(DECODE_SEQS)), np.array(2000.0))


def decode_per_node(tactics: Tactics = PLAIN) -> float:
    """Output tokens per second and node of `decode_step`."""
    return 8 * DECODE_SEQS / float(decode_step(tactics).total_s)


def published() -> None:
    for length, known in PREFILL_PER_NODE.items():
        tok_per_s = prefill_per_node(length)
        print(f"prefill EP32, {length} tokens: {tok_per_s:,.0f} tok/s/node, published {known:,}")
    print(f"decode EP72, 256 x 2K: {decode_per_node():,.0f} tok/s/node, published {DECODE_PER_NODE:,}")


def main() -> None:
    published()
    random.seed(1)
    for model, cluster_name, shape, rate, engine_name, limits in QUESTIONS:
        workload, slo = load_workload(shape, rate=rate, num_requests=1000), parse_slo(limits)
        cluster, rules = parse_cluster(cluster_name), handover(engine(engine_name))
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
