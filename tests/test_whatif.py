"""What-if answers of the dashboard, without Streamlit."""

from __future__ import annotations

import base64
import json
import shlex
import sys
import time
import tomllib
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cli.dashboard import _flags, _shipped
from planner.deployment import Deployment
from planner.errors import InputError
from planner.hardware import systems
from planner.layout import parse_layout
from planner.model.catalog import CONFIGS
from planner.search import Search
from planner.whatif import analytic, catalogue, charts, details, edits, front, jobs, lab, outcome, pins, rivals, rows
from planner.whatif.analytic import Answer, answer
from planner.whatif.bottleneck import bottleneck
from planner.whatif.form import KNOBS, advanced_fields, knob_fields, main_fields
from planner.whatif.question import MAX_TRACE_ROWS, Question, ask, config_problem, opened, trace_problem
from planner.whatif.scenario import Scenario, cluster_text, from_query, safe_name
from planner.whatif.tornado import tornado
from planner.workload import PRESETS

SMALL = Scenario(model="mistralai/Mixtral-8x7B-v0.1", system="h100-sxm", gpus=8, rate=4.0)
TRACE = "arrival_s,prompt_tokens,output_tokens\n0,100,20\n0.5,300,40\n1.1,200,10\n2.0,120,30\n"


def _answer(scenario: Scenario) -> Answer:
    found = answer(scenario)
    assert isinstance(found, Answer), found
    return found


def _problems(scenario: Scenario) -> dict[str, str]:
    found = ask(scenario)
    return {} if isinstance(found, Question) else {problem.field: problem.message for problem in found}


# --- scenarios ----------------------------------------------------------------------------------------------------

_TEXT = st.text(max_size=20)
_SCENARIOS = st.builds(
    Scenario,
    model=_TEXT,
    system=st.sampled_from(systems()),
    gpus=st.integers(-5, 2000),
    workload=st.sampled_from([*PRESETS, "fixed:8/8"]) | _TEXT,
    rate=st.floats(-1e3, 1e6),
    slo=_TEXT,
    users=st.integers(0, 1000),
    skew=_TEXT,
    capacity_factor=st.floats(0, 10),
    redundant=st.integers(-3, 99),
    config=_TEXT,
    rivals=_TEXT,
)


@given(_SCENARIOS)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_link_carries_the_whole_scenario(scenario: Scenario) -> None:
    named = replace(scenario, config_name="config.json" if scenario.config else "")
    assert from_query(named.query()) == (named, [])


def test_a_link_that_cannot_be_read_says_which_value_and_keeps_the_rest() -> None:
    bomb = base64.urlsafe_b64encode(zlib.compress(b" " * 3_000_000)).decode()
    query = {"gpus": "many", "rate": "nan", "config": bomb, "system": "b200-sxm", "unknown": "x", "seed": "9" * 40}
    scenario, problems = from_query(query)
    assert scenario == Scenario(system="b200-sxm")
    assert [p.split("says ")[1].split("=")[0] for p in problems] == ["gpus", "rate", "seed", "config"]


def test_a_link_names_no_file_outside_the_folder_of_its_run(tmp_path: Path) -> None:
    target = tmp_path / "written.json"
    packed = replace(SMALL, config="{}", config_name="config.json").query()
    linked, problems = from_query(packed | {"config_name": str(target)})
    assert (linked.config, linked.config_name, problems) == ("{}", "written.json", [])
    assert from_query({"config_name": "/etc/passwd", "trace_name": "/etc/passwd"}) == (Scenario(), [])
    forged = base64.urlsafe_b64encode(zlib.compress(json.dumps([packed | {"config_name": "../x"}]).encode())).decode()
    assert [pin.config_name for pin in pins.unpacked(forged)] == ["x"]
    assert "/etc/x" not in replace(SMALL, config_name="/etc/x", trace_name="/etc/x").command()
    for name in (str(target), "../x.json", "errors"):
        with pytest.raises(InputError, match="plain name"):
            jobs.Job(replace(SMALL, config="{}", config_name=name), SMALL.command())
    assert not target.exists() and len(safe_name("x" * 5_000 + ".json")) <= 100


