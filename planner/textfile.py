"""Text that people hand us, read within bounds: a wrong, huge or odd file ends in one message of the caller's kind."""

from __future__ import annotations

import csv
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from planner.errors import InputError

MOST_BYTES = 50_000_000
"""Largest text file; readers of smaller or larger things say so."""
_MOST_LINE = 1_000_000


def is_file(path: Path) -> bool:
    """True for an existing file; names that no file can have are no files."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """True for an existing folder, like `is_file`."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def check_file(
    path: Path,
    error: type[InputError] = InputError,
    most_bytes: float = MOST_BYTES,
    remedy: str = "Is it the right file?",
) -> int:
    """Size [bytes] of an ordinary file; `error` for a missing one, a folder, a pipe, a device and a larger one."""
    try:
        found = path.stat()
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise error(f"{path}: cannot be read: {reason}. Check the path.") from fault
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
        raise error(f"{path}: is {kind}, not a file. Give a file.")
    if found.st_size > most_bytes:
        raise error(f"{path}: {found.st_size / 1e6:,.1f} MB; at most {most_bytes / 1e6:,.0f} MB are read. {remedy}")
    return found.st_size


@contextmanager
def opened(path: Path, error: type[InputError] = InputError, most_bytes: float = MOST_BYTES) -> Iterator[TextIO]:
    """UTF-8 lines of a file, for `csv`; what goes wrong while they are read is raised as `error`."""
    check_file(path, error, most_bytes)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as fault:
        raise error(f"{path}: not UTF-8 text. Save it as UTF-8.") from fault
    except csv.Error as fault:
        raise error(f"{path}: not a CSV: {fault}. Check quotes and separators.") from fault
    except OSError as fault:
        raise error(f"{path}: cannot be read: {fault.strerror}. Check the path.") from fault


def lines(file: TextIO) -> Iterator[str]:
    """Lines of an `opened` file one by one; `csv.Error` for one that would fill the memory."""
    while line := file.readline(_MOST_LINE):
        if len(line) == _MOST_LINE and not line.endswith("\n"):
            raise csv.Error(f"a line of more than {_MOST_LINE:,} characters")
        yield line


def read_text(path: Path, error: type[InputError] = InputError, most_bytes: float = MOST_BYTES) -> str:
    """UTF-8 text of a file without byte-order mark; `error` when it cannot be had."""
    with opened(path, error, most_bytes) as file:
        return file.read()


def parse_json(text: str, where: object, error: type[InputError] = InputError) -> Any:
    """Value of a JSON text; `error` naming the file `where`."""
    try:
        return json.loads(text)
    except RecursionError as fault:
        raise error(f"{where}: nested too deeply. Is it the right file?") from fault
    except ValueError as fault:
        raise error(f"{where}: not valid JSON: {fault}.") from fault


def read_json(path: Path, error: type[InputError] = InputError, most_bytes: float = MOST_BYTES) -> Any:
    """Value of a JSON file; `error` when it cannot be had."""
    return parse_json(read_text(path, error, most_bytes), path, error)
