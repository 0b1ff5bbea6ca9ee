"""A capacity limit as one hashable thing, and what it does to the counts of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from planner.capacity.expected import Floats, fully_dropped, kept_in_blocks, lost_in_blocks, needed_slots
from planner.capacity.rules import POLICIES, Ints, Policy, Rule, rule
from planner.errors import InputError, LayoutError, WorkloadError


@dataclass(frozen=True, slots=True)
class Drops:
    """What a limit does to one step; arrays follow the leading shape of the counts.

    `kept` [..., experts] are the assignments served, `capacity` the slots per expert of the largest block (per device
    for a budget), one number unless Tutel's slots follow the need. `drop_rate` is the lost share of assignments,
    `fully_dropped_rate` the share of tokens that lost all picks, `slot_utilisation` the used share of all slots,
    `processed_rows` the rows experts compute, padding included.
    """

    kept: Floats
    capacity: Ints
    drop_rate: Floats
    fully_dropped_rate: Floats
    slot_utilisation: Floats
    processed_rows: Floats


@dataclass(frozen=True, slots=True)
class CapacityLimit:
    """Capacity `factor` under a `rule` of `planner.capacity.RULES`; options left None follow the stack.

    `policy` says who keeps a place, `padded` that experts compute all slots, used or not, `minimum` and `multiple`
    replace the stack's least slots and rounding, `group_tokens` caps the tokens of a group (Mesh-TensorFlow: 1,024).
    Raises InputError on an unknown rule or policy and on a factor that is no capacity.
    """

    rule: str
    factor: float
    policy: Policy | None = None
    padded: bool | None = None
    minimum: int | None = None
    multiple: int | None = None
    group_tokens: int | None = None

    def __post_init__(self) -> None:
        known = rule(self.rule)
        if self.policy is not None and self.policy not in POLICIES:
            raise InputError(f"drop policy {self.policy!r} is unknown: known are {', '.join(POLICIES)}")
        if not math.isfinite(self.factor) or (self.factor <= 0 and not known.follows_need):
            raise InputError(_no_factor(self.rule, self.factor))
        for name, value, least in (("minimum", self.minimum, 0), ("multiple", self.multiple, 1)):
            if value is not None and value < least:
                raise InputError(f"capacity {name} {value}: at least {least} is needed")
        if self.group_tokens is not None and self.group_tokens < 1:
            raise InputError(f"capacity group of {self.group_tokens} tokens: at least 1 is needed")

    def rule_for(self, top_k: int) -> Rule:
        """The rule for `top_k` choices."""
        return rule(self.rule, top_k)

    def policy_for(self, top_k: int) -> Policy:
        """The chosen policy, or the stack's default for `top_k` choices."""
        return self.policy or self.rule_for(top_k).policies[0]

    def is_padded(self, top_k: int) -> bool:
        """Experts compute all slots: as chosen, or as the stack does."""
        return self.rule_for(top_k).padded if self.padded is None else self.padded

    def blocks(self, tokens: int, num_sources: int = 1) -> Ints:
        """Tokens of each block, in order: as even as possible over `num_sources`, and over groups if these are capped.

        Devices of a budget are not blocks of tokens: their number is `num_sources` and each gets an even share.
        """
        groups = 1 if self.group_tokens is None else tokens // self.group_tokens
        number = max(num_sources, groups, 1)
        return np.full(number, tokens // number) + (np.arange(number) < tokens % number)

    def capacity(self, tokens: ArrayLike, num_experts: int, top_k: int, num_sources: int = 1) -> Ints:
        """Slots per expert of the largest block for `tokens` per step, all sources together; shape of `tokens`.

        Slots per device for a budget. Tutel's factors <= 0 give the bound: the need of a block, at most its tokens.
        """
        t = np.asarray(tokens)
        if self.rule_for(top_k).scope == "device":
            return self._slots(t / num_sources, num_experts, top_k)
        number = np.maximum(num_sources, 1 if self.group_tokens is None else t // self.group_tokens)
        return self._slots(np.ceil(t / np.maximum(number, 1)), num_experts, top_k)

    def apply(self, counts: ArrayLike, tokens: int, top_k: int, num_sources: int = 1) -> Drops:
        """Drops of a step of `tokens` tokens (all sources) with `counts` [..., experts], whole or expected numbers.

        `num_sources` are the source ranks or groups with slots of their own, or the devices of a budget. Raises
        WorkloadError on negative or infinite counts, LayoutError if the devices do not divide the experts.
        """
        count = np.asarray(counts, dtype=float)
        if not (np.isfinite(count).all() and count.min(initial=0.0) >= 0):
            raise WorkloadError("assignments per expert must be finite and >= 0")
        if self.rule_for(top_k).scope == "device":
            return self._within_budget(count, tokens, top_k, num_sources)
        sizes, times = np.unique(self.blocks(tokens, num_sources), return_counts=True)
        bound = self._slots(sizes, count.shape[-1], top_k)
        blocks = list(zip(times.tolist(), sizes.tolist(), bound.tolist(), strict=True))
        kept = kept_in_blocks(count, tokens, blocks)
        lost = lost_in_blocks(count, tokens, blocks, top_k, self.policy_for(top_k), self.rule_for(top_k).choices_first)
        if self.factor > 0:
            return self._drops(count, kept, lost, bound[-1], (bound * times).sum() * count.shape[-1], top_k)
        needed = needed_slots(count, max(tokens, 1), int(times.sum()))
        slots = self._slots(np.array(sizes[-1]), count.shape[-1], top_k, needed)
        return self._drops(count, kept, lost, slots, slots * (times.sum() * count.shape[-1]), top_k)

    def _within_budget(self, counts: Floats, tokens: int, top_k: int, num_devices: int) -> Drops:
        per_device = check_devices(counts.shape[-1], num_devices)
        budget = self._slots(tokens / num_devices, counts.shape[-1], top_k)
        load = counts.reshape(*counts.shape[:-1], num_devices, per_device)
        share = np.minimum(1.0, budget / np.maximum(load.sum(axis=-1, keepdims=True), 1.0))
        kept = (load * share).reshape(counts.shape)
        rule, policy = self.rule_for(top_k), self.policy_for(top_k)
        lost = fully_dropped(counts, kept, tokens, top_k, policy, rule.choices_first)
        return self._drops(counts, kept, lost, budget, budget * num_devices, top_k)

    def _drops(self, counts: Floats, kept: Floats, lost: Floats, capacity: Ints, slots: Ints, top_k: int) -> Drops:
        served, asked = kept.sum(axis=-1), counts.sum(axis=-1)
        dropped = np.asarray(1 - served / np.maximum(asked, 1e-300)).clip(0.0, 1.0) * (asked > 0)
        return Drops(
            kept,
            np.asarray(capacity),
            dropped,
            # Drawn blocks may lose a little more than blocks do on average.
            np.minimum(lost, dropped),
            np.asarray(served / np.maximum(slots, 1)),
            np.broadcast_to(np.asarray(slots, dtype=float), served.shape) if self.is_padded(top_k) else served,
        )

    def _slots(self, tokens: ArrayLike, num_experts: int, top_k: int, needed: ArrayLike | None = None) -> Ints:
        return self.rule_for(top_k).slots(
            tokens, num_experts, top_k, self.factor, needed=needed, minimum=self.minimum, multiple=self.multiple
        )


def check_devices(num_experts: int, num_devices: int) -> int:
    """Experts per device. Raises LayoutError if `num_devices` do not divide the experts."""
    if num_devices < 1 or num_experts % num_devices:
        fits = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        closest = min(fits, key=lambda n: abs(n - num_devices))
        raise LayoutError(f"{num_devices} devices do not divide {num_experts} experts. Use {closest}.")
    return num_experts // num_devices


def _no_factor(name: str, factor: float) -> str:
    if name == "megatron" and factor < 0:
        return f"capacity factor {factor:g}: a negative factor turns dropping off in Megatron: leave the limit out"
    return (
        f"capacity factor {factor:g} is no capacity for {name}: give a finite number above 0, such as 1.25, "
        "or leave the limit out to serve every token"
    )
