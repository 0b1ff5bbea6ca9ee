"""Replica-level aggregation of `moeplan fleet` against the simulation of every replica.

    python benchmarks/fleet.py [--replicas 16] [--hour 240]

A day of 24 squeezed hours is lived through twice by the same fleet: by `planner.fleet.live`, and request by request.
The autoscaler's schedule of replicas is the same in both. Prints the tables of docs/scale.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import numpy as np

from planner import options
from planner.deployment import Deployment, deploy, run, with_replicas
from planner.economics import DemandProfile
from planner.failures.recovery import Sourced
from planner.failures.settings import FailureSettings, RecoverySettings
from planner.fit import limits_for
from planner.fleet import Behaviour, Day, Hour, Outage, Policy, live, measure
from planner.fleet.behaviour import QUANTILES
from planner.layout import parse_layout
from planner.records import RequestTable
from planner.reliability import ready_by_source
from planner.simulation import simulate
from planner.tactictimer import tactic_timer
from planner.workload import Arrivals, Slo, Workload, parse_slo

SLO = "ttft_p95=300ms,tpot_p95=50ms"
STEP_S = 15.0
CASES = (
    ("mixtral-8x7b", "h100-sxm:64x8", "tp=2", "chat", SLO),
    ("deepseek-v3", "h200-sxm:64x8", "tp=8,ep=8", "chat", "ttft_p95=1s,tpot_p95=80ms"),
)


def deployment_of(model: str, cluster: str, layout: str, demand: Workload) -> Deployment:
    chosen, profile = options.precision(model, None, None), options.engine("vllm")
    offered, cut = options.clusters([cluster])[0], parse_layout(layout)
    limits = limits_for(profile, offered.system, None, None, cut.attention_dp)
    context = int(demand.mean_prompt_tokens + demand.mean_output_tokens / 2)
    return deploy(chosen, offered, cut, profile, limits, "all_reduce", context)


def arrivals(day: Day, seed: int) -> Arrivals:
    """A Poisson process with the rate of the day, by thinning."""
    rng = np.random.default_rng([seed, 9])
    end_s = 24 * day.hour_s
    candidates = np.sort(rng.random(rng.poisson(day.peak_per_s * end_s)) * end_s)
    rates = np.array([day.rate_per_s(t) for t in np.arange(0.0, end_s + 1.0)])
    kept = rng.random(len(candidates)) * day.peak_per_s < np.interp(candidates, np.arange(len(rates)), rates)
    return Arrivals.trace(candidates[kept].tolist())


def whole(deployment: Deployment, demand: Workload, schedule: list[tuple[float, int]], seed: int) -> RequestTable:
    """Every request, with as many replicas open as `schedule` says."""
    most = max(serving for _, serving in schedule)
    spec = deployment.spec(most)
    ranks = spec.ranks_per_group

    def disturb(running: Any) -> None:
        def follow() -> Generator[Any, Any, None]:
            for time_s, serving in schedule:
                if time_s > running.env.now:
                    yield running.env.timeout(time_s - running.env.now)
                running.balancer.open = list(range(serving * ranks)) if serving < most else None

        running.env.process(follow())

    timer = tactic_timer(deployment.cost(), deployment.limits)
    return simulate(spec, timer, demand, seed=seed, record_steps=False, disturb=disturb).requests


def errors(hours: tuple[Hour, ...], requests: RequestTable, day: Day, slo: Slo) -> dict[str, np.ndarray]:
    """Aggregated over simulated minus 1 by hour `[24]`; of the attained share the difference."""
    hour = (requests.arrival_s / day.hour_s).astype(int)
    limits = slo.limits_s()
    good = (requests.ttft_s <= limits["ttft"]) & ((requests.tpot_s <= limits["tpot"]) | np.isnan(requests.tpot_s))
    found: dict[str, list[float]] = {}
    for number, row in enumerate(hours):
        here = hour == number
        for metric in ("ttft", "tpot", "e2e"):
            values = getattr(requests, f"{metric}_s")[here]
            values = values[np.isfinite(values)]
            for name, ours, theirs in (
                ("mean", row.means_s[("ttft", "tpot", "e2e").index(metric)], values.mean()),
                ("p95", row.percentile_s(metric, 0.95), np.percentile(values, 95)),
            ):
                found.setdefault(f"{metric} {name}", []).append(ours / theirs - 1)
        found.setdefault("SLO attained (points)", []).append(row.attained - good[here].mean())
    return {name: np.array(values) for name, values in found.items()}


def print_errors(title: str, found: dict[str, np.ndarray]) -> None:
    print(f"\n{title}\n\n| by hour | median error | worst hour | mean (bias) |\n|---|---|---|---|")
    for name, values in found.items():
        size = np.abs(values)
        worst = values[size.argmax()]
        print(f"| {name} | {np.median(size):.1%} | {worst:+.1%} | {values.mean():+.1%} |")


def scaled_day(behaviour: Behaviour, one: Deployment, demand: Workload, shape: str, chosen: argparse.Namespace) -> None:
    """A day with an autoscaler whose delays are as short against its hours as real ones are."""
    hourly, seed = DemandProfile(shape=shape).hourly[:24], chosen.seed
    day = Day(hourly, chosen.replicas * behaviour.most_per_s(), chosen.hour)
    ready_s, most = STEP_S, 10 * chosen.replicas
    headroom = day.steepest(ready_s + 2 * STEP_S, STEP_S, behaviour.most_per_s())
    policy = Policy(behaviour.most_per_s(), headroom, 0, most, ready_s, 30.0, STEP_S, hold_s=2 * STEP_S)
    schedule: list[tuple[float, int]] = []
    begun = time.process_time()
    hours = live(behaviour, day, policy, step_s=STEP_S, watch=lambda t, n: schedule.append((t, n)))
    ours = time.process_time() - begun
    sent = arrivals(day, seed)
    begun = time.process_time()
    requests = whole(one, replace(demand, arrivals=sent, num_requests=len(sent.times_s)), schedule, seed)
    theirs = time.process_time() - begun
    counts = [n for _, n in schedule]
    print_errors(
        f"{one.model.name}, {one.layout}, day {shape}: {min(counts)} to {max(counts)} replicas, autoscaled; "
        f"{len(requests):,} requests in {theirs:.0f} CPU s, aggregated in {ours:.1f} s",
        errors(hours, requests, day, behaviour.slo),
    )


def failing_day(behaviour: Behaviour, one: Deployment, demand: Workload, chosen: argparse.Namespace) -> None:
    """A flat day below capacity with many failures: what they hit and what that costs."""
    slo, replicas, day_s = behaviour.slo, chosen.replicas, 24 * chosen.hour
    day = Day((1.0,) * 24, 0.8 * replicas * behaviour.most_per_s(), chosen.hour)
    recovery = RecoverySettings(Sourced(30.0, "benchmark"), "dram", None, 0.0)
    mttf_s = day_s * replicas / 30
    ready_s = ready_by_source(one, recovery)["dram"].total_s
    outage = Outage(mttf_s, 30.0 + ready_s, 30.0, False)
    policy = Policy(behaviour.most_per_s(), 1.0, 0, replicas, 0.0, 0.0, 0.0)
    hours = live(behaviour, day, policy, fixed=replicas, outage=outage, step_s=STEP_S)
    asked = demand.with_rate(day.peak_per_s).with_num_requests(int(day.peak_per_s * day_s))
    failing = FailureSettings(recovery, (), mttf_s * one.layout.replica_gpus, "retry", False)
    fleet = replace(one, layout=with_replicas(one.layout, replicas))
    result = run(fleet, asked, slo, seed=chosen.seed, max_replicas=replicas, failures=failing)
    assert result.failures is not None
    incidents = [i for i in result.failures.incidents if np.isfinite(i.detected_s)]
    requests, limits = result.simulation.requests, slo.limits_s()
    good = (requests.ttft_s <= limits["ttft"]) & ((requests.tpot_s <= limits["tpot"]) | np.isnan(requests.tpot_s))
    failures = sum(h.failures for h in hours)
    hit = sum(i.num_requests for i in incidents) / len(incidents)
    print(f"\n{one.model.name}, {one.layout}, {replicas} replicas\n\n| | aggregated | simulated |\n|---|---|---|")
    print(f"| failures | {failures:.0f} | {len(incidents)} |")
    print(f"| requests hit per failure | {sum(h.hit for h in hours) / failures:.0f} | {hit:.0f} |")
    print(f"| SLO missed | {1 - np.mean([h.attained for h in hours]):.2%} | {1 - good.mean():.2%} |")
    print(
        f"| replica-seconds down | {sum(h.down_hours for h in hours) * 3600:.0f} | {result.failures.downtime_s:.0f} |"
    )


def cells(one: Deployment, demand: Workload, slo: Slo) -> None:
    """How many replicas must be simulated together."""
    print(f"\n{one.model.name}, {one.layout}\n")
    print("| replicas simulated | load that keeps the SLO | TTFT p95 at 70 % of capacity | TPOT p95 |")
    print("|---|---|---|---|")
    capacity = measure(one, demand, slo).capacity_per_s
    for cell in (1, 2, 4, 8, 16):
        found = measure(one, demand, slo, cell=cell)
        ttft, tpot = (float(np.interp(0.95, QUANTILES, row)) for row in found.at(0.7 * capacity)[:2])
        print(f"| {cell} | {found.most_per_s():.2f} /s | {ttft * 1e3:.0f} ms | {tpot * 1e3:.1f} ms |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--hour", type=float, default=240.0)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    for model, cluster, layout, workload, slo in CASES:
        demand, promise = options.demand(workload, 1.0, None, None), parse_slo(slo)
        one = deployment_of(model, cluster, layout, demand)
        behaviour = measure(one, demand, promise)
        for shape in ("consumer", "office"):
            scaled_day(behaviour, one, demand, shape, chosen)
        failing_day(behaviour, one, demand, chosen)
        cells(one, demand, promise)


if __name__ == "__main__":
    main()
