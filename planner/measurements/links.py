"""Times of collectives from link rates, for GPUs, node counts and sizes nobody measured, and the fabric between nodes.

Sizes as in the tables: all-reduce the tensor of one rank, all-gather the gathered tensor, reduce-scatter the tensor
before scattering, all-to-all what one rank sends to all. Sources: handbook serving 6.5 and 6.6, kernels 3, 4 and 10.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.errors import NoMeasurement
from planner.measurements.roofline import Ceilings, Roof

Floats = NDArray[np.float64]
Op = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]

INSIDE_SHARE = 0.7
"""Share of the scale-up link that collectives reach (0.65 to 0.75, kernels 10)."""
OUTSIDE_SHARE = 0.9
"""Share of the NIC that expert exchange and all-to-all reach: 45 GB/s of 400 Gbit/s (kernels 3 and 4)."""
RACK_SHARE = 0.8
"""TensorRT-LLM one-sided all-to-all on NVL72: 80 % of 900 GB/s (serving 6.6, blog 18)."""
_RAILS = 8
"""Rails of a rail-optimised fabric: one leaf per GPU index of an HGX node (losslessnetwork.com, rail-optimized)."""
_INSIDE_FLOOR_S = 10e-6
_OUTSIDE_FLOOR_S = 10e-6
"""Point-to-point latency between nodes (aiconfigurator system files)."""


def distinct(groups: int, num_experts: int, top_k: int) -> float:
    """Expected distinct expert groups (ranks or nodes) of a token: D = R (1 - C(E - E/R, k) / C(E, k)).

    >>> round(distinct(8, 256, 8), 3), round(distinct(64, 256, 8), 3)
    (5.295, 7.676)
    """
    share = num_experts / groups
    missed = math.prod(max(0.0, num_experts - share - i) / (num_experts - i) for i in range(min(top_k, num_experts)))
    return groups * (1.0 - missed)


def message_bytes(fmt: str, hidden: int) -> float:
    """Bytes of one token's hidden row, scales included (serving 6.6: fp8 7,392 and nvfp4 4,032 for 7,168).

    >>> message_bytes("fp8", 7168), message_bytes("nvfp4", 7168), message_bytes("bf16", 7168)
    (7392.0, 4032.0, 14336.0)
    """
    per_value = {"fp8": 1 + 4 / 128, "fp8_block": 1 + 4 / 128, "nvfp4": 0.5 + 1 / 16, "mxfp4_fp8": 1 + 1 / 32}
    return hidden * per_value.get(fmt, 2.0)


def network_rate(ceilings: Ceilings, share: float, same_rail: bool) -> float:
    """Bytes/s one GPU sends into the network between nodes, `share` of its NIC where nothing is oversubscribed.

    Traffic between GPUs of the same index stays under one leaf of a rail-optimised fabric and does not see the
    spine. Everything else shares the uplinks: `same_rail` is False for direct sends to any GPU, of which one in
    eight keeps its rail.
    """
    fabric = ceilings.fabric
    kept = 0.0 if not fabric.rail_optimised else 1.0 if same_rail else 1.0 / _RAILS
    slowdown = kept + (1.0 - kept) * fabric.oversubscription
    return (ceilings.scale_out_bytes_per_s or math.inf) * share / slowdown


def span(ceilings: Ceilings, num_gpus: int) -> tuple[int, int]:
    """GPUs per scale-up domain and number of domains of `num_gpus` contiguous ranks.

    Raises NoMeasurement when several domains are needed and the system has no scale-out network.
    """
    domain = ceilings.scale_up_gpus or num_gpus
    local, domains = min(num_gpus, domain), -(-num_gpus // domain)
    if domains > 1 and ceilings.scale_out_bytes_per_s is None:
        raise NoMeasurement(
            f"{num_gpus} GPUs need a network between nodes and this system has none on record. "
            f"Use at most {domain} GPUs, or add a [scale_out] table to the profile."
        )
    return local, domains


def inside(ceilings: Ceilings, op: Op, num_gpus: int) -> Roof:
    """Alpha-beta time within one scale-up domain: alpha + factor (n - 1) / n S / B (ring or switch)."""
    factor = 2.0 if op == "all_reduce" else 1.0
    rate = ceilings.scale_up_bytes_per_s * INSIDE_SHARE
    floor = max(ceilings.scale_up_latency_s, _INSIDE_FLOOR_S)

    def seconds(size: Floats) -> Floats:
        return np.asarray(floor + factor * (num_gpus - 1) / num_gpus * size / rate)

    return seconds


def outside(ceilings: Ceilings, op: Op, local: int, domains: int) -> Roof:
    """The part between domains, one NIC per GPU.

    All-reduce moves 2 (N - 1) / N of a rank's S / local share, all-gather and reduce-scatter (N - 1) / N of it,
    all-to-all (N - 1) / N of what a rank sends, which is the law busbw = N / (N - 1) x NIC (nccl-tests issue 130).
    Rings and trees of NCCL cross on the sender's rail; all-to-all does too because PXN forwards over NVLink first.
    Tiny all-to-alls over InfiniBand take 96 us at 16 and 132 us at 128 ranks (pplx-kernels README).
    """
    rate = network_rate(ceilings, OUTSIDE_SHARE, same_rail=True)
    hop = max(ceilings.scale_out_latency_s, _OUTSIDE_FLOOR_S)
    share = (domains - 1) / domains
    if op == "all_to_all":
        floor, moved = 96e-6 + 12e-6 * max(0.0, math.log2(local * domains / 16)), share
    elif op == "all_reduce":
        floor, moved = 2 * hop * math.ceil(math.log2(domains)), 2 * share / local
    else:
        floor, moved = hop * math.ceil(math.log2(domains)), share / local

    def seconds(size: Floats) -> Floats:
        return np.asarray(floor + moved * size / rate)

    return seconds
