"""What every command shares: printing facts as text or JSON, the progress bar, the command as typed."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from planner.units import finite


def show(facts: Any, as_json: bool, text: Callable[[Any], str], **extra: float) -> None:
    """Print `facts` as text or JSON; `extra` numbers (wall time) are no part of the answer."""
    if as_json:
        shown = facts | extra if isinstance(facts, dict) else facts
        print(json.dumps(finite(shown), indent=2, allow_nan=False))
    else:
        print(text(facts))
        if "wall_s" in extra:
            print(f"\nAnswered in {extra['wall_s']:.1f} s.")


def command_line() -> str:
    """The command that reproduces the answer: as typed, without where and how it was printed or worked out."""
    kept = []
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument in ("--out", "--jobs"):
            next(arguments, None)
        elif argument != "--json" and not argument.startswith(("--out=", "--jobs=")):
            kept.append(argument)
    return "moeplan " + shlex.join(kept)


def command_for(name: str, *positional: str, options: dict[str, Any]) -> str:
    """A command with those of `options` that are set: None, False and empty are left out.

    >>> command_for("plan", "mixtral-8x7b", options={"--rate": 2.0, "--no-rails": True, "--kv": None})
    'moeplan plan mixtral-8x7b --rate 2 --no-rails'
    """
    words = [name, *positional]
    for option, value in options.items():
        if value is True:
            words.append(option)
        elif value not in (None, False, ""):
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return "moeplan " + shlex.join(words)


PROGRESS_VARIABLE = "MOEPLAN_PROGRESS"


class progress_bar:
    """A progress bar on stderr for people, nothing when stderr is not a terminal.

    For programs: label and share done are written to the file that MOEPLAN_PROGRESS names.
    """

    def __enter__(self) -> Callable[[str, float], None]:
        if os.environ.get(PROGRESS_VARIABLE):
            return partial(_write_progress, Path(os.environ[PROGRESS_VARIABLE]))
        if not sys.stderr.isatty():
            return lambda label, share: None
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True)
        self._bar.start()
        self._tasks: dict[str, Any] = {}
        return self._show

    def _show(self, label: str, share: float) -> None:
        if label not in self._tasks:
            self._tasks[label] = self._bar.add_task(label, total=1.0)
        self._bar.update(self._tasks[label], completed=share)

    def __exit__(self, *exception: object) -> None:
        if hasattr(self, "_bar"):
            self._bar.stop()


def _write_progress(path: Path, label: str, share: float) -> None:
    """Replace the file, so that a reader never sees half a line."""
    part = path.with_suffix(".part")
    part.write_text(f"{label} {share:.3f}", encoding="utf-8")
    part.replace(path)
