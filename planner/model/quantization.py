"""Which format each weight has in a checkpoint: `quantization_config` and the ModelOpt sidecar.

Rules: handbook models.md section 4. Router, norms, embeddings and head stay 16-bit unless a per-module map
names them.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from planner.errors import ModelConfigError, nearest
from planner.model.config import Layer, ModelConfig, Part, Weight

_ALGORITHMS = {
    "FP8": "fp8",
    "FP8_PB_WO": "fp8_block",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_channel",
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
    "MXFP4": "mxfp4",
    "W4A16_AWQ": "awq",
    "W4A8_AWQ": "awq",
    "INT8": "int8",
    "W8A8_SQ_PER_CHANNEL": "int8",
}
_METHODS = {"mxfp4": "mxfp4", "awq": "awq", "gptq": "gptq", "fbgemm_fp8": "fp8_channel"}
_GROUPS: dict[tuple[Any, Any, Any], str] = {
    (8, "int", None): "int8",
    (4, "float", 16): "nvfp4",
    (4, "float", 32): "mxfp4",
    (4, "int", 32): "int4_g32",
    (4, "int", 128): "int4_g128",
}
"""(bits, type, group size) -> format, beside the 8-bit floats that differ by strategy."""
_KEPT: tuple[Part, ...] = ("embedding", "lm_head", "router", "norm")
_PREFIXES = ("model.", "language_model.", "text_model.", "backbone.")


class Patterns:
    """Module patterns of an exclusion list: plain names, globs, and `re:` regular expressions."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._names: set[str] = set()
        starts: list[str] = []
        self._globs: list[re.Pattern[str]] = []
        for pattern in patterns:
            if pattern.startswith("re:"):
                self._globs.append(_regex(pattern))
            elif "*" not in pattern:
                self._names.add(_canonical(pattern))
            elif pattern.endswith("*") and not set("*?[") & set(pattern[:-1]):
                starts.append(_canonical(pattern[:-1]))
            else:
                self._globs.append(re.compile(fnmatch.translate(_canonical(pattern))[:-2] + r"(\..*)?\Z"))
        self._starts = tuple(starts)

    def match(self, module: str) -> bool:
        """True when `module`, a module containing it, or a trailing component of either is listed."""
        spellings = [module]
        if module.endswith("gate_up_proj"):
            spellings.append(module.removesuffix("gate_up_proj") + "gate_proj")
        return any(self._match_one(spelling) for spelling in spellings)

    def _match_one(self, module: str) -> bool:
        if module.startswith(self._starts):
            return True
        parts = module.split(".")
        spans = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
        if self._names and any(span in self._names for span in spans):
            return True
        return any(glob.match(module) or glob.match("model." + module) for glob in self._globs)


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ModelConfigError(
            f"quantization_config.ignore: {pattern!r:.80} is no regular expression: {error}"
        ) from None


def _canonical(module: str) -> str:
    """`module` without the wrappers that differ between checkpoints of one model."""
    while True:
        shorter = next((module.removeprefix(p) for p in _PREFIXES if module.startswith(p)), module)
        if shorter == module:
            return module
        module = shorter


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint is quantised; `fmt` None means not at all, `modules` overrides it by module prefix."""

    fmt: str | None = None
    kv_format: str | None = None
    excluded: Patterns = field(default_factory=lambda: Patterns(()))
    modules: Mapping[str, str] = field(default_factory=dict)
    expert_fmt: str | None = None
    notes: tuple[str, ...] = ()

    def format_of(self, weight: Weight, module: str) -> str | None:
        """Quantised format of `weight` called `module` in the checkpoint, None when it stays as it is."""
        if not (weight.is_matrix and weight.is_quantizable):
            return None
        if self.modules:
            return self._mapped(module)
        if weight.part == "expert" and self.expert_fmt:
            return self.expert_fmt
        if weight.part in _KEPT or self.fmt is None or self.excluded.match(module):
            return None
        return self.fmt

    def _mapped(self, module: str) -> str | None:
        spellings = {module, module.replace("gate_up_proj", "gate_proj")}
        for spelling in spellings:
            parts = spelling.split(".")
            for end in range(len(parts), 0, -1):
                fmt = self.modules.get(".".join(parts[:end]))
                if fmt:
                    return fmt
        return None


def read(config: Mapping[str, Any], text: Mapping[str, Any], sidecar: Mapping[str, Any] | None) -> Quantization:
    """Quantisation from a config.json, its text part, or the ModelOpt `hf_quant_config.json` beside it."""
    raw = config.get("quantization_config") or text.get("quantization_config")
    if not raw and sidecar:
        raw = sidecar.get("quantization", sidecar)
    if not raw:
        return Quantization()
    if not isinstance(raw, dict):
        raise ModelConfigError(f"quantization_config: {raw!r:.80} is not an object; copy the config.json again")
    listed = [raw.get(key) or [] for key in ("ignore", "exclude_modules", "modules_to_not_convert")]
    names = [name for names in listed if isinstance(names, list) for name in names if isinstance(name, str)]
    method, algorithm = str(raw.get("quant_method") or ""), str(raw.get("quant_algo") or "")
    kv_format, notes = _kv_format(raw)
    modules, expert_fmt = _modules(raw), "mxfp4" if text.get("expert_dtype") == "fp4" else None
    if raw.get("moe_quant_algo"):
        # The rest of such a checkpoint keeps the vendor's block format; the lists speak of the experts' only.
        return Quantization(_by_method(raw, method), kv_format, Patterns(()), {}, _algorithm(raw["moe_quant_algo"]))
    if algorithm and algorithm != "MIXED_PRECISION":
        fmt: str | None = _algorithm(algorithm)
    else:
        fmt = None if modules else _by_method(raw, method)
    if algorithm and not names and not modules:
        notes += (f"{algorithm} without a list of excluded modules: every linear layer but router and head counted",)
    return Quantization(fmt, kv_format, Patterns(names), modules, expert_fmt, notes)


def _algorithm(name: object) -> str:
    fmt = _ALGORITHMS.get(str(name).upper())
    if fmt is None:
        raise ModelConfigError(f"quant_algo {name!r} is not supported; {nearest(str(name), _ALGORITHMS)}")
    return fmt


def _by_method(raw: Mapping[str, Any], method: str) -> str:
    if method == "fp8":
        return "fp8_block" if raw.get("weight_block_size") else "fp8"
    if method in _METHODS:
        return _METHODS[method]
    groups = raw.get("config_groups")
    if isinstance(groups, dict) and groups:
        return _by_group(next(iter(groups.values())))
    known = ["fp8", "compressed-tensors", "modelopt", *_METHODS]
    raise ModelConfigError(f"quantization_config.quant_method {method!r} is not supported; {nearest(method, known)}")


def _by_group(group: Any) -> str:
    """Format of one compressed-tensors or ModelOpt group of linear layers."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ModelConfigError("quantization_config.config_groups: a group has no weights; copy the config.json again")
    bits, kind = weights.get("num_bits"), weights.get("type")
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if (bits, kind) == (8, "float"):
        return {"channel": "fp8_channel", "block": "fp8_block"}.get(str(strategy), "fp8")
    fmt = _GROUPS.get((bits, kind, size))
    if fmt is None:
        raise ModelConfigError(
            f"quantization_config: weights of {bits} bits {kind} in groups of {size} are not supported; "
            "state the precision with an override"
        )
    return fmt


