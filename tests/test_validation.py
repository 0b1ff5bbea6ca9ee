"""Validation: reading points, replaying them as their client, scores, intervals, the command."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.cli.validate import validate as command
from planner.errors import Infeasible, InputError, ModelConfigError, ProfileError
from planner.validation import METRICS, check_out, interval, read_points, validate, write_predictions
from planner.validation import points as points_module
from planner.validation.intervals import METRIC_NAMES, basis_of, interval_table, read_table, write_table
from planner.validation.names import engine_of, model_of, system_of
from planner.validation.points import Point
from planner.validation.predictions import predictions_csv
from planner.validation.replay import ROUNDS, Prediction, _weights, replay, rounds_of, workload_of
from planner.validation.residuals import Residuals, fit_intervals, residuals
from planner.validation.scores import score, slices, worst

MEASURED = Path("/work/shared/validation/serving_points.csv")
HEADER = "id,model,gpu,engine,precision,num_gpus,tp,attention_dp,moe_ep,pp,isl,osl,lengths,concurrency"
GOOD = "a,Qwen/Qwen3-30B-A3B,H100,vllm,bf16,2,2,1,1,1,128,16,uniform_0.8_1.0,4"
DENSE = "b,Qwen/Qwen3-8B,H200,sglang,,1,1,1,1,1,128,16,fixed,2"
POINT = Point("p", "Qwen/Qwen3-8B", "H100", "vllm", "", 1, 1, 1, 1, 1, 256, 32, (0.8, 1.0), 4, (math.nan,) * 3)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def made(*rows: str, header: str = HEADER) -> Path:
        path = tmp_path / "points.csv"
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return path

    return made


def test_gpus_are_found_as_benchmarks_write_them() -> None:
    names = {
        "H100": "h100-sxm",
        "NVIDIA H100 SXM5 80GB": "h100-sxm",
        "GB200": "gb200-nvl72",
        "GB300": "gb300-nvl72",
        "A100": "a100-80-sxm",
        "A100-40GB": "a100-40-sxm",
        "MI300X": "mi300x",
        "L40S": "l40s",
        "h20": "h20",
        "b200-sxm": "b200-sxm",
    }
    assert {gpu: system_of(gpu).name for gpu in names} == names
    with pytest.raises(ProfileError, match="did you mean"):
        system_of("H1000")


def test_engines_are_found_and_others_are_named() -> None:
    assert [engine_of(name).name for name in ("vLLM", "TensorRT-LLM", "trt", "SGLang")] == [
        "vllm",
        "trtllm",
        "trtllm",
        "sglang",
    ]
    with pytest.raises(InputError, match="engine 'tgi' is not modelled"):
        engine_of("tgi")


def test_a_label_requantises_only_what_the_checkpoint_does_not_have() -> None:
    assert model_of("openai/gpt-oss-120b", "fp4") == model_of("openai/gpt-oss-120b", "")
    assert model_of("deepseek-ai/DeepSeek-V3", "fp8").format_of("expert") == "fp8_block"
    nvfp4 = model_of("deepseek-ai/DeepSeek-V3", "fp4")
    formats = (nvfp4.format_of("expert"), nvfp4.format_of("attention"), nvfp4.kv_format)
    assert formats == ("nvfp4", "fp8_block", "fp8")
    dense = model_of("meta-llama/Llama-3.1-70B", "fp8")
    assert (dense.format_of("attention"), dense.kv_format) == ("fp8", "fp8")
    assert model_of("moonshotai/Kimi-K2.5", "int4").format_of("expert") == "int4_g32"
    with pytest.raises(ModelConfigError, match="precision 'fp7'"):
        model_of("Qwen/Qwen3-8B", "fp7")


def test_points_need_only_the_required_columns(write: Any) -> None:
    path = write("Qwen/Qwen3-8B,H100,vllm,1,1.0,128,16,4", header="model,gpu,engine,num_gpus,tp,isl,osl,concurrency")
    (row,) = read_points(path).rows
    assert row.name == "line 2" and row.point is not None
    assert (row.point.tp, row.point.moe_ep, row.point.lengths) == (1, 1, (1.0, 1.0))
    assert all(map(math.isnan, row.point.measured))


def test_missing_columns_are_named_all_at_once(write: Any) -> None:
    with pytest.raises(InputError, match=r"missing columns engine, tp, concurrency .*engine: did you mean engines"):
        read_points(write("x", header="model,gpu,engines,num_gpus,isl,osl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (HEADER.encode() + b"\n", "no rows"),
        (b"PK\x03\x04\xff\xfe\x00", "not UTF-8"),
        (b'{"points": []}', "missing columns"),
        (HEADER.encode() + b",tp\n", "'tp' is there twice"),
        (HEADER.encode() + b"\n" + GOOD.encode() + b",1,2\n", "line 2 has 16 fields, the header 14"),
        (HEADER.encode() + b'\n"a\n', "not a CSV"),
    ],
)
def test_files_that_are_no_points_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "points.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_points(path)


def test_missing_and_huge_files_are_refused(tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_points(tmp_path / "none.csv")
    with pytest.raises(InputError, match="is a folder, not a file"):
        read_points(tmp_path)
    monkeypatch.setattr(points_module, "_MAX_BYTES", 10)
    with pytest.raises(InputError, match="at most 0 MB are read"):
        read_points(write(GOOD))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD.replace(",4", ",0"), "concurrency '0' is not a whole number from 1"),
        (GOOD.replace(",4", ",NaN"), "concurrency 'NaN'"),
        (GOOD.replace("bf16,2,2", "bf16,8,2"), "tp x attention_dp x pp = 2 x 1 x 1 = 2, not num_gpus = 8"),
        (GOOD.replace("2,1,1,1,128", "2,1,3,1,128"), "moe_ep 3 does not divide tp x attention_dp = 2"),
        (GOOD.replace("uniform_0.8_1.0", "normal"), "lengths 'normal' is neither fixed"),
        (GOOD.replace("128,16", "128,-16"), "osl '-16'"),
        (GOOD.replace("vllm", ""), "engine is empty"),
    ],
)
def test_a_file_without_one_good_row_says_why(write: Any, row: str, message: str) -> None:
    with pytest.raises(InputError, match="no row states a point") as caught:
        read_points(write(row))
    assert message in str(caught.value)


def test_faulty_and_unknown_rows_keep_their_place_and_reason(write: Any) -> None:
    rows = [
        GOOD.replace(",4", ",0"),
        DENSE,
        GOOD.replace("vllm", "tgi"),
        GOOD.replace("H100", "X9"),
        GOOD.replace("Qwen/Qwen3-30B-A3B", "nobody/none"),
        "big,deepseek-ai/DeepSeek-V3,H100,trtllm,,2,2,1,1,1,128,16,fixed,2",
    ]
    found = validate(read_points(write(*rows)))
    statuses = [prediction.status for prediction in found.predictions]
    starts = ("unsupported: concurrency '0'", "ok", "unsupported: engine 'tgi'", "unsupported: GPU 'X9'")
    for status, start in zip(statuses, (*starts, "unsupported: unknown model", "infeasible: "), strict=True):
        assert status.startswith(start)
    assert score(found.pairs, "tpot_mean_ms").coverage == pytest.approx(1 / 6)


def test_a_negative_measurement_is_a_fault_and_an_absent_one_is_not(write: Any) -> None:
    header = HEADER + ",tpot_mean_ms"
    read = read_points(write(GOOD + ",-3", GOOD + ",", GOOD + ",nan", header=header))
    assert "tpot_mean_ms '-3'" in read.rows[0].fault and len(read.points) == 2


def test_throughput_is_derived_from_the_latencies_as_the_source_does() -> None:
    prediction = replay(POINT)
    ttft_ms, tpot_ms, per_gpu = prediction.values
    mean = (int(32 * 0.8) + 32) / 2
    assert per_gpu == pytest.approx(4 * mean / ((ttft_ms + tpot_ms * (mean - 1)) / 1e3))
    assert prediction.is_ok and prediction.engine == "vllm" and prediction.is_moe is False
    assert sum(prediction.origin_share.values()) == pytest.approx(1.0)


def test_all_users_start_at_once_and_send_ten_requests_each() -> None:
    workload = workload_of(POINT)
    assert workload.num_requests == ROUNDS * 4 and workload.arrivals.concurrency == 4
    assert (workload.prompt.minimum, workload.prompt.maximum) == (204, 256)
    assert rounds_of(replace(POINT, osl=8192)) == 4


@given(users=st.integers(1, 40), rounds=st.integers(4, 10))
def test_the_burst_counts_for_a_tenth_however_many_rounds_are_simulated(users: int, rounds: int) -> None:
    weights = _weights(users * rounds, users)
    assert weights[:users].sum() / weights.sum() == pytest.approx(1 / ROUNDS)
    assert weights[-users:].sum() / weights.sum() == pytest.approx(1 / ROUNDS)


def test_fewer_rounds_give_nearly_the_same_means(monkeypatch: pytest.MonkeyPatch) -> None:
    point = replace(POINT, osl=256)
    whole = replay(point).values
    monkeypatch.setattr("planner.validation.replay._MOST_STEPS", 1)
    assert rounds_of(point) == 4
    assert replay(point).values == pytest.approx(whole, rel=0.03)


def test_more_users_take_longer_and_one_token_has_no_tpot() -> None:
    few, many = replay(POINT), replay(replace(POINT, concurrency=32))
    assert many.values[0] > few.values[0] and many.values[1] > few.values[1] and many.values[2] > few.values[2]
    single = replay(replace(POINT, osl=1, lengths=(1.0, 1.0)))
    assert single.is_ok and math.isnan(single.values[1]) and single.values[2] > 0


def test_a_point_that_breaks_moeplan_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("planner.validation.replay.run", broken)
    assert replay(POINT).status == "unsupported: moeplan failed (ZeroDivisionError: by zero)"


def test_limits_shrink_until_one_request_fits_and_dense_models_have_no_expert_degree() -> None:
    tight = replace(POINT, model="Qwen/Qwen3-32B", isl=1000, osl=8, concurrency=1)
    assert replay(tight).is_ok
    assert replay(replace(POINT, num_gpus=2, tp=2, moe_ep=2)).family == "TP"
    assert replay(replace(POINT, isl=200_000, osl=2, lengths=(1.0, 1.0), concurrency=1)).is_ok
    assert replay(replace(POINT, isl=2_000_000, osl=2)).status.startswith("infeasible")


def test_scores_slices_and_worst_points(write: Any) -> None:
    header = HEADER + "," + ",".join(METRICS)
    first = replay(read_points(write(GOOD)).points[0]).values
    rows = [GOOD + "," + ",".join(str(v * f) for v in first) for f in (0.5, 1.0, 2.0)]
    found = validate(read_points(write(*rows, DENSE + ",,,", header=header)))
    each = score(found.pairs, "ttft_mean_ms")
    assert (each.num, each.coverage) == (3, 1.0)
    assert each.mape_pct == pytest.approx((100 + 0 + 50) / 3) and each.median_ape_pct == pytest.approx(50)
    assert each.bias_pct == pytest.approx(0, abs=1e-9)
    kinds = {(name, value): num for name, value, _, num in slices(found)}
    assert kinds["kind", "MoE"] == 3 and kinds["engine", "sglang"] == 1 and kinds["concurrency", "1-8"] == 4
    assert {round(ratio, 6) for _, _, ratio in worst(found, "tpot_mean_ms", 2)} == {2.0, 0.5}
    assert math.isnan(score([], "tpot_mean_ms").mape_pct)


def test_predictions_are_the_same_bytes_for_any_number_of_workers(write: Any, tmp_path: Path) -> None:
    rows = [GOOD, DENSE, GOOD.replace("H100", "X9"), DENSE.replace("sglang", "trtllm")]
    read = read_points(write(*(row + f",{i}" for i, row in enumerate(rows)), header=HEADER + ",status"))
    done: list[float] = []
    alone, shared = validate(read, workers=1), validate(read, workers=2, progress=done.append)
    assert predictions_csv(alone) == predictions_csv(shared) and done[-1] == pytest.approx(1.0)
    out = tmp_path / "predictions.csv"
    write_predictions(alone, out)
    lines = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [line["status"][:11] for line in lines] == ["ok", "ok", "unsupported", "ok"]
    assert list(lines[0])[: len(HEADER.split(","))] == HEADER.split(",")
    for metric in METRICS:
        low, high = (float(lines[0][f"pred_{metric}_{end}"]) for end in ("low", "high"))
        assert 0 < low < high and float(lines[0][f"pred_{metric}"]) > 0 and lines[2][f"pred_{metric}"] == ""
    assert 0 <= float(lines[0]["measured_share"]) <= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["points.csv", "predictions.csv"]


def test_out_is_checked_before_the_work(write: Any, tmp_path: Path) -> None:
    path = write(GOOD)
    for out, message in ((tmp_path, "is a folder"), (path, "points file"), (tmp_path / "no" / "x.csv", "not exist")):
        with pytest.raises(InputError, match=message):
            check_out(out, path)


def test_the_command_prints_errors_and_writes_the_file(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(GOOD + ",9.5,1", DENSE + ",,2", header=HEADER + ",tpot_mean_ms,date")
    command(path, out=tmp_path / "out.csv", json=True)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_points"], facts["num_predicted"]) == (2, 2)
    names = {"n", "coverage", "mape_pct", "median_ape_pct", "p90_ape_pct", "bias_pct", "interval_coverage_pct"}
    assert set(facts["metrics"]["tpot_mean_ms"]) == names and facts["metrics"]["tpot_mean_ms"]["n"] == 1
    assert facts["metrics"]["ttft_mean_ms"]["mape_pct"] is None
    assert (tmp_path / "out.csv").read_text().splitlines()[1].startswith(GOOD + ",9.5,1,")
    command(path)
    text = capsys.readouterr().out
    assert text.startswith("2 of 2 points predicted; median: TPOT off by") and "concurrency" in text
    command(write(GOOD))
    assert "none of them was measured" in capsys.readouterr().out


def test_the_command_fails_when_no_point_has_a_prediction(write: Any) -> None:
    with pytest.raises(InputError, match="none of 1 points could be predicted: a: unsupported: engine 'tgi'"):
        command(write(GOOD.replace("vllm", "tgi")))
    with pytest.raises(Infeasible, match="none of 1 points"):
        command(write("big,deepseek-ai/DeepSeek-V3,H100,trtllm,,2,2,1,1,1,128,16,fixed,2"))


@given(
    metric=st.sampled_from(METRIC_NAMES),
    value=st.floats(1e-6, 1e6),
    share=st.floats(0, 1),
    is_moe=st.booleans(),
    engine=st.sampled_from(("vllm", "sglang", "trtllm", "llamacpp", "")),
)
def test_an_interval_is_a_range_that_scales_with_the_value(
    metric: str, value: float, share: float, is_moe: bool, engine: str
) -> None:
    origin = {"measured": share, "interpolated": 0.0, "extrapolated": 0.0, "roofline": 1 - share}
    low, high = interval(metric, value, origin, is_moe, engine)
    assert 0 < low < high
    assert interval(metric, 2 * value, origin, is_moe, engine) == pytest.approx((2 * low, 2 * high))


def test_the_shipped_intervals_hold_what_they_promise() -> None:
    table = interval_table()
    assert set(table.held_out) == set(METRIC_NAMES)
    assert all(0.75 <= share <= 0.85 for share in table.held_out.values())
    assert table.source and table.as_of and table.command
    # write_table keeps four digits, so a second round trip is exact.
    assert read_table(write_table(table)) == table
    with pytest.raises(InputError, match="no interval for metric 'tpott'"):
        interval("tpott", 1.0, {}, True, "vllm")


def test_the_basis_is_what_most_of_the_time_rests_on() -> None:
    assert basis_of({"measured": 0.3, "interpolated": 0.3, "roofline": 0.4}) == "measured"
    assert basis_of({"measured": 0.4, "extrapolated": 0.5, "roofline": 0.1}) == "extrapolated"
    assert basis_of({"measured": 0.4, "roofline": 0.6}) == basis_of({}) == "roofline"


def test_intervals_fitted_to_known_residuals_hold_left_out_combinations() -> None:
    rng = np.random.default_rng(0)
    combination = np.repeat([f"m{i}" for i in range(24)], 40)
    engine = np.repeat(["vllm", "sglang", "trtllm"], 320)
    bias = np.repeat(rng.normal(0, 0.1, 24), 40)
    logs = rng.normal(0.2, 0.2, (960, 3)) + bias[:, None]
    flags = np.full(960, "moe"), engine, combination, np.ones(960, dtype=np.bool_)
    found = fit_intervals(Residuals(logs, np.full(960, "measured"), *flags), source="s", as_of="d", command="c")
    assert all(0.78 <= share <= 0.86 for share in found.held_out.values())
    ratios = found.ratios("tpot", "measured", True, "vllm")
    assert ratios.low < math.exp(0.2) < ratios.high and ratios.num_combinations == 8
    assert found.ratios("tpot", "measured", True, "other") == found.classes["tpot", "measured", "moe", "any"]
    assert found.ratios("tpot", "roofline", False, "vllm") == found.classes["tpot", "measured", "any", "any"]
    assert read_table(write_table(found)).held_out["ttft"] == pytest.approx(found.held_out["ttft"], abs=1e-3)


def test_intervals_need_measurements_of_three_combinations(write: Any) -> None:
    with pytest.raises(InputError, match="no point has both"):
        residuals(validate(read_points(write(GOOD.replace("H100", "X9")))))
    found = validate(read_points(write(GOOD + ",9", header=HEADER + ",tpot_mean_ms")))
    with pytest.raises(InputError, match="3 combinations"):
        fit_intervals(residuals(found), source="s", as_of="d", command="c")


def test_nothing_predicted_is_nothing() -> None:
    nothing = Prediction("unsupported: why")
    assert not nothing.is_ok and nothing.measured_share == 0 and all(map(math.isnan, nothing.values))


@pytest.mark.skipif(not MEASURED.exists(), reason="needs the measured points")
def test_measured_servers_are_met_roughly(tmp_path: Path) -> None:
    lines = MEASURED.read_text().splitlines()
    chosen = [line for line in lines[1:] if ",1024,1024,uniform" in line][::24]
    path = tmp_path / "some.csv"
    path.write_text("\n".join([lines[0], *chosen]))
    found = validate(read_points(path), workers=1)
    tpot = score(found.pairs, "tpot_mean_ms")
    assert tpot.num == len(chosen) >= 12 and tpot.median_ape_pct < 25
    assert abs(score(found.pairs, "output_tok_s_per_gpu").bias_pct) < 25
