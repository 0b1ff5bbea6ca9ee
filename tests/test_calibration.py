"""Calibrations: the file, its faults, and what every parameter changes in a run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.calibration import (
    ANY,
    GENERATIONS,
    NEUTRAL,
    OFF,
    PARAMETERS,
    Calibration,
    Calibrations,
    Entry,
    Errors,
    calibrations,
    shipped,
    to_toml,
)
from planner.deployment import Run, deploy, run
from planner.engine import Limits, engine
from planner.errors import InputError
from planner.hardware import parse_cluster
from planner.layout import Layout
from planner.model import load
from planner.workload import Arrivals, Lengths, Workload

FACTORS = tuple(name for name in PARAMETERS if getattr(NEUTRAL, name) == 1.0)
TIMES = tuple(name for name in PARAMETERS if name not in FACTORS)
ENTRY = '[[entry]]\nengine = "vllm"\ngeneration = "hopper"\n[entry.values]\n'
HEAD = 'source = "s"\nas_of = "2026-11-22"\ncommand = "c"\n'


def only(name: str, values: Calibration) -> Calibrations:
    return Calibrations("test", "", "", (Entry(name, ANY, values),))


# --- the file ---

factors = st.floats(0.01, 10).map(lambda x: float(f"{x:.6g}"))
seconds = st.floats(0, 10).map(lambda x: float(f"{x:.6g}"))
values = st.builds(Calibration, **dict.fromkeys(FACTORS, factors), **dict.fromkeys(TIMES, seconds))
percents = st.tuples(*[st.integers(0, 999).map(lambda x: x / 10)] * 2)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(
    entries=st.lists(st.builds(Entry, st.sampled_from(["vllm", "sglang"]), st.sampled_from(["hopper", ANY]), values)),
    errors=st.lists(st.builds(Errors, st.just("tpot_mean_ms"), st.just("moe"), st.just(3), *[percents] * 2, percents)),
    source=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
)
def test_a_file_reads_back_as_it_was_written(
    entries: list[Entry], errors: list[Errors], source: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    once = {(entry.engine, entry.generation): entry for entry in entries}
    written = Calibrations(source, "2026-11-22", 'moeplan calibrate "a\\b"', tuple(once.values()), tuple(errors))
    path = tmp_path_factory.getbasetemp() / "mine.toml"
    path.write_text(to_toml(written), encoding="utf-8")
    assert calibrations(str(path)) == written


def test_the_shipped_file_reads_back_and_says_what_it_rests_on() -> None:
    found = shipped()
    assert calibrations(None) is found
    assert {entry.engine for entry in found.entry} == {"vllm", "sglang", "trtllm"}
    assert all(entry.num_points and entry.num_combinations for entry in found.entry)
    assert all((found.source, found.as_of, found.command))
    for metric in ("ttft_mean_ms", "tpot_mean_ms", "output_tok_s_per_gpu"):
        error = found.error(metric, "moe")
        assert error is not None and error.left_out is not None
        assert error.calibrated[0] <= error.left_out[0] <= error.uncalibrated[0]
    assert found.error("tpot_mean_ms", "neither") is None


def test_off_changes_nothing() -> None:
    assert calibrations("off") is OFF
    assert OFF.of("vllm", "sm90") == NEUTRAL
    assert all(NEUTRAL.factor(label) == 1.0 for label in ("experts", "attention", "nothing"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + ENTRY + "expert = 1.0\n", "entry.0.values.expert: unknown key .did you mean .*experts"),
        (HEAD + ENTRY + "layer_s = -1e-6\n", r"entry.0.values.layer_s: .*greater than or equal to 0 \(is -1e-06\)"),
        (HEAD + ENTRY + "experts = 0\n", r"entry.0.values.experts: .*greater than 0"),
        (HEAD + ENTRY + "gemm = 11\n", r"entry.0.values.gemm: .*less than or equal to 10"),
        (HEAD + ENTRY + 'gemm = "fast"\n', "entry.0.values.gemm: .*number"),
        (HEAD + ENTRY + ENTRY, "two entries for vllm on hopper. Keep one"),
        (HEAD + "entri = 3\n", "entri: unknown key .did you mean entry"),
        (ENTRY, "source"),
        ("source = ", "not valid TOML|Invalid|TOML"),
    ],
)
def test_faults_of_a_file_are_named_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        calibrations(str(path))
    assert "mine.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [("nonsense", "--calibration nonsense: off, or a .toml"), ("none.toml", "none.toml")],
)
@pytest.mark.parametrize("command", ["simulate", "plan", "validate"])
def test_commands_refuse_it_with_one_message(moeplan, tmp_path, command, option, message) -> None:
    points = tmp_path / "points.csv"
    points.write_text("model,gpu,engine,num_gpus,tp,isl,osl,concurrency\ngpt-oss-20b,H100,vllm,1,1,64,8,1\n")
    arguments = {
        "simulate": ["gpt-oss-20b", "--cluster", "h100-sxm:1x1"],
        "plan": ["gpt-oss-20b", "--cluster", "h100-sxm:1x1"],
        "validate": [str(points)],
    }[command]
    code, out, err = moeplan(command, *arguments, "--calibration", option)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())


# --- which entry holds ---


def test_the_generation_goes_before_any_and_others_are_neutral() -> None:
    hopper, rest = Calibration(experts=1.5), Calibration(experts=1.2)
    found = Calibrations("", "", "", (Entry("vllm", "hopper", hopper), Entry("vllm", ANY, rest)))
    assert found.of("vllm", "sm90") is hopper
    assert found.of("vllm", "sm100") is rest and found.of("vllm", "gfx942") is rest
    assert found.of("sglang", "sm90") is NEUTRAL
    assert set(GENERATIONS.values()) == {"hopper", "blackwell"}


@pytest.mark.parametrize("name", ["vllm", "sglang", "trtllm", "llamacpp", "generic"])
def test_an_engine_finds_its_own_entry(name: str) -> None:
    mine = Calibration(experts=1.5)
    assert replace(engine(name), calibrations=only(name, mine)).calibration("sm90") is mine


def test_a_profile_on_a_bundled_engine_has_the_calibration_of_its_kernels() -> None:
    mine = replace(engine("vllm"), name="house", calibrations=only("vllm", Calibration(experts=1.5)))
    assert mine.calibration("sm90").experts == 1.5


# --- what a parameter does: one user, so that nobody waits for anybody ---

MODEL = load("openai/gpt-oss-20b")
OUTPUT, PROMPT = 9, 256


def runs(values: Calibration = NEUTRAL, name: str = "vllm", users: int = 1, chunk: int = 8192) -> Run:
    profile = replace(engine(name), calibrations=only(name, values))
    limits, cluster = Limits(min(64, chunk), chunk), parse_cluster("h100-sxm:1x1")
    workload = Workload("w", Lengths.fixed(PROMPT), Lengths.fixed(OUTPUT), Arrivals.closed(users), 3 * users)
    return run(deploy(MODEL, cluster, Layout(), profile, limits, "all_reduce", 512), workload)


def latencies(found: Run) -> tuple[float, float]:
    requests = found.simulation.requests
    return float(np.mean(requests.ttft_s)), float(np.mean(requests.tpot_s))


@pytest.fixture(scope="module")
def neutral() -> tuple[float, float]:
    return latencies(runs())


LAYERS = MODEL.num_layers
ADDED = {
    # parameter: its value, and what it adds to TTFT and to TPOT of one user, whose prompt is one step
    "layer_s": (1e-5, 1e-5 * LAYERS, 1e-5 * LAYERS),
    "prompt_layer_s": (1e-5, 1e-5 * LAYERS, 0.0),
    "step_s": (1e-3, 1e-3, 1e-3),
    "sequence_s": (1e-3, 1e-3, 1e-3),
    "frontend_s": (0.5, 0.5, 0.0),
    "frontend_s_per_token": (1e-4, 1e-4 * PROMPT, 0.0),
    "unassisted_frontend_s": (0.5, 0.0, 0.0),
}


@pytest.mark.parametrize("name", TIMES)
def test_a_time_adds_what_it_says(name: str, neutral: tuple[float, float]) -> None:
    value, ttft_s, tpot_s = ADDED[name]
    ttft, tpot = latencies(runs(Calibration(**{name: value})))
    assert ttft - neutral[0] == pytest.approx(ttft_s, rel=1e-6, abs=1e-9)
    assert tpot - neutral[1] == pytest.approx(tpot_s, rel=1e-6, abs=1e-9)


def test_only_engines_without_frontend_workers_wait_unassisted() -> None:
    for name in ("vllm", "trtllm", "sglang"):
        before, after = (latencies(runs(Calibration(unassisted_frontend_s=s), name))[0] for s in (0.0, 0.5))
        assert after - before == pytest.approx(0.0 if engine(name).frontend_workers else 0.5)
    assert not engine("trtllm").frontend_workers


def test_host_time_grows_with_the_running_sequences() -> None:
    for users in (1, 4, 8):
        before, after = (runs(Calibration(sequence_s=s), users=users).simulation.steps for s in (0.0, 1e-3))
        decodes = before.prefill_tokens == 0
        added = (after.step_s - before.step_s)[decodes]
        assert added == pytest.approx(1e-3 * before.decode_seqs[decodes], rel=0.01)


def test_every_chunk_of_a_prompt_is_launched() -> None:
    added = [
        latencies(runs(Calibration(prompt_layer_s=1e-5), chunk=chunk))[0] - latencies(runs(chunk=chunk))[0]
        for chunk in (PROMPT, PROMPT // 4)
    ]
    assert added == pytest.approx([1e-5 * LAYERS, 4e-5 * LAYERS])


@pytest.mark.parametrize("name", ["experts", "gemm", "attention"])
def test_a_factor_multiplies_its_operations_only(name: str, neutral: tuple[float, float]) -> None:
    cost = runs().deployment.cost()
    more = runs(Calibration(**{name: 2.0})).deployment.cost()
    for before, after in (
        (cost.decode(np.array(4.0), np.array(300.0)), more.decode(np.array(4.0), np.array(300.0))),
        (cost.prefill(np.array(256.0)), more.prefill(np.array(256.0))),
    ):
        grown = {label for label in before.terms if after.terms[label] > 1.5 * before.terms[label] > 0}
        assert (
            grown
            == {
                "experts": {"experts"},
                "gemm": {"attention_projections", "router", "lm_head"},
                "attention": {"attention"},
            }[name]
        )
        for label in before.terms:
            factor = 2.0 if label in grown else 1.0
            assert after.terms[label] == pytest.approx(factor * before.terms[label], rel=1e-6)
    ttft, tpot = latencies(runs(Calibration(**{name: 2.0})))
    assert ttft > neutral[0] and tpot > neutral[1]


def test_exchange_multiplies_collectives() -> None:
    layout, cluster = Layout(tp=2, ep=2), parse_cluster("h100-sxm:1x2")
    terms = []
    for factor in (1.0, 2.0):
        profile = replace(engine("vllm"), calibrations=only("vllm", Calibration(exchange=factor)))
        cost = deploy(load("qwen3-30b-a3b"), cluster, layout, profile, Limits(8, 1024), "all_reduce", 512).cost()
        terms.append(cost.decode(np.array(4.0), np.array(300.0)).terms)
    before, after = terms
    assert after["all_reduce"] == pytest.approx(2 * before["all_reduce"])
    assert after["experts"] == pytest.approx(before["experts"])
    assert math.fsum(after.values()) > math.fsum(before.values())


def test_prompts_multiplies_steps_with_prompts_only() -> None:
    before, after = (runs(Calibration(prompts=p)).simulation.steps for p in (1.0, 2.0))
    decodes = before.prefill_tokens == 0
    assert (after.step_s[decodes] == before.step_s[decodes]).all()
    # lm_head, sampling and host are those of one token and stay
    assert 1.8 < (after.step_s / before.step_s)[~decodes].min() <= 2.0


def test_the_neutral_calibration_is_no_calibration() -> None:
    profile = replace(engine("vllm"), calibrations=OFF)
    workload = Workload("w", Lengths.fixed(PROMPT), Lengths.fixed(OUTPUT), Arrivals.closed(1), 3)
    found = run(
        deploy(MODEL, parse_cluster("h100-sxm:1x1"), Layout(), profile, Limits(64, 8192), "all_reduce", 512), workload
    )
    assert (found.simulation.requests.finish_s == runs().simulation.requests.finish_s).all()
