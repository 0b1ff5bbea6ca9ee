"""A model in words and as a JSON object."""

from __future__ import annotations

from planner.model.config import Attention, DenseFfn, Ffn, Layer, Mixer, ModelConfig

_RECURRENT = {
    "gated_delta": "gated DeltaNet",
    "kda": "Kimi delta attention",
    "lightning": "lightning attention",
    "mamba1": "Mamba-1",
    "mamba2": "Mamba-2",
}


def describe(model: ModelConfig) -> dict[str, int | float | str | bool | list[str]]:
    """Plain facts of `model`: parameters in three conventions, bytes, layers and experts."""
    return {
        "model": model.name,
        "architecture": model.architecture,
        "total_params": model.total_params,
        "active_params_with_embeddings": model.active_params_with_embeddings,
        "active_params_without_input_embedding": model.active_params_without_input_embedding,
        "active_params_without_embeddings": model.active_params_without_embeddings,
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "kv_growing_bytes_per_token": model.kv_growing_bytes_per_token,
        "state_bytes_per_sequence": model.state_bytes_per_sequence,
        "weight_bytes": model.weight_bytes,
        "mtp_params": model.mtp_params,
        "mtp_bytes": model.mtp_bytes,
        "num_layers": model.num_layers,
        "num_moe_layers": model.num_moe_layers,
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "kv_format": model.kv_format,
        "notes": list(model.notes),
    }


def describe_layers(model: ModelConfig) -> list[tuple[int, str]]:
    """Kinds of layers with their counts, such as `(58, "MLA, MoE 256 experts top-8 width 2,048 + shared 2,048")`.

    Layers that differ only in stored precision are counted together.
    """
    counts: dict[str, int] = {}
    for layer, count in model.layer_kinds:
        sentence = _layer(layer)
        counts[sentence] = counts.get(sentence, 0) + count
    return [(count, sentence) for sentence, count in counts.items()]


def _layer(layer: Layer) -> str:
    words = [_mixer(m) for m in layer.mixers] + [_ffn(f) for f in layer.ffns]
    return ("encoder: " if layer.stack == "encoder" else "") + ", ".join(words)


def _mixer(mixer: Mixer) -> str:
    if not isinstance(mixer, Attention):
        return f"{_RECURRENT[mixer.kind]} state {mixer.state_values:,}"
    if mixer.kind == "mla":
        words = "MLA"
    else:
        words = f"{_heads(mixer)} {mixer.num_heads}/{mixer.num_kv_heads} x {mixer.qk_head_dim}"
    if mixer.is_cross:
        words = f"cross-{words}"
    if mixer.window is not None:
        words += f" window {mixer.window:,}"
    if mixer.compress_ratio > 1:
        words += f" compressed {mixer.compress_ratio}x"
    if mixer.index_topk:
        words += f" sparse top-{mixer.index_topk:,}" + ("" if mixer.index_heads else " (shared index)")
    return words + (" without own cache" if not mixer.kv_values and not mixer.is_cross else "")


def _heads(mixer: Attention) -> str:
    if mixer.num_kv_heads == 1:
        return "MQA"
    return "MHA" if mixer.num_heads == mixer.num_kv_heads else "GQA"


def _ffn(ffn: Ffn) -> str:
    if isinstance(ffn, DenseFfn):
        return f"dense {ffn.width:,}"
    words = f"MoE {ffn.num_experts:,} experts top-{ffn.top_k} width {ffn.expert_width:,}"
    if ffn.identity_experts:
        words += f" (+ {ffn.identity_experts:,} identity)"
    return words + (f" + shared {ffn.shared_width:,}" if ffn.shared_width else "")
