"""`compare`: clusters side by side at the same demand and SLO."""

from __future__ import annotations

import sys
import time
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from planner.cli.expert_options import DEFAULTS, Experts
from planner.cli.terminal import command_for, command_line, progress_bar, show


def compare(
    model: str,
    *,
    cluster: list[str],
    workload: str = "chat",
    rate: float | None = None,
    concurrency: int | None = None,
    slo: str = "ttft_p95=2s,tpot_p95=50ms",
    also: list[str] | None = None,
    terms: str | None = None,
    budget: str | None = None,
    power: float | None = None,
    racks: float | None = None,
    max_usd_per_mtok: float | None = None,
    baseline: str | None = None,
    uncertain: str | None = None,
    engine: str = "vllm",
    calibration: str | None = None,
    num_requests: int | None = None,
    weights: str | None = None,
    kv: Literal["auto", "bf16", "fp8", "fp8_ds_mla"] = "auto",
    oversubscription: float = 1.0,
    no_rails: bool = False,
    no_prefix_cache: bool = False,
    experts: Experts = DEFAULTS,
    seed: int = 0,
    jobs: int | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Compare clusters before purchase: each planned for the same demand and SLO, with cost, odds and what-ifs.

    Parameters
    ----------
    model
        Hugging Face id, alias, config.json, directory or model TOML.
    cluster
        A system (h200-sxm: as many nodes as the demand takes) or a fixed cluster (h200-sxm:4x8); repeat the option.
    workload
        Preset, `fixed:1024/256`, `uniform:..`, `lognormal:..`, a TOML or a trace CSV, as in `plan`.
    rate
        Requests per second in the busiest hour.
    concurrency
        Users in a closed loop instead of a rate.
    slo
        Objectives with units, such as ttft_p95=2s,tpot_p95=50ms.
    also
        Another model on the same cluster, such as "mixtral-8x7b rate=3 workload=rag slo=tpot_p95=80ms"; repeatable.
    terms
        Prices and terms of owning, renting, site and demand profile: a TOML (docs/economics.md).
    budget
        Ask what dollars of capital (5M) or a month (200k/month) buy on each system.
    power
        Ask what this many megawatts at the facility carry on each system.
    racks
        Ask what this many racks carry on each system.
    max_usd_per_mtok
        Cost ceiling per million output tokens: how fast can each system be for its users?
    baseline
        Offer that bands are compared with; the first by default.
    uncertain
        80 % error of the demand: rate=20%,prompt=10%,output=10% unless stated.
    engine
        Serving engine (`moeplan engines`), a version such as vllm-0.33.0, or a profile TOML.
    calibration
        Factors and host times of measured servers: a TOML of `moeplan calibrate --out`, or off; the shipped otherwise.
    num_requests
        Requests per simulation; chosen from the load otherwise.
    weights
        Weight formats instead of the checkpoint's: `fp8`, or `experts=nvfp4,attention=bf16,dense=bf16`.
    kv
        KV cache format; auto considers the checkpoint's and FP8.
    oversubscription
        Leaf-to-spine ratio of the network between nodes; 1 is full bisection.
    no_rails
        The network between nodes is not rail-optimised.
    no_prefix_cache
        Compute every prompt in full, although the engine finds shared prefixes and histories again.
    experts
        How experts are picked, placed and limited.
    seed
        Seed of arrivals, lengths and draws.
    jobs
        Processes at once; as many as there are cores by default. The answer does not depend on it.
    out
        Folder for the report: HTML, Markdown, CSV and JSON. Must be new or empty.
    json
        Print the facts as JSON.
    """
    from planner import options
    from planner.compare.comparison import compare as compare_offers
    from planner.compare.inverse import parse_limit
    from planner.compare.question import Demand, Question, parse_demand_error, parse_offers
    from planner.comparetext import compare_text
    from planner.economics import load_terms
    from planner.facts.comparison import comparison_facts
    from planner.runfolder import check_folder, write_comparison
    from planner.workload import parse_slo

    if out is not None:
        check_folder(out)
    options.check_positive(jobs=jobs)
    objectives, limit = parse_slo(slo), parse_limit(budget, power, racks)
    offers = parse_offers(cluster, oversubscription, not no_rails)
    chosen = options.precision(model, weights, None)
    demand = options.plan_demand(workload, rate, concurrency, num_requests, objectives)
    demands = [Demand(chosen, demand, objectives), *(options.also(text) for text in also or ())]
    question = Question(
        tuple(demands),
        options.engine(engine, no_prefix_cache, calibration),
        tuple(options.experts(d.model, experts if d.model.moe else DEFAULTS) for d in demands),
        None if kv == "auto" else (kv,),
        seed=seed,
        terms=load_terms(terms),
        demand_error=parse_demand_error(uncertain),
    )
    start = time.perf_counter()
    with progress_bar() as progress:
        answer = compare_offers(
            question,
            offers,
            baseline=baseline,
            limit=limit,
            max_usd_per_mtok=max_usd_per_mtok,
            jobs=jobs,
            progress=progress,
        )
    facts = comparison_facts(answer, command_line(), _plan_command(model, locals()))
    if out is not None:
        write_comparison(out, facts)
    show(facts, json, compare_text, wall_s=time.perf_counter() - start)
    if not facts["meets_slo"]:
        sys.exit(3)


_SHARED = (
    *("workload", "rate", "concurrency", "slo", "engine", "calibration", "num_requests"),
    *("weights", "kv", "oversubscription", "terms", "seed"),
)


def _plan_command(model: str, given: dict[str, Any]) -> str:
    """The plan of one system, with what was given here; the cluster is to be filled in."""
    defaults = {name: p.default for name, p in signature(compare).parameters.items()}
    options = {f"--{name.replace('_', '-')}": given[name] for name in _SHARED if given[name] != defaults[name]}
    flags = {"--no-rails": given["no_rails"], "--no-prefix-cache": given["no_prefix_cache"]}
    return command_for("plan", model, options={"--cluster": "{cluster}", **options, **flags}).replace(
        "'{cluster}'", "{cluster}"
    )
