"""Which expert sits in which slot of which rank, and what a load of experts means for the ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import LayoutError, WorkloadError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_MOST_LOAD = 1e100
"""Sums and squares of larger loads could overflow."""


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Experts and their copies on ranks, one row per MoE layer.

    `physical_to_logical`: [layers, slots] expert ids. Ranks and nodes own equal runs of consecutive slots: slot s
    is on rank s // slots_per_rank. One row may stand for every layer of the model. All copies of an expert get
    equal shares of its tokens, as engines do by round robin or by hashing the token (vLLM `fused_moe`, SGLang
    `--ep-dispatch-algorithm dynamic`); two copies on one rank count as two.
    Raises LayoutError if slots, ranks and nodes do not divide or an expert is missing.
    """

    policy: str
    physical_to_logical: Ints
    num_experts: int
    num_ranks: int
    num_nodes: int = 1
    copies: Ints = field(init=False, repr=False)
    """Copies of every expert [layers, experts]."""
    _cell: Ints = field(init=False, repr=False)
    """Where a slot finds its expert in a flat [layers, experts] table: [slots_per_rank, layers, ranks]."""

    def __post_init__(self) -> None:
        slots = np.array(self.physical_to_logical, dtype=np.int64)
        slots.setflags(write=False)
        object.__setattr__(self, "physical_to_logical", slots)
        self.validate()
        cell = np.arange(len(slots))[:, None] * self.num_experts + slots
        copies = np.bincount(cell.ravel(), minlength=len(slots) * self.num_experts)
        by_seat = cell.reshape(len(slots), self.num_ranks, -1).transpose(2, 0, 1)
        object.__setattr__(self, "copies", copies.reshape(len(slots), self.num_experts))
        object.__setattr__(self, "_cell", np.ascontiguousarray(by_seat))

    @property
    def num_layers(self) -> int:
        """Rows of the map; 1 may stand for every layer."""
        return len(self.physical_to_logical)

    @property
    def num_slots(self) -> int:
        """Experts and copies per layer on all ranks together."""
        return int(self.physical_to_logical.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """Experts and copies that one rank holds per layer."""
        return self.num_slots // self.num_ranks

    @property
    def num_redundant(self) -> int:
        """Copies beyond the first, per layer on all ranks together."""
        return self.num_slots - self.num_experts

    @property
    def ranks_per_node(self) -> int:
        """Ranks that share a node."""
        return self.num_ranks // self.num_nodes

    def validate(self) -> None:
        """Raise LayoutError on a wrong shape, an id out of range, or an expert without a slot."""
        slots = self.physical_to_logical
        if slots.ndim != 2 or not slots.size:
            raise LayoutError(f"a placement is a table [layers, slots], got shape {slots.shape}")
        if self.num_ranks < 1 or slots.shape[1] % self.num_ranks:
            ranks = nearest_divisors(slots.shape[1], self.num_ranks)
            raise LayoutError(f"{slots.shape[1]} slots do not divide over {self.num_ranks} ranks. Use {ranks} ranks.")
        if self.num_nodes < 1 or self.num_ranks % self.num_nodes:
            nodes = nearest_divisors(self.num_ranks, self.num_nodes)
            raise LayoutError(f"{self.num_ranks} ranks do not divide over {self.num_nodes} nodes. Use {nodes} nodes.")
        wrong = (slots < 0) | (slots >= self.num_experts)
        if wrong.any():
            layer, slot = np.argwhere(wrong)[0]
            raise LayoutError(
                f"placement, layer {layer}, slot {slot}: expert {slots[layer, slot]} is not one of the "
                f"{self.num_experts} experts. Ids are 0 to {self.num_experts - 1}."
            )
        present = np.zeros((len(slots), self.num_experts), dtype=bool)
        np.put_along_axis(present, slots, True, axis=1)
        if not present.all():
            layer, expert = np.argwhere(~present)[0]
            raise LayoutError(
                f"placement, layer {layer}: expert {expert} has no slot ({int((~present).sum())} missing in all). "
                "Give every expert at least one slot in every layer."
            )

    def slot_loads(self, load: ArrayLike) -> Floats:
        """Tokens per slot [..., layers, slots] for tokens per expert `load` [..., layers, experts].

        Raises LayoutError if `load` has other experts or layers than the placement.
        """
        share = self._per_copy(load)
        if self.num_layers == 1:
            return np.asarray(share.take(self.physical_to_logical[0], axis=-1, mode="clip"))
        flat = share.reshape(*share.shape[:-2], -1)
        return flat.take(self._cell.transpose(1, 2, 0).ravel(), axis=-1, mode="clip").reshape(
            *share.shape[:-1], self.num_slots
        )

    def rank_loads(self, load: ArrayLike) -> Floats:
        """Tokens per rank [..., layers, ranks] for tokens per expert `load` [..., layers, experts].

        Any leading axes, such as draws; 0.05 ms for one draw of 58 layers, 256 experts, 320 slots on one core.
        """
        return self._per_rank(self._per_copy(load))

    def max_over_mean(self, load: ArrayLike) -> Floats:
        """Tokens of the busiest rank over the mean [..., layers]; 1 for a layer without tokens."""
        ranks = self.rank_loads(load)
        mean = ranks.mean(axis=-1)
        return np.asarray(np.divide(ranks.max(axis=-1), mean, out=np.ones_like(mean), where=mean > 0))

    def nodes_reached(self, num_groups: int, top_groups: int) -> Ints:
        """Most nodes that one token can be sent to [layers] when it picks from `top_groups` of `num_groups` groups.

        Groups are consecutive experts (DeepSeek-V3, arXiv 2412.19437 section 2.1.2); copies may be picked anywhere.
        """
        check_groups(self.num_experts, num_groups)
        node = np.arange(self.num_slots) // (self.slots_per_rank * self.ranks_per_node)
        group = self.physical_to_logical // (self.num_experts // num_groups)
        on_node = np.zeros((self.num_layers, num_groups, self.num_nodes), dtype=bool)
        on_node[np.arange(self.num_layers)[:, None], group, node[None, :]] = True
        widest = np.sort(on_node.sum(axis=2), axis=1)[:, ::-1][:, :top_groups].sum(axis=1)
        return np.asarray(np.minimum(widest, self.num_nodes))

    def _per_copy(self, load: ArrayLike) -> Floats:
        """Tokens per copy of every expert [..., layers, experts]."""
        table = np.asarray(load)
        if table.ndim < 2 or table.shape[-1] != self.num_experts:
            raise LayoutError(
                f"the load has shape {table.shape}; this placement asks for [..., layers, {self.num_experts} experts]"
            )
        if self.num_layers not in (1, table.shape[-2]):
            layers = table.shape[-2]
            raise LayoutError(f"the load has {layers} layers, the placement {self.num_layers}. Use the same model.")
        # Loads in single precision stay so, which halves what moves through the memory.
        return np.asarray(table / self.copies.astype(np.float32 if table.dtype == np.float32 else float))

    def _per_rank(self, share: Floats) -> Floats:
        total = self._gathered(share, 0)
        for seat in range(1, self.slots_per_rank):
            total += self._gathered(share, seat)
        return total

    def _gathered(self, share: Floats, seat: int) -> Floats:
        """The loads of one slot of every rank [..., layers, ranks]."""
        # mode="clip" skips numpy's bounds check; the cells were checked once.
        if self.num_layers == 1:
            return np.asarray(share.take(self._cell[seat, 0], axis=-1, mode="clip"))
        return np.asarray(share.reshape(*share.shape[:-2], -1).take(self._cell[seat], axis=-1, mode="clip"))

    def __str__(self) -> str:
        copies = f" + {self.num_redundant} copies" if self.num_redundant else ""
        return f"{self.policy}: {self.num_experts} experts{copies} on {self.num_ranks} ranks"


def checked_load(load: ArrayLike) -> Floats:
    """`load` as [layers, experts]; a single layer may come without its axis.

    Raises WorkloadError on an empty table, a negative or huge number, NaN or infinity.
    """
    table = np.atleast_2d(np.asarray(load, dtype=float))
    if table.ndim != 2 or not table.size:
        raise WorkloadError(f"expert loads are a table [layers, experts], got shape {table.shape}")
    wrong = ~((table >= 0) & (table <= _MOST_LOAD))
    if wrong.any():
        layer, expert = np.argwhere(wrong)[0]
        raise WorkloadError(
            f"expert load of layer {layer}, expert {expert} is {table[layer, expert]:g}: "
            f"loads are numbers from 0 to {_MOST_LOAD:.0e}"
        )
    return table


def check_groups(num_experts: int, num_groups: int) -> None:
    """Raise LayoutError unless `num_groups` divides the experts."""
    if num_groups < 1 or num_experts % num_groups:
        near = nearest_divisors(num_experts, num_groups)
        raise LayoutError(f"{num_experts} experts do not divide into {num_groups} groups. Use {near} groups.")


def nearest_divisors(total: int, wanted: int) -> str:
    """The divisors of `total` next below and next above `wanted`, as words."""
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    below, above = [d for d in divisors if d <= wanted], [d for d in divisors if d >= wanted]
    return " or ".join(map(str, sorted({*below[-1:], *above[:1]})))
