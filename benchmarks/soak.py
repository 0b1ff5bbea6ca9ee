"""Simulates a day of diurnal load: looks at the books of the run every 1,000th step and at memory every ten minutes.

    nice -n 10 python benchmarks/soak.py --hours 24 --json soak.json

Two servers: DeepSeek-V3 under vLLM (attention-DP 8, two replicas) with chat, and Mixtral under SGLang with agents that
share prefixes and converse. The rate swings by 60 % around its mean over a day.
Memory counts as flat when the last third of the day needs no more than 5 % above the first third.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import simpy
from machine import stamp

from planner.deployment import Deployment, deploy
from planner.engine import Limits, engine
from planner.hardware import parse_cluster
from planner.layout import parse_layout
from planner.model import load
from planner.records import FINISHED
from planner.simulation import simulate
from planner.timer import step_timer
from planner.workload import Arrivals, Workload, load_workload

SERVERS = {
    "DeepSeek-V3, vLLM, chat": ("deepseek-v3", "h200-sxm:2x8", "attention_dp=8,ep=8,replicas=2", "vllm", "chat", 4.0),
    "Mixtral 8x7B, SGLang, agents": ("mixtral-8x7b", "h100-sxm:1x8", "tp=8,ep=8", "sglang", "agents", 1.0),
}
"""Model, cluster, layout, engine, workload and mean requests per second."""
SWING = 0.6
EVERY_STEPS = 1000
FLAT = 1.05
_LOOK_S, _MEMORY_EVERY_S = 1.0, 600.0


class Auditor:
    """A process beside the run that checks its books whenever another thousand steps have passed."""

    def __init__(self) -> None:
        self.checks = 0
        self.rss_bytes: list[int] = []
        self.run: Any = None

    def __call__(self, run: Any) -> None:
        self.run = run
        run.env.process(self._look())

    def _look(self) -> Generator[simpy.Event, Any, None]:
        run, seen, next_s = self.run, 0, 0.0
        while run.num_done < run.num_requests:
            yield run.env.timeout(_LOOK_S)
            if run.engines.num_steps // EVERY_STEPS > seen:
                seen = run.engines.num_steps // EVERY_STEPS
                self.check()
            if run.env.now >= next_s:
                next_s += _MEMORY_EVERY_S
                self.rss_bytes.append(_rss_bytes())

    def check(self) -> None:
        """Blocks within the pool, batches within their limits, and every request sent is somewhere."""
        run, spec = self.run, self.run.spec
        self.checks += 1
        for group in run.groups:
            for position, rank in enumerate(group.ranks):
                assert 0 <= rank.free_blocks <= rank.total_blocks
                assert len(rank.running) <= spec.max_num_seqs and rank.num_decoding <= len(rank.running)
                assert 0 <= rank.context_tokens <= rank.num_decoding * spec.largest_request_tokens
                assert rank.final_blocks >= 0
                held = run.in_flight[group.index * len(group.ranks) + position]
                mail = sum(to is rank for to, _ in group.mail)
                assert held == len(rank.running) + len(rank.waiting) + mail
            assert group.in_flight == sum(run.in_flight[group.index * len(group.ranks) :][: len(group.ranks)])
        assert run.num_done + sum(run.in_flight) <= run.num_requests

    def check_end(self) -> None:
        """Nobody is left and every block is free."""
        assert sum(self.run.in_flight) == 0
        for group in self.run.groups:
            for rank in group.ranks:
                assert not rank.running and not rank.waiting
                assert rank.free_blocks == rank.total_blocks and rank.context_tokens == rank.num_decoding == 0


def diurnal(mean_per_s: float, hours: float, seed: int = 0) -> Arrivals:
    """Poisson arrivals whose rate swings by SWING around the mean over 24 h, thinned from the peak rate."""
    rng, end_s = np.random.default_rng(seed), hours * 3600
    peak = mean_per_s * (1 + SWING)
    times = np.cumsum(rng.exponential(1 / peak, int(peak * end_s * 1.1) + 100))
    times = times[times < end_s]
    share = (1 - SWING * np.cos(2 * math.pi * times / 86400)) / (1 + SWING)
    return Arrivals.trace(times[rng.random(len(times)) < share].tolist())


def soak(server: str, hours: float, seed: int = 0) -> dict[str, Any]:
    """Facts of one soaked server; AssertionError when its books are wrong."""
    model, cluster, layout, serving, name, rate = SERVERS[server]
    limits = Limits(256, 8192)
    deployment: Deployment = deploy(
        load(model),
        parse_cluster(cluster),
        parse_layout(layout),
        engine(serving),
        limits,
        "allgather_reducescatter",
        8192,
    )
    arrivals = diurnal(rate, hours, seed)
    workload: Workload = replace(load_workload(name), arrivals=arrivals, num_requests=len(arrivals.times_s))
    auditor = Auditor()
    timer, spec = step_timer(deployment.cost(), deployment.limits), deployment.spec(deployment.layout.replicas)
    before_s = time.process_time()
    run = simulate(spec, timer, workload, seed=seed, record_steps=False, disturb=auditor)
    cpu_s = time.process_time() - before_s
    auditor.check_end()
    r = run.requests
    done = r.status == FINISHED
    assert done.sum() + run.num_rejected == len(r) == workload.num_requests
    assert (r.produced_tokens[done] == r.output_tokens[done]).all()
    assert (r.arrival_s[done] <= r.admitted_s[done]).all() and (r.admitted_s < r.finish_s)[done].all()
    rss = auditor.rss_bytes
    third = max(1, len(rss) // 3)
    return {
        "server": server,
        "hours": hours,
        "requests": len(r),
        "steps": run.num_steps,
        "checks": auditor.checks,
        "rejected": run.num_rejected,
        "preemptions": int(r.num_preemptions.sum()),
        "cpu_s": round(cpu_s, 1),
        "rss_first_third_mb": round(max(rss[:third]) / 1e6, 1),
        "rss_last_third_mb": round(max(rss[-third:]) / 1e6, 1),
        "flat": max(rss[-third:]) <= FLAT * max(rss[:third]),
        **stamp(),
    }


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the results")
    chosen = parser.parse_args()
    results = {}
    for server in SERVERS:
        results[server] = soak(server, chosen.hours, chosen.seed)
        print(json.dumps(results[server]), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps({"servers": results}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
