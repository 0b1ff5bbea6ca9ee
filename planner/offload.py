"""Experts of a deployment that do not all live in HBM: what lies where, and the expert part of a layer then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.engine import Limits
from planner.errors import DoesNotFit, InputError, LayoutError
from planner.experts import ExpertSettings
from planner.hardware import Cluster
from planner.layout import Layout
from planner.measurements import Origin
from planner.memory import MemoryUse
from planner.model import ModelConfig
from planner.model.config import Moe
from planner.model.precision import stored_bytes
from planner.residency import Residency, Spread, Tiers, layer_seconds, tiers_of
from planner.residency.timing import LayerTime, LayerWork
from planner.routing import Law, skew_for
from planner.units import format_bytes

Floats = NDArray[np.float64]

_BF16_BYTES = 2.0
_SIMULATED_SEQUENCES = 32
"""Up to here the hit rate of recently used experts is simulated with temporal reuse; prompts are longer."""


@dataclass(frozen=True, slots=True, eq=False)
class Offload:
    """A residency policy at work: `held` says how many experts of a layer lie in which of `tiers`.

    `layer_bytes` is one expert of all MoE layers together, `buffer_bytes` of HBM are where streamed layers land; `skew`
    is the popularity of experts, None for what records suggest.
    """

    model: ModelConfig
    residency: Residency
    tiers: Tiers
    held: Spread
    layer_bytes: float
    buffer_bytes: float = 0.0
    skew: Law | None = None

    @property
    def origin(self) -> Origin:
        """What the seconds of fetching or of the CPU rest on."""
        return Origin[self.residency.row.origin.upper()]

    @property
    def hbm_share(self) -> float:
        """HBM taken by resident experts and buffers, as a share of the bytes of all experts."""
        return (self.held.resident + self.buffer_bytes / self.layer_bytes) / self.held.num_experts

    def bytes_by_tier(self) -> dict[str, float]:
        """Bytes of experts in each tier, HBM first and with its buffers."""
        found = self.held.bytes_by_tier(self.tiers, self.layer_bytes)
        return found | {"hbm": found["hbm"] + self.buffer_bytes}

    def layer_time(
        self, moe: Moe, phase: str, tokens: int, active: Floats, assigned: Floats, gpu_s: Floats, rest_s: float
    ) -> LayerTime:
        """Expert part of one layer in a step of `tokens` tokens; arrays are draws of that step.

        `active` experts serve `assigned` token-expert pairs; `gpu_s` is what the GPUs take with all experts resident,
        `rest_s` the other work of the layer without attention kernels [s].
        """
        curve = self.hits(moe, phase, tokens)
        work = LayerWork(
            active=active,
            cold_assigned=assigned * (1 - self.held.shares(self._picks(moe) or curve)[0]),
            tokens=np.full_like(active, tokens),
            gpu_s=gpu_s,
            rest_s=np.full_like(active, rest_s),
            expert_bytes=self.layer_bytes / self.model.num_moe_layers,
            expert_flop=2.0 * moe.num_matrices * moe.expert_hidden * moe.expert_width,
            hidden_bytes=_BF16_BYTES * moe.expert_hidden,
            is_prefill=phase == "prefill",
        )
        return layer_seconds(self.residency, self.tiers, self.held, curve, work)

    def hits(self, moe: Moe, phase: str, tokens: int) -> tuple[float, ...]:
        """Hit rate by experts held. One sequence, or one prompt, keeps to its domain; a batch of users mixes them."""
        decodes = phase == "decode"
        law = self.skew or skew_for(moe.num_experts, "decode" if decodes and tokens > 1 else "prefill")
        hot = self.skew or skew_for(moe.num_experts, "decode")
        referenced = tokens if decodes else max(tokens, _SIMULATED_SEQUENCES + 1)
        return self.residency.hits(moe.num_experts, moe.top_k, referenced, law, hot)

    def _picks(self, moe: Moe) -> tuple[float, ...] | None:
        """Share of all picks by number of hot experts: larger than their share of the distinct experts of a step."""
        if self.residency.row.choice != "static":
            return None
        hot = self.skew or skew_for(moe.num_experts, "decode")
        return self.residency.hits(moe.num_experts, moe.top_k, 1, hot, hot)


def offload(
    model: ModelConfig,
    residency: Residency,
    free_bytes: float,
    tiers_behind: Callable[[float], Tiers],
    skew: Law | None = None,
) -> Offload:
    """As many experts in the `free_bytes` of HBM of all GPUs as fit, the others in the tiers behind it.

    `tiers_behind` makes the tiers for the HBM that is left for experts. Raises DoesNotFit when they are too small,
    InputError for a dense model or more resident experts than fit.
    """
    per_index = expert_bytes_per_index(model)
    num_experts = model.moe.num_experts if model.moe else 0
    total = per_index * num_experts
    streams = residency.policy == "stream" and total > free_bytes
    # A stream lands in two buffers of a layer each, which are no room for resident experts.
    buffer = min(2.0 * total / model.num_moe_layers, free_bytes / 2) if streams else 0.0
    tiers = tiers_behind(free_bytes - buffer)
    if residency.row.uses_cpu:  # what lies in the HBM of a peer is not where the CPU computes
        tiers = replace(tiers, backing=tuple(tier for tier in tiers.backing if tier.name != "peer"))
    held = residency.spread(tiers, per_index, num_experts, f"the experts of {model.name}")
    if held.resident == num_experts:
        residency, buffer = replace(residency, policy="all-resident", resident_experts=None), 0.0
    return Offload(model, residency, tiers, held, per_index, buffer, skew)


def moe_layers(model: ModelConfig, phase: str) -> int:
    """MoE layers that a token passes in `phase`: prompts pass the encoder where there is one, answers the decoder."""
    stack = "encoder" if phase == "prefill" and any(layer.stack == "encoder" for layer in model.layers) else "decoder"
    return sum(1 for layer in model.layers if layer.moe and layer.stack == stack)


def expert_bytes_per_index(model: ModelConfig) -> float:
    """Bytes of one routed expert of every MoE layer together. Raises InputError for a dense model."""
    if model.moe is None:
        raise InputError(f"{model.name} is dense: it has no experts to keep elsewhere")
    experts = (w for layer in model.layers for w in layer.weights if w.part == "expert")
    return sum(stored_bytes(w, model.format_of(w.part)) for w in experts) / model.moe.num_experts


def offload_layout(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    limits: Limits,
    memory: MemoryUse,
    context_tokens: int,
    experts: ExpertSettings,
) -> Offload:
    """As many experts in HBM as fit beside the caches of all sequences that may run, the others behind it.

    LayoutError where experts or attention are spread over ranks, DoesNotFit when HBM or the tiers are too small.
    """
    assert experts.residency is not None
    _check_slices(layout, cluster)
    wanted = limits.max_num_seqs * context_tokens * memory.kv_bytes_per_token
    free = layout.tp * (memory.budget_bytes - (memory.needed_bytes - memory.terms["experts"]) - wanted)
    if free < 0:
        raise DoesNotFit(
            f"{model.name} as {layout} does not fit {cluster.name} even without its experts: "
            f"{format_bytes(-free / layout.tp)} per GPU are missing for {limits.max_num_seqs} sequences of "
            f"{context_tokens:,} tokens",
            ["fewer sequences at once (--max-num-seqs)", "fewer tokens per step", "a lower precision (--weights)"],
        )

    def tiers(hbm_bytes: float) -> Tiers:
        return tiers_of(
            cluster.system,
            hbm_bytes,
            num_gpus=layout.tp,
            dram_bytes=experts.dram_bytes,
            nvme_bytes=experts.nvme_bytes,
            nvme_bytes_per_s=experts.nvme_bytes_per_s,
            peer_bytes=experts.peer_bytes,
            gpus_per_root=experts.gpus_per_root,
            host=experts.host,
            num_replicas=replicas_per_node(layout, cluster),
        )

    return offload(model, experts.residency, free, tiers, experts.skew)


def _check_slices(layout: Layout, cluster: Cluster) -> None:
    """LayoutError unless every GPU of a replica holds a slice of each expert, on one node."""
    if layout.ep > 1 or layout.attention_dp > 1 or layout.pp > 1:
        raise LayoutError(
            f"{layout}: experts outside HBM are modelled where every GPU holds a slice of each. "
            f"Use tp={layout.replica_gpus} alone."
        )
    if layout.tp > cluster.gpus_per_node:
        raise LayoutError(
            f"{layout}: experts outside HBM are modelled on one node and its host. Use at most "
            f"tp={cluster.gpus_per_node}."
        )


def replicas_per_node(layout: Layout, cluster: Cluster) -> int:
    """Replicas that share a node, one where a replica spans nodes."""
    return max(1, min(layout.replicas, cluster.gpus_per_node // layout.replica_gpus))
