"""Speculative decoding: tokens per step, acceptance, the drafter as a model, and what verifying and drafting cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.calibration import OFF
from planner.cost import StepCost
from planner.engine import Limits, engine
from planner.hardware import parse_cluster
from planner.layout import Layout
from planner.memory import Ledger
from planner.model import load
from planner.model.catalog import catalog
from planner.scheduler import RankWork
from planner.speculation import (
    AcceptanceWalk,
    Speculation,
    constant_acceptance,
    expected_tokens,
    mtp_model,
    parse_speculation,
)
from planner.steady import steady_state
from planner.tacticcost import step_cost
from planner.tactics import PLAIN, Tactics, parse_tactics
from planner.tactictimer import tactic_timer
from planner.workload import load_workload

V3 = load("deepseek-v3")
TEP = Layout(tp=8, ep=8)
CONTEXT = np.array(2048.0)
SHARES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6)


def cost(model: str, layout: Layout, speculative: str | None, acceptance: str | None = None, **given: Any) -> StepCost:
    chosen = load(model)
    serving = replace(engine(given.get("name", "vllm")), calibrations=given.get("calibrations"))
    tactics = parse_tactics(speculative, acceptance, None, chosen, serving)
    where = parse_cluster(given.get("cluster", "h200-sxm:1x8"))
    return step_cost(chosen, layout, where, serving, given.get("backend", "all_reduce"), tactics=tactics)


# --- tokens per step ---


@pytest.mark.parametrize(
    ("acceptance", "expected"),
    [((0.85,), 1.85), ((0.9,), 1.9), ((0.8,) * 3, 2.952), ((0.5, 0.2), 1.6), ((0.0,) * 4, 1)],
)
def test_tokens_per_step(acceptance: tuple[float, ...], expected: float) -> None:
    """Handbook serving 2.8 and 10.2, Q3."""
    assert Speculation("ngram", acceptance, "").tokens_per_step == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, derandomize=True)
@given(SHARES)
def test_tokens_per_step_lie_between_one_and_all(acceptance: list[float]) -> None:
    assert 1.0 <= expected_tokens(acceptance) <= len(acceptance) + 1
    assert expected_tokens(acceptance) >= expected_tokens(acceptance[:-1])


@settings(deadline=None, derandomize=True)
@given(st.floats(0.0, 1.0), st.integers(1, 8))
def test_a_constant_acceptance_is_found_again(share: float, count: int) -> None:
    """And the closed form (1 - a^(n+1)) / (1 - a) holds."""
    tokens = expected_tokens([share] * count)
    assert constant_acceptance(tokens, count) == pytest.approx(share, abs=1e-6)
    if share < 0.999:
        assert tokens == pytest.approx((1 - share ** (count + 1)) / (1 - share), rel=1e-9)


@pytest.mark.parametrize(("drafts", "published"), [(1, 1.85), (2, 2.18), (3, 2.44)])
def test_mtp_assumes_the_published_accept_length(drafts: int, published: float) -> None:
    found = parse_speculation(f"mtp:{drafts}", None, V3)
    assert found is not None and found.is_assumed
    assert found.tokens_per_step == pytest.approx(published, abs=1e-3)
    assert "SGLang" in found.source or "DeepSeek" in found.source


def test_a_list_of_acceptances_is_taken_as_it_is() -> None:
    found = parse_speculation("mtp:3", "0.85,0.7,0.6", V3)
    assert found is not None and found.acceptance == (0.85, 0.7, 0.6)
    assert found.tokens_per_step == pytest.approx(1 + 0.85 + 0.85 * 0.7 + 0.85 * 0.7 * 0.6)
    assert (found.source, found.is_assumed) == ("given", False)


@pytest.mark.parametrize("acceptance", [(0.85,), (0.8, 0.8, 0.8), (0.9, 0.3), (0.0,), (1.0, 1.0)])
def test_the_walk_takes_as_many_steps_as_the_acceptance_says(acceptance: tuple[float, ...]) -> None:
    """Wald: E[steps] x A is the tokens wanted plus the overshoot of the last step, at most the drafts."""
    walk, wanted = AcceptanceWalk(acceptance, 3), 200
    steps = np.array([walk.steps(wanted) for _ in range(4000)])
    made = steps.mean() * expected_tokens(acceptance)
    error = 4 * steps.std() / np.sqrt(len(steps)) * expected_tokens(acceptance) + 1e-9
    assert wanted - error <= made <= wanted + len(acceptance) + error
    assert AcceptanceWalk(acceptance, 3).steps(1) == 1


def test_the_walk_repeats_with_its_seed_and_goes_on_beyond_its_first_stretch() -> None:
    long = [AcceptanceWalk((0.5,), seed).steps(500_000) for seed in (1, 1, 2)]
    assert long[0] == long[1] != long[2]
    assert long[0] == pytest.approx(500_000 / 1.5, rel=0.01)


# --- the drafter as a model ---


def test_the_mtp_module_of_deepseek_is_a_layer_of_its_own() -> None:
    """Handbook models.md 3: MoE layer 11,507,286,016 parameters, the projection 2 h^2 and three norms."""
    draft = mtp_model(V3)
    assert sum(w.params for w in draft.layers[0].weights) == 11_507_286_016 + 2 * 7168**2 + 3 * 7168
    assert draft.kv_bytes_per_token == (512 + 64) * 2
    assert draft.moe == V3.moe and draft.num_layers == 1
    assert draft.params_by_part()["lm_head"] == V3.params_by_part()["lm_head"]


def test_every_bundled_mtp_module_is_a_model() -> None:
    seen = 0
    for name in catalog():
        model = load(name)
        if not model.mtp:
            continue
        draft = mtp_model(model)
        own = sum(w.params for w in model.mtp if w.part not in ("embedding", "lm_head"))
        assert sum(w.params for w in draft.layers[0].weights) == own, name
        assert draft.kv_bytes_per_token > 0, name
        seen += 1
    assert seen > 20


def test_the_drafter_follows_the_precision_of_the_variant() -> None:
    found = parse_speculation("mtp:1", None, V3)
    assert found is not None and found.serving(V3) is found
    fp8 = found.serving(replace(V3, kv_format="fp8"))
    assert fp8.draft is not None and fp8.draft.kv_format == "fp8"


# --- memory ---


def test_the_ledger_holds_the_mtp_layer_and_its_cache() -> None:
    limits = Limits(64, 8192)
    for layout, share in ((Layout(tp=8, ep=8), 8), (Layout(attention_dp=8, ep=8), 8)):
        plain, drafting = (
            Ledger(V3, parse_cluster("h200-sxm:1x8").system, engine("vllm"), tactics).use(
                layout, limits, "all_reduce", 4096
            )
            for tactics in (PLAIN, Tactics(parse_speculation("mtp:1", None, V3)))
        )
        assert "draft" not in plain.terms and drafting.fits
        # 256 FP8 experts of 44.04M parameters with their scales over 8 GPUs; attention and the rest come on top.
        assert drafting.terms["draft"] > 256 * 44_040_192 / share
        assert drafting.terms["draft"] < 0.5 * V3.mtp_bytes
        assert drafting.kv_bytes_per_token == pytest.approx(plain.kv_bytes_per_token * 62 / 61)
        assert drafting.terms["draft_kv_cache"] == pytest.approx(drafting.terms["kv_cache"] / 61)
        assert sum(drafting.terms.values()) == pytest.approx(drafting.capacity_bytes)
        assert drafting.kv_tokens < plain.kv_tokens


def test_one_gpu_holds_the_whole_module_less_shared_vocabularies() -> None:
    tactics = Tactics(parse_speculation("mtp:1", None, V3))
    use = Ledger(V3, parse_cluster("h200-sxm:1x8").system, engine("vllm"), tactics).use(
        Layout(), Limits(8, 2048), "", 4096
    )
    vocabularies = 2 * 2 * 129_280 * 7168
    # Router biases are buffers, which the ledger of layers leaves out.
    assert use.terms["draft"] == pytest.approx(V3.mtp_bytes - vocabularies - 4 * 256, rel=1e-6)


def test_a_draft_model_brings_weights_and_cache() -> None:
    target, draft = load("qwen3-235b-a22b"), load("qwen3-30b-a3b")
    tactics = Tactics(parse_speculation("draft:qwen3-30b-a3b:4", "0.7", target))
    system = parse_cluster("h200-sxm:1x8").system
    plain, drafting = (
        Ledger(target, system, engine("vllm"), t).use(TEP, Limits(64, 8192), "all_reduce", 4096)
        for t in (PLAIN, tactics)
    )
    assert drafting.terms["draft"] == pytest.approx(draft.weight_bytes / 8, rel=0.02)
    share = draft.kv_bytes_per_token / target.kv_bytes_per_token
    assert drafting.kv_bytes_per_token == pytest.approx(plain.kv_bytes_per_token * (1 + share))


def test_look_up_holds_nothing() -> None:
    tactics = Tactics(parse_speculation("ngram:2", "0.4", V3))
    use = Ledger(V3, parse_cluster("h200-sxm:1x8").system, engine("vllm"), tactics).use(TEP, Limits(64, 8192), "", 4096)
    assert not {"draft", "draft_kv_cache"} & set(use.terms)


def test_the_drafter_lies_on_the_last_stage() -> None:
    tactics = Tactics(parse_speculation("mtp:1", None, V3))
    system = parse_cluster("h200-sxm:2x8").system
    layout, limits = Layout(tp=8, ep=8, pp=2), Limits(64, 8192)
    plain, drafting = (
        Ledger(V3, system, engine("vllm"), t).use(layout, limits, "all_reduce", 4096) for t in (PLAIN, tactics)
    )
    assert drafting.terms["draft"] > 0 and drafting.kv_tokens < plain.kv_tokens


# --- time ---


def test_verifying_sends_every_draft_through_the_layers_but_reads_the_cache_once() -> None:
    plain, looked_up = (
        cost("qwen3-235b-a22b", TEP, s, a, calibrations=OFF) for s, a in ((None, None), ("ngram:3", "0.5"))
    )
    one, verified = plain.decode(np.array(16.0), CONTEXT), looked_up.decode(np.array(16.0), CONTEXT)
    four = plain.decode(np.array(64.0), CONTEXT)
    for term in set(four.terms) - {"attention", "host"}:
        assert verified.terms[term] == pytest.approx(four.terms[term], rel=1e-12), term
    assert one.terms["attention"] <= verified.terms["attention"] < 0.7 * four.terms["attention"]
    assert (
        verified.origin["measured"] + verified.origin["interpolated"]
        < four.origin["measured"] + four.origin["interpolated"]
    )


@pytest.mark.parametrize("name", ["vllm", "sglang"])
@pytest.mark.parametrize("seqs", [1.0, 16.0, 128.0])
def test_verifying_with_latent_attention_lies_between_one_row_and_rows_apart(name: str, seqs: float) -> None:
    """Absorbed MLA with 128 heads is near the ridge with one query row: several rows cost FLOP."""
    plain, looked_up = (cost("deepseek-v3", TEP, s, a, name=name) for s, a in ((None, None), ("ngram:3", "0.5")))
    one, apart = (plain.decode(np.array(n), np.array(16384.0)) for n in (seqs, 4 * seqs))
    verified = looked_up.decode(np.array(seqs), np.array(16384.0))
    label = "attention_module" if name == "vllm" else "attention"
    assert one.terms[label] <= verified.terms[label] * (1 + 1e-9)
    assert verified.terms[label] <= apart.terms[label] * (1 + 1e-9)


def test_padding_counts_tokens() -> None:
    """9 sequences of 2 tokens run the graph of 24, 12 of 2 too."""
    looked_up = cost("qwen3-235b-a22b", TEP, "ngram:1", "0.5")
    nine, twelve = (looked_up.decode(np.array(n), CONTEXT).terms["attention_projections"] for n in (9.0, 12.0))
    assert nine == twelve


def test_every_draft_costs_a_layer_and_a_head() -> None:
    plain = cost("deepseek-v3", TEP, None).decode(np.array(8.0), CONTEXT)
    steps = [cost("deepseek-v3", TEP, f"mtp:{n}", "0.8").decode(np.array(8.0), CONTEXT) for n in (1, 2, 3)]
    heads = [float(step.terms["draft_lm_head"]) for step in steps]
    assert heads == pytest.approx([heads[0], 2 * heads[0], 3 * heads[0]])
    assert heads[0] == pytest.approx(float(plain.terms["lm_head"] + plain.terms["sampling"]), rel=0.05)
    layers = [float(step.terms["draft"]) for step in steps]
    each = float(plain.total_s - plain.terms["lm_head"]) / 61
    assert all(0.5 * each < later - earlier < 2 * each for earlier, later in pairwise(layers))
    assert "draft" not in cost("deepseek-v3", TEP, "ngram:1", "0.5").decode(np.array(8.0), CONTEXT).terms


def test_a_draft_model_costs_about_its_own_steps() -> None:
    drafted = cost("qwen3-235b-a22b", TEP, "draft:qwen3-30b-a3b:3", "0.7").decode(np.array(8.0), CONTEXT)
    alone = cost("qwen3-30b-a3b", TEP, None).decode(np.array(8.0), CONTEXT)
    spent = float(drafted.terms["draft"] + drafted.terms["draft_lm_head"])
    assert 2.9 * float(alone.total_s) < spent < 4.5 * float(alone.total_s)


def test_prompts_pass_the_drafter_too() -> None:
    plain, drafting = (cost("deepseek-v3", TEP, s).prefill(np.array(4096.0)).total_s for s in (None, "mtp:1"))
    assert 1.005 < drafting / plain < 1.04


def test_speculation_pays_at_small_batches_and_fades_with_load() -> None:
    """SGLang, DeepSeek-V3 on H200: +60 % with 2 requests per rank, +14 % at 128 (lmsys.org blog 2025-07-17)."""
    layout, given = Layout(attention_dp=32, ep=32), {"cluster": "h200-sxm:4x8", "name": "sglang", "backend": "deepep"}
    plain, drafting = (cost("deepseek-v3", layout, s, **given) for s in (None, "mtp:1"))
    seqs = np.array([2.0, 8.0, 32.0, 128.0])
    gain = plain.decode(seqs, CONTEXT).total_s / drafting.decode(seqs, CONTEXT).total_s * drafting.tokens_per_step
    assert gain[0] > 1.4 and gain[0] < drafting.tokens_per_step
    assert np.all(np.diff(gain) < 0)
    assert 0.9 < gain[-1] < 1.25


@pytest.mark.parametrize("layout", [TEP, Layout(attention_dp=8, ep=8), Layout(tp=4, ep=4, pp=2)])
@pytest.mark.parametrize("speculative", ["mtp:1", "mtp:3"])
def test_the_timer_agrees_with_the_tables(layout: Layout, speculative: str) -> None:
    drafting = cost("deepseek-v3", layout, speculative)
    timer = tactic_timer(drafting, Limits(256, 8192))
    for seqs, context in ((1, 500), (16, 2000), (200, 1000)):
        ranks = [RankWork(decode_seqs=seqs, decode_context_tokens=seqs * context) for _ in range(layout.attention_dp)]
        seconds = np.mean([timer.step_s(ranks) for _ in range(200)])
        expected = drafting.decode(np.array(float(seqs)), np.array(float(context))).total_s
        assert seconds == pytest.approx(float(expected), rel=0.04)
    ranks = [RankWork(2048, 2048 * 2049 // 2, 1) for _ in range(layout.attention_dp)]
    seconds = np.mean([timer.step_s(ranks) for _ in range(200)])
    assert seconds == pytest.approx(float(drafting.prefill(np.array(2048.0)).total_s), rel=0.04)


def test_the_steady_state_counts_several_tokens_per_step() -> None:
    demand = load_workload("fixed:1024/256", rate=4.0)
    plain, drafting = (steady_state(cost("deepseek-v3", TEP, s), 8192, "mixed", demand) for s in (None, "mtp:1"))
    assert drafting.tpot_at(np.array(4.0)) < 0.75 * plain.tpot_at(np.array(4.0))
    assert drafting.capacity_per_s(np.array(16.0)) > 1.2 * plain.capacity_per_s(np.array(16.0))
    certain = cost("deepseek-v3", TEP, "mtp:1", "0")
    assert steady_state(certain, 8192, "mixed", demand).tpot_at(np.array(4.0)) > plain.tpot_at(np.array(4.0))


def test_without_tactics_nothing_changes() -> None:
    assert parse_tactics(None, None, None, V3, engine("vllm")) == PLAIN
    assert type(cost("deepseek-v3", TEP, None)) is StepCost
