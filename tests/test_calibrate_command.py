"""The command `calibrate`: a handful of runs of one's own servers, and what can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from planner.calibration import NEUTRAL, OFF, calibrations, shipped
from planner.validation import read_points, validate

Command = Callable[..., tuple[int, str, str]]
HEADER = "id,model,gpu,engine,precision,num_gpus,tp,moe_ep,isl,osl,lengths,concurrency"
RUNS = [
    f"{name},openai/gpt-oss-20b,H100,{{engine}},,1,1,1,{isl},32,uniform_0.8_1.0,{users}"
    for name, isl, users in (("a", 512, 1), ("b", 512, 4), ("c", 512, 12), ("d", 128, 8))
]
FEW = "experts,layer_s,frontend_s"


def write(path: Path, rows: list[str], header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def measured(path: Path, engine: str = "vllm", factor: float = 1.3, metrics: tuple[int, ...] = (0, 1)) -> Path:
    """The runs as measured on a server that takes `factor` times what is predicted."""
    source = read_points(write(path, [row.format(engine=engine) for row in RUNS]))
    names = ("ttft_mean_ms", "tpot_mean_ms")
    rows = [
        ",".join([*row.fields.values(), *(f"{prediction.values[i] * factor:.4f}" for i in metrics)])
        for row, prediction in validate(source).pairs
    ]
    return write(path, rows, ",".join([HEADER, *(names[i] for i in metrics)]))


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured(tmp_path_factory.mktemp("points") / "mine.csv")


def test_a_handful_of_runs_takes_most_of_the_error_away(moeplan: Command, mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    code, text, _ = moeplan("calibrate", "--points", str(mine), "--parameters", FEW, "--out", str(out), "--json")
    facts = json.loads(text)
    assert code == 0 and facts["out"] == str(out) and facts["source"] == "mine.csv"
    assert [error["metric"] for error in facts["errors"]] == ["ttft_mean_ms", "tpot_mean_ms"]
    for error in facts["errors"]:
        assert error["before"]["median_pct"] == pytest.approx(23.08, abs=0.1)  # 1 - 1 / 1.3
        assert error["calibrated"]["median_pct"] < 6 and error["n"] == 4 and error["left_out"] is None
    (entry,) = facts["entries"]
    assert (entry["engine"], entry["generation"], entry["num_points"]) == ("vllm", "hopper", 4)
    assert {row["name"] for row in entry["parameters"] if row["moved"]} == set(FEW.split(","))

    found = calibrations(str(out))
    assert found.command == f"moeplan calibrate --points {mine} --parameters {FEW}"
    assert found.error("tpot_mean_ms", "moe") is not None and found.error("tpot_mean_ms", "dense") is None
    kept = {(e.engine, e.generation): e for e in shipped().entry if (e.engine, e.generation) != ("vllm", "hopper")}
    assert {(e.engine, e.generation): e for e in found.entry if (e.engine, e.generation) in kept} == kept


def test_the_text_says_what_changed_and_how_to_use_it(moeplan: Command, mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    code, text, _ = moeplan("calibrate", "--points", str(mine), "--parameters", FEW, "--out", str(out))
    assert code == 0
    for line in ("vllm on hopper GPUs: 4 points of 1 model, GPU and engine", f"use it with --calibration {out}"):
        assert line in text
    assert "gemm" not in text and "frontend_s" in text and "ms" in text
    assert "Not written" in moeplan("calibrate", "--points", str(mine), "--parameters", "experts")[1]


def test_simulations_use_the_file(moeplan: Command, mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    assert moeplan("calibrate", "--points", str(mine), "--parameters", FEW, "--out", str(out))[0] == 0
    run = ["gpt-oss-20b", "--cluster", "h100-sxm:1x1", "--layout", "tp=1", "--concurrency", "4", "--json"]
    tpot_s = [
        json.loads(moeplan("simulate", *run, "--num-requests", "100", *options)[1])["tpot_s"]["mean"]
        for options in (["--calibration", "off"], [], ["--calibration", str(out)])
    ]
    assert tpot_s == sorted(tpot_s)
    assert tpot_s[2] / tpot_s[1] == pytest.approx(1.3, rel=0.1)


def test_a_second_calibration_starts_from_the_first(moeplan: Command, mine: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    assert moeplan("calibrate", "--points", str(mine), "--parameters", FEW, "--out", str(first))[0] == 0
    arguments = ["--points", str(mine), "--parameters", FEW, "--start", str(first), "--out", str(second), "--json"]
    code, text, _ = moeplan("calibrate", *arguments)
    before = {error["metric"]: error["before"]["median_pct"] for error in json.loads(text)["errors"]}
    assert code == 0 and before["tpot_mean_ms"] < 6


def test_runs_as_predicted_move_nothing(moeplan: Command, tmp_path: Path) -> None:
    path = measured(tmp_path / "same.csv", factor=1.0)
    code, text, _ = moeplan("calibrate", "--points", str(path), "--parameters", FEW)
    assert code == 0 and "nothing moved" in text


@pytest.mark.parametrize("engine", ["sglang", "trtllm", "llamacpp"])
def test_other_engines_too(moeplan: Command, tmp_path: Path, engine: str) -> None:
    path = measured(tmp_path / "mine.csv", engine)
    code, text, _ = moeplan("calibrate", "--points", str(path), "--parameters", FEW, "--json")
    facts = json.loads(text)
    assert code == 0 and facts["entries"][0]["engine"] == engine
    for error in facts["errors"]:
        assert error["calibrated"]["median_pct"] < 0.5 * error["before"]["median_pct"]


@pytest.mark.parametrize("metric", [0, 1])
def test_one_measured_latency_is_enough(moeplan: Command, tmp_path: Path, metric: int) -> None:
    path = measured(tmp_path / "mine.csv", metrics=(metric,))
    code, text, _ = moeplan("calibrate", "--points", str(path), "--parameters", "experts,layer_s", "--json")
    (error,) = json.loads(text)["errors"]
    assert code == 0 and error["calibrated"]["median_pct"] < error["before"]["median_pct"]


def test_equal_runs_give_equal_files(moeplan: Command, mine: Path, tmp_path: Path) -> None:
    written = []
    for name in ("a.toml", "b.toml"):
        assert moeplan("calibrate", "--points", str(mine), "--parameters", FEW, "--out", str(tmp_path / name))[0] == 0
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]


def test_points_that_cannot_be_predicted_do_not_count(moeplan: Command, mine: Path, tmp_path: Path) -> None:
    """Throughput is measured of one run only, and that one cannot be predicted."""
    header, *rows = mine.read_text(encoding="utf-8").splitlines()
    odd = rows[0].replace("vllm", "nosuchengine") + ",500"
    path = write(tmp_path / "odd.csv", [*(row + "," for row in rows), odd], header + ",output_tok_s_per_gpu")
    code, text, _ = moeplan("calibrate", "--points", str(path), "--parameters", FEW, "--json")
    assert code == 0
    assert [(e["metric"], e["n"]) for e in json.loads(text)["errors"]] == [("ttft_mean_ms", 4), ("tpot_mean_ms", 4)]


# --- from scratch ---


def test_from_scratch_is_judged_on_what_was_left_out(moeplan: Command, tmp_path: Path) -> None:
    """Three models on a server with 0.4 ms of host time per step and 0.2 s of front end."""
    truth = replace(NEUTRAL, step_s=4e-4, frontend_s=0.2)
    slow = replace(OFF, entry=tuple(replace(e, values=truth) for e in shipped().entry))
    models = ("openai/gpt-oss-20b", "Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B")
    rows = [row.format(engine="vllm").replace("openai/gpt-oss-20b", model) for model in models for row in RUNS]
    source = read_points(write(tmp_path / "points.csv", rows))
    lines = [
        ",".join([*row.fields.values(), *map(str, prediction.values[:2])])
        for row, prediction in validate(source, calibrations=slow).pairs
    ]
    path = write(tmp_path / "points.csv", lines, HEADER + ",ttft_mean_ms,tpot_mean_ms")
    out = tmp_path / "own.toml"
    code, text, _ = moeplan("calibrate", "--points", str(path), "--from-scratch", "--out", str(out), "--json")
    facts = json.loads(text)
    assert code == 0
    for error in facts["errors"]:
        assert error["before"] == error["uncalibrated"]
        assert error["calibrated"]["median_pct"] < error["left_out"]["median_pct"] < error["before"]["median_pct"]
    found = calibrations(str(out))
    assert {(e.engine, e.generation) for e in found.entry} == {("vllm", "any"), ("vllm", "hopper")}
    assert found.of("sglang", "sm90") == NEUTRAL
    assert found.of("vllm", "sm90").frontend_s == pytest.approx(0.2, rel=0.3)
    assert found.error("tpot_mean_ms", "dense") is not None


# --- what can be wrong ---


def refused(moeplan: Command, message: str, *arguments: str) -> None:
    code, out, err = moeplan("calibrate", *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split()), err


def test_faulty_choices_are_refused(moeplan: Command, mine: Path, tmp_path: Path) -> None:
    points = ("--points", str(mine))
    refused(moeplan, "8 measurements (TPOT and TTFT) cannot fit 12 parameters", *points)
    refused(moeplan, "such as --parameters experts,layer_s,frontend_s", *points)
    refused(moeplan, "--parameters exprts: did you mean experts", *points, "--parameters", "exprts")
    refused(moeplan, "exclude each other: give one", *points, "--start", "off", "--from-scratch")
    refused(moeplan, "from scratch all are fitted", *points, "--from-scratch", "--parameters", "experts")
    refused(moeplan, "--start nonsense: off, or a .toml", *points, "--start", "nonsense")
    refused(moeplan, "none.toml", *points, "--start", str(tmp_path / "none.toml"))


def test_a_file_that_cannot_be_written_is_refused_before_the_work(moeplan: Command, mine: Path, tmp_path: Path) -> None:
    points = ("--points", str(mine), "--parameters", FEW)
    there = tmp_path / "there.toml"
    there.write_text("mine", encoding="utf-8")
    refused(moeplan, "exists: give a new name", *points, "--out", str(there))
    assert there.read_text(encoding="utf-8") == "mine"
    refused(moeplan, "give a name that ends in .toml", *points, "--out", str(tmp_path / "mine.json"))
    refused(moeplan, "there is no folder", *points, "--out", str(tmp_path / "no" / "mine.toml"))


def test_points_that_fit_nothing_are_refused(moeplan: Command, mine: Path, tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.csv", [row.format(engine="vllm") for row in RUNS])
    refused(moeplan, "no point has both a measurement and a prediction", "--points", str(plain))
    header, *rows = mine.read_text(encoding="utf-8").splitlines()
    odd = write(tmp_path / "odd.csv", [row.replace("vllm", "tgi") for row in rows], header)
    refused(moeplan, "engine 'tgi' is not modelled", "--points", str(odd))
    refused(moeplan, "No such file", "--points", str(tmp_path / "none.csv"))
    two = write(tmp_path / "two.csv", [rows[0], rows[1].replace("vllm", "sglang")], header)
    refused(
        moeplan,
        "4 measurements (TPOT and TTFT) cannot fit 6 parameters. Give more runs, or fewer parameters, such as "
        "--parameters experts,layer_s",
        *("--points", str(two), "--parameters", FEW),
    )
    refused(moeplan, "cannot fit 12 parameters. Give more runs, or fewer", "--points", str(two), "--from-scratch")


def test_one_combination_cannot_be_judged_from_scratch(moeplan: Command, mine: Path, tmp_path: Path) -> None:
    header, *rows = mine.read_text(encoding="utf-8").splitlines()
    path = write(tmp_path / "twice.csv", rows * 2, header)
    refused(
        moeplan,
        "1 combination of model, GPU and engine; a calibration from scratch needs 3",
        "--points",
        str(path),
        "--from-scratch",
    )
