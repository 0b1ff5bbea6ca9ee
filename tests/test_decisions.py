"""Decisions on predictions against those on measurements, on cases small enough to do by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.validation.decisions import LEAST_GAP, TPOT_LIMITS_MS, Values, layout_choices, picks
from planner.validation.points import Point

BASE = Point("p", "m", "H100", "vllm", "fp8", 8, 8, 1, 1, 1, 1024, 1024, (0.8, 1.0), 16, (100.0, 10.0, 100.0))
TP = {"tp": 8, "attention_dp": 1, "moe_ep": 1}
EP = {"tp": 8, "attention_dp": 1, "moe_ep": 8}
ADP = {"tp": 1, "attention_dp": 8, "moe_ep": 8}


def measured(throughput: float, tpot_ms: float = 10.0, **changes: object) -> Point:
    return replace(BASE, measured=(100.0, tpot_ms, throughput), **changes)  # type: ignore[arg-type]


def says(throughput: float, tpot_ms: float = 10.0) -> Values:
    return (100.0, tpot_ms, throughput)


def test_the_better_layout_is_right_whatever_its_value() -> None:
    runs = [(measured(100, **TP), says(500)), (measured(120, **EP), says(501))]
    found = layout_choices(runs)
    assert (found.num, found.num_right, found.by_kind) == (1, 1, {"TP against EP": (1, 1)})
    wrong = layout_choices([(runs[0][0], says(502)), runs[1]])
    assert (wrong.num, wrong.num_right, wrong.by_kind) == (1, 0, {"TP against EP": (0, 1)})


def test_equal_predictions_choose_nothing_and_are_wrong() -> None:
    runs = [(measured(100, **TP), says(7)), (measured(120, **EP), says(7))]
    assert layout_choices(runs).num_right == 0


def test_three_layouts_are_three_choices() -> None:
    layouts = (TP, EP, ADP)
    runs = [(measured(100 * 1.5**i, **layout), says(100 + i)) for i, layout in enumerate(layouts)]
    found = layout_choices(runs)
    assert found.by_kind == {
        "TP against EP": (1, 1),
        "attention-DP against TP": (1, 1),
        "attention-DP against EP": (1, 1),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"concurrency": 32},
        {"isl": 8192},
        {"osl": 1},
        {"precision": "fp4"},
        {"gpu": "H200"},
        {"model": "n"},
        {"engine": "sglang"},
        {"num_gpus": 4, "tp": 4},
        {"lengths": (1.0, 1.0)},
    ],
)
def test_runs_of_another_load_or_server_are_not_compared(changes: dict[str, object]) -> None:
    assert layout_choices([(BASE, says(1)), (measured(200, **{**EP, **changes}), says(2))]).num == 0


def test_repeats_of_one_layout_and_layouts_that_are_alike_are_no_choice() -> None:
    assert layout_choices([(measured(100), says(1)), (measured(200), says(2))]).num == 0
    for gap, num in ((LEAST_GAP * 0.99, 0), (LEAST_GAP * 1.01, 1)):
        assert layout_choices([(measured(100, **TP), says(1)), (measured(100 * (1 + gap), **EP), says(2))]).num == num


def test_what_was_not_measured_or_not_predicted_is_left_out() -> None:
    good = measured(100, **TP), says(1)
    assert layout_choices([good, (measured(math.nan, **EP), says(2))]).num == 0
    assert layout_choices([good, (measured(200, **EP), says(math.nan))]).num == 0
    assert picks([good, (measured(200, **EP), says(math.nan))]).num == 0


LIGHT, MIDDLE, HEAVY = ({"concurrency": n} for n in (1, 8, 64))


def test_perfect_predictions_pick_the_best_and_keep_every_limit() -> None:
    points = [measured(50, 8, **LIGHT), measured(200, 18, **MIDDLE), measured(400, 60, **HEAVY)]
    found = picks([(point, point.measured) for point in points])
    assert (found.num, found.share_of_best, found.violations) == (len(TPOT_LIMITS_MS), 1.0, 0.0)


def test_picks_by_hand() -> None:
    """Limits 10 and 15: the light run, which is the best. 20 and 30: a slow server is taken for a fast one, and
    breaks 20 and 30 with 35 ms. 50 and 100: it keeps them with 150 of the 200 that were possible."""
    points = [measured(50, 8, **LIGHT), measured(150, 35, **MIDDLE), measured(200, 45, **HEAVY)]
    predicted = [says(60, 8), says(500, 18), says(100, 45)]
    found = picks(list(zip(points, predicted, strict=True)))
    assert (found.num, found.violations) == (6, pytest.approx(2 / 6))
    assert found.share_of_best == pytest.approx((1 + 1 + 150 / 200 + 150 / 200) / 4)


def test_a_margin_leaves_out_what_is_near_the_limit() -> None:
    points = [measured(50, 8, **LIGHT), measured(150, 22, **MIDDLE)]
    runs = list(zip(points, [says(50, 8), says(150, 19)], strict=True))
    assert picks(runs).violations == pytest.approx(1 / 6)
    assert picks(runs, margin=1.2).violations == 0.0


def test_limits_that_nobody_keeps_and_lone_runs_are_no_picks() -> None:
    slow = [measured(50, 200, **LIGHT), measured(150, 300, **HEAVY)]
    found = picks([(point, point.measured) for point in slow])
    assert found.num == 0 and math.isnan(found.share_of_best) and math.isnan(found.violations)
    assert picks([(BASE, says(1))]).num == 0
    assert picks([(BASE, says(1)), (BASE, says(2))]).num == 0


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.floats(1, 1e4), st.floats(5, 90), st.floats(1, 1e4), st.floats(5, 90)), min_size=2, max_size=6
    )
)
def test_no_pick_is_better_than_the_best(runs: list[tuple[float, float, float, float]]) -> None:
    found = picks([(measured(a, b, concurrency=i + 1), says(c, d)) for i, (a, b, c, d) in enumerate(runs)])
    assert 0 <= found.violations <= 1 or found.num == 0
    assert math.isnan(found.share_of_best) or 0 < found.share_of_best <= 1
    oracle = picks([(measured(a, b, concurrency=i + 1), (1.0, b, a)) for i, (a, b, _, _) in enumerate(runs)])
    assert oracle.share_of_best == 1.0 and oracle.violations == 0.0