def test_an_upload_that_does_not_fit_a_link_is_left_out_with_its_name_and_missed() -> None:
    huge = "".join(f"{i * 7919 % 99991:x}" for i in range(9_000))
    query = replace(SMALL, config=huge, config_name="mine.json", trace=TRACE, trace_name="t.csv").query()
    assert query == SMALL.query() | {"left_out": "config,trace"}
    scenario, problems = from_query(query)
    assert scenario == SMALL and "model is not in the link" in problems[0] and "trace is not" in problems[1]


@pytest.mark.parametrize("system", ["h200-sxm", "gb200-nvl72", "dgx-spark"])
@pytest.mark.parametrize("gpus", [1, 3, 8, 9, 72])
def test_offered_gpus_are_whole_nodes_beyond_one(system: str, gpus: int) -> None:
    nodes, per_node = (int(n) for n in cluster_text(system, gpus).split(":")[1].split("x"))
    assert gpus <= nodes * per_node < gpus + max(per_node, 2)


def test_commands_name_what_was_asked() -> None:
    scenario = replace(SMALL, weights="fp8", skew="zipf:1", capacity_factor=1.25, users=7, seed=3)
    words = shlex.split(scenario.command(layout="tp=2,ep=2", backend="deepep", limits=(64, 2048)))
    assert words[:3] == ["moeplan", "simulate", scenario.model]
    for pair in ("--layout tp=2,ep=2", "--concurrency 7", "--weights fp8", "--skew zipf:1", "--capacity-factor 1.25",
                 "--seed 3", "--max-num-seqs 64", "--max-batched-tokens 2048", "--backend deepep"):  # fmt: skip
        assert pair in " ".join(words)
    assert "--rate" not in words
    compared = shlex.split(scenario.compare_command(["h200-sxm", "b200-sxm"]))
    assert compared[1] == "compare" and compared.count("--cluster") == 2


# --- questions ----------------------------------------------------------------------------------------------------


def test_every_field_is_answered_for_by_name() -> None:
    bad = {
        "model": "no/such-model",
        "system": "h300",
        "gpus": 5000,
        "workload": "chats",
        "slo": "ttft_p95=2",
        "engine": "vlllm",
        "speculative": "draft:/etc/passwd:3",
        "layout": "tp=3,ep=2",
        "skew": "zipf:x",
        "placement": "clever",
        "residency": "magic",
    }
    for field, value in bad.items():
        found = _problems(replace(SMALL, **{field: value}))
        assert set(found) == {field} and found[field].strip(), (field, found)
    assert set(_problems(replace(SMALL, model="x", gpus=0, slo="?"))) == {"model", "gpus", "slo"}


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"ep": 3}, "ep", "does not divide 8 experts"),
        ({"ep": 16}, "ep", "16"),
        ({"ep": 4, "redundant": 3}, "redundant", "do not divide over ep=4"),
        ({"capacity_factor": -1.0}, "capacity_factor", "-1"),
        ({"residency": "lru", "resident": 99}, None, ""),
        ({"oversubscription": 0.5}, "gpus", "0.5"),
        ({"rate": 0.0}, "workload", "rate above 0"),
        ({"gpus": 24, "system": "l4"}, "gpus", "network"),
        ({"layout": "tp=16", "gpus": 16}, "layout", "scale-up domain"),
        ({"layout": "tp=8,replicas=99"}, "layout", "needs 792 GPUs"),
        ({"layout": "attention_dp=2,ep=2", "backend": "pigeon"}, "layout", "pigeon"),
        ({"speculative": "ngram:3"}, "speculative", "command line"),
        ({"seqs": -3}, "seqs", "-3"),
        ({"redundant": -8}, "redundant", "-8: use 0 or more"),
        ({"redundant": -8, "layout": "tp=8,ep=8"}, "redundant", "-8"),
        ({"ep": -1}, "ep", "-1"),
        ({"users": -3}, "users", "-3"),
        ({"users": -3, "rate": 0.0}, "users", "-3"),
        ({"rivals": "nonsense"}, None, ""),
    ],
)
def test_knobs_that_do_not_divide_say_what_would(change: dict[str, object], field: str | None, says: str) -> None:
    found = _problems(replace(SMALL, **change))  # type: ignore[arg-type]
    assert set(found) == ({field} if field else set())
    assert field is None or says in found[field]


