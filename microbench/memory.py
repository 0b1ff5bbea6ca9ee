"""Bandwidth of device memory, of the host link and of NVMe, over the size of one transfer."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from microbench.cases import Case
from microbench.device import Device, Stopwatch, host_free_bytes, side_stream
from microbench.errors import Unsupported, WrongResult
from microbench.work import Work

Tensor = torch.Tensor
_BLOCK_BYTES = 1 << 20
_COMPUTE_SIDE = 4096
_FILE_NAME = ".microbench-read.bin"


def memory(case: Case, device: Device, nvme: Path | None) -> Work:
    """One transfer of `bytes`; copies inside the device move them twice (read and written)."""
    kind, size = case.text("kind"), case.number("bytes")
    if kind == "nvme_read":
        if nvme is None:
            raise Unsupported("no --nvme PATH was given")
        return _nvme_read(nvme, size)
    if kind in ("hbm_copy", "hbm_read"):
        device.require(2.0 * size)
        return (_copy if kind == "hbm_copy" else _read)(device, size)
    if not device.is_cuda:
        raise Unsupported(f"{kind} needs a GPU")
    device.require(float(size))
    if 3.0 * size > host_free_bytes():
        raise Unsupported(f"{size} bytes on the host, of {host_free_bytes()} free")
    return _host_link(kind, device, size)


def _copy(device: Device, size: int) -> Work:
    source = device.random(size // 4, dtype=torch.float32)
    target = torch.empty_like(source)
    target.copy_(source)
    _same(target, source)
    return Work(lambda: target.copy_(source), "torch copy", 0.0, float(size), float(size))


def _read(device: Device, size: int) -> Work:
    source = device.random(size // 4, dtype=torch.float32)
    if float(source.amax()) != float(source.flatten().cpu().max()):
        raise WrongResult("the largest value read is not the largest value")
    return Work(lambda: source.amax(), "torch amax", 0.0, float(size), 0.0)


def _host_link(kind: str, device: Device, size: int) -> Work:
    on_host = torch.arange(size // 4, dtype=torch.int32, pin_memory="pageable" not in kind)
    on_device = torch.empty(size // 4, dtype=torch.int32, device=device.torch_device)
    pinned = "pageable" not in kind
    on_device.copy_(on_host)
    _same(on_device.cpu(), on_host)
    if kind == "h2d_overlapped":
        stopwatch = _overlapped(on_host, on_device, device)
        return Work(lambda: None, "torch copy during matmul", 0.0, 0.0, float(size), stopwatch=stopwatch)
    if kind.startswith("h2d"):
        return Work(lambda: on_device.copy_(on_host, non_blocking=pinned), "torch copy", 0.0, 0.0, float(size))
    return Work(lambda: on_host.copy_(on_device, non_blocking=pinned), "torch copy", 0.0, float(size), 0.0)


def _overlapped(on_host: Tensor, on_device: Tensor, device: Device) -> Callable[[], float]:
    """Time of a host-to-device copy while the GPU multiplies matrices for longer than the copy takes."""
    a, b = (device.random(_COMPUTE_SIDE, _COMPUTE_SIDE, seed=seed) for seed in (1, 2))
    slowest_bytes_per_s, matmul_s = 10e9, 2e-4
    products = 10 + int(on_host.nbytes / slowest_bytes_per_s / matmul_s)

    def once() -> float:
        stopwatch = Stopwatch.new()
        device.synchronise()
        torch.mm(a, b)
        with torch.cuda.stream(side_stream()):
            stopwatch.begin.record()
            on_device.copy_(on_host, non_blocking=True)
            stopwatch.end.record()
        for _ in range(products):
            torch.mm(a, b)
        device.synchronise()
        return stopwatch.seconds

    return once


def _same(copied: Tensor, original: Tensor) -> None:
    if not torch.equal(copied, original):
        raise WrongResult("the copy differs from its source")


def _nvme_read(nvme: Path, size: int) -> Work:
    """Sequential read in 1 MiB blocks of a file of its own below `nvme`, past the page cache."""
    path = nvme / _FILE_NAME if nvme.is_dir() else nvme
    if nvme.is_dir():
        _write_file(path, size)
    if path.stat().st_size < size:
        raise Unsupported(f"{path} has {path.stat().st_size} bytes, {size} are to be read")
    buffer = mmap.mmap(-1, _BLOCK_BYTES)
    direct = getattr(os, "O_DIRECT", 0)
    label = "O_DIRECT, 1 MiB blocks, one thread"
    try:
        os.close(os.open(path, os.O_RDONLY | direct))
    except OSError:
        direct, label = 0, "page cache dropped, 1 MiB blocks, one thread"
    stopwatch = _read_stopwatch(path, size, buffer, direct)
    return Work(lambda: None, label.replace(",", ";"), 0.0, 0.0, float(size), stopwatch=stopwatch)


def _read_stopwatch(path: Path, size: int, buffer: mmap.mmap, direct: int) -> Callable[[], float]:
    def once() -> float:
        descriptor = os.open(path, os.O_RDONLY | direct)
        try:
            if not direct:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            start, done = time.perf_counter(), 0
            while done < size:
                done += os.readv(descriptor, [memoryview(buffer)[: min(_BLOCK_BYTES, size - done)]])
            return time.perf_counter() - start
        finally:
            os.close(descriptor)

    return once


def _write_file(path: Path, size: int) -> None:
    if path.exists() and path.stat().st_size >= size:
        return
    block = os.urandom(_BLOCK_BYTES)
    with path.open("wb") as file:
        for start in range(0, size, _BLOCK_BYTES):
            file.write(block[: min(_BLOCK_BYTES, size - start)])
        file.flush()
        os.fsync(file.fileno())


def remove_scratch(nvme: Path) -> None:
    """Delete the file that reads were timed on, if one was made."""
    if nvme.is_dir():
        (nvme / _FILE_NAME).unlink(missing_ok=True)
