"""LoRA adapters on a mixture of experts: bytes, how many fit, and what they add to a decode step.

An adapter adds B A to a matrix W [out, in], with A [r, in] and B [out, r] (Hu et al., arXiv 2106.09685): r (in +
out) parameters, and as many multiply-adds per token. A step reads the matrices of every adapter among its sequences
once (grouped GEMMs: Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285), and for routed experts those of every pair
of adapter and expert that meet (the virtual experts of vLLM pull request 32317). With a few tokens per adapter bytes
and launches decide. Nothing here is measured: the time is a roofline.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from planner.cost import StepCost
from planner.errors import InputError, nearest
from planner.inventory import layer_gemms
from planner.layout import Layout
from planner.measurements.roofline import GEMM_LAUNCH_S
from planner.memory import MemoryUse, shards
from planner.model import ModelConfig
from planner.model.config import Layer, Moe, Part, Weight
from planner.routing import active_experts
from planner.units import format_bytes, whole_number
from planner.variants.decode import Variant
from planner.variants.ranking import Floats, moe_of

MAX_RANK = 512
"""Largest rank that vLLM accepts (docs.vllm.ai v0.14.0, vllm.config.lora, MaxLoRARanks)."""
MAX_ADAPTERS = 100_000
TARGETS: dict[str, Part] = {
    "attention": "attention",
    "shared": "shared_expert",
    "dense": "dense_ffn",
    "router": "router",
    "experts": "expert",
}
"""What an adapter may adapt -> part of the weights; `experts:8` means the 8 most popular of each layer."""

_BYTES = 2.0
"""Adapters are kept in 16 bits, as the checkpoint's activations (vLLM `lora_dtype` auto)."""
_KERNELS = 2
"""Shrink by A and expand by B are a kernel each (docs.vllm.ai v0.9.0, vllm.lora.punica_wrapper)."""
_EXPERT_PROJECTIONS = 2
"""Gate-up and down of the fused expert layer (vLLM pull request 21229)."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA of `rank` on all matrices of `parts`; `num_experts` routed experts per layer, 0 without the expert part."""

    rank: int
    parts: tuple[Part, ...]
    num_experts: int = 0


def parse_targets(text: str, rank: int, model: ModelConfig) -> Adapter:
    """Adapter from `attention+shared`, `experts`, or `router+experts:8`.

    Raises InputError on an unknown target, a rank outside 1 to 512, more experts than there are, or nothing to adapt.
    """
    if not 1 <= rank <= MAX_RANK:
        raise InputError(f"LoRA rank {rank}: a whole number from 1 to {MAX_RANK} is needed")
    parts: list[Part] = []
    experts = 0
    for item in text.split("+"):
        name, _, number = item.strip().partition(":")
        if name not in TARGETS:
            raise InputError(f"LoRA target {name!r} is unknown: {nearest(name, TARGETS)}")
        parts.append(TARGETS[name])
        if name == "experts":
            experts = _num_experts(number, moe_of(model))
        elif number:
            raise InputError(f"LoRA target {item.strip()!r}: only experts take a number, as in experts:8")
    adapter = Adapter(rank, tuple(dict.fromkeys(parts)), experts)
    if adapter_params(model, adapter) == 0:
        raise InputError(f"{model.name} has no matrices of {text!r}. Try attention or experts.")
    return adapter


def _num_experts(number: str, moe: Moe) -> int:
    if not number:
        return moe.num_experts
    count = whole_number(number)
    if count is None or not 1 <= count <= moe.num_experts:
        raise InputError(f"LoRA target experts:{number}: give 1 to {moe.num_experts} experts per layer")
    return count


def adapter_params(model: ModelConfig, adapter: Adapter) -> int:
    """Parameters of one adapter: r (in + out) per adapted matrix, gate and up counted apart."""
    one = Layout()
    return round(sum(count * _layer_params(layer, adapter, one) for layer, count in model.layer_kinds))


