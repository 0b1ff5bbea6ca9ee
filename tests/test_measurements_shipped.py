"""The measured tables that ship with the planner: present, small, attributed and physically possible."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from planner.hardware import system
from planner.measurements.formats import FORMATS
from planner.measurements.importer.exchange import BUS_FACTOR
from planner.measurements.store import SCHEMA_VERSION, Table, read_table

MEASURED = Path(str(resources.files("hardware_profiles"))) / "measured"
SYSTEMS = (
    "a100-80-sxm",
    "l40s",
    "h100-sxm",
    "h200-sxm",
    "b200-sxm",
    "b300-sxm",
    "gb200-nvl72",
    "gb300-nvl72",
    "rtx-pro-6000",
)
SLACK = 1.15
"""5 % for clocks above nominal, and what smoothing to a monotone series may take off a time near the limit."""
L2_BYTES = 256e6


@cache
def table(name: str, op: str) -> Table:
    return read_table(MEASURED / name / f"{op}.npz")


def per_series(table: Table, values: np.ndarray) -> np.ndarray:
    """Spread one value per series over its rows."""
    return np.repeat(values, np.diff(table.start))


def per_label(table: Table, column: str, values: dict[str, float]) -> np.ndarray:
    labels = np.array([values[name] for name in table.categories[column]])
    return per_series(table, labels[table.keys[column]])


def arithmetic_peak(table: Table, name: str, column: str = "fmt") -> np.ndarray:
    gpu = system(name).gpu
    peaks = {fmt: gpu.peak_flop_per_s(FORMATS[fmt].arithmetic) for fmt in table.categories[column]}
    return per_label(table, column, peaks)


def weight_bytes(table: Table) -> np.ndarray:
    return per_label(table, "fmt", {fmt: FORMATS[fmt].weight_bytes for fmt in table.categories["fmt"]})


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_small_and_attributed(name: str) -> None:
    files = sorted((MEASURED / name).glob("*.npz"))
    assert sum(f.stat().st_size for f in files) < 2e6
    meta = json.loads((MEASURED / name / "meta.json").read_text(encoding="utf-8"))
    assert meta["schema_version"] == SCHEMA_VERSION
    assert meta["license"] == "Apache-2.0"
    assert "NVIDIA" in meta["attribution"]
    assert meta["engines"] == ["sglang", "trtllm", "vllm"]
    assert set(meta["rows"]) == {f.stem for f in files}
    for op, count in meta["rows"].items():
        assert len(table(name, op).seconds) == count
        assert meta["versions"][op]


@pytest.mark.parametrize("name", SYSTEMS)
def test_gemm_rows_are_possible(name: str) -> None:
    gemm = table(name, "gemm")
    rows, cols = (per_series(gemm, gemm.keys[key]).astype(float) for key in ("rows", "cols"))
    flop_s = 2 * rows * cols * gemm.axes["tokens"] / arithmetic_peak(gemm, name)
    stored = weight_bytes(gemm) * rows * cols
    stream_s = np.where(stored > L2_BYTES, stored, 0) / system(name).gpu.hbm_bytes_per_s
    assert (gemm.seconds * SLACK >= np.maximum(flop_s, stream_s)).all()


@pytest.mark.parametrize("name", SYSTEMS)
def test_expert_rows_are_possible_when_read_as_assignments_on_the_rank(name: str) -> None:
    experts = table(name, "expert_gemm")
    hidden, width, local, matrices = (
        per_series(experts, experts.keys[key]).astype(float)
        for key in ("hidden", "width", "local_experts", "num_matrices")
    )
    assigned = experts.axes["assignments"]
    flop_s = 2 * assigned * hidden * width * matrices / arithmetic_peak(experts, name)
    streamed = np.minimum(assigned, local) * hidden * width * matrices * weight_bytes(experts)
    stream_s = np.where(streamed > L2_BYTES, streamed, 0) / system(name).gpu.hbm_bytes_per_s
    assert (experts.seconds * SLACK >= np.maximum(flop_s, stream_s)).all()


@pytest.mark.parametrize(("name", "engine"), [("h200-sxm", "vllm"), ("h200-sxm", "sglang"), ("b200-sxm", "vllm")])
def test_deepseek_token_trap_is_normalised(name: str, engine: str) -> None:
    """Large batches run at one speed whatever the EP degree; naive readings spread by factors of 2 to 30."""
    experts = table(name, "expert_gemm")
    keys = experts.keys
    mine = (keys["hidden"] == 7168) & (keys["width"] == 2048) & (keys["num_experts"] == 256) & (keys["top_k"] == 8)
    mine &= (keys["engine"] == experts.code("engine", engine)) & (keys["fmt"] == experts.code("fmt", "fp8_block"))
    speeds, naive = [], []
    for series in np.flatnonzero(mine):
        last = experts.start[series + 1] - 1
        local, assigned = int(keys["local_experts"][series]), experts.axes["assignments"][last]
        per_assignment = 2 * 3 * 7168 * 2048 / experts.seconds[last]
        speeds.append(assigned * per_assignment)
        naive.append(16384 * 8 * local / 256 * per_assignment)
    assert len(speeds) >= 8
    assert max(speeds) / min(speeds) < 1.75
    assert max(naive) / min(naive) > 8


def test_deepseek_matches_another_shape_at_equal_rows_per_expert() -> None:
    """DeepSeek-V3 and GLM-5 differ only in hidden size; at 512 rows per expert their speeds must agree."""
    experts = table("h200-sxm", "expert_gemm")
    keys, speed = experts.keys, {}
    for hidden in (6144, 7168):
        mine = (keys["hidden"] == hidden) & (keys["width"] == 2048) & (keys["num_experts"] == 256)
        mine &= (keys["engine"] == experts.code("engine", "vllm")) & (keys["fmt"] == experts.code("fmt", "fp8_block"))
        mine &= (keys["local_experts"] == 32) & (keys["top_k"] == 8)
        (series,) = np.flatnonzero(mine)
        rows = experts.rows(int(series))
        seconds = np.exp(
            np.interp(np.log(32 * 512), np.log(experts.axes["assignments"][rows]), np.log(experts.seconds[rows]))
        )
        speed[hidden] = 32 * 512 * hidden / seconds
    assert speed[7168] == pytest.approx(speed[6144], rel=0.2)


@pytest.mark.parametrize("name", SYSTEMS)
def test_decode_attention_does_not_outrun_memory(name: str) -> None:
    decode = table(name, "decode_attention")
    seen = decode.axes["length"].astype(float)
    window = per_series(decode, decode.keys["window"])
    seen = np.where(window > 0, np.minimum(seen, window), seen)
    kv_bytes = per_label(decode, "kv_fmt", {"bf16": 2.0, "fp8": 1.0})
    cache_bytes = 2 * decode.axes["batch"] * seen * kv_bytes
    cache_bytes *= per_series(decode, decode.keys["kv_heads"] * decode.keys["head_dim"])
    stream_s = np.where(cache_bytes > L2_BYTES, cache_bytes, 0) / system(name).gpu.hbm_bytes_per_s
    assert (decode.seconds * SLACK >= stream_s).all()


@pytest.mark.parametrize("name", SYSTEMS)
def test_prefill_attention_does_not_outrun_the_tensor_cores(name: str) -> None:
    prefill = table(name, "prefill_attention")
    length = prefill.axes["length"].astype(float)
    window = per_series(prefill, prefill.keys["window"]).astype(float)
    outside = np.where(window > 0, np.maximum(length - window, 0), 0)
    seen = (length**2 - outside**2) / 2
    flop = 4 * prefill.axes["batch"] * per_series(prefill, prefill.keys["heads"] * prefill.keys["head_dim"]) * seen
    assert (prefill.seconds * SLACK >= flop / system(name).gpu.peak_flop_per_s("fp8")).all()


@pytest.mark.parametrize("name", SYSTEMS)
def test_collectives_stay_below_the_link(name: str) -> None:
    moves = table(name, "collective")
    gpus = per_series(moves, moves.keys["num_gpus"])
    factor = per_label(moves, "op", BUS_FACTOR)
    bus = factor * (gpus - 1) / gpus * moves.axes["size"] / moves.seconds
    # NVLink SHARP reduces in the switch, which doubles what all-reduce shows as bus bandwidth.
    limit = system(name).scale_up.bytes_per_s * 1.15 * np.where(factor == 2, 2, 1)
    assert (bus <= limit).all()


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_series_is_monotone(name: str) -> None:
    for op, axis in (("gemm", "tokens"), ("expert_gemm", "assignments"), ("collective", "size")):
        measured = table(name, op)
        rises = np.diff(measured.seconds)
        within = np.ones(len(rises), bool)
        within[measured.start[1:-1] - 1] = False
        assert (np.diff(measured.axes[axis])[within] > 0).all()
        assert (rises[within] >= -1e-12).all()


@pytest.mark.parametrize("name", ["h100-sxm", "h200-sxm"])
def test_leaving_one_token_count_out_costs_little(name: str) -> None:
    gemm = table(name, "gemm")
    errors = []
    for series in range(0, len(gemm.start) - 1, 37):
        rows = gemm.rows(series)
        x, y = np.log(gemm.axes["tokens"][rows]), np.log(gemm.seconds[rows])
        for left_out in range(1, len(x) - 1):
            guess = np.interp(x[left_out], np.delete(x, left_out), np.delete(y, left_out))
            errors.append(abs(guess - y[left_out]))
    print(f"{name}: median {np.median(errors):.1%}, p90 {np.quantile(errors, 0.9):.1%} of {len(errors)}")
    assert np.median(errors) < 0.10
