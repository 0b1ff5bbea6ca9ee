"""The commands: parse, call one planner function, print. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal

from planner.cli.expert_options import DEFAULTS, Experts
from planner.cli.failure_options import NO_FAILURES, Failures
from planner.cli.pool_options import ONE_POOL, Pools
from planner.cli.tactic_options import NONE, Chosen
from planner.cli.terminal import command_line, progress_bar, show

RouterName = Literal["least_requests", "round_robin", "power_of_two", "prefix_affinity"]
_DEFAULT_SLO = "ttft_p95=2s,tpot_p95=50ms"
_DEFAULT_WORKLOAD = "chat"


def describe(model: str, *, json: bool = False) -> None:
    """Parameters, layers, weight bytes and KV bytes of a model.

    Parameters
    ----------
    model
        Hugging Face id or alias of a bundled model, a config.json, a directory with one, or a model TOML.
    json
        Print the facts as JSON.
    """
    from planner.facts import model_facts
    from planner.model import load
    from planner.text import describe_text

    facts = model_facts(load(model))
    show(facts, json, describe_text)


def fit(
    model: str,
    *,
    gpu: str,
    engine: str = "vllm",
    context: int = 4096,
    num_gpus: int | None = None,
    max_num_seqs: int | None = None,
    max_batched_tokens: int | None = None,
    weights: str | None = None,
    kv: str | None = None,
    json: bool = False,
) -> None:
    """Does it fit, on how few GPUs, with how many concurrent tokens, and which term breaks it.

    Parameters
    ----------
    model
        Hugging Face id, alias, config.json, directory or model TOML.
    gpu
        System name (`moeplan profiles list`) or a profile TOML.
    engine
        Serving engine whose memory rule applies (`moeplan engines`): vllm, vllm-0.33.0 or a profile TOML.
    context
        Tokens of one sequence (prompt plus output).
    num_gpus
        Ask about exactly this many GPUs instead of searching the smallest number.
    max_num_seqs
        Sequences at once per scheduler rank; the engine's default otherwise.
    max_batched_tokens
        Tokens per step per scheduler rank; the engine's default otherwise.
    weights
        Weight formats instead of the checkpoint's: `fp8`, or `experts=nvfp4,attention=bf16,dense=bf16`.
    kv
        KV cache format: bf16, fp8 or fp8_ds_mla.
    json
        Print the facts as JSON.
    """
    from planner import fit as fitting
    from planner import options
    from planner.engine import engine as load_engine
    from planner.facts import fit_facts
    from planner.hardware import Cluster
    from planner.hardware import system as load_system
    from planner.text import fit_text

    options.check_positive(context=context, max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens)
    chosen, profile = options.precision(model, weights, kv), load_engine(engine)
    system = load_system(gpu)
    limits = fitting.limits_for(profile, system, max_num_seqs, max_batched_tokens)
    answer = fitting.fit(chosen, system, profile, context_tokens=context, num_gpus=num_gpus, limits=limits)
    remedies: tuple[str, ...] = ()
    if not answer.fits:
        from planner.remedies import memory_remedies

        remedies = memory_remedies(chosen, [Cluster(system, 1, 1)], profile, context)
    show(fit_facts(chosen, system, profile, answer) | {"next": list(remedies)}, json, fit_text)
    if not answer.fits:
        sys.exit(3)


def plan(
    model: str,
    *,
    cluster: list[str],
    workload: str = _DEFAULT_WORKLOAD,
    rate: float | None = None,
    concurrency: int | None = None,
    slo: str = _DEFAULT_SLO,
    engine: str = "vllm",
    calibration: str | None = None,
    num_requests: int | None = None,
    weights: str | None = None,
    kv: Literal["auto", "bf16", "fp8", "fp8_ds_mla"] = "auto",
    oversubscription: float = 1.0,
    no_rails: bool = False,
    router: RouterName = "least_requests",
    no_prefix_cache: bool = False,
    experts: Experts = DEFAULTS,
    tactics: Chosen = NONE,
    terms: str | None = None,
    disaggregate: bool = False,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Recommend the cheapest layout that serves the workload within the SLO, with reasons.

    Parameters
    ----------
    model
        Hugging Face id, alias, config.json, directory or model TOML.
    cluster
        Offered GPUs as system:nodes x GPUs, such as h200-sxm:2x8; repeat the option to offer several.
    workload
        Preset (chat, rag, code, summarize, reasoning, batch, agents, multi-turn), `fixed:1024/256`,
        `uniform:819-1024/819-1024`, `lognormal:1024~0.6/256~0.8`, a TOML, or a trace CSV (arrival_s, prompt_tokens,
        output_tokens).
    rate
        Requests per second (Poisson unless the workload says otherwise).
    concurrency
        Users in a closed loop instead of a rate.
    slo
        Objectives with units, such as ttft_p95=2s,tpot_p95=50ms.
    engine
        Serving engine (`moeplan engines`): vllm, sglang, trtllm, llamacpp or generic, vllm-0.33.0 for a version, or a
        profile TOML.
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
    router
        How requests are spread over replicas. Attention-DP ranks, each with a prefix cache of its own, follow the rule
        of the engine profile (`rank_router`), but with prefix_affinity, which chooses among all of them.
    no_prefix_cache
        Compute every prompt in full, although the engine finds shared prefixes and histories again.
    experts
        How experts are picked, placed and limited.
    tactics
        What the engine does beyond plain batching.
    terms
        Prices and commercial terms, a TOML (docs/economics.md); rental list prices otherwise.
    disaggregate
        Also search prefill and decode in two pools, and say whether that is worth it.
    seed
        Seed of arrivals and lengths.
    out
        Folder for the run: inputs, facts as JSON, layouts and requests as CSV, manifest, the report as HTML and
        Markdown. Must be new or empty.
    json
        Print the facts as JSON.
    """
    from planner import options
    from planner.economics import load_terms
    from planner.facts.plan import plan_facts
    from planner.pooltext import plan_pools_text
    from planner.recommend import recommend
    from planner.tactics import parse_tactics
    from planner.text import plan_text
    from planner.workload import parse_slo

    if out is not None:
        from planner.runfolder import check_folder

        check_folder(out)
    objectives = parse_slo(slo)
    demand = options.plan_demand(workload, rate, concurrency, num_requests, objectives)
    chosen = options.precision(model, weights, None)
    profile = options.engine(engine, no_prefix_cache, calibration)
    drafts = parse_tactics(tactics.speculative, tactics.acceptance, tactics.overlap, chosen, profile)
    clusters = options.clusters(cluster, oversubscription, not no_rails)
    settings, agreed = options.experts(chosen, experts), load_terms(terms)
    if disaggregate:
        from planner.disaggregation.plan import check_question

        check_question(chosen, demand, settings, drafts, router)
    with progress_bar() as progress:
        answer = recommend(
            chosen,
            clusters,
            demand,
            objectives,
            profile,
            kv_formats=None if kv == "auto" else (kv,),
            router=router,
            experts=settings,
            tactics=drafts,
            terms=agreed,
            seed=seed,
            progress=progress,
        )
        pools = None
        if disaggregate:
            from planner.disaggregation.plan import plan_pools

            pools = plan_pools(answer, progress)
    facts = plan_facts(answer, command_line())
    if pools is not None:
        from planner.facts.disaggregation import plan_pools_facts

        facts["disaggregation"] = plan_pools_facts(pools)
    if out is not None:
        from planner.runfolder import write_run

        write_run(out, answer, facts)
    wall_s = answer.wall_s + (pools.wall_s if pools else 0.0)
    show(facts, json, plan_pools_text if pools else plan_text, wall_s=wall_s)
    if not (answer.meets_slo or (pools and pools.meets_slo)):
        sys.exit(3)


