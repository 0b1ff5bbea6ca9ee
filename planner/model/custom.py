"""A model described in a short TOML: closed, planned or hypothetical ones.

Either the shape is given (`hidden`, `num_layers`, ...) or only `total_params` and `active_params`, from which
`planner.model.hypothetical` solves a shape and says so in the notes.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner import tomlfile
from planner.errors import ModelConfigError
from planner.model.blocks import Heads, gqa
from planner.model.config import Layer, ModelConfig, Moe
from planner.model.families.assembly import Block, assemble, layer
from planner.model.feed_forward import dense, moe, norms
from planner.model.hypothetical import Shape, solve
from planner.model.keys import LARGEST, MOST_LAYERS, Keys
from planner.model.precision import KV_FORMATS, STORAGE, override


class Described(BaseModel):
    """Base of all tables of a model TOML: frozen, no unknown keys, field docstrings as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, strict=True)


class Experts(Described):
    """`[experts]`: routed experts of the sparse layers."""

    num: int = Field(gt=0, le=LARGEST)
    """Routed experts per sparse layer."""
    top_k: int = Field(gt=0)
    """Experts chosen per token."""
    width: int | None = Field(default=None, gt=0, le=LARGEST)
    """Inner width of one expert; solved when only totals are given."""
    shared_width: int = Field(default=0, ge=0, le=LARGEST)
    """Total width of experts that every token uses."""
    first_dense_layers: int = Field(default=0, ge=0)
    """Leading layers without experts."""
    every: int = Field(default=1, gt=0)
    """One layer in `every` has experts, the last of each group."""
    gated: bool = True
    """Three matrices per expert (SwiGLU) instead of two."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """Slots per expert over the even share; absent for dropless routing."""


class Formats(Described):
    """`[formats]`: how weights and cache are stored."""

    weights: str = "bf16"
    """Experts, attention and dense parts unless named below."""
    experts: str | None = None
    """Routed experts."""
    attention: str | None = None
    """Attention projections."""
    dense: str | None = None
    """Dense feed-forward layers and shared experts."""
    kv: str = "bf16"
    """KV cache: bf16, fp16 or fp8."""


class ModelFile(Described):
    """A whole model TOML."""

    name: str | None = None
    """Display name; the file's name when absent."""
    source: str
    """Where the numbers come from, in one line."""
    assumption: str | None = None
    """Warning printed with every answer about this model."""
    total_params: float | None = Field(default=None, gt=0, le=1e16)
    """All parameters, when the shape is to be solved."""
    active_params: float | None = Field(default=None, gt=0, le=1e16)
    """Parameters per token, embeddings included, when the shape is to be solved."""
    hidden: int | None = Field(default=None, gt=0, le=LARGEST)
    """Width of the residual stream."""
    num_layers: int | None = Field(default=None, gt=0, le=MOST_LAYERS)
    """Decoder layers."""
    num_heads: int | None = Field(default=None, gt=0, le=LARGEST)
    """Query heads."""
    num_kv_heads: int | None = Field(default=None, gt=0, le=LARGEST)
    """Key-value heads; as many as query heads when absent."""
    head_dim: int | None = Field(default=None, gt=0, le=LARGEST)
    """Width of one head; hidden / num_heads when absent."""
    vocab: int | None = Field(default=None, gt=0, le=LARGEST)
    """Tokens of the vocabulary."""
    dense_width: int | None = Field(default=None, gt=0, le=LARGEST)
    """Inner width of layers without experts."""
    gated: bool = True
    """Three matrices per dense layer (SwiGLU) instead of two."""
    window: int | None = Field(default=None, gt=0)
    """Sliding window of all layers in tokens."""
    tied: bool = False
    """Head and embedding share one matrix."""
    max_context: int = Field(default=0, ge=0, le=10**9)
    """Longest context in tokens, 0 when unknown."""
    experts: Experts | None = None
    formats: Formats = Formats()


def load_toml(path: Path) -> ModelConfig:
    """Model described in the TOML at `path`.

    Raises `ModelConfigError` with every fault of the file, one per line.
    """
    return from_toml(tomlfile.read(path, ModelConfigError), path.name, path.stem)


def from_toml(raw: dict[str, Any], file: str, name: str) -> ModelConfig:
    """Model described by the parsed TOML `raw`; `file` is named in errors, `name` is the model's if it has none."""
    try:
        described = ModelFile.model_validate(raw)
    except ValidationError as error:
        shown = error.errors()[: tomlfile.MOST_FAULTS]
        raise ModelConfigError("\n".join(_message(file, dict(e)) for e in shown)) from None
    faults = _faults(described)
    if faults:
        raise ModelConfigError("\n".join(f"{file}: {key}: {text}" for key, text in faults))
    notes: tuple[str, ...] = (described.assumption,) if described.assumption else ()
    if described.total_params is not None:
        described, solved = _solved(described, file)
        notes += solved
    model = _build(described, described.name or name)
    return replace(model, notes=notes, source=described.source)


