"""Engine profiles as files: versions, profiles of one's own, faults of a file, and the `engines` commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planner import engine as module
from planner.balancer import RANK_ROUTERS
from planner.cost import StepCost
from planner.deployment import deploy, run
from planner.engine import Engine, Limits, engine, engine_tables, engine_text, versions
from planner.enumeration import layouts
from planner.errors import InputError, LayoutError
from planner.hardware import Cluster, parse_cluster
from planner.layout import Layout, parse_layout
from planner.model import ModelConfig
from planner.search import Search
from planner.steady import steady_state
from planner.workload import load_workload, parse_slo
from tests.conftest import Command


@pytest.fixture
def three_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    files = module._files()
    for version in ("0.9.2", "0.33.1", "0.100.0"):
        files["vllm", version] = files["vllm", "0.33.0"] | {"version": version}
    monkeypatch.setattr(module, "_files", lambda: dict(sorted(files.items(), key=lambda f: module._order(f[0][1]))))
    for cached in (module._bundled, module._from_bundle):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (module._bundled, module._from_bundle):
        cached.cache_clear()


@pytest.mark.usefixtures("three_versions")
@pytest.mark.parametrize(
    ("asked", "version"),
    [
        ("vllm", "0.100.0"),
        ("vllm-0.33.0", "0.33.0"),
        ("vllm-0.33", "0.33.1"),
        ("VLLM-0.9", "0.9.2"),
        ("sglang", "0.5.23"),
    ],
)
def test_a_name_is_its_newest_version_by_number(asked: str, version: str) -> None:
    assert engine(asked).version == version


def test_a_version_that_is_not_bundled_names_those_that_are() -> None:
    with pytest.raises(InputError, match=r"'vllm-0\.3': no profile of that version is bundled, there is vllm-0\.33\.0"):
        engine("vllm-0.3")


@pytest.mark.parametrize("name", versions())
def test_what_show_prints_reads_back_as_the_same_profile(name: str, tmp_path: Path) -> None:
    file = tmp_path / "copy.toml"
    file.write_text(engine_text(name))
    assert engine(str(file)) == engine(name)


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    return str(file)


OWN = 'base = "vllm"\nname = "ours"\nversion = "7"\n'


def test_a_profile_on_a_base_changes_only_what_it_says(tmp_path: Path) -> None:
    mine = engine(write(tmp_path, OWN + "block_tokens = 32\n[overheads]\nfrontend_s = 0.5\nfrontend_source = 'ours'\n"))
    vllm = engine("vllm")
    changed = replace(vllm, name="ours", version="7", block_tokens=32)
    assert mine == replace(changed, overheads=replace(vllm.overheads, frontend_s=0.5))
    assert mine.kernels == "vllm"
    shown = write(tmp_path, engine_text(str(tmp_path / "mine.toml")))
    assert engine(shown) == mine
    assert engine_tables(shown)["overheads"]["frontend_source"] == "ours"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN + "block_token = 8\n", r"mine.toml: block_token: unknown key \(did you mean block_tokens"),
        (OWN + "block_tokens = '8'\n", r"mine.toml: block_tokens: Input should be a valid integer \(is \"8\"\)"),
        (OWN + "block_tokens = true\n", r"block_tokens: Input should be a valid integer"),
        (OWN + "kv_fraction = 1.2\n", r"kv_fraction: Input should be less than or equal to 1 \(is 1.2\)"),
        (OWN + "policy = 'fifo'\n", r"policy: Input should be 'mixed' or 'prefill_first' \(is \"fifo\"\)"),
        (OWN + "rank_router = 'best'\n", r"rank_router: Input should be 'least_requests'"),
        (OWN + "[overheads]\nfrontend_s = -1\n", r"overheads.frontend_s: Input should be greater than or equal to 0"),
        (OWN + "[overheads]\nfrontend = 1\n", r"overheads.frontend: unknown key \(did you mean frontend_s"),
        (OWN + "[[budgets]]\nseqs = 1\n", r"budgets.0.seqs: unknown key \(did you mean max_num_seqs"),
        (OWN + "[graphs]\nranges = [[8, 16, 8], [4, 4, 1]]\n", r"graphs: ranges must be runs"),
        (OWN + "capacity_policy = 'new_token_ratio'\n", r"needs the table \[token_ratio\]"),
        (OWN + "block_tokens = 0\nkv_fraction = 0\n", r"(?s)block_tokens: .*\n.*kv_fraction: "),
        (OWN + "[[budgets]]\nmin_hbm_bytes = 9e9\nmax_batched_tokens = 9\nmax_num_seqs = 9\n", r"last row must be for"),
        ('base = "vllm"\n', r"needs its own name and version"),
        ('base = "vlm"\nname = "a"\nversion = "1"\n', r"unknown engine 'vlm'"),
        ('base = "x.toml"\nname = "a"\nversion = "1"\n', r"must name a bundled engine"),
        ('name = "a"\n', r"(?s)version: Field required.*budgets: Field required"),
        ("name = \n", r"not valid TOML"),
    ],
)
def test_faults_of_a_file_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        engine(write(tmp_path, text))


def test_low_latency_exchange_needs_its_rule(tmp_path: Path) -> None:
    text = 'base = "llamacpp"\nname = "a"\nversion = "1"\nmoe_backends = ["deepep"]\n'
    with pytest.raises(InputError, match=r"say in \[dispatch_buffer\]"):
        engine(write(tmp_path, text))


def test_profiles_name_routers_that_exist(vllm: Engine) -> None:
    assert {engine(name).rank_router for name in versions()} <= set(RANK_ROUTERS)
    assert vllm.rank_router == "vllm_score"


def test_offline_usage_takes_its_own_budget(vllm: Engine) -> None:
    offline = replace(vllm, usage="offline")
    assert offline.budget(85e9, "sm90") == Limits(1024, 16384)
    assert offline.budget(24e9) == Limits(256, 8192)
    assert offline.budget(191e9) == vllm.budget(191e9)


@pytest.mark.parametrize("layout", ["tp=4,ep=8,attention_dp=2", "attention_dp=8", "tp=8,ep=8"])
def test_engines_without_expert_parallelism_refuse_it(layout: str, mixtral: ModelConfig, h200: Cluster) -> None:
    backend = "allgather_reducescatter"
    for name in ("generic", "llamacpp"):
        with pytest.raises(LayoutError, match=name):
            deploy(mixtral, h200, parse_layout(layout), engine(name), Limits(4, 512), backend, 1024)


def test_a_deployment_hands_the_profile_to_the_scheduler(mixtral: ModelConfig, h200: Cluster) -> None:
    dp, tp, both = parse_layout("attention_dp=8,ep=8"), parse_layout("tp=8"), "allgather_reducescatter"
    spec = {
        (name, layout): deploy(mixtral, h200, layout, engine(name), Limits(64, 4096), both, 1024).spec(1)
        for name, layout in (("vllm", dp), ("vllm", tp), ("sglang", dp), ("trtllm", dp), ("llamacpp", tp))
    }
    assert spec["vllm", dp].rank_router == "vllm_score"
    assert spec["vllm", tp].rank_router == ""
    assert spec["sglang", dp].rank_router == "round_robin"
    assert spec["sglang", dp].token_ratio == engine("sglang").token_ratio
    optimistic = replace(engine("sglang"), capacity_policy="max_utilization")
    assert deploy(mixtral, h200, dp, optimistic, Limits(64, 4096), both, 1024).spec(1).token_ratio is None
    assert spec["trtllm", dp].prefill_balance == engine("trtllm").prefill_balance
    assert spec["trtllm", dp].admission_reserve == 1.0
    slots = spec["llamacpp", tp]
    assert slots.max_request_tokens == slots.block_tokens == slots.kv_tokens_per_rank // 64
    assert slots.kv_blocks_per_rank >= 64


def test_requests_beyond_a_slot_are_refused(moeplan: Command) -> None:
    layout = ("simulate", "mixtral-8x7b", "--cluster", "h100-sxm:1x2", "--layout", "tp=2", "--max-num-seqs", "64")
    code, _, err = moeplan(*layout, "--workload", "fixed:12000/100", "--num-requests", "8", "--engine", "llamacpp")
    assert (code, "a slot of the pool holds" in err) == (3, True)
    assert moeplan(*layout, "--workload", "fixed:12000/100", "--num-requests", "8", "--engine", "generic")[0] == 0


def test_plans_of_engines_without_expert_parallelism_have_none(mixtral: ModelConfig, h200: Cluster) -> None:
    for name in ("generic", "llamacpp"):
        found = list(layouts(mixtral, h200, engine(name)))
        assert found
        assert all(layout.ep == layout.attention_dp == 1 for layout in found)
    assert any(layout.ep > 1 for layout in layouts(mixtral, h200, engine("vllm")))


def test_plans_keep_a_slot_for_the_longest_request(mixtral: ModelConfig) -> None:
    cluster, workload = parse_cluster("h100-sxm:1x2"), load_workload("fixed:12000/100", rate=0.1)
    found = Search(cluster, engine("llamacpp"), workload, parse_slo("ttft_p95=60s,tpot_p95=1s")).run([mixtral])
    kept = [candidate.deployment for candidate in found.survivors]
    assert kept
    assert all(d.memory.kv_tokens // d.limits.max_num_seqs >= 12_100 for d in kept)
    assert found.rejected["KV cache below one request"]


def test_micro_batches_count_in_time_estimates_and_memory(mixtral: ModelConfig) -> None:
    cluster, layout, limits = parse_cluster("h100-sxm:1x4"), Layout(tp=4, moe_tp=4), Limits(4, 2048)
    workload = load_workload("fixed:2048/2", concurrency=1, num_requests=4)
    whole = replace(engine("llamacpp"), ubatch_tokens=0)
    ttft_s, estimate_s, activations = [], [], []
    for profile in (engine("llamacpp"), whole):
        deployment = deploy(mixtral, cluster, layout, profile, limits, "all_reduce", 2049)
        ttft_s.append(run(deployment, workload).summary.ttft_s.mean)
        estimate_s.append(steady_state(deployment.cost(), 2048, profile.policy, workload).prefill_s[0])
        activations.append(deployment.memory.terms["activations"])
    assert ttft_s[0] > 1.1 * ttft_s[1]
    assert estimate_s[0] > 1.1 * estimate_s[1]
    assert activations[0] < activations[1]


def test_kernels_of_others_are_no_measurements(mixtral: ModelConfig) -> None:
    cluster, layout = parse_cluster("h100-sxm:1x4"), Layout(tp=4, moe_tp=4)
    share = {
        name: StepCost(mixtral, layout, cluster, engine(name)).decode(np.array(64.0), np.array(1000.0)).origin_share()
        for name in ("vllm", "generic")
    }
    assert share["generic"]["extrapolated"] > 0.8 > 0.2 > share["vllm"]["extrapolated"]


def test_the_command_lists_engines(moeplan: Command) -> None:
    code, out, _ = moeplan("engines")
    assert code == 0
    for word in ("0.33.0", "2026-11-22", "prefill first", "guaranteed no evict", "vllm score", "one slot each"):
        assert word in out
    assert moeplan("engines", "list")[1] == out
    rows = json.loads(moeplan("engines", "--json")[1])
    assert [row["name"] for row in rows] == ["generic", "llamacpp", "sglang", "trtllm", "vllm"]


def test_the_command_shows_a_profile(moeplan: Command) -> None:
    assert 'rank_router = "vllm_score"' in moeplan("engines", "show", "vllm-0.33.0")[1]
    assert json.loads(moeplan("engines", "show", "sglang", "--json")[1])["token_ratio"]["start"] == 0.7
    code, _, err = moeplan("engines", "show", "vllmm")
    assert (code, "did you mean" in err and "vllm?" in err) == (2, True)


@pytest.mark.parametrize("asked", ["vlm", "vllm-9", "gone.toml"])
def test_commands_refuse_unknown_engines(asked: str, moeplan: Command) -> None:
    code, _, err = moeplan("fit", "mixtral-8x7b", "--gpu", "h100-sxm", "--engine", asked)
    assert code == 2
    assert asked in err


def test_commands_take_a_file(moeplan: Command, tmp_path: Path) -> None:
    mine = write(tmp_path, OWN + "kv_fraction = 0.5\n")
    arguments = ("fit", "mixtral-8x7b", "--gpu", "h100-sxm", "--num-gpus", "4", "--json", "--engine")
    ours, theirs = (json.loads(moeplan(*arguments, name)[1]) for name in (mine, "vllm-0.33.0"))
    assert ours["engine"] == "ours 7"
    assert ours["kv_tokens"] < 0.5 * theirs["kv_tokens"]
