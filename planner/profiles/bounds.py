"""The shortest time physics allows for a row: FLOP over the data-sheet rate, bytes over the data-sheet bandwidth.

These are floors, not estimates: only what certainly happens is counted, and operands under 256 MB may sit in a cache
from one repeat to the next, so only larger streams prove anything (the same rule as the importer's).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.hardware import System, system, systems
from planner.measurements.formats import FORMATS, KV_BYTES
from planner.measurements.importer.exchange import BUS_FACTOR
from planner.measurements.links import message_bytes
from planner.profiles.rows import Rows

Floats = NDArray[np.float64]

SLACK = 1.05
"""Clocks above nominal."""
CACHED_BYTES = 256e6
"""Larger than any last-level cache of the catalogue."""
_LATENT, _ROPE, _NOPE, _VALUE, _SPARSE = 512, 64, 128, 128, 2048
"""DeepSeek-V3 and V3.2 config.json."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """Data-sheet rates of one device: FLOP/s by arithmetic format, memory, scale-up link and host link."""

    name: str
    flop_per_s: Mapping[str, float]
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    pcie_bytes_per_s: float | None

    @classmethod
    def of(cls, device: System) -> Peaks:
        """Rates of a hardware profile; a format the GPU lacks runs in the next wider one."""
        gpu = device.gpu
        rates = {fmt: gpu.peak_flop_per_s(fmt) for fmt in ("bf16", "fp8", "fp4", "int8")}
        pcie = None if device.pcie is None else device.pcie.bytes_per_s
        return cls(device.name, rates, gpu.hbm_bytes_per_s, device.scale_up.bytes_per_s, pcie)

    @classmethod
    def fastest(cls) -> Peaks:
        """The best of every known device in every respect, for a device nobody has described."""
        every = [cls.of(system(name)) for name in systems()]
        return cls(
            "any known device",
            {fmt: max(peaks.flop_per_s[fmt] for peaks in every) for fmt in every[0].flop_per_s},
            max(peaks.hbm_bytes_per_s for peaks in every),
            max(peaks.link_bytes_per_s for peaks in every),
            max(peaks.pcie_bytes_per_s or 0.0 for peaks in every),
        )

    def rates(self, formats: NDArray[Any]) -> Floats:
        """FLOP/s of each row's format; an unknown format gets the fastest."""
        return _per_name(formats, lambda name: self.flop_per_s[FORMATS[name].arithmetic], max(self.flop_per_s.values()))


def shortest_s(rows: Rows, peaks: Peaks) -> Floats:
    """Shortest possible time of every row [s], 0 where nothing is known."""
    bound = _BOUNDS.get(rows.op.name)
    return np.zeros(len(rows)) if bound is None else np.asarray(bound(rows, peaks), dtype=np.float64)


def work(rows: Rows) -> Floats:
    """FLOP of every row, 0 for operations that only move bytes and for modules of several kernels."""
    if rows.op.name == "gemm":
        return 2 * _float(rows, "tokens") * _float(rows, "rows") * _float(rows, "cols")
    if rows.op.name.startswith("expert_gemm"):
        return 2 * _float(rows, "assignments") * _expert_weights(rows)
    if rows.op.name == "prefill_attention":
        return _attention_flop(rows)
    if rows.op.name == "mla_prefill":
        per_pair = 2 * (_NOPE + _ROPE + _VALUE) * _float(rows, "num_heads") * (rows.columns["gemm_fmt"] == "kernel")
        return np.asarray(per_pair * _float(rows, "batch") * _pairs(_float(rows, "length"), np.zeros(len(rows))))
    return np.zeros(len(rows))


def _float(rows: Rows, name: str) -> Floats:
    return rows.columns[name].astype(np.float64)


def _per_name(names: NDArray[Any], value: Callable[[str], float], otherwise: float) -> Floats:
    known, codes = np.unique(names.astype(str), return_inverse=True)
    return np.array([value(str(name)) if str(name) in FORMATS else otherwise for name in known])[codes]


def _weight_bytes(rows: Rows) -> Floats:
    return _per_name(rows.columns["fmt"], lambda name: FORMATS[name].weight_bytes, 0.0)


def compute_bound(rows: Rows, peaks: Peaks) -> NDArray[np.bool_]:
    """True where the FLOP take at least as long as streaming the weights, at data-sheet rates."""
    if "fmt" not in rows.columns or not rows.op.name.startswith("expert_gemm"):
        return np.ones(len(rows), dtype=np.bool_)
    active = np.minimum(_float(rows, "assignments"), _float(rows, "local_experts"))
    streamed = active * _expert_weights(rows) * _weight_bytes(rows) / peaks.hbm_bytes_per_s
    return np.asarray(work(rows) / peaks.rates(rows.columns["fmt"]) >= streamed)


def _streamed(bytes_: Floats, peaks: Peaks) -> Floats:
    return np.where(bytes_ > CACHED_BYTES, bytes_, 0.0) / peaks.hbm_bytes_per_s


def _pairs(length: Floats, window: Floats) -> Floats:
    outside = np.where(window > 0, np.maximum(length - window, 0.0), 0.0)
    return np.asarray(length * (length + 1) / 2 - outside * (outside + 1) / 2)


