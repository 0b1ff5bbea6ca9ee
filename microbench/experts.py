"""The fused expert layer of one rank: permute, grouped GEMM, SwiGLU, grouped GEMM, weighted unpermute.

Shapes: tokens T, top_k K, assignments A = T x K, local experts E, hidden H, width W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from microbench.cases import Case
from microbench.device import Device
from microbench.errors import Unsupported
from microbench.precision import TOLERANCE, check_close, fp8_dtype, quantise_rows, supported
from microbench.routing import expert_ids
from microbench.timing import fastest
from microbench.work import Work

Tensor = torch.Tensor
Grouped = Callable[[Tensor, Tensor], Tensor]
Pointwise = Callable[[Tensor], Tensor]
Quantise = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]
_CHECKED_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Experts:
    """Weights of the local experts: `up` [E, gates x W, H] (gate and up stacked when gated), `down` [E, H, W]."""

    up: Tensor
    down: Tensor
    is_gated: bool

    def activate(self, values: Tensor) -> Tensor:
        """SwiGLU of [rows, 2 W], or SiLU of [rows, W] for experts without a gate; result [rows, W]."""
        return swiglu(values) if self.is_gated else F.silu(values)

    def one(self, expert: int, row: Tensor) -> Tensor:
        """Plain fp32 reference of one expert: [rows, H] to [rows, H]."""
        return self.activate(row.float() @ self.up[expert].float().t()) @ self.down[expert].float().t()


def swiglu(values: Tensor) -> Tensor:
    """silu(gate) x up of [rows, 2 W]; result [rows, W]."""
    gate, up = values.chunk(2, dim=-1)
    return F.silu(gate) * up


def make_experts(device: Device, num: int, hidden: int, width: int, num_matrices: int = 3, first: int = 0) -> Experts:
    """Random experts `first` ... `first + num - 1`; an expert's weights depend on its number only."""
    gates = num_matrices - 1
    up = torch.empty(num, gates * width, hidden, dtype=torch.bfloat16, device=device.torch_device)
    down = torch.empty(num, hidden, width, dtype=torch.bfloat16, device=device.torch_device)
    for index in range(num):
        up[index] = device.random(gates * width, hidden, scale=hidden**-0.5, seed=2 * (first + index) + 11)
        down[index] = device.random(hidden, width, scale=width**-0.5, seed=2 * (first + index) + 12)
    return Experts(up, down, num_matrices == 3)


def by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Stable order of assignments [A] by expert, and the end of each expert's rows [E] (int32)."""
    ordered, order = torch.sort(ids.reshape(-1), stable=True)
    numbers = torch.arange(num_experts, device=ids.device, dtype=ordered.dtype)
    return order, torch.searchsorted(ordered, numbers, right=True).to(torch.int32)


def grouped_rows(experts: Experts, rows: Tensor, ends: Tensor, activate: Pointwise | None = None) -> Tensor:
    """Rows [A, H] sorted by expert through `torch.nn.functional.grouped_mm`, result [A, H]."""
    middle = F.grouped_mm(rows, experts.up.transpose(-2, -1), offs=ends)
    return F.grouped_mm((activate or experts.activate)(middle), experts.down.transpose(-2, -1), offs=ends)


def looped_rows(experts: Experts, rows: Tensor, ends: Tensor) -> Tensor:
    """The same as `grouped_rows`, one expert after another; it must know the row counts on the host."""
    out, start = torch.empty_like(rows), 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            middle = experts.activate(F.linear(rows[start:end], experts.up[expert]))
            out[start:end] = F.linear(middle, experts.down[expert])
        start = end
    return out


