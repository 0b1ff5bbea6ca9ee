"""A command answered inside this process: what it prints becomes facts. The work of a sweep's unit."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from planner.sweep.units import Files, Result, Unit

_INTERRUPTED = 130


def answer(unit: Unit) -> Result:
    """Exit code, message and facts of the command `unit`, exactly those of `moeplan ... --json`.

    A fault of moeplan itself is a result too, so that one bad unit does not end a sweep; running out of memory is not.
    """
    said, facts = io.StringIO(), io.StringIO()
    with laid_out(unit.files), _typed(unit.arguments), redirect_stderr(said), redirect_stdout(facts):
        code = _exit_code(said)
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    message = said.getvalue().strip().removeprefix("moeplan: ")
    try:
        printed = json.loads(facts.getvalue()) if code in (0, 3) else None
    except ValueError:
        return Result(1, "the command printed no facts", None)
    if printed is not None:
        printed.pop("wall_s", None)
    return Result(code, message, printed)


def _exit_code(said: io.StringIO) -> int:
    from planner.cli import main

    try:
        main()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except MemoryError:
        raise
    except Exception as error:
        said.write(f"fault in moeplan: {type(error).__name__}: {error}")
        return 1
    return 0


@contextmanager
def _typed(arguments: tuple[str, ...]) -> Iterator[None]:
    """The process as if `moeplan <arguments> --json` had been typed."""
    before = sys.argv
    sys.argv = ["moeplan", *arguments, "--json"]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """`folder` as the working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def laid_out(files: Files) -> Iterator[None]:
    """A working directory with `files` in it; the one there is when there are none."""
    if not files:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="moeplan-") as folder:
        for name, content in files:
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        with inside(Path(folder)):
            yield
