"""What the binding objective waits for: the prefill of a prompt or a decode step, and the largest term of it."""

from __future__ import annotations

import numpy as np

from planner.loads import load_table
from planner.offload import expert_bytes_per_index
from planner.units import format_seconds
from planner.whatif.analytic import Answer, limit_name
from planner.whatif.catalogue import curve
from planner.whatif.drops import load_of

_NAMES = {
    "attention": "attention over the KV cache",
    "all_reduce": "all-reduce between GPUs",
    "dispatch": "sending tokens to experts",
    "combine": "collecting expert outputs",
    "host": "host time between steps",
}


def bottleneck(found: Answer) -> str:
    """What the tightest objective waits for; for a decode step also what a larger batch would bring until what runs
    out."""
    chosen, step = found.chosen, found.decode
    if chosen is None or step is None:
        return ""
    if chosen.worst[0].startswith("ttft"):
        return _prefill(found)
    terms = {name: float(value) for name, value in step.terms.items()}
    label, seconds = max(terms.items(), key=lambda item: item[1])
    total, model = sum(terms.values()), found.question.model
    of_layers = model.num_moe_layers if label == "experts" else model.num_layers
    what = (
        f"A decode step of {format_seconds(total)} is bound by {_cause(found, label)}: {format_seconds(seconds)} of it "
        f"({seconds / total:.0%}), {format_seconds(seconds / max(of_layers, 1))} in each of {of_layers} "
        f"{'MoE ' if label == 'experts' else ''}layers"
    )
    return f"{what}. {_doubling(found)}"


def _prefill(found: Answer) -> str:
    """The first token: largest term of a prefill step, and how much of the mean TTFT is waiting for other steps."""
    assert found.chosen is not None and found.prefill is not None
    prompt = found.question.workload.mean_prompt_tokens
    tokens = min(prompt, float(found.chosen.candidate.deployment.limits.max_batched_tokens))
    terms = {name: float(value) for name, value in found.prefill.terms.items()}
    label, seconds = max(terms.items(), key=lambda item: item[1])
    total, ttft_s = sum(terms.values()), found.chosen.candidate.ttft_s
    part = f" of the {prompt:,.0f} of a mean prompt" if tokens < prompt else ""
    waits = f"; the mean TTFT is {format_seconds(ttft_s)}, the rest of it is waiting" if ttft_s > 1.1 * total else ""
    # Of a prompt, attention is over the prompt itself: the cache of others has no part in it.
    what = "attention over the prompt" if label == "attention" else _named(label)
    return (
        f"{limit_name(found.chosen)} is the tightest limit, so prefill binds: {tokens:,.0f} prompt tokens{part} take "
        f"{format_seconds(total)}, the largest part {what}: {format_seconds(seconds)} ({seconds / total:.0%}){waits}."
    )


def _cause(found: Answer, label: str) -> str:
    """`label` in words; for experts and attention also what of them takes the time."""
    assert found.chosen is not None and found.decode is not None
    if label == "experts":
        return _expert_cause(found, float(found.decode.terms[label]))
    return _named(label)


def _named(label: str) -> str:
    return _NAMES.get(label, label.replace("_", " "))


def _expert_cause(found: Answer, seconds: float) -> str:
    """Whether the busiest rank reads weights or computes: bytes of its active experts over the rate of the memory."""
    assert found.chosen is not None
    deployment, moe = found.chosen.candidate.deployment, found.question.model.moe
    assert moe is not None
    layout = deployment.layout
    if deployment.offload is not None:
        return "experts outside HBM"
    table = load_table(load_of(deployment))
    active = float(table.active(max(1.0, found.chosen.candidate.batch) * layout.attention_dp))
    gpu = deployment.cluster.system.gpu
    read_s = (
        active * expert_bytes_per_index(deployment.model) / layout.moe_tp / (gpu.hbm_bytes_per_s * gpu.hbm_efficiency)
    )
    held = (moe.num_experts + layout.redundant_experts) // layout.ep
    what = f"{active:.0f} of {held} experts of a rank active"
    return f"reading expert weights ({what})" if read_s > seconds / 2 else f"expert kernels ({what})"


def _doubling(found: Answer) -> str:
    """Gain of twice the batch, and the batches at which SLO, KV cache and the engine's limit end it."""
    assert found.chosen is not None
    chosen, deployment = found.chosen, found.chosen.candidate.deployment
    now = max(1.0, chosen.candidate.batch)
    line = curve(found.question, chosen.kind)
    steady = chosen.kind.steady
    kv = steady.batch_within(
        deployment.memory.kv_tokens / deployment.layout.pp,
        found.question.workload.mean_prompt_tokens + found.question.workload.mean_output_tokens / 2,
    )
    ends = f"KV runs out at {kv:,.0f}, the engine's limit is {deployment.limits.max_num_seqs // deployment.layout.pp:,}"
    if line.within is not None and line.within < len(line.batch) - 1:
        ends = f"the SLO ends at {line.batch[line.within]:,.0f}, {ends}"
    if 2 * now > chosen.kind.running:
        return f"{now:,.0f} sequences run per rank; {ends}."
    gain = float(np.interp(2 * now, steady.batch, steady.requests_per_s)) / float(
        np.interp(now, steady.batch, steady.requests_per_s)
    )
    slower = float(steady.tpot_at(np.array(2 * now)) / steady.tpot_at(np.array(now)))
    return (
        f"{now:,.0f} sequences run per rank; twice as many would raise throughput {gain:.1f} x and TPOT {slower:.2f} x "
        f"({ends})."
    )
