"""Step times: composition, scaling laws that must hold, and the event-loop timer against the tables it flattens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.calibration import OFF
from planner.cost import StepCost
from planner.engine import Limits, engine
from planner.experts import ExpertSettings
from planner.hardware import Cluster, parse_cluster
from planner.inventory import reduced_rows
from planner.layout import Layout
from planner.loads import load_table
from planner.model import ModelConfig, load
from planner.routing import named_skew
from planner.steady import steady_state
from planner.steptime import LENGTHS, SEQS, bilinear
from planner.timer import CostTimer, step_timer
from planner.workload import load_workload

SYSTEMS = ("h200-sxm:1x8", "b200-sxm:1x8", "a100-80-sxm:1x8", "mi300x:1x8", "l40s:1x8")


@dataclass
class Rank:
    prefill_tokens: int = 0
    prefill_pairs: float = 0.0
    num_prefills: int = 0
    decode_seqs: int = 0
    decode_context_tokens: int = 0


def skewed(name: str) -> ExpertSettings:
    return ExpertSettings(skew=named_skew(name))


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
    costs = {
        s: StepCost(model, layout, cluster, engine("vllm"), "deepep", skewed(s)) for s in ("uniform", "single-domain")
    }
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
    fastest = step_timer(cost, Limits(256, 8192))
    for seqs, context in ((1, 500), (16, 2000), (200, 1000), (16, 1)):
        same = [Rank(decode_seqs=seqs, decode_context_tokens=seqs * context) for _ in range(dp)]
        for _ in range(2):  # the second call finds its row
            assert fastest.step_s(same) == pytest.approx(timer.step_s(same), rel=1e-12)
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


def flat(
    model: str, layout: Layout, cluster: str = "h200-sxm:1x8", backend: str = "allgather_reducescatter"
) -> StepCost:
    tables_only = replace(engine("vllm"), calibrations=OFF)
    return StepCost(load(model), layout, parse_cluster(cluster), tables_only, backend, skewed("uniform"))


def test_all_reduce_is_charged_twice_a_layer_at_the_tables_price() -> None:
    cost, tokens = flat("mixtral-8x7b", Layout(tp=8, moe_tp=8)), 256.0
    once = float(cost.tables.all_reduce(8).seconds(np.array(tokens * 4096 * 2)))
    assert float(cost.prefill(np.array(tokens)).terms["all_reduce"]) == pytest.approx(2 * 32 * once, rel=0.02)


def test_all_reduces_follow_the_layers_own_outputs() -> None:
    layers = {name: load(name).layers[-1] for name in ("longcat-flash-chat", "deepseek-v3", "switch-base-8")}
    tensor, data = Layout(tp=8, ep=8), Layout(tp=2, attention_dp=4, ep=8)
    assert len(reduced_rows(layers["longcat-flash-chat"], tensor)) == 5  # two attentions, two dense FFN, one MoE
    assert len(reduced_rows(layers["deepseek-v3"], tensor)) == 2
    assert len(reduced_rows(layers["deepseek-v3"], data)) == 2  # attention, and the shared expert beside dispatch
    assert len(reduced_rows(layers["switch-base-8"], tensor)) == 3  # self, cross, FFN


def test_exchange_bytes_are_those_of_the_group() -> None:
    tokens, layout = 512.0, Layout(attention_dp=8, ep=8)
    gathered = flat("mixtral-8x7b", layout)
    once = float(gathered.tables.all_gather(8).seconds(np.array(tokens * 8 * 4096 * 2)))
    assert float(gathered.prefill(np.array(tokens)).terms["dispatch"]) == pytest.approx(32 * once, rel=0.03)
    sent = flat("deepseek-v3", layout, backend="deepep")
    moe = sent.model.moe
    assert moe
    uneven = float(load_table(sent.routed.question(moe, "prefill")).max_over_mean(tokens * 8))
    seen = (1 - (1 - uneven / 8) ** 8) / (1 - (7 / 8) ** 8)  # of tokens with several experts there, one copy is sent
    per_gpu = tokens * seen
    once = float(sent.tables.dispatch("normal", 8, 1, 7168, 8, 256, "fp8").seconds(np.array(per_gpu)))
    assert float(sent.prefill(np.array(tokens)).terms["dispatch"]) == pytest.approx(58 * once, rel=0.03)


def test_attention_heads_are_cut_over_tp() -> None:
    cost = flat("llama-2-70b", Layout(tp=8, moe_tp=8))
    once = float(cost.tables.decode_attention(8, 1, 128, "bf16").seconds(np.array(32.0), np.array(4096.0)))
    assert float(cost.decode(np.array(32.0), np.array(4096.0)).terms["attention"]) == pytest.approx(80 * once, rel=0.05)


def test_a_chunk_after_a_prefix_costs_its_pairs() -> None:
    cost = flat("llama-2-70b", Layout(tp=8, moe_tp=8))
    whole, half = (float(cost.prefill(np.array(n)).terms["attention"]) for n in (32768.0, 16384.0))
    later = float(cost.prefill(np.array(16384.0), 16384.0).terms["attention"])
    assert half + later == pytest.approx(whole, rel=0.1)


def test_pipelines_pay_hops() -> None:
    plain, piped = (flat("mixtral-8x7b", Layout(tp=4, pp=pp, moe_tp=4)) for pp in (1, 2))
    assert "pipeline_hops" not in plain.token_table.terms
    hop = float(piped.prefill(np.array(8192.0)).terms["pipeline_hops"])
    assert hop >= 8192 * 4096 * 2 / 450e9


def test_tokens_of_a_large_group_never_stop_costing() -> None:
    cost = StepCost(
        load("deepseek-v3"), Layout(attention_dp=128, ep=128), parse_cluster("h200-sxm:16x8"), engine("vllm")
    )
    experts = cost.prefill(np.array([8192.0, 16384.0])).terms["experts"]
    assert experts[1] > 1.5 * experts[0]


def test_other_mla_models_pay_their_own_projections() -> None:
    lite, large = (
        step(name, Layout()).decode(np.array(1.0), np.array(2048.0)).terms
        for name in ("deepseek-v2-lite", "deepseek-v3")
    )
    assert "attention_module" not in lite and "attention_projections" in lite
    assert "attention_module" in large and "attention_projections" not in large
    assert lite["attention"] + lite["attention_projections"] < 0.5 * large["attention_module"]


def test_identity_experts_cost_nothing() -> None:
    longcat = load("longcat-flash-chat")
    assert longcat.moe and longcat.moe.active_experts == 8
    eight = replace(longcat.moe, top_k=8, identity_experts=0)
    layers = tuple(replace(x, ffns=tuple(eight if f == longcat.moe else f for f in x.ffns)) for x in longcat.layers)
    costs = [
        StepCost(m, Layout(attention_dp=16, ep=16), parse_cluster("h200-sxm:2x8"), engine("vllm"), "deepep")
        for m in (longcat, replace(longcat, layers=layers))
    ]
    times = [c.prefill(np.array(4096.0)).terms for c in costs]
    assert times[0]["experts"] == pytest.approx(times[1]["experts"])
    assert times[0]["dispatch"] == pytest.approx(times[1]["dispatch"])


def test_a_chunk_on_any_rank_drags_the_group_l5() -> None:
    """Prompts on q = 1 % of steps and rank delay 1 - (1 - q)^R of the steps of R ranks (handbook L5: 27.5 % of 32)."""
    demand = load_workload("fixed:4000/1600", rate=1, num_requests=10)
    cost = flat("deepseek-v3", Layout(attention_dp=32, ep=32), "h200-sxm:4x8")
    steady = steady_state(cost, 8192, "mixed", demand)
    batch = 16.0  # 16 prompts of one chunk per 1,600 tokens: q = 1 %
    drag = 1 - (1 - 0.01) ** 32
    assert drag == pytest.approx(0.275, abs=5e-4)
    ranks, context = 32 * 0.01 / drag, 4800.0
    args = (np.array(4000.0), np.array(0.0), np.array(ranks), np.array(batch), np.array(context))
    expected = drag * cost.mixed(*args).total_s + (1 - drag) * cost.decode(args[3], args[4]).total_s
    assert float(steady.tpot_at(np.array(batch))) == pytest.approx(float(expected), rel=0.05)


def test_a_mixed_step_is_longer_than_either_part() -> None:
    cost = flat("deepseek-v3", Layout(attention_dp=8, ep=8))
    tokens, seqs, context = np.array(512.0), np.array(64.0), np.array(2048.0)
    mixed = cost.mixed(tokens, np.array(0.0), np.array(1.0), seqs, context).total_s
    assert mixed > cost.decode(seqs, context).total_s
    assert mixed > cost.prefill(tokens, 0.0, 1.0).total_s


def test_expert_weights_are_not_read_faster_than_the_memory_allows() -> None:
    """The L40S table was timed with Mixtral's weights in a 96 MB cache; a server reads them from memory."""
    cost = StepCost(load("mixtral-8x7b"), Layout(tp=8, moe_tp=8), parse_cluster("l40s:1x8"), engine("vllm"))
    gpu = cost.cluster.system.gpu
    slice_bytes = 3 * 4096 * 14336 * 2 / 8
    assert float(cost.decode(np.array(1.0), np.array(1024.0)).terms["experts"]) >= (
        32 * 2 * slice_bytes / gpu.hbm_bytes_per_s * 0.999
    )
