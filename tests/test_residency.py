"""Tiers, what lies where, and the seconds of every policy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import DoesNotFit, InputError
from planner.hardware import system
from planner.residency import (
    POLICIES,
    LayerTime,
    LayerWork,
    Residency,
    Spread,
    Tier,
    Tiers,
    layer_seconds,
    spread,
    tiers_of,
)
from planner.residency.hosts import DRAM_EFFICIENCY, host, host_for, hosts
from planner.residency.policies import LLAMA_FETCH_TOKENS
from planner.residency.tiers import Cpu
from planner.residency.timing import prefetch

EXPERT = 10e6
LINEAR = tuple(np.linspace(0.0, 1.0, 65).tolist())


def work(active: float = 8.0, tokens: float = 1.0, gpu_s: float = 1e-4, rest_s: float = 2e-4) -> LayerWork:
    a, n, t, gpu, rest = (np.full(2, value) for value in (active, 8.0 * tokens, tokens, gpu_s, rest_s))
    return LayerWork(a, n, t, gpu, rest, expert_bytes=EXPERT, expert_flop=4e7, hidden_bytes=8192.0)


def machine(dram: float = 1e12, rate: float = 25e9, nvme: float = 0.0, hbm: float = 16 * EXPERT) -> Tiers:
    backing = (Tier("dram", rate, 15e-6, dram), *((Tier("nvme", 5e9, 15e-6, nvme),) if nvme else ()))
    return Tiers(hbm, backing, Cpu(47e9, 1.7e12, 1))


def seconds(residency: Residency, tiers: Tiers, task: LayerWork) -> LayerTime:
    held = residency.spread(tiers, EXPERT, 64)
    return layer_seconds(residency, tiers, held, LINEAR, task)


# --- tiers ---


def test_rates_of_real_machines() -> None:
    small = tiers_of(system("rtx-4090"), 10e9, dram_bytes=128e9, nvme_bytes=1e12)
    assert [tier.name for tier in small.backing] == ["dram", "nvme"]
    assert small.backing[0].bytes_per_s == pytest.approx(25e9)
    assert small.backing[1].bytes_per_s == pytest.approx(5e9)
    assert small.cpu is not None and small.cpu.bytes_per_s == pytest.approx(0.53 * 89.6e9)
    fast = tiers_of(system("rtx-5090"), 10e9, dram_bytes=128e9)
    assert fast.backing[0].bytes_per_s == pytest.approx(55e9)
    assert fast.backing[0].bytes_per_s == pytest.approx(56.3e9, rel=0.03)  # nvbandwidth on 8 x RTX 5090
    chip = tiers_of(system("gb200-nvl72"), 10e9, dram_bytes=480e9)
    assert chip.backing[0].bytes_per_s == pytest.approx(2.007e11, rel=0.001)  # the measured link needs no share


def test_shared_roots_pageable_memory_and_peers() -> None:
    rtx = system("rtx-4090")
    alone = tiers_of(rtx, 1e9, dram_bytes=5e11).backing[0].bytes_per_s
    assert tiers_of(rtx, 1e9, num_gpus=4, dram_bytes=5e11, gpus_per_root=4).backing[0].bytes_per_s == alone / 4
    assert tiers_of(rtx, 1e9, dram_bytes=5e11, is_pinned=False).backing[0].bytes_per_s == alone / 2.1
    both = tiers_of(system("h100-sxm"), 1e9, dram_bytes=5e11, peer_bytes=4e10)
    assert [tier.name for tier in both.backing] == ["peer", "dram"]
    assert both.backing[0].bytes_per_s > 5 * both.backing[1].bytes_per_s
    # Eight links of 25 GB/s draw on one desktop's 89.6 GB/s.
    assert tiers_of(rtx, 1e9, num_gpus=8, dram_bytes=1e11).backing[0].bytes_per_s == pytest.approx(89.6e9 / 8)


def test_unified_memory_has_nothing_behind_it() -> None:
    spark = tiers_of(system("dgx-spark"), 50e9, dram_bytes=128e9)
    assert spark.backing == () and spark.cpu is None and not spark.has_host
    with pytest.raises(DoesNotFit, match="nothing") as caught:
        spread(spark, 1e9, 64)
    assert caught.value.remedies[0] == "more GPUs"


def test_hosts_carry_sources_and_grow() -> None:
    assert [known.dram_max_bytes for known in hosts()] == sorted(known.dram_max_bytes for known in hosts())
    for known in hosts():
        assert all(len(source) > 8 for _, source in known.sources)
        assert known.expert_bytes_per_s == DRAM_EFFICIENCY * known.dram_bytes_per_s
    assert host_for(system("rtx-4090"), 128e9).name == "desktop-ddr5"
    assert host_for(system("rtx-4090"), 512e9).name == "xeon-ddr5-1s"
    own = host_for(system("h100-sxm"), 2e12)
    assert (own.name, own.dram_bytes_per_s) == ("h100-sxm", 6.144e11)
    with pytest.raises(InputError, match="no host with 9\\.00 TB"):
        host_for(system("rtx-4090"), 9e12)
    with pytest.raises(InputError, match="did you mean|known"):
        host("xeon")


def test_bad_sizes() -> None:
    rtx = system("rtx-4090")
    for wrong in ({"dram_bytes": -1.0}, {"nvme_bytes": float("nan")}, {"peer_bytes": float("inf")}):
        with pytest.raises(InputError, match="a number from 0"):
            tiers_of(rtx, 1e9, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 1"):
        tiers_of(rtx, 1e9, num_gpus=0)


# --- what lies where ---


def test_exclusive_and_inclusive_chains() -> None:
    tiers = machine(dram=20 * EXPERT, nvme=1e12)
    exclusive = spread(tiers, EXPERT, 64)
    assert (exclusive.resident, exclusive.behind) == (16, (20, 28))
    assert exclusive.shares(LINEAR) == pytest.approx([16 / 64, 20 / 64, 28 / 64])
    inclusive = spread(tiers, EXPERT, 64, is_inclusive=True)
    assert (inclusive.resident, inclusive.behind) == (16, (20, 64))
    assert inclusive.shares(LINEAR) == pytest.approx([16 / 64, 4 / 64, 44 / 64])
    assert inclusive.bytes_by_tier(tiers, EXPERT) == {"hbm": 16 * EXPERT, "dram": 20 * EXPERT, "nvme": 64 * EXPERT}


def test_copies_per_socket_where_they_fit() -> None:
    roomy, tight = machine(dram=96 * EXPERT), machine(dram=95 * EXPERT)
    assert spread(roomy, EXPERT, 64, copies=2).copies == 2
    assert spread(tight, EXPERT, 64, copies=2).copies == 1
    assert spread(roomy, EXPERT, 64, copies=2).bytes_by_tier(roomy, EXPERT)["dram"] == 96 * EXPERT


def test_dram_smaller_than_the_spilled_experts() -> None:
    with pytest.raises(
        DoesNotFit, match=r"480 MB must lie behind the 160 MB of HBM.*there is 240 MB of DRAM"
    ) as caught:
        spread(machine(dram=24 * EXPERT), EXPERT, 64, what="the experts of m")
    assert caught.value.exit_code == 3
    assert [remedy.split(" (")[0] for remedy in caught.value.remedies] == [
        "480 MB of host DRAM",
        "experts in 50% of their bytes: a lower precision",
        "an NVMe tier",
    ]
    with pytest.raises(InputError, match="use at most 16"):
        spread(machine(), EXPERT, 64, resident=17)
    with pytest.raises(InputError, match="0 to 64"):
        spread(machine(), EXPERT, 64, resident=65)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 80), st.integers(0, 80), st.booleans())
def test_shares_always_cover_every_need(hbm: int, dram: int, is_inclusive: bool) -> None:
    tiers = machine(dram=dram * EXPERT, hbm=hbm * EXPERT)
    try:
        found = spread(tiers, EXPERT, 64, is_inclusive=is_inclusive)
    except DoesNotFit:
        assert hbm < 64 and dram < 64 - (0 if is_inclusive else hbm)
        return
    shares = found.shares(LINEAR)
    assert shares.sum() == pytest.approx(1.0) and (shares >= 0).all()


# --- seconds ---


def test_everything_resident_costs_nothing() -> None:
    rich = machine(hbm=64 * EXPERT)
    for name in POLICIES:
        found = seconds(Residency(name), rich, work())
        assert found.total_s == pytest.approx(1e-4) and found.exposed_s == pytest.approx(0.0)
    with pytest.raises(DoesNotFit, match="only 16 of 64"):
        seconds(Residency("all-resident"), machine(), work())


def test_demand_adds_fixed_and_transfer_time() -> None:
    found = seconds(Residency("lru"), machine(), work())
    fetch_s = 8 * 0.75 * (15e-6 + EXPERT / 25e9)
    assert found.total_s == pytest.approx(0.25e-4 + fetch_s)
    assert found.miss_bytes == pytest.approx(6 * EXPERT) and found.hit_rate == pytest.approx(0.25)
    hidden = seconds(Residency("lru"), machine(), work(gpu_s=1.0))
    assert hidden.exposed_s == pytest.approx(0.0)


def test_stream_is_the_larger_of_compute_and_bytes() -> None:
    fetch_s = 48 * EXPERT / 25e9
    found = seconds(Residency("stream"), machine(), work())
    assert found.total_s + 2e-4 == pytest.approx(fetch_s + 0.75 * 15e-6)
    slow = seconds(Residency("stream"), machine(), work(gpu_s=1.0))
    assert slow.total_s == pytest.approx(1.0)


def test_prefetch_hides_what_it_foresees() -> None:
    blind, keen = (prefetch(work(), machine(), np.array([0.25, 0.75]), accuracy, 1) for accuracy in (0.0, 1.0))
    demand = seconds(Residency("lru"), machine(), work())
    assert float(blind.exposed_s[0]) > float(demand.exposed_s[0])  # all guesses are wrong and cost the link
    idle = prefetch(work(rest_s=1.0), machine(), np.array([0.25, 0.75]), 1.0, 1)
    assert float(idle.exposed_s[0]) == pytest.approx(0.0, abs=1e-5)
    far = prefetch(work(), machine(), np.array([0.25, 0.75]), 1.0, 8)
    assert float(far.exposed_s[0]) < float(keen.exposed_s[0])
    # Far ahead the variation of misses averages out: what stays is the link's excess over the compute.
    assert float(prefetch(work(), machine(), np.array([0.25, 0.75]), 1.0, 10**9).exposed_s[0]) == pytest.approx(
        float(keen.link_s[0]) - 3e-4, rel=1e-3
    )
    for wrong in ({"accuracy": 1.1}, {"lookahead_layers": 0}):
        with pytest.raises(InputError, match="accuracy|look-ahead"):
            Residency("prefetch", **wrong)


def test_cpu_computes_where_experts_lie() -> None:
    found = seconds(Residency("cpu", handover_s=1e-4), machine(), work())
    passed = 1e-4 + 2 * 8192 / 25e9
    assert found.total_s == pytest.approx(6 * EXPERT / 47e9 + passed)
    assert found.cpu_s == pytest.approx(6 * EXPERT / 47e9) and found.link_s == pytest.approx(0.0)
    layers = seconds(Residency("cpu-layers", handover_s=1e-4), machine(), work())
    assert layers.total_s == pytest.approx(0.25e-4 + 6 * EXPERT / 47e9 + 0.75 * passed)


def test_many_tokens_are_fetched_instead() -> None:
    """Fiddler's crossover: one expert on the CPU costs more than its transfer; llama.cpp decides by the batch."""
    many = work(active=64, tokens=4096, gpu_s=1e-3)
    for name in ("cpu", "cpu-layers"):
        found, fetched = seconds(Residency(name), machine(), many), seconds(Residency("static-hot"), machine(), many)
        assert found.total_s == pytest.approx(fetched.total_s) and found.cpu_s == pytest.approx(0.0)
    few = work(active=64, tokens=LLAMA_FETCH_TOKENS - 1)
    assert (seconds(Residency("cpu-layers"), machine(), few).cpu_s > 0).all()
    slow_cpu = replace(machine(), cpu=Cpu(1e9, 1e12, 1))
    assert seconds(Residency("cpu"), slow_cpu, work()).cpu_s == pytest.approx(0.0)


