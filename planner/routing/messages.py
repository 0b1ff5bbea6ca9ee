"""Bytes of one token on its way to an expert and back."""

from __future__ import annotations

from planner.errors import InputError, nearest

DISPATCH_FORMATS: dict[str, float] = {"bf16": 2.0, "fp8": 1 + 4 / 128, "mxfp8": 1 + 1 / 32, "nvfp4": 0.5 + 1 / 16}
"""Bytes per element sent, scales included (DeepEP fp8: one fp32 per 128; MX: one byte per 32; NVFP4: one per 16)."""


def dispatch_bytes(hidden: int, fmt: str = "fp8") -> float:
    """Bytes of one token on its way to an expert, scales included.

    >>> dispatch_bytes(7168), dispatch_bytes(7168, "nvfp4")
    (7392.0, 4032.0)
    """
    if fmt not in DISPATCH_FORMATS:
        raise InputError(f"dispatch format {fmt!r} is unknown: {nearest(fmt, DISPATCH_FORMATS)}")
    return hidden * DISPATCH_FORMATS[fmt]


def combine_bytes(hidden: int) -> float:
    """Bytes of one expert output on its way back; every engine of the handbook returns bf16."""
    return hidden * 2.0
