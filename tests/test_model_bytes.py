"""Stored bytes: checkpoints to the byte, and the rules of every weight format."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import ModelConfigError
from planner.model import ModelConfig, Weight, compute_format, load, override
from planner.model.catalog import CONFIGS, read_json
from planner.model.huggingface import from_hf
from planner.model.precision import STORAGE, UNQUANTIZED, stored_bytes

DATA = Path(__file__).parent / "data"
LLAMA_4_VISION = 871_932_416
QWEN_3_5_VISION = 456_010_480
GEMMA_4_VISION = 572_792_112


def _mtp_elements(name: str) -> int:
    model = load(name)
    return model.mtp_params + model.mtp_router_bias_buffers


def _scale_values(model: ModelConfig) -> int:
    """fp32 block scales of a block-quantised checkpoint, MTP included."""
    weights = [*model.all_weights(), *model.mtp]
    quantised = [w for w in weights if w.is_matrix and w.is_quantizable and model.format_of(w.part) == "fp8_block"]
    return sum(stored_bytes(w, "fp8_block") - w.params for w in quantised) // 4


def _elements(model: ModelConfig) -> int:
    biases = model.router_bias_buffers + model.mtp_router_bias_buffers
    return model.total_params + model.mtp_params + _scale_values(model) + biases


def _edited(name: str, **keys: object) -> ModelConfig:
    return from_hf(read_json(CONFIGS / f"{name.replace('/', '__')}.json") | keys, name)


def _flash_base_minus_flash() -> int:
    """FP8 experts with block scales and copies of embedding and head, less FP4 pairs with a scale per 32."""
    model = load("deepseek-ai/DeepSeek-V4-Flash")
    experts = [w for w in (*model.all_weights(), *model.mtp) if w.part == "expert"]
    base = sum(w.params + (stored_bytes(replace(w, fmt=None), "fp8_block") - w.params) // 4 for w in experts)
    flash = sum(stored_bytes(replace(w, fmt=None), "mxfp4") for w in experts)
    return base - flash + 2 * model.vocab * model.hidden


def _nvfp4_elements() -> int:
    model = load("nvidia/Qwen3-30B-A3B-NVFP4")
    packed = sum(w.params for w in model.all_weights() if model.format_of(w.part) == "nvfp4" and w.is_matrix)
    return model.total_params - packed // 2


def _v3_bytes() -> int:
    model = load("deepseek-v3")
    return model.weight_bytes + model.mtp_bytes


def _v3_fp32() -> int:
    model = load("deepseek-v3")
    return _scale_values(model) + model.router_bias_buffers + model.mtp_router_bias_buffers


ROWS: dict[tuple[str, str], Callable[[], int]] = {
    ("Mixtral-8x7B", "bf16"): lambda: load("mixtral-8x7b").weight_bytes,
    ("Qwen3-30B-A3B", "bf16"): lambda: load("Qwen/Qwen3-30B-A3B").weight_bytes,
    ("Qwen3-8B", "bf16"): lambda: load("Qwen/Qwen3-8B").weight_bytes,
    ("gpt-oss-20b", "MXFP4"): lambda: load("gpt-oss-20b").weight_bytes,
    ("gpt-oss-120b", "MXFP4"): lambda: load("gpt-oss-120b").weight_bytes,
    ("MiniMax-M1-80k", "total_size"): lambda: load("minimax-m1").weight_bytes,
    ("Qwen3.5-25B-REAP-A3B", "total_size"): lambda: load("bryce-hoehn/Qwen3.5-25B-REAP-A3B-Coding").weight_bytes,
    ("GLM-5 bf16 (mlx, no MTP)", "storage_size"): lambda: load("zai-org/GLM-5").weight_bytes,
    ("DeepSeek-V3", "F32"): _v3_fp32,
    ("DeepSeek-V3", "safetensors"): _v3_bytes,
    ("DeepSeek-V3", "MTP"): lambda: load("deepseek-v3").mtp_params,
    ("GLM-4.5", "MTP"): lambda: _mtp_elements("glm-4.5"),
    ("GLM-4.6", "MTP"): lambda: _mtp_elements("glm-4.6"),
    ("GLM-4.5-Air", "MTP"): lambda: _mtp_elements("glm-4.5-air"),
    ("Qwen3-Next-80B-A3B", "MTP"): lambda: _mtp_elements("qwen3-next"),
    ("ERNIE-4.5-300B", "MTP"): lambda: _mtp_elements("ernie-4.5-300b-a47b"),
    ("DeepSeek-V4-Flash", "Flash-Base"): _flash_base_minus_flash,
    ("Qwen3-30B-A3B-NVFP4", "HF"): _nvfp4_elements,
    ("DeepSeek-V3.2(-Exp)", "HF"): lambda: _elements(load("deepseek-ai/DeepSeek-V3.2-Exp")),
    ("LongCat-Flash-Chat", "MTP"): lambda: _mtp_elements("longcat-flash"),
    ("Qwen3.5-397B-A17B", "MTP"): lambda: _mtp_elements("Qwen/Qwen3.5-397B-A17B"),
    ("Llama-4-Maverick", "total"): lambda: load("llama-4-maverick").total_params + LLAMA_4_VISION,
    ("gemma-4-26B-A4B", "total"): lambda: load("google/gemma-4-26B-A4B").total_params + GEMMA_4_VISION + 262_144 * 2816,
    # 3.0-1b-base is the 3.1 shape with vocabulary 49,152; its checkpoint stores the tied head once more.
    ("granite-3.0-1b-a400m-base", "total"): lambda: (
        _edited("ibm-granite/granite-3.1-1b-a400m-instruct", vocab_size=49_152).total_params + 49_152 * 1024
    ),
    ("Mixtral-8x22B-Instruct", "total,"): lambda: (
        _edited("mistralai/Mixtral-8x22B-v0.1", vocab_size=32_768).total_params
    ),
    ("Ling-flash-2.0", "total"): lambda: load("inclusionAI/Ling-flash-2.0").total_params,
}


def _table() -> list[dict[str, str]]:
    with (DATA / "weight_bytes.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _key(row: dict[str, str]) -> tuple[str, str]:
    return row["model"], row["quantity"].split()[0]


def test_every_row_has_a_rule() -> None:
    assert {_key(row) for row in _table()} == set(ROWS)


@pytest.mark.parametrize("row", _table(), ids=lambda row: "-".join(_key(row)))
def test_rows_differ_by_nothing(row: dict[str, str]) -> None:
    assert ROWS[_key(row)]() == int(row["calculated"])


@pytest.mark.parametrize(
    ("name", "elements", "vision"),
    [
        # Hugging Face element counts (handbook hf_safetensors_totals.csv): every exclusion list read correctly.
        ("Qwen/Qwen3-235B-A22B-FP8", 235_107_904_512, 0),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct-FP8", 81_329_784_384, 0),
        ("Qwen/Qwen3.5-35B-A3B-FP8", 35_953_925_552, 446_571_248),
        ("MiniMaxAI/MiniMax-M2.5", 228_703_644_928, 0),
        ("deepseek-ai/DeepSeek-R1", 684_531_386_000, 0),
        ("deepseek-ai/DeepSeek-V3.2", 685_396_921_376, 0),
        ("zai-org/GLM-5", 753_864_139_008, 0),
    ],
)
def test_element_counts_of_quantised_checkpoints(name: str, elements: int, vision: int) -> None:
    assert _elements(load(name)) + vision == elements


def test_expert_bytes_of_deepseek_v3() -> None:
    """W1: 42 MiB in FP8 and 23.625 MiB with one byte of scale per 16 FP4 values, per-tensor scales aside."""
    one = [replace(w, copies=1) for w in load("deepseek-v3").layers[-1].weights if w.part == "expert"]
    assert sum(w.params for w in one) == 42 * 2**20
    assert sum(stored_bytes(w, "nvfp4") - 8 * w.fused for w in one) == 23.625 * 2**20
    assert sum(stored_bytes(w, "fp8_block") for w in one) == 42 * 2**20 + 3 * 4 * 16 * 56


def test_block_scales_are_rounded_up_on_each_edge() -> None:
    latent = next(w for w in load("deepseek-v3").layers[0].weights if w.name == "self_attn.kv_a_proj_with_mqa")
    assert stored_bytes(latent, "fp8_block") == 576 * 7168 + 4 * 5 * 56


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        ("bf16", 2 * 256 * 512),
        ("fp32", 4 * 256 * 512),
        ("fp8", 256 * 512 + 8),
        ("fp8_block", 256 * 512 + 4 * 2 * 4),
        ("fp8_channel", 256 * 512 + 2 * 256),
        ("mxfp4", 256 * 512 // 2 + 256 * 16),
        ("nvfp4", 256 * 512 // 2 + 256 * 32 + 8),
        ("int4_g32", 256 * 512 // 2 + 2 * 256 * 16 + 8),
        ("awq", 256 * 512 // 2 + 4 * 256 * 2 + 4 * 256 // 2),
        ("gptq", 256 * 512 // 2 + 4 * 256 * 2 + 4 * 256 // 2 + 4 * 512),
        ("int8", 256 * 512 + 2 * 256),
    ],
)
def test_bytes_per_format(fmt: str, expected: int) -> None:
    assert stored_bytes(Weight("w", 256, 512, "attention"), fmt) == expected


def test_vectors_and_exempt_matrices_stay_16_bit() -> None:
    vector = Weight("norm", 4096, 1, "norm", is_matrix=False)
    exempt = Weight("gate", 64, 4096, "attention", is_quantizable=False)
    assert stored_bytes(vector, "nvfp4") == 8192
    assert stored_bytes(exempt, "fp8_block") == 2 * 64 * 4096


@settings(deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 5000),
    cols=st.integers(1, 5000),
    copies=st.integers(1, 300),
    fmt=st.sampled_from(sorted(set(STORAGE) - set(UNQUANTIZED))),
)
def test_stored_bytes_scale_and_bound(rows: int, cols: int, copies: int, fmt: str) -> None:
    one = Weight("w", rows, cols, "expert")
    many = replace(one, copies=copies)
    fused = Weight("w", 2 * rows, cols, "expert", fused=2)
    assert stored_bytes(many, fmt) == copies * stored_bytes(one, fmt)
    assert stored_bytes(fused, fmt) == 2 * stored_bytes(one, fmt)
    assert stored_bytes(one, fmt) >= rows * cols / 2
    wider = Weight("w", rows, cols + 1, "expert")
    assert stored_bytes(wider, fmt) >= stored_bytes(one, fmt)


def test_override_changes_only_what_it_names() -> None:
    model = load("Qwen/Qwen3-235B-A22B")
    fp4 = override(model, experts="nvfp4", kv="fp8")
    assert fp4.format_of("expert") == "nvfp4"
    assert fp4.format_of("attention") == "bf16"
    assert fp4.kv_bytes_per_token * 2 == model.kv_bytes_per_token
    assert fp4.total_params == model.total_params
    assert fp4.weight_bytes < model.weight_bytes / 3
    assert override(model) == model


def test_override_drops_pinned_formats_but_not_exempt_ones() -> None:
    quantised = {"quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.0.*", "model.layers.*.self_attn.o_proj"]}
    mixed = _edited("mistralai/Mixtral-8x7B-v0.1", quantization_config=quantised)
    first, second = mixed.layers[:2]
    assert {w.fmt for w in first.weights if w.is_matrix and w.part in ("attention", "expert")} == {"bf16"}
    assert [w.name for w in second.weights if w.fmt == "bf16"] == ["self_attn.o_proj"]
    assert len(mixed.layer_kinds) == 2
    plain = override(mixed, attention="bf16", experts="bf16")
    assert not [w for w in plain.all_weights() if w.fmt is not None]
    assert len(plain.layer_kinds) == 1
    v32 = override(load("deepseek-v3.2"), attention="nvfp4")
    heads = next(w for w in v32.layers[0].weights if w.name == "self_attn.indexer.weights_proj")
    assert stored_bytes(heads, "nvfp4") == 2 * heads.params


def test_router_of_minimax_m1_stays_fp32_under_override() -> None:
    model = override(load("minimax-m1"), experts="fp8_block", attention="fp8_block")
    router = next(w for w in model.layers[0].weights if w.part == "router")
    assert stored_bytes(router, model.format_of("router")) == 4 * router.params


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"experts": "fp6"}, "unknown weight format 'fp6'"),
        ({"kv": "fp2"}, "unknown KV cache format 'fp2'"),
        ({"kv": "fp8_ds_mla"}, "only for MLA"),
    ],
)
def test_override_refuses_unknown_formats(kwargs: dict[str, str], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        override(load("mixtral-8x7b"), **kwargs)


def test_compute_formats() -> None:
    assert {fmt: compute_format(fmt) for fmt in ("fp16", "fp8_channel", "awq", "gptq", "int4_g32")} == {
        "fp16": "bf16",
        "fp8_channel": "fp8",
        "awq": "int4",
        "gptq": "int4",
        "int4_g32": "int4",
    }
    assert {compute_format(fmt) for fmt in STORAGE} == {"bf16", "fp8", "fp8_block", "nvfp4", "mxfp4", "int4", "int8"}
