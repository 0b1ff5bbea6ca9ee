"""Which bench prepares which operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from microbench.attention import decode_attention, mla_decode, mla_prefill, prefill_attention
from microbench.cases import Case
from microbench.collectives import collective
from microbench.device import Device
from microbench.exchange import exchange
from microbench.experts import expert_gemm
from microbench.gemm import gemm
from microbench.host import host
from microbench.layers import head, norm
from microbench.memory import memory
from microbench.parts import expert_parts
from microbench.ranks import Team
from microbench.work import Work

Local = Callable[[Case, Device], Work]
Shared = Callable[[Case, Device, Team], Work]

SHARED: dict[str, Shared] = {"collective": collective, "exchange": exchange}


def local_benches(nvme: Path | None) -> dict[str, Local]:
    """Operations that one process measures by itself."""
    return {
        "gemm": gemm,
        "expert_gemm": expert_gemm,
        "expert_parts": expert_parts,
        "prefill_attention": prefill_attention,
        "decode_attention": decode_attention,
        "mla_prefill": mla_prefill,
        "mla_decode": mla_decode,
        "norm": norm,
        "head": head,
        "host": host,
        "memory": partial(memory, nvme=nvme),
    }
