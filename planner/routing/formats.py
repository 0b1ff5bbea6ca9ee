"""Reading routing records from files, without running anything that is in them.

    .csv            layer,expert,assignments and optionally model, domain, dataset, task
    .npz            expert_ids, num_experts [, sequence_lengths, first_moe_layer, top_k], or an engine's arrays
    .npy            routed_experts of one request
    .json .jsonl    an engine's dump: one object, a list of objects or one object per line
    .pt .pth        SGLang's recorder

Which engine wrote a dump is told by its keys (`engine_dumps`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from planner.arrayfile import read_array, read_arrays
from planner.errors import WorkloadError, nearest
from planner.routing.count_files import read_counts
from planner.routing.engine_dumps import numbers, sglang_passes, sglang_stat, vllm_requests
from planner.routing.records import Record, mixture, record_from_ids
from planner.routing.torch_files import read_torch
from planner.textfile import check_file, parse_json, read_text

Groups = dict[str, Record]
MAX_TEXT_BYTES = 2e8
"""Largest CSV or JSON; parsed it takes about ten times as much memory."""
MAX_ARRAY_BYTES = 4e9
"""Largest unpacked array file."""
_SHORTER = "Record a shorter stretch"
_PLAIN_ARRAYS = (
    "It is damaged, or holds Python objects, which are never loaded: save plain numbers with numpy.savez or numpy.save."
)
_KEYS = ("expert_ids", "routed_experts", "logical_count", "records", "topk_ids_of_layer", "global_physical_count")


def read_records(path: Path, select: str | None = None, num_experts: int | None = None) -> tuple[Record, ...]:
    """Records in a file: the only one, or those that `select` names.

    Parameters
    ----------
    path
        CSV, `.npz`, `.npy`, `.json`, `.jsonl` or `.pt` file.
    select
        A group such as `Mixtral-8x7B/arxiv`, or a part of one such as `arxiv`, which may name several. SGLang
        passes are grouped into prefill, decode and mixed, and taken together without `select`.
    num_experts
        Experts of the model, for formats that do not tell (vLLM).

    Raises
    ------
    WorkloadError
        The file is missing, empty, too large, malformed, or `select` fits nothing or is needed.
    """
    if path.suffix.lower() not in READERS:
        raise WorkloadError(f"{path}: suffix {path.suffix!r} is no routing record. {nearest(path.suffix, READERS)}")
    try:
        _check_size(path)
        groups = READERS[path.suffix.lower()](path, num_experts)
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile, NotImplementedError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise WorkloadError(f"{path}: cannot be read ({reason}). Check the path.") from error
    return _selected(groups, select, path)


def read_record(path: Path, select: str | None = None, num_experts: int | None = None) -> Record:
    """The record in a file like `read_records`; several selected groups are mixed."""
    return mixture(read_records(path, select, num_experts), f"{path}:{select}" if select else str(path))


def _check_size(path: Path) -> None:
    is_text = path.suffix.lower() in (".csv", ".json", ".jsonl")
    limit = MAX_TEXT_BYTES if is_text else MAX_ARRAY_BYTES
    if check_file(path, WorkloadError, limit, _SHORTER + (" or save it as .npz." if is_text else ".")) == 0:
        raise WorkloadError(f"{path}: the file is empty")


def _selected(groups: Groups, select: str | None, path: Path) -> tuple[Record, ...]:
    names = [name for name in groups if name]
    if select is None:
        if "" in groups:
            return (groups[""],)
        if len(groups) == 1:
            return tuple(groups.values())
        raise WorkloadError(f"{path}: {len(names)} records; select one of {', '.join(names)}")
    if select in names:
        return (groups[select],)
    found = tuple(groups[name] for name in names if select in name.split("/"))
    if not found:
        hint = nearest(select, names) if names else "it holds one record without a name; leave select away"
        raise WorkloadError(f"{path}: no record {select!r}: {hint}")
    return found


def _read_csv(path: Path, num_experts: int | None) -> Groups:
    return read_counts(path, MAX_TEXT_BYTES)


def _read_npz(path: Path, num_experts: int | None) -> Groups:
    return _from_documents([read_arrays(path, WorkloadError, MAX_ARRAY_BYTES, _PLAIN_ARRAYS)], path, num_experts)


def _read_npy(path: Path, num_experts: int | None) -> Groups:
    array = read_array(path, WorkloadError, MAX_ARRAY_BYTES, _PLAIN_ARRAYS)
    return _from_documents([{"routed_experts": array}], path, num_experts)


def _read_json(path: Path, num_experts: int | None) -> Groups:
    text = read_text(path, WorkloadError, MAX_TEXT_BYTES)
    lines = text.splitlines() if path.suffix.lower() == ".jsonl" else [text]
    parsed = [parse_json(line, path, WorkloadError) for line in lines if line.strip()]
    return _from_documents([d for p in parsed for d in (p if isinstance(p, list) else [p])], path, num_experts)


def _read_pt(path: Path, num_experts: int | None) -> Groups:
    return _from_documents([read_torch(path, MAX_ARRAY_BYTES)], path, num_experts)


READERS: dict[str, Callable[[Path, int | None], Groups]] = {
    ".csv": _read_csv,
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".pt": _read_pt,
    ".pth": _read_pt,
}
"""Suffix -> reader; a reader gives the groups of a file by name, "" being all of it."""


def _from_documents(documents: Sequence[Any], path: Path, num_experts: int | None) -> Groups:
    """Records of parsed objects of one kind, which their keys tell."""
    source = str(path)
    if not documents or not all(isinstance(d, Mapping) for d in documents):
        raise WorkloadError(f"{path}: expected an object with one of the keys {', '.join(_KEYS)}")
    first = documents[0]
    key = next((k for k in _KEYS if k in first), None)
    if key is None:
        raise WorkloadError(f"{path}: keys {', '.join(map(str, first)) or 'none'}; expected one of {', '.join(_KEYS)}")
    other = next((d for d in documents if key not in d), None)
    if other is not None and key not in ("topk_ids_of_layer", "global_physical_count"):
        raise WorkloadError(f"{path}: an object without {key} among others that have it; keep one kind per file")
    if key == "logical_count":
        return {"": mixture([sglang_stat(d, source) for d in documents], source)}
    if key == "expert_ids":
        return {"": mixture([_from_ids(d, num_experts, source) for d in documents], source)}
    if key == "routed_experts":
        experts = _num_experts(first, num_experts, source)
        return {"": vllm_requests([d[key] for d in documents], experts, source)}
    return sglang_passes(documents, source)


def _from_ids(document: Mapping[str, Any], num_experts: int | None, source: str) -> Record:
    ids = numbers(document["expert_ids"], "expert_ids", source)
    top_k = _whole(document, "top_k", source)
    if ids.ndim != 3 or top_k not in (None, ids.shape[2]):
        raise WorkloadError(
            f"{source}: expert_ids of shape {ids.shape} for top_k {top_k}; give [layers, tokens, top_k]"
        )
    first = _whole(document, "first_moe_layer", source) or 0
    lengths = document.get("sequence_lengths")
    return record_from_ids(
        ids,
        _num_experts(document, num_experts, source),
        source,
        np.arange(first, first + len(ids)),
        None if lengths is None else numbers(lengths, "sequence_lengths", source),
    )


def _num_experts(document: Mapping[str, Any], num_experts: int | None, source: str) -> int:
    experts = _whole(document, "num_experts", source) or num_experts
    if experts is None:
        raise WorkloadError(f"{source} does not tell how many experts the model has; name the model (--model)")
    return experts


def _whole(document: Mapping[str, Any], key: str, source: str) -> int | None:
    """The whole number called `key`, None where there is none."""
    if document.get(key) is None:
        return None
    value = numbers(document[key], key, source)
    if value.ndim or value.dtype.kind not in "iu":
        raise WorkloadError(f"{source}: {key} is {value}, not a whole number")
    return int(value)
