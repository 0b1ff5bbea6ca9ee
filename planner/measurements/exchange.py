"""Laws of expert exchange: dispatch and combine of x tokens per rank, per library, mode and step.

    t = floor + tokens x (wire^p + stay^p)^(1/p)

`wire` is what leaves the scale-up domain over the NIC's rate, `stay` what moves inside it. Low-latency kernels of
DeepEP, pplx and NCCL-EP send one copy per chosen expert (handbook kernels 4), normal kernels one per distinct node,
forwarded inside it to the distinct ranks (serving 6.6). MORI sends one copy per distinct node in both modes: only so
counted do its rows at 16 and 32 ranks give one rate, 18 to 20 GB/s on MI300X. Floors and shares of the NIC are fits
over the published rows of `source`; docs/kernel_accuracy.md holds them against those rows, each row left out in turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.errors import InputError, nearest
from planner.measurements.links import INSIDE_SHARE, RACK_SHARE, distinct, message_bytes, network_rate
from planner.measurements.roofline import Ceilings, Roof

Floats = NDArray[np.float64]

_INSIDE_FLOOR_S = {"low_latency": 25e-6, "normal": 45e-6}
"""Inside a node: 25 to 45 us (kernels 10)."""
_OVERLAP = 3.0
"""Forwarding inside the node runs beside the network but not for free. DeepEP normal on H800 (NVLink 200 GB/s) and
on H200 (450 GB/s), 16 to 64 ranks: between the larger of the two (infinity) and their sum (1)."""
_NOTIFY_PER_DOUBLING_S = 30e-6
"""DeepEP normal, H200 tables: one token takes 58 us over 2 nodes and 88 us over 4 (combine 84 and 120)."""


@dataclass(frozen=True, slots=True)
class Law:
    """Fixed seconds over two nodes and the share of the NIC reached between nodes; `per_node`: copies per node."""

    floor_s: float
    nic_share: float
    per_node: bool
    source: str


_DEEPEP = "deepseek-ai/DeepEP docs/legacy.md @dd758ca, H800, CX7 400G"
_TABLES = "aiconfigurator-core 0.12.0 DeepEP tables, H200; shares from DeepEP legacy.md and README @dd758ca"
_GARDEN = "perplexityai/pplx-garden docs/fabric-lib.md @2446003, CX7 400G"
_NCCL = "NVIDIA/nccl contrib/nccl_ep/README.md @5067397c, H100; flashinfer benchmarks/MoE_benchmarks.md, B200"
_MORI = "ROCm/mori README.md @624002c8, MI300X CX7 and MI355X AINIC"
LAWS: dict[tuple[str, str, str], Law] = {
    ("deepep", "low_latency", "dispatch"): Law(36.9e-6, 0.944, False, _DEEPEP),
    ("deepep", "low_latency", "combine"): Law(15.1e-6, 0.827, False, _DEEPEP),
    ("deepep", "normal", "dispatch"): Law(60e-6, 0.95, True, _TABLES),
    ("deepep", "normal", "combine"): Law(85e-6, 0.95, True, _TABLES),
    ("pplx", "low_latency", "dispatch"): Law(30e-6, 0.908, False, _GARDEN),
    ("pplx", "low_latency", "combine"): Law(21.5e-6, 0.896, False, _GARDEN),
    ("nccl-ep", "low_latency", "dispatch"): Law(15e-6, 0.884, False, _NCCL),
    ("nccl-ep", "low_latency", "combine"): Law(25e-6, 0.836, False, _NCCL),
    ("nccl-ep", "normal", "dispatch"): Law(60e-6, 0.92, True, _NCCL),
    ("nccl-ep", "normal", "combine"): Law(85e-6, 0.92, True, _NCCL),
    ("mori", "low_latency", "dispatch"): Law(25e-6, 0.38, True, _MORI),
    ("mori", "low_latency", "combine"): Law(19e-6, 0.42, True, _MORI),
    ("mori", "normal", "dispatch"): Law(60e-6, 0.66, True, _MORI),
    ("mori", "normal", "combine"): Law(85e-6, 0.82, True, _MORI),
}
"""Shares are of a 400 Gbit/s NIC, 50 GB/s, per GPU."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is exchanged: `num_gpus` ranks in `nodes` scale-up domains; `fmt` of the rows on the wire.

    `mode` is low_latency or normal, `step` dispatch or combine. `node_limit` is the most nodes a token may visit
    under group-limited routing, or their mean where that is known; 0 for no limit.
    """

    step: str
    mode: str
    num_gpus: int
    nodes: int
    hidden: int
    top_k: int
    num_experts: int
    fmt: str
    node_limit: float = 0


def law_of(library: str, mode: str, step: str) -> Law:
    """Law of a library; one without rows for the mode answers with DeepEP's. Raises InputError for an unknown one."""
    known = sorted({name for name, _, _ in LAWS})
    if library not in known:
        raise InputError(f"exchange library {library!r} is unknown; {nearest(library, known)}")
    return LAWS.get((library, mode, step)) or LAWS["deepep", mode, step]


def exchange(ceilings: Ceilings, what: Exchange, law: Law | None = None) -> Roof:
    """Seconds over tokens per rank, by `law` or that of `ceilings.exchange_library`.

    Tokens of the busiest receiver belong in x: it scales the bandwidth term and leaves the floor (DeepEP issue 250).
    """
    law = law or law_of(ceilings.exchange_library, what.mode, what.step)
    message = message_bytes(what.fmt, what.hidden)
    local = -(-what.num_gpus // what.nodes)
    rack = ceilings.scale_up_gpus > 8
    low_latency = what.mode == "low_latency"
    ranks = distinct(what.num_gpus, what.num_experts, what.top_k)
    copies = float(what.top_k) if low_latency and not law.per_node else ranks
    copies = min(copies, what.num_gpus) if rack else copies
    link = ceilings.scale_up_bytes_per_s * (RACK_SHARE if rack else INSIDE_SHARE)
    forwarded = law.per_node and what.nodes > 1
    stay_s = copies * (local - 1) / (local if forwarded else what.num_gpus) * message / link
    wire_s, floor_s = 0.0, _INSIDE_FLOOR_S[what.mode]
    if what.nodes > 1:
        out = copies
        if law.per_node:
            out = distinct(what.nodes, what.num_experts, what.top_k)
            out = min(out, what.node_limit) if what.node_limit else out
        rate = network_rate(ceilings, law.nic_share, same_rail=law.per_node)
        wire_s = out * (what.nodes - 1) / what.nodes * message / rate
        floor_s = law.floor_s + (0.0 if low_latency else _NOTIFY_PER_DOUBLING_S * math.log2(what.nodes / 2))
    per_token_s = (wire_s**_OVERLAP + stay_s**_OVERLAP) ** (1.0 / _OVERLAP)

    def seconds(tokens: Floats) -> Floats:
        return np.asarray(floor_s + tokens * per_token_s)

    return seconds
