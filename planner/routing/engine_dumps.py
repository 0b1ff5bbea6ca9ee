"""Routing recorded by serving engines, after the file is parsed: SGLang's recorder and vLLM's routed experts.

SGLang (`python/sglang/srt/eplb/expert_distribution.py` @02295fe5): mode stat dumps `logical_count`
[steps, layers, experts]; modes per_pass and per_token dump `records` with `global_physical_count`
[layers, slots], and per_token also `topk_ids_of_layer` [layers, tokens, k] of slots; each rank writes its own.
vLLM (`routed_experts_capturer.py` @00bd1493): `routed_experts` [tokens, layers, k] of logical experts per request.
Both number all layers of the model; layers without experts stay empty (SGLang 0 or -1, vLLM 0) and are left out.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.arrayfile import array_of
from planner.errors import WorkloadError
from planner.routing.experts import Floats
from planner.routing.records import MAX_COUNT, MAX_EXPERTS, Record, record_from_counts, record_from_ids

Document = Mapping[str, Any]
_WINDOWS = 64
"""Stretches of time kept of a recording; a lag correlation over fewer steps is mostly noise."""
_MAP_KEYS = ("last_physical_to_logical_map", "physical_to_logical_map")
_PHASES = {1: "prefill", 2: "decode", 3: "mixed"}
"""SGLang's ForwardMode: EXTEND, DECODE, MIXED."""


def sglang_stat(document: Document, source: str) -> Record:
    """Record of `logical_count`, [steps, layers, experts] or [layers, experts], of mode stat or stat_approx."""
    steps = numbers(document["logical_count"], "logical_count", source)
    if steps.ndim == 2:
        steps = steps[None]
    if steps.ndim != 3 or not steps.size:
        raise WorkloadError(f"{source}: logical_count of shape {steps.shape}; expected [steps, layers, experts]")
    return _from_steps(steps.astype(float), source)


def sglang_passes(documents: Sequence[Document], source: str) -> dict[str, Record]:
    """Records by phase ("" for all passes together) of the passes in `documents`, each a dump or a single pass."""
    slots = next((d[key] for d in documents for key in _MAP_KEYS if d.get(key) is not None), None)
    if slots is None:
        raise WorkloadError(f"{source}: counts of physical experts need {_MAP_KEYS[0]} beside them to be read")
    to_logical = numbers(slots, _MAP_KEYS[0], source)
    if to_logical.ndim != 2 or to_logical.dtype.kind not in "iu" or not _are_experts(to_logical):
        raise WorkloadError(
            f"{source}: {_MAP_KEYS[0]} of shape {to_logical.shape}; expected [layers, slots] of experts"
        )
    lists = [d.get("records", [d]) for d in documents]
    if not all(isinstance(passes, Sequence) and all(isinstance(p, Mapping) for p in passes) for passes in lists):
        raise WorkloadError(f"{source}: records is no list of passes")
    passes = [p for passes in lists for p in passes if "topk_ids_of_layer" in p or "global_physical_count" in p]
    if not passes:
        raise WorkloadError(f"{source}: no recorded pass; start the recorder before the traffic and dump after it")
    groups: dict[str, list[Document]] = {"": passes}
    for one in passes:
        if isinstance(mode := one.get("forward_mode"), int) and mode in _PHASES:
            groups.setdefault(_PHASES[mode], []).append(one)
    return {
        phase: _from_passes(chosen, to_logical, f"{source}:{phase}" if phase else source)
        for phase, chosen in groups.items()
    }


def vllm_requests(requests: Sequence[Any], num_experts: int, source: str) -> Record:
    """Record of one `routed_experts` [tokens, layers, k] per request: nested lists, arrays or base64 of `.npy`."""
    arrays = [numbers(request, "routed_experts", source) for request in requests]
    arrays = [a for a in arrays if a.size or a.ndim != 3]
    shapes = {a.shape[1:] for a in arrays}
    if len(shapes) != 1 or any(a.ndim != 3 for a in arrays):
        raise WorkloadError(
            f"{source}: routed_experts of shapes {sorted(str(a.shape) for a in arrays)[:3]}; "
            "expected [tokens, layers, k] with the same layers and k in every request"
        )
    ids = np.concatenate(arrays).transpose(1, 0, 2)
    layers = np.flatnonzero((ids != 0).any(axis=(1, 2)))
    if not layers.size:
        raise WorkloadError(f"{source}: every routed expert is 0; nothing was recorded")
    return record_from_ids(ids[layers], num_experts, source, layers, [len(a) for a in arrays])


def numbers(value: Any, key: str, source: str) -> NDArray[Any]:
    """`value` as a numeric array; text is taken for base64 of a `.npy` file. Raises WorkloadError."""
    if isinstance(value, str):
        try:
            raw = base64.b64decode(value, validate=True)
            value = array_of(io.BytesIO(raw), len(raw))
        except Exception as error:  # a damaged header can raise nearly anything
            raise WorkloadError(f"{source}: {key} is no base64 of a .npy file of plain numbers") from error
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise WorkloadError(f"{source}: {key} cannot be read as an array; give rows of equal length") from error
    if array.dtype.kind not in "iuf":
        raise WorkloadError(f"{source}: {key} holds {array.dtype}, not numbers")
    return array


