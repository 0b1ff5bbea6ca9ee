"""The ledger against measured deployments and the handbook's numeric anchors."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.engine import Engine, Limits, engine
from planner.errors import InputError
from planner.fit import fit
from planner.hardware import Cluster, System, system
from planner.layout import Layout
from planner.memory import TERMS, Ledger, MemoryUse, low_latency_buffer_bytes
from planner.model import ModelConfig, load
from planner.model.precision import override

AG = "allgather_reducescatter"


def use(
    model: ModelConfig, name: str, layout: Layout, limits: Limits, profile: Engine, context: int = 4096
) -> MemoryUse:
    return Ledger(model, system(name), profile).use(layout, limits, AG, context)


@pytest.mark.parametrize(
    ("model", "gpu", "layout", "limits", "measured_tokens"),
    [
        # inference-sim/training@c4f03409 replay_data, vLLM 0.15.1, utilisation 0.9 (kv_blocks_total_gpu x 16)
        ("mixtral-8x7b", "h100-sxm", Layout(tp=2, moe_tp=2), Limits(128, 2048), 440_160),
        ("meta-llama/Llama-2-7b-hf", "h100-sxm", Layout(), Limits(128, 2048), 119_392),
        # casys-kaist/LLMServingSim@5daddb21 bench/examples RTX4090, vLLM 0.19.0, utilisation 0.9
        ("meta-llama/Llama-3.1-8B", "rtx-4090", Layout(), Limits(256, 2048), 41_408),
    ],
)
def test_kv_capacity_matches_measured_vllm(
    model: str, gpu: str, layout: Layout, limits: Limits, measured_tokens: int, vllm: Engine
) -> None:
    predicted = use(load(model), gpu, layout, limits, replace(vllm, kv_fraction=0.9)).kv_tokens
    assert predicted == pytest.approx(measured_tokens, rel=0.05)


def test_published_weights_per_gpu_w3(deepseek: ModelConfig, vllm: Engine) -> None:
    """EP32 with 9 routed experts and EP144 with 2 per GPU: 41.8 and 24 GB (handbook W3, DeepSeek's deployments)."""
    expert_bytes = 42 * 2**20 * 58
    ep32 = use(deepseek, "h200-sxm", Layout(attention_dp=32, ep=32), Limits(64, 2048), vllm).weight_bytes
    assert ep32 + expert_bytes == pytest.approx(41.8e9, rel=0.03)
    ep128 = use(deepseek, "h200-sxm", Layout(attention_dp=128, ep=128), Limits(64, 2048), vllm).weight_bytes
    assert ep128 == pytest.approx(24e9, rel=0.03)


def test_kv_tokens_k2(deepseek: ModelConfig) -> None:
    assert int((80e9 * 0.9 - 24e9 - 8e9) / deepseek.kv_bytes_per_token) == 569_216


def test_low_latency_buffer_b1() -> None:
    gib = [low_latency_buffer_bytes(t, 7168, e) / 2**30 for t, e in ((128, 256), (128, 288), (128, 320), (256, 288))]
    assert [round(v, 4) for v in gib] == [1.7773, 1.9995, 2.2217, 3.999]


def test_r1_does_not_fit_eight_h100(deepseek: ModelConfig, vllm: Engine) -> None:
    """8 x H100 R1 in FP8 runs out of memory, 16 is the floor (dynamo PR 8479, AIConfigurator PR 887)."""
    assert use(deepseek, "h100-sxm", Layout(tp=8, ep=8), Limits(256, 8192), vllm).breaking_term is not None
    assert use(deepseek, "h100-sxm", Layout(attention_dp=16, ep=16), Limits(256, 8192), vllm).fits


def test_offers_stop_where_there_is_no_network(deepseek: ModelConfig, vllm: Engine) -> None:
    """A card without a network on record cannot hold a model over several nodes (parse_cluster refuses them too)."""
    answer = fit(deepseek, system("rtx-4090"), vllm)
    assert not answer.fits
    with pytest.raises(InputError, match="up to 8 GPUs"):
        fit(deepseek, system("rtx-4090"), vllm, num_gpus=16)


def test_the_smallest_count_is_not_skipped(vllm: Engine) -> None:
    model = load("qwen3-coder-480b-a35b-instruct")
    smallest = fit(model, system("a100-80-sxm"), vllm).num_gpus
    for fewer in range(8, smallest, 8):
        assert not fit(model, system("a100-80-sxm"), vllm, num_gpus=fewer).fits


def test_encoder_decoder_tokens_are_cached_once(vllm: Engine) -> None:
    model = load("google/switch-base-128")
    used = use(model, "a100-80-sxm", Layout(), Limits(64, 2048), vllm)
    assert used.kv_bytes_per_token == pytest.approx(model.kv_bytes_per_token)


def test_tied_head_is_copied_to_the_last_stage(vllm: Engine) -> None:
    model = load("granite-3.1-1b-a400m-instruct")
    assert model.tied
    whole, piped = (use(model, "h100-sxm", Layout(pp=pp), Limits(64, 2048), vllm) for pp in (1, 2))
    assert piped.terms["embeddings"] == pytest.approx(whole.terms["embeddings"])
    assert piped.terms["experts"] == pytest.approx(whole.terms["experts"] / 2)


def test_recurrent_state_is_cut_over_tp(vllm: Engine) -> None:
    model = load("qwen3-next-80b-a3b-instruct")
    one, two = (use(model, "h200-sxm", Layout(tp=tp, moe_tp=tp), Limits(64, 2048), vllm, 256) for tp in (1, 2))
    assert two.kv_bytes_per_token == pytest.approx(one.kv_bytes_per_token / 2, rel=0.01)


def test_mla_cache_is_replicated_over_tp_and_gqa_is_cut(
    deepseek: ModelConfig, mixtral: ModelConfig, vllm: Engine
) -> None:
    limits = Limits(64, 2048)
    assert use(deepseek, "h200-sxm", Layout(tp=8, ep=8), limits, vllm).kv_bytes_per_token == pytest.approx(70_272)
    assert use(mixtral, "h200-sxm", Layout(tp=8, ep=8), limits, vllm).kv_bytes_per_token == pytest.approx(131_072 / 8)
    qwen = load("qwen3-235b-a22b")  # 4 KV heads: TP 8 keeps two copies
    assert use(qwen, "h200-sxm", Layout(tp=8, ep=8), limits, vllm).kv_bytes_per_token == pytest.approx(192_512 / 4)


def test_sliding_windows_stop_growing(vllm: Engine) -> None:
    model = load("gpt-oss-120b")
    short = use(model, "h100-sxm", Layout(tp=2, moe_tp=2), Limits(64, 2048), vllm, 128).kv_bytes_per_token
    long = use(model, "h100-sxm", Layout(tp=2, moe_tp=2), Limits(64, 2048), vllm, 131_072).kv_bytes_per_token
    assert short == pytest.approx(73_728 / 2)
    assert long == pytest.approx(36_864 / 2, rel=0.01)


@pytest.mark.parametrize("name", ["vllm", "sglang", "trtllm"])
def test_memory_rules_differ_as_documented(name: str, mixtral: ModelConfig) -> None:
    profile, limits, layout = engine(name), Limits(256, 8192), Layout(tp=2, moe_tp=2)
    ledger = use(mixtral, "h100-sxm", layout, limits, profile)
    free = ledger.capacity_bytes - sum(v for k, v in ledger.terms.items() if k not in ("kv_cache", "reserve"))
    if name == "vllm":
        assert ledger.terms["reserve"] == pytest.approx(0.08 * ledger.capacity_bytes)
    elif name == "trtllm":
        assert ledger.terms["kv_cache"] == pytest.approx(0.9 * free)
    else:
        reserve = (512 + 1.5 * 8192 + 2 / 8 * 1024 + 256 * 2) * 2**20
        expected = ledger.capacity_bytes - max(reserve, 10 * 2**30) - ledger.terms["context"] - ledger.weight_bytes
        assert ledger.terms["kv_cache"] == pytest.approx(expected)


LAYOUTS = st.sampled_from(
    [
        Layout(tp=8, ep=8),
        Layout(tp=8, moe_tp=8),
        Layout(attention_dp=8, ep=8),
        Layout(tp=4, pp=2, ep=4),
        Layout(8, 2, 8),
    ]
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(LAYOUTS, st.sampled_from([16, 64, 256]), st.sampled_from([2048, 8192]), st.sampled_from([256, 4096, 65536]))
def test_terms_sum_to_the_device_and_nothing_is_negative(layout: Layout, seqs: int, tokens: int, context: int) -> None:
    for name in ("vllm", "sglang", "trtllm"):
        ledger = use(load("deepseek-v3"), "h200-sxm", layout, Limits(seqs, tokens), engine(name), context)
        assert tuple(ledger.terms) == tuple(term for term in TERMS if not term.startswith("draft"))
        assert min(ledger.terms.values()) >= 0
        if ledger.fits:
            assert sum(ledger.terms.values()) == pytest.approx(ledger.capacity_bytes)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(LAYOUTS, st.floats(90e9, 300e9), st.floats(0, 50e9))
def test_more_memory_never_hurts(layout: Layout, small: float, extra: float) -> None:
    model, profile, chosen = load("deepseek-v3"), engine("vllm"), system("h200-sxm")

    def tokens(hbm_bytes: float) -> int:
        resized: System = replace(chosen, gpu=replace(chosen.gpu, hbm_bytes=hbm_bytes))
        return Ledger(model, resized, profile).use(layout, Limits(64, 2048), AG, 4096).kv_tokens

    assert tokens(small + extra) >= tokens(small)


def test_expert_precision_shows_in_the_experts_term(mixtral: ModelConfig, vllm: Engine, h200: Cluster) -> None:
    halved = override(mixtral, experts="fp8")
    before, after = (use(m, "h200-sxm", Layout(), Limits(64, 2048), vllm).terms["experts"] for m in (mixtral, halved))
    assert after == pytest.approx(before / 2, rel=1e-3)


def test_sglang_reserves_for_the_chunk_before_attention_dp_divides_it() -> None:
    ledger = Ledger(load("deepseek-v3"), system("h200-sxm"), engine("sglang"))
    tp, dp = Layout(tp=8, ep=8), Layout(attention_dp=8, ep=8)
    whole, part = Limits(64, 8192), Limits(64, 1024)
    both = [ledger.use(tp, whole, "all_reduce", 4096), ledger.use(dp, part, "allgather_reducescatter", 4096)]
    captured_bytes = 64 * 3 * 8 * 2**20
    assert both[0].budget_bytes - both[1].budget_bytes == pytest.approx(captured_bytes)
