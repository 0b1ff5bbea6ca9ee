"""Long-run cost of failures: renewal theory, surviving experts by brute force, time to ready, the commands."""

import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.engine import Limits, engine, engines
from planner.errors import InputError
from planner.failures import survival as survival_module
from planner.failures.choices import RecoveryChoices
from planner.failures.readiness import readiness
from planner.failures.recovery import mtbf_gpu, recovery
from planner.failures.risk import at_least_up, availability, group_mttf_s, replicas_for, spares_for
from planner.failures.settings import recovery_settings
from planner.failures.survival import hosts, survival, tolerated_ranks
from planner.hardware import parse_cluster
from planner.layout import Layout
from planner.memory import Ledger
from planner.model import load
from planner.placement import Placement, place

# --- risk ---


def test_mtbf_is_that_of_the_published_failures():
    # 419 interruptions in 54 days on 16,384 GPUs: one every three hours, as the report says.
    assert mtbf_gpu().value / 16_384 == pytest.approx(3.09 * 3600, rel=0.01)
    assert "2407.21783" in mtbf_gpu().source


def test_group_fails_as_often_as_its_gpus_together():
    rng = np.random.default_rng(1)
    first = rng.exponential(1000.0, (20_000, 32)).min(axis=1)
    assert first.mean() == pytest.approx(group_mttf_s(1000.0, 32), rel=0.02)


@given(st.integers(1, 8), st.integers(1, 8), st.floats(0.5, 0.9999))
def test_at_least_up_against_enumeration(num, needed, share):
    states = [[bool(s >> i & 1) for i in range(num)] for s in range(2**num)]
    expected = sum(math.prod(share if up else 1 - share for up in s) for s in states if sum(s) >= needed)
    assert at_least_up(num, needed, share) == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 20), st.floats(0.9, 0.99999), st.floats(0.5, 0.999999))
def test_replicas_for_is_the_fewest(needed, share, target):
    num = replicas_for(needed, share, target)
    assert at_least_up(num, needed, share) >= target
    assert num == needed or at_least_up(num - 1, needed, share) < target


def test_replicas_for_says_when_it_is_hopeless():
    with pytest.raises(InputError, match="spare replicas do not keep"):
        replicas_for(50, 0.01, 0.999)


def test_spares_against_a_simulated_repair_shop():
    rng = np.random.default_rng(2)
    broken_s = np.cumsum(rng.exponential(10.0, 40_000))
    away = np.searchsorted(broken_s, np.arange(1000.0, 390_000.0, 7.0))
    in_repair = away - np.searchsorted(broken_s + 25.0, np.arange(1000.0, 390_000.0, 7.0))
    spares = spares_for(1 / 10.0, 25.0, 0.95)
    assert (in_repair <= spares).mean() >= 0.945
    assert (in_repair <= spares - 1).mean() < 0.95


# --- survival ---


def brute_force(placement, dead, by_node=False):
    """Every set of dead units, every layer, every expert."""
    units = placement.num_nodes if by_node else placement.num_ranks
    slots = placement.num_slots // units
    covered, lost, cases = 0, 0, 0
    for gone in combinations(range(units), dead):
        cases += 1
        missing = 0
        for layer in placement.physical_to_logical:
            left = {int(e) for slot, e in enumerate(layer) if slot // slots not in gone}
            missing += placement.num_experts - len(left)
        covered += missing == 0
        lost += missing
    return covered / cases, lost / cases


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(8, 4, 2), (12, 6, 3), (6, 6, 2), (16, 8, 4)]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.booleans(),
)
def test_survival_against_brute_force(seed, shape, copies, dead, by_node):
    experts, ranks, nodes = shape
    redundant = -experts % ranks + copies * ranks
    load_of_experts = np.random.default_rng(seed).pareto(1.5, (2, experts)) + 0.1
    placement = place("eplb-global", load_of_experts, ranks, redundant=redundant)
    placement = Placement("eplb", placement.physical_to_logical, experts, ranks, nodes)
    dead = min(dead, (nodes if by_node else ranks) - 1)
    found = survival(placement, dead, by_node=by_node)
    covered, lost = brute_force(placement, dead, by_node)
    assert found.is_exact
    assert found.all_covered == pytest.approx(covered, abs=1e-12)
    assert found.lost_experts == pytest.approx(lost, abs=1e-9)