def layer(x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, multiply: Grouped) -> Tensor:
    """The whole layer: x [T, H], ids and weights [T, K]; result [T, H]. `multiply` maps (rows, ends) to rows."""
    order, ends = by_expert(ids, num_experts)
    out = multiply(x[order // ids.shape[1]], ends)
    back = torch.empty_like(out).index_copy_(0, order, out).view(*ids.shape, x.shape[1])
    return (back * weights.unsqueeze(-1)).sum(dim=1)


def expert_gemm(case: Case, device: Device) -> Work:
    """The fused layer over `assignments` of a distribution, by the fastest path this torch has.

    A rank that holds all experts is handed assignments / top_k tokens; under expert parallelism every assignment is a
    row of its own, as an exchange without deduplication delivers it.
    """
    hidden, width, local = case.number("hidden"), case.number("width"), case.number("local_experts")
    matrices, assignments = case.number("num_matrices"), case.number("assignments")
    holds_all = local == case.number("num_experts")
    top_k = case.number("top_k") if holds_all else 1
    values = float(local) * matrices * width * hidden
    device.require((2.0 if case.text("fmt") == "bf16" else 3.3) * values + 16.0 * assignments * (hidden + 2 * width))
    if case.text("fmt") not in ("bf16", "fp8"):
        raise Unsupported(f"torch measures bf16 and fp8, not {case.text('fmt')}")
    tokens = max(1, assignments // top_k)
    experts = make_experts(device, local, hidden, width, matrices)
    x = device.random(tokens, hidden, seed=3)
    ids = torch.from_numpy(expert_ids(case.text("distribution"), tokens, top_k, local)).to(device.torch_device)
    weights = torch.full(ids.shape, 1.0 / top_k, dtype=torch.bfloat16, device=device.torch_device)
    paths = _bf16_paths(experts, device) if case.text("fmt") == "bf16" else _fp8_paths(experts, device)
    active = int(torch.unique(ids).numel())
    width_bytes = 2.0 if case.text("fmt") == "bf16" else 1.0
    read = active * matrices * width * hidden * width_bytes + 2.0 * x.numel()
    flop = 2.0 * tokens * top_k * matrices * width * hidden
    works, refused = [], Unsupported("no path")
    for library, multiply in paths.items():
        try:
            _check(x, ids, weights, experts, multiply, TOLERANCE if case.text("fmt") == "bf16" else _FP8_TOLERANCE)
        except Unsupported as error:
            refused = error
            continue
        run = _bind(x, ids, weights, local, multiply)
        works.append(Work(run, library, flop, read, 2.0 * x.numel(), case.text("fmt"), is_captured=library != "loop"))
    if not works:
        raise refused
    return fastest(works, device)


def _bind(x: Tensor, ids: Tensor, weights: Tensor, num_experts: int, multiply: Grouped) -> Callable[[], Tensor]:
    return lambda: layer(x, ids, weights, num_experts, multiply)


def _check(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, multiply: Grouped, tolerance: float) -> None:
    """Compare some tokens of the layer with the plain sum over their experts."""
    num_experts = experts.up.shape[0]
    out = supported(lambda: layer(x, ids, weights, num_experts, multiply), "grouped GEMM")
    tokens = sorted({round(place) for place in torch.linspace(0, len(x) - 1, _CHECKED_TOKENS).tolist()})
    reference = torch.zeros(len(tokens), x.shape[1], device=x.device)
    for place, token in enumerate(tokens):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            reference[place] += weight * experts.one(expert, x[token : token + 1])[0]
    check_close(out[tokens], reference, tolerance)


_FP8_TOLERANCE = 0.08
"""Inputs and the activation are rounded to 3 mantissa bits, which the reference does not do: about 0.026 each."""


def _compiles(device: Device) -> bool:
    """True where torch.compile writes Triton kernels."""
    return device.is_cuda and find_spec("triton") is not None


@lru_cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for all shapes, so that a run of many shapes does not spend its time compiling."""
    return torch.compile(function, dynamic=True)


def _bf16_paths(experts: Experts, device: Device) -> dict[str, Grouped]:
    if not hasattr(F, "grouped_mm"):
        return {"loop": lambda rows, ends: looped_rows(experts, rows, ends)}
    paths: dict[str, Grouped] = {"torch grouped_mm": lambda rows, ends: grouped_rows(experts, rows, ends)}
    if _compiles(device):
        activate = _compiled(swiglu if experts.is_gated else F.silu)
        paths["torch grouped_mm; compiled activation"] = lambda rows, ends: grouped_rows(experts, rows, ends, activate)
    return paths


def _quantised(weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp8 weights [E, N, K] and scales [E, N], one expert at a time to save memory."""
    values = torch.empty_like(weights, dtype=dtype)
    scales = torch.empty(weights.shape[:2], dtype=torch.float32, device=weights.device)
    for expert, weight in enumerate(weights):
        values[expert], scales[expert] = quantise_rows(weight, dtype)
    return values, scales


def _fp8_paths(experts: Experts, device: Device) -> dict[str, Grouped]:
    """fp8 with one scale per row; rows are quantised inside, the weights before the clock starts."""
    if not hasattr(torch, "_scaled_grouped_mm"):
        raise Unsupported(f"torch {torch.__version__} has no _scaled_grouped_mm")
    dtype = fp8_dtype(device)
    (up8, up_scale), (down8, down_scale) = _quantised(experts.up, dtype), _quantised(experts.down, dtype)

    def product(rows: tuple[Tensor, Tensor], weight: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
        rows8, row_scale = rows
        return torch._scaled_grouped_mm(
            rows8, weight.transpose(-2, -1), row_scale, scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def path(quantise: Quantise, activate_quantise: Quantise) -> Grouped:
        def multiply(rows: Tensor, ends: Tensor) -> Tensor:
            middle = product(quantise(rows, dtype), up8, up_scale, ends)
            return product(activate_quantise(middle, dtype), down8, down_scale, ends)

        return multiply

    activated = _swiglu_quantised if experts.is_gated else _silu_quantised
    paths = {"torch scaled_grouped_mm (per row; eager quantise inside)": path(quantise_rows, activated)}
    if _compiles(device):
        compiled = path(_compiled(quantise_rows), _compiled(activated))
        paths["torch scaled_grouped_mm (per row; compiled quantise inside)"] = compiled
    return paths


def _swiglu_quantised(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return quantise_rows(swiglu(values), dtype)


def _silu_quantised(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return quantise_rows(F.silu(values), dtype)
