"""What is known of a GPU, its links, its node and a cluster of such nodes.

Rates are dense FLOP/s and bytes per second in one direction per GPU; times are seconds, memory is bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.errors import ProfileError

COMPUTE_FORMATS: dict[str, tuple[str, ...]] = {
    "fp32": ("fp32",),
    "bf16": ("bf16",),
    "fp16": ("bf16",),
    "fp8": ("fp8", "bf16"),
    "fp8_block": ("fp8", "bf16"),
    "int8": ("int8", "bf16"),
    "int4": ("bf16",),
    "fp4": ("fp4", "fp8", "bf16"),
    "nvfp4": ("fp4", "fp8", "bf16"),
    "mxfp4": ("fp4", "fp8", "bf16"),
}
"""Weight format -> formats a GPU may compute it in, narrowest first; a GPU without the first uses the next."""

UNMEASURED_MATMUL_SHARE = 0.7
"""Share of the peak that a large matmul reaches where nothing is measured.

The measured shares of kernels.md section 2 run from 0.51 (MI300X) to 0.87 (A100); Hopper fp8 reaches 0.71.
"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator.

    `hbm_bytes` is the memory an engine can see (the runtime's total, not the data sheet's name),
    `hbm_efficiency` the share of `hbm_bytes_per_s` that streaming expert weights reaches in decode.
    """

    name: str
    vendor: str
    arch: str
    num_sms: int | None
    hbm_bytes: float
    hbm_bytes_per_s: float
    flop_per_s: tuple[tuple[str, float], ...]
    matmul_flop_per_s: tuple[tuple[str, float], ...]
    hbm_efficiency: float
    tdp_w: float | None

    def compute_format(self, fmt: str) -> str:
        """Format the tensor cores use for weights in `fmt`: fp8 on an A100 gives bf16 (weight-only).

        Raises ProfileError for a format nobody knows, and for a GPU whose rate is unknown.
        """
        if fmt not in COMPUTE_FORMATS:
            raise ProfileError(f"number format {fmt!r} is unknown. Use one of {', '.join(COMPUTE_FORMATS)}.")
        known = dict(self.flop_per_s)
        for candidate in COMPUTE_FORMATS[fmt]:
            if candidate in known:
                return candidate
        raise ProfileError(
            f"{self.name}: FLOP/s for {fmt} are unknown. Add gpu.flop_per_s.{COMPUTE_FORMATS[fmt][-1]} with its source."
        )

    def peak_flop_per_s(self, fmt: str) -> float:
        """Dense data-sheet FLOP/s for weights in `fmt`, after the fall back of `compute_format`."""
        return dict(self.flop_per_s)[self.compute_format(fmt)]

    def matmul_ceiling_flop_per_s(self, fmt: str) -> tuple[float, bool]:
        """FLOP/s that a large matmul reaches, and whether it was measured (else 0.7 x peak)."""
        compute = self.compute_format(fmt)
        measured = dict(self.matmul_flop_per_s).get(compute)
        if measured is not None:
            return measured, True
        return UNMEASURED_MATMUL_SHARE * self.peak_flop_per_s(fmt), False

    def ridge_tokens(self, fmt: str, weight_bytes: float) -> float:
        """Tokens per expert at which a matmul turns from memory- to compute-bound.

        F x weight_bytes / (2 x bytes per second) (serving.md 6.1), with data-sheet rates.
        """
        return self.peak_flop_per_s(fmt) * weight_bytes / (2 * self.hbm_bytes_per_s)


@dataclass(frozen=True, slots=True)
class Link:
    """A link per GPU: nominal bytes per second in one direction, shared by `size` GPUs (0 = no bound).

    `latency_s` is the fixed part of one transfer as fitted from measurements, None when nobody measured it.
    """

    name: str
    bytes_per_s: float
    latency_s: float | None
    size: int


@dataclass(frozen=True, slots=True)
class Price:
    """`usd` per GPU-hour (rental, on demand) or per GPU (purchase), as listed by `provider` on `as_of`."""

    basis: Literal["rental", "purchase"]
    usd: float
    as_of: str
    provider: str
    source: str


@dataclass(frozen=True, slots=True)
class System:
    """One kind of node: its GPU, its links, its host and what it costs. None means nobody published it."""

    name: str
    title: str
    gpu: Gpu
    gpus_per_node: int
    scale_up: Link
    scale_out: Link | None
    pcie: Link | None
    host_dram_bytes: float | None
    nvme_bytes_per_s: float | None
    node_power_w: float | None
    prices: tuple[Price, ...]
    sources: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    host_dram_bytes_per_s: float | None = None
    cpu_flop_per_s: float | None = None
    cpu_sockets: int | None = None

    def source(self, path: str) -> str | None:
        """Where the number at the TOML path (`gpu.hbm_bytes`) comes from; None if the number is not known."""
        return dict(self.sources).get(path)

    def rental_usd_per_gpu_hour(self) -> Price | None:
        """Most recent on-demand price; the lower one when two are equally recent."""
        return self._newest("rental")

    def purchase_usd_per_gpu(self) -> Price | None:
        """Most recent purchase price; the lower one when two are equally recent."""
        return self._newest("purchase")

    def _newest(self, basis: str) -> Price | None:
        offers = sorted((p for p in self.prices if p.basis == basis), key=lambda p: (p.usd, p.provider))
        # `max` keeps the first of equals, which after the sort is the cheapest; ISO dates sort as text.
        return max(offers, key=lambda p: p.as_of, default=None)


@dataclass(frozen=True, slots=True)
class Cluster:
    """`nodes` nodes of one system, of which `gpus_per_node` GPUs each are used, and the network between them.

    `oversubscription` is leaf-to-spine (1 = full bisection); `rail_optimised` says that GPUs of one index share a leaf.
    """

    system: System
    nodes: int
    gpus_per_node: int
    oversubscription: float = 1.0
    rail_optimised: bool = True

    @property
    def gpu(self) -> Gpu:
        """The GPU of every node."""
        return self.system.gpu

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def name(self) -> str:
        """The text `parse_cluster` reads: `h200-sxm:2x8`."""
        return f"{self.system.name}:{self.nodes}x{self.gpus_per_node}"

    @property
    def scale_up_gpus(self) -> int:
        """GPUs that reach each other without the scale-out network: 8 in a 2x8 of H200, 72 in an NVL72 of 18x4."""
        size = self.system.scale_up.size
        spans_nodes = size == 0 or size > self.system.gpus_per_node
        reachable = self.num_gpus if spans_nodes else self.gpus_per_node
        return reachable if size == 0 else min(size, reachable)

    def __str__(self) -> str:
        return self.name
