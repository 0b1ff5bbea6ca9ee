"""Attention through torch.nn.functional.scaled_dot_product_attention, by the fastest backend of the device.

Sizes: batch B, heads N, KV heads G, head dimension D, context L. MLA (DeepSeek-V3): latent 512, rope 64; expanded
query-key 192 and value 128.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from microbench.cases import Case
from microbench.device import Device
from microbench.errors import Unsupported
from microbench.precision import check_close
from microbench.timing import fastest
from microbench.work import Work

Tensor = torch.Tensor
Attend = Callable[[], Tensor]

_FUSED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_LATENT, _ROPE, _QK, _VALUE = 512, 64, 192, 128
_CHECKED_QUERIES = 8


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool) -> Tensor:
    """Plain fp32 softmax attention of the last queries: query [B, N, Q, D], key and value [B, G, L, D]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.float().repeat_interleave(repeats, dim=1) for tensor in (key, value))
    few = query[:, :, -_CHECKED_QUERIES:].float()
    scores = few @ key.transpose(-2, -1) * scale
    if is_causal:
        last = torch.arange(key.shape[2] - few.shape[2], key.shape[2], device=key.device)
        scores = scores.masked_fill(torch.arange(key.shape[2], device=key.device) > last[:, None], float("-inf"))
    return torch.softmax(scores, dim=-1) @ value


def _bf16_cache(case: Case) -> None:
    if case.text("kv_fmt") != "bf16":
        raise Unsupported(f"torch attention reads a bf16 cache, not {case.text('kv_fmt')}")


def prefill_attention(case: Case, device: Device) -> Work:
    """Causal attention of B prompts of L tokens from an empty cache."""
    _bf16_cache(case)
    length, window = case.number("length"), case.number("window")
    if 0 < window < length:
        raise Unsupported("torch has no sliding-window kernel that skips what the window hides")
    batch, heads, groups, dim = _sizes(case)
    device.require(4.0 * batch * length * dim * (2 * heads + 2 * groups) + 8.0 * length * heads * dim)
    query = device.random(batch, heads, length, dim, seed=1)
    key, value = (device.random(batch, groups, length, dim, seed=seed) for seed in (2, 3))
    pairs = batch * length * (length + 1) / 2
    read, written = 2.0 * batch * length * dim * (heads + 2 * groups), 2.0 * batch * length * dim * heads
    return _best(device, query, key, value, dim**-0.5, True, 4.0 * pairs * heads * dim, read, written)


def decode_attention(case: Case, device: Device) -> Work:
    """One new token each of B sequences with L cached tokens; a window reads its last tokens only."""
    _bf16_cache(case)
    length, window = case.number("length"), case.number("window")
    length = min(length, window) if window else length
    batch, heads, groups, dim = _sizes(case)
    device.require(4.0 * batch * length * dim * 2 * groups + 8.0 * length * heads * dim)
    query = device.random(batch, heads, 1, dim, seed=1)
    key, value = (device.random(batch, groups, length, dim, seed=seed) for seed in (2, 3))
    flop, read = 4.0 * batch * length * heads * dim, 4.0 * batch * length * groups * dim
    return _best(device, query, key, value, dim**-0.5, False, flop, read, 2.0 * batch * heads * dim)


def mla_prefill(case: Case, device: Device) -> Work:
    """Expanded MLA kernel (no projections): query-key 192, value 128, causal from an empty cache."""
    _bf16_cache(case)
    batch, length, heads = case.number("batch"), case.number("length"), case.number("num_heads")
    device.require(4.0 * batch * length * heads * (2 * _QK + 2 * _VALUE) + 16.0 * length * heads * _QK)
    query, key = (device.random(batch, heads, length, _QK, seed=seed) for seed in (1, 2))
    value = device.random(batch, heads, length, _VALUE, seed=3)
    pairs = batch * length * (length + 1) / 2
    read, written = 2.0 * batch * length * heads * (2 * _QK + _VALUE), 2.0 * batch * length * heads * _VALUE
    flop = 2.0 * pairs * heads * (_QK + _VALUE)
    return _best(device, query, key, value, _QK**-0.5, True, flop, read, written)


def mla_decode(case: Case, device: Device) -> Work:
    """Absorbed MLA kernel (no projections): N queries of one token against a cache row of 512 + 64 values.

    The heads of a token take the place of the query positions, so the shared cache is one KV head.
    """
    _bf16_cache(case)
    batch, length, heads = case.number("batch"), case.number("length"), case.number("num_heads")
    row = _LATENT + _ROPE
    device.require(8.0 * batch * length * row + 16.0 * batch * heads * length)
    query, cache = device.random(batch, 1, heads, row, seed=1), device.random(batch, 1, length, row, seed=2)
    flop = 2.0 * batch * length * heads * (row + _LATENT)
    read = 2.0 * batch * length * row + 2.0 * batch * heads * row
    written = 2.0 * batch * heads * _LATENT
    return _best(device, query, cache, cache[..., :_LATENT], _QK**-0.5, False, flop, read, written)


def _sizes(case: Case) -> tuple[int, int, int, int]:
    """Batch, heads, KV heads, head dimension."""
    return case.number("batch"), case.number("num_heads"), case.number("num_kv_heads"), case.number("head_dim")


def _best(
    device: Device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    is_causal: bool,
    flop: float,
    read: float,
    written: float,
) -> Work:
    """Fastest fused backend; torch's unfused one only where no fused kernel takes the shape."""
    exact = reference(query[:1], key[:1], value[:1], scale, is_causal)
    works = []
    for label, attend in _candidates(device, query, key, value, scale, is_causal).items():
        check_close(attend()[:1, :, -_CHECKED_QUERIES:], exact)
        works.append(Work(attend, f"torch sdpa {label}", flop, read, written))
    if not works:
        raise Unsupported("no backend of scaled_dot_product_attention takes this shape")
    return fastest(works, device)


def _candidates(
    device: Device, query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool
) -> dict[str, Attend]:
    def call(backend: SDPBackend) -> Attend:
        grouped = query.shape[1] != key.shape[1]

        def attend() -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(
                    query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped
                )

        return attend

    works = {label: call(backend) for label, backend in _FUSED.items()}
    works = {label: attend for label, attend in works.items() if _runs(attend)}
    if works:
        return works
    device.require(8.0 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2])
    unfused = call(SDPBackend.MATH)
    return {"math": unfused} if _runs(unfused) else {}


def _runs(attend: Attend) -> bool:
    """True when the backend takes the shape; torch explains a refusal in warnings, which are not wanted here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            attend()
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError:
            return False
    return True
