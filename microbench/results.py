"""The output folder: one CSV per operation, failures.csv and running.json, safe against a kill at any moment.

Rows are appended whole and flushed to disk one by one; a last line torn by a kill is dropped on resume. A case is
done when it has a row or a recorded failure; delete failures.csv to try the failed ones again.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from microbench.cases import OPS, TEXT, Case, Value
from microbench.errors import InputError
from microbench.timing import Timing

MEASURED = ("time_us", "p90_us", "spread", "repeats", "library", "origin")
_FAILURE_COLUMNS = ("op", "case", "kind", "reason")
_MOST_DEATHS = 3
Done = tuple[str, tuple[Value, ...]]


class Store:
    """An open output folder; one process at a time. `done` holds (op, values) of every case on disk."""

    def __init__(self, directory: Path) -> None:
        """Create or resume `directory`. Raises InputError when it cannot be written or holds foreign files."""
        self.directory = directory
        self._lock = _locked(directory)
        try:
            self.done = {key for op in OPS for key in self._rows(op)}
            failures = _read(directory / "failures.csv", _FAILURE_COLUMNS)
            self.done |= {(op, tuple(json.loads(named).values())) for op, named, *_ in failures}
        except (ValueError, UnicodeDecodeError) as error:
            self.close()
            raise InputError(f"--out {directory}: is damaged ({error}). Use a new folder.") from error
        except InputError:
            self.close()
            raise
        self._deaths = self._last_death()

    def _rows(self, op: str) -> Iterator[Done]:
        columns = OPS[op].columns
        for row in _read(self.directory / f"{op}.csv", (*columns, *MEASURED)):
            named = zip(columns, row, strict=False)
            yield op, tuple(text if name in TEXT else int(text) for name, text in named)

    def _last_death(self) -> tuple[str, int]:
        """Case that was running when the last run ended without finishing it, and how often that happened."""
        path = self.directory / "running.json"
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            return str(state["case"]), int(state["attempts"])
        except (OSError, ValueError, KeyError):
            return "", 0

    def begin(self, case: Case) -> bool:
        """Note that `case` is running. False, and a recorded failure, when three runs died in it."""
        name = str(case)
        attempts = 1 + (self._deaths[1] if self._deaths[0] == name else 0)
        if attempts > _MOST_DEATHS:
            self.fail(case, "died", f"{_MOST_DEATHS} runs ended in this case")
            return False
        self._deaths = ("", 0)
        path = self.directory / "running.json"
        path.write_text(json.dumps({"case": name, "attempts": attempts}) + "\n", encoding="utf-8")
        return True

    def finish(self) -> None:
        """No case is running any more."""
        (self.directory / "running.json").unlink(missing_ok=True)

    def add(self, case: Case, timing: Timing, library: str) -> None:
        """Append the row of a measured case."""
        numbers = (f"{timing.median_s * 1e6:.6g}", f"{timing.p90_s * 1e6:.6g}", f"{timing.spread:.4g}", timing.repeats)
        row = (*case.values, *numbers, library, "measured")
        _append(self.directory / f"{case.op}.csv", (*OPS[case.op].columns, *MEASURED), row)
        self.done.add((case.op, case.values))

    def fail(self, case: Case, kind: str, reason: str) -> None:
        """Append a failure: kind is unsupported, memory, wrong, physics, error or died."""
        named = json.dumps(dict(zip(OPS[case.op].columns, case.values, strict=True)))
        _append(self.directory / "failures.csv", _FAILURE_COLUMNS, (case.op, named, kind, " ".join(reason.split())))
        self.done.add((case.op, case.values))

    def note(self, name: str, entry: dict[str, object]) -> None:
        """Append one JSON line to `name`."""
        with (self.directory / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Let another run use the folder."""
        self._lock.close()


def _locked(directory: Path) -> IO[str]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w", encoding="ascii")
    except OSError as error:
        raise InputError(f"--out {directory}: cannot be written ({error.strerror}). Choose another folder.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise InputError(f"--out {directory}: another microbench is writing there. Wait, or choose another.") from error
    return lock


def _read(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Rows of a CSV, without its header, after repairing a torn end. Raises InputError for a file that is not ours."""
    if not path.exists():
        return []
    _repair(path, len(columns))
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if rows and rows[0] != list(columns):
        raise InputError(f"{path}: its columns are {','.join(rows[0])}, expected {','.join(columns)}. Use a new --out.")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(columns):
            raise InputError(f"{path}: line {number} has {len(row)} of {len(columns)} columns. Delete the line.")
    return rows[1:]


def _repair(path: Path, num_columns: int) -> None:
    """Cut a last line that a kill left without its end or with columns missing."""
    data = path.read_bytes()
    kept = data[: data.rfind(b"\n") + 1]
    last = kept[kept.rstrip(b"\n").rfind(b"\n") + 1 :]
    if kept.count(b"\n") > 1 and (b"\0" in last or len(next(csv.reader([last.decode("utf-8")]))) != num_columns):
        kept = kept[: len(kept) - len(last)]
    if len(kept) < len(data):
        with path.open("rb+") as file:
            file.truncate(len(kept))
            os.fsync(file.fileno())


def _append(path: Path, columns: Sequence[str], row: Sequence[Value]) -> None:
    """One write of the whole row (and of the header in a new file), on disk when this returns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    with path.open("ab") as file:
        if file.tell() == 0:
            writer.writerow(columns)
        writer.writerow(row)
        file.write(text.getvalue().encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
