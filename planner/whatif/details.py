"""Memory of a GPU and the operations of a step, each with how it is computed."""

from __future__ import annotations

from dataclasses import dataclass

from planner.facts.launch import launch_facts
from planner.figures import readable
from planner.launchtext import launch_lines
from planner.offload import expert_bytes_per_index
from planner.steptime import StepTime
from planner.units import format_bytes, format_seconds
from planner.whatif.analytic import Answer

_HOW_MEMORY = {
    "attention": "attention projections in their stored format ÷ TP (÷ PP layers); latent projections are replicated",
    "dense": "router, shared experts, dense FFN and norms ÷ TP where they are cut",
    "embeddings": "vocabulary × hidden × 2 bytes, embedding and LM head ÷ TP",
    "draft": "weights of the drafter on the last pipeline stage",
    "activations": "peak of the engine's profile run: residual copies + expert workspace of one full step",
    "cuda_graphs": "captured batch sizes × bytes per graph of the engine profile",
    "communication_buffers": "NCCL and, with DeepEP, its normal and low-latency buffers (DeepEP csrc/config.hpp)",
    "context": "CUDA context and libraries, from the engine profile",
    "draft_kv_cache": "cache of the drafter",
    "reserve": "what the engine's memory rule leaves unused of the GPU",
}
_HOW_STEP = {
    "experts": "expert GEMMs of the busiest rank: measured tables at its expected tokens and active experts",
    "attention": "decode or prefill attention kernels: measured tables at sequences × context",
    "attention_module": "latent attention with its projections: measured module table at sequences × context",
    "attention_projections": "query, key, value and output GEMMs ÷ TP: measured tables",
    "shared_experts": "GEMMs of the shared experts ÷ TP: measured tables",
    "dense_ffn": "GEMMs of dense layers ÷ TP: measured tables",
    "all_reduce": "measured all-reduce over TP ranks, per layer",
    "dispatch": "tokens to their experts: measured exchange at the busiest rank's bytes",
    "combine": "expert outputs back: measured exchange at the busiest rank's bytes",
    "router": "router GEMM, replicated: measured tables",
    "norms": "bytes of fused norms ÷ streaming rate of the memory",
    "lm_head": "vocabulary GEMM ÷ TP: measured tables",
    "sampling": "passes over fp32 logits ÷ streaming rate of the memory",
    "host": "scheduling and launches the GPU does not hide, fitted to measured servers (docs/calibration.md)",
    "small_kernels": "launches per layer, fitted to measured servers (docs/calibration.md)",
    "prompt_launches": "launches of steps with prompts, fitted to measured servers (docs/calibration.md)",
    "pipeline_hops": "hidden states between stages: latency + bytes ÷ rate of the link",
}
_UNKNOWN = "docs/architecture.md, what a step costs"


@dataclass(frozen=True, slots=True)
class Row:
    """A part of a sum: `value` in bytes or seconds, as text, its share, and how it is computed."""

    name: str
    value: float
    text: str
    share: float
    how: str


def memory_rows(found: Answer) -> list[Row]:
    """What fills the fullest GPU of the chosen layout."""
    if found.chosen is None:
        return []
    use = found.chosen.candidate.deployment.memory
    own = {"experts": _experts(found), "kv_cache": _cache(found)}
    return [
        Row(readable(term), size, format_bytes(size), size / use.capacity_bytes, own.get(term) or _HOW_MEMORY[term])
        for term, size in use.terms.items()
        if size > 0
    ]


def step_rows(step: StepTime | None) -> list[Row]:
    """Operations of a step, longest first."""
    if step is None:
        return []
    terms = {name: float(seconds) for name, seconds in step.terms.items() if float(seconds) > 0}
    total = sum(terms.values())
    return [
        Row(readable(name), seconds, format_seconds(seconds), seconds / total, _HOW_STEP.get(name, _UNKNOWN))
        for name, seconds in sorted(terms.items(), key=lambda item: -item[1])
    ]


def launch_text(found: Answer) -> str:
    """Commands of the engine that start the chosen layout; flags were read, not run."""
    if found.chosen is None:
        return "Nothing fits."
    return "\n".join(launch_lines({"launch": [launch_facts(found.chosen.candidate.deployment)]})).strip()


def sources(found: Answer) -> list[dict[str, str]]:
    """Hardware facts, engine and model behind the answer, with source."""
    system, engine, model = found.question.cluster.system, found.question.engine, found.question.model
    facts = {
        "gpu.hbm_bytes": format_bytes(system.gpu.hbm_bytes),
        "gpu.hbm_bytes_per_s": f"{format_bytes(system.gpu.hbm_bytes_per_s)}/s",
    }
    rows = [
        {"fact": f"{system.name} {p}", "value": v, "source": system.source(p) or "unknown"} for p, v in facts.items()
    ]
    rows.append({"fact": "engine defaults", "value": f"{engine.name} {engine.version}", "source": engine.source})
    rows.append({"fact": "model", "value": model.name, "source": model.source})
    return rows


def _experts(found: Answer) -> str:
    assert found.chosen is not None
    deployment = found.chosen.candidate.deployment
    model, layout = deployment.model, deployment.layout
    if model.moe is None:
        return "none: the model is dense"
    each = format_bytes(expert_bytes_per_index(model))
    copies = f" + {layout.redundant_experts} copies" if layout.redundant_experts else ""
    cut = " × ".join(f"{name} {n}" for name, n in (("EP", layout.ep), ("MoE-TP", layout.moe_tp), ("PP", layout.pp)))
    away = deployment.offload
    held = f"{away.held.resident} of " if away else ""
    return f"{held}{model.moe.num_experts}{copies} experts × {each} (all {model.num_moe_layers} MoE layers) ÷ ({cut})"


def _cache(found: Answer) -> str:
    assert found.chosen is not None
    use = found.chosen.candidate.deployment.memory
    return f"{use.kv_tokens:,} tokens × {format_bytes(use.kv_bytes_per_token)}: what the engine's memory rule leaves"
