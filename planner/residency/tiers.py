"""Where experts can live and how fast they come to HBM: a peer's HBM, host DRAM, NVMe; and the CPU beside them.

Rates are bytes per second of one GPU. Handbook serving 5B.2 (tiers, PCIe roots, fixed cost per miss). Host memory is
taken as pinned; from pageable memory a fetch takes about twice as long (5B.3, one report of 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import InputError
from planner.hardware import Link, System
from planner.residency.hosts import KTRANSFORMERS_SHARE, Host, host_for

LINK_SHARES = {"PCIe 4": 25 / 32, "PCIe 5": 55 / 64}
"""Link name -> share of its nominal rate that pinned copies reach (serving 5B.2).

kernels.md section 7 has 26 of 32 GB/s for generation 4; nvbandwidth on eight RTX 5090 has 56.3 of 64 for
generation 5 (tinygrad/open-gpu-kernel-modules issue 29). Links that are not listed state measured rates.
"""
MISS_S = 15e-6
"""Fixed part of one fetch, 10 to 20 us (serving 5B.2)."""
NVME_BYTES_PER_S = 5e9
"""One drive, the low end of 5 to 14 GB/s (serving 5B.2)."""
PEER_SHARE = 0.7
"""Share of the scale-up link that transfers between GPUs reach (0.65 to 0.75, kernels 10)."""


@dataclass(frozen=True, slots=True)
class Tier:
    """A place for experts: bytes per second to one GPU's HBM, fixed seconds per expert, bytes for experts."""

    name: str
    bytes_per_s: float
    latency_s: float
    capacity_bytes: float


@dataclass(frozen=True, slots=True)
class Cpu:
    """What the host's cores do with experts in DRAM, all sockets: FLOP per second, and bytes streamed per second.

    `bytes_per_s` is reached by the kernels of KTransformers, `llama_bytes_per_s` by those of llama.cpp. `host` says
    whose cores they are.
    """

    bytes_per_s: float
    llama_bytes_per_s: float
    flop_per_s: float
    num_sockets: int
    host: str = "host"


@dataclass(frozen=True, slots=True)
class Tiers:
    """HBM for experts of all GPUs together, the tiers behind it from fast to slow, and the CPU (None: no host memory).

    Without `has_host` GPU and host share one memory, or no link between them is known. Capacities and rates are those
    of one of `num_replicas` servers that share the host.
    """

    hbm_bytes: float
    backing: tuple[Tier, ...]
    cpu: Cpu | None
    num_gpus: int = 1
    has_host: bool = True
    num_replicas: int = 1

    def named(self, name: str) -> Tier | None:
        """The backing tier called `name`."""
        return next((tier for tier in self.backing if tier.name == name), None)


def tiers_of(
    system: System,
    hbm_bytes: float,
    *,
    num_gpus: int = 1,
    dram_bytes: float | None = None,
    nvme_bytes: float = 0.0,
    nvme_bytes_per_s: float | None = None,
    peer_bytes: float = 0.0,
    gpus_per_root: int = 1,
    host: Host | None = None,
    num_replicas: int = 1,
) -> Tiers:
    """Tiers of `num_gpus` GPUs of one node with `hbm_bytes` of HBM left for experts, all GPUs together.

    `dram_bytes` (None: the profile's), `nvme_bytes` and `peer_bytes` in the HBM of other GPUs are the node's;
    `num_replicas` servers of so many GPUs share them, the CPU and the rates of memory and drives evenly, each with
    experts of its own: no engine shares pinned memory between servers. `gpus_per_root` GPUs share one host link. A
    system without a host link has unified memory and nothing behind it. Raises InputError on negative or non-finite
    sizes and on drives without speed.
    """
    dram = (system.host_dram_bytes or 0.0) if dram_bytes is None else dram_bytes
    drives = nvme_bytes_per_s or system.nvme_bytes_per_s or NVME_BYTES_PER_S
    for name, value in {"HBM": hbm_bytes, "DRAM": dram, "NVMe": nvme_bytes, "peer HBM": peer_bytes}.items():
        if not 0.0 <= value < float("inf"):
            raise InputError(f"{name} for experts: {value!r} bytes; a number from 0 on is needed")
    if nvme_bytes_per_s is not None and not 0.0 < nvme_bytes_per_s < float("inf"):
        raise InputError(f"NVMe of {nvme_bytes_per_s!r} bytes/s: a rate above 0 is needed")
    if num_gpus < 1 or gpus_per_root < 1 or num_replicas < 1:
        raise InputError(f"{num_gpus} GPUs, {gpus_per_root} per PCIe root, {num_replicas} replicas: at least 1 of each")
    backing, sharers = [], num_gpus * num_replicas
    if peer_bytes:
        up = system.scale_up
        backing.append(Tier("peer", PEER_SHARE * up.bytes_per_s, up.latency_s or MISS_S, peer_bytes / num_replicas))
    if system.pcie is None:
        return Tiers(hbm_bytes, tuple(backing), None, num_gpus, has_host=False, num_replicas=num_replicas)
    found = host or host_for(system, dram)
    link = min(link_bytes_per_s(system.pcie) / min(gpus_per_root, num_gpus), found.dram_bytes_per_s / sharers)
    if dram:
        backing.append(Tier("dram", link, MISS_S, dram / num_replicas))
    if nvme_bytes:
        backing.append(Tier("nvme", min(link, drives / sharers), MISS_S, nvme_bytes / num_replicas))
    cpu = _cpu(found, num_replicas) if dram else None
    return Tiers(hbm_bytes, tuple(backing), cpu, num_gpus, num_replicas=num_replicas)


def _cpu(host: Host, num_replicas: int) -> Cpu:
    """One replica's part of the host; with several, each keeps to as few sockets as it can."""
    rate = host.dram_bytes_per_s / num_replicas
    return Cpu(
        bytes_per_s=KTRANSFORMERS_SHARE * rate,
        llama_bytes_per_s=host.llama_share * rate,
        flop_per_s=host.matmul_flop_per_s / num_replicas,
        num_sockets=-(-host.num_sockets // num_replicas),
        host=host.title,
    )


def link_bytes_per_s(link: Link) -> float:
    """Rate that pinned copies reach on `link`, one direction [bytes/s]."""
    share = next((share for name, share in LINK_SHARES.items() if link.name.startswith(name)), 1.0)
    return share * link.bytes_per_s
