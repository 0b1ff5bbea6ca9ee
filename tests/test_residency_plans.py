"""Residency from deployments to plans: one host for all replicas, one cost in closed form and event loop, options."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.capacity import CapacityLimit
from planner.choices import ExpertChoices
from planner.deployment import Deployment, deploy, run, simulate_layout
from planner.engine import Limits, engine
from planner.enginespec import EngineSpec
from planner.errors import DoesNotFit, InputError, LayoutError
from planner.experts import AS_SERVED, ExpertSettings
from planner.hardware import parse_cluster, system
from planner.hostlink import host_links
from planner.layout import parse_layout
from planner.model import load
from planner.offload import moe_layers
from planner.options import experts as settings_of
from planner.outside import outside
from planner.residency import POLICIES, REUSES, Residency
from planner.residency.hosts import host
from planner.routing import UNIFORM
from planner.small import Machine, compare, estimate
from planner.workload import load_workload

MODEL = load("openai/gpt-oss-120b")
VLLM = engine("vllm")
RECORD = Path("/work/shared/data/routing/deepseek_v2_lite_law.npz")


def deployed(experts: ExpertSettings, cluster: str = "rtx-5090:1x8", layout: str = "tp=1,replicas=8") -> Deployment:
    limits = Limits(4, 2048)
    return deploy(MODEL, parse_cluster(cluster), parse_layout(layout), VLLM, limits, "all_reduce", 1200, experts)


def decode_s(found: Deployment, batch: float = 1.0) -> float:
    return float(found.cost().decode(np.array([batch]), np.array([1024.0])).total_s[0])


# --- one host ---


@pytest.mark.parametrize(("policy", "most"), [("cpu-layers", 1.2), ("cpu", 1.7), ("lru", 2.2)])
def test_eight_replicas_do_not_get_eight_hosts(policy: str, most: float) -> None:
    """The memory of one desktop feeds all of them: together hardly more than one, which waits for its GPU or its link.

    A lone link takes 55 of the 89.6 GB/s; a lone server of KTransformers spends half a millisecond per layer waking.
    """
    settings = ExpertSettings(residency=Residency(policy, 20), dram_bytes=1e12, host=host("desktop-ddr5"))
    eight, one = (decode_s(deployed(settings, layout=f"tp=1,replicas={n}")) for n in (8, 1))
    assert 8 / eight < most / one


def test_what_the_user_must_type_counts_all_replicas() -> None:
    with pytest.raises(DoesNotFit, match="of each of 2 replicas must lie") as caught:
        deployed(ExpertSettings(residency=Residency("cpu"), dram_bytes=50e9), layout="tp=1,replicas=2")
    remedy = caught.value.remedies[0]
    gigabytes = float(remedy.split("--dram ")[1].removesuffix("GB)"))
    enough = ExpertSettings(residency=Residency("cpu"), dram_bytes=gigabytes * 1e9)
    assert "2 replicas on the node" in remedy and deployed(enough, layout="tp=1,replicas=2").offload is not None


def test_more_memory_is_never_slower() -> None:
    for gpu in ("rtx-4090", "h100-sxm"):
        model = load("deepseek-v3") if gpu == "h100-sxm" else MODEL
        before: dict[str, float] = {}
        for gigabytes in (128, 256, 300, 500, 700, 1100, 2500):
            try:
                found = compare(model, Machine(system(gpu), 1, gigabytes * 1e9, nvme_bytes=2e12), context=1024)
            except DoesNotFit:
                continue
            rates = {e.residency.policy: e.decode_tok_per_s for e in found.estimates}
            assert all(rates[name] >= 0.999 * rate for name, rate in before.items()), (gpu, gigabytes)
            before = rates


def test_roots_end_with_the_node_and_are_simulated_whole() -> None:
    settings = ExpertSettings(residency=Residency("lru"), dram_bytes=1e12, gpus_per_root=4)
    two_nodes = deployed(settings, "l40s:2x2", "tp=1,replicas=4")
    spec = two_nodes.spec(4)
    assert (spec.groups_per_link, spec.groups_per_node) == (2, 2)
    links = host_links(spec)
    assert links[0] is links[1] and links[2] is links[3] and links[1] is not links[2]
    odd = host_links(EngineSpec(6, 1, 1000, groups_per_link=2, groups_per_node=3))
    assert [odd.index(link) for link in odd] == [0, 0, 2, 3, 3, 5]
    assert host_links(EngineSpec(6, 1, 1000)) == []
    one_node = deployed(settings, "rtx-5090:1x8")
    workload = load_workload("fixed:64/4", concurrency=8, num_requests=24)
    assert run(one_node, workload).simulation.spec.num_groups == 4


def test_a_replica_stays_on_a_node() -> None:
    lru = ExpertSettings(residency=Residency("lru"), dram_bytes=1e12)
    with pytest.raises(LayoutError, match="one node and its host. Use at most tp=4"):
        deployed(lru, "gb200-nvl72:2x4", "tp=8")


# --- one cost ---


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"all-resident"}))
@pytest.mark.parametrize("batch", [1, 4])
def test_steps_cost_the_same_in_both_answers(policy: str, batch: int) -> None:
    """`small.estimate` and the tables of the event loop agree, and their terms add up."""
    kept = Residency(policy, 20)
    small = estimate(MODEL, Machine(system("rtx-5090"), 1, 256e9), kept, context=1024, batch=batch)
    found = deployed(ExpertSettings(residency=kept, dram_bytes=256e9), layout="tp=1")
    step = found.cost().decode(np.array([float(batch)]), np.array([1024.0]))
    assert float(step.total_s[0]) == pytest.approx(small.decode_s, rel=0.02)
    own = small.terms["experts_on_cpu"] + small.terms["hand_over"] + small.terms["fetching"]
    assert float(step.terms["expert_misses"][0]) == pytest.approx(own, rel=0.02)
    assert float(step.terms["experts"][0]) == pytest.approx(small.terms["experts_on_gpu"], rel=0.04, abs=2e-5)
    drawn = found.cost().routed.drawn_seconds("decode", [(k, n) for k, n in MODEL.layer_kinds])
    knot = {1: 0, 4: 3}[batch]
    assert drawn[knot].mean() == pytest.approx(small.decode_s - small.terms["attention_and_dense"], rel=0.02)


def test_bytes_say_who_computed() -> None:
    by_policy = {
        name: estimate(MODEL, Machine(system("rtx-4090"), 1, 128e9), Residency(name, 30))
        for name in ("static-hot", "cpu", "lru", "prefetch")
    }
    cpu, fetched = by_policy["cpu"], by_policy["static-hot"]
    assert cpu.miss_bytes_per_token == 0 and cpu.cpu_bytes_per_token == pytest.approx(fetched.miss_bytes_per_token)
    assert fetched.cpu_bytes_per_token == 0
    assert by_policy["prefetch"].miss_bytes_per_token == pytest.approx(1.15 * by_policy["lru"].miss_bytes_per_token)
    misses = deployed(ExpertSettings(residency=Residency("cpu"), dram_bytes=1e12)).cost().routed.misses()
    assert (misses["decode"]["miss_bytes"] == 0).all() and (misses["decode"]["cpu_bytes"] > 0).all()
    assert (misses["prefill"]["miss_bytes"][-1] > 0).all() and (misses["prefill"]["cpu_bytes"][-1] == 0).all()


@pytest.mark.parametrize(("name", "layers"), [("google/switch-base-64", 6), ("mistralai/Mixtral-8x7B-v0.1", 32)])
def test_encoder_layers_are_not_decoded(name: str, layers: int) -> None:
    model = load(name)
    assert moe_layers(model, "decode") == layers == moe_layers(model, "prefill")
    if name.startswith("google"):
        assert model.num_moe_layers == 12
        offered = parse_cluster("rtx-4090:1x1")
        lru = ExpertSettings(residency=Residency("lru", 8), dram_bytes=64e9)
        found = deploy(model, offered, parse_layout("tp=1"), VLLM, Limits(4, 512), "all_reduce", 256, lru)
        small = estimate(model, Machine(offered.system, 1, 64e9), Residency("lru", 8), context=256)
        assert decode_s(found) == pytest.approx(small.decode_s, rel=0.05)
        one_layer = found.offload.layer_bytes / 12 if found.offload else 0.0
        assert small.miss_bytes_per_token <= 6 * one_layer


def test_stream_pays_for_its_buffers() -> None:
    found = deployed(ExpertSettings(residency=Residency("stream"), dram_bytes=1e12), layout="tp=1")
    assert found.offload is not None and found.offload.buffer_bytes > 0
    away = found.offload
    assert found.memory.terms["experts"] == pytest.approx(away.held.resident * away.layer_bytes + away.buffer_bytes)
    assert away.bytes_by_tier()["hbm"] == pytest.approx(found.memory.terms["experts"])
    kv_bytes = found.memory.kv_tokens * found.memory.kv_bytes_per_token
    # What is left for the cache is what was reserved for it, and less than one expert of all layers.
    reserved = 4 * 1200 * found.memory.kv_bytes_per_token
    assert 0.99 * reserved < kv_bytes < reserved + away.layer_bytes + 1e8


def test_padded_slots_are_no_work_for_the_cpu() -> None:
    """A capacity limit pads what GPUs compute; the CPU computes the tokens that came."""
    free, padded = (
        deployed(ExpertSettings(residency=Residency("cpu-layers", 20), dram_bytes=1e12, limit=limit), layout="tp=1")
        for limit in (None, CapacityLimit("mesh-tf", 16.0))
    )
    work = [found.cost().routed.layer("decode", 1).cpu_s.mean() for found in (free, padded)]
    assert work[1] == pytest.approx(work[0], rel=0.01)


# --- what the user may say ---


def test_skew_and_top_k_reach_the_table_of_a_plan() -> None:
    workload = load_workload("fixed:500/50", concurrency=1, num_requests=20)
    rates = {}
    for name, experts in {
        "as served": AS_SERVED,
        "uniform": replace(AS_SERVED, skew=UNIFORM),
        "one expert": replace(AS_SERVED, top_k=1),
        "decoding": replace(AS_SERVED, reuse=REUSES["decode-reports"]),
    }.items():
        settings = replace(experts, dram_bytes=128e9)
        found = outside(load("qwen3-30b-a3b"), parse_cluster("rtx-4090:1x1"), workload, VLLM, settings)
        assert found.comparison is not None
        rates[name] = {e.residency.policy: e for e in found.comparison.estimates}
        assert all(d.offload and d.offload.residency.row.is_offered for d in found.deployments)
    assert rates["uniform"]["lru"].hit_rate < rates["as served"]["lru"].hit_rate < rates["decoding"]["lru"].hit_rate
    assert rates["uniform"]["cpu"].hit_rate < rates["as served"]["cpu"].hit_rate
    assert rates["one expert"]["cpu"].decode_tok_per_s > 2 * rates["as served"]["cpu"].decode_tok_per_s


def test_options_become_settings(tmp_path: Path) -> None:
    typed = ExpertChoices(
        residency="lru", resident=20, nvme="2TB@7GB/s", peer="40GB", host="xeon-ddr5-1s", dram="300GB"
    )
    found = settings_of(MODEL, typed)
    assert found.residency == Residency("lru", 20)
    assert (found.nvme_bytes, found.nvme_bytes_per_s, found.peer_bytes) == (2e12, 7e9, 40e9)
    assert found.host == host("xeon-ddr5-1s")
    assert settings_of(MODEL, ExpertChoices(residency="lru", reuse="none")).residency == Residency(
        "lru", reuse=REUSES["none"]
    )
    dense = load("Qwen/Qwen3-8B")
    counts = tmp_path / "counts.csv"
    counts.write_text("layer,expert,assignments\n" + "".join(f"0,{e},5\n" for e in range(128)))
    for model, choices, said in (
        (dense, ExpertChoices(residency="lru"), "is dense and has no experts"),
        (MODEL, ExpertChoices(resident=20), "needs --residency"),
        (MODEL, ExpertChoices(reuse=str(counts)), "counts only"),
        (MODEL, ExpertChoices(reuse="nowhere.npz"), "nowhere.npz"),
        (MODEL, ExpertChoices(nvme="2TB@0GB/s"), "a rate above 0"),
        (MODEL, ExpertChoices(nvme="2TB@"), "a rate after the @"),
        (MODEL, ExpertChoices(host="xeon-ddr5-1s", dram="1TB"), "takes at most 512 GB"),
        (MODEL, ExpertChoices(peer="many"), "--peer many"),
    ):
        with pytest.raises(InputError, match=said):
            settings_of(model, choices)


@pytest.mark.skipif(not RECORD.is_file(), reason="the routing records are not here")
def test_reuse_comes_from_a_record() -> None:
    lite = load("deepseek-v2-lite")
    found = settings_of(lite, ExpertChoices(residency="lru", reuse=str(RECORD)))
    assert found.residency is not None and 0.35 < found.residency.reuse.repeat < 0.5  # law: 0.44 (reuse.py)


def test_options_of_the_host_need_a_policy_in_a_simulation() -> None:
    workload = load_workload("fixed:64/4", concurrency=1, num_requests=4)
    fixed = (MODEL, parse_cluster("h200-sxm:1x1"), parse_layout("tp=1"), workload, VLLM)
    rest: dict[str, Any] = {"limits": Limits(4, 2048), "backend": "all_reduce"}
    for option, experts in {
        "--dram": ExpertSettings(dram_bytes=1e12),
        "--nvme": ExpertSettings(nvme_bytes=1e12),
        "--peer": ExpertSettings(peer_bytes=1e10),
        "--gpus-per-root": ExpertSettings(gpus_per_root=2),
        "--host": ExpertSettings(host=host("xeon-ddr5-1s")),
        "--reuse": ExpertSettings(reuse=REUSES["none"]),
    }.items():
        with pytest.raises(InputError, match=f"{option} is used only with --residency"):
            simulate_layout(*fixed, **rest, experts=experts)


def test_one_user_needs_the_cache_of_one() -> None:
    workload = load_workload("fixed:512/16", concurrency=1, num_requests=4)
    lru = ExpertSettings(residency=Residency("lru"), dram_bytes=256e9)
    fixed = (MODEL, parse_cluster("rtx-5090:1x1"), parse_layout("tp=1"), workload, VLLM)
    result = simulate_layout(*fixed, limits=Limits(256, 2048), backend="all_reduce", experts=lru)
    assert result.deployment.limits.max_num_seqs == 1
    away = result.deployment.offload
    assert away is not None and away.held.resident > 45


def test_peers_are_faster_than_the_host() -> None:
    model, gpu = load("deepseek-v3"), system("h200-sxm")
    behind, beside = (
        estimate(model, Machine(gpu, 1, 2e12, peer_bytes=size), Residency("lru"), context=1024) for size in (0.0, 1e12)
    )
    assert beside.decode_tok_per_s > 2 * behind.decode_tok_per_s
    assert beside.bytes_by_tier["peer"] > 0 and "peer link" in beside.bound
    on_cpu = estimate(model, Machine(gpu, 1, 2e12, peer_bytes=1e12), Residency("cpu"), context=1024)
    assert "peer" not in on_cpu.bytes_by_tier and on_cpu.cpu_bytes_per_token > 0


def test_the_command_says_how_far_reuse_matters(moeplan: Any) -> None:
    start = ("experts", "residency", "openai/gpt-oss-120b", "--gpu", "rtx-4090", "--dram", "128GB")
    code, out, _ = moeplan(*start, "--resident", "30")
    assert code == 0 and "only" not in out and "records taken (--reuse)" in out and "offered by" in out
    assert "lru: " in out and "Desktop" in out
    code, out, _ = moeplan(*start, "--json")
    facts = json.loads(out)
    rows = {row["policy"]: row for row in facts["policies"]}
    assert rows[facts["best"]]["is_offered"] and not rows["lfu"]["is_offered"]
    assert rows["cpu"]["offered_by"].startswith("KTransformers") and rows["cpu"]["tok_per_s_by_reuse"] == {}
    low, high = rows["lru"]["tok_per_s_by_reuse"].values()
    assert low == rows["lru"]["decode_tok_per_s"] and high > 1.5 * low
    code, _, err = moeplan(*start, "--nvme", "2TB@0GB/s")
    assert code == 2 and "a rate above 0" in err and len(err.strip().splitlines()) == 1


def test_decode_reports_do_not_agree() -> None:
    """Handbook serving 5B.3: 92 to 96 % hits with 48 of 128 slots; the preset rests on another report and says 85 %."""
    lru = Residency("lru", reuse=REUSES["decode-reports"])
    found = estimate(MODEL, Machine(system("rtx-5090"), 1, 256e9), replace(lru, resident_experts=48), context=1024)
    assert 0.80 < found.hit_rate < 0.92