def test_copies_on_other_nodes_survive_a_node_and_copies_beside_do_not():
    spread = Placement("spread", np.array([[0, 1, 2, 3, 2, 3, 0, 1]]), 4, 4, 2)
    beside = Placement("beside", np.array([[0, 1, 0, 1, 2, 3, 2, 3]]), 4, 4, 2)
    # Any one rank may die in both; a node only where copies are on distinct nodes.
    assert survival(spread, 1).all_covered == survival(beside, 1).all_covered == 1.0
    assert survival(spread, 1, by_node=True).all_covered == 1.0
    assert survival(beside, 1, by_node=True).all_covered == 0.0
    assert survival(beside, 1, by_node=True).lost_experts == 2.0
    assert hosts(beside, by_node=True)[0].tolist() == [[True, False]] * 2 + [[False, True]] * 2


def test_without_copies_one_dead_rank_takes_its_experts():
    plain = place("contiguous", np.ones((3, 32)), 8)
    assert survival(plain, 1) == survival_module.Survival(1, 0.0, 3 * 4.0, 8, True)
    assert survival(plain, 0).all_covered == 1.0
    with pytest.raises(InputError, match="from 0 to 7"):
        survival(plain, 8)


def test_drawn_sets_agree_with_counted_ones(monkeypatch):
    placement = place("random", np.ones((1, 64)), 16, redundant=64, seed=4)
    exact = survival(placement, 4)
    monkeypatch.setattr(survival_module, "_MOST_SETS", 1000)
    assert exact.num_sets == math.comb(16, 4)
    monkeypatch.setattr(survival_module, "_DRAWN_SETS", 20_000)
    drawn = survival(placement, 4)
    assert not drawn.is_exact
    assert drawn.lost_experts == exact.lost_experts
    noise = math.sqrt(exact.all_covered * (1 - exact.all_covered) / 20_000)
    assert drawn.all_covered == pytest.approx(exact.all_covered, abs=4 * noise)


@given(st.integers(1, 300), st.integers(0, 600), st.integers(2, 64))
def test_tolerated_ranks_is_the_most_whose_loss_leaves_enough_slots(experts, redundant, ranks):
    slots = experts + redundant
    f = tolerated_ranks(experts, redundant, ranks)
    assert (ranks - f) * slots >= experts * ranks
    assert f == ranks or (ranks - f - 1) * slots < experts * ranks


# --- readiness ---


def ready(layout, chosen=RecoveryChoices(), name="vllm", cluster="h200-sxm:2x8", seqs=256):  # noqa: B008
    model, profile, offered = load("deepseek-ai/DeepSeek-V3"), engine(name), parse_cluster(cluster)
    limits = Limits(seqs, 8192)
    memory = Ledger(model, offered.system, profile).use(layout, limits, "allgather_reducescatter", 4096)
    return readiness(model, offered, layout, profile, limits, memory, recovery_settings(profile, chosen)), memory, model


def terms(found):
    return {term.name: term.seconds for term in found.terms}


def test_weights_by_hand():
    layout = Layout(attention_dp=16, ep=16)
    found, memory, _ = ready(layout)
    node_bytes = 8 * memory.weight_bytes  # half of the experts, all of attention on every rank: less than the file
    assert terms(found)["weights"] == pytest.approx(node_bytes / 5e9)
    given_rate, _, _ = ready(layout, RecoveryChoices(load_from="10GB/s"))
    assert terms(given_rate)["weights"] == pytest.approx(node_bytes / 10e9)
    dram, _, _ = ready(layout, RecoveryChoices(load_from="dram"))
    assert terms(dram)["weights"] == pytest.approx(memory.weight_bytes / 2.92e9)
    peer, _, _ = ready(layout, RecoveryChoices(load_from="peer"))
    assert terms(peer)["weights"] == pytest.approx(memory.weight_bytes / (0.7 * 5e10))
    # However fast the drives, the loader fills a GPU no faster than from memory.
    fast, _, _ = ready(layout, RecoveryChoices(load_from="1TB/s"))
    assert terms(fast)["weights"] == terms(dram)["weights"]


