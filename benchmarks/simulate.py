"""Speed of whole simulations with a timer that costs nothing, next to bare SimPy timeouts of the same process.

    python benchmarks/simulate.py [--requests 20000]

Prints per case: simulated requests per second, engine steps, microseconds per step, the ratio of the time of a whole
run to that of as many bare timeouts, and the growth of the peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Generator, Sequence
from typing import Any

import simpy

from planner.enginespec import EngineSpec
from planner.scheduler import RankWork
from planner.simulation import simulate
from planner.workload import load_workload

STEP_S = 0.02


class ConstantTimer:
    draw = 0
    link_s = 0.0

    def step_s(self, ranks: Sequence[RankWork]) -> float:
        return STEP_S


def bare_timeouts_per_s(count: int = 300_000) -> float:
    """Timeouts per second of one SimPy process that does nothing else."""
    env = simpy.Environment()

    def tick() -> Generator[simpy.Event, Any, None]:
        for _ in range(count):
            yield env.timeout(STEP_S)

    env.process(tick())
    start_s = time.perf_counter()
    env.run()
    return count / (time.perf_counter() - start_s)


CASES = {
    "1 rank, 40 requests/s": ("fixed:1024/256", 40.0, None, EngineSpec(1, 1, 1_000_000)),
    "1 rank, 20 requests/s": ("fixed:1024/256", 20.0, None, EngineSpec(1, 1, 1_000_000)),
    "1 rank, 5 requests/s": ("fixed:1024/256", 5.0, None, EngineSpec(1, 1, 1_000_000)),
    "1 rank, prefill first": ("fixed:1024/256", 20.0, None, EngineSpec(1, 1, 1_000_000, policy="prefill_first")),
    "1 rank, KV short": ("fixed:1024/256", 40.0, None, EngineSpec(1, 1, 150_000)),
    "1 rank, log-normal lengths": ("lognormal:1024~0.8/256~0.8", 40.0, None, EngineSpec(1, 1, 1_000_000)),
    "closed loop of 256": ("uniform:819-1024/205-256", None, 256, EngineSpec(1, 1, 1_000_000)),
    "16 replicas": ("fixed:1024/256", 400.0, None, EngineSpec(16, 1, 1_000_000)),
    "lockstep of 32 ranks": ("fixed:1024/256", 800.0, None, EngineSpec(1, 32, 1_000_000)),
}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    num_requests = parser.parse_args().requests
    bare = max(bare_timeouts_per_s() for _ in range(3))
    print(f"bare SimPy timeouts: {bare:,.0f} /s; {num_requests:,} requests per case")
    print(f"{'case':<28} {'requests/s':>11} {'steps':>9} {'us/step':>8} {'x bare':>7} {'peak MB':>9}")
    for name, (text, rate, concurrency, spec) in CASES.items():
        workload = load_workload(text, rate=rate, concurrency=concurrency, num_requests=num_requests)
        before_mb, start_s = peak_mb(), time.perf_counter()
        run = simulate(spec, ConstantTimer(), workload)
        wall_s = time.perf_counter() - start_s
        per_step_s = wall_s / run.num_steps
        print(
            f"{name:<28} {num_requests / wall_s:>11,.0f} {run.num_steps:>9,} {per_step_s * 1e6:>8.1f} "
            f"{per_step_s * bare:>7.1f} {peak_mb() - before_mb:>+9.0f}"
        )


if __name__ == "__main__":
    main()
