"""`afd`: attention and feed-forward on different GPUs."""

from __future__ import annotations

import time

from planner.cli.terminal import command_line, show


def afd(
    model: str,
    *,
    cluster: str,
    context: int = 4096,
    tpot: str = "50ms",
    engine: str = "vllm",
    weights: str | None = None,
    kv: str | None = None,
    oversubscription: float = 1.0,
    no_rails: bool = False,
    json: bool = False,
) -> None:
    """How to split GPUs between attention and feed-forward while decoding, and whether that pays (analytic).

    Parameters
    ----------
    model
        Hugging Face id, alias, config.json, directory or model TOML.
    cluster
        GPUs to split as system:nodes x GPUs, such as h800-sxm:4x8.
    context
        Tokens of one sequence at which the two sides are balanced.
    tpot
        Limit of the time per token, with its unit.
    engine
        Serving engine whose kernels and memory rule apply.
    weights
        Weight formats instead of the checkpoint's: `fp8`, or `experts=nvfp4,attention=bf16,dense=bf16`.
    kv
        KV cache format: bf16, fp8 or fp8_ds_mla.
    oversubscription
        Leaf-to-spine ratio of the network between nodes; 1 is full bisection.
    no_rails
        The network between nodes is not rail-optimised.
    json
        Print the facts as JSON.
    """
    from planner import options
    from planner.afdtext import afd_text
    from planner.disaggregation.attention_ffn import plan_attention_ffn
    from planner.engine import engine as load_engine
    from planner.errors import InputError
    from planner.facts.attention_ffn import afd_facts
    from planner.workload import parse_slo

    options.check_positive(context=context)
    start, profile = time.perf_counter(), load_engine(engine)
    try:
        limit_s = parse_slo(f"tpot_mean={tpot}").limits_s()["tpot"]
    except InputError:
        raise InputError(f"--tpot {tpot}: a positive time with its unit is needed, such as 50ms") from None
    offered = options.clusters([cluster], oversubscription, not no_rails)[0]
    answer = plan_attention_ffn(options.precision(model, weights, kv), offered, profile, context, limit_s)
    facts = afd_facts(answer, f"{profile.name} {profile.version}", command_line())
    show(facts, json, afd_text, wall_s=time.perf_counter() - start)
