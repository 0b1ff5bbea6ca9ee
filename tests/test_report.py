"""Figures and reports: what they say is what the facts say, and nothing in the facts can break or script them."""

from __future__ import annotations

import copy
import json
import re
import stat
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import figures, report
from planner.errors import InputError
from planner.report.sections import candidates, evidence, slo_limits_s
from planner.report.wording import described, number


def row(layout: str, gpus: int, x: float | None, y: float, meets: bool) -> dict[str, Any]:
    return {
        "layout": layout,
        "cluster": "toy:2x8",
        "num_gpus": gpus,
        "interactivity_tok_per_s_per_user": x,
        "output_tok_per_s_per_gpu": y,
        "meets_slo": meets,
        "ttft_p95_s": 1.31,
        "tpot_p95_s": 0.0434,
        "usd_per_mtok_output": None,
        "reason": "TPOT p95 at 87% of its limit",
    }


_Y = "output_tok_per_s_per_gpu"

ROWS = [
    row("tp8 ep8 x2", 16, 29.6, 95.9, True),
    row("dp8 ep8", 8, 14.5, 183.0, False),
    row("tp16 ep16", 16, 38.1, 88.2, True),
    row("tp8 pp2", 16, None, 10.0, False),
]

FACTS: dict[str, Any] = {
    "question": {"model": "Toy <script>alert(1)</script>", "slo": "TTFT p95 <= 2.00 s", "seed": "0"},
    "slo": [
        {"metric": "ttft", "statistic": "p95", "limit_s": 2.0},
        {"metric": "tpot", "statistic": "p99", "limit_s": 0.08},
        {"metric": "tpot", "statistic": "p95", "limit_s": 0.05},
    ],
    "headline": "tp8 ep8 x2 on 16 x GPU: meets the SLO with 13% to spare",
    "feasible": True,
    "meets_slo": True,
    "considered": 412,
    "model": {
        "name": "Toy <script>alert(1)</script>",
        "total_params": 671_026_404_352,
        "kv_bytes_per_token": 70_272,
        "layers": [{"count": 58, "kind": "MLA + MoE"}],
        "notes": [],
    },
    "cluster": "toy:2x8",
    "layout": {"name": "tp8 ep8 x2", "tp": 8, "ep": 8, "pp": 1, "replicas": 2, "num_gpus": 16},
    "binding_constraint": "TPOT p95 at 87% of its limit & nothing else",
    "ttft_s": {"mean": 0.61, "p50": 0.42, "p95": 1.31, "p99": 1.84, "mean_low": 0.6, "mean_high": 0.62},
    "tpot_s": {"mean": 0.0338, "p50": 0.0331, "p95": 0.0434, "p99": None},
    "output_tok_per_s": 1534.0,
    "output_tok_per_s_per_gpu": 95.9,
    "usd_per_mtok_output": 6.31,
    "memory": {
        "terms": {"experts": 44.2e9, "kv_cache": 65.4e9, "dense": 0.0, "reserve": 10.4e9},
        "capacity_bytes": 140e9,
        "kv_tokens_per_rank": 930_652,
    },
    "step": {"decode": {"attention": 0.0037, "expert_gemm": 0.0119}, "prefill": {"expert_gemm": 0.151}},
    "past_error": "On 653 measured points TPOT was off by 12 % (median).",
    "origin_share": {"measured": 0.22, "interpolated": 0.6, "extrapolated": 0.0, "roofline": 0.18},
    "top": ROWS,
    "front": ROWS,
    "rejected": {"experts": 211, "kv_cache": 102},
    "nearest_miss": {"experts": "tp8: 2.1 GB too much | see memory", "tpot": "pp2: 61 ms"},
    "next": ["Demand can grow to 1.25 x."],
    "assumptions": [{"name": "price", "value": "$2.18", "source": "https://example.org/?a=1&b=2"}],
    "command": "moeplan plan --model 'toy' --slo ttft_p95=2s",
    "cdf": {"ttft_s": [0.1, 0.4, 0.9, 1.3, 2.4], "tpot_s": [0.02, 0.03, 0.05]},
    "timeline": {
        "time_s": [0, 5, 10, 15],
        "queue": [0, 7, 3, 1],
        "batch": [1, 20, 40, 44],
        "kv_share": [0, 0.2, 0.3, 0.35],
    },
    "warnings": ["Only <b>1.2</b> GB are held back."],
    "versions": {"moeplan": "0.1.0"},
}