def test_only_the_faulty_field_of_a_link_is_defaulted() -> None:
    asked = replace(SMALL, rate=2.0, ep=4, kv="fp8")
    assert opened(asked.query()) == (asked, [])
    for field, value in {"slo": "ttft_p95=2", "ep": "3", "redundant": "-8", "users": "-3", "workload": "chats",
                         "rate": "-1.0", "oversubscription": "0.5", "layout": "tp=3", "rivals": "h300", "gpus": "0",
                         "engine": "vlllm", "skew": "zipf:x"}.items():  # fmt: skip
        scenario, said = opened(asked.query() | {field: value})
        assert scenario == replace(asked, **{field: getattr(Scenario(), field)}), field
        assert len(said) == 1 and field in said[0], said
    scenario, said = opened(SMALL.query() | {"system": "h300", "slo": "?", "config": base64.urlsafe_b64encode(
        zlib.compress(b"[]")).decode(), "config_name": "list.json"})  # fmt: skip
    assert scenario == replace(SMALL, system=Scenario().system) and len(said) == 3
    assert isinstance(ask(scenario), Question) and "list.json" in "".join(said)


@pytest.mark.parametrize("text", ["/etc/passwd", "../x.csv", "x.toml", "C:\\x.csv"])
def test_a_link_never_opens_a_file(text: str) -> None:
    for field in ("model", "workload", "engine", "skew", "placement", "system", "speculative", "residency"):
        assert field in _problems(replace(SMALL, **{field: text})), field


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not json", "not valid JSON"),
        ("[1, 2]", "not an object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"hello": 1}', "architectures"),
        ('{"architectures": ["BertModel"]}', "BertModel"),
        ("x" * 6_000_000, "at most 5,000,000"),
    ],
)
def test_uploads_of_the_wrong_kind_are_refused(text: str, says: str) -> None:
    assert says in str(config_problem(text, "config.json"))


def test_a_refused_upload_is_called_by_its_name() -> None:
    for text in ("[]", "{}", '{"architectures": ["BertModel"]}', '{"architectures": ["MixtralForCausalLM"]}', "x"):
        assert str(config_problem(text, "wrong.json")).startswith("wrong.json: ")


def test_an_uploaded_config_is_the_model() -> None:
    text = next(CONFIGS.glob("**/*Mixtral-8x7B*.json"), next(CONFIGS.rglob("*.json"))).read_text()
    assert config_problem(text, "config.json") is None
    question = ask(replace(SMALL, config=text, config_name="mine.json"))
    assert isinstance(question, Question) and question.model.name == "mine"


def test_traces_are_checked_before_they_replace_the_workload() -> None:
    assert trace_problem(TRACE, "t.csv") is None
    assert "missing column" in str(trace_problem("a,b\n1,2\n", "t.csv"))
    assert "line 3" in str(trace_problem(TRACE.replace("0.5,300,40", "0.5,-3,40"), "t.csv"))
    long = "arrival_s,prompt_tokens,output_tokens\n" + "1,1,1\n" * 1_000_000
    assert f"{MAX_TRACE_ROWS:,}" in str(trace_problem(long, "t.csv"))
    question = ask(replace(SMALL, trace=TRACE, trace_name="t.csv"))
    assert isinstance(question, Question) and question.workload.mean_output_tokens == 25