def _gemm(rows: Rows, peaks: Peaks) -> Floats:
    weights = _float(rows, "rows") * _float(rows, "cols") * _weight_bytes(rows)
    return np.maximum(work(rows) / peaks.rates(rows.columns["fmt"]), _streamed(weights, peaks))


def _expert_weights(rows: Rows) -> Floats:
    return np.asarray(_float(rows, "num_matrices") * _float(rows, "hidden") * _float(rows, "width"))


def _expert(rows: Rows, peaks: Peaks) -> Floats:
    """Balanced rows touch min(assignments, experts) experts; of skewed ones only the first token's are certain."""
    active = np.minimum(_float(rows, "assignments"), _float(rows, "local_experts"))
    if "distribution" in rows.columns:
        skewed = rows.columns["distribution"] != "balanced"
        active = np.where(skewed, np.minimum(active, _float(rows, "top_k")), active)
    weights = active * _expert_weights(rows) * _weight_bytes(rows)
    return np.maximum(work(rows) / peaks.rates(rows.columns["fmt"]), _streamed(weights, peaks))


def _attention_flop(rows: Rows) -> Floats:
    heads = _float(rows, "num_heads") * _float(rows, "head_dim") * _float(rows, "batch")
    return np.asarray(4 * heads * _pairs(_float(rows, "length"), _float(rows, "window")))


def _prefill(rows: Rows, peaks: Peaks) -> Floats:
    """Both products may run in fp8."""
    return work(rows) / max(peaks.flop_per_s["bf16"], peaks.flop_per_s["fp8"])


def _kv_bytes(rows: Rows) -> Floats:
    return np.where(rows.columns["kv_fmt"] == "fp8", KV_BYTES["fp8"], KV_BYTES["bf16"])


def _decode(rows: Rows, peaks: Peaks) -> Floats:
    length, window = _float(rows, "length"), _float(rows, "window")
    seen = np.where(window > 0, np.minimum(length, window), length)
    values = 2 * _float(rows, "num_kv_heads") * _float(rows, "head_dim")
    return _streamed(_float(rows, "batch") * seen * values * _kv_bytes(rows), peaks)


def _mla_decode(rows: Rows, peaks: Peaks) -> Floats:
    length = _float(rows, "length")
    seen = np.minimum(length, _SPARSE) if rows.op.name.startswith("sparse") else length
    return _streamed(_float(rows, "batch") * seen * (_LATENT + _ROPE) * _kv_bytes(rows), peaks)


def _mla_bmm(rows: Rows, peaks: Peaks) -> Floats:
    flop = 2 * _float(rows, "tokens") * _float(rows, "num_heads") * _NOPE * _LATENT
    return np.asarray(flop / peaks.rates(rows.columns["fmt"]))


def _collective(rows: Rows, peaks: Peaks) -> Floats:
    """Bus bytes over the link; the switch may reduce on the way (NVLink SHARP), which halves an all-reduce."""
    ranks = _float(rows, "num_gpus")
    moved = _float(rows, "bytes") * (ranks - 1) / ranks
    moved = np.where(rows.columns["op"] == "send_recv", _float(rows, "bytes"), moved)
    return np.asarray(moved / peaks.link_bytes_per_s)


def _exchange(rows: Rows, peaks: Peaks) -> Floats:
    """Every token leaves its rank once unless its experts are at home."""
    names, codes = np.unique(rows.columns["fmt"].astype(str), return_inverse=True)
    # An unstated format counts as the smallest message anybody sends.
    per_value = np.array([message_bytes("nvfp4" if name == "unstated" else str(name), 1) for name in names])[codes]
    ranks = _float(rows, "num_gpus")
    moved = _float(rows, "tokens") * _float(rows, "hidden") * per_value * (ranks - 1) / ranks
    return np.asarray(moved / peaks.link_bytes_per_s)


def _memory(rows: Rows, peaks: Peaks) -> Floats:
    kind, bytes_ = rows.columns["kind"], _float(rows, "bytes")
    inside = np.char.startswith(kind.astype(str), "hbm")
    host = ~inside & (kind != "nvme_read")
    seconds = np.where(inside, _streamed(bytes_, peaks), 0.0)
    return np.where(host, bytes_ / peaks.pcie_bytes_per_s, seconds) if peaks.pcie_bytes_per_s else seconds


def _tokenwise(width: str, bytes_per_value: float) -> Callable[[Rows, Peaks], Floats]:
    return lambda rows, peaks: _streamed(_float(rows, "tokens") * _float(rows, width) * bytes_per_value, peaks)


_BOUNDS: dict[str, Callable[[Rows, Peaks], Floats]] = {
    "gemm": _gemm,
    "expert_gemm": _expert,
    "expert_gemm_masked": _expert,
    "prefill_attention": _prefill,
    "decode_attention": _decode,
    "mla_prefill": _prefill,
    "mla_decode": _mla_decode,
    "sparse_mla_decode": _mla_decode,
    "mla_bmm": _mla_bmm,
    "collective": _collective,
    "dispatch": _exchange,
    "exchange": _exchange,
    "memory": _memory,
    "norm": _tokenwise("hidden", 4.0),
    "head": _tokenwise("vocab", 2.0),
}

BUS = BUS_FACTOR | {"send_recv": 1.0}
"""Bus bandwidth = factor x (n - 1) / n x size / time, size / time for send_recv (nccl-tests PERFORMANCE.md)."""
