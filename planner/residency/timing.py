"""Seconds of the experts of one layer when not all of them are in HBM (handbook serving 5B.2).

All quantities are arrays of one shape (steps, or points of a grid); what is exposed adds to what the GPU computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.errors import InputError
from planner.residency.spread import Spread
from planner.residency.tiers import Cpu, Tiers
from planner.residency.traces import Floats


@dataclass(frozen=True, slots=True)
class LayerWork:
    """What one layer has to do in a step.

    `active` distinct experts are needed, and `cold_assigned` token-expert pairs of `tokens` tokens need those outside
    HBM; the GPUs take `gpu_s` for all of them when all are resident, and `rest_s` for the rest of the layer without
    attention kernels, which depend on the context. `expert_bytes` is one whole expert, `expert_flop` what it computes
    per token, `hidden_bytes` one token's activations. Steps that read prompts are `is_prefill`.
    """

    active: Floats
    cold_assigned: Floats
    tokens: Floats
    gpu_s: Floats
    rest_s: Floats
    expert_bytes: float
    expert_flop: float
    hidden_bytes: float
    is_prefill: bool = False


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Expert part of one layer: `total_s`, of which `exposed_s` beyond the GPU's own work.

    `miss_bytes` are fetched from outside HBM, wrong guesses included; experts of `cpu_bytes` are computed where they
    lie. `hit_rate` of the needed experts are in HBM. `link_s` is how long the slowest of host link and drives is busy,
    `cpu_s` how long the CPU computes, `handover_s` what passing work to the CPU and back costs.
    """

    total_s: Floats
    exposed_s: Floats
    miss_bytes: Floats
    hit_rate: Floats
    link_s: Floats
    cpu_s: Floats
    handover_s: Floats
    cpu_bytes: Floats


def all_resident(work: LayerWork) -> LayerTime:
    """Everything is in HBM."""
    zero = np.zeros_like(work.gpu_s)
    return LayerTime(work.gpu_s, zero, zero, np.ones_like(work.gpu_s), zero, zero, zero, zero)


def demand(work: LayerWork, tiers: Tiers, shares: Floats) -> LayerTime:
    """Missing experts are fetched when the router has spoken: t = hits + max(misses computed, misses fetched)."""
    hit_rate, fetch_s = float(shares[0]), _fetch_s(work, tiers, shares)
    exposed = np.maximum(0.0, fetch_s - work.gpu_s * (1 - hit_rate))
    return _fetched(work, exposed, hit_rate, fetch_s, work.active * (1 - hit_rate) * work.expert_bytes)


def stream(work: LayerWork, tiers: Tiers, spread: Spread) -> LayerTime:
    """Whole layers flow through a double buffer every step: t = max(compute, bytes / rate), over the whole layer."""
    slices = [count / spread.num_experts for count in spread.behind]
    whole = work.expert_bytes * spread.num_experts
    fetch_s = np.zeros_like(work.gpu_s)
    for tier, share in zip(tiers.backing, slices, strict=True):
        fetch_s = fetch_s + share * (tier.latency_s + whole / tiers.num_gpus / tier.bytes_per_s)
    exposed = np.maximum(0.0, fetch_s - work.gpu_s - work.rest_s)
    hit_rate = spread.resident / spread.num_experts
    return _fetched(work, exposed, hit_rate, fetch_s, np.full_like(work.gpu_s, whole * sum(slices)))


def prefetch(work: LayerWork, tiers: Tiers, shares: Floats, accuracy: float, lookahead: int) -> LayerTime:
    """A share `accuracy` of the misses is foreseen `lookahead` layers ahead; the wrong guesses are fetched as well.

    Foreseen transfers hide behind the compute of the layers in between, the others are exposed. Misses vary from
    layer to layer (binomial), so the part of a window's transfers that overruns its compute is the mean of a normal
    variable cut at zero, approximated by (d + sqrt(d^2 + 2 s^2 / pi)) / 2: exact far from and at d = 0.
    """
    if lookahead < 1 or not 0.0 <= accuracy <= 1.0:
        raise InputError(f"prefetch with accuracy {accuracy:g} and look-ahead {lookahead}: 0 to 1, and 1 layer or more")
    hit_rate, fetch_s = float(shares[0]), _fetch_s(work, tiers, shares)
    misses = np.maximum(work.active * (1 - hit_rate), 1e-12)
    spread_s = fetch_s / misses * np.sqrt(misses * hit_rate)
    over = fetch_s - work.gpu_s - work.rest_s
    late = (over + np.sqrt(over**2 + 2 / np.pi * spread_s**2 / lookahead)) / 2
    exposed = (1 - accuracy) * fetch_s + np.maximum(late, 0.0)
    return _fetched(work, exposed, hit_rate, fetch_s * (2 - accuracy), misses * (2 - accuracy) * work.expert_bytes)


