"""GEMM shapes after sharding, and the handbook's MLA and decode anchors (M1, M2) from the model's own facts."""

from __future__ import annotations

import pytest

from planner.inventory import head_gemm, layer_gemms
from planner.layout import Layout
from planner.model import ModelConfig, load
from planner.model.config import Attention

HBM, BF16 = 3.35e12, 989e12


def mla(model: ModelConfig) -> Attention:
    mixer = model.layers[-1].mixers[0]
    assert isinstance(mixer, Attention)
    return mixer


def test_projections_are_fused_and_sharded(mixtral: ModelConfig) -> None:
    shapes = {(g.label, g.rows, g.cols) for g in layer_gemms(mixtral, mixtral.layers[0], Layout(tp=4, moe_tp=4))}
    assert ("attention_projections", (4096 + 2 * 1024) // 4, 4096) in shapes
    assert ("attention_projections", 4096, 1024) in shapes
    assert ("router", 8, 4096) in shapes
    assert not any(label == "experts" for label, *_ in shapes)


def test_kv_heads_are_copied_beyond_their_number() -> None:
    model = load("qwen3-235b-a22b")  # 64 query heads, 4 KV heads of 128
    rows = [g.rows for g in layer_gemms(model, model.layers[0], Layout(tp=8, ep=8)) if g.cols == 4096]
    assert 64 * 128 // 8 + 2 * (4 * 128 // 4) in rows


def test_dense_flop_per_token_matches_parameters() -> None:
    model = load("llama-2-70b")
    flop = sum(g.flop_per_token for layer in model.layers for g in layer_gemms(model, layer, Layout()))
    flop += head_gemm(model, Layout()).flop_per_token
    norms = model.params_by_part()["norm"]
    assert flop == 2 * (model.total_params - model.params_by_part()["embedding"] - norms)


def test_head_is_sharded_by_vocabulary(deepseek: ModelConfig) -> None:
    assert head_gemm(deepseek, Layout(tp=8)).rows == 129_280 // 8


def test_mla_absorption_breaks_even_at_164_tokens_m1(deepseek: ModelConfig) -> None:
    attention = mla(deepseek)
    heads, latent, rope = attention.num_heads, attention.kv_lora_rank, attention.qk_rope_head_dim
    assert latent and rope
    nope = attention.qk_head_dim - rope
    expand = 2 * heads * latent * (nope + attention.v_head_dim)  # per cached token
    absorbed, expanded = 2 * heads * (2 * latent + rope), 2 * heads * (attention.qk_head_dim + attention.v_head_dim)
    project = 2 * heads * latent * (nope + attention.v_head_dim)  # per query token, absorbed into both sides
    context = 4096
    assert expand * context / (context * (absorbed - expanded) + project) == pytest.approx(163.8, abs=0.1)
    assert expand / (absorbed - expanded) == pytest.approx(170.7, abs=0.1)


def test_decode_anchors_of_a_deepseek_layer_m2(deepseek: ModelConfig) -> None:
    attention, layer = mla(deepseek), deepseek.layers[-1]
    cached = 64 * 4096
    assert attention.kv_values * 2 * cached / HBM == pytest.approx(90.1e-6, rel=0.003)
    assert attention.kv_lora_rank and attention.qk_rope_head_dim
    width = 2 * attention.kv_lora_rank + attention.qk_rope_head_dim
    assert 2 * attention.num_heads * width * cached / BF16 == pytest.approx(73.8e-6, rel=0.003)
    weights = sum(w.params for w in layer.weights if w.part == "attention" and w.is_matrix)
    assert weights / HBM == pytest.approx(55.9e-6, rel=0.003)
    assert layer.moe
    expert = 3 * layer.moe.expert_width * layer.moe.expert_hidden
    assert expert == 44_040_192
    assert 3 * expert / HBM == pytest.approx(39.4e-6, rel=0.003)
