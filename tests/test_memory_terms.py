"""The ledger term by term, each computed here a second time from the rule in its source."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest

from planner.engine import Engine, Limits, engine
from planner.hardware import System, system
from planner.layout import Layout
from planner.memory import TERMS, Ledger, kv_shards, low_latency_buffer_bytes, shards
from planner.model import ModelConfig, load
from planner.model.config import Attention
from planner.overlap import parse_overlap
from planner.tactics import PLAIN, Tactics, parse_tactics

AG = "allgather_reducescatter"
MIB, GIB = 2**20, 2**30


def ledger(model: ModelConfig, name: str = "vllm", gpu: str = "h200-sxm", tactics: Tactics = PLAIN) -> Ledger:
    return Ledger(model, system(gpu), engine(name), tactics)


def stage_weights(whole: Ledger, layout: Layout, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight bytes [stages, 4 terms] and cache bytes per token [stages]."""
    weights, per_token = whole._stage_weights(layout, context)
    return np.array(weights), np.array(per_token)


def of_size(profile: System, hbm_bytes: float) -> System:
    return replace(profile, gpu=replace(profile.gpu, hbm_bytes=hbm_bytes))


@pytest.mark.parametrize(("tp", "copies"), [(1, 10), (2, 6), (3, 6), (4, 5), (8, 5), (16, 5)])
def test_residual_copies_by_tp(tp: int, copies: int) -> None:
    """AIConfigurator's prior: 10, 6, 5, 5 copies of the residual stream at TP 1, 2, 4, 8."""
    dense = load("meta-llama/Llama-2-7b-hf")
    found = ledger(dense)._activation_bytes(Layout(tp=tp, moe_tp=tp), Limits(1, 8192))
    assert found == 2.0 * 8192 * 4096 * copies


def test_activations_hold_the_workspace_of_balanced_routing(mixtral: ModelConfig, deepseek: ModelConfig) -> None:
    stream = 2.0 * 8192 * 4096 * 6
    # 8,192 tokens x top-2 rows of inputs and outputs (4,096 each) and three slices of 14,336 / 2, in bf16.
    workspace = 2.0 * (8192 * 2) * (2 * 4096 + 3 * 14336 / 2)
    found = ledger(mixtral)._activation_bytes(Layout(tp=2, moe_tp=2), Limits(16, 8192))
    assert found == stream + workspace
    apart = ledger(mixtral)._activation_bytes(Layout(tp=2, ep=2), Limits(16, 8192))
    assert apart == stream + 2.0 * 8192 * (2 * 4096 + 3 * 14336)
    # Attention-DP 8: tokens of all ranks meet; the workspace is chunked at 16,384 tokens x top-8.
    many = ledger(deepseek)._activation_bytes(Layout(attention_dp=8, ep=4, moe_tp=2), Limits(16, 16384))
    rows = min(16384 * 8 * 8 / 4, 16384.0 * 8)
    assert rows == 16384 * 8
    assert many == 2.0 * 16384 * 7168 * 10 + 2.0 * rows * (2 * 7168 + 3 * 2048 / 2)


def test_the_sampler_may_need_more_than_the_layers(mixtral: ModelConfig) -> None:
    """20 bytes per logit of the sequences that are sampled at once, at most the tokens of a step."""
    dense = load("meta-llama/Llama-2-7b-hf")
    assert ledger(dense)._activation_bytes(Layout(), Limits(1024, 1024)) == 20.0 * 1024 * 32000
    assert ledger(dense)._activation_bytes(Layout(), Limits(4096, 512)) == 20.0 * 512 * 32000
    small = ledger(mixtral)._activation_bytes(Layout(tp=8, moe_tp=8), Limits(1024, 1024))
    assert small == max(20.0 * 1024 * 32000, 2.0 * 1024 * 4096 * 5 + 2.0 * 2048 * (2 * 4096 + 3 * 14336 / 8))