def _are_experts(ids: NDArray[Any]) -> bool:
    return bool(ids.size) and 0 <= ids.min() <= ids.max() < MAX_EXPERTS


def _from_steps(steps: Floats, source: str) -> Record:
    """Record of counts [steps, layers, experts]; steps of an unfilled buffer and layers without experts are empty."""
    if not ((steps >= 0) & (steps <= MAX_COUNT)).all():
        raise WorkloadError(
            f"{source}: counts from {steps.min():g} to {steps.max():g}; a count is a number from 0 to {MAX_COUNT:.1e}"
        )
    steps = steps[(steps != 0).any(axis=(1, 2))]
    layers = np.flatnonzero((steps != 0).any(axis=(0, 2)))
    if not layers.size:
        raise WorkloadError(f"{source}: all counts are 0; start the recorder before the traffic and dump after it")
    steps = steps[:, layers]
    plain = record_from_counts(steps.sum(axis=0), source, layers)
    if len(steps) == 1:
        return plain
    starts = np.linspace(0, len(steps), min(_WINDOWS, len(steps)), endpoint=False).astype(int)
    return record_from_counts(plain.counts, source, layers, windows=np.add.reduceat(steps, starts, axis=0))


def _from_passes(passes: Sequence[Document], to_logical: NDArray[Any], source: str) -> Record:
    if all("topk_ids_of_layer" in one for one in passes):
        return _from_token_passes(passes, to_logical, source)
    rows = np.arange(to_logical.shape[0])[:, None]
    steps = np.zeros((len(passes), to_logical.shape[0], int(to_logical.max()) + 1))
    for step, one in zip(steps, passes, strict=True):
        counts = numbers(one.get("global_physical_count"), "global_physical_count", source)
        if counts.shape != to_logical.shape:
            raise WorkloadError(
                f"{source}: global_physical_count of shape {counts.shape} for a map of {to_logical.shape}; "
                "give the map that was in force while recording"
            )
        np.add.at(step, (rows, to_logical), counts)
    return _from_steps(steps, source)


def _from_token_passes(passes: Sequence[Document], to_logical: NDArray[Any], source: str) -> Record:
    """Every extended sequence of a pass is a sequence; a decoded token is one of its own."""
    pieces = [_tokens_of_pass(one, to_logical, source) for one in passes]
    pieces = [(slots, lengths) for slots, lengths in pieces if slots.shape[1]]
    if len({slots.shape[2] for slots, _ in pieces}) != 1:
        raise WorkloadError(f"{source}: no tokens, or another top_k in each pass; record one model under traffic")
    slots, sizes = np.concatenate([p[0] for p in pieces], axis=1), np.concatenate([p[1] for p in pieces])
    layers = np.flatnonzero((slots >= 0).any(axis=(1, 2)))
    slots = slots[layers]
    # The recorder has room for eight picks: columns no pick fills and tokens that only pad a batch hold -1.
    slots = slots[:, :, (slots >= 0).any(axis=(0, 1))]
    real = (slots >= 0).all(axis=(0, 2))
    if not layers.size or not real.any():
        raise WorkloadError(f"{source}: no token with recorded experts; record a stretch with traffic")
    kept = np.bincount(np.repeat(np.arange(sizes.size), sizes)[real], minlength=sizes.size)
    ids = to_logical[layers[:, None, None], slots[:, real]]
    return record_from_ids(ids, int(to_logical.max()) + 1, source, layers, kept[kept > 0])


def _tokens_of_pass(
    one: Document, to_logical: NDArray[Any], source: str
) -> tuple[NDArray[np.signedinteger[Any]], NDArray[np.integer[Any]]]:
    """Slots [layers, tokens, room] of one pass, -1 where there is none, and tokens per sequence."""
    slots = numbers(one["topk_ids_of_layer"], "topk_ids_of_layer", source)
    if not slots.size:
        return np.zeros((len(to_logical), 0, 0), np.int64), np.zeros(0, np.int64)
    fits = slots.ndim == 3 and len(slots) == len(to_logical) and slots.dtype.kind == "i"
    if not fits or slots.max(initial=-1) >= to_logical.shape[1]:
        raise WorkloadError(
            f"{source}: topk_ids_of_layer of shape {slots.shape} with slots up to {slots.max(initial=-1)} for a "
            f"map of {to_logical.shape}; record with --disable-shared-experts-fusion"
        )
    known = one.get("extend_seq_lens")
    lengths = np.ones(slots.shape[1], np.int64) if known is None else numbers(known, "extend_seq_lens", source)
    wrong = lengths.ndim != 1 or (lengths.dtype.kind not in "iu" and lengths.size) or lengths.min(initial=0) < 0
    if wrong or lengths.sum() != slots.shape[1]:
        raise WorkloadError(f"{source}: extend_seq_lens {lengths.tolist()} for {slots.shape[1]} tokens")
    return slots, lengths