def test_a_node_reads_the_file_once():
    found, memory, model = ready(Layout(tp=8, ep=8), cluster="h200-sxm:1x8")
    assert 8 * memory.weight_bytes > model.weight_bytes
    assert terms(found)["weights"] == pytest.approx(model.weight_bytes / 5e9)


def test_graphs_reproduce_the_published_capture():
    # TensorRT-LLM tech blog 20: 49 graphs of DeepSeek-R1 (61 layers) take 25.90 + 25.39 s.
    assert 49 * 61 * recovery(engine("trtllm")).graph_s_per_layer.value == pytest.approx(25.90 + 25.39, rel=0.01)
    found, _, _ = ready(Layout(attention_dp=16, ep=16), name="trtllm", seqs=64)
    graphs = engine("trtllm").num_graphs(64)
    assert terms(found)["graphs"] == pytest.approx(graphs * 61 * recovery(engine("trtllm")).graph_s_per_layer.value)
    half, _, _ = ready(Layout(tp=8, ep=8, pp=2), name="trtllm", seqs=64)
    assert terms(half)["graphs"] == pytest.approx(terms(found)["graphs"] * 31 / 61)


def test_sglang_restart_is_within_the_published_range():
    # LMSYS blog 2026-03-25: a full restart of DeepSeek-V3.2 on 32 GPUs takes 2 to 3 minutes.
    found, _, _ = ready(Layout(attention_dp=32, ep=32, redundant_experts=256), name="sglang", cluster="h200-sxm:4x8")
    assert 60 < found.total_s < 180


def test_the_engines_of_the_table_have_sourced_numbers():
    for name in ("vllm", "sglang", "trtllm"):
        facts = recovery(engine(name))
        for value in (facts.detect, facts.compile, facts.graph_s_per_layer, facts.warm_up):
            assert value.value >= 0
            assert value.source


def test_a_profile_of_ones_own_recovers_like_the_engine_it_builds_on():
    assert recovery(replace(engine("vllm"), name="mine")) == recovery(engine("vllm"))
    for name in set(engines()) - {"vllm", "sglang", "trtllm"}:
        with pytest.raises(InputError, match=f"{name}.*--engine vllm or sglang or trtllm"):
            recovery(engine(name))


def test_provision_is_added():
    plain, _, _ = ready(Layout(attention_dp=16, ep=16))
    later, _, _ = ready(Layout(attention_dp=16, ep=16), RecoveryChoices(provision="2min"))
    assert later.total_s == pytest.approx(plain.total_s + 120)


# --- commands ---

BASE = ("failures", "mixtral-8x7b-v0.1", "--cluster", "h100-sxm:1x8", "--layout", "tp=4,ep=4,replicas=2")


def test_failures_command(moeplan):
    code, out, _ = moeplan(*BASE, "--json", "--detect", "10s", "--mtbf-gpu", "1000h", "--availability", "99.99%")
    assert code == 0
    facts = json.loads(out)
    assert facts["blast_gpus"] == 4
    assert facts["blast_share"] == 0.5
    assert facts["mttf_replica_s"] == pytest.approx(250 * 3600)
    assert facts["mttr_s"] == pytest.approx(10 + facts["rebuild"]["total_s"])
    share = availability(facts["mttf_replica_s"], facts["mttr_s"])
    assert facts["availability_replica"] == pytest.approx(share)
    assert facts["all_replicas_up"] == pytest.approx(share**2)
    assert facts["replicas_wanted"] == replicas_for(2, share, 0.9999) > 2
    assert facts["spare_nodes"] is None
    assert [s["dead"] for s in facts["survival"]] == [1, 2, 3]
    assert {size["replica_gpus"] for size in facts["sizes"]} >= {4, 8}
    # Each failed GPU takes its replica along, so what is lost grows with the size of a replica.
    lost = [size["capacity_lost"] / size["mttr_s"] / size["replica_gpus"] for size in facts["sizes"]]
    assert np.ptp(lost) / np.mean(lost) < 0.01


