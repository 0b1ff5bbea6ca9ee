"""The report of a comparison: every part from its facts, nothing where they are missing, one page for the buyer."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from planner import report
from planner.errors import InputError
from planner.report.comparison import comparison_page
from planner.report.pdf import print_pdf
from planner.report.rows import table_of
from planner.runfolder import rewrite_report, write_comparison
from tests.comparison_facts import COMPARISON
from tests.test_outlook import OUTLOOK
from tests.test_report import FACTS, Page, assert_in_order


@pytest.fixture(scope="module")
def page() -> str:
    return report.html(COMPARISON)


def test_buyer_reads_answer_first(page: str) -> None:
    order = [
        "$74,752 a month, $4.80/Mtok output; best in 61% of draws",
        "a month, rental 2026-09-30",
        "chat, 20.0 requests/s, ttft_p95 &lt;= 2.00 s, tpot_p95 &lt;= 50.0 ms",
        "The systems at the same SLO and demand",
        "Is the winner the winner?",
        "Cost against demand",
        "What would change the answer",
        "MI300X rests on its data sheet alone.",
        "Layouts and what limits them",
        "Throughput against interactivity",
        "Best system by interactivity",
        "If the model doubles",
        "How the uncertainty was drawn",
        "Assumptions and their sources",
        "moeplan compare",
    ]
    assert_in_order(page, order)
    assert page.count("<svg") == 4


def test_summary_table_states_the_facts() -> None:
    made = comparison_page(COMPARISON)
    systems = next(section for section in made.summary if section.style == "systems").tables[0]
    rows = {row[0]: dict(zip(systems.header, row, strict=True)) for row in systems.rows}
    own = rows["h200-sxm:8x8 (best)"]
    assert (own["GPUs"], own["$ per month"], own["80 % range"]) == ("32", "$74,752", "$59.8k to $97.2k")
    assert (own["Best in"], own["Sure"], own["Output tok/s per MW"]) == ("61%", "83%", "91,000")
    assert own["To be 90 % sure"] == "64 GPUs, $150k"
    assert rows["b200-sxm:4x8"]["Best in"] == "<1%"
    assert rows["mi300x:4x8"]["$ per month"] == "–"
    assert rows["l40s:8x8"]["SLO"] == "does not fit" and rows["l40s:8x8"]["GPUs"] == "–"
    findings = {section.title: section.finding for section in (*made.summary, *made.evidence)}
    assert "h200-sxm:8x8 is cheapest at 0.5 x the demand, gb200-nvl72:18x4 from 4 x." in findings.values()
    assert "Another system wins at an end of price." in findings["What would change the answer"]
    assert "mi300x:4x8 is not measured" in findings["Layouts and what limits them"]


def test_headroom_and_bands_say_what_they_are() -> None:
    made = comparison_page(COMPARISON)
    assert ("Headroom", "2.25 x", "the asked demand") in made.tiles
    tables = {section.title: section.tables for section in made.evidence}
    assert [row[2] for row in tables["Layouts and what limits them"][0].rows][:2] == ["2.25 x", "at least 3 x"]
    speed, usd = tables["Best system by interactivity"]
    assert speed.header[1] == usd.header[1] == "Cheapest"
    assert speed.header[-1] == "Its tok/s/GPU against h100-sxm:16x8"
    rows = [row | {"usd_per_mtok_output": dict.fromkeys(row["values"])} for row in COMPARISON["bands"]["rows"]]
    unpriced = comparison_page(COMPARISON | {"bands": COMPARISON["bands"] | {"rows": rows}})
    bands = next(section for section in unpriced.evidence if section.title == "Best system by interactivity")
    assert bands.tables[0].header[1] == "Fastest"
    assert len(bands.tables) == 1 and bands.tables[0].rows[0][1] == "h200-sxm:8x8"
    partly = comparison_page(COMPARISON | {"bands": {"rows": [COMPARISON["bands"]["rows"][0], rows[1]]}})
    bands = next(section for section in partly.evidence if section.title == "Best system by interactivity")
    assert [row[1] for row in bands.tables[0].rows] == ["h200-sxm:8x8", "h200-sxm:8x8 (fastest, no price)"]


def test_growth_beyond_what_was_tried_is_a_bound() -> None:
    rows = [
        {"name": name, "room": 4.0, "room_at_least": bound, "months": {"25%": 74.6}}
        for name, bound in (("h200-sxm:8x8", True), ("h100-sxm:16x8", False))
    ]
    tables = {
        section.title: section.tables for section in comparison_page(COMPARISON | {"growth": {"rows": rows}}).evidence
    }
    growth = tables["Until the next purchase"][0]
    assert growth.header == ("Name", "Room", "Months at 25%")
    assert growth.rows[0][1:] == ("at least 4.00", "at least 74.6") and growth.rows[1][1:] == ("4.00", "74.6")
    costs = tables["What it costs"][0]
    months = costs.header.index("Months to next purchase")
    assert [row[months] for row in costs.rows][:2] == ["at least 7.00", "7.00"]


def test_results_that_all_systems_share_are_still_told() -> None:
    row = {"topic": "fabric", "change": "domain 8 -> 72 GPUs", "model": "M", "num_gpus_before": 8, "layout": "tp8 ep8"}
    rows = [
        row | {"system": name, "num_gpus_after": after, "note": ""}
        for name, after in (("h200-sxm", 8), ("b200-sxm", 8), ("l40s", None), ("mi300x", 1024))
    ]
    told = table_of(rows)
    assert told is not None
    assert told.header == ("System", "Change", "Number of GPUs before", "Layout", "Number of GPUs after")
    assert [line[2] for line in told.rows] == ["8"] * 4
    assert [line[-1] for line in told.rows] == ["no change", "no change", "not possible", "1,024"]
    alike = table_of(rows[:2])
    assert alike is not None and alike.header == told.header


_KEYS = ("memory", "step", "cdf", "timeline", "slo")


def _with_evidence() -> dict[str, Any]:
    evidence = {key: FACTS[key] for key in _KEYS} | {"heat": OUTLOOK["heat"]}
    own, *others = copy.deepcopy(COMPARISON["systems"])
    own["ttft_s"]["p95"], own["tpot_s"]["p95"] = 0.6, 0.045
    return COMPARISON | {"systems": [own | {"evidence": evidence}, *others]}


def test_run_of_the_winner_is_shown_as_in_a_plan() -> None:
    facts = _with_evidence()
    text = report.html(facts)
    order = [
        "Rent or buy</h2>",
        *(
            f"{name}: h200-sxm:8x8, tp8 ep8 x4</h2>"
            for name in (
                "Latency of requests",
                "Queue and batch over time",
                "Where a step spends its time",
                "Memory of the fullest GPU",
                "Load of the ranks by layer",
            )
        ),
        "How the uncertainty was drawn</h2>",
    ]
    assert_in_order(text, order)
    assert text.count("<svg") == 4 + 5
    assert "95% of requests see a TTFT below 600 ms (tightest limit 2.00 s)." in text
    parsed = Page(text)
    assert parsed.open == [] and len(parsed.ids) == len(set(parsed.ids))
    latencies = {metric: facts["systems"][0][metric] for metric in ("ttft_s", "tpot_s")}
    fleet = [{"model": "A", "layout": "tp2"}, {"model": "B", "layout": "tp4"} | latencies]
    several = report.markdown(facts | {"systems": [facts["systems"][0] | {"models": fleet}]})
    assert "## Memory of the fullest GPU: h200-sxm:8x8, B, tp4\n" in several
    for evidence in _without(facts["systems"][0]["evidence"], 1):
        systems = [facts["systems"][0] | {"evidence": evidence}, *facts["systems"][1:]]
        assert report.markdown(facts | {"systems": systems}).startswith("# ")


def test_page_is_inert_and_self_contained() -> None:
    hostile = copy.deepcopy(_with_evidence())
    name = '<script>alert("1")</script>'
    hostile["systems"][0]["name"] = hostile["winner"] = name
    hostile["cost_curve"][name] = hostile["cost_curve"].pop("h200-sxm:8x8")
    hostile["front"][name] = hostile["front"].pop("h200-sxm:8x8")
    hostile["risks"] = ["</style><script>x</script>"]
    page = report.html(hostile)
    parsed = Page(page)
    assert parsed.open == [] and not parsed.seen & {"script", "link", "img", "iframe", "object"}
    assert len(parsed.ids) == len(set(parsed.ids))
    assert not re.search(r"url\((?!#)|@import|(?:src|href)=\"(?!#)", page)
    assert "<script" not in report.markdown(hostile)


def _without(facts: Any, depth: int) -> list[Any]:
    """`facts` with each part removed in turn, and with each None, down to `depth`."""
    if depth == 0:
        return []
    found = []
    if isinstance(facts, dict):
        for key in facts:
            rest = {k: v for k, v in facts.items() if k != key}
            found += [rest, rest | {key: None}]
            found += [facts | {key: changed} for changed in _without(facts[key], depth - 1)]
    elif isinstance(facts, list) and facts:
        found += [[]] + [[changed, *facts[1:]] for changed in _without(facts[0], depth - 1)]
    return found


def test_parts_may_be_missing() -> None:
    shown = {key: value for key, value in COMPARISON.items() if key != "kind"}
    for facts in _without(shown, 1) + [shown | {"systems": [row]} for row in _without(shown["systems"][0], 1)]:
        named = all(row.get("name") for row in facts.get("systems") or ())
        if named:
            assert report.markdown(facts | {"kind": "comparison"}).startswith("# ")
    assert Page(report.html({"kind": "comparison"})).open == []


def test_folder_is_whole_and_its_report_comes_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_comparison(folder, COMPARISON)
    assert sorted(path.name for path in folder.iterdir()) == [
        "comparison.json",
        "manifest.json",
        "report.html",
        "report.md",
        "systems.csv",
    ]
    rows = list(csv.DictReader(io.StringIO((folder / "systems.csv").read_text())))
    assert [row["name"] for row in rows] == [row["name"] for row in COMPARISON["systems"]]
    assert rows[0]["tpot_s_p90"] == "0.041" and rows[0]["usd_per_month_interval_1"] == str(1.3 * 74_752.0)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "report.html").unlink()
    (folder / "report.md").write_text("old")
    rewrite_report(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_folders_without_facts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"plan\.json, simulation\.json, comparison\.json"):
        rewrite_report(tmp_path)
    (tmp_path / "plan.json").write_text("{half")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        rewrite_report(tmp_path)
    (tmp_path / "plan.json").write_text("[1]")
    with pytest.raises(InputError, match="list"):
        rewrite_report(tmp_path)
    (tmp_path / "plan.json").write_text('{"top": "edited", "step": 3}')
    with pytest.raises(InputError, match="cannot be shown"):
        rewrite_report(tmp_path)
    whole = {"question": {"model": "toy"}, "headline": "tp8", "command": "moeplan plan toy"}
    (tmp_path / "plan.json").write_text(json.dumps(whole | {"top": "edited", "step": 3}))
    with pytest.raises(InputError, match=r"cannot be shown \("):
        rewrite_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("facts", "lacking"),
    [
        ({"kind": "comparison"}, "question, headline, systems, command"),
        (COMPARISON | {"systems": []}, "systems"),
        (COMPARISON | {"systems": [{"num_gpus": 8}]}, "names of its systems"),
        (COMPARISON | {"systems": 6}, "names of its systems"),
        ({key: value for key, value in COMPARISON.items() if key != "kind"}, "kind"),
    ],
)
def test_comparisons_with_too_few_facts_are_refused(facts: dict[str, Any], lacking: str, tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=rf"comparison\.json: cannot be shown, for it lacks {lacking}\. "):
        rewrite_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.json"]


def test_table_of_systems_is_flat(tmp_path: Path) -> None:
    models = [{"model": "A", "num_gpus": 8, "ttft_s": {"p95": 0.5}}, {"model": "B", "num_gpus": 16, "settings": None}]
    launch = [{"engine": "vllm 0.33.0", "role": "", "commands": [], "note": "none", "num_gpus": 8}]
    own = COMPARISON["systems"][0] | {"models": models, "launch": launch, "evidence": {"cdf": {"ttft_s": [0.1]}}}
    write_comparison(tmp_path / "run", COMPARISON | {"systems": [own, *COMPARISON["systems"][1:]]})
    text = (tmp_path / "run" / "systems.csv").read_text()
    row = next(csv.DictReader(io.StringIO(text)))
    assert "{" not in text and "[" not in text
    assert not [name for name in row if name.startswith(("launch", "evidence"))]
    assert (row["models_0_model"], row["models_0_ttft_s_p95"], row["models_1_num_gpus"]) == ("A", "0.5", "16")


def test_without_a_printer_the_message_names_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match=r"pip install weasyprint.*chromium"):
        print_pdf(tmp_path / "report.html", tmp_path / "report.pdf")
    assert list(tmp_path.iterdir()) == []


def _summary_of(facts: dict[str, Any]) -> str:
    """The page as far as the first printed page must hold it."""
    text = report.html(facts)
    return text[: text.index('<div class="evidence">')] + "</main></body></html>"


@pytest.mark.slow
@pytest.mark.parametrize("facts", [FACTS, COMPARISON], ids=["plan", "comparison"])
@pytest.mark.parametrize("printer", ["weasyprint", "chromium"])
def test_summary_prints_on_one_page(
    facts: dict[str, Any], printer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "report.html"
    source.write_text(_summary_of(facts), encoding="utf-8")
    if printer == "weasyprint":
        weasyprint = pytest.importorskip("weasyprint")
        assert len(weasyprint.HTML(filename=str(source)).render().pages) == 1
        return
    if shutil.which("chromium") is None:
        pytest.skip("no chromium on the PATH")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    printed = print_pdf(source, tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b(?!s)", printed)) == 1
