"""Expected against simulated hits of prefix caches: DeepSeek-V3 on 8 x H200 under vLLM's defaults.

python benchmarks/prefix_hits.py
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.deployment import deploy, run
from planner.engine import engine
from planner.fit import limits_for
from planner.hardware import parse_cluster
from planner.layout import parse_layout
from planner.model import load
from planner.prefixhits import HitModel
from planner.steady import steady_with_hits
from planner.tables import table
from planner.workload import Arrivals, Lengths, SharedPrefix, Turns, Workload, load_workload

DOCUMENTS = Workload(
    "documents",
    Lengths.lognormal(200, 0.6),
    Lengths.lognormal(300, 0.6),
    Arrivals.poisson(1.0),
    4000,
    prefix=SharedPrefix(400, Lengths.lognormal(4000, 0.4), zipf=0.8),
)
ASSISTANT = Workload(
    "assistant",
    Lengths.lognormal(1200, 0.8),
    Lengths.lognormal(300, 0.6),
    Arrivals.poisson(1.0),
    4000,
    turns=Turns(Lengths.uniform(1, 9), think_s=60.0, max_context_tokens=32768),
)


@dataclass(frozen=True)
class Case:
    """A layout, what it serves, and how requests are spread."""

    layout: str
    workload: Workload
    rate_per_s: float
    router: str = "least_requests"


CASES = [
    *(Case("tp=8,ep=8", ASSISTANT, rate) for rate in (0.5, 1.0, 1.5, 2.0, 3.0)),
    *(Case("tp=8,ep=8", DOCUMENTS, rate) for rate in (1.0, 4.0, 7.0)),
    *(
        Case("attention_dp=8,ep=8", load_workload("agents"), 4.0, router)
        for router in ("least_requests", "prefix_affinity")
    ),
    *(
        Case("attention_dp=8,ep=8", load_workload("multi-turn"), rate, router)
        for rate in (4.0, 16.0)
        for router in ("least_requests", "prefix_affinity")
    ),
]


def row(case: Case) -> tuple[str, ...]:
    profile, layout, cluster = engine("vllm"), parse_layout(case.layout), parse_cluster("h200-sxm:1x8")
    workload = case.workload.with_rate(case.rate_per_s).with_num_requests(4000)
    limits = limits_for(profile, cluster.system, None, None, layout.attention_dp)
    backend = "allgather_reducescatter" if layout.attention_dp > 1 else "all_reduce"
    context = int(workload.mean_prompt_tokens + workload.mean_output_tokens / 2)
    deployment = deploy(load("deepseek-v3"), cluster, layout, profile, limits, backend, context, router=case.router)
    ranks = layout.pp * layout.attention_dp
    model = HitModel(workload, profile.block_tokens, ranks, case.router == "prefix_affinity")
    kv_tokens = deployment.memory.kv_tokens // layout.pp
    question = deployment.cost(), limits.max_batched_tokens, profile.policy, workload
    steady = steady_with_hits(*question, model, kv_tokens)
    batch = steady.batch_at(np.array(case.rate_per_s / ranks))
    expected = float(np.interp(batch, steady.batch, steady.hit_rate))
    summary = run(deployment, workload).summary
    return (
        case.layout,
        workload.name,
        f"{case.rate_per_s:g}",
        case.router.replace("_", " "),
        f"{expected:.1%}",
        f"{summary.prefix_hit_rate:.1%}",
        f"{1000 * float(steady.tpot_at(batch)):.0f}",
        f"{1000 * summary.tpot_s.mean:.0f}",
    )


def main() -> None:
    header = ["layout", "workload", "requests/s", "router", "expected", "simulated", "TPOT, ms", "simulated, ms"]
    print(table(header, [row(case) for case in CASES], left=2))


if __name__ == "__main__":
    main()
