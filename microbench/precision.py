"""fp8 quantisation, and whether a result is right."""

from __future__ import annotations

from collections.abc import Callable

import torch

from microbench.device import Device
from microbench.errors import Unsupported, WrongResult

Tensor = torch.Tensor
TOLERANCE = 0.02
"""Largest |out - reference| / |reference|: bf16 results lie between 1e-3 and 1e-2, NaN never passes."""


def fp8_dtype(device: Device) -> torch.dtype:
    """e4m3 as this GPU multiplies it: the `fnuz` variant on MI300 (gfx942), else `fn`.

    Raises Unsupported before compute capability 8.9 (NVIDIA) and 9.4 (AMD).
    """
    if not device.is_cuda:
        return torch.float8_e4m3fn
    facts = torch.cuda.get_device_properties(device.torch_device)
    if torch.version.hip is not None:
        architecture = str(getattr(facts, "gcnArchName", ""))
        return torch.float8_e4m3fnuz if architecture.startswith("gfx94") else torch.float8_e4m3fn
    if (facts.major, facts.minor) < (8, 9):
        raise Unsupported(f"fp8 needs compute capability 8.9, this GPU has {facts.major}.{facts.minor}")
    return torch.float8_e4m3fn


def quantise_tensor(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp8 values and one fp32 scale such that values = fp8 x scale."""
    scale = values.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (values / scale).to(dtype), scale


def quantise_rows(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp8 values and one fp32 scale per last-dimension row. `values`: [..., rows, columns], scale: [..., rows]."""
    scale = values.abs().amax(dim=-1).float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (values / scale.unsqueeze(-1)).to(dtype), scale


def check_close(result: Tensor, reference: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise WrongResult unless |result - reference| <= tolerance x |reference| (Frobenius norms, fp32)."""
    exact = reference.float()
    error = float((result.float() - exact).norm() / exact.norm().clamp(min=1e-30))
    if not error <= tolerance:
        raise WrongResult(f"relative error {error:.3g} against a plain reference, at most {tolerance:g} is accepted")


def supported(call: Callable[[], Tensor], what: str) -> Tensor:
    """Result of `call`; Unsupported with torch's own words when the device or this torch refuses the operation."""
    try:
        return call()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise Unsupported(f"{what}: {str(error).splitlines()[0][:160]}") from error
