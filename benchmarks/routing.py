"""What it costs to draw the router: whole simulations with everything on, against uniform routing in the same run.

    python benchmarks/routing.py [--requests 20000]

Prints requests per second of wall time per case and the time over that of uniform routing. Engine steps differ between
cases because the steps take other times, so the time per step is printed as well.
"""

from __future__ import annotations

import argparse
import time

from planner.capacity import CapacityLimit
from planner.deployment import deploy, run
from planner.engine import engine
from planner.experts import ExpertSettings
from planner.fit import limits_for
from planner.hardware import parse_cluster
from planner.layout import parse_layout
from planner.model import load
from planner.routing import UNIFORM
from planner.routing.drift import Drift
from planner.workload import load_workload

CASES = {
    "uniform": ExpertSettings(skew=UNIFORM),
    "records' skew": ExpertSettings(),
    "balanced": ExpertSettings(placement="eplb"),
    "drift, rebalanced": ExpertSettings(placement="eplb", drift=Drift(4000), rebalance_steps=4000),
    "drops": ExpertSettings(limit=CapacityLimit("megatron", 1.25)),
    "all of it": ExpertSettings(
        placement="eplb",
        limit=CapacityLimit("megatron", 1.25),
        drift=Drift(4000),
        rebalance_steps=4000,
        top_k_spread=1.0,
    ),
}
LAYOUTS = {"1 rank, ep 8": "tp=8,ep=8", "16 ranks, ep 16": "attention_dp=16,ep=16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    num_requests = parser.parse_args().requests
    model, profile, cluster = load("deepseek-v3"), engine("vllm"), parse_cluster("h200-sxm:2x8")
    for title, text in LAYOUTS.items():
        cut = parse_layout(text)
        limits = limits_for(profile, cluster.system, None, None, cut.attention_dp)
        workload = load_workload("fixed:1024/256", rate=8 * cut.attention_dp**0.5, num_requests=num_requests)
        base = 0.0
        print(f"{title}, {num_requests:,} requests\n{'case':<20} {'requests/s':>11} {'us/step':>8} {'x uniform':>9}")
        for name, settings in CASES.items():
            deployment = deploy(model, cluster, cut, profile, limits, "allgather_reducescatter", 1200, settings)
            start_s = time.perf_counter()
            result = run(deployment, workload)
            wall_s = time.perf_counter() - start_s
            per_step_s = wall_s / result.simulation.num_steps
            base = base or per_step_s
            print(f"{name:<20} {num_requests / wall_s:>11,.0f} {per_step_s * 1e6:>8.1f} {per_step_s / base:>9.2f}")


if __name__ == "__main__":
    main()
