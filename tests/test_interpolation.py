"""Between and beyond measurements: what is carried from where, and the laws of exchange and of the fabric."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import InputError
from planner.hardware import system
from planner.measurements import Fabric, Origin, open_tables, roofline
from planner.measurements.curves import curve_of, surface_of
from planner.measurements.exchange import LAWS, Exchange, exchange, law_of
from planner.measurements.experts import handed_per_kept
from planner.measurements.library import find
from planner.measurements.roofline import Ceilings
from planner.measurements.store import Table, build_table
from planner.measurements.transfer import curve as carried

PUBLISHED = Path(__file__).parent / "data" / "published_exchange.csv"
NAMES = {"H800": "h800-sxm", "H100": "h100-sxm", "B200": "b200-sxm", "MI300X": "mi300x", "MI355X": "mi355x"}
H200 = Ceilings.of(system("h200-sxm"))
steady = settings(deadline=None, derandomize=True, max_examples=40)


def knee(x: np.ndarray) -> np.ndarray:
    """Flat to 64, then in proportion to size."""
    return np.maximum(x, 64.0)


def test_a_knee_of_the_roofline_is_kept_between_points() -> None:
    curve = curve_of(np.array([16.0, 256.0]), np.array([1.0, 4.0]), knee, Origin.MEASURED)
    assert float(curve.seconds(64)) == pytest.approx(1.0, rel=0.02)
    assert float(curve.seconds(160)) == pytest.approx(2.5, rel=0.02)
    assert int(curve.origin(160)) == Origin.INTERPOLATED
    assert curve.origin([16, 256]).tolist() == [Origin.MEASURED] * 2


def test_proportional_work_is_a_straight_line() -> None:
    curve = curve_of(np.array([1.0, 16.0]), np.array([10.0, 25.0]), lambda x: 5.0 + x, Origin.MEASURED)
    x = np.arange(1.0, 17.0)
    assert curve.seconds(x) == pytest.approx(9.0 + x, rel=4e-3)


def test_gemm_times_step_with_whole_tiles() -> None:
    roof = roofline.gemm(H200, "bf16", 8192, 8192)
    assert float(roof(np.array(129.0))) == pytest.approx(float(roof(np.array(192.0))))
    assert float(roof(np.array(1025.0))) > float(roof(np.array(1024.0))) * 1.05
    # 128 tokens are two tiles like 96, so they cost what 96 cost and not the middle between two and three tiles.
    curve = curve_of(np.array([96.0, 160.0]), np.array([1.0, 1.5]), roof, Origin.MEASURED, steps=roofline.GEMM_STEPS)
    assert float(curve.seconds(128)) == pytest.approx(1.0)
    assert float(curve.seconds(129)) == pytest.approx(1.5)


@steady
@given(st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=8), st.floats(1.0, 1e5), st.floats(1.0, 1e5))
def test_times_stay_between_their_neighbours_and_never_fall(times: list[float], one: float, other: float) -> None:
    x = 2.0 ** np.arange(0, 2 * len(times), 2)
    curve = curve_of(x, np.array(times), knee, Origin.MEASURED)
    low, high = sorted((one, other))
    assert curve.seconds(low) <= curve.seconds(high) * (1 + 1e-12)
    inside = curve.seconds(np.linspace(1, x[-1], 50))
    assert (inside >= times[0] * (1 - 1e-9)).all() and (inside <= max(times) * (1 + 1e-9)).all()


def test_a_hole_in_a_surface_is_closed_from_both_sides() -> None:
    batch, length = np.array([1.0, 2, 4]), np.array([1.0, 2, 4])
    ratio = np.log(np.array([[2.0, 2, 2], [2.0, np.nan, 2], [8.0, 8, 8]]))
    surface = surface_of(batch, length, ratio, lambda b, n: b * n, Origin.MEASURED, False)
    # Along the length 8, along the batch a third of the way from 4 to 64 in size and in roofline: 24.
    assert float(surface.seconds(2, 2)) == pytest.approx(np.sqrt(8 * 24), rel=1e-6)
    assert int(surface.origin(2, 2)) == Origin.INTERPOLATED
    assert float(surface.seconds(1, 3)) == pytest.approx(6.0, rel=0.01)


def toy(ratios: dict[int, float]) -> Table:
    """Series named by `shape`, each `ratio` times as slow as x."""
    shapes = np.repeat(list(ratios), 3)
    x = np.tile([1, 4, 16], len(ratios))
    seconds = np.repeat(list(ratios.values()), 3) * x
    columns = {"engine": np.repeat("vllm", len(x)), "shape": shapes, "model": shapes // 10, "tokens": x}
    return build_table("toy", columns, ("engine", "shape", "model"), ("tokens",), seconds)


def test_a_neighbour_that_disagrees_counts_less() -> None:
    table = toy({90: 1.0, 95: 1.0, 105: 8.0, 111: 1.0})
    match = find(table, "vllm", {"shape": (100.0, 1.0)})
    assert match is not None and len(match.neighbours) == 4
    plain = np.prod([8.0**n.weight for n in match.neighbours if table.keys["shape"][n.series] == 105])
    guess = float(carried(match, "tokens", lambda x: x, lambda _: lambda x: x).seconds(4)) / 4
    assert 1.0 < guess < 1.1 < plain


def test_one_model_does_not_crowd_out_the_others() -> None:
    table = toy({90: 1.0, 91: 1.0, 92: 1.0, 93: 1.0, 120: 1.0})
    groups = table.keys["model"]
    match = find(table, "vllm", {"shape": (95.0, 1.0)}, count=4, crowd=(groups, 2))
    assert match is not None
    assert sorted(table.keys["shape"][[n.series for n in match.neighbours]].tolist()) == [92, 93, 120]


def test_derived_columns_count_in_the_distance() -> None:
    table = toy({90: 1.0, 110: 1.0})
    far = {"handed": np.array([1.0, 8.0])}
    match = find(table, "vllm", {"shape": (100.0, 1.0), "handed": (8.0, 1.0)}, derived=far)
    assert match is not None and int(table.keys["shape"][match.neighbours[0].series]) == 110


def test_handed_rows_cost_a_pass_over_memory() -> None:
    alone = roofline.expert_gemm(H200, "bf16", 4096, 512, 4, 3)
    shared = roofline.expert_gemm(H200, "bf16", 4096, 512, 4, 3, handed=8.0)
    x = np.array([1.0, 4096.0])
    extra_bytes = 4096 * 7 * (2 * 4096 + 4 * 512)
    assert (shared(x) >= alone(x)).all()
    assert float(shared(x)[1] - alone(x)[1]) <= extra_bytes / H200.bytes_per_s * (1 + 1e-9)
    assert handed_per_kept(4096, 16, 128, 8) == 8.0
    assert handed_per_kept(7168, 4, 256, 8) == pytest.approx(8 / 4.125), "group-limited routing of DeepSeek-V3"


def published() -> list[dict[str, str]]:
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["used"] == "yes"]


def law_error(row: dict[str, str]) -> float:
    ceilings = replace(Ceilings.of(system(NAMES[row["gpu"]])), scale_out_bytes_per_s=50e9)
    numbers = (int(row[name]) for name in ("num_gpus", "nodes", "hidden", "top_k", "num_experts"))
    what = Exchange(row["step"], row["mode"], *numbers, row["fmt"], int(row["node_limit"]))
    law = LAWS[row["library"], row["mode"], row["step"]]
    return float(exchange(ceilings, what, law)(np.array(float(row["tokens"])))) / float(row["microseconds"]) * 1e6 - 1


@pytest.mark.parametrize("library, share", [("deepep", 0.9), ("pplx", 1.0), ("nccl-ep", 0.9), ("mori", 0.5)])
def test_laws_reproduce_published_exchange(library: str, share: float) -> None:
    errors = np.abs([law_error(row) for row in published() if row["library"] == library])
    assert len(errors) > 8
    assert np.median(errors) < 0.10
    assert np.mean(errors < 0.105) >= share


def test_published_rows_name_their_source() -> None:
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all("/" in row["source"] and row["how"] for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)


def test_amd_exchanges_by_mori_and_unknown_libraries_are_refused() -> None:
    assert Ceilings.of(system("mi300x")).exchange_library == "mori"
    assert law_of("pplx", "normal", "combine") is LAWS["deepep", "normal", "combine"]
    with pytest.raises(InputError, match="deepep"):
        law_of("deep-ep", "normal", "combine")


def test_the_hottest_receiver_scales_bytes_and_not_the_floor() -> None:
    law = exchange(H200, Exchange("dispatch", "low_latency", 32, 4, 7168, 8, 256, "fp8"))
    floor, even, hot = (float(law(np.array(x))) for x in (0.0, 100.0, 150.0))
    assert hot - floor == pytest.approx(1.5 * (even - floor))


def test_oversubscription_slows_what_crosses_the_spine() -> None:
    plain, narrow = (open_tables(system("mi300x"), "vllm", Fabric(n)) for n in (1.0, 4.0))
    mixed = open_tables(system("mi300x"), "vllm", Fabric(4.0, rail_optimised=False))
    size = 256e6
    assert narrow.all_reduce(32).seconds(size) == pytest.approx(float(plain.all_reduce(32).seconds(size)))
    far = mixed.all_to_all(32).seconds(size) / plain.all_to_all(32).seconds(size)
    assert 3.5 < far <= 4.0
    direct = Exchange("dispatch", "low_latency", 32, 4, 7168, 8, 256, "fp8")
    law = LAWS["deepep", "low_latency", "dispatch"]
    slow, fast = (exchange(replace(H200, fabric=Fabric(n)), direct, law)(np.array(4096.0)) for n in (4.0, 1.0))
    # Seven in eight direct sends leave their rail: 1 / 8 + 7 / 8 x 4.
    assert float(slow / fast) == pytest.approx(1 / 8 + 7 / 8 * 4, rel=0.05)
    with pytest.raises(InputError, match="oversubscription"):
        open_tables(system("mi300x"), "vllm", Fabric(0.5))


@steady
@given(
    st.sampled_from(["low_latency", "normal"]),
    st.sampled_from([2, 8, 16, 64, 256]),
    st.integers(0, 10_000),
    st.integers(0, 10_000),
)
def test_exchange_never_gets_faster_with_more_tokens(mode: str, ranks: int, one: int, other: int) -> None:
    law = exchange(H200, Exchange("combine", mode, ranks, -(-ranks // 8), 4096, 8, 128, "bf16"))
    low, high = sorted((one, other))
    assert 0 < law(np.array(float(low))) <= law(np.array(float(high)))


def test_more_nodes_never_make_exchange_faster() -> None:
    for key in LAWS:
        _, mode, step = key
        times = [
            float(exchange(H200, Exchange(step, mode, 8 * n, n, 7168, 8, 256, "bf16"), LAWS[key])(np.array(1024.0)))
            for n in (2, 4, 8, 16)
        ]
        assert times == sorted(times)


def test_racks_exchange_inside_and_between_nvlink_domains() -> None:
    rack = Ceilings.of(system("gb200-nvl72"))
    inside = exchange(rack, Exchange("dispatch", "low_latency", 72, 1, 7168, 8, 288, "fp8"))
    between = exchange(rack, Exchange("dispatch", "low_latency", 144, 2, 7168, 8, 288, "fp8"))
    assert float(between(np.array(512.0))) > 4 * float(inside(np.array(512.0)))