def cpu(
    work: LayerWork, tiers: Tiers, shares: Floats, copies: int, handover_s: float, fetch_from_tokens: int
) -> LayerTime:
    """Cold experts are computed where they lie, beside the GPU: t = max(GPU's part, CPU's part + hand-over).

    One expert takes max(tokens x FLOP / rate, bytes / memory rate). Prompts in chunks of `fetch_from_tokens` tokens or
    more fetch the experts where that is faster, smaller ones and decode steps never do. The hand-over includes the
    activations there and back. With fewer `copies` than sockets only one socket's memory serves. Raises InputError
    without DRAM.
    """
    misses, cpu_s = _misses_on_cpu(work, tiers, shares, copies, _cpu_of(tiers))
    passed_s = np.minimum(misses, 1.0) * (handover_s + _passed_s(work, tiers))
    beside = np.maximum(work.gpu_s * float(shares[0]), cpu_s + passed_s)
    fetched = demand(work, tiers, shares)
    stays = np.logical_or(not work.is_prefill, work.tokens < fetch_from_tokens) | (beside < fetched.total_s)
    return _either(stays, work, beside, cpu_s, passed_s, fetched)


def cpu_or_fetch(work: LayerWork, tiers: Tiers, shares: Floats, copies: int, handover_s: float) -> LayerTime:
    """Each cold expert is computed by the CPU or fetched, whichever is faster; one after the other (Fiddler).

    All cold experts of a layer are taken to have the same tokens, so that they decide alike. Otherwise as `cpu`.
    """
    misses, cpu_s = _misses_on_cpu(work, tiers, shares, copies, _cpu_of(tiers))
    passed_s = np.minimum(misses, 1.0) * (handover_s + _passed_s(work, tiers))
    total = work.gpu_s * float(shares[0]) + cpu_s + passed_s
    fetched = demand(work, tiers, shares)
    return _either(total < fetched.total_s, work, total, cpu_s, passed_s, fetched)


def cpu_layers(work: LayerWork, tiers: Tiers, shares: Floats, fetch_from_tokens: int) -> LayerTime:
    """All experts of some layers are on the CPU, the mean over layers; the GPU waits meanwhile (llama.cpp).

    From `fetch_from_tokens` tokens on their weights are copied to the GPU instead. One copy of the experts serves, at
    the rate of llama.cpp. Otherwise as `cpu`.
    """
    host = _cpu_of(tiers)
    llama = replace(host, bytes_per_s=host.llama_bytes_per_s)
    _, cpu_s = _misses_on_cpu(work, tiers, shares, 1, llama)
    passed_s = (1 - float(shares[0])) * _passed_s(work, tiers)
    total = work.gpu_s * float(shares[0]) + cpu_s + passed_s
    stays = work.tokens < fetch_from_tokens
    return _either(stays, work, total, cpu_s, passed_s, demand(work, tiers, shares))


def _cpu_of(tiers: Tiers) -> Cpu:
    if tiers.cpu is None:
        raise InputError("CPU experts need host DRAM for experts, and there is none: give --dram")
    return tiers.cpu


def _misses_on_cpu(work: LayerWork, tiers: Tiers, shares: Floats, copies: int, host: Cpu) -> tuple[Floats, Floats]:
    """Missing experts of a layer and the seconds the CPU takes for them; what lies on a drive is read from it first."""
    misses = work.active * (1 - float(shares[0]))
    sockets = host.num_sockets if copies < host.num_sockets else 1
    read_s = work.expert_bytes * sockets / host.bytes_per_s
    missing = float(shares[1:].sum())
    for tier, share in zip(tiers.backing, shares[1:], strict=True):
        if tier.name == "nvme" and missing > 0:
            read_s += float(share) / missing * work.expert_bytes / tier.bytes_per_s / tiers.num_gpus
    flop_s = work.cold_assigned * work.expert_flop * sockets / host.flop_per_s
    return misses, np.maximum(flop_s, misses * read_s)


def _passed_s(work: LayerWork, tiers: Tiers) -> Floats:
    """Activations of all tokens to the host and back."""
    return 2 * work.tokens * work.hidden_bytes / max(tier.bytes_per_s for tier in tiers.backing)


def _either(
    on_cpu: NDArray[np.bool_], work: LayerWork, total: Floats, cpu_s: Floats, passed_s: Floats, fetched: LayerTime
) -> LayerTime:
    """The CPU's times where `on_cpu`, those of fetching elsewhere."""
    misses = work.active * (1 - fetched.hit_rate)
    return LayerTime(
        total_s=np.where(on_cpu, total, fetched.total_s),
        exposed_s=np.where(on_cpu, np.maximum(0.0, total - work.gpu_s * fetched.hit_rate), fetched.exposed_s),
        miss_bytes=np.where(on_cpu, 0.0, fetched.miss_bytes),
        hit_rate=fetched.hit_rate,
        link_s=np.where(on_cpu, 0.0, fetched.link_s),
        cpu_s=np.where(on_cpu, cpu_s, 0.0),
        handover_s=np.where(on_cpu, passed_s, 0.0),
        cpu_bytes=np.where(on_cpu, misses * work.expert_bytes, 0.0),
    )


def _fetch_s(work: LayerWork, tiers: Tiers, shares: Floats) -> Floats:
    """Seconds the missing experts take on their way, one after the other; every GPU fetches its slice."""
    total = np.zeros_like(work.gpu_s)
    for tier, share in zip(tiers.backing, shares[1:], strict=True):
        total = total + work.active * share * (tier.latency_s + work.expert_bytes / tiers.num_gpus / tier.bytes_per_s)
    return total


def _fetched(work: LayerWork, exposed: Floats, hit_rate: float, link_s: Floats, miss_bytes: Floats) -> LayerTime:
    zero = np.zeros_like(work.gpu_s)
    return LayerTime(work.gpu_s + exposed, exposed, miss_bytes, zero + hit_rate, link_s, zero, zero, zero)
