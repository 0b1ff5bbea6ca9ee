"""What is judged: known bad rows are caught by name, good rows are not, and shipped profiles hold their promises."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import ProfileError
from planner.hardware import system
from planner.profiles.bounds import Peaks, shortest_s
from planner.profiles.checks import findings
from planner.profiles.comparison import compare, pair, write_comparison
from planner.profiles.inspect import check_facts, profile_folder, read_profile_rows
from planner.profiles.ops import OPS
from planner.profiles.rows import Rows

BAD = Path(__file__).parent / "data" / "known_bad_rows"
MEASURED = Path(__file__).parents[1] / "hardware_profiles" / "measured"
SYSTEMS = sorted(path.name for path in MEASURED.iterdir() if path.is_dir())
MOST_BYTES = 2_000_000


def gemm(seconds: list[float], tokens: list[int] | None = None, cols: int = 4096) -> Rows:
    count = len(seconds)
    columns = {
        "engine": np.full(count, "torch"),
        "fmt": np.full(count, "bf16"),
        "rows": np.full(count, 4096),
        "cols": np.full(count, cols),
        "tokens": np.array(tokens or [2**n for n in range(count)]),
    }
    return Rows(OPS["gemm"], columns, np.array(seconds))


@pytest.mark.parametrize(
    ("name", "op", "kind", "row", "why"),
    [
        ("h100-sxm", "expert_gemm", "outlier", "balanced assignments=16384", "balanced routing 1.59 x slower"),
        ("h100-sxm", "collective", "outlier", "bytes=1048576", "slower than the links explain"),
        ("h100-sxm", "collective", "falling", "bytes=2097152", "faster at bytes=2097152 than at 1048576"),
        ("b200-sxm", "prefill_attention", "outlier", "length=16384", "as slow as without a window"),
        ("mi355x", "expert_gemm", "impossible", "assignments=65536: 774.4 us", "2.54 x faster than mi355x allows"),
        ("mi355x", "expert_gemm", "impossible", "assignments=448: 129.4 us", "2.18 x faster than mi355x allows"),
        ("mi355x", "expert_gemm", "impossible", "assignments=224: 82.08 us", "faster than mi355x allows"),
    ],
)
def test_known_bad_rows_are_caught_by_name(name: str, op: str, kind: str, row: str, why: str) -> None:
    facts = check_facts(str(BAD / name))
    assert not facts["clean"]
    found = [f for f in facts["findings"] if f["op"] == op and f["kind"] == kind]
    assert any(row in f["row"] and why in f["why"] for f in found), found


def test_degraded_cluster_is_caught() -> None:
    """13.5 GB/s of bus bandwidth between H100s (xxrjun/nccl-tests-cluster, cluster00)."""
    size = np.array([2**28])
    columns = {
        name: np.array([value]) for name, value in (("engine", "nccl"), ("op", "all_reduce"), ("family", "chained"))
    }
    columns |= {"graph": np.ones(1, int), "num_gpus": np.array([8]), "num_nodes": np.ones(1, int), "bytes": size}
    seconds = 2 * 7 / 8 * size / 13.5e9
    (finding,) = findings(Rows(OPS["collective"], columns, seconds), system("h100-sxm"))
    assert finding.kind == "outlier" and finding.why.startswith("13.5 GB/s bus bandwidth")


def test_falls_spikes_and_duplicates() -> None:
    rows = gemm([20e-6, 21e-6, 60e-6, 22e-6, 23e-6, 23e-6], [1, 2, 4, 8, 16, 16])
    found = {(f.kind, f.row.split("tokens=")[1].split(":")[0]) for f in findings(rows, system("h200-sxm"))}
    assert found == {("outlier", "4"), ("falling", "8"), ("duplicate", "16")}


def test_impossible_needs_more_than_the_slack() -> None:
    peak = system("h200-sxm").gpu.peak_flop_per_s("bf16")
    exact = 2 * 16384 * 4096 * 4096 / peak
    kinds = [[f.kind for f in findings(gemm([exact * s], [16384]), system("h200-sxm"))] for s in (0.94, 0.97)]
    assert kinds == [["impossible"], []]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.floats(1.0, 1.3), min_size=2, max_size=12))
def test_rising_times_above_physics_are_clean(steps: list[float]) -> None:
    rows = gemm(list(50e-6 * np.cumprod(steps)))
    assert not list(findings(rows, system("h200-sxm")))


@pytest.mark.parametrize("name", SYSTEMS)
def test_shipped_profiles_are_small(name: str) -> None:
    files = sorted((MEASURED / name).glob("*.npz"))
    assert sum(f.stat().st_size for f in (MEASURED / name).iterdir()) < MOST_BYTES
    assert {f.stem.removesuffix("_detail") for f in files} <= set(OPS)


@pytest.mark.parametrize("name", ["a100-80-sxm", "h200-sxm", "gb300-nvl72"])
def test_no_shipped_row_is_impossible_twice_or_falling(name: str) -> None:
    """What remains are outliers the source really measured: windows that save nothing, slow host links."""
    counts = check_facts(name, worst=1)["counts"]
    assert {kind for kinds in counts.values() for kind in kinds} <= {"outlier"}
    assert set(counts) <= {"prefill_attention", "collective"}


def test_every_bound_is_below_the_shipped_times() -> None:
    _, tables, faults = read_profile_rows(profile_folder("h200-sxm"))
    assert not faults
    peaks = Peaks.of(system("h200-sxm"))
    tight = {rows.op.name: float((shortest_s(rows, peaks) / rows.seconds).max()) for rows in tables}
    assert max(tight.values()) <= 1.05
    for op in ("gemm", "expert_gemm", "prefill_attention", "decode_attention", "collective"):
        assert tight[op] > 0.5, f"the bound of {op} proves nothing: {tight[op]:.2f}"


def test_unknown_profile_and_damaged_table(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="did you mean .*h200-sxm"):
        check_facts("h200sxm")
    with pytest.raises(ProfileError, match="no tables"):
        (tmp_path / "meta.json").write_text("{}")
        check_facts(str(tmp_path))
    data = (MEASURED / "h200-sxm" / "collective.npz").read_bytes()
    (tmp_path / "collective.npz").write_bytes(data[: len(data) // 2])
    (tmp_path / "norm.csv").write_text("engine\n")
    facts = check_facts(str(tmp_path))
    assert not facts["clean"]
    assert "collective.npz: cannot be read as .npz" in facts["unreadable"][0]


def test_pairs_are_interpolated_and_never_extrapolated() -> None:
    first = gemm([20e-6, 20e-6, 20e-6], [2, 4, 64])
    second = gemm([10e-6, 40e-6], [1, 16])
    paired = pair(first, second)
    assert paired.rows.columns["tokens"].tolist() == [2, 4], "64 tokens lie beyond what the second measured"
    assert paired.other_s == pytest.approx([10e-6 * 2**0.5, 20e-6])
    assert paired.ratio == pytest.approx([2**0.5, 1.0])


def test_compare_two_shipped_profiles() -> None:
    facts, _ = compare("a100-80-sxm", "l40s", worst=3)
    groups = {(g["op"], g["label"]): g for g in facts["groups"]}
    decode = groups["decode_attention", "vllm bf16"]
    assert decode["p10"] < 0.6, "A100 reads memory 2.4 x faster than L40S"
    assert all(g["p10"] <= g["median"] <= g["p90"] for g in facts["groups"])
    assert len(facts["worst"]) == 3
    json.dumps(facts, allow_nan=False)


def test_comparison_files_are_the_same_every_time(tmp_path: Path) -> None:
    facts, pairs = compare(str(BAD / "h100-sxm"), str(BAD / "h100-sxm"))
    files = write_comparison(tmp_path / "cmp", facts, pairs)
    assert files[0].read_text().startswith("op,label,rows,p10,median,p90")
    svg = files[1].read_bytes()
    write_comparison(tmp_path / "cmp", facts, pairs)
    assert svg.startswith(b"<?xml") and svg == files[1].read_bytes()


def test_a_profile_equals_itself() -> None:
    facts, _ = compare(str(BAD / "h100-sxm"), str(BAD / "h100-sxm"))
    assert [g["median"] for g in facts["groups"]] == pytest.approx([1.0] * len(facts["groups"]))
