"""Numbers a profile cannot mean: wrong by a factor of 1000, or quoted with 2:4 sparsity.

Works on the raw TOML, so a file with a misspelt key still gets its numbers checked in the same message.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from planner.units import significant

BOUNDS: dict[str, tuple[float, float, str]] = {
    "gpu.num_sms": (1, 1_000, "SMs"),
    "gpu.hbm_bytes": (4e9, 2e12, "bytes"),
    "gpu.hbm_bytes_per_s": (3e10, 5e13, "bytes/s"),
    "gpu.hbm_efficiency": (0.05, 1.0, "of the bandwidth"),
    "gpu.tdp_w": (10, 5_000, "W"),
    "node.gpus": (1, 128, "GPUs"),
    "node.power_w": (20, 2e5, "W"),
    "node.host_dram_bytes": (4e9, 1e14, "bytes"),
    "node.host_dram_bytes_per_s": (1e10, 1e13, "bytes/s"),
    "node.cpu_sockets": (1, 16, "sockets"),
    "node.cpu_flop_per_s": (1e10, 1e15, "FLOP/s"),
    "node.nvme_bytes_per_s": (1e8, 1e12, "bytes/s"),
    "scale_up.bytes_per_s": (1e9, 5e12, "bytes/s"),
    "scale_up.latency_s": (1e-7, 1e-3, "s"),
    "scale_out.bytes_per_s": (1e8, 1e12, "bytes/s"),
    "scale_out.latency_s": (1e-7, 1e-2, "s"),
    "pcie.bytes_per_s": (5e8, 1e12, "bytes/s"),
    "pcie.latency_s": (1e-7, 1e-3, "s"),
}
"""TOML path -> smallest and largest value of any machine that exists, and its unit."""
FLOP_BOUNDS = (1e12, 2e17)
PRICE_BOUNDS = {"rental": (0.01, 150.0), "purchase": (50.0, 500_000.0)}
"""US dollars per GPU-hour and per GPU."""

UNIT_SLIPS = (1e3, 1e6, 1e9, 1e12, 2.0**30, 1e-3, 1e-6)
"""Factors by which people miss SI units: thousand, GB, TFLOP/s, GiB, ms, us."""

DENSE_BF16_FLOP_PER_S = {
    "sm80": 312e12,
    "sm86": 150e12,
    "sm89": 366e12,
    "sm90": 990e12,
    "sm100": 2500e12,
    "sm103": 2500e12,
    "sm120": 504e12,
    "gfx942": 1307e12,
    "gfx950": 2500e12,
}
"""Fastest part of each architecture, dense bf16 (vendor data sheets, 2020 to 2026: A100, A40, RTX 6000 Ada, H100,
GB200, GB300, RTX PRO 6000, MI300X, MI355X). A sparse figure is twice these."""

LARGEST_DENSE_RATIO = {"fp8": ("bf16", 2.1), "int8": ("bf16", 4.1), "fp4": ("fp8", 3.1)}
"""Format -> (format it is compared with, largest ratio seen dense): fp4 runs at 3 x fp8 on Blackwell Ultra,
int8 at 4 x bf16 on GeForce parts, whose bf16 with fp32 accumulation runs at half rate."""


def implausible(raw: dict[str, Any]) -> list[str]:
    """Faults as `dotted.key: sentence`; empty when every number could be real."""
    return [*_out_of_bounds(raw), *_sparse(raw), *_above_peak(raw), *_prices(raw)]


def _number(raw: dict[str, Any], path: str) -> float | None:
    """The value at a dotted path, bare or as { value = ... }; None when absent or not a number."""
    here: Any = raw
    for key in path.split("."):
        here = here.get(key) if isinstance(here, dict) else None
    if isinstance(here, dict):
        here = here.get("value")
    try:
        return float(here) if isinstance(here, int | float) and not isinstance(here, bool) else None
    except OverflowError:
        return math.inf


def _out_of_bounds(raw: dict[str, Any]) -> Iterator[str]:
    kinds, formats = ("flop_per_s", "matmul_flop_per_s"), ("bf16", "fp8", "fp4", "int8", "fp32")
    rates = {f"gpu.{kind}.{fmt}": (*FLOP_BOUNDS, "FLOP/s") for kind in kinds for fmt in formats}
    for path, (low, high, unit) in (BOUNDS | rates).items():
        value = _number(raw, path)
        if value is None or low <= value <= high:
            continue
        slip = next((s for s in UNIT_SLIPS if low <= value * s <= high), None)
        remedy = f"; {value:g} x {slip:g} = {value * slip:g} would fit" if slip else ""
        yield f"{path}: {value:g} {unit} is outside {low:g} to {high:g}: check the unit{remedy}"


def _sparse(raw: dict[str, Any]) -> Iterator[str]:
    advice = "this looks like the 2:4 sparse figure; write the dense one"
    for fmt, (base, limit) in LARGEST_DENSE_RATIO.items():
        value, reference = _number(raw, f"gpu.flop_per_s.{fmt}"), _number(raw, f"gpu.flop_per_s.{base}")
        if value and reference and value > limit * reference:
            yield f"gpu.flop_per_s.{fmt}: {value:g} FLOP/s is {significant(value / reference)} x {base}; {advice}"
    gpu = raw.get("gpu")
    arch = gpu.get("arch") if isinstance(gpu, dict) else None
    fastest = DENSE_BF16_FLOP_PER_S.get(arch) if isinstance(arch, str) else None
    value = _number(raw, "gpu.flop_per_s.bf16")
    if fastest and value and value > 1.4 * fastest:
        yield f"gpu.flop_per_s.bf16: {value:g} FLOP/s, and the fastest {arch} part has {fastest:g} dense; {advice}"


def _above_peak(raw: dict[str, Any]) -> Iterator[str]:
    """A measured matmul may beat the nominal clock a little, never by more than 5 %."""
    for fmt in ("bf16", "fp8", "fp4", "int8"):
        measured, peak = _number(raw, f"gpu.matmul_flop_per_s.{fmt}"), _number(raw, f"gpu.flop_per_s.{fmt}")
        if measured and peak and measured > 1.05 * peak:
            path = f"gpu.matmul_flop_per_s.{fmt}"
            yield f"{path}: measured {measured:g} FLOP/s exceeds the peak of {peak:g}: one of them is wrong"


def _prices(raw: dict[str, Any]) -> Iterator[str]:
    prices = raw.get("price")
    for index, price in enumerate(prices if isinstance(prices, list) else []):
        bounds = PRICE_BOUNDS.get(str(price.get("basis"))) if isinstance(price, dict) else None
        usd = _number(price, "usd") if isinstance(price, dict) else None
        if bounds and usd is not None and not bounds[0] <= usd <= bounds[1]:
            unit = "per GPU-hour" if price["basis"] == "rental" else "per GPU"
            yield f"price.{index}.usd: ${usd:g} {unit} is outside {bounds[0]:g} to {bounds[1]:g}: per node or per rack?"
