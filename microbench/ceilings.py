"""Data-sheet peaks by device name. Nothing real is faster, so a faster row is a broken measurement."""

from __future__ import annotations

import re
from dataclasses import dataclass

from microbench.work import Work

SLACK = 1.05
"""Clocks above nominal and timer resolution."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """Dense FLOP/s per format and memory bandwidth [bytes/s]."""

    bytes_per_s: float
    flop_per_s: dict[str, float]


def _peaks(terabytes: float, bf16: float, fp8: float | None = None) -> Peaks:
    return Peaks(terabytes * 1e12, {"bf16": bf16 * 1e12} | ({"fp8": fp8 * 1e12} if fp8 else {}))


PEAKS = (
    ("H100 NVL", _peaks(3.9, 835.5, 1670.5)),
    ("H100 PCIe", _peaks(2.0, 756, 1513)),
    ("H100", _peaks(3.35, 989, 1979)),
    ("H200", _peaks(4.8, 989, 1979)),
    ("H800", _peaks(3.35, 990, 1979)),
    ("GB200", _peaks(8.0, 2500, 5000)),
    ("GB300", _peaks(8.0, 2500, 5000)),
    ("B200", _peaks(8.0, 2250, 4500)),
    ("B300", _peaks(8.0, 2250, 4500)),
    ("A100-SXM4-80GB", _peaks(2.039, 312)),
    ("A100 80GB PCIe", _peaks(1.935, 312)),
    ("A100-SXM4-40GB", _peaks(1.555, 312)),
    ("A100-PCIE-40GB", _peaks(1.555, 312)),
    ("L40S", _peaks(0.864, 362, 733)),
    ("L4", _peaks(0.3, 121, 242)),
    ("RTX 4090", _peaks(1.008, 165.2, 330.3)),
    ("RTX PRO 6000", _peaks(1.792, 467.8, 935.6)),
    ("MI300X", _peaks(5.3, 1307, 2610)),
    ("MI325X", _peaks(6.0, 1307, 2610)),
    ("MI355X", _peaks(8.0, 2500, 5000)),
)
"""(whole words of the torch device name, peaks); the first match counts. Dense rates, bandwidths: stas00/ml-engineering
compute/accelerator/README.md @744d01e (2026-08), which cites the vendors' pages; L4 and RTX PRO 6000:
ai-dynamo/aiconfigurator systems/*.yaml @095f58a; RTX 4090 with fp32 accumulation: hmc-tech.com comparison page.
H800 fp8 as H100: same chip (deepseek-ai/profile-data @4496024 lists the bf16 rate only)."""


def peaks_of(device_name: str) -> Peaks | None:
    """Peaks of a torch device name, None when the device is not listed.

    >>> peaks_of("NVIDIA H200").bytes_per_s
    4800000000000.0
    """
    for part, peaks in PEAKS:
        if re.search(rf"\b{re.escape(part)}\b", device_name):
            return peaks
    return None


def violation(work: Work, seconds: float, peaks: Peaks | None) -> str | None:
    """Why `seconds` is impossible, None when it is not.

    Only bytes read count: written ones may still lie in the cache when the clock stops.
    """
    if seconds <= 0:
        return f"time {seconds:g} s is not positive"
    if peaks is None:
        return None
    if work.read_bytes / seconds > SLACK * peaks.bytes_per_s:
        rate, peak = work.read_bytes / seconds / 1e9, peaks.bytes_per_s / 1e9
        return f"{rate:,.0f} GB/s read, the data sheet allows {peak:,.0f}"
    peak_flop_per_s = peaks.flop_per_s.get(work.arithmetic)
    if peak_flop_per_s is not None and work.flop / seconds > SLACK * peak_flop_per_s:
        return f"{work.flop / seconds / 1e12:,.0f} TFLOP/s, the data sheet allows {peak_flop_per_s / 1e12:,.0f}"
    return None