def test_half_batches_and_small_batches_need_less(mixtral: ModelConfig) -> None:
    layout, limits = Layout(tp=2, moe_tp=2), Limits(1, 8191)
    halves = Tactics(overlap=parse_overlap("tbo", engine("sglang")))
    assert halves.num_batches == 2
    alone = ledger(mixtral)._activation_bytes(layout, Limits(1, 4096))
    assert ledger(mixtral, tactics=halves)._activation_bytes(layout, limits) == alone
    for tokens, expected in ((512, 512), (16384, 8191)):
        chunked = Ledger(mixtral, system("h200-sxm"), replace(engine("vllm"), ubatch_tokens=tokens))
        same = ledger(mixtral)._activation_bytes(layout, Limits(1, expected))
        assert chunked._activation_bytes(layout, limits) == same


def sglang_reserve(model: ModelConfig, layout: Layout, limits: Limits, backend: str, gpu: str = "h200-sxm") -> float:
    return ledger(model, "sglang", gpu)._static_reserve(layout, limits, backend)


def test_sglang_reserve_by_hand(deepseek: ModelConfig) -> None:
    """512 MiB + 1.5 MiB per token of the chunk (at least 2,048) + 1 GiB per 8 GPUs + 2 MiB per captured sequence;
    attention-DP adds 3 MiB per sequence and rank, DeepEP 2 GiB; at least 10 GiB on devices above 60 GiB."""
    big = Limits(512, 8192)
    assert sglang_reserve(deepseek, Layout(tp=8, ep=8), big, AG) == (512 + 1.5 * 8192 + 1024 + 512 * 2) * MIB
    piped = sglang_reserve(deepseek, Layout(tp=8, ep=8, pp=2), big, AG)
    assert piped == (512 + 1.5 * 8192 + 2 * 1024 * 2 + 512 * 2) * MIB or piped > 10 * GIB
    parallel = sglang_reserve(deepseek, Layout(attention_dp=8, ep=8), big, AG)
    assert parallel == (512 + 1.5 * 8192 + 1024 + 512 * (2 + 3 * 8)) * MIB
    two = sglang_reserve(deepseek, Layout(tp=4, attention_dp=2, ep=8), Limits(2048, 8192), AG)
    assert two == (512 + 1.5 * 8192 + 1024 + 2048 * (2 + 3 * 2)) * MIB
    deepep = sglang_reserve(deepseek, Layout(attention_dp=8, ep=8), big, "deepep")
    assert deepep == parallel + 2048 * MIB
    small = Limits(16, 1024)
    assert sglang_reserve(deepseek, Layout(tp=8, ep=8), small, AG) == 10 * GIB
    on_l40s = sglang_reserve(load("qwen3-30b-a3b"), Layout(tp=2, ep=2), small, AG, "l40s")
    assert on_l40s == (512 + 1.5 * 2048 + 2 / 8 * 1024 + 16 * 2) * MIB < 10 * GIB


def test_stages_of_a_pipeline_count_in_sglangs_reserve(deepseek: ModelConfig) -> None:
    limits = Limits(512, 16384)
    one, two = (sglang_reserve(deepseek, Layout(tp=8, ep=8, pp=pp), limits, AG) for pp in (1, 2))
    assert two - one == 1024 * MIB


def test_a_fraction_that_is_stated_replaces_the_reserve(mixtral: ModelConfig) -> None:
    profile, gpu = engine("sglang"), system("h200-sxm")
    layout, limits = Layout(tp=2, moe_tp=2), Limits(64, 4096)
    stated = Ledger(mixtral, gpu, replace(profile, static_fraction=0.7)).use(layout, limits, AG, 4096)
    assert stated.budget_bytes == 0.7 * gpu.gpu.hbm_bytes
    asked = Ledger(mixtral, gpu, profile).use(layout, limits, AG, 4096)
    reserve = Ledger(mixtral, gpu, profile)._static_reserve(layout, limits, AG)
    assert asked.budget_bytes == gpu.gpu.hbm_bytes - reserve
    vllm = Ledger(mixtral, gpu, engine("vllm")).use(layout, limits, AG, 4096)
    assert vllm.budget_bytes == engine("vllm").kv_fraction * gpu.gpu.hbm_bytes
    trtllm = Ledger(mixtral, gpu, engine("trtllm")).use(layout, limits, AG, 4096)
    assert trtllm.budget_bytes == gpu.gpu.hbm_bytes


