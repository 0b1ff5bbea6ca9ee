"""Placement files: SGLang's initial expert location, vLLM's physical-to-logical map, vLLM Ascend's map, CSV, npz.

| name | file | content |
|---|---|---|
| sglang | .json | `{"physical_to_logical_map": [[...]]}`, a row for every layer of the model, dense ones too |
| vllm | .json | `[[...]]`, a row for every MoE layer |
| vllm-ascend | .json | `{"moe_layer_count": L, "layer_list": [{"device_list": [{"device_expert": [...]}]}]}` |
| csv | .csv | `layer,slot,expert` |
| npz | .npz | array `physical_to_logical_map` [layers, slots] |

Sources: sglang `eplb/expert_location.py` (`--init-expert-location`), vLLM `distributed/eplb/eplb_state.py`,
vllm-ascend `ops/expert_load_balancer.py` (`expert_map_path`).
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from planner.arrayfile import read_arrays
from planner.errors import InputError, LayoutError, nearest
from planner.placement.mapping import Ints, Placement
from planner.textfile import opened, read_json

MAX_BYTES = 64_000_000
"""Largest file read; 100 layers of 1,000 slots take a megabyte."""
_KEY = "physical_to_logical_map"
_COLUMNS = ["layer", "slot", "expert"]


def read_placement(
    path: Path, num_experts: int, num_ranks: int, *, num_nodes: int = 1, layers: Sequence[int] | None = None
) -> Placement:
    """Placement in a file of any format above; raises InputError or LayoutError, which name layer and expert.

    `layers`: numbers of the MoE layers in the model, from 0. A file with one row gives it to all of them; a file
    with more rows than layers has a row for every layer of the model, of which those are taken.
    """
    readers = {".json": _from_json, ".csv": _from_csv, ".npz": _from_npz}
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth"):
        raise InputError(
            f"{path}: torch files are not read. Save it as JSON: "
            f"json.dump({{'{_KEY}': torch.load(f, weights_only=True)['{_KEY}'].tolist()}}, out)"
        )
    if suffix not in readers:
        raise InputError(f"{path}: a placement file is {', '.join(readers)}, not {suffix or 'a name without suffix'}")
    rows = readers[suffix](path)
    try:
        return Placement(path.name, _table(rows, layers, path), num_experts, num_ranks, num_nodes)
    except LayoutError as error:
        raise LayoutError(f"{path}: {error}") from error


def write_placement(placement: Placement, path: Path, format: str, *, layers: Sequence[int] | None = None) -> None:
    """Write `placement` in one of `FORMATS`; the file appears whole or not at all.

    `layers`: numbers of the rows in the model, from 0; 0, 1, 2... otherwise. SGLang's file gets experts in order of
    their ids for the layers between. Raises InputError on an unknown format, a wrong suffix or an unwritable path.
    """
    if format not in FORMATS:
        raise InputError(f"placement format {format!r} is unknown: {nearest(format, FORMATS)}")
    suffix = ".csv" if format == "csv" else ".npz" if format == "npz" else ".json"
    if path.suffix.lower() != suffix:
        raise InputError(f"{path}: format {format} is a {suffix} file. Use {path.with_suffix(suffix)}.")
    numbers = list(range(placement.num_layers)) if layers is None else [int(layer) for layer in layers]
    if len(numbers) != placement.num_layers:
        raise LayoutError(f"{len(numbers)} layer numbers for a placement of {placement.num_layers} layers")
    content = FORMATS[format](placement, numbers)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise InputError(f"{path}: {error.strerror}. Choose a file you may write to.") from error


def _to_sglang(placement: Placement, layers: list[int]) -> bytes:
    rows = np.tile(np.arange(placement.num_slots) % placement.num_experts, (max(layers) + 1, 1))
    rows[layers] = placement.physical_to_logical
    return _json({_KEY: rows.tolist()})


def _to_vllm(placement: Placement, layers: list[int]) -> bytes:
    return _json(placement.physical_to_logical.tolist())


def _to_ascend(placement: Placement, layers: list[int]) -> bytes:
    ranks = placement.physical_to_logical.reshape(placement.num_layers, placement.num_ranks, -1).tolist()
    listed = [
        {
            "layer_id": layer,
            "device_count": placement.num_ranks,
            "device_list": [{"device_id": rank, "device_expert": held} for rank, held in enumerate(row)],
        }
        for layer, row in enumerate(ranks)
    ]
    return _json({"moe_layer_count": placement.num_layers, "layer_list": listed})


def _to_csv(placement: Placement, layers: list[int]) -> bytes:
    lines = [",".join(_COLUMNS)]
    for layer, row in zip(layers, placement.physical_to_logical.tolist(), strict=True):
        lines += [f"{layer},{slot},{expert}" for slot, expert in enumerate(row)]
    return ("\n".join(lines) + "\n").encode()


def _to_npz(placement: Placement, layers: list[int]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, physical_to_logical_map=placement.physical_to_logical)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[Placement, list[int]], bytes]] = {
    "sglang": _to_sglang,
    "vllm": _to_vllm,
    "vllm-ascend": _to_ascend,
    "csv": _to_csv,
    "npz": _to_npz,
}
"""Format name -> function of a placement and its layer numbers that returns the file."""


def _json(value: Any) -> bytes:
    return (json.dumps(value, separators=(",", ":")) + "\n").encode()


def _from_json(path: Path) -> Any:
    content = read_json(path, InputError, MAX_BYTES)
    if isinstance(content, dict) and "layer_list" in content:
        try:
            layers = content["layer_list"]
            return [list(chain(*[device["device_expert"] for device in layer["device_list"]])) for layer in layers]
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: layer_list without device_list and device_expert: not a map") from error
    if isinstance(content, dict):
        if "logical_count" in content and _KEY not in content:
            raise InputError(f"{path}: it holds counts (logical_count), no placement. Give it as --counts.")
        if _KEY not in content:
            raise InputError(f"{path}: no key {_KEY}: {nearest(_KEY, content) if content else 'the object is empty.'}")
        content = content[_KEY]
    return content


def _from_csv(path: Path) -> Any:
    with opened(path, InputError, MAX_BYTES) as file:
        lines = csv.reader(file)
        header = [name.strip() for name in next(lines, [])]
        if header != _COLUMNS:
            raise InputError(f"{path}: columns {','.join(header)!r}; a placement has {','.join(_COLUMNS)}")
        cells: dict[int, dict[int, int]] = {}
        for line in filter(None, lines):
            try:
                layer, slot, expert = map(int, line)
            except ValueError as error:
                raise InputError(
                    f"{path}: line {lines.line_num}: {','.join(line)!r} is not three whole numbers"
                ) from error
            if slot in cells.setdefault(layer, {}):
                raise InputError(f"{path}: line {lines.line_num}: layer {layer}, slot {slot} a second time")
            cells[layer][slot] = expert
    for layer, row in cells.items():
        gap = next((slot for slot in range(len(row)) if slot not in row), None)
        if gap is not None:
            raise InputError(f"{path}: layer {layer} has no slot {gap}, but {len(row)} slots. Number them from 0.")
    return [[row[slot] for slot in range(len(row))] for _, row in sorted(cells.items())]


def _from_npz(path: Path) -> Any:
    arrays = read_arrays(path, InputError, MAX_BYTES)
    if _KEY not in arrays:
        raise InputError(f"{path}: no array {_KEY}: {nearest(_KEY, arrays)}")
    return arrays[_KEY].tolist()


def _table(rows: Any, layers: ArrayLike | None, path: Path) -> Ints:
    """Rows of a file as [layers, slots] after checking that they are lists of whole numbers of one length."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise InputError(f"{path}: a placement is a list of layers, each a list of expert ids")
    for layer, row in enumerate(rows):
        wrong = [v for v in row if type(v) is not int or abs(v) >= 2**31]
        if wrong:
            raise InputError(f"{path}: row {layer}: {wrong[0]!r} is not an expert id")
        if len(row) != len(rows[0]) or not row:
            raise InputError(
                f"{path}: row {layer} has {len(row)} slots, row 0 has {len(rows[0])}. "
                "Give every layer the same number of slots."
            )
    table = np.array(rows, dtype=np.int64)
    if layers is None:
        return table
    wanted = np.asarray(layers, dtype=np.int64)
    if len(table) in (1, len(wanted)):
        return np.repeat(table, len(wanted) // len(table), axis=0)
    if len(table) <= wanted.max():
        raise LayoutError(f"{len(table)} rows for {len(wanted)} MoE layers, of which the last is layer {wanted.max()}")
    return np.asarray(table[wanted])