def _modules(raw: Mapping[str, Any]) -> dict[str, str]:
    layers = raw.get("quantized_layers")
    if not isinstance(layers, dict) or raw.get("quant_algo") != "MIXED_PRECISION":
        return {}
    named = {_canonical(name): value for name, value in layers.items() if isinstance(value, dict)}
    return {name: _algorithm(value.get("quant_algo")) for name, value in named.items()}


def _kv_format(raw: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    scheme = raw.get("kv_cache_scheme") or raw.get("kv_cache_quant_algo")
    if isinstance(scheme, dict):
        scheme = "FP8" if (scheme.get("num_bits"), scheme.get("type")) == (8, "float") else str(scheme)
    if not scheme:
        return None, ()
    if str(scheme).upper() == "FP8":
        return "fp8", ()
    return None, (f"KV cache scheme {scheme!r:.40} is not modelled; a 16-bit cache is counted",)


def apply(model: ModelConfig, scheme: Quantization) -> ModelConfig:
    """`model` with the formats of `scheme`: the most common per part, others pinned on their weights."""
    if scheme.fmt is None and not scheme.modules and not scheme.expert_fmt:
        return replace(model, kv_format=scheme.kv_format or model.kv_format, notes=model.notes + scheme.notes)
    layers = [_annotated(own.weights, scheme, f"layers.{i}.") for i, own in enumerate(model.layers)]
    outer, mtp = _annotated(model.weights, scheme, ""), _annotated(model.mtp, scheme, "")
    formats = _common([w for weights in (*layers, outer) for w in weights], dict(model.formats))
    merged: dict[tuple[Layer, tuple[Weight, ...]], Layer] = {}
    for own, weights in zip(model.layers, layers, strict=True):
        if (own, weights) not in merged:
            merged[own, weights] = replace(own, weights=_pinned(weights, formats))
    return replace(
        model,
        layers=tuple(merged[pair] for pair in zip(model.layers, layers, strict=True)),
        weights=_pinned(outer, formats),
        mtp=_pinned(mtp, formats),
        formats=tuple(formats.items()),
        kv_format=scheme.kv_format or model.kv_format,
        notes=model.notes + scheme.notes,
    )


def _annotated(weights: tuple[Weight, ...], scheme: Quantization, prefix: str) -> tuple[Weight, ...]:
    """`weights` with their quantised format in `fmt`."""
    chosen = [(w, scheme.format_of(w, _canonical(prefix + w.name))) for w in weights]
    return tuple(replace(w, fmt=fmt) if fmt else w for w, fmt in chosen)


def _common(weights: list[Weight], base: dict[Part, str]) -> dict[Part, str]:
    """Format that most parameters of each part have."""
    votes: dict[Part, Counter[str]] = {part: Counter() for part in base}
    for weight in weights:
        if weight.is_matrix and weight.is_quantizable:
            votes[weight.part][weight.fmt or base[weight.part]] += weight.params
    return {part: count.most_common(1)[0][0] if count else base[part] for part, count in votes.items()}


def _pinned(weights: tuple[Weight, ...], formats: dict[Part, str]) -> tuple[Weight, ...]:
    """`weights` whose `fmt` is kept only where it differs from the part's."""
    plain = formats["norm"]
    pinned = []
    for weight in weights:
        if weight.is_matrix and weight.is_quantizable:
            fmt = weight.fmt or plain
            pinned.append(replace(weight, fmt=None if fmt == formats[weight.part] else fmt))
        else:
            pinned.append(weight)
    return tuple(pinned)