def test_failures_text_names_source_and_trade_off(moeplan):
    code, out, _ = moeplan(*BASE, "--repair", "24h", "--rate", "3")
    assert code == 0
    for words in (
        "419 unexpected interruptions",
        "Spare nodes",
        "Other sizes of a replica",
        "Experts with a copy left",
    ):
        assert words in out
    quiet = json.loads(moeplan(*BASE, "--rate", "3", "--json")[1])
    full = json.loads(moeplan(*BASE, "--json")[1])
    assert quiet["in_flight_per_failure"] < full["in_flight_per_failure"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--availability", "100%"), "between 0 and 1"),
        (("--availability", "often"), "give a share"),
        (("--mtbf-gpu", "5"), "give a time with its unit"),
        (("--repair", "0h"), "above 0"),
        (("--rate", "100000"), "Ask for less"),
        (("--detect", "soon"), "give a time with its unit"),
        (("--placement", "nowhere"), "--placement nowhere"),
    ],
)
def test_failures_bad_input(moeplan, options, words):
    code, _, err = moeplan(*BASE, *options)
    assert code == 2
    assert words in err


SCALE = ("scale-out", "mixtral-8x7b-v0.1", "--cluster", "h100-sxm:1x8", "--layout", "tp=4")


def test_scale_out_command(moeplan):
    code, out, _ = moeplan(*SCALE, "--json", "--growth", "60", "--provision", "1min")
    assert code == 0
    facts = json.loads(out)
    assert facts["unit_gpus"] == 4
    assert facts["ready"]["total_s"] == pytest.approx(sum(t["seconds"] for t in facts["ready"]["terms"]))
    assert set(facts["ready_s_by_source"]) == {"nvme", "dram", "network", "peer"}
    assert facts["growth_until_ready_requests_per_s"] == pytest.approx(facts["ready"]["total_s"])
    capacity = facts["capacity_requests_per_s_per_replica"]
    assert facts["reserve_replicas"] == math.ceil(facts["ready"]["total_s"] / capacity)
    assert "whole group of 4 GPUs" in moeplan(*SCALE)[1]


def test_scale_out_bad_input(moeplan):
    for options, words in ((("--growth", "-1"), "above 0"), (("--load-from", "tape"), "use nvme")):
        code, _, err = moeplan(*SCALE, *options)
        assert code == 2
        assert words in err
    code, _, err = moeplan(*SCALE[:-1], "tp=16")
    assert code == 2


def test_a_dead_rank_of_a_pipeline_takes_experts_of_its_stage(moeplan):
    asked = ("failures", "deepseek-v3", "--cluster", "h200-sxm:4x8", "--json", "--layout")
    piped = json.loads(moeplan(*asked, "tp=8,ep=8,pp=2")[1])
    assert piped["num_experts"] == 29 * 256
    assert piped["survival"][0]["lost_experts"] == 29 * 256 / 8
    assert piped["elastic_pause_s"] is None
    wide = json.loads(moeplan(*asked, "attention_dp=16,ep=16,redundant_experts=256", "--engine", "sglang")[1])
    assert wide["ranks_tolerated_elastic"] == 8
    assert wide["elastic_pause_s"] < wide["mttr_s"]
    assert wide["survival"][0]["all_covered"] == 1.0
    assert wide["reload_bytes_per_dead_rank"] == 0
    plain = json.loads(moeplan(*asked, "attention_dp=16,ep=16")[1])
    # Without copies a dead rank's experts are all it holds: 256 / 16 of 58 layers at 44 MB each.
    assert plain["reload_bytes_per_dead_rank"] == pytest.approx(16 * 58 * 3 * 7168 * 2048, rel=0.01)
