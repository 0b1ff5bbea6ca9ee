"""`moeplan experts` and the expert options of `plan` and `simulate`, as a user types them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def words(text: str) -> list[str]:
    return text.split()


SIMULATE = words(
    "simulate qwen3-30b-a3b --cluster h200-sxm:1x4 --layout attention_dp=4,ep=4 --workload "
    "fixed:512/32 --concurrency 64 --num-requests 200"
)


def counts_file(path: Path, num_experts: int = 16, layers: int = 2, seed: int = 0) -> Path:
    loads = np.exp(0.7 * np.random.default_rng(seed).standard_normal((layers, num_experts))) * 1000
    rows = [(i, e, int(n)) for i, row in enumerate(loads) for e, n in enumerate(row)]
    path.write_text("layer,expert,assignments\n" + "".join(f"{i},{e},{n}\n" for i, e, n in rows))
    return path


def test_place_promises_its_keys(moeplan: Any, tmp_path: Path) -> None:
    counts = counts_file(tmp_path / "counts.csv")
    arguments = ("experts", "place", str(counts), "--ranks", "4", "--nodes", "2", "--redundant", "4")
    code, out, _ = moeplan(*arguments, "--policy", "greedy", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["max_over_mean_before"] > facts["max_over_mean_after"] >= facts["bound"] >= 1
    assert np.shape(facts["placement"]) == (2, 20)
    assert all(set(row) == set(range(16)) for row in facts["placement"])
    code, out, _ = moeplan(*arguments)
    assert code == 0 and "of perfect balance" in out


def test_drops_promise_their_keys_and_the_table_of_capacities(moeplan: Any) -> None:
    code, out, _ = moeplan(
        *words("experts drops --experts 64 --top-k 2 --tokens 1000 --capacity-factor 1.25 --rule mesh-tf --json")
    )
    facts = json.loads(out)
    assert code == 0 and facts["capacity"] == 19  # handbook serving 4.2
    assert 0 < facts["fully_dropped_rate"] < facts["drop_rate"] < 1
    assert 0 < facts["slot_utilisation"] <= 1


def test_inspect_shows_skew_and_names_the_law(moeplan: Any, tmp_path: Path) -> None:
    counts = counts_file(tmp_path / "counts.csv", 64, 8)
    code, out, _ = moeplan("experts", "inspect", str(counts))
    assert code == 0 and "log-normal" in out and "EP8" in out
    code, out, _ = moeplan("experts", "inspect", str(counts), "--json")
    assert code == 0 and json.loads(out)["law"]["skew"].startswith("lognormal:")


def test_residency_ranks_policies(moeplan: Any) -> None:
    code, out, _ = moeplan(
        *words("experts residency qwen3-30b-a3b --gpu rtx-4090 --dram 128GB --policy cpu-layers --json")
    )
    facts = json.loads(out)
    assert code == 0 and [row["policy"] for row in facts["policies"]] == ["cpu-layers"]
    assert 5 < facts["policies"][0]["decode_tok_per_s"] < 60


def test_a_record_is_a_skew_and_steps_carry_what_the_router_did(moeplan: Any, tmp_path: Path) -> None:
    counts = counts_file(tmp_path / "counts.csv", 128, 48)
    out_folder = tmp_path / "run"
    code, out, _ = moeplan(*SIMULATE, "--skew", str(counts), "--out", str(out_folder), "--json")
    facts = json.loads(out)["experts"]
    assert code == 0 and facts["skew"] == str(counts) and facts["max_over_mean_decode"] > 1.05
    with (out_folder / "steps.csv").open() as file:
        row = next(csv.DictReader(file))
    assert {"max_over_mean", "active_experts", "drop_rate", "fully_dropped_rate", "hit_rate", "miss_bytes"} <= set(row)


def test_expert_options_change_the_run(moeplan: Any) -> None:
    tpot = {}
    for name, options in {
        "contiguous": "",
        "eplb": "--placement eplb",
        "drops": "--capacity-factor 1 --capacity-rule megatron",
        "fewer": "--top-k 4~1",
    }.items():
        code, out, _ = moeplan(*SIMULATE, "--skew", "zipf:1", *options.split(), "--json")
        facts = json.loads(out)
        assert code == 0
        tpot[name] = facts["tpot_s"]["mean"]
        assert (facts["experts"]["drop_rate"] > 0) == (name == "drops")
        assert any("RED" in warning for warning in facts["warnings"]) == (name == "drops")
    assert min(tpot["eplb"], tpot["drops"], tpot["fewer"]) < tpot["contiguous"]


def test_capacity_limited_models_drop_by_default(moeplan: Any) -> None:
    arguments = words(
        "simulate google/switch-base-64 --cluster h100-sxm:1x1 --layout tp=1 --workload "
        "fixed:256/32 --concurrency 16 --num-requests 60 --skew lognormal:0.6 --json"
    )
    _, out, _ = moeplan(*arguments)
    facts = json.loads(out)["experts"]
    assert (facts["capacity_rule"], facts["capacity_factor"]) == ("mesh-tf", 2.0)
    _, out, _ = moeplan(*arguments, "--capacity-factor", "off")
    assert json.loads(out)["experts"]["capacity_rule"] is None
    _, out, _ = moeplan(*arguments, "--capacity-factor", "0.5")
    assert json.loads(out)["experts"]["drop_rate"] > 0.2


def test_a_plan_for_a_model_that_does_not_fit_offers_residency(moeplan: Any) -> None:
    arguments = words(
        "plan qwen3-30b-a3b --cluster rtx-4090:1x1 --workload fixed:500/50 --concurrency 1 "
        "--num-requests 30 --slo tpot_p95=1s,ttft_p95=10s --dram 128GB"
    )
    code, out, _ = moeplan(*arguments, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["feasible"] and facts["meets_slo"]
    policies = {row["policy"]: row["decode_tok_per_s"] for row in facts["residency"][0]["policies"]}
    assert {"lru", "cpu", "cpu-layers", "stream", "static-hot", "prefetch"} <= set(policies)
    assert "experts in HBM" in facts["headline"]
    assert any(step.startswith("To hold all experts in HBM") for step in facts["next"])
    assert any("HBM by" in warning for warning in facts["warnings"])


def test_plan_weighs_placements_of_the_winner(moeplan: Any) -> None:
    code, out, _ = moeplan(
        *words("plan deepseek-v2-lite --cluster h200-sxm:1x8 --workload fixed:2000/100 --concurrency 512"),
        *["--num-requests", "600", "--slo", "tpot_p95=200ms,ttft_p95=60s", "--skew", "zipf:0.8", "--json"],
    )
    facts = json.loads(out)
    assert code == 0
    if facts["balance"] is not None:
        options = facts["balance"]["options"]
        assert options[0]["gain"] == 0 and {"eplb"} == {o["placement"] for o in options[1:]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--skew mixd", "mixed"),
        ("--skew lognormal:9", "not a number from 0 to 3"),
        ("--skew nowhere.csv", "nowhere.csv"),
        ("--placement epbl", "eplb"),
        ("--capacity-factor 0", "capacity factor 0"),
        ("--capacity-factor lots", "a number such as 1.25"),
        ("--capacity-factor 1 --capacity-rule swich", "unknown"),
        ("--capacity-rule mesh-tf", "needs --capacity-factor"),
        ("--top-k 200", "from 1 to 128"),
        ("--top-k 4~x", "not a number"),
        ("--rebalance-steps 10", "ignores load"),
        ("--rebalance-async --placement eplb", "--rebalance-steps"),
        ("--top-k 6~99", "at most half"),
        ("--placement exact", "experts place --policy exact"),
        ("--placement nowhere.json", "nowhere.json"),
        ("--drift-half-life 0 --placement eplb", "1 step or more"),
        ("--residency lur --dram 1TB", "lru"),
        ("--dram 128", "with its unit"),
        ("--gpus-per-root 0", "positive"),
    ],
)
def test_bad_expert_options_get_one_message(moeplan: Any, options: str, said: str) -> None:
    code, out, err = moeplan(*SIMULATE, *options.split())
    assert code == 2 and out == "" and said in err and len(err.strip().splitlines()) == 1


def test_records_of_another_model_or_broken_ones_are_refused(moeplan: Any, tmp_path: Path) -> None:
    code, _, err = moeplan(*SIMULATE, "--skew", str(counts_file(tmp_path / "few.csv", 64, 48)))
    assert code == 2 and "64 experts" in err and "128" in err
    broken = tmp_path / "broken.csv"
    broken.write_text("layer,expert,assignments\n0,0,5\n0,1,-3\n")
    code, _, err = moeplan("experts", "place", str(broken), "--ranks", "2")
    assert code == 2 and "-3" in err
    counts = counts_file(tmp_path / "counts.csv")
    code, _, err = moeplan("experts", "place", str(counts), "--ranks", "4", "--redundant", "3")
    assert code == 2 and "4 redundant" in err
    missing = tmp_path / "placement.json"
    missing.write_text(json.dumps([[0] * 16, list(range(16))]))
    code, _, err = moeplan("experts", "place", str(counts), "--ranks", "4", "--policy", str(missing))
    assert code == 2 and "expert 1" in err
    code, _, err = moeplan(
        *words("simulate openai/gpt-oss-120b --cluster rtx-5090:1x1 --layout tp=1 --rate 1 --num-requests 10"),
        *["--max-num-seqs", "4", "--max-batched-tokens", "2048", "--residency", "cpu", "--dram", "16GB"],
    )
    assert code == 3 and "--dram" in err and "16.0 GB" in err


def test_a_placement_file_is_served_by_the_layout_it_was_made_for(moeplan: Any, tmp_path: Path) -> None:
    counts = counts_file(tmp_path / "counts.csv", 128, 48)
    file = tmp_path / "placed.csv"
    place = ("experts", "place", str(counts), "--ranks", "4", "--policy", "greedy", "--out", str(file))
    assert moeplan(*place, "--format", "csv")[0] == 0
    loads = {}
    for placement in ("contiguous", str(file)):
        code, out, _ = moeplan(*SIMULATE, "--skew", str(counts), "--placement", placement, "--json")
        assert code == 0
        loads[placement] = json.loads(out)["experts"]["max_over_mean_decode"]
    assert loads[str(file)] < loads["contiguous"]
    plan = words("plan qwen3-30b-a3b --cluster h200-sxm:1x4 --rate 1 --placement")
    code, _, err = moeplan(*plan, str(file))
    assert code == 2 and "a file fits one layout" in err


def test_sglang_with_deepep_starts_within_its_buffer(moeplan: Any) -> None:
    arguments = [*SIMULATE, "--engine", "sglang", "--backend", "deepep", "--json"]
    code, out, _ = moeplan(*arguments)
    assert code == 0 and json.loads(out)["settings"]["max_num_seqs"] == 128
    code, _, err = moeplan(*arguments, "--max-num-seqs", "200")
    assert code == 3 and "dispatch buffer of sglang (128)" in err and "--max-num-seqs 128" in err
