"""Tiers, what lies where, and the seconds of every policy."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

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
from planner.residency.hosts import HANDOVER_S, KTRANSFORMERS_SHARE, host, host_for, hosts
from planner.residency.policies import KTRANSFORMERS_FETCH_TOKENS, LLAMA_FETCH_TOKENS
from planner.residency.tiers import Cpu
from planner.residency.timing import prefetch

EXPERT = 10e6
LINEAR = tuple(np.linspace(0.0, 1.0, 65).tolist())


def work(
    active: float = 8.0, tokens: float = 1.0, gpu_s: float = 1e-4, rest_s: float = 2e-4, prompt: bool = True
) -> LayerWork:
    a, n, t, gpu, rest = (np.full(2, value) for value in (active, 6.0 * tokens, tokens, gpu_s, rest_s))
    return LayerWork(a, n, t, gpu, rest, EXPERT, 4e7, 8192.0, is_prefill=prompt)


def machine(dram: float = 1e12, rate: float = 25e9, nvme: float = 0.0, hbm: float = 16 * EXPERT) -> Tiers:
    backing = (Tier("dram", rate, 15e-6, dram), *((Tier("nvme", 5e9, 15e-6, nvme),) if nvme else ()))
    return Tiers(hbm, backing, Cpu(47e9, 40e9, 1.7e12, 1))


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


def test_shared_roots_and_peers() -> None:
    rtx = system("rtx-4090")
    alone = tiers_of(rtx, 1e9, dram_bytes=5e11).backing[0].bytes_per_s
    assert tiers_of(rtx, 1e9, num_gpus=4, dram_bytes=5e11, gpus_per_root=4).backing[0].bytes_per_s == alone / 4
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
        assert 0.2 < known.llama_share < 0.8
    assert host_for(system("rtx-4090"), 128e9).name == "desktop-ddr5"
    assert host_for(system("rtx-4090"), 512e9).name == "xeon-ddr5-1s"
    own = host_for(system("h100-sxm"), 2e12)
    assert (own.name, own.dram_bytes_per_s, own.num_sockets) == ("h100-sxm", 6.144e11, 2)
    cpu = tiers_of(system("h100-sxm"), 0.0).cpu
    assert cpu is not None and cpu.bytes_per_s == KTRANSFORMERS_SHARE * 6.144e11 and cpu.host.startswith("host of")
    with pytest.raises(InputError, match="no host with 9\\.00 TB"):
        host_for(system("rtx-4090"), 9e12)
    with pytest.raises(InputError, match="did you mean|known"):
        host("xeon")


def test_bad_sizes() -> None:
    rtx = system("rtx-4090")
    for wrong in ({"dram_bytes": -1.0}, {"nvme_bytes": float("nan")}, {"peer_bytes": float("inf")}):
        with pytest.raises(InputError, match="a number from 0"):
            tiers_of(rtx, 1e9, **wrong)  # type: ignore[arg-type]
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="a rate above 0"):
            tiers_of(rtx, 1e9, dram_bytes=1e11, nvme_bytes=1e12, nvme_bytes_per_s=rate)
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
    assert caught.value.remedies == (
        "1 GB of host DRAM (--dram 1GB)",
        "experts in 50% of their bytes: a lower precision (--weights experts=int4_g32, nvfp4)",
        "1 GB of NVMe (--nvme 1GB), slower",
    )
    with pytest.raises(DoesNotFit, match="48.0 GB of each of 4 replicas must lie") as shared:
        spread(replace(machine(dram=24e9, hbm=16e9), num_replicas=4), 1e9, 64)
    assert shared.value.remedies[0] == "192 GB of host DRAM for the 4 replicas on the node (--dram 192GB)"
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


def test_prefetch_counts_its_wrong_guesses() -> None:
    demand = seconds(Residency("lru"), machine(), work())
    found = seconds(Residency("prefetch", accuracy=0.8), machine(), work())
    assert found.miss_bytes == pytest.approx(1.2 * demand.miss_bytes)
    assert found.link_s == pytest.approx(1.2 * demand.link_s)


def test_cpu_computes_where_experts_lie() -> None:
    found = seconds(Residency("cpu"), machine(), work())
    passed = HANDOVER_S + 2 * 8192 / 25e9
    assert found.total_s == pytest.approx(6 * EXPERT / 47e9 + passed)
    assert found.cpu_s == pytest.approx(6 * EXPERT / 47e9) and found.link_s == pytest.approx(0.0)
    assert found.cpu_bytes == pytest.approx(6 * EXPERT) and found.miss_bytes == pytest.approx(0.0)
    layers = seconds(Residency("cpu-layers"), machine(), work())
    assert layers.total_s == pytest.approx(0.25e-4 + 6 * EXPERT / 40e9 + 0.75 * 2 * 8192 / 25e9)


def test_decode_stays_on_the_cpu_and_large_chunks_are_fetched() -> None:
    """KTransformers and llama.cpp decide by the tokens of a step, never by the speed of the CPU in decode."""
    many = work(active=64, tokens=4096, gpu_s=1e-3)
    for name in ("cpu", "cpu-layers"):
        found, fetched = seconds(Residency(name), machine(), many), seconds(Residency("static-hot"), machine(), many)
        assert found.total_s == pytest.approx(fetched.total_s) and found.cpu_s == pytest.approx(0.0)
        assert found.miss_bytes == pytest.approx(fetched.miss_bytes) and found.cpu_bytes == pytest.approx(0.0)
    slow = replace(machine(), cpu=Cpu(1e9, 1e9, 1e12, 1))
    for name, limit in (("cpu", KTRANSFORMERS_FETCH_TOKENS), ("cpu-layers", LLAMA_FETCH_TOKENS)):
        for tokens in (1, limit - 1):
            task = work(active=8 if tokens == 1 else 64, tokens=tokens)
            assert (seconds(Residency(name), slow, task).cpu_s > 0).all()
        assert (seconds(Residency(name), slow, work(active=64, tokens=limit)).cpu_s == 0).all()
    decode = work(active=64, tokens=4096, prompt=False)
    assert (seconds(Residency("cpu"), slow, decode).cpu_s > 0).all()
    assert (seconds(Residency("cpu-layers"), slow, decode).cpu_s == 0).all()


def test_fiddler_takes_the_faster_of_cpu_and_link() -> None:
    """One token goes to the CPU, many tokens per expert make its compute slower than the transfer (crossover)."""
    for tiers, tokens in ((machine(), 1.0), (machine(), 4096.0), (replace(machine(), cpu=Cpu(1e9, 1e9, 1e12, 1)), 1.0)):
        task = work(active=8 if tokens == 1 else 64, tokens=tokens)
        found = seconds(Residency("cpu-or-fetch"), tiers, task)
        fetched = seconds(Residency("static-hot"), tiers, task)
        assert (found.total_s <= fetched.total_s).all()
        assert (found.cpu_bytes > 0).all() == (found.miss_bytes == 0).all()
    fast = replace(machine(), cpu=Cpu(200e9, 200e9, 5e12, 1))
    assert (seconds(Residency("cpu-or-fetch"), fast, work()).cpu_s > 0).all()


def test_one_copy_leaves_one_socket() -> None:
    two = replace(machine(dram=60 * EXPERT), cpu=Cpu(94e9, 80e9, 3.4e12, 2))
    copies = replace(machine(dram=96 * EXPERT), cpu=Cpu(94e9, 80e9, 3.4e12, 2))
    assert seconds(Residency("cpu"), two, work()).cpu_s == pytest.approx(6 * EXPERT / 47e9)
    assert seconds(Residency("cpu"), copies, work()).cpu_s == pytest.approx(6 * EXPERT / 94e9)
    assert seconds(Residency("cpu-layers"), copies, work()).cpu_s == pytest.approx(6 * EXPERT / 40e9)


def test_replicas_share_one_host() -> None:
    """Memory, drives, CPU and their rates: eight servers together have what one has."""
    asked = {"dram_bytes": 1.6e12, "nvme_bytes": 8e12, "peer_bytes": 8e10}
    alone, eighth = (tiers_of(system("h100-sxm"), 1e9, num_replicas=n, **asked) for n in (1, 8))  # type: ignore[arg-type]
    assert alone.cpu is not None and eighth.cpu is not None
    for name in ("bytes_per_s", "llama_bytes_per_s", "flop_per_s"):
        assert 8 * getattr(eighth.cpu, name) == pytest.approx(getattr(alone.cpu, name))
    assert (alone.cpu.num_sockets, eighth.cpu.num_sockets) == (2, 1)
    for one, part in zip(alone.backing, eighth.backing, strict=True):
        assert 8 * part.capacity_bytes == one.capacity_bytes
    drives = (alone.named("nvme"), eighth.named("nvme"))
    assert drives[0] and drives[1] and 8 * drives[1].bytes_per_s == pytest.approx(drives[0].bytes_per_s)
    desktop = tiers_of(system("rtx-4090"), 1e9, dram_bytes=1e11, num_replicas=8)
    assert 8 * desktop.backing[0].bytes_per_s == pytest.approx(89.6e9)


@pytest.mark.parametrize("name", ["rtx-4090", "h100-sxm", "b200-sxm"])
def test_more_memory_never_brings_a_slower_host(name: str) -> None:
    """Same sockets at every size, no rate falls: what is faster with less memory was an artefact of the catalogue."""
    sizes = [tiers_of(system(name), 1e9, dram_bytes=gigabytes * 1e9) for gigabytes in (64, 200, 257, 600, 1100, 3000)]
    for less, more in pairwise(sizes):
        assert less.cpu is not None and more.cpu is not None
        assert less.cpu.num_sockets == more.cpu.num_sockets and less.cpu.flop_per_s <= more.cpu.flop_per_s
        assert less.cpu.bytes_per_s <= more.cpu.bytes_per_s
        assert less.backing[0].bytes_per_s <= more.backing[0].bytes_per_s


def test_cpu_needs_host_memory() -> None:
    only_drives = Tiers(16 * EXPERT, (Tier("nvme", 5e9, 0.0, 1e12),), None)
    with pytest.raises(InputError, match="give --dram"):
        seconds(Residency("cpu"), only_drives, work())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(set(POLICIES) - {"all-resident"})), st.floats(1e9, 2e11), st.integers(0, 63))
def test_more_never_hurts(policy: str, rate: float, resident: int) -> None:
    """Faster links and more resident experts never make a layer slower; no layer beats its compute."""
    task = replace(work(active=20, tokens=4), expert_flop=0.0)
    base = seconds(Residency(policy, resident), machine(rate=rate, hbm=1e12), task)
    faster = seconds(Residency(policy, resident), machine(rate=2 * rate, hbm=1e12), task)
    fuller = seconds(Residency(policy, resident + 1), machine(rate=rate, hbm=1e12), task)
    assert (faster.total_s <= base.total_s * (1 + 1e-9)).all()
    assert (fuller.total_s <= base.total_s * (1 + 1e-9)).all() or policy == "prefetch"
    assert (base.total_s >= base.exposed_s).all() and (base.exposed_s >= 0).all()


def test_policies_say_who_offers_them() -> None:
    offered = {name for name, row in POLICIES.items() if row.is_offered}
    assert offered == {"all-resident", "lru", "stream", "prefetch", "cpu", "cpu-layers"}
    assert all(row.engines.startswith("no engine") != row.is_offered for row in POLICIES.values())
    with pytest.raises(InputError, match="keeps every expert"):
        Residency("all-resident", 60)


def test_residency_is_a_key_and_names_near_policies() -> None:
    assert len({Residency("lru"), Residency("lru"), Residency("lru", 3)}) == 2
    with pytest.raises(InputError, match="'lfru' is unknown: did you mean.*lru"):
        Residency("lfru")
    with pytest.raises(InputError, match="-1 resident"):
        Residency("lru", -1)
    assert {row.origin for row in POLICIES.values()} == {"roofline", "extrapolated"}
    assert Spread(64, 64, (0,)).shares(LINEAR).tolist() == [1.0, 0.0]
