"""Number formats of measured tables: bytes per weight and activation, arithmetic format, and substitutes.

Bytes per value include block scales: nvfp4 has one fp8 scale per 16 values, mxfp4 one per 32, fp8_block one fp32
scale per 128 x 128 weights (1 x 128 activations), int4 one bf16 scale per 128 weights (OCP MX 1.0; handbook
serving 6.2 and 6.3).
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import NoMeasurement, nearest


@dataclass(frozen=True, slots=True)
class Format:
    """How a GEMM in this format moves and computes.

    `arithmetic` is the format of the tensor-core instruction; `substitutes` are other formats whose measured
    utilisation may be transferred when this one was not measured, best first.
    """

    weight_bytes: float
    activation_bytes: float
    arithmetic: str
    substitutes: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "bf16": Format(2.0, 2.0, "bf16"),
    "fp8": Format(1.0, 1.0, "fp8", ("fp8_block", "bf16")),
    "fp8_block": Format(1.0 + 4 / 128**2, 1.0 + 4 / 128, "fp8", ("fp8", "bf16")),
    "int8": Format(1.0, 1.0, "int8", ("fp8", "fp8_block", "bf16")),
    "int8_weight": Format(1.0, 2.0, "bf16", ("int4", "bf16")),
    "nvfp4": Format(0.5 + 1 / 16, 0.5 + 1 / 16, "fp4", ("mxfp4_fp8", "fp8_block", "fp8", "bf16")),
    "mxfp4": Format(0.5 + 1 / 32, 2.0, "bf16", ("mxfp4_fp8", "int4", "bf16")),
    "mxfp4_fp8": Format(0.5 + 1 / 32, 1.0 + 1 / 32, "fp8", ("nvfp4", "fp8_block", "fp8", "bf16")),
    "int4": Format(0.5 + 2 / 128, 2.0, "bf16", ("mxfp4", "bf16")),
}

ALIASES = {
    "bfloat16": "bf16",
    "fp16": "bf16",
    "float16": "bf16",
    "fp32": "bf16",
    "fp4": "nvfp4",
    "w4a16": "int4",
    "awq": "int4",
    "gptq": "int4",
    "int4_wo": "int4",
    "int8_wo": "int8_weight",
    "w8a8": "int8",
    "w8a16": "int8_weight",
    "w4a16_mxfp4": "mxfp4",
    "mxfp8": "fp8_block",
    "w4a8_mxfp4_mxfp8": "mxfp4_fp8",
    "sq": "int8",
}
"""Other spellings, the tables' source names among them; fp16 runs at the speed of bf16, fp32 is not measured."""


def canonical(fmt: str) -> str:
    """Table name of a format. Raises NoMeasurement for an unknown spelling.

    >>> canonical("bfloat16"), canonical("nvfp4")
    ('bf16', 'nvfp4')
    """
    name = ALIASES.get(fmt, fmt)
    if name not in FORMATS:
        raise NoMeasurement(f"format {fmt!r} is in no measured table; {nearest(fmt, FORMATS)}")
    return name


def kv_format(fmt: str) -> str:
    """Table name of a KV cache format: `bf16` or `fp8` (anything of at most one byte).

    >>> kv_format("fp8_e4m3"), kv_format("auto")
    ('fp8', 'bf16')
    """
    return "fp8" if fmt.startswith(("fp8", "int8", "fp4", "nvfp4", "int4")) else "bf16"


KV_BYTES = {"bf16": 2.0, "fp8": 1.0}
