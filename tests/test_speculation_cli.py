"""Speculative decoding as a user types it: what is reported, and one message for each bad input."""

from __future__ import annotations

import json
from typing import Any

import pytest

from planner.errors import InputError
from planner.layout import Layout
from planner.model import load
from planner.speculation import Speculation, parse_speculation

SIMULATE = ["simulate", "deepseek-v3", "--cluster", "h200-sxm:1x8", "--layout", "tp=8,ep=8", "--num-requests", "200"]


def test_simulate_reports_the_acceptance_and_counts_tokens_per_step(moeplan: Any) -> None:
    code, out, _ = moeplan(*SIMULATE, "--rate", "4", "--speculative", "mtp:1", "--json")
    facts = json.loads(out)
    drafts = facts["speculation"]
    assert code == 0 and drafts["acceptance_is_assumed"] and drafts["tokens_per_step"] == pytest.approx(1.85)
    assert drafts["simulated_tokens_per_step"] == pytest.approx(1.85, abs=0.02)
    assert any("Acceptance is assumed" in warning for warning in facts["warnings"])
    code, out, _ = moeplan(*SIMULATE, "--rate", "4", "--json")
    plain = json.loads(out)
    assert "speculation" not in plain and "overlap" not in plain
    assert facts["tpot_s"]["mean"] < 0.75 * plain["tpot_s"]["mean"]
    assert facts["ttft_s"]["p50"] > plain["ttft_s"]["p50"]


def test_the_text_names_drafter_acceptance_and_basis(moeplan: Any) -> None:
    code, out, _ = moeplan(*SIMULATE, "--rate", "1", "--speculative", "mtp:3", "--acceptance", "0.85,0.7,0.6")
    assert code == 0 and "MTP drafts 3, acceptance 0.85, 0.7, 0.6 (given): 2.80 tokens per step" in out
    assert "assumed" not in out


def test_plan_names_the_drafts_in_every_layout(moeplan: Any) -> None:
    question = (
        "plan",
        "baidu/ERNIE-4.5-21B-A3B-PT",
        "--cluster",
        "h200-sxm:1x1",
        "--rate",
        "1",
        "--num-requests",
        "60",
    )
    code, out, _ = moeplan(*question, "--speculative", "mtp:1", "--json")
    facts = json.loads(out)
    assert code == 0 and all(row["name"].endswith("MTP x1") for row in facts["top"])
    assert facts["speculation"]["tokens_per_step"] == pytest.approx(1.85)
    assert facts["memory"]["terms"]["draft"] > 0 and facts["step"]["decode"]["draft"] > 0
    assert "None of them drafted tokens" in facts["past_error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speculative", "mtp"], "give who drafts and how many tokens, such as mtp:1"),
        (["--speculative", "eagle:3"], "draft:MODEL:4 or ngram:3"),
        (["--speculative", "draft:3"], "give who drafts"),
        (["--speculative", "mtp:0"], "1 to 16 can be drafted"),
        (["--speculative", "mtp:²"], "give who drafts"),
        pytest.param(["--speculative", "ngram:" + "9" * 5000], "give who drafts", id="digits"),
        (["--speculative", "ngram:99", "--acceptance", "0.4"], "99 drafts"),
        (["--speculative", "ngram:3"], "needs --acceptance"),
        (["--speculative", "draft:qwen3-30b-a3b:3"], "needs --acceptance"),
        (["--speculative", "draft:qwen3-30b-a3b:3", "--acceptance", "0.7"], "must share the tokenizer"),
        (["--speculative", "mtp:2", "--acceptance", "0.5,0.4,0.3"], "3 shares for 2 drafts; give 1 or 2"),
        (["--speculative", "mtp:2", "--acceptance", "1.5"], "lie in [0, 1]"),
        (["--speculative", "mtp:2", "--acceptance", "high"], "one share such as 0.85"),
        (["--acceptance", "0.8"], "needs --speculative"),
        (["--speculative", "mtp:3", "--max-num-seqs", "4096"], "Use --max-num-seqs 2048 or fewer drafts"),
        (["--speculative", "mtp:1", "--residency", "lru"], "no engine combines them"),
    ],
)
def test_bad_input_is_one_message_with_a_remedy(moeplan: Any, arguments: list[str], message: str) -> None:
    code, _, err = moeplan(*SIMULATE, "--rate", "1", *arguments)
    assert code == 2 and message in err


def test_a_model_without_mtp_says_so() -> None:
    with pytest.raises(InputError, match=r"Mixtral.*no multi-token-prediction layer.*draft:MODEL:4"):
        parse_speculation("mtp:1", None, load("mixtral-8x7b"))


def test_drafts_count_against_the_dispatch_buffer(moeplan: Any) -> None:
    """SGLang stops where b (n + 1) exceeds 128: infeasible, not slow (handbook serving 11.2)."""
    question = ["simulate", "deepseek-v3", "--cluster", "h200-sxm:2x8", "--layout", "attention_dp=16,ep=16"]
    question += [
        "--backend",
        "deepep",
        "--engine",
        "sglang",
        "--rate",
        "1",
        "--num-requests",
        "50",
        "--speculative",
        "mtp:1",
    ]
    code, _, err = moeplan(*question, "--max-num-seqs", "128")
    assert code == 3 and "256 tokens per rank exceed" in err and "--max-num-seqs 64" in err
    code, out, _ = moeplan(*question)
    assert code == 0 and "1.85 tokens per step" in out


def test_a_draft_model_must_divide_as_the_layout_asks() -> None:
    draft = load("qwen3-30b-a3b")
    narrow = Speculation("draft", (0.7,), "given", False, draft)
    assert narrow.problem(Layout(tp=8, ep=8)) is None
    assert "cannot draft on" in (narrow.problem(Layout(tp=64, ep=64)) or "")
