"""Flags of measured servers: which runs a rule is about, and what it changes."""

from __future__ import annotations

import math
import tomllib
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest

from planner.engine import Limits, engine
from planner.model import catalog
from planner.validation.flags import Flags, Match, flags_of
from planner.validation.names import system_of
from planner.validation.points import Point
from planner.validation.replay import _engine, _limits, _model

TEXT = resources.files("planner.validation").joinpath("flags.toml").read_text("utf-8")
RULES: list[dict[str, Any]] = tomllib.loads(TEXT)["rule"]
POINT = Point(
    "p", "openai/gpt-oss-120b", "B200", "trtllm", "fp4", 2, 2, 1, 1, 1, 512, 256, (0.8, 1.0), 4, (math.nan,) * 3
)
DEFAULT = Limits(1024, 4096)


def runs_of(when: dict[str, Any]) -> list[Point]:
    """Runs that the rule is about, one of each GPU and model."""
    asked = {"precision": when.get("precision", "fp8"), "concurrency": max(4, when.get("min_users", 1))}
    asked |= {key: when[key] for key in ("isl", "osl") if key in when}
    return [
        replace(POINT, engine=when["engine"], gpu=gpu, model=f"someone/{name}-Instruct", **asked)
        for gpu in when["gpus"]
        for name in when["models"]
    ]


def match_of(when: dict[str, Any]) -> Match:
    return Match(**{key: tuple(value) if isinstance(value, list) else value for key, value in when.items()})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["source"][:40])
def test_a_rule_holds_for_its_runs_and_for_no_others(rule: dict[str, Any]) -> None:
    when, match = rule["when"], match_of(rule["when"])
    runs = runs_of(when)
    assert runs and all(match.holds(point, when["engine"]) for point in runs)
    for point in runs:
        assert match.holds(replace(point, gpu=point.gpu.lower(), precision=point.precision.upper()), when["engine"])
        assert not match.holds(replace(point, model="Qwen/Qwen3-8B"), when["engine"])
        assert not match.holds(replace(point, gpu="A100"), when["engine"])
        assert not match.holds(replace(point, model=point.model.replace("-Instruct", ".9-Instruct")), when["engine"])
        assert not match.holds(point, "llamacpp")
        if "precision" in when:
            assert not match.holds(replace(point, precision="bf16"), when["engine"])
        if "max_tp" in when:
            assert not match.holds(replace(point, tp=when["max_tp"] + 1), when["engine"])
        if "min_users" in when:
            assert not match.holds(replace(point, concurrency=when["min_users"] - 1), when["engine"])
        for key in {"isl", "osl"} & set(when):
            assert not match.holds(replace(point, **{key: when[key] + 1}), when["engine"])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["source"][:40])
def test_a_rule_has_a_source_and_sets_what_there_is(rule: dict[str, Any]) -> None:
    assert rule["set"] and set(rule) == {"source", "when", "set"}
    assert set(rule["set"]) <= set(Flags.__slots__)
    for source in rule["source"].split(", "):
        script, _, commit = source.partition(" @")
        assert script.endswith(".sh") and len(commit) == 7 and int(commit, 16)
    assert rule["when"]["engine"] in ("vllm", "sglang", "trtllm")


def test_later_rules_win() -> None:
    deepseek = replace(POINT, model="deepseek-ai/DeepSeek-V3", gpu="H200", precision="fp8")
    found = flags_of(deepseek, "trtllm")
    assert (found.memory_fraction, found.kv, found.holds_prompt) == (0.75, "fp8", True)
    few, many = (flags_of(replace(deepseek, gpu="B200", concurrency=n), "sglang") for n in (15, 16))
    assert (few.receive_interval, many.receive_interval) == (10, 30)
    small, large = (flags_of(replace(deepseek, gpu="B200", tp=tp), "sglang").max_num_seqs for tp in (4, 8))
    assert (small, large) == (32, 128)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({}, "llamacpp"), ({"model": "Qwen/Qwen3-8B"}, "trtllm"), ({"gpu": "A100"}, "trtllm"), ({}, "no-engine")],
)
def test_others_run_with_the_defaults(changes: dict[str, str], name: str) -> None:
    found = flags_of(replace(POINT, **changes), name)
    assert found == Flags()
    assert found.limits(DEFAULT, POINT) == DEFAULT


@pytest.mark.parametrize(
    ("flags", "limits"),
    [
        (Flags(max_num_seqs=128), Limits(128, 4096)),
        (Flags(max_num_seqs=0), Limits(4, 4096)),
        (Flags(max_batched_tokens=8192), Limits(1024, 8192)),
        (Flags(tokens_per_isl=3), Limits(1024, 3 * 512)),
        (Flags(tokens_per_isl=3, max_batched_tokens=8192), Limits(1024, 3 * 512)),
        (Flags(holds_prompt=True), Limits(1024, 4096)),
        (Flags(holds_prompt=True, max_batched_tokens=64), Limits(1024, 640)),
    ],
)
def test_flags_change_the_limits(flags: Flags, limits: Limits) -> None:
    """holds_prompt: 512 of the prompt, 4 users and 64 more, in steps of 64: 640."""
    assert flags.limits(DEFAULT, POINT) == limits


def test_a_replay_serves_as_the_flags_say() -> None:
    """gptoss_fp4_b200_trt.sh: attention-DP balance, post-processing workers, 20,000 tokens, FP8 KV."""
    serving = _engine(POINT)
    assert serving.frontend_workers and not engine("trtllm").frontend_workers
    balance = serving.prefill_balance
    assert balance is not None and (balance.enabled, balance.timeout_steps, balance.batching_wait_steps) == (
        True,
        50,
        10,
    )
    assert serving.kv_fraction == 0.85 and serving.batch_wait is None
    assert _model(POINT).kv_format == "fp8"
    assert _limits(serving, system_of("B200"), POINT, 1.0) == Limits(512, 20000)
    llama = replace(POINT, model="meta-llama/Llama-3.3-70B", precision="fp8", isl=1024, osl=1024)
    wait = _engine(llama).batch_wait
    assert wait is not None and (wait.timeout_steps, wait.token_share) == (20, 0.9)
    assert _engine(replace(POINT, engine="vllm")).mxfp4_by_fp8 == ("sm100",)


def test_runs_of_other_clients_have_no_known_flags() -> None:
    fixed = replace(POINT, lengths=(1.0, 1.0))
    assert _engine(fixed) == replace(engine("trtllm"), expert_parallel="any")


def test_a_name_in_the_table_is_a_part_of_a_bundled_model() -> None:
    known = [name.lower() for name in catalog()]
    for rule in RULES:
        for part in rule["when"]["models"]:
            assert any(part.lower() in name for name in known), part
