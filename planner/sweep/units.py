"""Work units: one command each, with every file that it reads."""

from __future__ import annotations

import hashlib
import itertools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from planner.errors import InputError
from planner.sweep.description import AUTO, Description

MAX_UNITS = 100_000
Value = str | int | float | None
Files = tuple[tuple[str, bytes], ...]
_MODEL_FILES = ("config.json", "hf_quant_config.json")


@dataclass(frozen=True, slots=True)
class Unit:
    """One command of `moeplan`: its `arguments`, where it lies on the axes, and the files that it reads.

    File names are relative, begin with the hash of the content, and appear so in `arguments`: the same unit gives the
    same bytes on every machine, and a changed file makes another unit.
    """

    number: int
    point: tuple[tuple[str, Value], ...]
    arguments: tuple[str, ...]
    files: Files = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What a unit answered: exit code of the command, what it said on stderr, the facts it printed as JSON."""

    exit_code: int
    message: str
    facts: dict[str, Any] | None


def units(description: Description, folder: Path = Path()) -> tuple[Unit, ...]:
    """All units in the order of the axes; file names are relative to `folder`.

    Raises InputError when there are more than a sweep takes, or a file cannot be carried.
    """
    loads: list[tuple[str, float]] = [("rate", rate) for rate in description.rate]
    loads += [("concurrency", users) for users in description.concurrency]
    of = description
    axes = (of.model, of.cluster, of.workload, loads or [("", 0.0)], of.layout, of.engine, of.slo, of.seed)
    count = 1
    for axis in axes:
        count *= len(axis)
    if count > MAX_UNITS:
        raise InputError(f"the sweep has {count:,} units; at most {MAX_UNITS:,} are run. Shorten an axis.")
    options, option_files = _options(description.options, folder)
    carried = {text: _carried(text, folder) for axis in (of.model, of.cluster, of.workload, of.engine) for text in axis}
    found = []
    for number, (model, cluster, workload, (load, amount), layout, engine, slo, seed) in enumerate(
        itertools.product(*axes)
    ):
        point: dict[str, Value] = {"model": model, "cluster": cluster, "workload": workload}
        point |= {"rate": None, "concurrency": None}
        point |= {load: amount} if load else {}
        point |= {"layout": layout, "engine": engine, "slo": slo, "seed": seed}
        files = {file for text in (model, cluster, workload, engine) for file in carried[text][1]}
        names = {text: name for text, (name, _) in carried.items()}
        arguments = (*_arguments(point, names), *options)
        found.append(Unit(number, tuple(point.items()), arguments, tuple(sorted(files | set(option_files)))))
    return tuple(found)


def _arguments(point: dict[str, Value], names: dict[str, str]) -> tuple[str, ...]:
    """The command at `point`; `names` are where carried files will lie."""
    layout = point["layout"]
    arguments = ["plan" if layout == AUTO else "simulate", names[str(point["model"])]]
    for name, value in point.items():
        if name == "model" or value is None or value == layout == AUTO:
            continue
        text = str(value)
        arguments += [f"--{name}", names[text] if name in ("cluster", "workload", "engine") else text]
    return tuple(arguments)


def _options(options: dict[str, Any], folder: Path) -> tuple[tuple[str, ...], Files]:
    """Further options as arguments, and the files they name."""
    arguments: list[str] = []
    files: list[tuple[str, bytes]] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments += [flag] if value else []
            continue
        for item in value if isinstance(value, list) else [value]:
            text, held = _carried(str(item), folder)
            arguments += [flag, text]
            files += held
    return tuple(arguments), tuple(files)


def _carried(text: str, folder: Path) -> tuple[str, Files]:
    """`text` with the file or model folder that it names, alone or before a colon, and what lies in it."""
    for name in (text, text.rpartition(":")[0]):
        path = folder / name
        if name and path.is_dir() and (path / _MODEL_FILES[0]).is_file():
            read = [path / part for part in _MODEL_FILES if (path / part).is_file()]
            place = f"inputs/{_digest(read)}/{path.resolve().name}"
            return place + text[len(name) :], tuple((f"{place}/{p.name}", _bytes(p)) for p in read)
        if name and path.suffix and path.is_file():
            beside = [path, *_named_beside(path)]
            place = f"inputs/{_digest(beside)}"
            held = tuple((f"{place}/{p.relative_to(path.parent).as_posix()}", _bytes(p)) for p in beside)
            return f"{place}/{path.name}" + text[len(name) :], held
    return text, ()


def _named_beside(path: Path) -> list[Path]:
    """Files that a TOML names relative to itself. InputError for one outside its folder."""
    if path.suffix != ".toml":
        return []
    try:
        tables = tomllib.loads(_bytes(path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return []  # the command that reads it says what is wrong
    found = []
    for name in sorted(set(_texts(tables))):
        if "\n" in name or "\0" in name or len(name) > 255 or not PurePosixPath(name).suffix:
            continue
        if not (path.parent / name).is_file():
            continue
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{path} names {name}: a sweep carries files beside or below the TOML. Move it there.")
        found.append(path.parent / name)
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error


def _digest(paths: list[Path]) -> str:
    return hashlib.sha256(b"\0".join(_bytes(path) for path in paths)).hexdigest()[:12]
