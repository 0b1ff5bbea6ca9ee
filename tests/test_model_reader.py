"""Finding and reading config.json: names, families, quantisation lists, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import ModelConfigError
from planner.model import FAMILIES, ModelConfig, catalog, from_hf, load
from planner.model.catalog import CONFIGS, MAX_BYTES, read_json
from planner.model.families import MODEL_TYPES

MIXTRAL = read_json(CONFIGS / "mistralai__Mixtral-8x7B-v0.1.json")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("mixtral-8x7b-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("MIXTRAL-8X7B", "mistralai/Mixtral-8x7B-v0.1"),
        ("deepseek-v3", "deepseek-ai/DeepSeek-V3"),
        ("deepseek-r1", "deepseek-ai/DeepSeek-R1"),
        ("deepseek-v3.1", "deepseek-ai/DeepSeek-V3.1"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-ai/DeepSeek-R1-0528"),
        ("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B"),
        ("gpt-oss-120b", "openai/gpt-oss-120b"),
        ("llama-2-70b", "meta-llama/Llama-2-70b-hf"),
        ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("kimi-k2", "moonshotai/Kimi-K2-Instruct"),
        ("glm-4.5", "zai-org/GLM-4.5"),
        ("zhipuai/GLM-5", "zhipuai/GLM-5"),
        ("switch-c-2048", "google/switch-c-2048"),
        ("glam-64b", "glam-64b"),
        ("gpt-4-like", "gpt-4-like"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert load(name).name == expected


@pytest.mark.parametrize(
    ("name", "experts", "attention", "kv"),
    [
        ("MiniMaxAI/MiniMax-M2.5", "fp8_block", "fp8_block", "bf16"),
        ("Qwen/Qwen3-235B-A22B-FP8", "fp8_block", "fp8_block", "bf16"),
        ("Qwen/Qwen3.5-397B-A17B", "bf16", "bf16", "bf16"),
        ("deepseek-ai/DeepSeek-V3", "fp8_block", "fp8_block", "bf16"),
        ("deepseek-ai/DeepSeek-V4-Flash", "mxfp4", "fp8_block", "bf16"),
        ("meta-llama/Llama-3.1-70B", "bf16", "bf16", "bf16"),
        ("moonshotai/Kimi-K2.5", "int4_g32", "bf16", "bf16"),
        ("nvidia/Llama-3.1-8B-Instruct-FP8", "bf16", "fp8", "fp8"),
        ("nvidia/Llama-3.1-70B-Instruct-FP8", "bf16", "fp8", "fp8"),
        ("nvidia/Qwen3-32B-NVFP4", "bf16", "nvfp4", "bf16"),
        ("nvidia/MiniMax-M2.5-NVFP4", "nvfp4", "bf16", "fp8"),
        ("nvidia/Gemma-4-26B-A4B-NVFP4", "nvfp4", "bf16", "fp8"),
        ("RedHatAI/Llama-4-Scout-17B-16E-Instruct-FP8-dynamic", "fp8_channel", "bf16", "bf16"),
        ("openai/gpt-oss-120b", "mxfp4", "bf16", "bf16"),
    ],
)
def test_precision_is_read(name: str, experts: str, attention: str, kv: str) -> None:
    model = load(name)
    assert (model.format_of("expert"), model.format_of("attention"), model.kv_format) == (experts, attention, kv)
    assert model.format_of("router") == model.format_of("norm")


def test_kimi_k2_5_bytes_agree_with_the_disk() -> None:
    """Handbook models.md 4: 594.2 GB computed for the text part (595.15 GB on disk with 0.94 GB of vision)."""
    assert load("moonshotai/Kimi-K2.5").weight_bytes == pytest.approx(594.2e9, rel=1e-4)


def test_sidecar_beside_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL), encoding="utf-8")
    sidecar = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    plain = load(str(tmp_path))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(sidecar), encoding="utf-8")
    model = load(str(tmp_path))
    assert (plain.format_of("expert"), model.format_of("expert"), model.kv_format) == ("bf16", "nvfp4", "fp8")
    assert model.total_params == plain.total_params
    assert load(str(tmp_path / "config.json")) == model


def test_text_config_and_its_quantisation_are_found() -> None:
    raw = read_json(CONFIGS / "moonshotai__Kimi-K2.5.json")
    assert "quantization_config" in raw["text_config"]
    assert from_hf(raw, "k").total_params == load("kimi-k2").total_params


def test_architecture_wins_over_model_type() -> None:
    """Grok-2 declares model_type `git`, which is Microsoft's image model."""
    assert load("xai-org/grok-2").architecture == "Grok1ForCausalLM"
    raw = dict(MIXTRAL)
    del raw["architectures"]
    assert from_hf(raw, "m").total_params == 46_702_792_704
    assert set(MODEL_TYPES.values()) <= set(FAMILIES)


