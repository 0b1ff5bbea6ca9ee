"""Finding a model: bundled Hugging Face configs, aliases, config.json files, directories and model TOMLs."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from planner.errors import ModelConfigError, nearest
from planner.model.config import ModelConfig
from planner.model.huggingface import from_hf

CONFIGS = Path(__file__).parent / "configs"
MAX_BYTES = 5_000_000
_SIDECAR = "hf_quant_config.json"


def load(name_or_path: str) -> ModelConfig:
    """Model by Hugging Face id, alias, config.json, directory with one, or model TOML.

    Ids are looked up in the bundled copies, without case and with or without the owner. Nothing is downloaded.
    Raises `ModelConfigError` with the near names when nothing matches.
    """
    text = str(name_or_path)
    found = _names().get(text.lower().removesuffix(".toml"))
    path = Path(text)
    if found is not None and not (path.suffix in {".json", ".toml"} and path.is_file()):
        return _bundled(found)
    try:
        return _from_path(path, text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelConfigError(f"{text[:200]}: cannot be read: {reason}; check the path") from None


def bundled(name: str) -> ModelConfig:
    """Bundled model of that name; never looks for a file. `ModelConfigError` with the near names otherwise."""
    found = _names().get(name.lower())
    if found is None:
        raise ModelConfigError(f"unknown model {name[:200]!r}; {_near(name)} Or upload its config.json.")
    return _bundled(found)


def catalog() -> tuple[str, ...]:
    """Names of the bundled models: Hugging Face ids, and file names of the described ones."""
    return tuple(sorted(_entries()))


def read_json(path: Path) -> dict[str, Any]:
    """JSON object in `path`.

    Raises `ModelConfigError` for a file above 5 MB, another encoding, malformed JSON, NaN, or another type.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ModelConfigError(f"{path}: {size:,} bytes, a config.json has at most {MAX_BYTES:,}; check the path")
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=_constant)
    except UnicodeDecodeError:
        raise ModelConfigError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except RecursionError:
        raise ModelConfigError(f"{path}: nested too deeply for a config.json; give the config.json") from None
    except ValueError as error:
        raise ModelConfigError(f"{path}: not valid JSON: {error}; copy it again") from None
    if not isinstance(value, dict):
        raise ModelConfigError(f"{path}: holds a JSON {type(value).__name__}, not an object; give a config.json")
    return value


def _constant(text: str) -> float:
    # Nemotron's published configs hold Infinity in keys that are not read; NaN never appears on purpose.
    if text == "NaN":
        raise ValueError("NaN is not a number a config can hold")
    return float(text)


def _from_path(path: Path, text: str) -> ModelConfig:
    if not text.strip():
        raise ModelConfigError(
            "no model given. Use a Hugging Face id such as deepseek-ai/DeepSeek-V3 or a config.json."
        )
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ModelConfigError(f"{text}: no config.json in this directory; give the file or a model name")
    if not path.is_file():
        if path.suffix in (".json", ".toml") or text.startswith((".", "/", "~")):
            raise ModelConfigError(f"{text[:200]}: no such file. Give a config.json, a model TOML or a model name.")
        raise ModelConfigError(f"unknown model {text[:200]!r}; {_near(text)} A config.json or a model TOML also works.")
    if path.suffix == ".toml":
        from planner.model.custom import load_toml  # pydantic is slow to import

        return load_toml(path)
    sidecar = path.parent / _SIDECAR
    name = path.parent.name if path.name == "config.json" else path.stem
    model = from_hf(read_json(path), name or path.stem, read_json(sidecar) if sidecar.is_file() else None)
    return replace(model, source=str(path))


def _near(text: str) -> str:
    return nearest(text, _entries()) if "/" in text else nearest(text, {_short(name) for name in _entries()})


@lru_cache(maxsize=1)
def _sources() -> dict[str, dict[str, str]]:
    """Rows of SOURCES.csv by model name."""
    with (CONFIGS / "SOURCES.csv").open(encoding="utf-8", newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


@lru_cache(maxsize=1)
def _aliases() -> dict[str, dict[str, Any]]:
    """Repositories that share a bundled config, with the precision of their own checkpoint."""
    with (CONFIGS / "aliases.toml").open("rb") as file:
        return tomllib.load(file)


@lru_cache(maxsize=1)
def _entries() -> frozenset[str]:
    return frozenset(_sources()) | {name for name in _aliases() if "/" in name}


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()


@lru_cache(maxsize=1)
def _names() -> dict[str, str]:
    """Lower-case spelling -> bundled name: full ids, their last parts, and the short aliases."""
    entries = sorted(_entries())
    names = {_short(name): name for name in reversed(entries)}
    names |= {name.lower(): name for name in entries}
    return names | {alias.lower(): alias for alias in _aliases()}


@lru_cache(maxsize=256)
def _bundled(name: str) -> ModelConfig:
    alias = _aliases().get(name)
    if alias is not None:
        return _aliased(name, alias)
    row = _sources()[name]
    source = f"{row['where_found']} @ {row['commit_or_version']}".removesuffix(" @ ")
    path = CONFIGS / row["file"]
    if path.suffix == ".toml":
        from planner.model.custom import load_toml

        return load_toml(path)
    model = from_hf(read_json(path), name, _sidecar(path))
    notes = model.notes
    if row["confidence"].startswith("E"):
        notes += ("config reconstructed, not a verbatim copy: " + row["note"],)
    return replace(model, source=source, notes=notes)


def _sidecar(path: Path) -> dict[str, Any] | None:
    sidecar = path.with_name(f"{path.stem}.{_SIDECAR}")
    return read_json(sidecar) if sidecar.is_file() else None


def _aliased(name: str, alias: Mapping[str, Any]) -> ModelConfig:
    base = alias["base"]
    if "quantization" not in alias:
        model = _bundled(base)
        return model if "/" not in name else replace(model, name=name, notes=_with_note(model, alias))
    config = read_json(CONFIGS / _sources()[base]["file"])
    model = from_hf(config | {"quantization_config": alias["quantization"]}, name)
    return replace(model, source=_bundled(base).source, notes=_with_note(model, alias))


def _with_note(model: ModelConfig, alias: Mapping[str, Any]) -> tuple[str, ...]:
    return (*model.notes, alias["note"]) if alias.get("note") else model.notes
