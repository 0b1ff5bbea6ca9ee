"""How many experts of a layer lie in each tier, and which share of the needed ones is found there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.errors import DoesNotFit, InputError
from planner.residency.tiers import Tiers
from planner.residency.traces import Floats
from planner.units import format_bytes


@dataclass(frozen=True, slots=True)
class Spread:
    """Experts per layer: `resident` in HBM, `behind[i]` in the i-th backing tier.

    With `is_inclusive` a tier keeps what the faster ones hold too (a cache never writes back); the slowest tier in
    use then holds all experts. `copies` is how often DRAM keeps each expert, once per socket where CPUs compute.
    """

    num_experts: int
    resident: int
    behind: tuple[int, ...]
    is_inclusive: bool = False
    copies: int = 1

    def shares(self, curve: Sequence[float]) -> Floats:
        """Share of the needed experts that HBM and each backing tier serves, [1 + tiers], summing to 1.

        `curve` [num_experts + 1] is the hit rate by number of experts held.
        """
        reach = [self.resident]
        for held in self.behind:
            further = max(held, reach[-1]) if self.is_inclusive else min(self.num_experts, reach[-1] + held)
            reach.append(further)
        found = np.asarray(curve)[reach]
        return np.diff(found, prepend=0.0)

    def bytes_by_tier(self, tiers: Tiers, layer_bytes: float) -> dict[str, float]:
        """Bytes of experts in each tier, HBM first; `layer_bytes` is one expert of every layer together."""
        held = {"hbm": self.resident * layer_bytes}
        for tier, count in zip(tiers.backing, self.behind, strict=True):
            held[tier.name] = count * layer_bytes * (self.copies if tier.name == "dram" else 1)
        return held


def spread(
    tiers: Tiers,
    layer_bytes: float,
    num_experts: int,
    *,
    resident: int | None = None,
    is_inclusive: bool = False,
    copies: int = 1,
    what: str = "the experts",
) -> Spread:
    """As many experts per layer in HBM as fit (or `resident` of them), the others in the fastest tier with room.

    `layer_bytes` is one expert of every layer together [bytes]. DRAM keeps `copies` of each where it has the room,
    else one. Raises InputError for more resident experts than there are or fit, DoesNotFit when the tiers are too
    small, with what would hold them.
    """
    fitting = int(min(num_experts, tiers.hbm_bytes // layer_bytes))
    kept = fitting if resident is None else resident
    if not 0 <= kept <= num_experts:
        raise InputError(f"{kept} resident experts per layer: {what} have 0 to {num_experts}")
    if kept > fitting:
        raise InputError(
            f"{kept} resident experts per layer need {format_bytes(kept * layer_bytes)} of HBM, "
            f"{format_bytes(tiers.hbm_bytes)} are free: use at most {fitting}"
        )
    if kept == num_experts:
        return Spread(num_experts, kept, (0,) * len(tiers.backing), is_inclusive)
    asked = num_experts if is_inclusive else num_experts - kept
    dram = tiers.named("dram")
    copies = copies if dram is not None and dram.capacity_bytes >= copies * asked * layer_bytes else 1
    rooms = [int(t.capacity_bytes // (layer_bytes * (copies if t.name == "dram" else 1))) for t in tiers.backing]
    behind = _stored(rooms, asked) if is_inclusive else _dealt(rooms, asked)
    if behind is None:
        raise _too_small(tiers, layer_bytes * asked, is_inclusive, what)
    return Spread(num_experts, kept, behind, is_inclusive, copies)


def _dealt(rooms: Sequence[int], asked: int) -> tuple[int, ...] | None:
    """`asked` experts over tiers of `rooms` experts, fastest first; None when they are too small together."""
    behind = []
    for room in rooms:
        behind.append(min(room, asked))
        asked -= behind[-1]
    return None if asked else tuple(behind)


def _stored(rooms: Sequence[int], asked: int) -> tuple[int, ...] | None:
    """All `asked` experts in the first tier that holds them, caches in front of it; None when no tier does."""
    store = next((i for i, room in enumerate(rooms) if room >= asked), None)
    if store is None:
        return None
    return (*(min(room, asked) for room in rooms[:store]), asked, *(0 for _ in rooms[store + 1 :]))


def _too_small(tiers: Tiers, needed: float, is_inclusive: bool, what: str) -> DoesNotFit:
    there = " + ".join(f"{format_bytes(t.capacity_bytes)} of {t.name.upper()}" for t in tiers.backing) or "nothing"
    each = f" of each of {tiers.num_replicas} replicas" if tiers.num_replicas > 1 else ""
    message = (
        f"{what} do not fit: {format_bytes(needed)}{each} must lie behind the {format_bytes(tiers.hbm_bytes)} of HBM "
        f"that are free for them, and there is {there}"
    )
    if not tiers.has_host:
        return DoesNotFit(message, ("more GPUs", "experts in a lower precision (--weights experts=int4_g32, nvfp4)"))
    share = sum(t.capacity_bytes for t in tiers.backing) / needed
    remedies = [_to_type("--dram", needed, tiers, "host DRAM")]
    if share > 0:
        remedies.append(f"experts in {share:.0%} of their bytes: a lower precision (--weights experts=int4_g32, nvfp4)")
    if tiers.named("nvme") is None:
        missing = needed if is_inclusive else needed * (1 - min(share, 1.0))
        remedies.append(_to_type("--nvme", missing, tiers, "NVMe") + ", slower")
    return DoesNotFit(message, remedies)


def _to_type(option: str, needed: float, tiers: Tiers, what: str) -> str:
    """Remedy with the option as it must be typed: for all replicas of the node, rounded up."""
    total = -(-needed * tiers.num_replicas // 1e9)
    many = f" for the {tiers.num_replicas} replicas on the node" if tiers.num_replicas > 1 else ""
    return f"{total:.0f} GB of {what}{many} ({option} {total:.0f}GB)"
