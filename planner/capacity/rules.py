"""How many tokens an expert may take in one step: the exact rules of training stacks that drop the rest.

A rule counts the slots of one block of tokens: a group, or the tokens of one source rank. Every block fills its own
slots. The two budgets count the slots of a receiving device instead, all its experts together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import InputError, nearest

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Formula = Callable[[Floats, int, int, float], Floats]
"""(tokens of a block, num_experts, top_k, factor) -> slots before minimum and rounding to a multiple."""

Policy = Literal["position", "probs", "random", "bpr"]
POLICIES: dict[str, str] = {
    "position": "the first tokens of the block keep their place",
    "probs": "the highest gate probabilities keep their place",
    "random": "random assignments keep their place",
    "bpr": "tokens with the highest best gate keep their place (batch-prioritised routing, V-MoE)",
}
"""Who keeps a place when there are more assignments than slots."""

_MOST_SLOTS = 2.0**40
"""Huge factors stop here, so that sums of slots stay whole numbers."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Capacity rule of one stack.

    `scope` says whose tokens share the slots; a `device` budget holds for all experts of a receiving device.
    `policies` are those the stack offers, its default first. With `choices_first` all first choices are placed
    before any second choice. `gates` tells what becomes of the kept gates: `unchanged`, divided by their sum
    `before` tokens are dropped, or `after`. `multiple` rounds slots up. `factor_per_pick` rules scale with top_k
    themselves; the others expect it in the factor (2.0 for top-2). `group_tokens` is the stack's default group.
    """

    name: str
    formula: Formula
    scope: Literal["group", "source rank", "device"]
    policies: tuple[Policy, ...]
    choices_first: bool
    gates: Literal["unchanged", "before", "after"]
    source: str
    minimum: int = 0
    multiple: int = 1
    factor_per_pick: bool = True
    padded: bool = True
    group_tokens: int | None = None
    lost: str = "the residual stream only"

    @property
    def follows_need(self) -> bool:
        """Factors of zero and below are legal: slots follow the largest need (Tutel)."""
        return self.name == "tutel"

    def slots(
        self,
        tokens: ArrayLike,
        num_experts: int,
        top_k: int,
        factor: float,
        *,
        needed: ArrayLike | None = None,
        minimum: int | None = None,
        multiple: int | None = None,
    ) -> Ints:
        """Slots per expert (per device for a budget) for blocks of `tokens`, same shape (together with `needed`).

        `needed` is the largest load of any expert, which Tutel's factors <= 0 follow; without it every token of a
        block may need the same expert. `minimum` and `multiple` replace the stack's defaults.
        """
        block, most = np.broadcast_arrays(
            *(np.asarray(x, dtype=float) for x in (tokens, tokens if needed is None else needed))
        )
        if not self.follows_need or factor > 0:
            slots = self.formula(block, num_experts, top_k, factor)
        else:
            slots = most if factor == 0 else np.minimum(most, self.formula(block, num_experts, top_k, -factor))
        slots = np.maximum(np.minimum(slots, _MOST_SLOTS), self.minimum if minimum is None else minimum)
        step = self.multiple if multiple is None else multiple
        return np.asarray(np.ceil(slots / step) * step).astype(np.int64)


def rule(name: str, top_k: int = 1) -> Rule:
    """The rule called `name` for `top_k` choices (DeepSpeed has three). Raises InputError on an unknown name."""
    if name not in RULES:
        raise InputError(f"capacity rule {name!r} is unknown: {nearest(name, RULES)}")
    return _DEEPSPEED_FEW.get(top_k, RULES[name]) if name == "deepspeed" else RULES[name]


def _mesh_tf(tokens: Floats, num_experts: int, top_k: int, factor: float) -> Floats:
    return np.asarray(np.minimum(tokens, np.floor(tokens * factor / num_experts)))


def _flax(tokens: Floats, num_experts: int, top_k: int, factor: float) -> Floats:
    return np.asarray(np.rint(factor * tokens / num_experts))


def _lingvo(tokens: Floats, num_experts: int, top_k: int, factor: float) -> Floats:
    return np.asarray(np.floor(tokens * factor / num_experts))


def _megatron(tokens: Floats, num_experts: int, top_k: int, factor: float) -> Floats:
    return np.asarray(np.ceil(tokens * top_k / num_experts * factor))


def _deepspeed(tokens: Floats, num_experts: int, top_k: int, factor: float) -> Floats:
    # The factor is a float32 tensor there, so product and ceiling are float32: 480 slots may become 481.
    with np.errstate(over="ignore"):
        product = (tokens / num_experts).astype(np.float32) * np.float32(factor * top_k)
        return np.asarray(np.ceil(product).astype(float))


def _tutel(tokens: Floats, num_experts: int, top_k: int, factor: float) -> Floats:
    return np.asarray(top_k * np.floor(factor * np.ceil(tokens / num_experts)))


def _vmoe(tokens: Floats, num_experts: int, top_k: int, factor: float) -> Floats:
    return np.asarray(np.ceil(tokens * top_k * factor / num_experts))


def _nllb(tokens: Floats, num_experts: int, top_k: int, factor: float) -> Floats:
    # The factor is per pick here; the model's own number is a fraction of all tokens, factor x top_k / num_experts.
    return np.asarray(np.ceil(factor * top_k / num_experts * tokens))


def _budget(tokens: Floats, num_experts: int, top_k: int, factor: float) -> Floats:
    return np.asarray(np.floor(tokens * top_k * factor))


_ALL = (
    Rule(
        "mesh-tf",
        _mesh_tf,
        "group",
        ("position",),
        choices_first=True,
        gates="before",
        minimum=4,
        factor_per_pick=False,
        group_tokens=1024,
        source="tensorflow/mesh mesh_tensorflow/transformer/moe.py (Switch, top-2)",
    ),
    Rule(
        "flax",
        _flax,
        "group",
        ("position", "bpr"),
        choices_first=True,
        gates="unchanged",
        minimum=4,
        factor_per_pick=False,
        group_tokens=4096,
        source="google/flaxformer flaxformer/architectures/moe/moe_layers.py; recommended group of 4,096 tokens",
    ),
    Rule(
        "lingvo",
        _lingvo,
        "group",
        ("position",),
        choices_first=True,
        gates="before",
        minimum=4,
        multiple=4,
        factor_per_pick=False,
        source="tensorflow/lingvo lingvo/core/gshard_layers.py Top2GatingOnLogits (GShard)",
    ),
    Rule(
        "megatron",
        _megatron,
        "source rank",
        ("probs", "position"),
        choices_first=False,
        gates="unchanged",
        padded=False,
        source="NVIDIA/Megatron-LM@d98e8a64 moe_utils.py get_capacity, apply_router_token_dropping",
    ),
    Rule(
        "deepspeed",
        _deepspeed,
        "source rank",
        ("probs", "position"),
        choices_first=False,
        gates="after",
        minimum=4,
        source="microsoft/DeepSpeed@38327e07 deepspeed/moe/sharded_moe.py; least 4 is the default of MoE (TopKGate: 8)",
    ),
    Rule(
        "tutel",
        _tutel,
        "source rank",
        ("position", "bpr"),
        choices_first=True,
        gates="before",
        source="microsoft/tutel@82af7aa tutel/impls/fast_dispatch.py extract_critical",
    ),
    Rule(
        "vmoe",
        _vmoe,
        "group",
        ("position", "bpr"),
        choices_first=True,
        gates="unchanged",
        multiple=4,
        source="google-research/vmoe vmoe/moe.py compute_capacity",
    ),
    Rule(
        "nllb",
        _nllb,
        "group",
        ("position", "bpr"),
        choices_first=True,
        gates="after",
        source="huggingface/transformers modeling_nllb_moe.py route_tokens (moe_eval_capacity_token_fraction)",
    ),
    Rule(
        "device-budget",
        _budget,
        "device",
        ("probs",),
        choices_first=False,
        gates="unchanged",
        padded=False,
        lost="the residual stream and the shared experts",
        source="DeepSeek-V2, arXiv 2405.04434 section 2.2.4 (training, factor 1.0)",
    ),
    Rule(
        "rank-budget",
        _budget,
        "device",
        ("position",),
        choices_first=False,
        gates="unchanged",
        source="NVIDIA/Megatron-LM@d98e8a64 moe_expert_rank_capacity_factor (HybridEP, overflow order unspecified)",
    ),
)
RULES: dict[str, Rule] = {one.name: one for one in _ALL}
"""Rules by the name users give (handbook serving 4.1); DeepSpeed's entry is the one for more than two choices."""

_DEEPSPEED_FEW = {
    1: replace(RULES["deepspeed"], policies=("random", "position"), gates="unchanged"),
    2: replace(RULES["deepspeed"], policies=("position",), choices_first=True),
}
