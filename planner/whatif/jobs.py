"""A simulation in a process of its own: the command line does the work, the page only watches it.

The command runs in a new folder with the uploaded files beside it, so what the page shows as the equivalent command is
what ran. Progress comes through the file named in MOEPLAN_PROGRESS.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import weakref
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from planner.errors import InputError
from planner.whatif.scenario import Scenario

PROGRESS_VARIABLE = "MOEPLAN_PROGRESS"
MAX_JOBS = max(1, (os.cpu_count() or 2) // 2)
"""Simulations of all users of a server that run at once: the pages of the others stay quick."""
_RUN = "run"
_ENDING_S = 2.0
_DOWNLOADS = ("report.html", "plan.json", "simulation.json", "comparison.json", "layouts.csv", "requests.csv")
_running: weakref.WeakSet[Job] = weakref.WeakSet()


class Job:
    """A running or finished command. It ends when nobody holds it any more."""

    def __init__(self, scenario: Scenario, command: str) -> None:
        """Start `command` (as shown to the user) with the uploads of `scenario`; InputError when too many run."""
        if sum(job.is_running for job in _running) >= MAX_JOBS:
            raise InputError(
                f"{MAX_JOBS} simulations run on this server already. Wait for one of them, or cancel your own."
            )
        self.scenario, self.command, self.started = scenario, command, time.monotonic()
        self._finished: float | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="moeplan-")
        self._place = Path(self._folder.name)
        try:
            for name, text in scenario.uploads.items():
                _inside(self._place, name).write_text(text, encoding="utf-8")
        except InputError:
            self._folder.cleanup()
            raise
        words = [sys.executable, "-P", "-m", "planner", *shlex.split(command)[1:], "--out", _RUN]
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        environment = os.environ | {PROGRESS_VARIABLE: str(self._place / "progress"), "PYTHONPATH": paths}
        with (self._place / "errors").open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                words,
                cwd=self._place,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        weakref.finalize(self, _end, self._process, self._folder)
        _running.add(self)

    def answers(self, scenario: Scenario, commands: Iterable[str]) -> bool:
        """It ran one of `commands` with the uploads that `scenario` has now."""
        return self.command in commands and self.scenario.uploads == scenario.uploads

    @property
    def is_running(self) -> bool:
        """The command has not ended."""
        running = self._process.poll() is None
        if not running and self._finished is None:
            self._finished = time.monotonic()
        return running

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, or from start to end."""
        return (self._finished or time.monotonic()) - self.started

    def progress(self) -> tuple[str, float]:
        """What it is at, and the share done of that, from 0 to 1."""
        try:
            label, _, share = (self._place / "progress").read_text(encoding="utf-8").rpartition(" ")
            return label, min(1.0, max(0.0, float(share)))
        except (OSError, ValueError):
            return "starting", 0.0

    def cancel(self) -> None:
        """End the command; nothing of it is kept."""
        _stop(self._process)

    def problem(self) -> str | None:
        """Why there is no result: the message of the command, None where there is one or it still runs."""
        if self.is_running or self.facts() is not None:
            return None
        if self._process.returncode is not None and self._process.returncode < 0:
            return "cancelled"
        text = (self._place / "errors").read_text(encoding="utf-8").strip().removeprefix("moeplan: ")
        return text or f"the command ended with code {self._process.returncode}"

    def facts(self) -> dict[str, Any] | None:
        """What `--json` prints of the finished command."""
        if self.is_running:
            return None
        for name in ("plan.json", "simulation.json", "comparison.json"):
            path = self._place / _RUN / name
            if path.is_file():
                return dict(json.loads(path.read_text(encoding="utf-8")))
        return None

    def file(self, name: str) -> bytes | None:
        """A file of the run folder."""
        path = self._place / _RUN / name
        return path.read_bytes() if path.is_file() else None

    def downloads(self) -> list[tuple[str, bytes]]:
        """Names and contents of the files of the run folder that are worth a button of their own."""
        return [(name, data) for name in _DOWNLOADS if (data := self.file(name))]

    def archive(self) -> bytes:
        """The run folder of `--out`, as a zip that is the same for the same run."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted((self._place / _RUN).rglob("*")):
                if path.is_file():
                    entry = zipfile.ZipInfo(str(path.relative_to(self._place)))
                    archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
        return buffer.getvalue()


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`; InputError where it would lie elsewhere or take the place of a file of the job."""
    path = (folder / name).resolve()
    if path.parent != folder.resolve() or name in (_RUN, "progress", "errors"):
        raise InputError(f"upload {name[:80]!r}: give the file a plain name, such as config.json.")
    return path


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    _stop(process)
    folder.cleanup()