# --- answers ------------------------------------------------------------------------------------------------------


def test_estimates_are_those_of_the_search() -> None:
    """The catalogue differs from the search in what it looks at, never in what it says of a layout."""
    question = ask(SMALL)
    assert isinstance(question, Question)
    search = Search(question.cluster, question.engine, question.workload, question.slo)
    survivors = {_key(c.deployment): c for c in search.run([question.model]).survivors}
    found, _ = catalogue.estimates(question)
    both = [(e, survivors[_key(e.candidate.deployment)]) for e in found if _key(e.candidate.deployment) in survivors]
    assert len(both) >= 10
    for mine, theirs in both:
        for name in ("batch", "ttft_s", "tpot_s", "capacity_per_s", "score"):
            assert getattr(mine.candidate, name) == pytest.approx(getattr(theirs, name), rel=1e-9), name


def _key(deployment: Deployment) -> tuple[object, ...]:
    return deployment.layout, deployment.limits, deployment.backend, deployment.model.kv_format


def test_the_cheapest_layout_that_meets_the_slo_is_chosen_and_another_load_needs_no_new_steady_state() -> None:
    found = _answer(SMALL)
    assert found.chosen is not None and found.meets_slo
    fewer = [e for e in found.found if e.num_gpus < found.chosen.num_gpus]
    assert all(not e.meets_slo for e in fewer)
    known = catalogue._catalogue.cache_info().misses
    other = _answer(replace(SMALL, rate=4.5))
    analytic.headline(other), analytic.tiles(other), bottleneck(other), front.cloud(other)
    assert catalogue._catalogue.cache_info().misses == known


def test_the_answer_says_what_it_counts_how_sure_it_is_and_what_binds() -> None:
    found = _answer(SMALL)
    tiles = {tile.label: tile for tile in analytic.tiles(found)}
    assert {"TTFT p95", "TPOT p95", "Per user", "Throughput", "Price per Mtok", "Carries at most"} == set(tiles)
    assert " to " in tiles["TPOT p95"].interval and "limit" in tiles["TPOT p95"].counts and tiles["TPOT p95"].origin
    assert "rental" in tiles["Price per Mtok"].origin and "202" in tiles["Price per Mtok"].origin
    sentence = bottleneck(found)
    assert "reading expert weights" in sentence and "KV runs out at" in sentence and "twice as many" in sentence
    assert 0 < (analytic.chance_of_slo(found) or 0) < 1
    assert sum(found.origin_share.values()) == pytest.approx(1)


def test_memory_and_step_add_up_and_say_how() -> None:
    found = _answer(SMALL)
    assert found.chosen is not None and found.decode is not None
    use = found.chosen.candidate.deployment.memory
    memory = details.memory_rows(found)
    assert sum(row.value for row in memory) == pytest.approx(use.capacity_bytes)
    step = details.step_rows(found.decode)
    assert sum(row.value for row in step) == pytest.approx(float(found.decode.total_s))
    assert "vllm serve" in details.launch_text(found) and "unverified" in details.launch_text(found)
    assert all(row.how for row in [*memory, *step]) and step[0].share == max(row.share for row in step)


def test_the_front_is_clickable_and_the_envelope_is_above_it() -> None:
    found = _answer(SMALL)
    points, best = front.cloud(found), front.envelope(found)
    x, y = (np.array([p[n] for p in best]) for n in ("tok_per_s_per_user", "output_tok_per_s_per_gpu"))
    assert (np.diff(x) <= 0).all() and (np.diff(y) > 0).all()
    for point in points:
        ahead = y[x >= float(str(point["tok_per_s_per_user"])) * (1 - 1e-9)]
        assert ahead.max() >= float(str(point["output_tok_per_s_per_gpu"])) * (1 - 1e-9)
    other = next(p for p in points if p["verdict"] == "meets the SLO")
    asked = analytic.with_layout(found, str(other["id"]))
    chosen = _answer(asked).chosen
    assert chosen is not None and parse_layout(asked.layout) == chosen.candidate.deployment.layout
    assert str(chosen.candidate.deployment.layout).split(" x")[0] == str(other["layout"]).split(",")[0].split(" x")[0]