def simulate(
    model: str,
    *,
    cluster: str,
    layout: str | None = None,
    workload: str = _DEFAULT_WORKLOAD,
    rate: float | None = None,
    concurrency: int | None = None,
    slo: str | None = None,
    engine: str = "vllm",
    calibration: str | None = None,
    num_requests: int | None = None,
    max_num_seqs: int | None = None,
    max_batched_tokens: int | None = None,
    backend: Literal["allgather_reducescatter", "deepep"] = "allgather_reducescatter",
    weights: str | None = None,
    kv: str | None = None,
    oversubscription: float = 1.0,
    no_rails: bool = False,
    router: RouterName = "least_requests",
    no_prefix_cache: bool = False,
    experts: Experts = DEFAULTS,
    tactics: Chosen = NONE,
    failures: Failures = NO_FAILURES,
    pools: Pools = ONE_POOL,
    terms: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Simulate one layout, or a prefill and a decode pool, request by request.

    Parameters
    ----------
    model
        Hugging Face id, alias, config.json, directory or model TOML.
    cluster
        GPUs as system:nodes x GPUs, such as h200-sxm:1x8.
    layout
        Degrees of parallelism, such as tp=8,ep=8 or attention_dp=8,ep=8,replicas=2; two pools have a layout each.
    workload
        As in `plan`.
    rate
        Requests per second.
    concurrency
        Users in a closed loop instead of a rate.
    slo
        Objectives to judge the run by, such as ttft_p95=2s,tpot_p95=50ms.
    engine
        Serving engine (`moeplan engines`): vllm, sglang, trtllm, llamacpp or generic, vllm-0.33.0 for a version, or a
        profile TOML.
    calibration
        Factors and host times of measured servers: a TOML of `moeplan calibrate --out`, or off; the shipped otherwise.
    num_requests
        Requests to simulate.
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
    oversubscription
        Leaf-to-spine ratio of the network between nodes; 1 is full bisection.
    no_rails
        The network between nodes is not rail-optimised.
    router
        How requests are spread over replicas. Attention-DP ranks, each with a prefix cache of its own, follow the rule
        of the engine profile (`rank_router`), but with prefix_affinity, which chooses among all of them.
    no_prefix_cache
        Compute every prompt in full, although the engine finds shared prefixes and histories again.
    experts
        How experts are picked, placed and limited.
    tactics
        What the engine does beyond plain batching.
    failures
        Ranks that die during the run.
    pools
        Prefill and decode in two pools.
    terms
        As in `plan`.
    seed
        Seed of arrivals and lengths.
    out
        Folder for the facts as JSON, request and step tables, and the report. Must be new or empty.
    json
        Print the facts as JSON.
    """
    from planner import options
    from planner.capacity.buffers import most_sequences
    from planner.deployment import simulate_layout
    from planner.economics import load_terms
    from planner.facts import simulation_facts
    from planner.failures.settings import failure_settings
    from planner.fit import limits_for
    from planner.layout import parse_layout
    from planner.tactics import parse_tactics
    from planner.text import simulation_text
    from planner.workload import parse_slo

    options.check_positive(max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens)
    if out is not None:
        from planner.runfolder import check_folder

        check_folder(out)
    start = time.perf_counter()
    chosen = options.precision(model, weights, kv)
    profile = options.engine(engine, no_prefix_cache, calibration)
    drafts = parse_tactics(tactics.speculative, tactics.acceptance, tactics.overlap, chosen, profile)
    failing, agreed = failure_settings(profile, failures), load_terms(terms)
    if pools != ONE_POOL or layout is None:
        from planner.cli.pools import simulate_two
        from planner.disaggregation.deployment import check_combination

        asked = options.demand(workload, rate, concurrency, num_requests)
        check_combination(asked, drafts, router, fails=failing is not None)
        offered = options.clusters([cluster], oversubscription, not no_rails)[0]
        given = (max_num_seqs, max_batched_tokens)
        judged = parse_slo(slo) if slo else None
        settings = (profile, given, backend, experts, agreed, seed, out, json)
        simulate_two(chosen, offered, layout, pools, asked, judged, *settings)
        return
    cut = parse_layout(layout)
    offered = options.clusters([cluster], oversubscription, not no_rails)[0]
    limits = limits_for(profile, offered.system, max_num_seqs, max_batched_tokens, cut.attention_dp)
    if max_num_seqs is None:
        limits = drafts.limits(limits, cut, most_sequences(profile) if backend == "deepep" else None)
    with progress_bar() as progress:
        run = simulate_layout(
            chosen,
            offered,
            cut,
            options.demand(workload, rate, concurrency, num_requests),
            profile,
            parse_slo(slo) if slo else None,
            limits=limits,
            backend=backend,
            experts=options.experts(chosen, experts, cut),
            tactics=drafts,
            router=router,
            terms=agreed,
            seed=seed,
            progress=lambda share: progress("simulate", share),
            failures=failing,
        )
    wall_s = time.perf_counter() - start
    facts = simulation_facts(run, command_line())
    if out is not None:
        from planner.runfolder import write_simulation

        write_simulation(out, run, facts)
    show(facts, json, simulation_text, wall_s=wall_s)