def _message(file: str, error: dict[str, Any]) -> str:
    """One pydantic fault as `file: dotted.key: message (did you mean ...)`."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{file}: {where}: missing; add it"
    if error["type"] != "extra_forbidden":
        return f"{file}: {where}: {error['msg'][0].lower()}{error['msg'][1:]} (got {error['input']!r:.60})"
    tables: dict[str, type[BaseModel]] = {"experts": Experts, "formats": Formats}
    fields = tables.get(str(error["loc"][0]), ModelFile) if len(error["loc"]) > 1 else ModelFile
    near = difflib.get_close_matches(str(error["loc"][-1]), fields.model_fields, n=1)
    return f"{file}: {where}: unknown key" + (f" (did you mean {near[0]}?)" if near else "; remove it")


def _faults(described: ModelFile) -> list[tuple[str, str]]:
    """Faults that concern more than one key."""
    faults = _format_faults(described.formats)
    experts = described.experts
    if experts is not None and experts.top_k > experts.num:
        faults.append(("experts.top_k", f"{experts.top_k} exceeds experts.num {experts.num}; lower it"))
    if (described.total_params is None) != (described.active_params is None):
        faults.append(("active_params", "total_params and active_params belong together; give both or the shape"))
    if described.total_params is not None and described.active_params is not None:
        if described.active_params > described.total_params:
            faults.append(("active_params", f"{described.active_params:g} exceeds total_params; swap them"))
        return faults
    return faults + _shape_faults(described)


def _format_faults(formats: Formats) -> list[tuple[str, str]]:
    allowed = dict.fromkeys(Formats.model_fields, tuple(STORAGE)) | {"kv": KV_FORMATS[:3]}
    named = formats.model_dump(exclude_none=True)
    return [
        (f"formats.{key}", f"{fmt!r} is not one of {', '.join(allowed[key])}")
        for key, fmt in named.items()
        if fmt not in allowed[key]
    ]


def _shape_faults(described: ModelFile) -> list[tuple[str, str]]:
    needed = ("hidden", "num_layers", "num_heads", "vocab")
    absent = [key for key in needed if getattr(described, key) is None]
    faults = [(key, "missing; add it, or total_params and active_params") for key in absent]
    experts, heads, kv_heads = described.experts, described.num_heads, described.num_kv_heads
    if experts is None and described.dense_width is None:
        faults.append(("dense_width", "missing; add it or an [experts] table"))
    if experts is not None and experts.width is None:
        faults.append(("experts.width", "missing; add it, or total_params and active_params"))
    has_dense = experts is not None and (experts.first_dense_layers > 0 or experts.every > 1)
    if has_dense and described.dense_width is None:
        faults.append(("dense_width", "missing; the layers without experts need it"))
    if heads and kv_heads and heads % kv_heads:
        faults.append(("num_kv_heads", f"{kv_heads} does not divide num_heads {heads}; choose a divisor"))
    if heads and described.hidden and described.head_dim is None and described.hidden % heads:
        faults.append(("num_heads", f"{heads} does not divide hidden {described.hidden}; add head_dim"))
    return faults


def _solved(described: ModelFile, file: str) -> tuple[ModelFile, tuple[str, ...]]:
    """`described` with a shape that has its totals, and the notes that say what was assumed."""
    experts = described.experts
    given = Shape(
        hidden=described.hidden,
        num_layers=described.num_layers,
        vocab=described.vocab,
        num_experts=experts.num if experts else None,
        top_k=experts.top_k if experts else None,
        tied=described.tied,
    )
    total, active = float(described.total_params or 0), float(described.active_params or 0)
    try:
        shape, notes = solve(total, active, given)
    except ModelConfigError as error:
        raise ModelConfigError(f"{file}: active_params: {error}") from None
    update: dict[str, Any] = {
        "hidden": shape.hidden,
        "num_layers": shape.num_layers,
        "vocab": shape.vocab,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "dense_width": shape.width if shape.num_experts is None else None,
    }
    if shape.num_experts is not None and shape.top_k is not None:
        update["experts"] = Experts(num=shape.num_experts, top_k=shape.top_k, width=shape.width)
    return described.model_copy(update=update), notes


def _build(described: ModelFile, name: str) -> ModelConfig:
    hidden, count = described.hidden or 0, described.num_layers or 0
    keys = Keys(
        {"hidden_size": hidden, "vocab_size": described.vocab, "max_position_embeddings": described.max_context},
        name,
        "custom",
    )
    model = assemble(keys, _layers(described, hidden, count), tied=described.tied)
    formats = described.formats
    return override(
        model,
        experts=formats.experts or formats.weights,
        attention=formats.attention or formats.weights,
        dense=formats.dense or formats.weights,
        kv=formats.kv,
    )


def _layers(described: ModelFile, hidden: int, count: int) -> list[Layer]:
    num_heads = described.num_heads or 1
    head_dim = described.head_dim or hidden // num_heads
    attention = gqa(hidden, Heads(num_heads, described.num_kv_heads or num_heads, head_dim, window=described.window))
    kinds: dict[bool, Block] = {}
    if described.dense_width is not None:
        kinds[False] = dense(hidden, described.dense_width, num_matrices=3 if described.gated else 2)
    experts = described.experts
    if experts is None or experts.width is None:
        return [layer([attention], [kinds[False]], norms(hidden))] * count
    block = Moe(
        experts.num,
        experts.top_k,
        experts.width,
        hidden,
        3 if experts.gated else 2,
        shared_width=experts.shared_width,
        capacity_factor=experts.capacity_factor,
    )
    kinds[True] = moe(hidden, block)
    built = {flag: layer([attention], [ffn], norms(hidden)) for flag, ffn in kinds.items()}
    return [built[i >= experts.first_dense_layers and (i + 1) % experts.every == 0] for i in range(count)]