@pytest.fixture(scope="module")
def page() -> str:
    return report.html(FACTS)


def assert_in_order(page: str, words: list[str]) -> None:
    """All of `words` are on the page, one after the other."""
    places = [page.index(word) for word in words]
    assert places == sorted(places)


class Page(HTMLParser):
    """Tags that are open, scripts, and the words a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in {"meta", "link", "img", "br", "path", "use"}:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in {"src", "href", "xlink:href"}:
                self.links.append(str(value))
            assert not name.startswith("on")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"path", "use"}:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_is_self_contained_and_well_formed(page: str) -> None:
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>")
    assert parsed.open == []
    assert not parsed.seen & {"script", "link", "img", "iframe", "object"}
    assert all(link.startswith("#") for link in parsed.links)
    assert "url(http" not in page and "@import" not in page
    assert len(parsed.ids) == len(set(parsed.ids))
    targets = {link[1:] for link in parsed.links} | set(re.findall(r"url\(#([^)]*)\)", page))
    assert targets <= set(parsed.ids)


def test_hostile_names_are_inert(page: str) -> None:
    assert "<script" not in page
    assert "Toy &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>1.2</b>" not in page
    hostile = copy.deepcopy(FACTS)
    hostile["layout"]["name"] = hostile["front"][0]["layout"] = '"><script>x</script> $\\frac{'
    found = report.html(hostile)
    assert "<script" not in found
    assert Page(found).open == []
    text = report.markdown(hostile)
    assert "<script" not in text


def test_same_facts_same_bytes(page: str) -> None:
    assert report.html(json.loads(json.dumps(FACTS))) == page


def test_answer_comes_before_evidence(page: str) -> None:
    order = [
        "meets the SLO with 13% to spare",
        "$6.31",
        "1.31 s",
        "TPOT p95 at 87% of its limit &amp; nothing else",
        "Best layouts",
        "Demand can grow",
        "60% interpolated",
        "TPOT was off by 12 %",
        "Throughput against interactivity",
        "Latency of requests",
        "Queue and batch over time",
        "Where a step spends its time",
        "Memory of the fullest GPU",
        "Why the others lost",
        "Assumptions and their sources",
        "moeplan plan --model",
        "moeplan 0.1.0",
    ]
    assert_in_order(page, order)
    assert page.count("<svg") == page.count("</svg>") == 5
    assert page.count("<figcaption>") == 5


def test_findings_and_tables_state_the_facts() -> None:
    found = {section.title: section for section in evidence(FACTS)}
    frontier = found["Throughput against interactivity"]
    assert frontier.finding == (
        "2 of 3 simulated layouts meet the whole SLO. tp8 ep8 x2 gives 95.9 output tok/s per GPU at 29.6 tok/s per "
        "user. dp8 ep8 gives 183 per GPU but misses the SLO."
    )
    assert [cells[0] for cells in frontier.tables[0].rows] == ["dp8 ep8", "tp8 ep8 x2 (chosen)", "tp16 ep16"]
    assert "Cluster" not in frontier.tables[0].header
    step = found["Where a step spends its time"]
    assert step.finding.startswith("A decode step takes 15.6 ms, 76% of it in expert GEMM.")
    assert step.tables[0].rows[0] == ("expert GEMM", "11.9", "76.3%")
    assert step.tables[0].rows[-1] == ("total", "15.6", "100.0%")
    memory = found["Memory of the fullest GPU"]
    assert memory.finding == (
        "KV cache takes 65.4 GB, 47% of the GPU's memory. The KV pool holds 930,652 tokens per scheduler rank."
    )
    assert memory.tables[0].rows[-2:] == (("free", "20.0", "14.3%"), ("capacity", "140", "100.0%"))
    latency = found["Latency of requests"]
    assert latency.tables[0].rows[1] == ("TPOT", "33.8 ms", "– to –", "33.1 ms", "43.4 ms", "–", "50.0 ms")
    assert latency.tables[0].rows[0][2] == "600 ms to 620 ms"
    queue = found["Queue and batch over time"]
    assert queue.tables[0].rows[0][:3] == ("Requests waiting", "7", "5.00 s")
    losers = found["Why the others lost"]
    assert (
        losers.finding == "Of 412 layouts, 313 were ruled out before simulation. Most frequent reason: experts (211)."
    )
    assert losers.tables[0].rows[-1] == ("TPOT", "–", "pp2: 61 ms")
    assert ("Layers", "58 x MLA + MoE") in found["The model"].tables[0].rows


def test_memory_beyond_the_device_is_said() -> None:
    facts = {"memory": {"terms": {"experts": 100e9, "kv_cache": 20e9}, "capacity_bytes": 80e9}}
    assert "exceed the 80.0 GB of the GPU by 40.0 GB" in evidence(facts)[0].finding


def test_clusters_are_named_when_they_differ() -> None:
    rows = [*ROWS, ROWS[0] | {"cluster": "other:1x8"}]
    table = candidates({"top": rows})
    assert table is not None
    assert table.header[1] == "Cluster" and table.rows[-1][1] == "other:1x8"
    assert table.text_columns == {0, 1, 3, 9}


def test_infeasible_answer_shows_remedies_without_tiles() -> None:
    facts = {
        "headline": "Toy does not fit",
        "feasible": False,
        "meets_slo": False,
        "layout": None,
        "next": ["Use 16 GPUs."],
        "nearest_miss": {"experts": "tp8: 2.1 GB too much"},
    }
    page = report.html(facts)
    assert "Does not fit" in page and "Use 16 GPUs." in page and "2.1 GB too much" in page
    assert 'class="tiles"' not in page and "<svg" not in page


@pytest.mark.parametrize("key", sorted(FACTS))
def test_every_key_may_be_missing(key: str) -> None:
    facts = {name: value for name, value in FACTS.items() if name != key}
    assert report.markdown(facts).startswith("# ")
    assert report.markdown(facts | {key: None}).startswith("# ")


def test_empty_facts_still_make_a_page() -> None:
    assert Page(report.html({})).open == []
    assert evidence({}) == [] and candidates({}) is None


def test_degenerate_series_are_drawn() -> None:
    facts = {
        "front": [row("tp1", 1, 0.0, 0.0, False)],
        "cdf": {"ttft_s": [0.0], "tpot_s": []},
        "timeline": {"time_s": [0.0], "queue": [0]},
        "step": {"decode": {"attention": 0.0}, "prefill": {}},
        "memory": {"terms": {"experts": 5.0}},
    }
    titles = [section.title for section in evidence(facts)]
    assert "Where a step spends its time" not in titles
    assert len(titles) == 4
    assert report.html(facts).count("<svg") == 4


def test_markdown_tables_survive_pipes_and_keep_alignment() -> None:
    text = report.markdown(FACTS)
    assert "tp8: 2.1 GB too much \\| see memory" in text
    assert "| Layout | GPUs | SLO |" in text
    assert "| :-- | --: | :-- |" in text
    assert "    moeplan plan --model 'toy' --slo ttft_p95=2s" in text
    lines = text.splitlines()
    for index, line in enumerate(lines):
        if re.fullmatch(r"\|( (:--|--:) \|)+", line):
            width = line.count("|")
            block = [lines[index - 1]]
            block += [found for found in lines[index + 1 :][:5] if found.startswith("|")]
            assert all(found.replace("\\|", "").count("|") == width for found in block)


def test_write_chooses_format_and_replaces_whole_files(tmp_path: Path) -> None:
    facts = {key: FACTS[key] for key in ("question", "headline", "layout", "next")}
    path = tmp_path / "plan.html"
    path.write_text("old")
    assert report.write(facts, path) == path
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR
    report.write(facts, tmp_path / "plan.md")
    report.write(facts, tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8")) == facts
    assert sorted(found.name for found in tmp_path.iterdir()) == ["plan.html", "plan.json", "plan.md"]


def test_write_failures_name_the_remedy_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'\.pdf'.*\.html, \.md, \.json"):
        report.write(FACTS, tmp_path / "plan.pdf")
    with pytest.raises(InputError, match="cannot be written"):
        report.write({}, tmp_path / "nowhere" / "plan.md")
    (tmp_path / "taken.md").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        report.write({}, tmp_path / "taken.md")
    assert [found.name for found in tmp_path.iterdir()] == ["taken.md"]


def test_latency_columns_appear_only_with_facts() -> None:
    section = evidence({"ttft_s": {"mean": 1.0, "p95": 2.0}})[0]
    assert section.tables[0].header == ("Metric", "Mean", "p50", "p95", "p99")
    assert section.draw is None and section.svg() == ""


def test_equal_layouts_are_told_apart_by_name() -> None:
    rows = [ROWS[0] | {"name": "tp8 ep8 x2, KV fp8"}, ROWS[0] | {"name": "tp8 ep8 x2, KV bf16", _Y: 99.0}]
    section = evidence({"front": rows, "layout": {"name": "tp8 ep8 x2"}, "cluster": "toy:2x8"})[0]
    assert [cells[0] for cells in section.tables[0].rows] == ["tp8 ep8 x2, KV bf16", "tp8 ep8 x2, KV fp8 (chosen)"]
    assert "tp8 ep8 x2, KV bf16 gives 99.0 per GPU and meets the SLO too." in section.finding


def test_tightest_limit_counts() -> None:
    assert slo_limits_s(FACTS) == {"ttft_s": 2.0, "tpot_s": 0.05}
    assert slo_limits_s({}) == {}


def test_svg_is_valid_xml_with_its_words_as_text() -> None:
    drawn = figures.svg(figures.frontier(ROWS[:3], 0, 20.0), "one", 'a "finding" <here> & there')
    root = ElementTree.fromstring(drawn)
    assert root.attrib["aria-label"] == 'a "finding" <here> & there'
    words = "".join(root.itertext())
    assert "tp8 ep8 x2 (chosen)" in words and "meets the TPOT limit" in words and "Output tok/s per GPU" in words
    assert drawn == figures.svg(figures.frontier(ROWS[:3], 0, 20.0), "one", 'a "finding" <here> & there')
    assert "meets the TPOT limit" not in figures.svg(figures.frontier(ROWS[:3], 0), "one", "")


def test_long_series_stay_small_and_keep_their_peak() -> None:
    samples = np.random.default_rng(0).lognormal(size=20_000).tolist()
    assert len(figures.svg(figures.latency_cdf({"ttft_s": samples}, {"ttft_s": 2.0}), "cdf", "")) < 60_000
    queue = [0.0] * 20_000
    queue[12_345] = 99.0
    drawn = figures.timeline({"time_s": list(range(20_000)), "queue": queue})
    assert max(drawn.axes[0].lines[0].get_ydata()) == 99.0
    assert len(figures.svg(drawn, "queue", "")) < 60_000


def test_breakdown_sums_the_small_operations() -> None:
    ops = {f"op{i}": float(i) for i in range(1, 15)}
    rows = figures.largest_first(ops, 9)
    assert rows[0] == ("op14", 14.0) and rows[-1] == ("other", 15.0)
    assert sum(value for _, value in rows) == sum(ops.values())
    assert len(figures.step_breakdown({"decode": ops}).axes[0].patches) == 10


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    key=st.sampled_from(["bytes", "params", "x_s", "other"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
)
def test_any_fact_has_a_text(key: str, value: object) -> None:
    assert isinstance(described(key, value), str)


@settings(deadline=None, derandomize=True)
@given(value=st.none() | st.floats())
def test_numbers_keep_three_digits_or_a_dash(value: float | None) -> None:
    text = number(value)
    if value is None or not np.isfinite(value):
        assert text == "–"
    else:
        assert float(text.replace(",", "")) == pytest.approx(value, rel=5.1e-3)
