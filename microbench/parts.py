"""The pieces of an expert layer that are no GEMM. `tokens` are tokens that enter the layer, each with top_k copies."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from microbench.cases import Case
from microbench.device import Device
from microbench.errors import Unsupported, WrongResult
from microbench.experts import by_expert
from microbench.precision import check_close
from microbench.routing import expert_ids
from microbench.work import Work

Tensor = torch.Tensor


def expert_parts(case: Case, device: Device) -> Work:
    """One part: `swiglu`, `permute`, `unpermute` or `router_topk` (softmax, top-k and renormalising)."""
    if case.text("fmt") != "bf16":
        raise Unsupported(f"parts are measured in bf16, not {case.text('fmt')}")
    tokens, top_k = case.number("tokens"), case.number("top_k")
    copied = float(tokens) * top_k
    device.require(16.0 * copied * max(case.number("hidden"), case.number("width")))
    return {"swiglu": _swiglu, "permute": _permute, "unpermute": _unpermute, "router_topk": _router}[case.text("part")](
        case, device
    )


def _swiglu(case: Case, device: Device) -> Work:
    rows, width = case.number("tokens") * case.number("top_k"), case.number("width")
    values = device.random(rows, 2 * width)

    def run() -> Tensor:
        gate, up = values.chunk(2, dim=-1)
        return F.silu(gate) * up

    gate, up = values.float().chunk(2, dim=-1)
    check_close(run(), gate / (1 + torch.exp(-gate)) * up)
    return Work(run, "torch eager", 0.0, 4.0 * rows * width, 2.0 * rows * width, is_captured=True)


def _routed(case: Case, device: Device) -> Tensor:
    ids = expert_ids("lognormal", case.number("tokens"), case.number("top_k"), case.number("num_experts"))
    return torch.from_numpy(ids).to(device.torch_device)


def _permute(case: Case, device: Device) -> Work:
    tokens, top_k, hidden = case.number("tokens"), case.number("top_k"), case.number("hidden")
    x, ids = device.random(tokens, hidden), _routed(case, device)

    def run() -> Tensor:
        order, _ = by_expert(ids, case.number("num_experts"))
        return x[order // top_k]

    expected = [token for _, token in sorted((expert, t) for t, row in enumerate(ids.tolist()) for expert in row)]
    if not torch.equal(run(), x[torch.tensor(expected, device=x.device)]):
        raise WrongResult("permuted rows are not in the order of their experts")
    copied = 2.0 * tokens * top_k * hidden
    return Work(run, "torch sort + index", 0.0, 2.0 * tokens * hidden, copied, is_captured=True)


def _unpermute(case: Case, device: Device) -> Work:
    tokens, top_k, hidden = case.number("tokens"), case.number("top_k"), case.number("hidden")
    ids = _routed(case, device)
    order, _ = by_expert(ids, case.number("num_experts"))
    rows = device.random(tokens * top_k, hidden)
    weights = torch.full((tokens, top_k), 1.0 / top_k, dtype=torch.bfloat16, device=device.torch_device)

    def run() -> Tensor:
        back = torch.empty_like(rows).index_copy_(0, order, rows).view(tokens, top_k, hidden)
        return (back * weights.unsqueeze(-1)).sum(dim=1)

    reference = torch.zeros(tokens, hidden, device=rows.device).index_add_(0, order // top_k, rows.float() / top_k)
    check_close(run(), reference)
    read = 2.0 * tokens * top_k * hidden
    return Work(run, "torch index_copy + sum", 0.0, read, 2.0 * tokens * hidden, is_captured=True)


def _router(case: Case, device: Device) -> Work:
    tokens, num_experts, top_k = case.number("tokens"), case.number("num_experts"), case.number("top_k")
    logits = device.random(tokens, num_experts, dtype=torch.float32)

    def run() -> Tensor:
        weights, chosen = torch.topk(torch.softmax(logits, dim=-1), top_k, dim=-1)
        return torch.stack((weights / weights.sum(dim=-1, keepdim=True), chosen.float()))

    best = torch.sort(logits, dim=-1, descending=True)[0][:, :top_k]
    check_close(run()[0], torch.softmax(best, dim=-1))
    read = 4.0 * tokens * num_experts
    return Work(run, "torch softmax + topk", 0.0, read, 8.0 * tokens * top_k, is_captured=True)
