"""Benches, grid, shapes file and statistics of the microbenchmarks, on the CPU with tiny shapes."""

from __future__ import annotations

import ast
import csv
import doctest
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from microbench import ceilings, grid, routing  # noqa: E402
from microbench.__main__ import main  # noqa: E402
from microbench.attention import reference  # noqa: E402
from microbench.cases import CHOICES, OPS, TEXT, Case  # noqa: E402
from microbench.device import open_device  # noqa: E402
from microbench.errors import Unsupported, WrongResult  # noqa: E402
from microbench.experts import expert_gemm, grouped_rows, layer, looped_rows, make_experts  # noqa: E402
from microbench.models import built_in_shapes  # noqa: E402
from microbench.precision import check_close, quantise_rows, quantise_tensor  # noqa: E402
from microbench.results import MEASURED  # noqa: E402
from microbench.schedule import Queue, without  # noqa: E402
from microbench.shapes import read_shapes  # noqa: E402
from microbench.timing import MAX_REPEATS, MIN_REPEATS, half_width, measure, sampler  # noqa: E402
from microbench.work import Work  # noqa: E402

torch.set_num_threads(1)
FOLDER = Path(__file__).parents[1] / "microbench"
EXPERTS = {"fmt": "bf16", "hidden": 32, "width": 16, "num_experts": 8, "top_k": 2, "num_matrices": 3}
HEADS = {"kv_fmt": "bf16", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
TINY_SHAPES = {
    "models": ["tiny"],
    "cases": [
        {"op": "gemm", "fmt": "bf16", "rows": 32, "cols": 16},
        {"op": "gemm", "fmt": "fp8", "rows": 32, "cols": 16},
        {"op": "expert_gemm", "local_experts": 8, **EXPERTS},
        {"op": "expert_gemm", "local_experts": 2, **EXPERTS, "num_matrices": 2},
        *(
            {"op": "expert_parts", "part": part, **{k: EXPERTS[k] for k in EXPERTS if k != "num_matrices"}}
            for part in CHOICES["expert_parts"]["part"]
        ),
        {"op": "prefill_attention", **HEADS, "window": 0},
        {"op": "decode_attention", **HEADS, "window": 4},
        {"op": "mla_prefill", "kv_fmt": "bf16", "gemm_fmt": "kernel", "num_heads": 2},
        {"op": "mla_decode", "kv_fmt": "bf16", "gemm_fmt": "kernel", "num_heads": 2},
        {"op": "norm", "kind": "rmsnorm", "hidden": 32},
        {"op": "head", "kind": "sampling", "vocab": 64},
        {"op": "host", "kind": "eager_step", "kernels": 10},
        {"op": "memory", "kind": "hbm_copy"},
        {"op": "memory", "kind": "hbm_read"},
        {"op": "memory", "kind": "nvme_read"},
        {"op": "exchange", "hidden": 32, "top_k": 2, "num_experts": 8, "fmt": "bf16"},
    ],
}
TINY_AXES = {
    op: {axis: ((1 << 16,) if axis == "bytes" else (8,), (16,) if axis == "tokens" else ()) for axis in OPS[op].axes}
    for op in OPS
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shapes file of tiny shapes; the grid is cut to one or two points per axis."""
    monkeypatch.setattr(grid, "AXES", TINY_AXES)
    monkeypatch.setattr("microbench.runner._LONGEST_CASE_S", 0.02)
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(TINY_SHAPES))
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_local_bench_writes_valid_rows(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["--out", str(out), "--model-shapes", str(tiny), "--minutes", "2", "--device", "cpu"]
    assert main([*command, "--nvme", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    local = [op for op in OPS if not OPS[op].collective]
    total = 0
    for op in local:
        rows = rows_of(out / f"{op}.csv")
        assert list(rows[0]) == [*OPS[op].columns, *MEASURED]
        for row in rows:
            assert 0 < float(row["time_us"]) <= float(row["p90_us"]) * 1.0001
            assert MIN_REPEATS <= int(row["repeats"]) <= MAX_REPEATS
            assert (row["origin"], row["engine"]) == ("measured", "torch")
            assert row["library"] and float(row["spread"]) >= 0
        total += len(rows)
    assert {row["distribution"] for row in rows_of(out / "expert_gemm.csv")} == {"balanced", "lognormal", "one_hot"}
    failures = rows_of(out / "failures.csv") if (out / "failures.csv").exists() else []
    assert [(row["op"], row["kind"]) for row in failures] == []
    assert len(printed.out.splitlines()) == total
    assert all(" us " in line and "TFLOP/s" in line and "p90" in line for line in printed.out.splitlines())
    assert "exchange: skipped, one process" in printed.err
    assert not (tmp_path / ".microbench-read.bin").exists()


def test_meta_says_what_ran_and_hides_the_host(tiny: Path, tmp_path: Path) -> None:
    import socket

    command = ["--out", str(tmp_path / "o"), "--model-shapes", str(tiny), "--minutes", "0.01", "--device", "cpu"]
    assert main([*command, "--only", "norm"]) == 0
    text = (tmp_path / "o" / "meta.json").read_text()
    meta = json.loads(text)
    wanted = {"device", "driver", "cuda_or_rocm", "nccl", "torch", "clocks", "topology", "host", "date", "command"}
    assert wanted | {"source", "licence", "engines", "world_size"} <= set(meta)
    assert meta["source"].startswith("moeplan microbench ")
    assert meta["torch"] == torch.__version__
    assert meta["is_representative"] is False
    assert socket.gethostname() not in json.dumps({k: v for k, v in meta.items() if k not in ("command", "runs")})


def test_another_device_must_not_write_into_the_folder(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o"
    out.mkdir()
    (out / "meta.json").write_text(json.dumps({"device": "NVIDIA H100", "torch": torch.__version__}))
    assert main(["--out", str(out), "--model-shapes", str(tiny), "--minutes", "0.01", "--device", "cpu"]) == 2
    assert "device was 'NVIDIA H100'" in capsys.readouterr().err


def test_expert_layer_by_grouped_gemm_equals_the_loop() -> None:
    device = open_device("cpu")
    experts = make_experts(device, 4, 32, 16)
    x = device.random(10, 32)
    ids = torch.from_numpy(routing.expert_ids("lognormal", 10, 2, 4))
    weights = torch.softmax(device.random(10, 2), dim=-1)
    grouped = layer(x, ids, weights, 4, lambda rows, ends: grouped_rows(experts, rows, ends))
    looped = layer(x, ids, weights, 4, lambda rows, ends: looped_rows(experts, rows, ends))
    exact = torch.stack(
        [
            sum(float(w) * experts.one(int(e), x[t : t + 1])[0] for e, w in zip(ids[t], weights[t], strict=True))
            for t in range(10)
        ]
    )
    check_close(grouped, looped, 1e-2)
    check_close(grouped, exact)


def test_fp8_experts_are_right_where_the_gpu_kernel_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def emulated(
        a: torch.Tensor, b: torch.Tensor, row_scale: torch.Tensor, scale: torch.Tensor, offs: torch.Tensor, **_: object
    ) -> torch.Tensor:
        left, right = a.float() * row_scale[:, None], b.float() * scale[:, None, :]
        return torch.nn.functional.grouped_mm(left.bfloat16(), right.bfloat16(), offs=offs)

    monkeypatch.setattr(torch, "_scaled_grouped_mm", emulated)
    columns = {**EXPERTS, "fmt": "fp8", "engine": "torch", "local_experts": 8, "distribution": "lognormal"}
    for matrices in (2, 3):
        case = Case.of("expert_gemm", {**columns, "num_matrices": matrices, "assignments": 64})
        work = expert_gemm(case, open_device("cpu"))
        assert work.arithmetic == "fp8" and "quantise inside" in work.library
        assert work.flop == 2.0 * 64 * matrices * 32 * 16


def test_a_wrong_kernel_is_not_timed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microbench.experts.grouped_rows", lambda experts, rows, ends, activate=None: rows)
    out = tmp_path / "o"
    command = ["--out", str(out), "--model-shapes", str(tiny), "--minutes", "2", "--device", "cpu"]
    assert main([*command, "--only", "expert_gemm,norm"]) == 0
    assert not (out / "expert_gemm.csv").exists()
    assert {row["kind"] for row in rows_of(out / "failures.csv")} == {"wrong"}
    assert rows_of(out / "norm.csv")


def test_attention_reference_is_causal_softmax() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 4, 6, 8, generator=generator) for _ in range(3))
    grouped = key[:, :2], value[:, :2]
    ours = reference(query, *grouped, 0.3, is_causal=True)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, *grouped, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None, derandomize=True, max_examples=20)
def test_fp8_keeps_three_mantissa_bits(rows: int, cols: int) -> None:
    values = open_device("cpu").random(rows, cols, seed=rows * cols).float()
    for fp8, scale in (quantise_tensor(values, torch.float8_e4m3fn), quantise_rows(values, torch.float8_e4m3fn)):
        back = fp8.float() * (scale.unsqueeze(-1) if scale.ndim else scale)
        assert float((back - values).norm() / values.norm()) < 0.07


def test_nan_and_large_errors_are_wrong() -> None:
    exact = torch.ones(4)
    check_close(exact * 1.01, exact)
    for bad in (exact * 1.1, torch.tensor([1.0, 1.0, 1.0, float("nan")])):
        with pytest.raises(WrongResult):
            check_close(bad, exact)


@given(st.sampled_from(["balanced", "lognormal", "one_hot"]), st.integers(0, 50), st.integers(1, 4), st.integers(4, 16))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_routing_gives_distinct_experts_and_is_the_same_everywhere(
    distribution: str, tokens: int, top_k: int, num_experts: int
) -> None:
    ids = routing.expert_ids(distribution, tokens, top_k, num_experts, rank=3)
    assert ids.shape == (tokens, top_k)
    assert all(len(set(row)) == top_k and min(row) >= 0 and max(row) < num_experts for row in ids.tolist())
    np.testing.assert_array_equal(ids, routing.expert_ids(distribution, tokens, top_k, num_experts, rank=3))
    counts = np.bincount(ids.ravel(), minlength=num_experts)
    if distribution == "balanced":
        assert counts.max() - counts.min() <= 1
    if distribution == "one_hot" and tokens:
        assert set(counts[:top_k]) == {tokens} and counts[top_k:].sum() == 0


def test_log_normal_load_has_the_skew_of_real_traffic() -> None:
    counts = np.bincount(routing.expert_ids("lognormal", 20_000, 6, 64).ravel(), minlength=64)
    assert 0.3 < counts.std() / counts.mean() < 0.6  # handbook routing section 1: CV 0.39 to 0.63, mixed traffic


def test_sampling_stops_when_the_median_is_known() -> None:
    steady = measure(lambda count: [2e-3] * count, budget_s=10)
    assert (steady.median_s, steady.repeats, steady.spread) == (2e-3, MIN_REPEATS, 0.0)
    wild = np.random.default_rng(0)
    noisy = measure(lambda count: wild.uniform(1, 100, count).tolist(), budget_s=60)
    assert noisy.repeats == MAX_REPEATS
    hurried = measure(lambda count: wild.uniform(1, 100, count).tolist(), budget_s=0)
    assert hurried.repeats == MIN_REPEATS


def test_interval_of_the_median_covers_it_19_times_in_20() -> None:
    rng = np.random.default_rng(5)
    draws = rng.normal(10, 1, (2000, 40))
    low, high = np.sort(draws)[:, 20 - 7], np.sort(draws)[:, 20 + 6]
    assert 0.93 < np.mean((low <= 10) & (high >= 10)) < 0.99
    assert half_width(draws[0].tolist()) == pytest.approx((high[0] - low[0]) / 2 / np.median(draws[0]))


class Pretended:
    """A GPU that writes down what it is asked to do."""

    is_cuda = True

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.begin, self.end = self, self
        self.seconds = 1e-5

    def flush(self) -> None:
        self.calls.append("flush")

    def record(self) -> None:
        self.calls.append("event")

    def synchronise(self) -> None:
        self.calls.append("wait")


@pytest.mark.parametrize("captures", [True, False])
def test_a_gpu_is_flushed_before_and_waited_for_after(captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Pretended()
    monkeypatch.setattr("microbench.timing.Stopwatch.new", lambda: device)
    monkeypatch.setattr("microbench.timing.capture", lambda run: run if captures else None)
    work = Work(lambda: device.calls.append("run"), "kernel", is_captured=True)
    sample, label = sampler(work, device)  # type: ignore[arg-type]
    assert label == ("kernel (graph)" if captures else "kernel (eager)")
    assert sample(2) == [1e-5, 1e-5]
    assert device.calls == ["flush", "event", "run", "event"] * 2 + ["wait"]


def test_nothing_is_faster_than_the_data_sheet() -> None:
    peaks = ceilings.peaks_of("NVIDIA H100 80GB HBM3")
    assert peaks is not None and peaks.bytes_per_s == 3.35e12
    assert ceilings.peaks_of("NVIDIA H100 PCIe") != peaks
    assert ceilings.peaks_of("NVIDIA GB200").flop_per_s["bf16"] == 2.5e15  # type: ignore[union-attr]
    assert [ceilings.peaks_of(name) for name in ("CPU Xeon", "NVIDIA L40", "NVIDIA GH200 480GB")] == [None] * 3
    work = Work(lambda: None, "x", flop=1e12, read_bytes=1e9)
    assert ceilings.violation(work, 1.1e-3, peaks) is None
    assert "989" in str(ceilings.violation(work, 0.9e-3, peaks))
    assert "3,350" in str(ceilings.violation(Work(lambda: None, "x", read_bytes=1e9), 0.2e-3, peaks))
    assert ceilings.violation(work, 1e-9, None) is None
    assert "positive" in str(ceilings.violation(work, 0.0, None))


def built_in_cases() -> list[Case]:
    setting = grid.Setting(collective_engine="nccl", groups=((8, 1), (4, 1), (2, 1)), has_nvme=True)
    return grid.cases(built_in_shapes(), setting)


def test_the_coarse_grid_covers_every_operation_and_comes_first() -> None:
    cases = built_in_cases()
    assert len(set(cases)) == len(cases)
    coarse = [case for case in cases if case.level == 0]
    assert {case.op for case in coarse} == set(OPS)
    assert {case.text("kind") for case in coarse if case.op == "memory"} == set(CHOICES["memory"]["kind"])
    assert len(coarse) < 0.15 * len(cases)
    queue = Queue(cases)
    order = []
    while (case := queue.next()) is not None:
        queue.spend(case.op, 1.0 if case.op == "gemm" else 0.1)
        order.append(case)
    assert sorted(map(str, order)) == sorted(map(str, cases))
    assert all(case.level == 0 for case in order[: len(coarse)])
    assert order != sorted(order, key=str)


def test_time_is_shared_over_operations() -> None:
    queue, spent = Queue(built_in_cases()), dict.fromkeys(OPS, 0.0)
    for _ in range(1500):
        case = queue.next()
        assert case is not None
        seconds = 1.0 if case.op.startswith(("prefill", "mla")) else 0.2
        queue.spend(case.op, seconds)
        spent[case.op] += seconds
    waiting = {case.op for case in iter(queue.next, None)}
    shares = [spent[op] for op in waiting]
    assert max(shares) < 3 * min(shares)


def test_cases_on_disk_are_left_out() -> None:
    cases = built_in_cases()[:10]
    assert without(cases, {(cases[3].op, cases[3].values)}) == cases[:3] + cases[4:]


def test_a_rank_with_all_experts_gets_whole_tokens() -> None:
    for case in built_in_cases():
        if case.op == "expert_gemm" and case.number("local_experts") == case.number("num_experts"):
            assert case.number("assignments") % case.number("top_k") == 0


def bad_shapes() -> dict[str, tuple[str, str]]:
    def one(**case: object) -> str:
        return json.dumps({"cases": [case]})

    return {
        "no json": ("{", "is no JSON"),
        "no cases": ('{"models": []}', 'no list "cases"'),
        "no op": (one(fmt="bf16"), 'no object with an "op"'),
        "unknown op": (one(op="gem", fmt="bf16", rows=1, cols=1), "unknown op 'gem'; did you mean gemm?"),
        "missing key": (one(op="gemm", fmt="bf16", rows=1), "missing key cols"),
        "unknown key": (one(op="gemm", fmt="bf16", rows=1, cols=1, col=1), "unknown key col; did you mean cols?"),
        "text for number": (one(op="gemm", fmt="bf16", rows="4k", cols=1), "rows = '4k' is no positive integer"),
        "unknown part": (
            one(op="expert_parts", part="swish", fmt="bf16", hidden=8, width=8, num_experts=8, top_k=2),
            "part = 'swish'; use one of swiglu",
        ),
    }


@pytest.mark.parametrize("name", bad_shapes())
def test_bad_shapes_files_are_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, told = bad_shapes()[name]
    path = tmp_path / "bad.json"
    path.write_text(text)
    assert main(["--out", str(tmp_path / "o"), "--model-shapes", str(path)]) == 2
    error = capsys.readouterr().err
    assert told in error and str(path) in error and "Traceback" not in error
    assert not (tmp_path / "o").exists()


def test_a_shapes_file_is_completed_from_its_experts(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    experts = [{"op": "expert_gemm", "local_experts": 8, **EXPERTS, "width": width} for width in (16, 4)]
    path.write_text(json.dumps({"models": ["m"], "left_out": {}, "cases": experts}))
    shapes = read_shapes(path)
    parts = [shape for op, shape in shapes if op == "expert_parts"]
    assert {shape["part"] for shape in parts} == set(CHOICES["expert_parts"]["part"])
    assert {shape["width"] for shape in parts} == {16}
    assert [shape["width"] for op, shape in shapes if op == "exchange"] == [16]
    assert {"memory", "host", "collective"} <= {op for op, _ in shapes}


def test_all_faults_of_a_shapes_file_come_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"cases": [{"op": "gemm"}] * 5}))
    assert main(["--out", str(tmp_path / "o"), "--model-shapes", str(path)]) == 2
    assert "... and 3 more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "gemm,atention"], "--only atention: unknown operation"),
        (["--minutes", "0"], "--minutes 0: use a positive number"),
        (["--nvme", "/no/such/drive"], "--nvme /no/such/drive: no such file"),
        (["--model-shapes", "/no/such.json"], "/no/such.json: cannot be read"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "sees 0 GPUs")]),
    ],
)
def test_bad_arguments_exit_2(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path / "o"), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_out_below_a_file_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "o"), "--device", "cpu"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_case_larger_than_memory_is_refused_before_it_is_made() -> None:
    with pytest.raises(Unsupported, match="needs 1000000"):
        open_device("cpu").require(1e15)


def modules() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__main__", "__init__"))


@pytest.mark.parametrize("name", modules())
def test_modules_need_only_torch_numpy_and_the_standard_library(name: str) -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "microbench"}
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert {name.partition(".")[0] for name in names} <= allowed
    results = doctest.testmod(importlib.import_module(f"microbench.{name}"))
    assert results.failed == 0


def test_text_columns_are_those_of_the_tables() -> None:
    assert {column for op in OPS.values() for column in op.keys} >= TEXT
