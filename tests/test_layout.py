from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import LayoutError
from planner.layout import Layout, check_layout, layout_problem, parse_layout
from planner.model import ModelConfig, load


def test_parse_fills_moe_tp_from_the_product() -> None:
    assert parse_layout("tp=8,ep=8") == Layout(tp=8, ep=8, moe_tp=1)
    assert parse_layout("tp=8") == Layout(tp=8, moe_tp=8)
    assert parse_layout("tp=2,attention_dp=4,ep=4,replicas=3") == Layout(2, 1, 4, 4, 2, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp=0", "positive integer"),
        ("tp=eight", "positive integer"),
        ("tp=²", "positive integer"),
        pytest.param("tp=" + "9" * 5000, "layout .tp=9", id="digits"),
        ("tp", "positive integer"),
        ("cp=2", "not one of"),
        ("tp=2,tp=4", "twice"),
        ("tp=8,ep=4,moe_tp=4", "ep x moe_tp = 4 x 4 must equal tp x attention_dp = 8 x 1 = 8"),
        ("", "not one of"),
    ],
)
def test_parse_names_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        parse_layout(text)


def test_rules_name_the_offending_product_and_a_remedy(deepseek: ModelConfig, mixtral: ModelConfig) -> None:
    with pytest.raises(LayoutError, match="ep=24 does not divide 256 experts. Use 16 or 32"):
        check_layout(deepseek, Layout(attention_dp=24, ep=24))
    assert "moe_tp=3 does not divide the expert width 14336" in str(layout_problem(mixtral, Layout(tp=3, moe_tp=3)))
    assert "exceeds the 32 layers" in str(layout_problem(mixtral, Layout(pp=64)))
    dense = load("llama-2-70b")
    assert "is dense" in str(layout_problem(dense, Layout(tp=8, ep=8)))
    assert layout_problem(dense, Layout(tp=8, moe_tp=8)) is None


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 8), st.integers(1, 64), st.integers(1, 9))
def test_gpu_counts_are_products(tp: int, dp: int, pp: int, ep: int, replicas: int) -> None:
    layout = Layout(tp=tp, attention_dp=dp, pp=pp, ep=ep, replicas=replicas)
    assert layout.num_gpus == tp * dp * pp * replicas == layout.replica_gpus * replicas


def test_families() -> None:
    assert Layout(tp=8, moe_tp=8).family == "TP"
    assert Layout(tp=8, ep=8).family == "TEP"
    assert Layout(attention_dp=8, ep=8).family == "DEP"
    assert Layout(attention_dp=8, moe_tp=8).family == "DTP"
