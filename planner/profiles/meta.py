"""`meta.json`: where a profile comes from. One schema for measured and for compiled profiles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import ProfileError
from planner.textfile import is_file, read_json

Meta = dict[str, Any]

_FIELDS: dict[str, tuple[str, str]] = {
    "schema_version": ("integer", "version of the compiled tables"),
    "system": ("string", "name of the hardware profile"),
    "device": ("string", "GPU as its driver calls it"),
    "driver": ("string", "driver version"),
    "cuda_or_rocm": ("string", "`CUDA <version>` or `ROCm <version>`"),
    "nccl": ("string", "NCCL or RCCL version"),
    "torch": ("string", "PyTorch version"),
    "clocks": ("object", "SM and memory clocks before and after [MHz]"),
    "world_size": ("integer", "processes that measured"),
    "num_nodes": ("integer", "nodes they ran on"),
    "is_representative": ("boolean", "false where the times say nothing about a GPU (measured on a CPU)"),
    "topology": ("string", "links between the GPUs as the driver prints them"),
    "date": ("string", "day of the measurement"),
    "converted": ("string", "day of the conversion to compiled tables"),
    "command": ("string", "command that measured"),
    "source": ("string", "who measured, with version"),
    "license": ("string", "licence of the numbers"),
    "attribution": ("string", "sentence to print wherever they are used"),
    "engines": ("array", "engines with at least one table"),
    "versions": ("object", "version of every engine, per operation"),
    "rows": ("object", "rows per compiled table"),
    "dropped": ("object", "rows left out, per table and reason"),
    "skipped": ("object", "source tables not imported, with the reason"),
    "files": ("array", "source files with their SHA-256"),
}
REQUIRED = ("device", "source", "license", "engines")

META_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {name: {"type": kind, "description": text} for name, (kind, text) in _FIELDS.items()},
    "required": list(REQUIRED),
}


def read_meta(path: Path) -> Meta:
    """Contents of meta.json. Raises ProfileError when it is not there or not a JSON object."""
    if not is_file(path):
        raise ProfileError(f"{path}: no such file. A profile folder holds meta.json and one table per operation.")
    found = read_json(path, ProfileError)
    if not isinstance(found, dict):
        raise ProfileError(f"{path}: a JSON object is expected, not {type(found).__name__}")
    return found


def write_meta(path: Path, meta: Mapping[str, Any]) -> None:
    """Write meta.json so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