def test_an_infeasible_question_gets_remedies_that_work() -> None:
    hot = _answer(replace(SMALL, gpus=2, rate=60.0))
    assert (not hot.meets_slo and "Nearest" in edits.shortfall(hot)) or "carries" in edits.shortfall(hot)
    small = _answer(replace(SMALL, gpus=1))
    assert small.chosen is None and "does not fit" in analytic.headline(small) and "%" in analytic.headline(small)
    for found in (hot, small):
        tried = edits.edits(found)
        assert tried
        assert all(_answer(edit.scenario).meets_slo for edit in tried)
        prices = [edit.usd_per_hour for edit in tried if edit.usd_per_hour is not None]
        assert prices == sorted(prices)
    assert edits.edits(_answer(SMALL)) == []
    assert edits._checked("a change that does not help", replace(SMALL, rate=1e5)) is None


def test_tornado_moves_the_right_way() -> None:
    rate, usd, found = tornado(_answer(SMALL))
    bars = {bar.name: bar for bar in found}
    assert usd is not None and rate > 0
    slower = bars["Step time (error of the model)"]
    assert slower.low_requests_per_s > rate > slower.high_requests_per_s
    assert bars["Answer length"].low_requests_per_s > bars["Answer length"].high_requests_per_s
    assert bars["Prompt length"].low_requests_per_s >= bars["Prompt length"].high_requests_per_s
    assert bars["Limit of TPOT P95"].low_requests_per_s <= rate <= bars["Limit of TPOT P95"].high_requests_per_s
    price = bars["GPU price"]
    assert price.low_usd_per_mtok == pytest.approx(0.9 * usd) and price.high_usd_per_mtok == pytest.approx(1.1 * usd)
    full, _, free = tornado(_answer(replace(SMALL, slo="tpot_p95=100s")))
    slower = next(bar for bar in free if bar.name.startswith("Step time"))
    assert slower.low_requests_per_s == pytest.approx(full / 0.9) and slower.high_requests_per_s == pytest.approx(
        full / 1.1
    )
    widths = [abs(bar.high_requests_per_s - bar.low_requests_per_s) for bar in found]
    assert widths == sorted(widths, reverse=True)


# --- experts ------------------------------------------------------------------------------------------------------


def _lab(scenario: Scenario) -> lab.Lab:
    found = lab.lab(scenario)
    assert isinstance(found, lab.Lab)
    return found


def test_knobs_move_together() -> None:
    knobbed = replace(SMALL, ep=4, skew="zipf:1", placement="eplb", redundant=4)
    found, skewed = _lab(knobbed), _lab(replace(SMALL, ep=4, skew="zipf:1"))
    assert found.plain and found.knobs and skewed.plain and skewed.knobs
    assert skewed.knobs.max_over_mean > skewed.plain.max_over_mean
    assert found.knobs.max_over_mean < skewed.knobs.max_over_mean
    assert found.knobs.kv_tokens < found.plain.kv_tokens and found.knobs.experts_per_rank == 3
    heat = lab.heat(knobbed)
    assert isinstance(heat, lab.Heat)
    assert heat.before.mean() == pytest.approx(1) and heat.after.mean() == pytest.approx(1)
    assert heat.after.max(axis=1).mean() < heat.before.max(axis=1).mean()
    assert isinstance(lab.heat(replace(SMALL, ep=1)), str)


def test_drops_fall_with_the_capacity_factor_and_count_in_the_step() -> None:
    limited = _lab(replace(SMALL, ep=4, capacity_factor=1.0))
    assert limited.knobs and limited.knobs.drop_rate > 0 and limited.note
    curve = lab.drop_curve(replace(SMALL, ep=4), limited.tokens)
    for step in {row["step"] for row in curve}:
        rates = [float(row["drop_rate"]) for row in curve if row["step"] == step]
        assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1] >= 0


