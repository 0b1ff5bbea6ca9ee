"""Two half batches that take turns, and shared experts under dispatch: bounds, signs, thresholds, memory."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.engine import Limits, engine
from planner.errors import InputError
from planner.experts import AS_SERVED
from planner.hardware import parse_cluster
from planner.layout import Layout
from planner.memory import Ledger
from planner.model import load
from planner.overlap import compute_share, parse_overlap, two_batch_s
from planner.scheduler import RankWork
from planner.tacticcost import TacticCost, step_cost
from planner.tactics import PLAIN, Tactics, parse_tactics
from planner.tactictimer import tactic_timer

V3 = load("deepseek-v3")
WIDE = Layout(attention_dp=32, ep=32)
SECONDS = st.floats(1e-6, 1.0)


def cost(overlap: str | None, name: str = "sglang", speculative: str | None = None) -> Any:
    serving = engine(name)
    tactics = parse_tactics(speculative, None, overlap, V3, serving)
    return step_cost(V3, WIDE, parse_cluster("h200-sxm:4x8"), serving, "deepep", tactics=tactics)


def decode_s(overlap: str | None, seqs: float, name: str = "sglang") -> float:
    return float(cost(overlap, name).decode(np.array(seqs), np.array(2050.0)).total_s)


def prefill_s(overlap: str | None, tokens: float, name: str = "sglang", **given: Any) -> float:
    return float(cost(overlap, name).prefill(np.array(tokens), **given).total_s)


# --- the schedule ---


@settings(deadline=None, derandomize=True, max_examples=300)
@given(SECONDS, SECONDS, SECONDS, SECONDS, st.integers(1, 80), st.floats(0.2, 1.0))
def test_two_batches_lie_between_the_longer_stream_and_both(
    attention: float, dispatch: float, experts: float, combine: float, layers: int, kept: float
) -> None:
    """max(C, M) <= t <= C + M over both halves (handbook serving 1.2)."""
    compute, exchange = 2 * layers * (attention + experts), 2 * layers * (dispatch + combine)
    free = two_batch_s(attention, dispatch, experts, combine, layers)
    slowed = two_batch_s(attention, dispatch, experts, combine, layers, kept)
    assert max(compute, exchange) * (1 - 1e-9) <= free <= slowed * (1 + 1e-9)
    assert slowed <= (compute + exchange) * (1 + 1e-9)


def test_the_schedule_is_that_of_two_streams_in_order() -> None:
    """Step by step: every operation waits for its own half and for its stream."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        times, layers = rng.random(4), 7
        stream = {"compute": 0.0, "wire": 0.0}
        ready = [0.0, 0.0]
        for _ in range(layers):
            for name, seconds in zip(("compute", "wire", "compute", "wire"), times, strict=True):
                for half in (0, 1):
                    ready[half] = stream[name] = max(ready[half], stream[name]) + seconds
        assert two_batch_s(*times.tolist(), layers) == pytest.approx(max(ready), rel=1e-12)


def test_arrays_give_what_floats_give() -> None:
    grid = np.random.default_rng(1).random((4, 9))
    together = two_batch_s(*grid, 5, 0.8, np.maximum)
    assert together == pytest.approx([two_batch_s(*column, 5, 0.8) for column in grid.T])


def test_normal_exchange_takes_its_sms_and_low_latency_none() -> None:
    gpu = parse_cluster("h200-sxm:1x8").system.gpu
    assert compute_share(gpu, "prefill") == pytest.approx((132 - 20) / 132)
    assert compute_share(gpu, "decode") == 1.0


# --- signs against published ones ---


def test_two_batches_lose_at_32_tokens_and_gain_from_128() -> None:
    """SGLang on H100: -27 % at 32 tokens per device, +25.5 % at 256 (lmsys.org blog 2025-05-05, handbook 10.3)."""
    gain = {seqs: decode_s(None, seqs) / decode_s("tbo", seqs) - 1 for seqs in (32, 128, 256)}
    assert -0.4 < gain[32] < 0 < 0.1 < gain[128] < gain[256] < 0.8


