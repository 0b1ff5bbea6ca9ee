"""From the microbenchmark's output to a plan: it loads as a profile, and the planner reads the measured times."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from microbench import grid  # noqa: E402
from microbench.__main__ import main as measure  # noqa: E402
from planner.cli import main as moeplan  # noqa: E402
from planner.hardware import system  # noqa: E402
from planner.measurements import open_tables  # noqa: E402

torch.set_num_threads(1)
NODE = """
title = "a box nobody has measured"
[gpu]
name = "unknown"
vendor = "NVIDIA"
arch = "sm90"
hbm_bytes = { value = 84_900_000_000, source = "test" }
hbm_bytes_per_s = { value = 3.35e12, source = "test" }
[gpu.flop_per_s]
bf16 = { value = 9.89e14, source = "test" }
[node]
gpus = { value = 2, source = "test" }
[pcie]
name = "PCIe 5 x16"
bytes_per_s = { value = 6.4e10, source = "test" }
[[price]]
basis = "rental"
usd = 3.0
as_of = "2026-11-01"
provider = "test"
source = "test"
"""
SHAPES = {
    "cases": [
        {"op": "gemm", "fmt": "bf16", "rows": 64, "cols": 4096},
        {"op": "norm", "kind": "rmsnorm", "hidden": 4096},
        {
            "op": "expert_gemm",
            "fmt": "bf16",
            "hidden": 64,
            "width": 32,
            "local_experts": 8,
            "num_experts": 8,
            "top_k": 2,
            "num_matrices": 3,
        },
    ]
}


def run_moeplan(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["moeplan", *arguments])
    try:
        moeplan()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_measured_times_reach_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grid, "AXES", {op: dict.fromkeys(axes, ((4, 32),)) for op, axes in grid.AXES.items()})
    monkeypatch.setattr("microbench.runner._LONGEST_CASE_S", 0.02)
    shapes, measured, profiles = tmp_path / "shapes.json", tmp_path / "measured", tmp_path / "profiles"
    profiles.mkdir()
    shapes.write_text(json.dumps(SHAPES))
    (profiles / "my-node.toml").write_text(NODE)
    monkeypatch.setenv("MOEPLAN_PROFILES", str(profiles))
    only = ("--only", "gemm,norm,expert_gemm", "--device", "cpu", "--minutes", "2")
    assert measure(["--out", str(measured), "--model-shapes", str(shapes), *only]) == 0
    assert (
        run_moeplan(monkeypatch, "profiles", "import", str(measured), "--name", "my-node", "--out", str(profiles)) == 0
    )

    with (measured / "expert_gemm.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["distribution"] == "balanced"]
    times = {int(row["assignments"]): float(row["time_us"]) for row in rows}
    curve = open_tables(system("my-node"), "vllm").expert_gemm("bf16", 64, 32, 8, 8, 2)
    slowest = max(times.values())  # more work is never faster: a curve lifts a large point to a slower small one
    assert float(curve.seconds(64)) * 1e6 == pytest.approx(slowest, rel=0.02)

    capsys.readouterr()
    question = ("--cluster", "my-node:2", "--workload", "fixed:128/16", "--rate", "1e-6", "--num-requests", "20")
    slo = ("--slo", "tpot_p95=1000000s,ttft_p95=1000000s")  # a CPU measured these kernels
    assert run_moeplan(monkeypatch, "plan", "mixtral-8x7b", *question, *slo) in (0, 3)
    assert "2 x unknown" in capsys.readouterr().out