def test_one_copy_leaves_one_socket() -> None:
    two = replace(machine(dram=60 * EXPERT), cpu=Cpu(94e9, 3.4e12, 2))
    copies = replace(machine(dram=96 * EXPERT), cpu=Cpu(94e9, 3.4e12, 2))
    assert seconds(Residency("cpu"), two, work()).cpu_s == pytest.approx(6 * EXPERT / 47e9)
    assert seconds(Residency("cpu"), copies, work()).cpu_s == pytest.approx(6 * EXPERT / 94e9)


def test_cpu_needs_host_memory() -> None:
    only_drives = Tiers(16 * EXPERT, (Tier("nvme", 5e9, 0.0, 1e12),), None)
    with pytest.raises(InputError, match="give --dram"):
        seconds(Residency("cpu"), only_drives, work())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(set(POLICIES) - {"all-resident"})), st.floats(1e9, 2e11), st.integers(0, 63))
def test_more_never_hurts(policy: str, rate: float, resident: int) -> None:
    """Faster links and more resident experts never make a layer slower; no layer beats its compute."""
    task = work(active=20, tokens=4)
    base = seconds(Residency(policy, resident), machine(rate=rate, hbm=1e12), task)
    faster = seconds(Residency(policy, resident), machine(rate=2 * rate, hbm=1e12), task)
    fuller = seconds(Residency(policy, resident + 1), machine(rate=rate, hbm=1e12), task)
    assert (faster.total_s <= base.total_s * (1 + 1e-9)).all()
    assert (fuller.total_s <= base.total_s * (1 + 1e-9)).all() or policy == "prefetch"
    assert (base.total_s >= base.exposed_s).all() and (base.exposed_s >= 0).all()


def test_residency_is_a_key_and_names_near_policies() -> None:
    assert len({Residency("lru"), Residency("lru"), Residency("lru", 3)}) == 2
    with pytest.raises(InputError, match="'lfru' is unknown: did you mean.*lru"):
        Residency("lfru")
    with pytest.raises(InputError, match="-1 resident"):
        Residency("lru", -1)
    assert {row.origin for row in POLICIES.values()} == {"roofline", "extrapolated"}
    assert Spread(64, 64, (0,)).shares(LINEAR).tolist() == [1.0, 0.0]
