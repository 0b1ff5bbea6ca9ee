"""Parameters and cache of the bundled models against published and independently counted totals."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import get_args

import pytest

from planner.model import Attention, catalog, describe, describe_layers, load, override
from planner.model.config import Part, Shard
from planner.model.precision import STORAGE

DATA = Path(__file__).parent / "data"


def _rows() -> list[dict[str, str]]:
    with (DATA / "params.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _name(row: dict[str, str]) -> str:
    # The MiniMax-M3 shape is bundled under its vendor's name; the table lists it by its NVFP4 repository.
    name = row["model"].replace(".reconstructed", "").replace("__", "/")
    return name.replace("nvidia/MiniMax-M3-NVFP4", "MiniMaxAI/MiniMax-M3")


EXACT = [row for row in _rows() if row["verification"].startswith("exact")]
OTHER = [row for row in _rows() if not row["verification"].startswith("exact")]
VOCAB_DIFFERS = {"stepfun-ai/Step-3.7-Flash": "counted with vocabulary 128,815, the config says 128,896"}
WINDOWED = {"microsoft/Phi-mini-MoE-instruct", "microsoft/Phi-tiny-MoE-instruct"}


def test_tables_are_whole() -> None:
    assert len(EXACT) == 46
    assert len(OTHER) == 34


@pytest.mark.parametrize("row", EXACT, ids=_name)
def test_exact_rows_match_to_the_last_parameter(row: dict[str, str]) -> None:
    model = override(load(_name(row)), kv="bf16")
    found = {
        "total_params": model.total_params,
        "total_with_router_bias_buffers": model.total_params + model.router_bias_buffers,
        "active_params": model.active_params_with_embeddings,
        "active_excl_embeddings": model.active_params_without_embeddings,
        "expert_params_total": model.params_by_part()["expert"],
        "kv_bytes_per_token_model_bf16": model.kv_bytes_per_token,
    }
    assert found == {key: int(row[key] or 0) for key in found}


@pytest.mark.parametrize("row", [r for r in EXACT if _name(r) not in WINDOWED], ids=_name)
def test_growing_cache_of_exact_rows(row: dict[str, str]) -> None:
    model = override(load(_name(row)), kv="bf16")
    assert model.kv_growing_bytes_per_token == int(row["kv_growing_bytes_per_token_bf16"])


@pytest.mark.parametrize("name", sorted(WINDOWED))
def test_phi_configs_declare_a_window_the_table_ignores(name: str) -> None:
    model = load(name)
    assert {layer.mixers[0].window for layer in model.layers if isinstance(layer.mixers[0], Attention)} == {2047}
    assert model.kv_growing_bytes_per_token == 0


@pytest.mark.parametrize("row", OTHER, ids=_name)
def test_other_rows(row: dict[str, str]) -> None:
    model = load(_name(row))
    total, active = int(row["total_params"]), int(row["active_params"])
    if _name(row) in VOCAB_DIFFERS:
        assert model.total_params == pytest.approx(total, rel=0.005)
        assert model.total_params - total == 2 * 81 * model.hidden
    else:
        assert (model.total_params, model.active_params_with_embeddings) == (total, active)
    assert model.num_moe_layers == int(row["n_moe_layers"] or 0)
    assert (model.num_experts, model.top_k) == (int(row["n_experts"] or 0), int(row["top_k"] or 0))


@pytest.mark.parametrize("name", catalog())
def test_every_bundled_model_is_sound(name: str) -> None:
    model = load(name.upper())
    assert model.layers
    assert model.source
    assert model.name.lower() == name.lower()
    assert sum(model.params_by_part().values()) == model.total_params
    for weight in (*model.all_weights(), *model.mtp):
        assert min(weight.rows, weight.cols, weight.copies, weight.fused) > 0
        assert weight.part in get_args(Part)
        assert weight.shard in get_args(Shard)
        assert weight.is_matrix or weight.cols == 1
        assert weight.rows % weight.fused == 0
        assert (weight.shard == "expert") == (weight.part == "expert")
        assert (weight.shard == "vocab") == (weight.part in ("embedding", "lm_head"))
        assert weight.fmt is None or weight.fmt in STORAGE
    for layer in model.layers:
        experts = [w for w in layer.weights if w.part == "expert"]
        assert bool(experts) == (layer.moe is not None)
        assert all(layer.moe and w.copies == layer.moe.num_experts for w in experts)
    assert model.tied != any(w.part == "lm_head" for w in model.weights)
    assert 0 < model.active_params_without_embeddings < model.active_params_with_embeddings <= model.total_params
    assert sum(count for count, _ in describe_layers(model)) == model.num_layers


@pytest.mark.parametrize(
    ("name", "with_embeddings", "without_input", "without_both"),
    [
        ("openai/gpt-oss-120b", 5.71e9, 5.13e9, 4.55e9),  # model card 2508.10925: 5.13B
        ("openai/gpt-oss-20b", 4.19e9, 3.61e9, 3.03e9),  # model card: 3.61B
        ("mistralai/Mixtral-8x7B-v0.1", 12.88e9, 12.75e9, 12.62e9),  # blog: 12.9B
        ("zai-org/GLM-4.5", 33.63e9, 32.86e9, 32.08e9),  # README: 32B
        ("ibm-granite/granite-3.1-1b-a400m-instruct", 0.429e9, 0.429e9, 0.378e9),  # tied: the matrix is the head
    ],
)
def test_three_conventions_of_active(
    name: str, with_embeddings: float, without_input: float, without_both: float
) -> None:
    model = load(name)
    assert model.active_params_with_embeddings == pytest.approx(with_embeddings, rel=2e-3)
    assert model.active_params_without_input_embedding == pytest.approx(without_input, rel=2e-3)
    assert model.active_params_without_embeddings == pytest.approx(without_both, rel=2e-3)


def test_deepseek_v3_anchors() -> None:
    """W1 and W2 of the handbook's acceptance tests."""
    model = load("deepseek-v3")
    sparse = model.layers[-1]
    one = [w for w in sparse.weights if w.part == "expert"]
    assert sum(w.params // w.copies for w in one) == 3 * 7168 * 2048 == 44_040_192
    assert model.total_params == pytest.approx(671.0e9, rel=1e-3)
    assert model.active_params_with_embeddings == pytest.approx(37.5e9, rel=2e-3)
    assert model.active_params_without_input_embedding == pytest.approx(36.6e9, rel=2e-3)
    assert describe_layers(model) == [
        (3, "MLA, dense 18,432"),
        (58, "MLA, MoE 256 experts top-8 width 2,048 + shared 2,048"),
    ]


@pytest.mark.parametrize(
    ("name", "kv_format", "expected"),
    [
        ("deepseek-v3", "bf16", 70_272),
        ("deepseek-v3", "fp8_ds_mla", 40_016),
        ("deepseek-v3", "fp8", 35_136),
        ("deepseek-v3.2", "fp8_ds_mla", 61 * (656 + 132)),
        ("meta-llama/Meta-Llama-3.1-405B", "bf16", 516_096),
        ("qwen3-235b-a22b", "bf16", 192_512),
        ("mixtral-8x7b", "bf16", 131_072),
        ("zai-org/GLM-5.1", "bf16", 109_824),
        ("MiniMaxAI/MiniMax-M2.7", "bf16", 253_952),
        ("stepfun-ai/step3", "bf16", 62_464),
    ],
)
def test_cache_per_token(name: str, kv_format: str, expected: int) -> None:
    """K1: the handbook's table of cache bytes per token."""
    assert override(load(name), kv=kv_format).kv_bytes_per_token == expected


@pytest.mark.parametrize(
    ("name", "state_values"),
    [
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 36 * 32 * 128 * 128),
        ("Qwen/Qwen3.5-397B-A17B", 45 * 64 * 128 * 128),
        ("MiniMaxAI/MiniMax-M1-80k", 70 * 64 * 128 * 128),
        ("moonshotai/Kimi-Linear-48B-A3B-Instruct", 20 * 32 * 128 * 128),
        ("ai21labs/AI21-Jamba-1.5-Mini", 28 * 8192 * 16),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 23 * 64 * 64 * 128),
    ],
)
def test_recurrent_state(name: str, state_values: int) -> None:
    model = load(name)
    mixers = [m for layer in model.layers for m in layer.mixers if not isinstance(m, Attention)]
    assert sum(m.state_values for m in mixers) == state_values
    assert model.state_bytes_per_sequence == 4 * state_values + 2 * sum(m.conv_values for m in mixers)