def test_the_sign_flips_where_it_was_published() -> None:
    """The same, on that deployment: 72 H100, 32 copies of experts, EPLB; break-even was between 64 and 128 tokens."""
    serving, layout = engine("sglang"), Layout(attention_dp=72, ep=72, redundant_experts=32)
    where, balanced = parse_cluster("h100-sxm:9x8"), replace(AS_SERVED, placement="eplb")
    seqs, context = np.array([32.0, 128.0, 256.0]), np.array(2000.0)
    plain, halves = (
        step_cost(V3, layout, where, serving, "deepep", balanced, None, parse_tactics(None, None, o, V3, serving))
        for o in (None, "tbo")
    )
    gain = plain.decode(seqs, context).total_s / halves.decode(seqs, context).total_s - 1
    assert gain[0] < 0 < gain[1] < gain[2]


@pytest.mark.parametrize("tokens", [4096, 8192])
def test_prompts_gain_about_a_third(tokens: int) -> None:
    """+27 to 35 % (same source)."""
    assert 0.15 < prefill_s(None, tokens) / prefill_s("tbo", tokens) - 1 < 0.5


@pytest.mark.parametrize("seqs", [2, 16, 64, 256])
def test_the_step_lies_within_the_bounds_of_its_halves(seqs: int) -> None:
    whole, part = cost("tbo").decode(np.array(float(seqs)), np.array(2050.0)), cost("tbo").moe_part
    half = part.decode(np.array(seqs / 2), np.array(2050.0))
    exchange = 2 * float(half.terms["dispatch"] + half.terms["combine"])
    head = float(half.terms["lm_head"] + half.terms["sampling"] + half.terms["host"])
    compute = 2 * (float(half.total_s) - head) - exchange
    rest = float(cost(None).decode(np.array(float(seqs)), np.array(2050.0)).total_s)
    rest -= float(part.decode(np.array(float(seqs)), np.array(2050.0)).total_s)
    assert max(compute, exchange) * 0.97 <= float(whole.total_s) - rest <= (compute + exchange) * 1.03
    assert sum(float(v) for v in whole.origin.values()) == pytest.approx(float(whole.total_s))
    assert min(float(v) for v in whole.terms.values()) >= 0


def test_shared_experts_hide_dispatch_up_to_their_own_length() -> None:
    plain, hidden = (cost(o).decode(np.array(8.0), np.array(2050.0)) for o in (None, "shared"))
    saved = float(plain.total_s - hidden.total_s)
    assert saved == pytest.approx(float(np.minimum(plain.terms["dispatch"], plain.terms["shared_experts"])))
    assert float(hidden.terms["dispatch"]) == pytest.approx(float(plain.terms["dispatch"]) - saved)


# --- thresholds ---


def test_vllm_leaves_small_batches_alone() -> None:
    assert decode_s("tbo", 16, "vllm") == decode_s(None, 16, "vllm")
    assert decode_s("tbo", 16, "sglang") > decode_s(None, 16, "sglang")
    assert prefill_s("tbo", 256, "vllm") == prefill_s(None, 256, "vllm")
    assert prefill_s("tbo", 1024, "vllm") < prefill_s(None, 1024, "vllm")


def test_one_rank_that_does_not_agree_stops_all_of_vllm() -> None:
    assert prefill_s("tbo", 4096, "vllm", ranks=1.0) == prefill_s(None, 4096, "vllm", ranks=1.0)
    limits = Limits(256, 8192)
    plain, overlapped = (tactic_timer(cost(o, "vllm"), limits) for o in (None, "tbo"))
    busy = [RankWork(decode_seqs=128, decode_context_tokens=128 * 2000) for _ in range(32)]
    few = [*busy[:31], RankWork(decode_seqs=31, decode_context_tokens=31 * 2000)]
    idle = [*busy[:31], RankWork()]
    for ranks, same in ((busy, False), (few, True), (idle, True)):
        plain_s, overlapped_s = (np.mean([timer.step_s(ranks) for _ in range(100)]) for timer in (plain, overlapped))
        assert (overlapped_s == pytest.approx(plain_s, rel=1e-9)) == same