def adapter_bytes(model: ModelConfig, adapter: Adapter, layout: Layout = Layout()) -> float:  # noqa: B008 (frozen)
    """Bytes of one adapter on one GPU of `layout`; on a single GPU, all of it.

    Tensor parallelism cuts B of column-parallel and A of row-parallel matrices; the other half is whole on every
    rank (vLLM without `fully_sharded_loras`). Experts of all layers are spread over EP. Pipeline stages share the
    layers evenly. vLLM reserves slots for every local expert at its largest rank, adapted or not: then ask for all.
    """
    total = sum(count * _layer_params(layer, adapter, layout) for layer, count in model.layer_kinds)
    return _BYTES * total / layout.pp


def _layer_params(layer: Layer, adapter: Adapter, layout: Layout) -> float:
    """Adapter parameters of one layer on one GPU."""
    return sum(
        _low_rank_params(w, layer, adapter, layout) * _copies(w, adapter, layout) for w in _adapted(layer, adapter)
    )


def _adapted(layer: Layer, adapter: Adapter) -> list[Weight]:
    """Matrices of `layer` that get an adapter; gates with fewer outputs than the rank are left alone."""
    return [
        w
        for w in layer.weights
        if w.part in adapter.parts and w.is_matrix and min(w.rows // w.fused, w.cols) > adapter.rank
    ]


def _copies(weight: Weight, adapter: Adapter, layout: Layout) -> float:
    if weight.part != "expert":
        return float(weight.copies)
    return min(weight.copies, adapter.num_experts) / layout.ep


def _low_rank_params(weight: Weight, layer: Layer, adapter: Adapter, layout: Layout) -> float:
    """Parameters of A and B of one copy of `weight` on one GPU."""
    down_cut, up_cut = 1, 1
    if weight.part == "expert":
        is_row = weight.name.endswith("down_proj")
        down_cut, up_cut = (layout.moe_tp, 1) if is_row else (1, layout.moe_tp)
    elif weight.shard == "row":
        down_cut = layout.tp
    else:
        up_cut = shards(weight, layer, layout.tp, layout.ep, layout.moe_tp)
    return adapter.rank * (weight.fused * weight.cols / down_cut + weight.rows / up_cut)


def adapters_that_fit(use: MemoryUse, kv_tokens: float, bytes_per_adapter: float) -> int:
    """Adapters that stay on the GPU beside the weights and a cache of `kv_tokens` tokens per scheduler rank."""
    if not use.fits:
        return 0
    return max(0, int((use.terms["kv_cache"] - kv_tokens * use.kv_bytes_per_token) / bytes_per_adapter))


def distinct(kinds: float, draws: Floats) -> Floats:
    """Expected distinct values in `draws` even draws of `kinds`: n (1 - (1 - 1/n)^b)."""
    return np.asarray(kinds * -np.expm1(draws * np.log1p(-min(1.0 / kinds, 1 - 1e-15))))


def overhead_s(adapter: Adapter, num_adapters: int, picks: Floats | None, cost: StepCost, seqs: Floats) -> Floats:
    """Seconds that `num_adapters` evenly used adapters add to a decode step of `seqs` sequences per rank.

    Per layer max(FLOP / ceiling, bytes / bandwidth) + launches. Bytes are the A and B of the distinct adapters and
    (adapter, expert) pairs, and each adapted matrix's input, intermediate and output. The mean EP rank is taken.
    """
    gpu = cost.cluster.system.gpu
    ceiling, _ = gpu.matmul_ceiling_flop_per_s("bf16")
    bandwidth = gpu.hbm_bytes_per_s * gpu.hbm_efficiency
    total = np.zeros_like(seqs)
    for layer, count in cost.model.layer_kinds:
        if layer.stack != "decoder":
            continue
        bytes_, layer_flop = _layer_work(layer, adapter, num_adapters, picks, cost.layout, seqs)
        roof = np.maximum(layer_flop / ceiling, bytes_ / bandwidth)
        total += count * (roof + _num_kernels(layer, adapter, cost) * GEMM_LAUNCH_S)
    return total


def _layer_work(
    layer: Layer, adapter: Adapter, num_adapters: int, picks: Floats | None, layout: Layout, seqs: Floats
) -> tuple[Floats, Floats]:
    """Bytes moved and FLOP of the adapters of one layer on one GPU, for `seqs` tokens per attention-DP rank."""
    bytes_, flop = np.zeros_like(seqs), np.zeros_like(seqs)
    group = seqs * layout.attention_dp
    for weight in _adapted(layer, adapter):
        params = _low_rank_params(weight, layer, adapter, layout)
        if weight.part == "expert" and picks is not None:
            rows = group * float(picks[:, : adapter.num_experts].sum(axis=1).mean()) / layout.ep
            read = num_adapters * active_experts(group, picks[:, : adapter.num_experts] / num_adapters).mean(axis=0)
            read, cut = read / layout.ep, layout.moe_tp
        else:
            rows, read = seqs, distinct(num_adapters, seqs)
            cut = shards(weight, layer, layout.tp, layout.ep, layout.moe_tp)
        # Input read once, fp32 intermediate written and read, output read and written by the expand kernel.
        widths = weight.cols + 4.0 * adapter.rank * weight.fused + 2.0 * weight.rows / cut
        bytes_ = bytes_ + _BYTES * (read * params + rows * widths)
        flop = flop + 2.0 * rows * params
    return bytes_, flop


def _num_kernels(layer: Layer, adapter: Adapter, cost: StepCost) -> int:
    """Launches of one layer: shrink and expand for every fused projection (q, k, v share one)."""
    labels = {"attention": "attention_projections", "shared_expert": "shared_experts"}
    adapted = {weight.part for weight in _adapted(layer, adapter)}
    wanted = {labels.get(part, part) for part in adapted}
    fused = sum(1 for gemm in layer_gemms(cost.model, layer, cost.layout) if gemm.label in wanted)
    experts = _EXPERT_PROJECTIONS if layer.moe and adapter.num_experts else 0
    return _KERNELS * (fused + experts)


def _flop_per_token(layer: Layer, adapter: Adapter, picks: Floats | None) -> float:
    total = 0.0
    for weight in _adapted(layer, adapter):
        uses = 1.0
        if weight.part == "expert" and picks is not None:
            uses = float(picks[:, : adapter.num_experts].sum(axis=1).mean())
        total += 2.0 * uses * _low_rank_params(weight, layer, adapter, Layout())
    return total


def _step_s(
    adapter: Adapter, num_adapters: int, picks: Floats | None, cost: StepCost, seqs: Floats, context: Floats
) -> Floats:
    extra_s = overhead_s(adapter, num_adapters, picks, cost, seqs)
    return np.asarray(cost.decode(seqs, context).total_s + extra_s)


def with_adapters(
    model: ModelConfig, adapter: Adapter, num_adapters: int, picks: Floats | None = None, targets: str = ""
) -> Variant:
    """The variant that keeps `num_adapters` adapters on every GPU, used evenly by its sequences.

    `picks` [layers, experts], ranked, are needed where experts are adapted. Raises InputError on a number of
    adapters outside 1 to 100,000.
    """
    if not 1 <= num_adapters <= MAX_ADAPTERS:
        raise InputError(f"{num_adapters} adapters: give 1 to {MAX_ADAPTERS:,}")
    if adapter.num_experts and picks is None:
        raise InputError("adapters on experts need the popularity of the experts: pass ranked_picks(moe)")
    size = adapter_bytes(model, adapter)
    flop = sum(count * _flop_per_token(layer, adapter, picks) for layer, count in model.layer_kinds)
    return Variant(
        f"{num_adapters} LoRA r{adapter.rank} on {targets or '+'.join(adapter.parts)}",
        model,
        f"{format_bytes(size)} per adapter; step overhead is a roofline, not measured",
        step_s=partial(_step_s, adapter, num_adapters, picks),
        held_bytes=partial(_held_bytes, model, adapter, num_adapters),
        details={
            "adapter_params": adapter_params(model, adapter),
            "adapter_bytes": size,
            "adapter_flop_per_token": flop,
            "num_adapters": num_adapters,
        },
    )


def _held_bytes(model: ModelConfig, adapter: Adapter, num_adapters: int, layout: Layout) -> float:
    return num_adapters * adapter_bytes(model, adapter, layout)
