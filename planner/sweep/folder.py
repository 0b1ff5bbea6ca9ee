"""A sweep as a directory, of which every state is a good one to go on from."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from planner.errors import InputError
from planner.sweep.units import Result, Unit

_DESCRIPTION, _UNITS = "sweep.json", "units"


class SweepFolder:
    """The directory of a sweep, held by one process at a time.

    `sweep.json` says which sweep it is, `inputs/` has the files that units read, `units/` one file per answered unit.
    Every file is written under another name and renamed, so none is ever half there. Use it in a `with` statement.
    Raises InputError when the directory holds something else, another sweep, or is in use.
    """

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        self.path, self._description = path, description
        self._lock: int | None = None

    def __enter__(self) -> SweepFolder:
        path = self.path
        if path.exists() and not path.is_dir():
            raise InputError(f"--out {path}: is a file. Give a new folder, or that of the sweep to go on with.")
        if not path.resolve().parent.is_dir():
            raise InputError(f"--out {path}: {path.resolve().parent} does not exist. Create it first.")
        try:
            (path / _UNITS).mkdir(parents=True, exist_ok=True) if self._is_ours() else None
            self._lock = os.open(path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._release()
            raise InputError(f"--out {path}: another sweep is running in this folder. Wait for it.") from error
        except OSError as error:
            self._release()
            raise self._unwritable(error) from error
        try:
            self._check_description()
            for left in (*path.glob(".*.part"), *(path / _UNITS).glob(".*.part")):
                left.unlink()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _is_ours(self) -> bool:
        """Whether the folder is new, empty, or of a sweep; InputError otherwise."""
        others = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        others = {name for name in others if not (name.startswith(".") and name.endswith(".part"))}
        if others - {_UNITS} and _DESCRIPTION not in others:
            raise InputError(f"--out {self.path}: is not empty and holds no sweep. Give a new folder.")
        return True

    def _check_description(self) -> None:
        wanted, file = _json(self._description), self.path / _DESCRIPTION
        if not file.exists():
            self.write(_DESCRIPTION, wanted.encode())
            return
        try:
            held = json.loads(file.read_bytes())
            differs = [k for k in {*held, *self._description} if held.get(k) != json.loads(wanted).get(k)]
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file}: is no sweep ({error}). Give a new folder.") from error
        if differs:
            raise InputError(
                f"--out {self.path}: holds another sweep (it differs in {', '.join(sorted(differs))}), which is never "
                "overwritten. Give a new folder."
            )

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"--out {self.path}: cannot be written ({error.strerror}). What is done is kept: mend it and run the same "
            "command again."
        )

    def write(self, name: str, content: bytes) -> None:
        """Write `name` below the folder, whole or not at all. InputError when that fails, as on a full disk."""
        target = self.path / name
        part = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise self._unwritable(error) from error

    def store(self, unit: Unit, result: Result) -> None:
        """Keep the result of `unit`."""
        held = {
            "number": unit.number,
            "point": dict(unit.point),
            "arguments": list(unit.arguments),
            "exit_code": result.exit_code,
            "message": result.message,
            "facts": result.facts,
        }
        self.write(_unit_name(unit), _json(held).encode())

    def result(self, unit: Unit) -> Result | None:
        """The kept result of `unit`; None when there is none, or a damaged one."""
        try:
            held = json.loads((self.path / _unit_name(unit)).read_bytes())
            if held["arguments"] == list(unit.arguments):
                return Result(held["exit_code"], held["message"], held["facts"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None


def _unit_name(unit: Unit) -> str:
    return f"{_UNITS}/{unit.number:05d}.json"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"