def test_convolution_tail_of_qwen3_next() -> None:
    mixers = [m for layer in load("qwen3-next").layers for m in layer.mixers if not isinstance(m, Attention)]
    assert sum(m.conv_values for m in mixers) == 36 * 8192 * 3


def test_layer_kinds() -> None:
    assert [c for c, _ in describe_layers(load("gpt-oss-120b"))] == [18, 18]
    assert describe_layers(load("llama-4-maverick")) == [
        (24, "GQA 40/8 x 128 window 8,192, dense 16,384"),
        (12, "GQA 40/8 x 128 window 8,192, MoE 128 experts top-1 width 8,192 + shared 8,192"),
        (12, "GQA 40/8 x 128, MoE 128 experts top-1 width 8,192 + shared 8,192"),
    ]
    jamba = {text: count for count, text in describe_layers(load("jamba-1.5-mini"))}
    assert sum(count for text, count in jamba.items() if "Mamba-1" in text) == 28
    assert sum(count for text, count in jamba.items() if "MoE" in text) == 16


def test_glm_5_2_shares_its_indexers() -> None:
    mixers = [m for layer in load("zai-org/GLM-5.2").layers for m in layer.mixers if isinstance(m, Attention)]
    assert sum(m.index_heads > 0 for m in mixers) == 21
    assert all(m.index_topk == 2048 for m in mixers)


