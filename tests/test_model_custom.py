"""Model TOMLs: given shapes, solved shapes, and every fault at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import ModelConfigError
from planner.model import describe_layers, load
from planner.model.custom import from_toml
from planner.model.hypothetical import Shape, solve

SHAPE: dict[str, Any] = {
    "source": "test",
    "hidden": 1024,
    "num_layers": 6,
    "num_heads": 16,
    "num_kv_heads": 4,
    "vocab": 32_000,
    "dense_width": 4096,
}
EXPERTS = {"num": 32, "top_k": 4, "width": 512, "shared_width": 512, "first_dense_layers": 1, "every": 1}


def test_given_shape() -> None:
    model = from_toml(SHAPE | {"experts": EXPERTS, "formats": {"experts": "nvfp4", "kv": "fp8"}}, "m.toml", "m")
    attention = 2 * 1024 * 1024 + 2 * 1024 * 256
    expert = 3 * 1024 * 512
    sparse = 32 * expert + expert + 32 * 1024
    expected = 2 * 32_000 * 1024 + 1024 + 6 * (attention + 2048) + 3 * 1024 * 4096 + 5 * sparse
    assert model.total_params == expected
    assert model.active_params_with_embeddings == expected - 5 * 28 * expert
    assert (model.format_of("expert"), model.format_of("attention"), model.kv_format) == ("nvfp4", "bf16", "fp8")
    assert model.kv_bytes_per_token == 6 * 2 * 256
    assert [count for count, _ in describe_layers(model)] == [1, 5]


def test_every_second_layer_and_plain_experts() -> None:
    experts = EXPERTS | {"every": 2, "first_dense_layers": 0, "gated": False}
    model = from_toml(SHAPE | {"experts": experts}, "m.toml", "m")
    assert [layer.moe is not None for layer in model.layers] == [False, True] * 3
    assert model.params_by_part()["expert"] == 3 * 32 * 2 * 1024 * 512


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('source = "me"\ntotal_params = 60e9\nactive_params = 8e9\n', encoding="utf-8")
    model = load(str(path))
    assert model.name == "mine"
    assert model.total_params == pytest.approx(60e9, rel=0.02)
    assert model.active_params_with_embeddings == pytest.approx(8e9, rel=0.02)
    assert any("assumed shape" in note for note in model.notes)


@pytest.mark.parametrize(("name", "total", "active"), [("gpt-4-like", 1.8e12, 280e9), ("moe-60b-a8b", 60e9, 8e9)])
def test_bundled_examples(name: str, total: float, active: float) -> None:
    model = load(name)
    assert model.total_params == pytest.approx(total, rel=0.02)
    assert model.active_params_with_embeddings == pytest.approx(active, rel=0.02)
    assert "rumour" in model.notes[0] or "hypothetical" in model.notes[0]
    assert "%" in model.notes[-1]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    total=st.floats(2e10, 3e12),
    routing=st.sampled_from([(8, 2), (16, 2), (32, 4), (64, 4), (128, 8), (256, 8)]),
    surplus=st.floats(0.02, 0.2),
)
def test_solved_shapes_meet_their_totals(total: float, routing: tuple[int, int], surplus: float) -> None:
    experts, top_k = routing
    active = total * (top_k / experts + (1 - top_k / experts) * surplus)
    shape, notes = solve(total, active, Shape(num_experts=experts, top_k=top_k))
    found_total, found_active = shape.params()
    assert found_total == pytest.approx(total, rel=0.02)
    assert found_active == pytest.approx(active, rel=0.02)
    assert shape.num_heads % shape.num_kv_heads == 0
    assert f"{found_active:.4g} active" in notes[1]


def test_solver_counts_as_the_model_does() -> None:
    raw = {"source": "t", "total_params": 671e9, "active_params": 37e9, "experts": {"num": 256, "top_k": 8}}
    model = from_toml(raw, "m.toml", "m")
    shape, _ = solve(671e9, 37e9, Shape(num_experts=256, top_k=8))
    assert (model.total_params, model.active_params_with_embeddings) == shape.params()
    dense = from_toml({"source": "t", "total_params": 70e9, "active_params": 70e9}, "m.toml", "m")
    assert dense.num_moe_layers == 0
    assert dense.total_params == pytest.approx(70e9, rel=0.02)


def test_all_faults_at_once() -> None:
    raw = SHAPE | {"hiden": 5, "num_layers": -1, "experts": {"num": "many", "topk": 2, "top_k": 2}}
    with pytest.raises(ModelConfigError) as caught:
        from_toml(raw, "m.toml", "m")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "m.toml: hiden: unknown key (did you mean hidden?)" in lines
    assert "m.toml: experts.topk: unknown key (did you mean top_k?)" in lines
    assert any(line.startswith("m.toml: num_layers: ") and "-1" in line for line in lines)
    assert any(line.startswith("m.toml: experts.num: ") and "'many'" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": None, "vocab": None}, "hidden: missing(.|\n)*vocab: missing"),
        ({"dense_width": None}, r"dense_width: missing; add it or an \[experts\] table"),
        ({"dense_width": None, "experts": EXPERTS}, "the layers without experts need it"),
        ({"experts": EXPERTS | {"top_k": 64}}, "experts.top_k: 64 exceeds experts.num 32"),
        ({"experts": {"num": 8, "top_k": 2}}, "experts.width: missing"),
        ({"num_kv_heads": 5}, "num_kv_heads: 5 does not divide num_heads 16"),
        ({"num_heads": 15, "num_kv_heads": None}, "num_heads: 15 does not divide hidden 1024"),
        ({"formats": {"weights": "fp6"}}, "formats.weights: 'fp6' is not one of"),
        ({"formats": {"kv": "fp8_ds_mla"}}, "formats.kv: 'fp8_ds_mla' is not one of"),
        ({"total_params": 1e9}, "belong together"),
        ({"total_params": 1e9, "active_params": 2e9}, "exceeds total_params"),
        ({"total_params": float("nan"), "active_params": 2e9}, "total_params"),
        ({"source": None}, "source: missing; add it"),
    ],
)
def test_faults(changes: dict[str, Any], message: str) -> None:
    raw = {key: value for key, value in (SHAPE | changes).items() if value is not None}
    with pytest.raises(ModelConfigError, match=message):
        from_toml(raw, "m.toml", "m")


def test_impossible_totals() -> None:
    raw = {"source": "t", "total_params": 60e9, "active_params": 2e9, "experts": {"num": 8, "top_k": 2}}
    with pytest.raises(ModelConfigError, match="no shape has 6e\\+10 parameters of which 2e\\+09 are active with 8"):
        from_toml(raw, "m.toml", "m")


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text("hidden = ", encoding="utf-8")
    with pytest.raises(ModelConfigError, match="not valid TOML"):
        load(str(path))
    path.write_bytes(b'source = "\xff\xfe"')
    with pytest.raises(ModelConfigError, match="UTF-8"):
        load(str(path))
    path.write_text("#" + " " * 2_000_000, encoding="utf-8")
    with pytest.raises(ModelConfigError, match="at most 1 MB are read"):
        load(str(path))
