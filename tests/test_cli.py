"""Every command as a user types it: exit codes, JSON keys scripts rely on, one message for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PLAN = [
    "plan",
    "mixtral-8x7b",
    "--cluster",
    "h100-sxm:1x4",
    "--workload",
    "fixed:512/64",
    "--rate",
    "2",
    "--num-requests",
    "100",
]


def test_describe_json_has_the_promised_keys(moeplan: Any) -> None:
    code, out, _ = moeplan("describe", "mistralai/Mixtral-8x7B-v0.1", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["total_params"] == 46_702_792_704
    assert facts["active_params_with_embeddings"] == 12_879_925_248
    assert facts["active_params_without_embeddings"] == 12_617_781_248
    assert facts["kv_bytes_per_token"] == 131_072
    assert facts["weight_bytes"] == 93_405_585_408
    assert (facts["num_layers"], facts["num_moe_layers"], facts["num_experts"], facts["top_k"]) == (32, 32, 8, 2)


def test_fit_json_has_the_promised_keys(moeplan: Any) -> None:
    code, out, _ = moeplan("fit", "deepseek-ai/DeepSeek-V3", "--gpu", "h100-sxm", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["fits"] and facts["num_gpus_min"] == 16
    assert facts["kv_tokens"] > 0 and facts["breaking_term"] in facts["bytes_per_gpu"]
    assert sum(facts["bytes_per_gpu"].values()) == pytest.approx(facts["capacity_bytes"])


def test_fit_that_fails_exits_3_and_names_the_term(moeplan: Any) -> None:
    code, out, _ = moeplan("fit", "deepseek-v3", "--gpu", "h100-sxm", "--num-gpus", "8")
    assert code == 3 and "does not fit on 8 x h100-sxm" in out and "breaks it" in out


def test_plan_json_has_the_promised_keys_and_writes_the_same_run_twice(moeplan: Any, tmp_path: Path) -> None:
    outputs = []
    for name in ("first", "second"):
        code, out, _ = moeplan(*PLAN, "--json", "--out", str(tmp_path / name))
        assert code == 0
        outputs.append(json.loads(out))
    facts = outputs[0]
    assert facts["feasible"] and facts["meets_slo"] and facts["cluster"] == "h100-sxm:1x4"
    assert {"tp", "pp", "ep", "attention_dp", "moe_tp", "replicas", "num_gpus"} <= set(facts["layout"])
    for metric in ("ttft_s", "tpot_s"):
        assert {"mean", "p50", "p95", "p99"} <= set(facts[metric])
    for key in ("output_tok_per_s", "output_tok_per_s_per_gpu", "usd_per_mtok_output", "wall_s"):
        assert facts[key] > 0
    assert set(facts["origin_share"]) == {"measured", "interpolated", "extrapolated", "roofline"}
    assert sum(facts["rejected"].values()) < facts["considered"]
    files = sorted(p.name for p in (tmp_path / "first").iterdir())
    assert files == [
        "inputs.json",
        "layouts.csv",
        "manifest.json",
        "plan.json",
        "report.html",
        "report.md",
        "requests.csv",
    ]
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_plan_never_overwrites_a_run(moeplan: Any, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    code, _, err = moeplan(*PLAN, "--out", str(tmp_path))
    assert code == 2 and "is not empty" in err
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]
    code, _, err = moeplan(*PLAN, "--out", str(tmp_path / "no" / "parent"))
    assert code == 2 and "does not exist" in err


def test_plan_that_cannot_fit_exits_3_with_remedies(moeplan: Any) -> None:
    code, out, _ = moeplan("plan", "deepseek-v3", "--cluster", "h100-sxm:1x8", "--rate", "1")
    assert code == 3 and "does not fit on h100-sxm:1x8" in out.splitlines()[0]
    assert "What would make it work, cheapest first" in out and "16 GPUs of h100-sxm" in out


def test_plan_offers_several_clusters(moeplan: Any) -> None:
    code, out, _ = moeplan(*PLAN, "--cluster", "l40s:1x2", "--json")
    assert code == 0 and "l40s:1x2" in json.loads(out)["question"]["clusters"]


def test_simulate_json_has_the_promised_keys(moeplan: Any, tmp_path: Path) -> None:
    arguments = ["simulate", "gpt-oss-120b", "--cluster", "h100-sxm:1x8", "--layout", "tp=8,ep=8", "--workload", "chat"]
    code, out, _ = moeplan(*arguments, "--rate", "5", "--num-requests", "120", "--json", "--out", str(tmp_path / "run"))
    facts = json.loads(out)
    assert code == 0 and facts["num_requests"] == 120
    for key in ("num_steps", "simulated_s", "wall_s", "output_tok_per_s", "output_tok_per_s_per_gpu"):
        assert facts[key] > 0
    assert facts["ttft_s"]["p95"] >= facts["ttft_s"]["p50"] > 0
    rows = (tmp_path / "run" / "requests.csv").read_text().splitlines()
    assert len(rows) == 121 and rows[0].startswith("arrival_s,")


def test_an_oversubscribed_network_slows_what_crosses_nodes(moeplan: Any) -> None:
    arguments = ["simulate", "deepseek-v3", "--cluster", "h200-sxm:2x8", "--layout", "attention_dp=16,ep=16", "--json"]
    arguments += ["--workload", "fixed:8192/8", "--rate", "1", "--num-requests", "60", "--no-rails"]
    full, thin = (json.loads(moeplan(*arguments, *extra)[1]) for extra in ([], ["--oversubscription", "4"]))
    assert thin["ttft_s"]["mean"] > 1.05 * full["ttft_s"]["mean"]
    code, _, err = moeplan(*arguments, "--oversubscription", "0.5")
    assert code == 2 and "--oversubscription 0.5" in err


def test_json_says_null_where_nothing_was_measured(moeplan: Any) -> None:
    arguments = ["simulate", "qwen3-30b-a3b", "--cluster", "h100-sxm:1x2", "--layout", "tp=2", "--rate", "1e6"]
    code, out, _ = moeplan(*arguments, "--num-requests", "50", "--workload", "fixed:64/1", "--json")
    assert code == 0 and json.loads(out)["tpot_s"]["mean"] is None


def test_profiles_list_show_and_schema(moeplan: Any) -> None:
    _, out, _ = moeplan("profiles", "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert len(rows) >= 25 and rows["h200-sxm"]["measured"] and not rows["mi300x"]["measured"]
    assert set(rows["h200-sxm"]["engines"]) == {"vllm", "sglang", "trtllm"} and rows["mi300x"]["vendor"] == "AMD"
    _, out, _ = moeplan("profiles", "show", "h200-sxm")
    assert "gpu.hbm_bytes" in out and "Measured" in out
    _, out, _ = moeplan("profiles", "schema")
    assert json.loads(out)["properties"]
    _, out, _ = moeplan("profiles", "list")
    assert "gb300-nvl72" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["describe", "mixtral-8x7x"], ["mixtral-8x7x", "did you mean"]),
        (["plan", "mixtral-8x7b", "--cluster", "h20-sxm:8"], ["h20-sxm", "did you mean"]),
        (["plan", "mixtral-8x7b", "--cluster", "h200-sxm:2x8x3"], ["2x8x3"]),
        (["plan", "mixtral-8x7b", "--cluster", "h200-sxm:8", "--slo", "ttft_p95=2"], ["no unit", "2s"]),
        (["plan", "mixtral-8x7b", "--cluster", "h200-sxm:8", "--rate", "-1"], ["-1", "positive"]),
        (["plan", "mixtral-8x7b", "--cluster", "h200-sxm:8", "--rate", "nan"], ["nan"]),
        (["plan", "mixtral-8x7b", "--cluster", "h200-sxm:8", "--workload", "chta"], ["chta", "chat"]),
        (["plan", "mixtral-8x7b", "--cluster", "h200-sxm:8", "--cluster", "h200-sxm:8"], ["twice"]),
        (["plan", "mixtral-8x7b", "--cluster", "h200-sxm:8", "--weights", "fp3"], ["fp3"]),
        (["plan", "mixtral-8x7b", "--cluster", "h200-sxm:8", "--skew", "wild"], ["wild"]),
        (
            ["simulate", "deepseek-v3", "--cluster", "h200-sxm:3x8", "--layout", "attention_dp=24,ep=24"],
            ["ep=24", "256", "16 or 32"],
        ),
        (
            ["simulate", "deepseek-v3", "--cluster", "h200-sxm:8", "--layout", "tp=8,ep=8", "--max-num-seqs", "0"],
            ["--max-num-seqs 0"],
        ),
        (["fit", "mixtral-8x7b", "--gpu", "h100-sxm", "--engine", "vlm"], ["vlm", "vllm"]),
        (["plna"], ["plna", "plan"]),
    ],
)
def test_bad_input_gets_one_message_with_value_and_remedy(moeplan: Any, arguments: list[str], words: list[str]) -> None:
    code, out, err = moeplan(*arguments)
    assert code == 2 and out == "" and err.startswith("moeplan: ")
    for word in words:
        assert word in err


def test_bad_files(moeplan: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,10\nnan,100,10\n")
    code, _, err = moeplan("plan", "mixtral-8x7b", "--cluster", "h200-sxm:8", "--workload", str(trace))
    assert code == 2 and "nan" in err.lower()
    trace.write_text("arrival_s,prompt_tokens\n0,100\n")
    code, _, err = moeplan("plan", "mixtral-8x7b", "--cluster", "h200-sxm:8", "--workload", str(trace))
    assert code == 2 and "output_tokens" in err
    config = tmp_path / "config.json"
    config.write_text("[1, 2]")
    code, _, err = moeplan("describe", str(config))
    assert code == 2 and "object" in err
    config.write_text("{" + " " * 50_000_000 + "}")
    code, _, err = moeplan("describe", str(config))
    assert code == 2 and "50,000,002 bytes" in err
    profile = tmp_path / "mine.toml"
    profile.write_text('name = "mine"\nhbm_byts = 3\n')
    code, _, err = moeplan("plan", "mixtral-8x7b", "--cluster", f"{profile}:1x8")
    assert code == 2 and "hbm_byts" in err