def test_hunyuan_large_reuses_keys_and_values() -> None:
    mixers = [m for layer in load("hunyuan-large").layers for m in layer.mixers if isinstance(m, Attention)]
    assert [m.kv_values > 0 for m in mixers] == [True, False] * 32


def test_encoder_decoder_caches() -> None:
    model = load("switch-c-2048")
    assert model.num_layers == 30
    assert model.kv_bytes_per_source_token == model.kv_bytes_per_token == 122_880
    assert model.moe is not None
    assert model.moe.capacity_factor == 1.25


def test_longcat_identity_experts() -> None:
    moe = load("longcat-flash").moe
    assert moe is not None
    assert (moe.top_k, moe.active_experts, moe.identity_experts) == (12, 8.0, 256)


def test_glam_from_its_paper() -> None:
    model = load("glam-64b")
    assert model.active_params_with_embeddings == pytest.approx(96.6e9, rel=1e-3)
    assert model.total_params == pytest.approx(1.2e12, rel=0.04)
    assert (model.num_layers, model.num_moe_layers, model.num_experts, model.top_k) == (64, 32, 64, 2)


def test_describe_has_the_promised_keys() -> None:
    facts = describe(load("mixtral-8x7b"))
    assert facts["total_params"] == 46_702_792_704
    assert facts["active_params_with_embeddings"] == 12_879_925_248
    assert facts["active_params_without_embeddings"] == 12_617_781_248
    assert facts["kv_bytes_per_token"] == 131_072
    assert facts["weight_bytes"] == 93_405_585_408
    assert [facts[k] for k in ("num_layers", "num_moe_layers", "num_experts", "top_k")] == [32, 32, 8, 2]