def test_quantised_name_without_quantisation_is_noted() -> None:
    assert any("hf_quant_config" in note for note in from_hf(MIXTRAL, "nvidia/Mixtral-8x7B-NVFP4").notes)
    assert not from_hf(MIXTRAL, "mixtral").notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "a JSON list, not an object"),
        ('"mixtral"', "a JSON str, not an object"),
        ("{", "not valid JSON"),
        ('{"hidden_size": NaN}', "NaN"),
        ("[" * 200_000, "nested too deeply|not valid JSON"),
        ("{}", "neither architectures nor model_type"),
        ('{"model_type": "bert"}', "unknown model_type 'bert'"),
        ('{"architectures": ["MixtralForCausalLMM"]}', "did you mean .*MixtralForCausalLM.*TOML"),
        ('{"architectures": "MixtralForCausalLM"}', "not a list of class names"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelConfigError, match=message):
        load(str(path))


def test_large_and_foreign_files(tmp_path: Path) -> None:
    large = tmp_path / "config.json"
    large.write_bytes(b"{" + b" " * (50 * 2**20) + b"}")
    with pytest.raises(ModelConfigError, match=f"at most {MAX_BYTES:,}"):
        load(str(large))
    large.write_text(json.dumps(MIXTRAL), encoding="utf-16")
    with pytest.raises(ModelConfigError, match="UTF-8"):
        load(str(large))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelConfigError, match=r"no config\.json in this directory"):
        load(str(empty))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": None}, "hidden_size.*missing"),
        ({"hidden_size": "4096"}, "'4096' is not an integer"),
        ({"hidden_size": True}, "True is not an integer"),
        ({"hidden_size": 4096.5}, "4096.5 is not an integer"),
        ({"num_hidden_layers": 10**9}, "1000000000 is outside"),
        ({"num_hidden_layers": -1}, "-1 is outside"),
        ({"num_experts_per_tok": 9}, "top_k 9 exceeds the 8 experts"),
        ({"num_attention_heads": 7}, "7 does not divide hidden_size 4096"),
        ({"torch_dtype": "float13"}, "'float13' is not one of"),
        ({"tie_word_embeddings": "no"}, "'no' is not true or false"),
        ({"quantization_config": {"quant_method": "magic"}}, "'magic' is not supported"),
        ({"quantization_config": "fp8"}, "'fp8' is not an object"),
        ({"quantization_config": {"quant_algo": "NVFP3"}}, "'NVFP3' is not supported"),
        (
            {"quantization_config": {"quant_method": "mxfp4", "ignore": ["re:("]}},
            "is no regular expression",
        ),
    ],
)
def test_bad_values_name_key_value_and_remedy(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        from_hf(MIXTRAL | keys, "m")


@pytest.mark.parametrize("name", ["mixtral-9x7b", "deepseek-v33", "openai/gpt-5", "", "\0", "x" * 5000])
def test_unknown_names_list_near_ones(name: str) -> None:
    with pytest.raises(ModelConfigError) as caught:
        load(name)
    assert len(str(caught.value)) < 700
    if name == "mixtral-9x7b":
        assert "mixtral-8x7b" in str(caught.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(data=st.data())
def test_any_edit_gives_a_model_or_a_clear_error(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(p for p in CONFIGS.glob("*.json") if p.stat().st_size < 8000)))
    raw = read_json(path)
    target = raw.get("text_config", raw)
    key = data.draw(st.sampled_from(sorted(target)))
    target[key] = data.draw(JSON_VALUES)
    try:
        model = from_hf(raw, path.stem)
    except ModelConfigError as error:
        assert path.stem in str(error) or "quant" in str(error)
    else:
        assert isinstance(model, ModelConfig)
        assert model.total_params > 0


def test_catalog_is_sorted_and_complete() -> None:
    names = catalog()
    assert list(names) == sorted(names)
    assert len(names) > 120
    assert {"openai/gpt-oss-120b", "nvidia/Qwen3-32B-NVFP4", "gpt-4-like"} <= set(names)
    bundled = {p.name for p in CONFIGS.iterdir() if "__" in p.name and "hf_quant_config" not in p.name}
    assert len([n for n in names if (CONFIGS / f"{n.replace('/', '__')}.json").exists()]) == len(bundled)


def test_import_needs_only_the_standard_library() -> None:
    code = "import sys, planner.model; print([m for m in ('numpy', 'pydantic', 'pandas') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
