"""RMSNorm and the sampling of the next token."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from microbench.cases import Case
from microbench.device import Device
from microbench.errors import WrongResult
from microbench.precision import check_close
from microbench.work import Work

Tensor = torch.Tensor
_EPSILON = 1e-6


def norm(case: Case, device: Device) -> Work:
    """RMSNorm of [tokens, hidden] in bf16."""
    tokens, hidden = case.number("tokens"), case.number("hidden")
    device.require(16.0 * tokens * hidden)
    x, weight = device.random(tokens, hidden), device.random(hidden, seed=1)
    exact = x.float() * torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + _EPSILON) * weight.float()
    check_close(F.rms_norm(x, (hidden,), weight, _EPSILON), exact)
    size = 2.0 * tokens * hidden
    return Work(lambda: F.rms_norm(x, (hidden,), weight, _EPSILON), "torch rms_norm", 0.0, size, size, is_captured=True)


def head(case: Case, device: Device) -> Work:
    """Sampling of one token per row of [tokens, vocab] fp32 logits: softmax, then argmax of p / Exp(1) noise."""
    tokens, vocab = case.number("tokens"), case.number("vocab")
    device.require(20.0 * tokens * vocab)
    logits = device.random(tokens, vocab, dtype=torch.float32)
    noise = torch.empty_like(logits)

    def run() -> Tensor:
        return torch.softmax(logits, dim=-1).div_(noise.exponential_()).argmax(dim=-1)

    sharp = torch.where(logits == logits.amax(dim=-1, keepdim=True), 1e4, logits)
    chosen = torch.softmax(sharp, dim=-1).div_(noise.exponential_()).argmax(dim=-1)
    if not torch.equal(chosen, logits.argmax(dim=-1)) or not bool((run() < vocab).all()):
        raise WrongResult("sampling from a certain distribution does not return its only token")
    read = 4.0 * tokens * vocab
    return Work(run, "torch softmax + exponential + argmax", 0.0, read, 8.0 * tokens, is_captured=True)
