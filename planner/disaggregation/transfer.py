"""KV on its way from a prefill rank to a decode rank: how many bytes, over which link, behind whom.

t = bytes / (link x reached share) + latency (handbook serving 2.6). Every GPU of the receiving rank gets what it
stores: its heads, or all of MLA's latent, of its pipeline stage. The sending rank spreads that over its own GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import InputError
from planner.hardware import Cluster
from planner.layout import Layout
from planner.measurements import Fabric
from planner.measurements.links import INSIDE_SHARE, OUTSIDE_SHARE, network_rate
from planner.measurements.roofline import Ceilings
from planner.memory import kv_shards
from planner.model import ModelConfig
from planner.model.config import Attention, Recurrent
from planner.model.precision import kv_bytes_per_layer

POINT_TO_POINT_S = 10e-6
"""Latency of a transfer where the profile has none (aiconfigurator system files, handbook serving 6)."""
_STATE_BYTES = 4.0
_CONV_BYTES = 2.0
"""Recurrent state is kept in fp32, the convolution tail in 16 bits (handbook models 5)."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """Cache bytes of one sequence on one GPU of a rank: `per_token` pairs of bytes and window (0 = none), and state."""

    per_token: tuple[tuple[float, int], ...]
    state_bytes: float

    def bytes(self, tokens: int) -> float:
        """Bytes of a sequence of `tokens`; windowed layers hold at most their window."""
        return self.state_bytes + sum(b * (min(tokens, window) if window else tokens) for b, window in self.per_token)


def kv_shape(model: ModelConfig, tp: int) -> KvShape:
    """What one GPU of a tensor-parallel group of `tp` caches, all layers.

    >>> from planner.model import load
    >>> kv_shape(load("deepseek-v3"), 8).bytes(1)
    70272.0
    """
    windows: dict[int, float] = {}
    state = 0.0
    for layer in model.layers:
        for mixer in layer.mixers:
            if isinstance(mixer, Recurrent):
                state += (_STATE_BYTES * mixer.state_values + _CONV_BYTES * mixer.conv_values) / tp
            elif isinstance(mixer, Attention):
                share = kv_bytes_per_layer(mixer, model.kv_format) / kv_shards(mixer, tp)
                windows[mixer.window or 0] = windows.get(mixer.window or 0, 0.0) + share
    return KvShape(tuple((value, window) for window, value in sorted(windows.items())), state)


@dataclass(frozen=True, slots=True)
class KvRoute:
    """Between a rank of the prefill pool and one of the decode pool.

    `shape` is what a receiving GPU stores of all layers, of which a pipeline of `receiver_pp` stages has a part each.
    `sender_bytes_per_s` and `receiver_bytes_per_s` are what one GPU reaches; `name` says over what.
    """

    name: str
    shape: KvShape
    sender_gpus: int
    receiver_gpus: int
    receiver_pp: int
    sender_bytes_per_s: float
    receiver_bytes_per_s: float
    latency_s: float
    num_layers: int

    def moved_bytes(self, tokens: int) -> float:
        """Bytes that leave the sending rank for a prompt of `tokens`."""
        return self.shape.bytes(tokens) / self.receiver_pp * self.receiver_gpus

    def sender_s(self, tokens: int) -> float:
        """How long a prompt keeps the links of the sending rank busy [s]."""
        return self.moved_bytes(tokens) / self.sender_gpus / self.sender_bytes_per_s

    def receiver_s(self, tokens: int) -> float:
        """How long a prompt keeps the links of the receiving rank busy [s]."""
        return self.shape.bytes(tokens) / self.receiver_pp / self.receiver_bytes_per_s

    def transfer_s(self, tokens: int) -> float:
        """A transfer that waits for nobody [s]: the slower side, and the latency."""
        return max(self.sender_s(tokens), self.receiver_s(tokens)) + self.latency_s


class Nic:
    """The links of one rank, first come first served, without an event of its own."""

    __slots__ = ("busy_s", "free_s")

    def __init__(self) -> None:
        self.free_s = 0.0
        self.busy_s = 0.0


def send(route: KvRoute, sender: Nic, receiver: Nic, tokens: int, ready_s: float, done_s: float, pieces: int) -> float:
    """Take both links for the KV of a prompt; returns when the transfer starts [s].

    The prompt was computed from `ready_s` to `done_s` in `pieces` even pieces, of which all but the last may travel
    before `done_s`. A link serves in the order of the calls, and each is busy for its own part only.
    """
    first_s = ready_s + (done_s - ready_s) / pieces
    start_s = max(first_s, sender.free_s, receiver.free_s)
    for nic, busy_s in ((sender, route.sender_s(tokens)), (receiver, route.receiver_s(tokens))):
        nic.free_s = start_s + busy_s
        nic.busy_s += busy_s
    return start_s


def arrival_s(route: KvRoute, tokens: int, start_s: float, done_s: float, pieces: int) -> float:
    """When the KV of a prompt is whole on the decode side [s]: the last piece leaves no earlier than `done_s`."""
    moving_s = route.transfer_s(tokens) - route.latency_s
    return max(start_s + moving_s, done_s + moving_s / pieces) + route.latency_s


def kv_route(
    model: ModelConfig, prefill: Layout, decode: Layout, prefill_on: Cluster, decode_on: Cluster, same: bool
) -> KvRoute:
    """The route between two pools; `same` says that both are parts of one cluster.

    Pools that share a scale-up domain use it, others the network card of every GPU. InputError where there is none.
    """
    shape = kv_shape(model, decode.tp)
    gpus = (prefill.tp * prefill.pp, decode.tp * decode.pp, decode.pp)
    if same and prefill.num_gpus + decode.num_gpus <= prefill_on.scale_up_gpus:
        link = prefill_on.system.scale_up
        rate, latency_s = link.bytes_per_s * INSIDE_SHARE, max(link.latency_s or 0.0, POINT_TO_POINT_S)
        return KvRoute(link.name, shape, *gpus, rate, rate, latency_s, model.num_layers)
    rates, latency_s = [], POINT_TO_POINT_S
    for cluster in (prefill_on, decode_on):
        card = cluster.system.scale_out
        if card is None:
            raise InputError(
                f"{cluster.name}: the profile has no network between nodes, so KV cannot leave it. Keep both pools "
                f"within {prefill_on.scale_up_gpus} GPUs, or add a [scale_out] table to the profile."
            )
        ceilings = Ceilings.of(cluster.system, Fabric(cluster.oversubscription, cluster.rail_optimised))
        rates.append(network_rate(ceilings, OUTSIDE_SHARE, same_rail=False))
        latency_s = max(latency_s, card.latency_s or 0.0)
    name = prefill_on.system.scale_out.name if prefill_on.system.scale_out else ""
    return KvRoute(name, shape, *gpus, rates[0], rates[1], latency_s, model.num_layers)