def test_fewer_resident_experts_are_hit_less_and_cost_more() -> None:
    few, many = (_lab(replace(SMALL, gpus=4, rate=0.2, residency="lru", resident=n)).knobs for n in (2, 6))
    assert few and many and few.hit_rate < many.hit_rate < 1 and few.decode_s > many.decode_s
    assert few.kv_tokens > many.kv_tokens


def test_dense_models_have_no_experts_to_look_at() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "max_position_embeddings": 8192} | sizes
    dense = replace(SMALL, config=json.dumps(config), config_name="dense.json")
    assert _lab(dense).knobs is None and "dense" in str(_problems(replace(dense, ep=4)))


# --- side by side ---------------------------------------------------------------------------------------------------


def test_pins_survive_a_link_and_show_differences() -> None:
    scenarios = [SMALL, replace(SMALL, rate=8.0)]
    assert pins.unpacked(pins.packed(scenarios)) == scenarios
    assert pins.unpacked("nonsense") == pins.unpacked(pins.packed([])) == []
    assert pins.inputs_changed(*scenarios) == [("rate", "default", "8.0")]
    found = {d.name: d for d in pins.differences(_answer(scenarios[0]), _answer(scenarios[1]))}
    assert found["Requests/s at most"].change is not None
    text = rows.pinned(_answer(scenarios[0]), _answer(scenarios[1]))
    assert text[0]["now"] == "8.0" and all(set(row) == set(text[0]) for row in text)
    assert rows.pinned(ask(replace(SMALL, gpus=0)), _answer(SMALL))[0]["field"] == "gpus"  # type: ignore[arg-type]


def test_what_a_link_does_not_carry_is_said() -> None:
    traced = replace(SMALL, trace=TRACE, trace_name="t.csv")
    assert pins.unpacked(pins.packed([traced, SMALL])) == [SMALL]
    assert pins.link_note(SMALL, [SMALL]) == "The address of this page reproduces the view."
    note = pins.link_note(traced, [traced, SMALL])
    assert "the uploaded t.csv" in note and "1 of 2 pins" in note
    assert pins.inputs_changed(SMALL, traced) == [("trace", "default", "t.csv")]


def test_systems_are_sized_for_the_same_demand() -> None:
    found = rivals.rivals(SMALL, ("h100-sxm", "l4", "h200-sxm"))
    sized = [row for row in found if row.num_gpus]
    assert {row.name for row in sized} >= {"h100-sxm", "h200-sxm"}
    hourly = [row.usd_per_hour for row in sized if row.usd_per_hour is not None]
    assert hourly == sorted(hourly)
    for row in sized:
        assert row.scenario is not None and _answer(row.scenario).meets_slo
    assert len({tuple(row) for row in rows.systems(found)}) == 1


# --- page -----------------------------------------------------------------------------------------------------------


def test_the_form_has_six_inputs_on_its_first_screen_and_knows_its_fields() -> None:
    first = [field for line in main_fields() for field in line]
    assert len(first) == 6
    every = [*first, *(f for lines in (advanced_fields(), knob_fields()) for line in lines for f in line)]
    assert {field.name for field in every} <= set(Scenario.__slots__)
    assert {f.name for line in knob_fields() for f in line} == set(KNOBS)
    for field in every:
        present = getattr(Scenario(), field.name)
        assert field.kind not in ("select", "slider") or present in field.choices, field.name
        assert "odd" in field.options("odd")


