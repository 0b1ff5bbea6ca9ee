"""Variants of a model against published checkpoints, exact counts and the limits that any model must obey."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cli.experts_variants import show_variants
from planner.cost import StepCost
from planner.engine import Engine, Limits
from planner.enumeration import layouts
from planner.errors import InputError, ModelConfigError, WorkloadError
from planner.experts import ExpertSettings
from planner.hardware import Cluster, parse_cluster
from planner.layout import Layout
from planner.memory import Ledger
from planner.model import ModelConfig, load
from planner.model.config import Moe
from planner.routing import Measured
from planner.variants import (
    Mix,
    Variant,
    adapter_bytes,
    adapters_that_fit,
    decode_points,
    dense_of_active,
    dense_of_size,
    equivalent_params,
    expert_bytes_read,
    mixed,
    parse_mix,
    parse_targets,
    prune,
    pruned,
    ranked_picks,
    roomiest_kv_tokens,
    split_formats,
    traffic_kept,
    with_adapters,
)
from planner.variants.lora import adapter_params, distinct, overhead_s
from planner.variants.precision import expert_stretch
from planner.variants.pruning import experts_read

RECORDS = Path("/work/shared/data/routing/expert_counts_olmoe_mixtral.csv")
LIMITS = Limits(1024, 8192)


@pytest.fixture(scope="module")
def node() -> Cluster:
    return parse_cluster("h100-sxm:1x4")


# --- pruning ---


def test_pruned_qwen_is_the_published_reap_checkpoint() -> None:
    """bryce-hoehn/Qwen3.5-25B-REAP-A3B-Coding keeps 180 of 256 experts: 50,182,743,296 bytes (handbook models.md 3)."""
    ours, theirs = prune(load("Qwen/Qwen3.5-35B-A3B"), 180), load("bryce-hoehn/Qwen3.5-25B-REAP-A3B-Coding")
    assert ours.total_params == theirs.total_params == 25_091_371_648
    assert ours.weight_bytes == theirs.weight_bytes == 50_182_743_296
    assert ours.mtp_params == theirs.mtp_params
    assert ours.active_params_without_embeddings == theirs.active_params_without_embeddings


def test_pruned_deepseek_loses_whole_experts(deepseek: ModelConfig) -> None:
    smaller = prune(deepseek, 192)
    assert deepseek.total_params - smaller.total_params == 58 * 64 * (3 * 7168 * 2048 + 7168)
    assert smaller.router_bias_buffers == 58 * 192
    assert smaller.num_experts == 192 and smaller.top_k == 8


@pytest.mark.parametrize(
    ("keep", "message"),
    [(256, "keep 16 to 248"), (8, "keep 16 to 248"), (0, "picks 8"), (-3, "picks 8"), (100, "keep 96 or 104")],
)
def test_impossible_numbers_of_experts(deepseek: ModelConfig, keep: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(deepseek, keep)


def test_uniform_traffic_loses_what_is_removed() -> None:
    picks = ranked_picks(Moe(64, 6, 1, 1), "uniform")
    assert traffic_kept(picks, 48) == pytest.approx(0.75)
    assert experts_read(picks, 48, [1, 10**6]) == pytest.approx([6, 48])
    assert traffic_kept(ranked_picks(Moe(64, 6, 1, 1), "single-domain"), 48) > 0.85


@pytest.mark.skipif(not RECORDS.exists(), reason="routing records are not here")
def test_law_keeps_the_traffic_that_records_keep() -> None:
    """Share of the assignments of OLMoE and Mixtral that fall on the more popular half of the experts."""
    counts: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    with RECORDS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            counts[row["model"], row["domain"], row["layer"]][int(row["expert"])] = float(row["assignments"])
    kept = defaultdict(list)
    for (model, _, _), cells in counts.items():
        moe = Moe(len(cells), 2 if len(cells) == 8 else 8, 1, 1)
        load = [cells[expert] for expert in range(len(cells))]
        kept[model].append(traffic_kept(ranked_picks(moe, counts=load), len(cells) // 2))
    found = {model: float(np.mean(shares)) for model, shares in kept.items()}
    eight, many = Moe(8, 2, 1, 1), Moe(64, 8, 1, 1)
    assert traffic_kept(ranked_picks(eight), 4) == pytest.approx(found["Mixtral-8x7B"], abs=0.01)
    assert traffic_kept(ranked_picks(many, "single-domain"), 32) == pytest.approx(found["OLMoE-1B-7B"], abs=0.01)
    assert traffic_kept(ranked_picks(many, "mixed"), 32) == pytest.approx(found["OLMoE-1B-7B-SFT"], abs=0.02)


# --- ranking ---


@settings(deadline=None, derandomize=True, max_examples=40)
@given(counts=st.lists(st.integers(0, 10_000), min_size=8, max_size=8).filter(any), top_k=st.integers(1, 8))
def test_ranked_picks_are_ranked_and_complete(counts: list[int], top_k: int) -> None:
    picks = ranked_picks(Moe(8, top_k, 1, 1), counts=counts)
    assert picks.shape == (1, 8)
    assert picks.sum() == pytest.approx(top_k)
    assert (np.diff(picks) <= 1e-12).all() and picks.min() >= 0 and picks.max() <= 1


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, 2, 3], r"\(1, 3\).*8 experts"),
        ([[1.0] * 8, [0.0] * 8], "layer 1.*no assignment"),
        ([1, 1, 1, 1, 1, 1, 1, -1], "not negative"),
        ([1, 1, 1, 1, 1, 1, 1, float("nan")], "finite"),
        (np.ones((2, 2, 8)), "8 experts"),
    ],
)
def test_counts_of_another_model_are_refused(counts: object, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        ranked_picks(Moe(8, 2, 1, 1), counts=counts)  # type: ignore[arg-type]


# --- precision ---


def test_both_formats_share_the_bytes(mixtral: ModelConfig) -> None:
    half = split_formats(mixtral, Mix(4, "bf16", "int4_g128"))
    low = split_formats(mixtral, Mix(1, "int4_g128", "int4_g128"))
    assert split_formats(mixtral, Mix(3, "bf16", "bf16")).weight_bytes == mixtral.weight_bytes
    assert half.weight_bytes == (mixtral.weight_bytes + low.weight_bytes) // 2
    assert half.total_params == mixtral.total_params
    assert half.active_params_with_embeddings == mixtral.active_params_with_embeddings


def test_ledger_counts_both_formats(mixtral: ModelConfig, node: Cluster, vllm: Engine) -> None:
    half = split_formats(mixtral, Mix(4, "fp8", "int4_g128"))
    use = Ledger(half, node.system, vllm).use(Layout(tp=4, moe_tp=4), LIMITS, "all_reduce", 4096)
    assert use.weight_bytes * 4 == pytest.approx(half.weight_bytes, rel=1e-3)


def test_hot_experts_are_read_more_often(mixtral: ModelConfig) -> None:
    assert mixtral.moe is not None
    picks, mix = ranked_picks(mixtral.moe, "single-domain"), Mix(2, "bf16", "int4_g128")
    one, everything = expert_bytes_read(mixtral, mix, picks, [1, 10**6])
    stored = sum(w.params for w in mixtral.all_weights() if w.part == "expert")
    int4 = (0.5 + 2 / 128) / 2
    assert everything == pytest.approx(2 * stored * (0.25 + 0.75 * int4), rel=1e-6)
    share = float(picks[:, :2].sum() / picks.sum())
    assert share > 0.3
    assert one == pytest.approx(2 * stored * 0.25 * (share + (1 - share) * int4), rel=1e-6)


def test_second_format_saves_time_only_by_its_bytes(mixtral: ModelConfig, node: Cluster, vllm: Engine) -> None:
    assert mixtral.moe is not None
    cost = StepCost(mixtral, Layout(tp=4, moe_tp=4), node, vllm)
    tokens, picks = np.array([1.0, 8, 64, 512]), ranked_picks(mixtral.moe)
    same, cold = (expert_stretch(Mix(4, "bf16", fmt), picks, cost, tokens) for fmt in ("bf16", "int4_g128"))
    assert (same >= 0.95).all() and (same <= 2.2).all()
    assert (cold[1:3] < same[1:3]).all()


@pytest.mark.parametrize("text", ["", "0", "8", "nan", "-1", "2.5", "1e9", "0.01:fp8/int4", "x:fp8"])
def test_impossible_mixes(mixtral: ModelConfig, text: str) -> None:
    with pytest.raises((InputError, ModelConfigError)):
        parse_mix(text, mixtral)


def test_mix_defaults_to_the_checkpoint(mixtral: ModelConfig) -> None:
    assert parse_mix("0.25", mixtral) == Mix(2, "bf16", "int4_g128")
    assert parse_mix("3:fp8/nvfp4", mixtral) == Mix(3, "fp8", "nvfp4")
    with pytest.raises(ModelConfigError, match="fp9"):
        parse_mix("0.5:fp9", mixtral)


# --- adapters ---


def test_adapter_on_attention_is_the_usual_count(mixtral: ModelConfig) -> None:
    """q, k, v and o of 32 layers of 4096 with 8 KV heads: the count PEFT prints for Mistral-7B at rank 16."""
    adapter = parse_targets("attention", 16, mixtral)
    assert adapter_params(mixtral, adapter) == 13_631_488
    assert adapter_bytes(mixtral, adapter) == 2 * 13_631_488


def test_adapter_on_experts_is_what_vllm_reserves() -> None:
    """vLLM lora/layers/fused_moe.py per layer: [E, r, H] x 2, [E, r, I/tp], [E, I/tp, r] x 2, [E, H, r] in 16 bits."""
    kimi = load("moonshotai/Kimi-K2.5")
    per_expert = 16 * (2 * 7168 + 2048 // 16 + 2 * 2048 // 16 + 7168)
    adapter = parse_targets("experts", 16, kimi)
    found = adapter_bytes(kimi, adapter, Layout(tp=16, moe_tp=16))
    assert found == 2 * 60 * 384 * per_expert
    assert found / 2**30 == pytest.approx(15.0, abs=0.1)
    spread = adapter_bytes(kimi, adapter, Layout(tp=16, ep=16))
    assert spread == pytest.approx(adapter_bytes(kimi, adapter) / 16)
    some = parse_targets("router+experts:8", 16, kimi)
    router = 16 * (384 + 7168) * 2 * 60
    assert adapter_bytes(kimi, some) == pytest.approx(adapter_bytes(kimi, adapter) * 8 / 384 + router)


def test_distinct_adapters() -> None:
    assert distinct(1, np.array([1.0, 50.0])) == pytest.approx([1, 1])
    assert distinct(4, np.array([1.0, 2.0, 1e6])) == pytest.approx([1, 1.75, 4])


def test_overhead_grows_with_batch_and_adapters(mixtral: ModelConfig, node: Cluster, vllm: Engine) -> None:
    assert mixtral.moe is not None
    picks, seqs = ranked_picks(mixtral.moe), np.array([1.0, 8, 64, 512])
    cost = StepCost(mixtral, Layout(tp=4, moe_tp=4), node, vllm)
    adapter = parse_targets("attention+experts", 16, mixtral)
    one, many = (overhead_s(adapter, n, picks, cost, seqs) for n in (1, 64))
    assert (np.diff(one) > 0).all() and (np.diff(many) > 0).all()
    assert one[0] == pytest.approx(many[0], rel=1e-6)
    assert (many[1:] > one[1:]).all()
    assert one[0] > 32 * 8 * 3e-6  # four projections of 32 layers, two launches each


def test_adapters_take_room_from_the_cache(mixtral: ModelConfig, node: Cluster, vllm: Engine) -> None:
    assert mixtral.moe is not None
    layout = Layout(tp=4, moe_tp=4)
    adapter = parse_targets("experts", 64, mixtral)
    variant = with_adapters(mixtral, adapter, 16, ranked_picks(mixtral.moe), "experts")
    bare, held = (roomiest_kv_tokens(v, node, vllm, LIMITS, [layout], 4096) for v in (Variant("x", mixtral), variant))
    assert bare - held == pytest.approx(4 * 16 * adapter_bytes(mixtral, adapter, layout) / 131_072, abs=2)
    use = Ledger(mixtral, node.system, vllm).use(layout, LIMITS, "all_reduce", 4096)
    size = adapter_bytes(mixtral, adapter, layout)
    number = adapters_that_fit(use, 100_000, size)
    assert number * size + 100_000 * use.kv_bytes_per_token <= use.terms["kv_cache"] * (1 + 1e-9)
    assert adapters_that_fit(use, 1e9, size) == 0


@pytest.mark.parametrize(
    ("text", "rank", "message"),
    [
        ("attn", 16, "attention"),
        ("attention", 0, "rank 0"),
        ("attention", 1024, "rank 1024"),
        ("experts:9", 16, "1 to 8"),
        ("experts:x", 16, "1 to 8"),
        ("attention:4", 16, "only experts"),
        ("shared", 16, "no matrices"),
        ("", 16, "unknown"),
    ],
)
def test_impossible_adapters(mixtral: ModelConfig, text: str, rank: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_targets(text, rank, mixtral)


# --- dense relatives ---


def test_dense_of_active_computes_what_a_token_computes(mixtral: ModelConfig, deepseek: ModelConfig) -> None:
    for model, router in ((mixtral, 32 * 8 * 4096), (deepseek, 58 * 256 * 7168)):
        dense = dense_of_active(model)
        assert dense.total_params == dense.active_params_with_embeddings
        assert dense.total_params == model.active_params_with_embeddings - router
        assert dense.kv_bytes_per_token == model.kv_bytes_per_token
        assert dense.moe is None
    widths = {ffn.width for layer in dense_of_active(deepseek).layers for ffn in layer.ffns}  # type: ignore[union-attr]
    assert widths == {18432}  # that of DeepSeek-V3's own dense layers


def test_dense_of_active_keeps_the_experts_format(deepseek: ModelConfig) -> None:
    dense = dense_of_active(deepseek)
    embeddings = 2 * 129_280 * 7168
    assert dense.weight_bytes == pytest.approx(dense.total_params - embeddings + 2 * embeddings, rel=2e-3)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "gpt-oss-120b", "Snowflake/snowflake-arctic-instruct"])
@pytest.mark.parametrize("size", [50e9, 200e9])
def test_dense_of_size_has_the_size(name: str, size: float) -> None:
    assert dense_of_size(load(name), size).total_params == pytest.approx(size, rel=2e-3)


def test_rule_of_thumb() -> None:
    """The examples of its source: Qwen1.5-MoE near 6-7B, DBRX near 70B, Mixtral near 25B."""
    for name, billions in (("qwen1.5-moe-a2.7b-chat", 6.2), ("dbrx-instruct", 69.0), ("mixtral-8x7b", 24.5)):
        assert equivalent_params(load(name)) / 1e9 == pytest.approx(billions, rel=0.02)


def test_no_dense_relative_of_a_dense_or_too_small_model(mixtral: ModelConfig) -> None:
    with pytest.raises(ModelConfigError, match="is dense"):
        dense_of_active(load("llama-3.1-70b"))
    with pytest.raises(InputError, match=r"dense model of 1B.*Ask for more than 1\.61B"):
        dense_of_size(mixtral, 1e9)


# --- steps on GPUs ---


def test_fewer_bytes_are_never_slower(mixtral: ModelConfig, node: Cluster, vllm: Engine) -> None:
    batches = [1, 32, 256]

    def steps(model: ModelConfig) -> list[float]:
        choices = list(layouts(model, node, vllm))
        points = decode_points(Variant("x", model), node, vllm, LIMITS, choices, batches, 4096)
        return [point.step_s if point else float("inf") for point in points]

    whole, active = steps(mixtral), steps(dense_of_active(mixtral))
    assert all(a < w for a, w in zip(active, whole, strict=True))
    assert all(p <= w * 1.01 for p, w in zip(steps(prune(mixtral, 4)), whole, strict=True))


def test_no_room_is_no_point(mixtral: ModelConfig, vllm: Engine) -> None:
    small = parse_cluster("h100-sxm:1x1")
    choices = list(layouts(mixtral, small, vllm))
    variant = Variant("x", mixtral)
    assert decode_points(variant, small, vllm, LIMITS, choices, [1], 4096) == [None]
    assert roomiest_kv_tokens(variant, small, vllm, LIMITS, choices, 4096) == 0
    assert mixtral.moe is not None
    picks = ranked_picks(mixtral.moe)
    assert roomiest_kv_tokens(pruned(mixtral, 4, picks, [1]), small, vllm, LIMITS, choices, 4096) > 0
    light = mixed(mixtral, Mix(2, "fp8", "int4_g128"), picks, [1])
    assert roomiest_kv_tokens(light, small, vllm, LIMITS, choices, 4096) > 0


def test_record_of_the_whole_model_is_not_asked_about_a_pruned_one(
    mixtral: ModelConfig, node: Cluster, vllm: Engine
) -> None:
    measured = ExpertSettings(skew=Measured("record", np.arange(1.0, 257.0).reshape(32, 8)))
    for model in (mixtral, prune(mixtral, 4)):
        layout = [Layout(tp=4, moe_tp=4)]
        (point,) = decode_points(Variant("x", model), node, vllm, LIMITS, layout, [8], 4096, measured)
        assert point is not None and point.step_s > 0


# --- command ---


def test_command_shows_every_variant(capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"keep": 6, "hot": "0.25:fp8/int4_g128", "lora_rank": 16, "lora_adapters": 4, "dense": 13.0}
    show_variants("mixtral-8x7b", gpu="h100-sxm", batch=[1, 64], json=True, **asked)  # type: ignore[arg-type]
    facts = json.loads(capsys.readouterr().out)
    rows = {row["variant"]: row for row in facts["variants"]}
    assert len(rows) == 9 and facts["num_gpus"] == 2
    assert rows["as it is"]["num_gpus_min"] == 2
    assert rows["keep 6 of 8 experts"]["details"]["traffic_kept"] > 0.75
    assert rows["4 LoRA r16 on experts"]["details"]["adapters_that_fit"] > 4
    assert all(point["usd_per_mtok_decode"] > 0 for row in rows.values() for point in row["decode"])
    show_variants("mixtral-8x7b", gpu="h100-sxm", batch=[1, 64])
    text = capsys.readouterr().out
    assert "dense 24.5B" in text and "rule of thumb" in text and max(map(len, text.splitlines())) < 200


def test_command_of_a_dense_model(capsys: pytest.CaptureFixture[str]) -> None:
    show_variants("llama-3.1-8b", gpu="l40s", lora_rank=8, batch=[8])
    assert "LoRA r8 on attention+shared+dense" in capsys.readouterr().out
    for asked in ({"keep": 4}, {"hot": "0.5"}, {"dense": 70.0}):
        with pytest.raises(ModelConfigError, match="is dense"):
            show_variants("llama-3.1-8b", gpu="l40s", **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "asked",
    [
        {"batch": [0]},
        {"context": 0},
        {"num_gpus": 12},
        {"dense": -1.0},
        {"dense": float("nan")},
        {"lora_rank": 0},
        {"lora_rank": 8, "lora_adapters": 0},
        {"skew": "mixd"},
    ],
)
def test_command_refuses(asked: dict[str, object]) -> None:
    with pytest.raises((InputError, WorkloadError)):
        show_variants("mixtral-8x7b", gpu="h100-sxm", **asked)  # type: ignore[arg-type]
