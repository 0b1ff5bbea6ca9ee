"""One reader for every Hugging Face config.json: dispatch on `architectures`, then read the precision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planner.errors import ModelConfigError, nearest
from planner.model import quantization
from planner.model.config import ModelConfig
from planner.model.families import FAMILIES, MODEL_TYPES
from planner.model.keys import Keys

_QUANTISED_NAME = re.compile(r"(NVFP4|FP4|FP8|INT4|INT8|AWQ|GPTQ)", re.IGNORECASE)


def from_hf(config: Mapping[str, Any], name: str, sidecar: Mapping[str, Any] | None = None) -> ModelConfig:
    """Model described by a Hugging Face `config` (its `text_config` if nested) and an optional ModelOpt sidecar.

    Raises `ModelConfigError` for an unknown architecture or a missing or impossible value.
    """
    if not isinstance(config, Mapping):
        raise ModelConfigError(f"{name}: config.json holds a {type(config).__name__}, not an object; copy it again")
    architecture = _architecture(config, name)
    nested = config.get("text_config")
    text = dict(nested) if isinstance(nested, Mapping) else dict(config)
    for key in ("tie_word_embeddings", "torch_dtype", "dtype"):
        if text.get(key) is None and config.get(key) is not None:
            text[key] = config[key]
    model = FAMILIES[architecture](Keys(text, name, architecture))
    scheme = quantization.read(config, text, sidecar)
    model = quantization.apply(model, scheme)
    if scheme.fmt is None and not scheme.modules and not scheme.expert_fmt and _QUANTISED_NAME.search(name):
        note = "quantised by name, but no quantization_config: counted in 16 bits; add hf_quant_config.json"
        model = replace(model, notes=(*model.notes, note))
    return model


def _architecture(config: Mapping[str, Any], name: str) -> str:
    listed = config.get("architectures")
    if listed is None:
        return _by_model_type(config, name)
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], str):
        raise ModelConfigError(f"{name}: architectures: {listed!r:.80} is not a list of class names")
    known = next((entry for entry in listed if entry in FAMILIES), None)
    if known is None:
        raise ModelConfigError(
            f"{name}: unknown architecture {listed[0]!r:.80}; {nearest(listed[0], FAMILIES)} "
            "A model TOML can describe any other model."
        )
    return str(known)


def _by_model_type(config: Mapping[str, Any], name: str) -> str:
    kind = config.get("model_type")
    if kind is None:
        raise ModelConfigError(f"{name}: neither architectures nor model_type is present; add architectures")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ModelConfigError(
            f"{name}: unknown model_type {kind!r:.80}; {nearest(str(kind), MODEL_TYPES)} "
            "A model TOML can describe any other model."
        )
    return MODEL_TYPES[kind]
