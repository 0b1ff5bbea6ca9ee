"""Experts of a deployment that do not all live in HBM: what lies where, and the expert part of a layer then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.errors import InputError
from planner.measurements import Origin
from planner.model import ModelConfig
from planner.model.config import Moe
from planner.model.precision import stored_bytes
from planner.residency import Residency, Spread, Tiers, layer_seconds
from planner.residency.timing import LayerTime, LayerWork
from planner.routing import Law, skew_for

Floats = NDArray[np.float64]

_BF16_BYTES = 2.0
_SIMULATED_SEQUENCES = 32
"""Up to here the hit rate of recently used experts is simulated with temporal reuse; prompts are longer."""


@dataclass(frozen=True, slots=True, eq=False)
class Offload:
    """A residency policy at work: `held` says how many experts of a layer lie in which of `tiers`.

    `layer_bytes` is one expert of all `num_layers` MoE layers together; `skew` the popularity of experts, None for
    what records suggest.
    """

    model: ModelConfig
    residency: Residency
    tiers: Tiers
    held: Spread
    layer_bytes: float
    num_layers: int
    skew: Law | None = None

    @property
    def origin(self) -> Origin:
        """What the seconds of fetching or of the CPU rest on."""
        return Origin[self.residency.row.origin.upper()]

    @property
    def resident_share(self) -> float:
        """Share of the experts that HBM holds."""
        return self.held.resident / self.held.num_experts

    def layer_time(
        self, moe: Moe, phase: str, tokens: int, active: Floats, assigned: Floats, gpu_s: Floats, rest_s: float
    ) -> LayerTime:
        """Expert part of one layer in a step of `tokens` tokens; arrays are draws of that step.

        `gpu_s` is what the GPUs take with all experts resident, `rest_s` the other work of the layer [s].
        """
        work = LayerWork(
            active=active,
            assigned=assigned,
            tokens=np.full_like(active, tokens),
            gpu_s=gpu_s,
            rest_s=np.full_like(active, rest_s),
            expert_bytes=self.layer_bytes / self.num_layers,
            expert_flop=2.0 * moe.num_matrices * moe.expert_hidden * moe.expert_width,
            hidden_bytes=_BF16_BYTES * moe.expert_hidden,
        )
        return layer_seconds(self.residency, self.tiers, self.held, self.hits(moe, phase, tokens), work)

    def hits(self, moe: Moe, phase: str, tokens: int) -> tuple[float, ...]:
        """Hit rate by experts held. One sequence, or one prompt, keeps to its domain; a batch of users mixes them."""
        decodes = phase == "decode"
        law = self.skew or skew_for(moe.num_experts, "decode" if decodes and tokens > 1 else "prefill")
        hot = self.skew or skew_for(moe.num_experts, "decode")
        referenced = tokens if decodes else max(tokens, _SIMULATED_SEQUENCES + 1)
        return self.residency.hits(moe.num_experts, moe.top_k, referenced, law, hot)


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
    layers, per_index = model.num_moe_layers, expert_bytes_per_index(model)
    num_experts = model.moe.num_experts if model.moe else 0
    total = per_index * num_experts
    streams = residency.policy == "stream" and total > free_bytes
    # A stream lands in two buffers of a layer each, which are no room for resident experts.
    tiers = tiers_behind(free_bytes - (min(2.0 * total / layers, free_bytes / 2) if streams else 0.0))
    held = residency.spread(tiers, per_index, num_experts, f"the experts of {model.name}")
    if held.resident == num_experts:
        residency = replace(residency, policy="all-resident", resident_experts=None)
    return Offload(model, residency, tiers, held, per_index, layers, skew)


def expert_bytes_per_index(model: ModelConfig) -> float:
    """Bytes of one routed expert of every MoE layer together. Raises InputError for a dense model."""
    if model.moe is None:
        raise InputError(f"{model.name} is dense: it has no experts to keep elsewhere")
    experts = (w for layer in model.layers for w in layer.weights if w.part == "expert")
    return sum(stored_bytes(w, model.format_of(w.part)) for w in experts) / model.moe.num_experts