def test_charts_hold_the_numbers_and_no_address() -> None:
    found = _answer(SMALL)
    heat = lab.heat(replace(SMALL, ep=4))
    assert isinstance(heat, lab.Heat)
    specs = [
        charts.pareto(
            front.cloud(found), (front.envelope(found), front.chosen_curve(found)), front.at_demand(found), 27.0
        ),
        charts.stacked(details.memory_rows(found), "GB", 1e9),
        charts.bars(details.step_rows(found.decode), "ms", 1e-3),
        charts.heat(heat),
        charts.drops(lab.drop_curve(replace(SMALL, ep=4), 64), 1.25),
        charts.tornado(1.0, tornado(found)[2]),
        charts.cdf([0.1, 0.2, 0.4], "TTFT", 0.3),
        charts.timeline({"time_s": [0, 1], "queue": [0, 2]}, "queue", "Waiting"),
    ]
    for spec in specs:
        text = json.dumps(spec, allow_nan=False)
        assert "http" not in text and '"values"' in text


def test_text_of_users_is_shown_as_it_is() -> None:
    assert rows.plain("[x](http://y) $a$ `b` <script>") == r"\[x\]\(http\://y\) \$a\$ \`b\` \<script\>"
    assert safe_name("../../a b;rm -rf.json") == "a_b_rm_-rf.json"


@pytest.mark.parametrize(
    ("arguments", "found", "says"),
    [(["--port", "0"], object(), "--port 0"), ([], None, "pip install 'moeplan[dashboard]'")],
)
def test_the_command_says_what_keeps_it_from_starting(
    moeplan: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    found: object,
    says: str,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    code, out, err = moeplan("dashboard", *arguments)
    assert code == 2 and says in err and not out


def test_the_page_is_served_to_this_machine_and_tells_nobody() -> None:
    flags = _flags(tomllib.loads(_shipped("config.toml").read_text()))
    assert {"--server.address=127.0.0.1", "--browser.gatherUsageStats=false", "--server.fileWatcherType=none"} <= set(
        flags
    )
    assert any(flag.startswith("--server.maxUploadSize=") for flag in flags) and _shipped("app.py").is_file()
    assert len(_shipped("app.py").read_text().splitlines()) <= 350


# --- simulations beside the page -------------------------------------------------------------------------------------


def _wait(job: jobs.Job) -> None:
    end = time.monotonic() + 120
    while job.is_running and time.monotonic() < end:
        time.sleep(0.1)


def test_a_simulation_can_be_cancelled_and_its_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_JOBS", 1)
    job = jobs.Job(SMALL, SMALL.command())
    folder = job._place
    assert job.is_running and job.facts() is None
    with pytest.raises(InputError, match="run on this server already"):
        jobs.Job(SMALL, SMALL.command())
    assert job.answers(replace(SMALL, gpus=99), [SMALL.command()]) and not job.answers(SMALL, ["moeplan plan x"])
    assert not job.answers(replace(SMALL, trace=TRACE, trace_name="t.csv"), [SMALL.command()])
    job.cancel()
    assert not job.is_running and job.problem() == "cancelled" and job.facts() is None
    del job
    assert not folder.exists()


@pytest.mark.slow
def test_a_simulation_gives_the_files_of_the_command_line() -> None:
    job = jobs.Job(replace(SMALL, trace=TRACE, trace_name="t.csv"), "moeplan simulate " + SMALL.model + " --cluster "
                   "h100-sxm:1x8 --layout tp=4 --workload t.csv --slo ttft_p95=2s")  # fmt: skip
    _wait(job)
    facts = job.facts()
    assert job.problem() is None and facts is not None
    assert outcome.verdict(facts) and outcome.tiles(facts) and "Stable" in outcome.sentences(facts)
    drawn = [figure for row in outcome.figures(facts, SMALL.slo) for figure in row]
    assert {f.alt for f in drawn} >= {"Share of requests within a TTFT", "Running over time"} or "cdf" not in facts
    assert job.archive() == job.archive() and job.file("simulation.json")


@pytest.mark.slow
def test_a_bad_command_says_so() -> None:
    job = jobs.Job(SMALL, "moeplan plan nothing --cluster h100-sxm:1x8")
    _wait(job)
    assert "unknown model" in str(job.problem()) and sys.executable
