"""The command `fleet`: thousands of GPUs through a day."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from planner.cli.commands import RouterName
from planner.cli.failure_options import AS_ENGINE, Recoveries
from planner.cli.failures import Backend, described_deployment
from planner.cli.terminal import command_line, progress_bar, show

if TYPE_CHECKING:
    from planner.economics import Terms
    from planner.fleet import Day


def show_fleet(
    model: str,
    *,
    cluster: str,
    layout: str,
    rate: float,
    workload: str = "chat",
    slo: str = "ttft_p95=2s,tpot_p95=50ms",
    day: str | None = None,
    days: int | None = None,
    engine: str = "vllm",
    mtbf_gpu: str | None = None,
    availability: str = "99.9%",
    router: RouterName = "least_requests",
    max_num_seqs: int | None = None,
    max_batched_tokens: int | None = None,
    backend: Backend = "allgather_reducescatter",
    weights: str | None = None,
    kv: str | None = None,
    terms: str | None = None,
    recovery: Recoveries = AS_ENGINE,
    seed: int = 0,
    json: bool = False,
) -> None:
    """GPUs, cost and SLO by hour of a fleet of many replicas, with autoscaling and failures.

    Parameters
    ----------
    model
        Hugging Face id, alias, config.json, directory or model TOML.
    cluster
        All GPUs there are, as system:nodes x GPUs, such as h200-sxm:1250x8.
    layout
        Degrees of parallelism of one replica, such as tp=8,ep=8; the load decides how many there are.
    rate
        Requests per second in the busiest hour.
    workload
        As in `plan`; lengths of requests.
    slo
        Objectives with units, such as ttft_p95=2s,tpot_p95=50ms.
    day
        Load by hour: flat, office, consumer, or 24 numbers such as 1,1,2,...; that of --terms, else consumer.
    days
        Days to live through; one workday, or a week where the weekend differs.
    engine
        Serving engine: vllm, sglang, trtllm, a version such as vllm-0.33.0, or a profile TOML on one of them.
    mtbf_gpu
        Mean time between failures of one GPU, such as 50000h; that of Llama 3's training otherwise.
    availability
        Share of the time in which enough replicas work; decides how many are spare.
    router
        How requests are spread over replicas.
    max_num_seqs
        Sequences at once per scheduler rank; the engine's default otherwise.
    max_batched_tokens
        Tokens per step per scheduler rank; the engine's default otherwise.
    backend
        How attention-DP ranks exchange tokens with experts.
    weights
        Weight formats instead of the checkpoint's.
    kv
        KV cache format: bf16, fp8 or fp8_ds_mla.
    terms
        Prices, discounts and the day's load in a TOML (docs/economics.md).
    recovery
        How a failure is noticed and a replica started.
    seed
        Seed of arrivals and lengths.
    json
        Print the facts as JSON.
    """
    from planner.economics import load_terms
    from planner.engine import engine as load_engine
    from planner.facts.fleet import fleet_facts
    from planner.failures.recovery import Sourced
    from planner.failures.recovery import mtbf_gpu as known_mtbf
    from planner.failures.settings import GIVEN, parse_duration, parse_share, recovery_settings
    from planner.fleet import FleetQuestion, plan_fleet
    from planner.fleettext import fleet_text
    from planner.workload import parse_slo

    start = time.perf_counter()
    objectives, bought = parse_slo(slo), load_terms(terms)
    through, num_days = _day(day, days, bought, rate)
    mtbf = known_mtbf()
    if mtbf_gpu is not None:
        mtbf = Sourced(parse_duration("--mtbf-gpu", mtbf_gpu, positive=True), GIVEN)
    limits, formats = (max_num_seqs, max_batched_tokens), (weights, kv)
    one, demand = described_deployment(
        model, cluster, layout, engine, workload, None, "contiguous", limits, backend, formats
    )
    question = FleetQuestion(
        replace(one, router=router),
        demand,
        objectives,
        through,
        mtbf,
        recovery_settings(load_engine(engine), recovery),
        bought,
        parse_share("--availability", availability),
        num_days,
        seed,
    )
    with progress_bar() as progress:
        answer = plan_fleet(question, lambda share: progress("simulate a few replicas", share))
    show(fleet_facts(answer, command_line()), json, fleet_text, wall_s=time.perf_counter() - start)
    if not answer.meets_slo:
        sys.exit(3)


def _day(text: str | None, days: int | None, terms: Terms, rate_per_s: float) -> tuple[Day, int]:
    """Load of the day, or of the week where the weekend differs, and days to live through."""
    from planner.economics.demand import HOURS_PER_DAY, DemandProfile
    from planner.errors import InputError
    from planner.fleet import Day

    profile = terms.demand
    if text is not None and "," in text:
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            raise InputError(f"--day {text}: give flat, office, consumer or 24 numbers") from None
        profile = DemandProfile(shape=numbers, source="--day")
    elif text is not None or profile == DemandProfile():
        profile = DemandProfile(shape=text or "consumer")
    week = profile.hourly
    is_one = week[:HOURS_PER_DAY] == week[-HOURS_PER_DAY:]
    return Day(week[:HOURS_PER_DAY] if is_one else week, rate_per_s), (1 if is_one else 7) if days is None else days