@pytest.mark.parametrize("overlap", ["tbo", "shared"])
@pytest.mark.parametrize("speculative", [None, "mtp:1"])
def test_the_timer_agrees_with_the_tables(overlap: str, speculative: str | None) -> None:
    table = cost(overlap, "sglang", speculative)
    timer = tactic_timer(table, Limits(256, 8192))
    for seqs in (8, 64, 256):
        ranks = [RankWork(decode_seqs=seqs, decode_context_tokens=seqs * 2000) for _ in range(32)]
        seconds = np.mean([timer.step_s(ranks) for _ in range(300)])
        assert seconds == pytest.approx(float(table.decode(np.array(float(seqs)), np.array(2000.0)).total_s), rel=0.05)
    ranks = [RankWork(4096, 4096 * 4097 // 2, 1) for _ in range(32)]
    seconds = np.mean([timer.step_s(ranks) for _ in range(300)])
    assert seconds == pytest.approx(float(table.prefill(np.array(4096.0)).total_s), rel=0.05)


def test_mixed_steps_overlap_too() -> None:
    arguments = [np.array([value]) for value in (2048.0, 0.0, 32.0, 64.0, 2000.0)]
    plain, overlapped = (float(cost(o).mixed(*arguments).total_s[0]) for o in (None, "tbo"))
    assert 0.5 * plain < overlapped < 0.95 * plain


# --- memory and refusals ---


def test_half_batches_need_half_the_activations() -> None:
    """SGLang ran prompts of 16k tokens where 8k was the limit (handbook serving 5.4)."""
    system, serving = parse_cluster("h200-sxm:4x8").system, engine("vllm")
    overlapped = Tactics(overlap=parse_overlap("tbo", serving))

    def activations(tactics: Tactics, tokens: int) -> float:
        return Ledger(V3, system, serving, tactics).use(WIDE, Limits(16, tokens), "deepep", 4096).terms["activations"]

    assert activations(overlapped, 16384) == activations(PLAIN, 8192)
    assert activations(overlapped, 8192) < activations(PLAIN, 8192)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "tp=8,ep=8", "--overlap", "tbo"], "has no exchange to hide"),
        (["--layout", "attention_dp=8,ep=8", "--overlap", "tbo"], "Use --backend deepep"),
        (["--layout", "tp=8,ep=8", "--overlap", "tbo", "--engine", "trtllm"], "Use --engine vllm or sglang"),
        (["--layout", "tp=8,ep=8", "--overlap", "tbi"], "tbo"),
    ],
)
def test_an_overlap_without_exchange_is_refused(moeplan: Any, arguments: list[str], message: str) -> None:
    code, _, err = moeplan("simulate", "deepseek-v3", "--cluster", "h200-sxm:1x8", "--rate", "1", *arguments)
    assert code == 2 and message in err


def test_an_unknown_overlap_is_refused_by_the_library_too() -> None:
    with pytest.raises(InputError, match="tbo"):
        parse_overlap("tboo", engine("vllm"))


def test_simulate_overlaps_and_says_so(moeplan: Any) -> None:
    question = ["simulate", "deepseek-v3", "--cluster", "h200-sxm:4x8", "--layout", "attention_dp=32,ep=32"]
    question += ["--backend", "deepep", "--workload", "fixed:512/64", "--concurrency", "4096", "--num-requests", "8192"]
    facts = []
    for extra in ([], ["--overlap", "tbo"]):
        code, out, _ = moeplan(*question, "--max-num-seqs", "128", *extra, "--json")
        assert code == 0
        facts.append(json.loads(out))
    assert facts[1]["output_tok_per_s"] > 1.1 * facts[0]["output_tok_per_s"]
    assert facts[1]["overlap"]["decode_tokens_min"] == 32 and "overlap" not in facts[0]


def test_a_plan_overlaps_where_it_can(moeplan: Any) -> None:
    question = ["plan", "qwen3-30b-a3b", "--cluster", "h200-sxm:1x2", "--rate", "2", "--num-requests", "60"]
    code, out, _ = moeplan(*question, "--overlap", "tbo", "--json")
    assert code == 0
    facts = json.loads(out)
    assert any("has no exchange" in w for w in facts["warnings"]) == ("overlap" not in facts)
    for row in facts["top"]:
        assert ("two-batch overlap" in row["name"]) == ("DeepEP" in row["name"])


def test_overlap_asks_for_tactics_only() -> None:
    assert isinstance(cost("tbo"), TacticCost) and not isinstance(cost(None), TacticCost)
