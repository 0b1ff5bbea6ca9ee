"""Times of collectives and expert exchange from link rates, for GPUs and sizes nobody measured.

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
_INSIDE_FLOOR_S = 10e-6
_OUTSIDE_FLOOR_S = 10e-6
"""Point-to-point latency between nodes (aiconfigurator system files)."""
_EXCHANGE_FLOOR_S = {"low_latency": 25e-6, "normal": 45e-6}
"""Inside a node: 25 to 45 us (kernels 10)."""
_EXCHANGE_OUTSIDE_FLOOR_S = {"low_latency": 30e-6, "normal": 100e-6}
"""Across nodes 30 us low latency (kernels 10); the normal mode adds its notify step (DeepEP H200 tables, 50-100 us)."""


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
    Tiny all-to-alls over InfiniBand take 96 us at 16 and 132 us at 128 ranks (pplx-kernels README).
    """
    rate = (ceilings.scale_out_bytes_per_s or math.inf) * OUTSIDE_SHARE
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


def exchange(
    ceilings: Ceilings, mode: str, num_gpus: int, nodes: int, hidden: int, top_k: int, num_experts: int, fmt: str
) -> Roof:
    """Dispatch or combine of x tokens per rank over `num_gpus` ranks in `nodes` scale-up domains.

    Low latency sends one copy per chosen expert, normal mode one per distinct rank inside and one per distinct
    domain across: t = a + max(bytes that leave the domain / NIC, bytes that stay / scale-up link).
    """
    local = -(-num_gpus // nodes)
    low_latency = mode == "low_latency"
    message = message_bytes(fmt, hidden)
    copies = float(top_k) if low_latency else distinct(num_gpus, num_experts, top_k)
    rack = ceilings.scale_up_gpus > 8
    copies = min(copies, num_gpus) if rack else copies
    link = ceilings.scale_up_bytes_per_s * (RACK_SHARE if rack else INSIDE_SHARE)
    stay = copies * (local - 1) / num_gpus * message / link
    leave, floor = 0.0, _EXCHANGE_FLOOR_S[mode]
    if nodes > 1:
        out = copies if low_latency else distinct(nodes, num_experts, top_k)
        rate = (ceilings.scale_out_bytes_per_s or math.inf) * OUTSIDE_SHARE
        leave, floor = out * (nodes - 1) / nodes * message / rate, _EXCHANGE_OUTSIDE_FLOOR_S[mode]
    per_token_s = max(stay, leave)

    def seconds(tokens: Floats) -> Floats:
        return np.asarray(floor + tokens * per_token_s)

    return seconds
