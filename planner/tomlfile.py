"""TOML files as dataclasses: every fault of a file in one message, and the way back to text.

The dataclass is the schema: its fields are the keys, its annotations (`annotated_types` included) what they may be, its
`__post_init__` what must hold between them. Beside a key `frontend_s` a file may state `frontend_s_source`, or
`frontend_source` for all keys that begin so; these are collected, not validated as facts.
"""

from __future__ import annotations

import json
import re
import tomllib
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from planner.errors import InputError, nearest
from planner.textfile import read_text

Tables = dict[str, Any]
_T = TypeVar("_T")
_SUFFIX = "_source"
_HIDDEN_VALUE = 60
"""Longer offending values are left out of a message."""
MOST_BYTES = 1_000_000
"""Largest TOML; ours have some kilobytes."""
MOST_FAULTS = 20
"""Faults of a file that are shown; each is compared with the known keys, which takes time."""
_MOST_DOTS = 20
_KEY_ENDS = re.compile(r"[=\[\]{},\n]")
_QUOTED = re.compile(r"\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'")


def parse(text: str, where: str, error: type[InputError] = InputError) -> Tables:
    """Tables of a TOML text; `error` naming the file `where` and the line when it is not TOML."""
    # tomllib takes time quadratic in the parts of a dotted key.
    if max(piece.count(".") for piece in _KEY_ENDS.split(text)) > _MOST_DOTS and _has_long_key(text):
        raise error(f"{where}: a key of more than {_MOST_DOTS} parts. Is it the right file?")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise error(f"{where}: not valid TOML: {fault}.") from fault
    except RecursionError as fault:
        raise error(f"{where}: nested too deeply. Is it the right file?") from fault
    except ValueError as fault:  # a number of thousands of digits, a date that is none
        raise error(f"{where}: not valid TOML: {str(fault).partition(';')[0]}.") from fault


def _has_long_key(text: str) -> bool:
    """True when the text outside of quotes has a key of too many parts."""
    plain = re.sub(r"\.{2,}", "", _QUOTED.sub("q", text))
    return max(piece.count(".") for piece in _KEY_ENDS.split(plain)) > _MOST_DOTS


def read(path: Path, error: type[InputError] = InputError) -> Tables:
    """Tables of a TOML file; `error` when it is missing, not text or not TOML."""
    return parse(read_text(path, error, MOST_BYTES), str(path), error)


def split_sources(tables: Tables, prefix: str = "") -> tuple[Tables, dict[str, str]]:
    """`tables` without their `*_source` keys, and those by dotted name without the suffix."""
    facts: Tables = {}
    sources: dict[str, str] = {}
    names = sorted(tables)
    for key, value in tables.items():
        stem = key.removesuffix(_SUFFIX)
        at = bisect_left(names, stem)
        if stem != key and isinstance(value, str) and any(k != key and k.startswith(stem) for k in names[at : at + 2]):
            sources[prefix + stem] = value
        elif isinstance(value, dict):
            facts[key], found = split_sources(value, f"{prefix}{key}.")
            sources |= found
        else:
            facts[key] = value
    return facts, sources


def merged(base: Tables, changes: Tables) -> Tables:
    """`base` with `changes` in its place, key by key inside tables; a list replaces a list."""
    both = {
        key: merged(base[key], changes[key]) for key in base.keys() & changes.keys() if _are_tables(base, changes, key)
    }
    return base | changes | both


def _are_tables(base: Tables, changes: Tables, key: str) -> bool:
    return isinstance(base[key], dict) and isinstance(changes[key], dict)


def checked(cls: type[_T], facts: Tables, where: str) -> _T:
    """`facts` as an object of the dataclass `cls`; InputError with every fault of the file `where`, one per line."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    adapter: TypeAdapter[_T] = TypeAdapter(_closed(cls, ConfigDict(extra="forbid")))
    try:
        return adapter.validate_json(json.dumps(facts, default=str), strict=True)
    except ValidationError as error:
        lines = [_fault(cls, dict(fault)) for fault in error.errors(include_url=False)[:MOST_FAULTS]]
        lines += [f"and {more:,} more"] if (more := error.error_count() - MOST_FAULTS) > 0 else []
        raise InputError(f"{where}:" + (f" {lines[0]}" if len(lines) == 1 else "\n  " + "\n  ".join(lines))) from error


def bundled(cls: type[_T], facts: Tables) -> _T:
    """As `checked` for a file of the package, which its tests have checked: pydantic takes a while to load."""
    hints = get_type_hints(cls)
    return cls(**{key: _converted(hints[key], value) for key, value in facts.items()})


def _converted(hint: Any, value: Any) -> Any:
    """`value` of a TOML file as the annotation says."""
    if isinstance(value, dict):
        return bundled(next(_held(hint)), value)
    if isinstance(value, list):
        inner = next(part for part in (hint, *get_args(hint)) if get_origin(part) is tuple)
        hints = get_args(inner)
        each = hints[:1] * len(value) if hints[-1] is Ellipsis else hints
        return tuple(_converted(part, item) for part, item in zip(each, value, strict=True))
    is_float = float in (hint, *get_args(hint))
    return float(value) if is_float else str(value) if hint is str else value


def _closed(cls: type[_T], config: Any) -> type[_T]:
    """`cls`, in which and in whose parts pydantic accepts no unknown keys."""
    for part in {cls, *_parts(cls)}:
        if "__pydantic_config__" not in vars(part):
            part.__pydantic_config__ = config
    return cls


def _parts(cls: type[Any]) -> Iterator[type[Any]]:
    """Dataclasses that the fields of `cls` hold, and theirs."""
    for hint in get_type_hints(cls).values():
        for part in _held(hint):
            yield part
            yield from _parts(part)


def _fault(cls: type[Any], fault: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: unknown key ({nearest(str(fault['loc'][-1]), _keys(cls, fault['loc'][:-1]))})"
    message = str(fault["msg"]).removeprefix("Value error, ")
    shown = json.dumps(fault["input"], default=str)
    is_shown = fault["type"] not in ("missing", "value_error") and len(shown) <= _HIDDEN_VALUE
    message = f"{message} (is {shown})" if is_shown else message
    return f"{where}: {message}" if where else message


def _keys(cls: type[Any], path: tuple[str | int, ...]) -> list[str]:
    """Keys of the table at `path` below `cls`."""
    for name in path:
        if isinstance(name, str):
            cls = next(_held(get_type_hints(cls)[name]))
    return [field.name for field in fields(cls)]


def _held(hint: Any) -> Iterator[type[Any]]:
    """Dataclasses in an annotation such as `tuple[Row, ...]` or `Table | None`."""
    for part in (hint, *get_args(hint)):
        if is_dataclass(part) and isinstance(part, type):
            yield part


def to_toml(tables: Mapping[str, Any], sources: Mapping[str, str], prefix: str = "") -> str:
    """TOML text of `tables`, plain keys first, then tables; `sources` come back beside their keys."""
    plain = {k: v for k, v in tables.items() if v is not None and not _is_table(v)}
    lines = [f"{key} = {_value(value)}" for key, value in plain.items()]
    own = {name: text for name, text in sources.items() if name.rpartition(".")[0] == prefix}
    lines += [f"{name.rpartition('.')[2]}{_SUFFIX} = {_value(text)}" for name, text in own.items()]
    for key, value in tables.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping):
            lines += ["", f"[{path}]", to_toml(value, sources, path)]
        elif _is_table(value):
            for row in value:
                lines += ["", f"[[{path}]]", to_toml(row, {}, path)]
    return "\n".join(lines)


def _is_table(value: Any) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Mapping)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
