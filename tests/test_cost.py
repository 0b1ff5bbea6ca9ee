"""Step times: composition, scaling laws that must hold, and the event-loop timer against the tables it flattens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost import StepCost
from planner.engine import Limits, engine
from planner.hardware import Cluster, parse_cluster
from planner.layout import Layout
from planner.model import ModelConfig, load
from planner.steptime import LENGTHS, SEQS, bilinear
from planner.timer import CostTimer

SYSTEMS = ("h200-sxm:1x8", "b200-sxm:1x8", "a100-80-sxm:1x8", "mi300x:1x8", "l40s:1x8")


@dataclass
class Rank:
    prefill_tokens: int = 0
    prefill_pairs: float = 0.0
    num_prefills: int = 0
    decode_seqs: int = 0
    decode_context_tokens: int = 0


def step(
    model: str, layout: Layout, cluster: str = "h200-sxm:1x8", backend: str = "allgather_reducescatter"
) -> StepCost:
    return StepCost(load(model), layout, parse_cluster(cluster), engine("vllm"), backend)


def test_breakdown_names_every_operation_and_origin_adds_up() -> None:
    times = step("deepseek-v3", Layout(attention_dp=8, ep=8)).decode(np.array([1.0, 64.0]), np.array(2048.0))
    assert {
        "experts",
        "dispatch",
        "combine",
        "shared_experts",
        "router",
        "dense_ffn",
        "lm_head",
        "sampling",
        "norms",
    } <= set(times.terms)
    assert {"attention", "attention_module"} & set(times.terms)
    assert np.sum(list(times.origin.values()), axis=0) == pytest.approx(times.total_s)
    assert sum(times.origin_share().values()) == pytest.approx(1.0)


def test_tensor_parallel_reduces_and_data_parallel_exchanges() -> None:
    tensor = step("mixtral-8x7b", Layout(tp=8, ep=8)).decode(np.array([32.0]), np.array(1024.0)).terms
    data = step("mixtral-8x7b", Layout(attention_dp=8, ep=8)).decode(np.array([32.0]), np.array(1024.0)).terms
    assert "all_reduce" in tensor and "dispatch" not in tensor
    assert "dispatch" in data and "all_reduce" not in data


@pytest.mark.parametrize("cluster", SYSTEMS)
@pytest.mark.parametrize("model", ["mixtral-8x7b", "deepseek-v3", "qwen3-235b-a22b", "gpt-oss-120b", "llama-2-70b"])
def test_longer_and_larger_steps_never_take_less(model: str, cluster: str) -> None:
    cost = step(model, Layout(tp=8, moe_tp=8), cluster)
    batch = cost.decode(np.array([1.0, 8, 64, 256]), np.array(2048.0)).total_s
    context = cost.decode(np.array(32.0), np.array([256.0, 2048, 16384, 65536])).total_s
    prompt = cost.prefill(np.array([128.0, 1024, 8192])).total_s
    for seconds in (batch, context, prompt):
        assert np.all(np.diff(seconds) >= -1e-3 * seconds[:-1]), seconds
        assert np.all(np.isfinite(seconds)) and np.all(seconds > 0)


def test_never_faster_than_reading_the_active_weights() -> None:
    model = load("mixtral-8x7b")
    for name in SYSTEMS:
        cluster = parse_cluster(name)
        seconds = (
            step("mixtral-8x7b", Layout(tp=8, moe_tp=8), name).decode(np.array([256.0]), np.array(128.0)).total_s[0]
        )
        assert seconds >= 0.95 * model.weight_bytes / 8 / cluster.system.gpu.hbm_bytes_per_s


def test_a_faster_gpu_is_faster_on_rooflines() -> None:
    slow = parse_cluster("mi300x:1x8")
    gpu = slow.system.gpu
    fast_gpu = replace(
        gpu,
        hbm_bytes_per_s=2 * gpu.hbm_bytes_per_s,
        flop_per_s=tuple((f, 2 * v) for f, v in gpu.flop_per_s),
        matmul_flop_per_s=tuple((f, 2 * v) for f, v in gpu.matmul_flop_per_s),
    )
    fast = Cluster(replace(slow.system, gpu=fast_gpu), 1, 8)
    model, layout = load("mixtral-8x7b"), Layout(tp=8, moe_tp=8)
    times = [
        StepCost(model, layout, cluster, engine("vllm")).decode(np.array([1.0, 64, 512]), np.array(4096.0)).total_s
        for cluster in (slow, fast)
    ]
    assert np.all(times[1] < times[0])


def test_skew_enters_through_the_busiest_rank_only() -> None:
    model = load("deepseek-v3")
    cluster, layout = parse_cluster("h200-sxm:4x8"), Layout(attention_dp=32, ep=32)
    costs = {s: StepCost(model, layout, cluster, engine("vllm"), "deepep", s) for s in ("uniform", "single-domain")}
    flat, hot = (costs[s].prefill(np.array([4096.0])).terms for s in ("uniform", "single-domain"))
    assert hot["experts"][0] > 1.3 * flat["experts"][0]
    assert hot["dispatch"][0] > flat["dispatch"][0]
    for label in set(flat) - {"experts", "dispatch", "combine"}:
        assert hot[label] == pytest.approx(flat[label])


def test_encoder_decoder_prompts_pass_the_encoder() -> None:
    cost = step("google/switch-base-8", Layout(), "a100-80-sxm:1x1")
    assert cost.has_encoder
    assert "experts" in cost.prefill(np.array([512.0])).terms
    assert cost.decode(np.array([8.0]), np.array(512.0)).total_s[0] > 0


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.floats(1, 4096), st.floats(16, 2**20))
def test_bilinear_is_exact_for_bilinear_functions(x: float, y: float) -> None:
    values = 3 + 2 * SEQS[:, None] + 0.5 * LENGTHS[None, :] + 1e-3 * SEQS[:, None] * LENGTHS[None, :]
    expected = 3 + 2 * x + 0.5 * y + 1e-3 * x * y
    assert bilinear(np.array(x), np.array(y), values) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("layout", [Layout(tp=8, moe_tp=8), Layout(tp=8, ep=8), Layout(attention_dp=8, ep=8)])
@pytest.mark.parametrize("model", ["mixtral-8x7b", "qwen3-235b-a22b"])
def test_timer_agrees_with_the_tables(model: str, layout: Layout) -> None:
    cost = step(model, layout)
    timer = CostTimer(cost, Limits(256, 8192))
    dp = layout.attention_dp
    for seqs, context in ((1, 500), (16, 2000), (200, 1000)):
        ranks = [Rank(decode_seqs=seqs, decode_context_tokens=seqs * context) for _ in range(dp)]
        expected = cost.decode(np.array(float(seqs)), np.array(float(context))).total_s
        assert timer.step_s(ranks) == pytest.approx(float(expected), rel=0.03)
    tokens = 2048
    ranks = [Rank(tokens, tokens * (tokens + 1) / 2, 1) for _ in range(dp)]
    assert timer.step_s(ranks) == pytest.approx(float(cost.prefill(np.array(float(tokens))).total_s), rel=0.03)


def test_a_group_waits_for_its_slowest_rank() -> None:
    timer = CostTimer(step("deepseek-v3", Layout(attention_dp=8, ep=8)), Limits(256, 8192))
    light = [Rank(decode_seqs=4, decode_context_tokens=4000) for _ in range(8)]
    heavy = [*light[:7], Rank(decode_seqs=4, decode_context_tokens=400_000)]
    alone = [Rank() for _ in range(7)] + [Rank(decode_seqs=4, decode_context_tokens=400_000)]
    assert timer.step_s(heavy) > timer.step_s(light)
    assert timer.step_s(heavy) >= timer.step_s(alone)


def test_chunks_after_a_cached_prefix_cost_more() -> None:
    timer = CostTimer(step("mixtral-8x7b", Layout(tp=8, moe_tp=8)), Limits(256, 8192))
    first, later = Rank(2048, 2048 * 2049 / 2, 1), Rank(2048, 2048 * 2049 / 2 + 2048 * 30_000, 1)
    assert timer.step_s([later]) > 1.05 * timer.step_s([first])


def test_graph_padding_shows_in_pure_decode(mixtral: ModelConfig) -> None:
    timer = CostTimer(step("mixtral-8x7b", Layout(tp=8, moe_tp=8)), Limits(256, 8192))
    nine, sixteen = (timer._tokens[timer._pad[n]] for n in (9, 16))
    assert nine == sixteen
