"""Lookup: exact on the grid, log-linear between, roofline beyond, honest about which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import InputError, NoMeasurement, ProfileError
from planner.hardware import system
from planner.measurements import Origin, Tables, open_tables, roofline
from planner.measurements.curves import curve_of, surface_of
from planner.measurements.exchange import Exchange, exchange
from planner.measurements.experts import expert_curve, expert_match, handed_per_kept
from planner.measurements.library import Library
from planner.measurements.roofline import Ceilings
from planner.measurements.store import build_table, read_table, write_table

H200 = open_tables(system("h200-sxm"), "vllm")
UNMEASURED = open_tables(system("mi300x"), "vllm")
quick = settings(deadline=None, derandomize=True, max_examples=25)
sizes = st.integers(1, 70_000)


def h200_row(op: str, axis: str, **keys: object) -> tuple[np.ndarray, np.ndarray]:
    table = H200.library.table(op)
    assert table is not None
    chosen = np.ones(len(table.start) - 1, bool)
    for name, value in keys.items():
        wanted = table.code(name, value) if isinstance(value, str) else value
        chosen &= table.keys[name] == wanted
    (series,) = np.flatnonzero(chosen)
    rows = table.rows(int(series))
    return table.axes[axis][rows].astype(float), table.seconds[rows]


def test_measured_points_come_back_exactly() -> None:
    x, seconds = h200_row("gemm", "tokens", engine="vllm", fmt="bf16", rows=7168, cols=4096)
    curve = H200.gemm("bf16", 7168, 4096)
    assert curve.seconds(x) == pytest.approx(seconds, rel=1e-9)
    assert (curve.origin(x) == Origin.MEASURED).all()


def test_between_points_time_lies_between_and_advances_as_the_roofline() -> None:
    x, seconds = h200_row("gemm", "tokens", engine="vllm", fmt="bf16", rows=7168, cols=4096)
    seconds = np.maximum.accumulate(seconds)
    middle = (x[1:] * x[:-1]) ** 0.5
    curve = H200.gemm("bf16", 7168, 4096)
    between = curve.seconds(middle)
    assert (curve.origin(middle) == Origin.INTERPOLATED).all()
    assert (between >= seconds[:-1] * (1 - 1e-9)).all() and (between <= seconds[1:] * (1 + 1e-9)).all()
    roof = roofline.gemm(H200.ceilings, "bf16", 7168, 4096)
    rise = roof(x[1:]) - roof(x[:-1])
    steps = rise > 1e-3 * roof(x[:-1])
    assert steps.sum() > 15
    way = (roof(middle) - roof(x[:-1]))[steps] / rise[steps]
    expected = seconds[:-1][steps] + way * np.diff(seconds)[steps]
    assert between[steps] == pytest.approx(expected, rel=0.03)
    assert np.median(np.abs(between[steps] / expected - 1)) < 1e-6


def test_beyond_the_last_point_time_follows_the_roofline() -> None:
    x, seconds = h200_row("gemm", "tokens", engine="vllm", fmt="bf16", rows=7168, cols=4096)
    curve = H200.gemm("bf16", 7168, 4096)
    assert curve.seconds(x[-1] * 16) == pytest.approx(16 * seconds[-1], rel=0.03)
    assert curve.origin(x[-1] * 16) == Origin.EXTRAPOLATED


def test_expert_layer_on_its_grid() -> None:
    keys = {"engine": "vllm", "fmt": "bf16", "hidden": 2048, "width": 768, "local_experts": 128, "num_experts": 128}
    x, seconds = h200_row("expert_gemm", "assignments", **keys, top_k=8, num_matrices=3)
    curve = H200.expert_gemm("bf16", 2048, 768, 128, 128, 8)
    assert curve.seconds(x) == pytest.approx(seconds, rel=1e-9)
    assert (curve.origin(x) == Origin.MEASURED).all()


def test_attention_on_its_grid_and_over_heads() -> None:
    table = H200.library.table("decode_attention")
    assert table is not None
    surface = H200.decode_attention(8, 1, 128, "bf16")
    batch, length = np.array([1, 16, 128]), np.array([1024, 4096, 16384])
    assert (surface.origin(batch[:, None], length[None, :]) <= Origin.INTERPOLATED).all()
    between = H200.decode_attention(7, 1, 128, "bf16")
    assert int(between.origin(16, 4096)) == Origin.INTERPOLATED
    assert float(between.seconds(64, 8192)) <= float(surface.seconds(64, 8192)) * 1.1


def test_windowed_attention_stops_growing() -> None:
    surface = H200.decode_attention(8, 1, 64, "bf16", window=128)
    assert float(surface.seconds(64, 131072)) < 2 * float(surface.seconds(64, 256))


def test_unseen_shape_is_bracketed_or_flagged() -> None:
    inside, outside = H200.gemm("bf16", 5000, 5000), H200.gemm("bf16", 262144, 7168)
    assert inside.shape_origin == Origin.INTERPOLATED
    assert outside.shape_origin == Origin.EXTRAPOLATED
    low, high = H200.gemm("bf16", 4096, 4096).seconds(4096), H200.gemm("bf16", 6144, 6144).seconds(4096)
    assert low < inside.seconds(4096) < high


def test_format_without_table_borrows_and_says_so() -> None:
    assert H200.gemm("nvfp4", 4096, 4096).shape_origin == Origin.EXTRAPOLATED
    with pytest.raises(NoMeasurement, match="bf17"):
        H200.gemm("bf17", 64, 64)


def test_another_engine_answers_when_this_one_was_not_measured() -> None:
    trtllm = open_tables(system("h200-sxm"), "trtllm")
    curve = trtllm.expert_gemm("bf16", 2048, 768, 128, 128, 8)
    assert curve.shape_origin == Origin.EXTRAPOLATED
    assert "vllm" in trtllm.sources["expert_gemm"]


def test_modules_include_projections_and_kernels_do_not() -> None:
    assert H200.mla_decode(128, "fp8", "fp8_block").includes_projections
    assert not open_tables(system("h200-sxm"), "sglang").mla_decode(128, "fp8", "fp8_block").includes_projections


def test_recurrent_decode_ignores_the_context() -> None:
    surface = H200.linear_attention("decode", 16, 32, 128, 128)
    assert surface is not None
    assert float(surface.seconds(64, 100_000)) == pytest.approx(float(surface.seconds(64, 1)), rel=1e-6)
    assert int(surface.origin(64, 100_000)) <= Origin.INTERPOLATED


def test_dispatched_ranks_do_not_pay_for_tokens_of_others() -> None:
    """EP 64 series of the table were handed 8 tokens per assignment; after a dispatch there is at most one."""
    shared = H200.expert_gemm("fp8_block", 6144, 2048, 4, 256, 8)
    alone = H200.expert_gemm("fp8_block", 6144, 2048, 4, 256, 8, dispatched=True)
    assert alone.seconds(1024) < 0.9 * shared.seconds(1024)


def test_host_bound_measurements_are_not_believed() -> None:
    """vLLM 0.24 fp8_block GEMMs were timed launching from Python, 59 us whatever their size; others take 5."""
    curve = H200.gemm("fp8_block", 2048, 2048)
    assert curve.shape_origin == Origin.EXTRAPOLATED
    assert curve.seconds(1) < 10e-6


def test_leaving_an_expert_shape_out_costs_little() -> None:
    table = H200.library.table("expert_gemm")
    assert table is not None
    keys, errors = table.keys, []
    for series in range(0, len(table.start) - 1, 41):
        shape = tuple(int(keys[name][series]) for name in ("hidden", "width", "local_experts", "num_matrices"))
        others = {name: column.copy() for name, column in keys.items()}
        # Moved out of reach, so that its neighbours have to answer.
        others["hidden"][series] = 1
        blind = replace(table, keys=others)
        fmt, k = table.label("fmt", series), int(keys["top_k"][series])
        experts = int(keys["num_experts"][series])
        match = expert_match(blind, table.label("engine", series), fmt, shape, experts, k, dispatched=False)
        assert match is not None
        rows = table.rows(series)
        handed = handed_per_kept(shape[0], shape[2], experts, k)
        guess = expert_curve(match, H200.ceilings, fmt, shape, handed).seconds(table.axes["assignments"][rows])
        errors.extend(np.abs(np.log(guess / table.seconds[rows])))
    print(f"unseen expert series: median {np.median(errors):.1%}, p90 {np.quantile(errors, 0.9):.1%}")
    assert np.median(errors) < 0.08
    assert np.quantile(errors, 0.9) < 0.25


def test_unmeasured_system_is_roofline() -> None:
    for curve in (UNMEASURED.gemm("bf16", 4096, 4096), UNMEASURED.all_reduce(8), UNMEASURED.all_to_all(16)):
        assert (curve.origin(np.array([1, 1e6])) == Origin.ROOFLINE).all()
    experts = UNMEASURED.expert_gemm("fp8", 4096, 1536, 16, 128, 8)
    gpu = UNMEASURED.system.gpu
    floor_s = 16 * 3 * 4096 * 1536 / (gpu.hbm_bytes_per_s * gpu.hbm_efficiency)
    assert floor_s < experts.seconds(16) < floor_s + 30e-6
    assert UNMEASURED.sparse_mla_decode(128, "fp8", "fp8_block") is None
    assert UNMEASURED.decode_attention(8, 1, 128, "bf16").origin(3, 5) == Origin.ROOFLINE
    assert UNMEASURED.sources["gemm"] == "roofline"


def test_unknown_engine_is_refused() -> None:
    with pytest.raises(InputError, match="tgi"):
        open_tables(system("h200-sxm"), "tgi")


def test_lookups_are_remembered() -> None:
    assert H200.gemm("bf16", 4096, 4096) is H200.gemm("bf16", 4096, 4096)
    assert open_tables(system("h200-sxm"), "vllm") is H200


def test_low_latency_dispatch_matches_published_deepep() -> None:
    """Handbook serving A7: 128 tokens over 64 ranks moved at 43.8 and 46.8 GB/s (59,136 and 114,688 B per token).

    The H200 cluster of the tables is within a tenth of the published H800 figures.
    """
    dispatch = H200.dispatch("low_latency", 64, 8, 7168, 8, 256, "fp8")
    combine = H200.combine("low_latency", 64, 8, 7168, 8, 256, "bf16")
    assert 128 * 59_136 / float(dispatch.seconds(128)) == pytest.approx(43.8e9, rel=0.1)
    assert 128 * 114_688 / float(combine.seconds(128)) == pytest.approx(46.8e9, rel=0.1)
    assert dispatch.origin(128) == Origin.MEASURED


def test_link_law_reproduces_deepep_low_latency() -> None:
    """Published dispatch / combine of 128 tokens at EP 16, 32, 64 on H800 (handbook serving 6.6)."""
    ceilings = replace(H200.ceilings, scale_up_bytes_per_s=200e9)
    published = {16: (118, 195), 32: (155, 273), 64: (173, 314)}
    for ranks, (dispatch_us, combine_us) in published.items():
        for fmt, microseconds in (("fp8", dispatch_us), ("bf16", combine_us)):
            step = "dispatch" if fmt == "fp8" else "combine"
            law = exchange(ceilings, Exchange(step, "low_latency", ranks, ranks // 8, 7168, 8, 256, fmt))
            assert float(law(np.array(128.0))) == pytest.approx(microseconds * 1e-6, rel=0.05)


def test_rack_law_reproduces_one_sided_nvl72() -> None:
    """TensorRT-LLM blog 18, bf16 dispatch of 2,048 tokens: 312 us at EP 8, 399 us at EP 64 (handbook serving 6.6)."""
    ceilings = Ceilings.of(system("gb200-nvl72"))
    for ranks, microseconds in ((8, 311.8), (64, 399.2)):
        law = exchange(ceilings, Exchange("dispatch", "low_latency", ranks, 1, 7168, 8, 256, "bf16"))
        assert float(law(np.array(2048.0))) == pytest.approx(microseconds * 1e-6, rel=0.15)


def test_collectives_between_nodes_are_slower_and_flagged() -> None:
    size = 64e6
    near, far = H200.all_reduce(8), H200.all_reduce(16)
    assert far.seconds(size) > near.seconds(size)
    assert far.origin(size) == Origin.EXTRAPOLATED
    exchanged = H200.all_to_all(16)
    bus = 256e6 * 15 / 16 / float(exchanged.seconds(256e6))
    assert bus == pytest.approx(2 * 45e9, rel=0.1), "busbw = N / (N - 1) x NIC"


def test_nvl72_stays_inside_its_domain() -> None:
    rack = open_tables(system("gb200-nvl72"), "trtllm")
    assert rack.all_gather(64).seconds(64e6) < H200.all_gather(64).seconds(64e6)


def test_no_network_no_nodes() -> None:
    lonely = Tables(H200.system, "vllm", Library(None), replace(H200.ceilings, scale_out_bytes_per_s=None))
    with pytest.raises(NoMeasurement, match="scale_out"):
        lonely.all_reduce(16)


@quick
@given(
    st.sampled_from(["bf16", "fp8", "fp8_block", "int4"]),
    st.integers(16, 40_000),
    st.integers(16, 20_000),
    sizes,
    sizes,
)
def test_gemm_never_gets_faster_with_more_tokens(fmt: str, rows: int, cols: int, one: int, other: int) -> None:
    curve = H200.gemm(fmt, rows, cols)
    low, high = sorted((one, other))
    assert curve.seconds(low) <= curve.seconds(high) * (1 + 1e-12)
    assert np.isfinite(curve.seconds(high))


@quick
@given(
    st.sampled_from(["bf16", "fp8_block", "mxfp4", "nvfp4"]),
    st.sampled_from([2048, 3000, 4096, 7168]),
    st.integers(64, 8192),
    st.sampled_from([1, 3, 16, 128]),
    sizes,
    sizes,
)
def test_experts_never_get_faster_with_more_assignments(
    fmt: str, hidden: int, width: int, local: int, one: int, other: int
) -> None:
    for tables in (H200, UNMEASURED):
        curve = tables.expert_gemm(fmt, hidden, width, local, 256, 8)
        low, high = sorted((one, other))
        assert curve.seconds(low) <= curve.seconds(high) * (1 + 1e-12)


@quick
@given(st.integers(2, 32), st.floats(1, 1e9), st.floats(1, 1e9))
def test_collectives_never_get_faster_with_more_bytes(gpus: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    for curve in (H200.all_reduce(gpus), H200.all_gather(gpus), H200.reduce_scatter(gpus), H200.all_to_all(gpus)):
        assert curve.seconds(low) <= curve.seconds(high) * (1 + 1e-12)


@quick
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 200_000), st.integers(1, 200_000))
def test_attention_grows_with_batch_and_length(b1: int, b2: int, l1: int, l2: int) -> None:
    (b_low, b_high), (l_low, l_high) = sorted((b1, b2)), sorted((l1, l2))
    for surface in (UNMEASURED.decode_attention(8, 1, 128, "bf16"), UNMEASURED.prefill_attention(8, 1, 128, "bf16")):
        assert surface.seconds(b_low, l_low) <= surface.seconds(b_high, l_high) * (1 + 1e-12)


def test_curve_keeps_shapes_and_lifts_dips() -> None:
    curve = curve_of(np.array([1.0, 2, 4]), np.array([2.0, 1, 4]), lambda x: x, Origin.MEASURED)
    assert curve.seconds(np.ones((2, 3))).shape == (2, 3)
    assert curve.seconds(2.0) == pytest.approx(2.0)
    assert curve.seconds(8.0) == pytest.approx(8.0)
    assert curve.origin([0.5, 1, 3, 9]).tolist() == [2, 0, 1, 2]


def test_surface_fills_holes_along_the_roofline() -> None:
    ratio = np.log(np.array([[2.0, 3.0], [2.0, np.nan]]))
    batch, length = np.array([1.0, 2.0]), np.array([1.0, 4.0])
    surface = surface_of(batch, length, ratio, lambda b, n: b * n, Origin.MEASURED, False)
    assert surface.seconds(2, 4) == pytest.approx(2 * 8)
    assert surface.origin(2, 4) == Origin.EXTRAPOLATED
    assert surface.origin(1, 4) == Origin.MEASURED
    assert surface.origin(1, 2) == Origin.INTERPOLATED
    assert surface.seconds([1, 2], [1, 1]).tolist() == pytest.approx([2, 4])


def test_tables_survive_the_file(tmp_path) -> None:
    columns = {"engine": ["b", "a", "a", "a"], "tokens": [1, 8, 2, 2], "seconds": [1e-6, 3e-3, 2.0, 1.0]}
    table = build_table("toy", columns, ("engine",), ("tokens",), np.array(columns["seconds"]))
    write_table(tmp_path / "toy.npz", table)
    back = read_table(tmp_path / "toy.npz")
    assert back.categories["engine"] == ("a", "b")
    assert back.axes["tokens"].tolist() == [2, 8, 1]
    assert back.seconds == pytest.approx([1.0, 3e-3, 1e-6], rel=6e-4)
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(ProfileError, match=r"bad\.npz"):
        read_table(tmp_path / "bad.npz")
