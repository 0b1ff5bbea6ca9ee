"""The page under Streamlit's own test harness: logic of widgets, views, links and bad input."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from planner.whatif import front
from planner.whatif.analytic import Answer, answer
from planner.whatif.pins import packed
from planner.whatif.scenario import Scenario

pytest.importorskip("streamlit")
APP = Path(__file__).parents[1] / "app.py"
SMALL = Scenario(model="mistralai/Mixtral-8x7B-v0.1", system="h100-sxm", gpus=8)


def _open(scenario: Scenario = SMALL, **more: str) -> Any:
    from streamlit.testing.v1 import AppTest

    page = AppTest.from_file(str(APP), default_timeout=120)
    for name, value in (scenario.query() | more).items():
        page.query_params[name] = value
    return _checked(page.run())


def _checked(page: Any) -> Any:
    assert not page.exception, page.exception[0].stack_trace
    return page


def _texts(page: Any) -> str:
    kinds = ("markdown", "caption", "error", "warning", "info")
    html = [element.proto.body for element in page.get("html")]
    return "\n".join([str(e.value) for kind in kinds for e in getattr(page, kind)] + html)


def test_a_link_reproduces_the_view_and_a_change_moves_the_answer() -> None:
    page = _open(rate="2.0")
    assert page.selectbox(key="in_model").value == SMALL.model and page.number_input(key="in_rate").value == 2.0
    tiles = {metric.label: metric.value for metric in page.metric}
    assert {"TTFT p95", "TPOT p95", "Throughput", "Price per Mtok", "Carries at most"} <= set(tiles)
    assert "expected to meet the SLO" in _texts(page) and "Bottleneck" in _texts(page)
    _checked(page.number_input(key="in_rate").set_value(3.0).run())
    changed = {metric.label: metric.value for metric in page.metric}
    assert changed["TPOT p95"] != tiles["TPOT p95"]
    assert page.query_params["rate"] == "3.0" and page.query_params["system"] == "h100-sxm"
    assert "--rate 3 " in page.code[0].value and page.code[0].value.startswith("moeplan simulate")


def test_bad_input_keeps_the_form_and_the_last_answer() -> None:
    page = _open()
    before = [metric.value for metric in page.metric]
    _checked(page.text_input(key="in_slo").set_value("ttft_p95=2").run())
    assert "no unit" in page.error[0].value and "last valid question" in _texts(page)
    assert [metric.value for metric in page.metric] == before
    assert page.text_input(key="in_slo").value == "ttft_p95=2" and page.number_input(key="in_gpus").value == 8
    _checked(page.text_input(key="in_slo").set_value(SMALL.slo).run())
    assert not page.error


def test_a_hopeless_question_offers_remedies_that_one_click_applies() -> None:
    page = _open(Scenario(model=SMALL.model, system="h100-sxm", gpus=1))
    assert "does not fit" in _texts(page)
    _checked(page.button(key="remedy_0").click().run())
    assert "expected to meet the SLO" in _texts(page)


def test_knobs_views_and_pins_live_in_one_link() -> None:
    pinned = packed([SMALL])
    page = _open(
        Scenario(model=SMALL.model, system="h100-sxm", gpus=8, ep=4, skew="zipf:1"), view="MoE knobs", pins=pinned
    )
    table = {row["per decode step"]: row["with the knobs"] for row in page.table[0].value.to_dict("records")}
    assert float(table["busiest rank over the even share"]) > 1.0
    _checked(page.number_input(key="in_ep").set_value(3).run())
    assert "does not divide 8 experts" in page.error[0].value.replace("\\", "")
    page.number_input(key="in_ep").set_value(4)
    page.session_state["view"] = "Pins"
    _checked(page.run())
    assert {row[""] for row in page.table[0].value.to_dict("records")} >= {"ep", "skew", "TPOT P95"}
    assert page.query_params["pins"] == pinned and page.query_params["view"] == "Pins"


def test_a_faulty_link_is_answered_but_for_its_faults() -> None:
    page = _open(SMALL, rate="2.0", redundant="-8", slo="ttft_p95=2", rivals="h300", left_out="config")
    assert page.number_input(key="in_rate").value == 2.0 and page.selectbox(key="in_model").value == SMALL.model
    said = [warning.value.replace("\\", "") for warning in page.warning]
    for words in ("rivals of the link", "redundant -8", "'ttft_p95=2'", "model is not in the link"):
        assert any(words in text for text in said), (words, said)
    assert not page.error and "expected to meet the SLO" in _texts(page)
    assert page.number_input(key="in_gpus").min == 1 and page.number_input(key="in_users").min == 0


def test_a_comparison_is_no_input_of_the_plan_and_shows_its_own_command() -> None:
    page = _open(SMALL, view="Compare clusters", rivals="h100-sxm,h200-sxm")
    assert page.code[0].value.startswith("moeplan compare") and page.code[0].value.count("--cluster") == 2
    _checked(page.multiselect(key="rivals").set_value(["h200-sxm"]).run())
    assert page.query_params["rivals"] == "h200-sxm"
    _checked(page.button(key="pin").click().run())
    page.session_state["view"] = "Plan"
    _checked(page.run())
    assert page.code[0].value.startswith("moeplan simulate") and page.query_params["rivals"] == "h200-sxm"
    assert page.session_state["pinned"] == [SMALL] and page.button(key="pin").disabled


def test_what_is_missing_stays_said_until_the_form_changes() -> None:
    page = _open(SMALL, left_out="trace", view="Simulation")
    _checked(page.run())
    assert "trace is not in the link" in _texts(page) and page.query_params["left_out"] == "trace"
    page.session_state["in_trace"], page.session_state["in_trace_name"] = "arrival_s,prompt_tokens,output_tokens\n" + \
        "".join(f"{i},100,20\n" for i in range(9)), "t.csv"  # fmt: skip
    _checked(page.run())
    assert "trace is not in the link" not in _texts(page) and "the uploaded t" in _texts(page)
    assert page.query_params["left_out"] == "trace"


def test_the_command_shown_is_that_of_the_run_shown() -> None:
    class Ran:
        is_running, command, scenario = False, "", SMALL

        def answers(self, scenario: Scenario, commands: Any) -> bool:
            self.command = [*commands][1]
            return True

        def facts(self) -> None: ...

        def problem(self) -> str:
            return "none"

    page = _open(SMALL, view="Simulation")
    assert page.code[0].value.startswith("moeplan simulate")
    page.session_state["run"] = Ran()
    _checked(page.run())
    assert page.code[0].value.startswith("moeplan plan")


def test_a_layout_of_the_list_is_shown_until_it_is_taken_back() -> None:
    found = answer(SMALL)
    assert isinstance(found, Answer)
    page = _open()
    for identity in [*front.names(found)][:2]:
        _checked(page.selectbox(key="listed").set_value(identity).run())
        assert page.session_state["picked"] == identity and any(b.key == "use_layout" for b in page.button)
    _checked(page.selectbox(key="listed").set_value(None).run())
    assert not any(b.key == "use_layout" for b in page.button) and not page.warning


@pytest.mark.slow
def test_two_sessions_do_not_share_their_state() -> None:
    one, two = _open(), _open()
    _checked(one.number_input(key="in_rate").set_value(9.0).run())
    _checked(two.run())
    assert two.number_input(key="in_rate").value == 4.0


@pytest.mark.slow
def test_a_simulation_shows_its_result_beside_the_page() -> None:
    page = _open(view="Simulation", workload="fixed:64/8")
    _checked(page.button[0].click().run())
    job = page.session_state["run"]
    end = time.monotonic() + 120
    while job.is_running and time.monotonic() < end:
        time.sleep(0.1)
    _checked(page.run())
    assert job.problem() is None and "the SLO" in _texts(page)
    assert {metric.label for metric in page.metric} >= {"TTFT p95", "TPOT p95", "Throughput"}


@pytest.mark.slow
@pytest.mark.parametrize("view", ["Simulation", "Compare clusters", "Pins", "nonsense"])
def test_every_view_opens(view: str) -> None:
    page = _open(view=view, rivals="h100-sxm,h200-sxm", gpus="x")
    assert "cannot be read" in _texts(page)