def test_buffers_and_graphs_by_hand(deepseek: ModelConfig, vllm: Engine) -> None:
    overheads, limits = vllm.overheads, Limits(64, 2048)
    terms = ledger(deepseek)._fixed(Layout(attention_dp=16, ep=16, redundant_experts=32), limits, "deepep")
    scales, hidden, experts = 4 * 7168 // 128, 7168, 256 + 32
    dispatch, combine = 16 + 2 * hidden, scales + 2 * hidden
    tokens = overheads.low_latency_tokens
    parts = max(tokens * dispatch, experts * tokens * combine), experts * tokens * max(dispatch, combine)
    signal = -(-4 * experts // 128) * 128
    buffer = -(-(2 * sum(parts) + 2 * signal) // 128) * 128
    assert terms["communication_buffers"] == overheads.nccl_bytes + overheads.deepep_normal_bytes + buffer
    assert terms["context"] == overheads.context_bytes
    assert terms["cuda_graphs"] == vllm.num_graphs(64, "sm90") * vllm.graphs.bytes_per_graph > 0
    plain = ledger(deepseek)._fixed(Layout(attention_dp=16, ep=16), limits, AG)
    assert plain["communication_buffers"] == overheads.nccl_bytes
    assert ledger(deepseek)._fixed(Layout(), limits, AG)["communication_buffers"] == 0.0
    assert ledger(deepseek)._fixed(Layout(pp=2), limits, AG)["communication_buffers"] == overheads.nccl_bytes
    together = ledger(deepseek)._fixed(Layout(tp=8, moe_tp=8), limits, "deepep")
    assert together["communication_buffers"] == overheads.nccl_bytes
    dense = ledger(load("meta-llama/Llama-2-7b-hf"))._fixed(Layout(tp=2, moe_tp=2), limits, "deepep")
    assert dense["communication_buffers"] == overheads.nccl_bytes


def test_low_latency_buffers_of_narrow_models_hold_dispatched_tokens() -> None:
    """Below 512 values a dispatched token with its 16 bytes of header is the larger message."""
    dispatch, combine, signal = 16 + 2 * 256, 4 * 256 // 128 + 2 * 256, 128
    assert dispatch > combine
    send, receive = 8 * 128 * combine, 8 * 128 * dispatch
    assert low_latency_buffer_bytes(128, 256, 8) == 2 * send + 2 * receive + 2 * signal
    lone = 2 * max(128 * dispatch, 128 * combine) + 2 * 128 * dispatch + 2 * signal
    assert low_latency_buffer_bytes(128, 256, 1) == lone


@pytest.mark.parametrize("name", ["vllm", "trtllm", "sglang"])
def test_the_first_term_beyond_the_budget_is_named(name: str, mixtral: ModelConfig) -> None:
    """Shrinking the device breaks one claimed term after the other, in their order, each at its own size."""
    layout, limits, profile = Layout(tp=2, moe_tp=2), Limits(64, 4096), replace(engine(name), static_fraction=0.9)
    whole = Ledger(mixtral, system("h200-sxm"), profile).use(layout, limits, AG, 4096)
    claimed = [t for t in TERMS[: TERMS.index("kv_cache")] if whole.terms.get(t) and _counts(name, t)]
    ends = list(accumulate(whole.terms[t] for t in claimed))
    for term, end in zip(claimed, ends, strict=True):
        for slack, expected in ((-1e6, term), (3e4, claimed[(claimed.index(term) + 1) % len(claimed)])):
            sized = of_size(system("h200-sxm"), (end + slack) / (whole.budget_bytes / whole.capacity_bytes))
            found = Ledger(mixtral, sized, profile).use(layout, limits, AG, 4096)
            last = term == claimed[-1] and slack > 0
            assert found.breaking_term == ("kv_cache" if last else expected)
            assert not found.fits and found.kv_tokens == 0


def _counts(name: str, term: str) -> bool:
    """SGLang's reserve holds everything but weights and context."""
    return name != "sglang" or term in ("experts", "attention", "dense", "embeddings", "context")


def test_one_block_of_cache_is_enough_and_one_token_less_is_not(mixtral: ModelConfig, vllm: Engine) -> None:
    layout, limits = Layout(tp=2, moe_tp=2), Limits(64, 4096)
    whole = Ledger(mixtral, system("h200-sxm"), vllm).use(layout, limits, AG, 4096)
    needed, per_token = whole.needed_bytes, whole.kv_bytes_per_token
    assert per_token == 131_072 / 2
    for tokens, kept in ((vllm.block_tokens + 0.5, vllm.block_tokens), (vllm.block_tokens - 0.5, 0)):
        size = (needed + tokens * per_token) / vllm.kv_fraction
        found = Ledger(mixtral, of_size(system("h200-sxm"), size), vllm).use(layout, limits, AG, 4096)
        assert (found.kv_tokens, found.fits) == (kept, kept > 0)
        assert found.breaking_term == (None if kept else "kv_cache")


def test_experts_elsewhere_leave_room(mixtral: ModelConfig, vllm: Engine) -> None:
    layout, limits = Layout(tp=2, moe_tp=2), Limits(64, 4096)
    whole, half = (ledger(mixtral).use(layout, limits, AG, 4096, share) for share in (1.0, 0.5))
    assert half.terms["experts"] == whole.terms["experts"] / 2
    assert half.terms["attention"] == whole.terms["attention"]
    gained = half.terms["kv_cache"] - whole.terms["kv_cache"]
    assert gained == pytest.approx(whole.terms["experts"] / 2)
    assert half.kv_tokens == int(half.terms["kv_cache"] / half.kv_bytes_per_token)


def test_a_drafter_lies_on_the_last_stage_only(deepseek: ModelConfig) -> None:
    """MTP shares embedding and head: its weights are one layer; its cache is one layer more on the last stage."""
    vllm = engine("vllm")
    tactics = parse_tactics("mtp:1", "0.8", None, deepseek, vllm)
    limits = Limits(64, 2048)
    for pp in (1, 2, 3):
        layout = Layout(tp=8, ep=8, pp=pp)
        plain, drafted = (ledger(deepseek, tactics=t).use(layout, limits, AG, 4096) for t in (PLAIN, tactics))
        assert tactics.speculation is not None and tactics.speculation.draft is not None
        alone = Ledger(tactics.speculation.draft, system("h200-sxm"), vllm)
        weights, per_token = stage_weights(alone, tactics.speculation.draft_layout(layout), 4096)
        held, own = float(weights[0, :3].sum()), float(per_token[0])
        stages, caches = stage_weights(ledger(deepseek), replace(layout, replicas=1), 4096)
        graphs = ledger(deepseek, tactics=tactics)._fixed(layout, limits, AG)
        free = [vllm.kv_fraction * 150_109_106_995 - float(w.sum()) - sum(graphs.values()) for w in stages]
        free[-1] -= held
        each = [float(c) + own * (n == pp - 1) for n, c in enumerate(caches)]
        tokens = [room / cost for room, cost in zip(free, each, strict=True)]
        stage = tokens.index(min(tokens))
        assert drafted.kv_tokens == int(min(tokens)) < plain.kv_tokens
        assert drafted.terms["draft"] == pytest.approx(held if stage == pp - 1 else 0.0)
        cached = min(tokens) * own if stage == pp - 1 else 0.0
        assert drafted.terms["draft_kv_cache"] == pytest.approx(cached)
        assert drafted.terms["kv_cache"] + cached == pytest.approx(free[stage])
        assert sum(drafted.terms.values()) == pytest.approx(150_109_106_995)


def test_a_draft_model_brings_its_own_head() -> None:
    target = load("llama-3.1-70b")
    tactics = parse_tactics("draft:llama-3.1-8b:4", "0.8", None, target, engine("vllm"))
    assert tactics.speculation is not None and tactics.speculation.draft is not None
    held, _ = ledger(target, tactics=tactics)._draft_bytes(Layout(tp=4, moe_tp=4), 4096)
    weights, _ = stage_weights(
        ledger(tactics.speculation.draft), tactics.speculation.draft_layout(Layout(tp=4, moe_tp=4)), 4096
    )
    assert held == pytest.approx(float(weights[0].sum()))


def test_recurrent_state_by_hand() -> None:
    """fp32 state and bf16 convolution, once per sequence, cut over TP; a copy per token that may be rolled back."""
    model = load("qwen3-next-80b-a3b-instruct")
    kinds = [layer for layer, _ in model.layer_kinds]
    recurrent = next(k for k in kinds if not any(isinstance(m, Attention) for m in k.mixers))
    mixer = recurrent.mixers[0]
    one = ledger(model)._layer_cache(recurrent, 2, 1000)
    assert one == (mixer.state_values * 4 + mixer.conv_values * 2) / 2 / 1000  # type: ignore[union-attr]


def test_windows_hold_no_more_than_the_window() -> None:
    model = load("gpt-oss-120b")
    windowed, whole = sorted((layer for layer, _ in model.layer_kinds), key=lambda k: k.mixers[0].window or 10**9)  # type: ignore[union-attr]
    attention = windowed.mixers[0]
    assert isinstance(attention, Attention) and attention.window
    per_token = ledger(model)._layer_cache(whole, 1, 4096)
    for context in (attention.window // 2, attention.window, 4 * attention.window):
        share = min(context, attention.window) / context
        assert ledger(model)._layer_cache(windowed, 1, context) == pytest.approx(per_token * share)


def test_shards_of_weights_and_caches(mixtral: ModelConfig, deepseek: ModelConfig) -> None:
    layer = mixtral.layers[0]
    by_kind = {weight.shard: shards(weight, layer, 16, 4, 2) for weight in layer.weights}
    assert by_kind["expert"] == 4 * 2
    assert by_kind["kv_column"] == 8  # as many as there are KV heads
    assert by_kind["replicated"] == 1
    assert {by_kind[kind] for kind in by_kind if kind in ("column", "row")} == {16}
    attention = layer.mixers[0]
    assert isinstance(attention, Attention)
    assert (kv_shards(attention, 4), kv_shards(attention, 16)) == (4, 8)
    latent = deepseek.layers[0].mixers[0]
    assert isinstance(latent, Attention) and kv_shards(latent, 8) == 1


def test_copies_of_experts_take_their_share(deepseek: ModelConfig) -> None:
    plain, copied = (
        ledger(deepseek).use(Layout(attention_dp=16, ep=16, redundant_experts=n), Limits(64, 2048), AG, 4096)
        for n in (0, 32)
    )
    assert copied.terms["experts"] == pytest.approx(plain.terms["experts"] * (1 + 32 / 256))
    assert copied.terms["dense"] == plain.terms["dense"]


def test_vocabulary_and_tied_heads_by_stage(vllm: Engine) -> None:
    model = load("granite-3.1-1b-a400m-instruct")
    table_bytes = model.vocab * model.hidden * 2
    for tp in (1, 2):
        weights, _ = stage_weights(ledger(model), Layout(tp=tp, moe_tp=tp, pp=2), 4096)
        assert weights[:, 3].tolist() == [table_bytes / tp, table_bytes / tp]
        whole, _ = stage_weights(ledger(model), Layout(tp=tp, moe_tp=tp), 4096)
        assert whole[0, 3] == table_bytes / tp
    untied = load("mixtral-8x7b")
    first, middle, _, last = stage_weights(ledger(untied), Layout(pp=4), 4096)[0]
    assert (first[3], middle[3], last[3]) == (32000 * 4096 * 2, 0, 32000 * 4096 * 2)
    assert last[2] - middle[2] == 4096 * 2  # the final norm
