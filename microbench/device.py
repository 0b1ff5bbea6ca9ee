"""The accelerator or the CPU that is measured. CUDA and ROCm answer to the same torch API."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from microbench.errors import InputError, Unsupported

Tensor = torch.Tensor
_FLUSH_BYTES = 256 << 20
_KEPT_FREE = 0.9
"""Share of the free memory a case may take; the rest is for the allocator and the library's workspace."""


@dataclass(frozen=True, slots=True)
class Device:
    """`flusher` is a buffer larger than the last-level cache, None on a CPU, whose caches are left alone."""

    torch_device: torch.device
    name: str
    flusher: Tensor | None

    @property
    def is_cuda(self) -> bool:
        """True for CUDA and ROCm."""
        return self.torch_device.type == "cuda"

    def flush(self) -> None:
        """Write a buffer of at least twice the L2 cache. It also keeps the GPU busy while the next launch is queued."""
        if self.flusher is not None:
            self.flusher.fill_(0.0)

    def synchronise(self) -> None:
        """Wait until the device is idle."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)

    def release(self) -> None:
        """Give cached memory back; a case must not find the memory of the one before in its way."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        """Memory that this process can still allocate [bytes]; processes on CPUs share that of the machine."""
        if self.is_cuda:
            return int(torch.cuda.mem_get_info(self.torch_device)[0])
        return host_free_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def require(self, needed_bytes: float) -> None:
        """Raise Unsupported when a case would not fit, before the allocation is tried."""
        usable = self.free_bytes() * _KEPT_FREE
        if needed_bytes > usable:
            raise Unsupported(f"needs {needed_bytes / 1e9:.1f} GB of memory, {usable / 1e9:.1f} GB are usable")

    def random(self, *shape: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal numbers of standard deviation `scale`; never zeros, on which GPUs run faster than on data."""
        generator = torch.Generator(device=self.torch_device).manual_seed(seed)
        values = torch.empty(*shape, dtype=dtype, device=self.torch_device)
        return values.normal_(0.0, scale, generator=generator)


def open_device(kind: str | None, local_rank: int = 0) -> Device:
    """The device `cuda` or `cpu`; without `kind` a GPU where there is one.

    Raises InputError when a GPU is asked for and torch sees none.
    """
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return Device(torch.device("cpu"), _cpu_name(), None)
    if not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():
        raise InputError(
            f"--device cuda: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs, process {local_rank} of "
            "this machine needs its own. Check the driver and CUDA_VISIBLE_DEVICES, start one process per GPU, "
            "or use --device cpu."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    facts = torch.cuda.get_device_properties(device)
    flush_bytes = max(_FLUSH_BYTES, 2 * int(getattr(facts, "L2_cache_size", 0)))
    return Device(device, facts.name, torch.empty(flush_bytes // 4, dtype=torch.float32, device=device))


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """A pair of events on the current stream."""

    begin: torch.cuda.Event
    end: torch.cuda.Event

    @classmethod
    def new(cls) -> Stopwatch:
        """Two events that record times."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        return cls(begin, end)

    @property
    def seconds(self) -> float:
        """Time between the events; the device must have passed both [s]."""
        return float(self.begin.elapsed_time(self.end)) * 1e-3


def side_stream() -> torch.cuda.Stream:
    """A stream beside the current one that waits for what is queued there."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def host_free_bytes() -> int:
    """Memory of the machine that can still be allocated [bytes]."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE")) // 2


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return "CPU " + line.partition(":")[2].strip()
    return "CPU"
