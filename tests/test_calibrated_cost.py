"""A calibration reaches every step once: in tables and in the event loop, with drafts, overlap, encoders and pools."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.calibration import NEUTRAL, OFF, PARAMETERS, Calibration, Calibrations, Entry, calibrations, to_toml
from planner.cost import StepCost
from planner.coverage import Case, coverage_facts
from planner.disaggregation.attention_ffn import AttentionFfn
from planner.disaggregation.rates import _prompt_step_s
from planner.engine import Engine, Limits, engine
from planner.hardware import parse_cluster
from planner.layout import Layout, parse_layout
from planner.model import load
from planner.scheduler import RankWork
from planner.steptime import StepTime
from planner.tacticcost import step_cost
from planner.tactics import parse_tactics
from planner.tactictimer import tactic_timer
from tests.conftest import Command

V3 = load("deepseek-v3")
NOT_PER_LAUNCH = ("lm_head", "sampling", "host", "draft_lm_head")
"""Terms of a step that its prompts do not lengthen: the same kernels run once at its end."""
FACTORS = st.one_of(st.floats(0.5, 0.9), st.floats(1.2, 3.0))
CALIBRATIONS = st.builds(
    Calibration,
    **dict.fromkeys(("experts", "gemm", "attention", "exchange", "prompts"), FACTORS),
    **dict.fromkeys(("layer_s", "prompt_layer_s"), st.floats(2e-5, 2e-4)),
    step_s=st.floats(1e-3, 1e-2),
    sequence_s=st.floats(1e-5, 1e-4),
    **dict.fromkeys(("frontend_s", "frontend_s_per_token", "unassisted_frontend_s"), st.floats(1e-6, 1e-3)),
)
"""No parameter is near its neutral value, and each is seen in a step."""


def serving(values: Calibration, name: str = "vllm") -> Engine:
    plain = engine(name)
    return replace(plain, calibrations=Calibrations("", "", "", (Entry(plain.kernels, "any", values),)))


def mixtral_cost(layout: Layout, values: Calibration) -> StepCost:
    return StepCost(load("mixtral-8x7b"), layout, parse_cluster("h200-sxm:1x4"), serving(values))


def tactic_cost(values: Calibration, speculative: str | None, overlap: str | None) -> StepCost:
    chosen = serving(values, "sglang")
    tactics = parse_tactics(speculative, "0.7" if speculative else None, overlap, V3, chosen)
    where, layout = parse_cluster("h200-sxm:4x8"), Layout(attention_dp=32, ep=32)
    return step_cost(V3, layout, where, chosen, "deepep", tactics=tactics)


def three_steps(cost: StepCost, seqs: float, context: float, tokens: float) -> list[StepTime]:
    """A decode-only, a prompt-only and a mixed step of all ranks."""
    batch, length, chunk = np.array(seqs), np.array(context), np.array(tokens)
    ranks = np.array(float(cost.layout.attention_dp))
    return [
        cost.decode(batch, length),
        cost.prefill(chunk),
        cost.mixed(chunk, np.array(0.0), ranks, batch, length),
    ]


def check_timer(cost: StepCost, seqs: int, context: int, tokens: int) -> None:
    timer, dp = tactic_timer(cost, Limits(128, 8192)), cost.layout.attention_dp
    timer.use_factors(None)
    decode = {"decode_seqs": seqs, "decode_context_tokens": seqs * context}
    prompt = {"prefill_tokens": tokens, "prefill_pairs": tokens * (tokens + 1) // 2, "num_prefills": 1}
    for step, work in zip(three_steps(cost, seqs, context, tokens), (decode, prompt, decode | prompt), strict=True):
        if cost.has_encoder and work is prompt:
            continue  # the first token passes the decoder too, in the timer only
        found = timer.step_s([RankWork(**work) for _ in range(dp)])
        assert found == pytest.approx(float(step.total_s), rel=0.015), work


# --- timer and tables ---


@pytest.mark.parametrize("layout", [Layout(tp=4, moe_tp=4), Layout(attention_dp=4, ep=4)], ids=str)
@settings(deadline=None, derandomize=True, max_examples=8)
@given(CALIBRATIONS, st.sampled_from((8, 64, 128)), st.sampled_from((500, 4000)), st.sampled_from((1024, 4096)))
def test_the_timer_is_the_tables(layout: Layout, values: Calibration, seqs: int, context: int, tokens: int) -> None:
    assert all(getattr(values, name) != getattr(NEUTRAL, name) for name in PARAMETERS)
    check_timer(mixtral_cost(layout, values), seqs, context, tokens)


@pytest.mark.parametrize(("speculative", "overlap"), [("mtp:2", None), (None, "tbo"), ("mtp:1", "tbo")])
@settings(deadline=None, derandomize=True, max_examples=2)
@given(CALIBRATIONS)
def test_the_timer_is_the_tables_under_tactics(
    speculative: str | None, overlap: str | None, values: Calibration
) -> None:
    check_timer(tactic_cost(values, speculative, overlap), 64, 2000, 4096)


def test_encoders_are_launched_like_any_prompt_and_hosts_work_once() -> None:
    values = Calibration(gemm=2.0, prompts=1.5, layer_s=1e-4, prompt_layer_s=2e-4, step_s=5e-3, sequence_s=1e-5)
    cost = StepCost(load("google/switch-base-8"), Layout(), parse_cluster("a100-80-sxm:1x1"), serving(values))
    assert cost.has_encoder
    mixed = three_steps(cost, 16, 500, 512)[-1]
    assert float(mixed.terms["host"]) == pytest.approx(5e-3 + 17e-5)
    encoders = sum(layer.stack == "encoder" for layer in cost.model.layers)
    assert float(cost.prefill(np.array(512.0)).terms["prompt_launches"]) == pytest.approx(2e-4 * encoders)
    check_timer(cost, 16, 500, 512)


# --- every piece once ---


@pytest.mark.parametrize(
    ("speculative", "overlap"), [(None, None), ("mtp:1", None), (None, "tbo"), (None, "shared"), ("mtp:1", "tbo")]
)
def test_prompts_lengthen_every_kernel_of_their_steps(speculative: str | None, overlap: str | None) -> None:
    """Those of drafts and of overlapped halves too; those of other steps not."""
    costs = [tactic_cost(Calibration(prompts=p), speculative, overlap) for p in (1.0, 1.5)]
    before, after = (cost.prefill(np.array(4096.0)) for cost in costs)
    fixed = sum(float(before.terms.get(label, 0.0)) for label in NOT_PER_LAUNCH)
    assert float(after.total_s) == pytest.approx(fixed + 1.5 * (float(before.total_s) - fixed))
    for phase, (one, two) in enumerate(zip(*(three_steps(c, 64, 2000, 4096) for c in costs), strict=True)):
        assert (float(two.total_s) > float(one.total_s)) == (phase > 0)


@pytest.mark.parametrize("name", ["experts", "gemm", "attention", "exchange"])
@pytest.mark.parametrize("speculative", [None, "ngram:3", "mtp:2"])
def test_factors_are_applied_once(speculative: str | None, name: str) -> None:
    costs = [tactic_cost(Calibration(**{name: f}), speculative, None) for f in (1.0, 2.0, 3.0)]
    for steps in zip(*(three_steps(cost, 16, 2000, 4096) for cost in costs), strict=True):
        one, two, three = (step.terms for step in steps)
        for label in one:
            assert float(three[label] - one[label]) == pytest.approx(2 * float(two[label] - one[label]), abs=1e-15)
            factor = Calibration(**{name: 2.0}).factor(label)
            if not label.startswith("draft"):
                assert float(two[label]) == pytest.approx(factor * float(one[label])), label
        if speculative == "mtp:2" and name != "experts":
            assert float(two["draft"]) > float(one["draft"])
        assert sum(float(v) for v in steps[1].origin.values()) == pytest.approx(float(steps[1].total_s))


def test_times_per_layer_and_sequence_are_paid_once() -> None:
    values = Calibration(layer_s=1e-5, prompt_layer_s=1e-4, step_s=1e-3, sequence_s=1e-6)
    plain, drafting = (tactic_cost(values, s, None) for s in (None, "mtp:2"))
    bare = tactic_cost(NEUTRAL, "mtp:2", None)
    for cost in (plain, drafting):
        decode, prompt, _ = three_steps(cost, 64, 2000, 4096)
        assert float(decode.terms["host"]) == pytest.approx(1e-3 + 64e-6), "per sequence, not per draft"
        assert float(decode.terms["small_kernels"]) == pytest.approx(61e-5)
        assert float(prompt.terms["prompt_launches"]) == pytest.approx(61e-4)
    added = [
        float(a.terms["draft"] - b.terms["draft"])
        for a, b in zip(three_steps(drafting, 64, 2000, 4096), three_steps(bare, 64, 2000, 4096), strict=True)
    ]
    assert added == pytest.approx([2e-5, 12e-5, 12e-5]), "two runs of a layer, the first of them beside prompts"
    head = [float(c.decode(np.array(64.0), np.array(2000.0)).terms["draft_lm_head"]) for c in (drafting, bare)]
    assert head[0] == head[1]


@settings(deadline=None, derandomize=True, max_examples=5)
@given(CALIBRATIONS)
def test_prefill_pools_pay_steps_with_prompts(values: Calibration) -> None:
    cost = mixtral_cost(Layout(attention_dp=4, ep=4), values)
    assert _prompt_step_s(cost, 2048.0, 2048.0, 4) == pytest.approx(float(cost.prefill(np.array(2048.0)).total_s))


def test_split_attention_pays_kernels_host_and_exchange() -> None:
    plain, slower = (
        AttentionFfn(V3, parse_cluster("h200-sxm:4x8"), serving(values), 4096)
        for values in (NEUTRAL, Calibration(exchange=2.0, layer_s=1e-5, step_s=1e-3))
    )
    assert slower.attention_s(1) - plain.attention_s(1) == pytest.approx(61e-5 + 1e-3)
    tokens = np.array([1000.0])
    assert slower.network_s(16, 16, tokens) == pytest.approx(2 * plain.network_s(16, 16, tokens))
    wide = (Calibration(exchange=f) for f in (1.0, 2.0, 3.0))
    one, two, three = (
        AttentionFfn(V3, parse_cluster("h200-sxm:4x8"), serving(v), 4096).attention_s(8)[0] for v in wide
    )
    assert two > one and three - one == pytest.approx(2 * (two - one))


# --- none ---


def test_off_is_a_file_without_entries(moeplan: Command, tmp_path: Path) -> None:
    empty = tmp_path / "empty.toml"
    empty.write_text(to_toml(replace(OFF, source="none")))
    assert not calibrations(str(empty)).entry
    run = ("simulate", "mixtral-8x7b", "--cluster", "h100-sxm:1x2", "--layout", "tp=2", "--rate", "4")
    found: list[dict[str, Any]] = []
    for given_calibration in ("off", str(empty), None):
        asked = () if given_calibration is None else ("--calibration", given_calibration)
        code, out, err = moeplan(*run, "--num-requests", "60", "--json", *asked)
        assert code == 0, err
        found.append(json.loads(out))
    off, none, shipped = ({name: facts[name] for name in ("ttft_s", "tpot_s", "e2e_s")} for facts in found)
    assert off == none
    assert shipped["ttft_s"]["mean"] > off["ttft_s"]["mean"] and shipped["tpot_s"]["mean"] > off["tpot_s"]["mean"]


def test_off_leaves_no_trace_in_steps() -> None:
    off = StepCost(V3, Layout(tp=8, ep=8), parse_cluster("h200-sxm:1x8"), replace(engine("vllm"), calibrations=OFF))
    neutral = StepCost(V3, Layout(tp=8, ep=8), parse_cluster("h200-sxm:1x8"), serving(NEUTRAL))
    for left, right in zip(three_steps(off, 16, 500, 1024), three_steps(neutral, 16, 500, 1024), strict=True):
        assert left.terms == right.terms
        assert not {"small_kernels", "prompt_launches"} & set(left.terms) and left.terms["host"] == 0


def test_coverage_is_about_tables() -> None:
    case = Case(load("mixtral-8x7b"), parse_layout("tp=2"), parse_cluster("h200-sxm:1x2"), engine("vllm"))
    slow = replace(case, engine=serving(Calibration(experts=3.0, layer_s=1e-3, step_s=1e-2)))
    assert coverage_facts(case) == coverage_facts(slow)
