"""What the dashboard claims is true: verdicts, reasons, intervals, comparisons and remedies."""

from __future__ import annotations

from dataclasses import replace

from planner.whatif import analytic, edits, lab, rows
from planner.whatif.analytic import Answer, answer
from planner.whatif.scenario import Scenario

SMALL = Scenario(model="mistralai/Mixtral-8x7B-v0.1", system="h100-sxm", gpus=8, rate=4.0)
DROPPING = replace(SMALL, capacity_factor=1.0, skew="zipf:1")


def _answer(scenario: Scenario) -> Answer:
    found = answer(scenario)
    assert isinstance(found, Answer), found
    return found


def test_an_answer_that_drops_work_is_no_success() -> None:
    found, knobs = _answer(DROPPING), lab.lab(DROPPING)
    assert isinstance(knobs, lab.Lab) and knobs.knobs
    assert found.meets_slo and found.drops and not found.is_good
    assert found.drop_rate["decode"] == knobs.knobs.drop_rate
    said = analytic.headline(found)
    assert f"{knobs.knobs.drop_rate:.1%} in decode" in said and "expected to meet" not in said
    shown = {row[""]: row for row in rows.pinned(_answer(SMALL), found)}
    assert shown["Dropped assignments"]["pinned"] == "0.0%" != shown["Dropped assignments"]["now"]
    tried = edits.edits(found)
    assert tried and all(_answer(edit.scenario).is_good for edit in tried)
    assert _answer(SMALL).is_good
