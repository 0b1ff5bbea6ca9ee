"""Attention-FFN disaggregation: the numbers of the Step-3 report, the balance of stages, signs, the command."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from planner.disaggregation.attention_ffn import (
    STAGES,
    AttentionFfn,
    at_other_ratio,
    plan_attention_ffn,
    roofline_batch,
    sparsity_floor,
    tok_per_s_per_gpu,
)
from planner.disaggregation.unitcosts import UnitPrice, token_counts
from planner.engine import engine
from planner.errors import DoesNotFit, InputError
from planner.hardware import parse_cluster
from planner.layout import Layout
from planner.model import ModelConfig, load
from planner.model.precision import override

H800 = UnitPrice.of(2.0, 1.98e15, 3.35e12)
H20 = UnitPrice.of(0.8, 2.96e14, 4.0e12)
"""Table 4 of the Step-3 report: 2 and 0.8 dollars per GPU-hour (handbook serving 10.1), rates of 6.1."""


@pytest.fixture(scope="module")
def step3() -> ModelConfig:
    """Step-3 as its report serves it: 8 bits everywhere."""
    return override(load("stepfun-ai/step3"), experts="fp8", attention="fp8", dense="fp8", kv="fp8")


# --- S1 to S7 of the handbook ----------------------------------------------------------------------------------------


def test_s1_counts_of_deepseek_v3_at_8k(deepseek):
    counts = token_counts(deepseek, 8192)
    assert counts.kv_bytes == 576 * 61 * 8192 == pytest.approx(2.88e8, rel=1e-3)
    assert counts.attention_flop == 2 * 61 * 8192 * 128 * 1152 == pytest.approx(1.47e11, rel=3e-3)
    assert counts.ffn_flop == 2 * (9 * 3 * 7168 * 2048 * 58 + 3 * 3 * 7168 * 18432)
    assert counts.ffn_flop == pytest.approx(4.836e10, rel=1e-4)


def test_s2_caches_at_32k(deepseek):
    assert token_counts(deepseek, 32768).kv_bytes == 576 * 61 * 32768
    assert token_counts(load("Qwen/Qwen3-235B-A22B"), 32768).kv_bytes == 94 * 2 * 4 * 128 * 32768


def test_s3_deepseek_v3_on_h800_costs_at_least_7_cents(deepseek):
    counts = token_counts(deepseek, 8192)
    assert H800.attention_usd_per_mtok(counts) == pytest.approx(0.0542, rel=3e-3)
    assert H800.ffn_usd_per_mtok(counts) == pytest.approx(0.0136, rel=3e-3)
    assert H800.attention_usd_per_mtok(counts) + H800.ffn_usd_per_mtok(counts) == pytest.approx(0.068, rel=5e-3)


def test_s4_step3_attends_cheaper_on_h20(step3):
    counts = token_counts(step3, 8192)
    attention = H20.attention_usd_per_mtok(counts), H800.attention_usd_per_mtok(counts)
    assert attention == (pytest.approx(0.0401, rel=3e-3), pytest.approx(0.0483, rel=3e-3))
    assert H800.ffn_usd_per_mtok(counts) == pytest.approx(0.0150, abs=5e-5)
    assert min(attention) + H800.ffn_usd_per_mtok(counts) == pytest.approx(0.055, rel=5e-3)


@pytest.mark.parametrize(
    ("flop", "hbm", "net", "floor"),
    [(1.979e15, 3.35e12, 400e9, 0.0582), (2.96e14, 4.0e12, 400e9, 0.0073), (3.12e14, 2.0e12, 200e9, 0.0307)],
)
def test_s5_sparsity_floors_of_h800_h20_a800(flop: float, hbm: float, net: float, floor: float) -> None:
    assert sparsity_floor(7168, 61, flop, hbm, net, 0.0166) == pytest.approx(floor, rel=6e-3)


def test_s6_throughput_at_other_ratios():
    assert at_other_ratio(4039, 4, 6) == pytest.approx(2693, abs=0.5)
    assert at_other_ratio(4039, 4, 18) == pytest.approx(898, abs=0.5)


def test_s7_tokens_in_flight_and_time_per_token():
    assert tok_per_s_per_gpu(6144, 32, 47.5e-3) == pytest.approx(4039, rel=1e-3)
    assert tok_per_s_per_gpu(6144, 32, 6144 / (32 * 4039)) == pytest.approx(4039)


def test_roofline_batch_is_the_ridge_over_the_sparsity():
    assert roofline_batch(8 / 256, 1.979e15, 3.35e12) * 8 / 256 == pytest.approx(295, abs=0.5)


# --- sizing ----------------------------------------------------------------------------------------------------------


def test_stages_keep_a_third_and_add_up(step3):
    answer = plan_attention_ffn(step3, parse_cluster("h800-sxm:4x8"), engine("vllm"), 4096, 0.05)
    for point in answer.points:
        stages = (point.attention_s, point.network_s, point.ffn_s)
        assert max(stages) <= 0.05 / STAGES + 1e-12
        assert point.tpot_s == pytest.approx(max(sum(stages), STAGES * max(stages)))
        in_flight = STAGES * point.ffn_batch
        assert point.output_tok_per_s_per_gpu == pytest.approx(tok_per_s_per_gpu(in_flight, 32, point.tpot_s))
        assert STAGES * point.batch * 4096 <= point.kv_tokens_per_rank
        assert point.num_gpus == 32
    rates = [point.output_tok_per_s_per_gpu for point in answer.points]
    assert rates == sorted(rates, reverse=True)


def test_too_few_attention_gpus_lose_against_plain_expert_parallelism_and_enough_win(step3):
    answer = plan_attention_ffn(step3, parse_cluster("h800-sxm:4x8"), engine("vllm"), 4096, 0.05)
    by_attention = {point.attention_gpus: point.output_tok_per_s_per_gpu for point in answer.points}
    plain = answer.plain.output_tok_per_s_per_gpu
    assert by_attention[8] < plain < by_attention[16]
    assert answer.best.attention_gpus == answer.best.ffn_gpus == 16  # the report's 2A2F


def test_longer_contexts_want_more_attention_gpus(step3):
    def share(context: int, nodes: int) -> float:
        answer = plan_attention_ffn(step3, parse_cluster(f"h800-sxm:{nodes}x8"), engine("vllm"), context, 0.05)
        return answer.best.attention_gpus / answer.best.num_gpus

    assert share(4096, 4) == 0.5 and share(8192, 6) == pytest.approx(2 / 3)  # 2A2F and 4A2F of the report


def test_deepseek_v3_is_too_sparse_for_h800(deepseek):
    model = override(deepseek, kv="fp8")
    answer = plan_attention_ffn(model, parse_cluster("h800-sxm:4x8"), engine("vllm"), 4096, 0.05)
    assert answer.sparsity == 8 / 256 < answer.sparsity_floor == pytest.approx(0.058, abs=5e-4)
    assert answer.gain < 0 and answer.best.ffn_batch < answer.roofline_batch


def test_network_time_falls_with_gpus_on_the_narrow_side_and_with_bandwidth(deepseek):
    profile, tokens = engine("vllm"), np.array([1000.0])
    ib = AttentionFfn(deepseek, parse_cluster("h100-sxm:8x8"), profile, 4096)
    rack = AttentionFfn(deepseek, parse_cluster("gb200-nvl72:16x4"), profile, 4096)
    narrow, wide = ib.network_s(48, 8, tokens), ib.network_s(32, 32, tokens)
    assert ib.network_s(48, 8, tokens) > ib.network_s(48, 8, tokens / 2)
    assert narrow > ib.network_s(48, 16, tokens) and rack.network_s(32, 32, tokens) < wide


def test_attention_gpus_hold_no_experts(deepseek):
    sizing = AttentionFfn(deepseek, parse_cluster("h100-sxm:4x8"), engine("vllm"), 4096)
    room = sizing.kv_tokens(1, 256) * deepseek.kv_bytes_per_token
    assert 40e9 < room < 78e9
    assert not sizing.ffn_fits(Layout(ep=8, attention_dp=8), 1000.0)  # 653 GB of experts on 8 GPUs
    assert sizing.ffn_fits(Layout(ep=16, attention_dp=16), 1000.0)


def test_impossible_questions(mixtral):
    node = parse_cluster("h100-sxm:1x8")
    with pytest.raises(DoesNotFit, match="1 ms per token"):
        plan_attention_ffn(mixtral, node, engine("vllm"), 4096, 0.001)
    with pytest.raises(InputError, match="--context 100000: 1 to 32,768"):
        plan_attention_ffn(mixtral, node, engine("vllm"), 100_000, 0.05)
    with pytest.raises(InputError, match="has one GPU"):
        plan_attention_ffn(mixtral, parse_cluster("h100-sxm:1x1"), engine("vllm"), 4096, 0.05)
    with pytest.raises(InputError, match="encoder-decoder"):
        plan_attention_ffn(load("google/switch-base-8"), node, engine("vllm"), 128, 0.05)


# --- command ---------------------------------------------------------------------------------------------------------


def test_afd_says_how_many_of_each_and_whether_it_pays(moeplan: Any) -> None:
    question = ("afd", "stepfun-ai/step3", "--cluster", "h800-sxm:4x8", "--weights", "fp8", "--kv", "fp8")
    code, out, _ = moeplan(*question, "--context", "4096", "--tpot", "50ms")
    assert code == 0 and out.startswith("16 attention + 16 feed-forward GPUs of h800-sxm:4x8")
    assert "more than tp1 dp16 ep16 without the split" in out and "compute-bound from 4,726 tokens" in out
    code, out, _ = moeplan(*question, "--json")
    facts = json.loads(out)
    assert facts["best"]["attention_gpus"] == 16 and facts["gain"] > 0 and facts["sparsity"] == 0.0625
    assert facts["cost_floor"]["kv_bytes"] == 61 * 512 * 4096


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--tpot", "50"), 2, "--tpot 50: a positive time with its unit"),
        (("--context", "0"), 2, "--context 0"),
        (("--tpot", "100us"), 3, "0.1 ms per token"),
    ],
)
def test_afd_messages(moeplan: Any, options: tuple[str, ...], code: int, message: str) -> None:
    found, _, err = moeplan("afd", "mixtral-8x7b", "--cluster", "h100-sxm:1x8", *options)
    assert found == code and message in err
