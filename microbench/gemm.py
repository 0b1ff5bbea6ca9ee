"""Dense matrix products: out[tokens, rows] = x[tokens, cols] times weight[rows, cols] transposed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from microbench.cases import Case
from microbench.device import Device
from microbench.errors import Unsupported
from microbench.precision import check_close, fp8_dtype, quantise_tensor, supported
from microbench.work import Work

Tensor = torch.Tensor
_CHECKED_TOKENS = 16


def gemm(case: Case, device: Device) -> Work:
    """A projection in bf16 through torch.nn.functional.linear or in fp8 through torch._scaled_mm.

    fp8 has one scale per tensor and its input is quantised before the clock starts.
    """
    tokens, rows, cols = case.number("tokens"), case.number("rows"), case.number("cols")
    device.require(10.0 * (tokens * cols + rows * cols + tokens * rows))
    x = device.random(tokens, cols, seed=1)
    weight = device.random(rows, cols, scale=cols**-0.5, seed=2)
    flop = 2.0 * tokens * rows * cols
    if case.text("fmt") == "bf16":
        check_close(F.linear(x[:_CHECKED_TOKENS], weight), x[:_CHECKED_TOKENS].float() @ weight.float().t())
        read, written = 2.0 * (tokens + rows) * cols, 2.0 * tokens * rows
        return Work(lambda: F.linear(x, weight), "torch linear", flop, read, written)
    if case.text("fmt") == "fp8":
        return _fp8(x, weight, device, flop)
    raise Unsupported(f"torch measures bf16 and fp8, not {case.text('fmt')}")


def _fp8(x: Tensor, weight: Tensor, device: Device, flop: float) -> Work:
    dtype = fp8_dtype(device)
    (x8, x_scale), (weight8, weight_scale) = quantise_tensor(x, dtype), quantise_tensor(weight, dtype)
    transposed = weight8.t()

    def run() -> Tensor:
        return torch._scaled_mm(
            x8, transposed, scale_a=x_scale, scale_b=weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    out = supported(run, "torch._scaled_mm")
    few = x8[:_CHECKED_TOKENS].float() * x_scale
    check_close(out[:_CHECKED_TOKENS], few @ (weight8.float() * weight_scale).t())
    library = "torch _scaled_mm (per tensor; quantise outside)"
    return Work(run, library, flop, float(x8.numel() + weight8.numel()), 2.0 * out.numel(), "fp8")
