"""Commands about failures and growth: `failures` and `scale-out`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from planner.cli.failure_options import AS_ENGINE, Recoveries
from planner.cli.terminal import command_line, show

if TYPE_CHECKING:
    from planner.deployment import Deployment
    from planner.workload import Workload

Backend = Literal["allgather_reducescatter", "deepep"]


def show_failures(
    model: str,
    *,
    cluster: str,
    layout: str,
    engine: str = "vllm",
    workload: str = "chat",
    rate: float | None = None,
    mtbf_gpu: str | None = None,
    availability: str = "99.9%",
    repair: str | None = None,
    placement: str = "contiguous",
    max_num_seqs: int | None = None,
    max_batched_tokens: int | None = None,
    backend: Backend = "allgather_reducescatter",
    weights: str | None = None,
    kv: str | None = None,
    recovery: Recoveries = AS_ENGINE,
    json: bool = False,
) -> None:
    """What failed GPUs cost in the long run: blast radius, availability, spares, experts that survive.

    Parameters
    ----------
    model
        Hugging Face id, alias, config.json, directory or model TOML.
    cluster
        GPUs as system:nodes x GPUs, such as h200-sxm:4x8.
    layout
        Degrees of parallelism, such as attention_dp=16,ep=16,replicas=2.
    engine
        Serving engine: vllm, sglang, trtllm, a version such as vllm-0.33.0, or a profile TOML on one of them.
    workload
        As in `plan`; says what a replica holds when it fails.
    rate
        Requests per second of all replicas; without it they are full.
    mtbf_gpu
        Mean time between failures of one GPU, such as 50000h; that of Llama 3's training otherwise.
    availability
        Wanted share of the time in which the whole load is served, such as 99.9%.
    repair
        How long a broken node is away, such as 24h; counts the spare nodes to keep.
    placement
        Where experts and their copies live: a policy of `experts place`, or a placement file.
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
    recovery
        How a failure is noticed and a replica rebuilt.
    json
        Print the facts as JSON.
    """
    from planner.engine import engine as load_engine
    from planner.facts.failures import reliability_facts
    from planner.failures.recovery import Sourced
    from planner.failures.recovery import mtbf_gpu as known_mtbf
    from planner.failures.settings import GIVEN, parse_duration, parse_share, recovery_settings
    from planner.failuretext import reliability_text
    from planner.reliability import reliability

    target, mtbf = parse_share("--availability", availability), known_mtbf()
    if mtbf_gpu is not None:
        mtbf = Sourced(parse_duration("--mtbf-gpu", mtbf_gpu, positive=True), GIVEN)
    repair_s = None if repair is None else parse_duration("--repair", repair, positive=True)
    settings = recovery_settings(load_engine(engine), recovery)
    limits, formats = (max_num_seqs, max_batched_tokens), (weights, kv)
    deployed, offered = described_deployment(
        model, cluster, layout, engine, workload, rate, placement, limits, backend, formats
    )
    answer = reliability(
        deployed, offered, mtbf, settings, target=target, repair_s=repair_s, is_loaded=rate is not None
    )
    show(reliability_facts(answer, command_line()), json, reliability_text)


def show_scale_out(
    model: str,
    *,
    cluster: str,
    layout: str,
    engine: str = "vllm",
    workload: str = "chat",
    growth: float | None = None,
    max_num_seqs: int | None = None,
    max_batched_tokens: int | None = None,
    backend: Backend = "allgather_reducescatter",
    weights: str | None = None,
    kv: str | None = None,
    recovery: Recoveries = AS_ENGINE,
    json: bool = False,
) -> None:
    """How long one more replica takes to be ready, term by term, and what it adds.

    Parameters
    ----------
    model
        Hugging Face id, alias, config.json, directory or model TOML.
    cluster
        GPUs as system:nodes x GPUs, such as h200-sxm:4x8.
    layout
        Degrees of parallelism of a replica, such as attention_dp=16,ep=16.
    engine
        Serving engine: vllm, sglang, trtllm, a version such as vllm-0.33.0, or a profile TOML on one of them.
    workload
        As in `plan`; says what a replica can serve.
    growth
        How fast the load grows at its steepest, in requests per second per minute; says how much to keep in reserve.
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
    recovery
        How a replica starts.
    json
        Print the facts as JSON.
    """
    from planner.engine import engine as load_engine
    from planner.errors import InputError
    from planner.facts.failures import scale_out_facts
    from planner.failures.settings import recovery_settings
    from planner.failuretext import scale_out_text
    from planner.reliability import load_of, ready_by_source

    if growth is not None and not 0 < growth < float("inf"):
        raise InputError(f"--growth {growth:g}: requests per second per minute above 0, such as 2")
    settings = recovery_settings(load_engine(engine), recovery)
    limits, formats = (max_num_seqs, max_batched_tokens), (weights, kv)
    deployed, offered = described_deployment(
        model, cluster, layout, engine, workload, None, "contiguous", limits, backend, formats
    )
    ready, load = ready_by_source(deployed, settings), load_of(deployed, offered)
    facts = scale_out_facts(deployed, offered, settings, ready, load.capacity_per_s, growth, command_line())
    show(facts, json, scale_out_text)


def described_deployment(
    model: str,
    cluster: str,
    layout: str,
    engine: str,
    workload: str,
    rate: float | None,
    placement: str,
    limits: tuple[int | None, int | None],
    backend: str,
    formats: tuple[str | None, str | None],
) -> tuple[Deployment, Workload]:
    """The deployment that was described, and its workload.

    `limits` are sequences and tokens of a step, `formats` those of weights and KV cache.
    """
    from planner import options
    from planner.capacity.buffers import most_sequences
    from planner.choices import ExpertChoices
    from planner.deployment import deploy
    from planner.engine import engine as load_engine
    from planner.fit import limits_for
    from planner.layout import parse_layout

    max_num_seqs, max_batched_tokens = limits
    options.check_positive(max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens)
    profile, cut, chosen = load_engine(engine), parse_layout(layout), options.precision(model, *formats)
    offered = options.clusters([cluster])[0]
    if backend == "deepep" and max_num_seqs is None:
        max_num_seqs = most_sequences(profile)
    most = limits_for(profile, offered.system, max_num_seqs, max_batched_tokens, cut.attention_dp)
    demand = options.demand(workload, rate, None, None)
    context = int(demand.mean_prompt_tokens + demand.mean_output_tokens / 2)
    experts = options.experts(chosen, ExpertChoices(placement=placement), cut)
    exchange = backend if cut.attention_dp > 1 else "all_reduce"
    return deploy(chosen, offered, cut, profile, most, exchange, context, experts), demand
