"""The `profiles` commands as a user types them, coverage, shapes, and a user's own profile in a plan."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from planner.coverage import Case, coverage_facts, shapes_facts
from planner.engine import engine
from planner.errors import InputError
from planner.hardware import measured_engines, parse_cluster, profile_path
from planner.layout import parse_layout
from planner.measurements.library import measured_directory
from planner.model import load

BAD = Path(__file__).parent / "data" / "known_bad_rows"


@pytest.fixture
def moeplan(moeplan: Any) -> Any:
    return partial(moeplan, "profiles")


def test_check_exits_3_on_faults_and_0_when_clean(moeplan: Any) -> None:
    code, out, _ = moeplan("check", str(BAD / "mi355x"), "--worst", "1")
    assert code == 3 and "3 faults in 3 rows" in out and "2.54 x faster than mi355x allows" in out
    code, out, _ = moeplan("check", "a100-80-sxm", "--json")
    assert code in (0, 3) and json.loads(out)["checked_against"] == "a100-80-sxm"
    code, _, err = moeplan("check", "h201-sxm")
    assert code == 2 and "h200-sxm" in err


def test_compare_writes_a_table_and_a_picture(moeplan: Any, tmp_path: Path) -> None:
    code, out, _ = moeplan("compare", str(BAD / "h100-sxm"), str(BAD / "h100-sxm"), "--out", str(tmp_path / "c"))
    assert code == 0 and "Ratio: time of h100-sxm over time of h100-sxm" in out
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["ratios.csv", "ratios.svg"]
    code, _, err = moeplan("compare", str(BAD / "h100-sxm"), str(BAD / "b200-sxm"))
    assert code == 2 and "no row in common" in err


def test_schema_of_tables_and_of_profiles(moeplan: Any) -> None:
    assert "gemm" in json.loads(moeplan("schema", "--tables")[1])["properties"]
    assert "gpu" in json.loads(moeplan("schema")[1])["properties"]


def test_coverage_shares_add_up_and_rank_what_is_guessed() -> None:
    case = Case(load("mixtral-8x7b"), parse_layout("tp=2"), parse_cluster("h200-sxm:1x2"), engine("vllm"))
    facts = coverage_facts(case)
    origins = ("measured", "interpolated", "extrapolated", "roofline")
    assert facts["total"]["step"] == pytest.approx(1.0, abs=1e-6)
    summed = sum(share["step"] for share in facts["operations"].values())
    assert summed == pytest.approx(1.0, abs=1e-3)
    for share in facts["operations"].values():
        assert sum(share[o] for o in origins) == pytest.approx(share["step"], abs=1e-6)
    assert facts["operations"]["expert_gemm"]["step"] > 0.3, "Mixtral is mostly expert weights"
    settled = [item["would_settle"] for item in facts["next"]]
    assert settled == sorted(settled, reverse=True)
    guessed = facts["total"]["extrapolated"] + facts["total"]["roofline"]
    assert sum(settled) <= guessed + 1e-6


def test_coverage_of_an_unmeasured_gpu_is_all_roofline(moeplan: Any) -> None:
    code, out, _ = moeplan("coverage", "Qwen/Qwen3-30B-A3B", "--gpu", "mi300x", "--layout", "tp=1", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["total"]["roofline"] == pytest.approx(1.0)
    assert facts["next"][0]["op"] == "expert_gemm" and facts["next"][0]["shape"]["hidden"] == 2048
    code, out, _ = moeplan("coverage", "mixtral-8x7b", "--gpu", "h100-sxm")
    assert code == 0 and "Measure next" in out
    code, _, err = moeplan("coverage", "mixtral-8x7b", "--gpu", "h100-sxm", "--layout", "tp=3")
    assert code == 2 and "tp" in err


def test_shapes_for_the_microbenchmark(moeplan: Any, tmp_path: Path) -> None:
    out = tmp_path / "shapes.json"
    code, text, _ = moeplan("shapes", "mixtral-8x7b", "deepseek-ai/DeepSeek-V3", "--out", str(out), "--tp", "1,8")
    written = json.loads(out.read_text())
    assert code == 0 and "python -m microbench" in text
    cases = written["cases"]
    assert cases[0]["op"] == "expert_gemm", "the most informative first"
    assert {"op": "gemm", "fmt": "bf16", "rows": 6144, "cols": 4096} in cases
    assert {"op": "mla_decode", "num_heads": 128, "kv_fmt": "bf16", "gemm_fmt": "kernel"} in cases
    assert all(case.get("fmt", "bf16") in ("bf16", "fp8") for case in cases), "what torch can multiply"
    assert len({json.dumps(case, sort_keys=True) for case in cases}) == len(cases)
    assert moeplan("shapes", "mixtral-8x7b", "--out", str(out), "--tp", "0,2")[0] == 2


def test_shapes_leave_out_what_cannot_be_cut() -> None:
    facts = shapes_facts([load("mixtral-8x7b")], [1, 3], [1], engine("vllm"))
    assert "3" in facts["left_out"]["mistralai/Mixtral-8x7B-v0.1"][0]
    with pytest.raises(InputError, match="no layout"):
        shapes_facts([load("mixtral-8x7b")], [3], [1], engine("vllm"))


def test_a_users_profile_is_found_by_system_name(moeplan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "profiles"
    mine.mkdir()
    text = profile_path("h200-sxm").read_text().replace('name = "h200-sxm"', 'name = "import-test-node"')
    (mine / "import-test-node.toml").write_text(text)
    monkeypatch.setenv("MOEPLAN_PROFILES", str(mine))
    source = tmp_path / "measured"
    source.mkdir()
    (source / "meta.json").write_text('{"device": "GPU", "source": "test", "license": "CC0"}')
    header = "engine,op,num_gpus,bytes,time_us\n"
    (source / "collective.csv").write_text(header + "nccl,all_reduce,8,1048576,44\nnccl,all_reduce,8,134217728,700\n")
    code, out, _ = moeplan("import", str(source), "--name", "import-test-node", "--out", str(mine))
    assert code == 0 and "1 tables, 2 rows" in out
    assert measured_directory("import-test-node") == mine / "import-test-node"
    assert measured_engines("import-test-node") == ("nccl",)
    cluster = parse_cluster("import-test-node:1x8")
    facts = coverage_facts(Case(load("mixtral-8x7b"), parse_layout("tp=8"), cluster, engine("vllm")))
    reduce = facts["operations"]["all_reduce"]
    assert reduce["measured"] + reduce["interpolated"] > 0 and reduce["roofline"] == 0
    assert facts["operations"]["expert_gemm"]["roofline"] > 0
    code, out, _ = moeplan("check", "import-test-node", "--json")
    assert code == 0 and json.loads(out)["clean"]


def test_import_errors_exit_2(moeplan: Any, tmp_path: Path) -> None:
    code, _, err = moeplan("import", str(tmp_path / "none"), "--name", "h200-sxm", "--out", str(tmp_path))
    assert code == 2 and "no such file or folder" in err and "python -m microbench" in err


@pytest.mark.parametrize(
    ("model", "cluster", "layout"),
    [
        ("deepseek-ai/DeepSeek-V3", "h200-sxm:1x8", "attention_dp=8,ep=8"),
        ("openai/gpt-oss-120b", "b200-sxm:1x1", "tp=1"),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", "h100-sxm:1x4", "tp=4"),
    ],
)
def test_coverage_counts_only_the_chosen_look_ups(model: str, cluster: str, layout: str) -> None:
    """The cost model compares kernels and takes the faster; shares of what it took add up to the step."""
    facts = coverage_facts(Case(load(model), parse_layout(layout), parse_cluster(cluster), engine("vllm")))
    assert sum(share["step"] for share in facts["operations"].values()) == pytest.approx(1.0, abs=1e-3)
    assert sum(call["step"] for call in facts["calls"]) < 1.0
