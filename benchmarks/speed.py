"""Wall time and peak memory of the two headline jobs, as a user runs them.

python benchmarks/speed.py
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

PLAN = (
    "plan deepseek-ai/DeepSeek-V3 --cluster h200-sxm:2x8 --workload chat --rate 4 "
    "--slo ttft_p95=2s,tpot_p95=50ms --json"
)
SIMULATE = (
    "simulate mixtral-8x7b --cluster h100-sxm:1x8 --layout tp=8,ep=8 --workload fixed:1024/256 --rate {} "
    "--num-requests 20000 --json"
)


def timed(arguments: str) -> tuple[dict[str, float], float]:
    start = time.perf_counter()
    command = [sys.executable, "-m", "planner", *arguments.split()]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out), time.perf_counter() - start


def main() -> None:
    facts, wall_s = timed(PLAN)
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    print(f"plan: {wall_s:.1f} s wall, {peak_mb:.0f} MB peak, {facts['considered']:,} candidates")
    for rate in (10, 20, 40):
        facts, wall_s = timed(SIMULATE.format(rate))
        rate_in_run = facts["num_requests"] / facts["wall_s"]
        print(
            f"simulate at {rate} requests/s: {rate_in_run:,.0f} simulated requests/s "
            f"({facts['num_requests'] / wall_s:,.0f} including start-up), {facts['num_steps']:,} steps"
        )
    for arguments in ("--help", "describe deepseek-v3 --json", "fit deepseek-v3 --gpu h100-sxm --json"):
        walls = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "planner", *arguments.split()], capture_output=True, check=True)
            walls.append(time.perf_counter() - start)
        print(f"{arguments}: {min(walls):.2f} s")


if __name__ == "__main__":
    main()
