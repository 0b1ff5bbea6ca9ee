"""Run the commands that the pages show and bring the outputs below them up to date.

    python benchmarks/examples.py [PAGE ...] [--check]

An example is a fenced block after an indented `moeplan` command, or below `$ moeplan` inside the block. Its lines are
matched in order with those of the output that differ in numbers alone; a line that is not found stays, and is named;
how long an answer took stays too. Files are blocks whose first line is a comment with their name.
--check writes nothing and exits with 1 when a page is out of date.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(?P<language>[^\n`]*)\n(?P<block>.*?)^```$", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"# ([\w-]+\.(?:toml|csv))\b")
_SHOWN = re.compile(r"^    (?:[^\n]*&& )?(?P<command>moeplan (?:[^\n]*\\\n)*[^\n]*)$", re.MULTILINE)
_TYPED = re.compile(r"^\$ (?P<command>moeplan (?:[^\n]*\\\n)*[^\n]*)\n(?P<output>(?:(?!\$ ).*\n)*)", re.MULTILINE)
_NUMBER = re.compile(r"[<>~+-]?\d[\d,.]*")
_SPACE = re.compile(r"[\s#=]+|(?<=\s)(?:us|ms|s|min|h|%|kB|MB|GB|TB)(?=\s|$|[,;.:)])")


def skeleton(line: str) -> str:
    """What of a line does not change with its numbers."""
    return _SPACE.sub(" ", _NUMBER.sub("#", line)).strip()


def updated(block: str, output: str) -> tuple[str, list[str]]:
    """`block` with the numbers of `output`, and its lines that are not there."""
    new, at, missing = output.splitlines(), 0, []
    lines = []
    for line in block.splitlines():
        wanted = skeleton(line)
        place = next((i for i in range(at, len(new)) if skeleton(new[i]) == wanted), None)
        if not wanted or place is None or line.startswith("Answered in"):
            lines.append(line)
            missing += [line] if wanted and place is None else []
            continue
        lines.append(new[place].rstrip())
        at = place + 1
    return "\n".join(lines) + "\n", missing


def run(command: str, files: dict[str, str]) -> str | None:
    """What a command prints in a folder of `files`, None if it fails."""
    words = [sys.executable, "-m", "planner", *shlex.split(command)[1:]]
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text, "utf-8")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, timeout=600)
    return done.stdout + done.stderr if done.returncode in (0, 3) and done.stdout else None


def examples(text: str) -> Iterator[tuple[int, int, str]]:
    """Where the outputs on a page begin and end, and the command that prints each."""
    for fence in _FENCE.finditer(text):
        if fence["language"]:
            continue
        typed = list(_TYPED.finditer(fence["block"]))
        for found in typed:
            start = fence.start("block")
            yield start + found.start("output"), start + found.end("output"), _plain(found["command"])
        shown = list(_SHOWN.finditer(text, 0, fence.start()))
        if shown and not typed and "$ " not in fence["block"][:2]:
            yield fence.start("block"), fence.end("block"), _plain(shown[-1]["command"])


def _plain(command: str) -> str:
    return re.sub(r"\\\n\s*", " ", command)


def refresh(page: Path) -> tuple[str, str]:
    """Text of a page before and after."""
    text = after = page.read_text("utf-8")
    files = {found[1]: fence["block"] for fence in _FENCE.finditer(text) if (found := _NAMED.match(fence["block"]))}
    for start, end, command in reversed(list(examples(text))):
        output = run(command, files)
        if output is None:
            print(f"{page.name}: does not run here: {command[:100]}")
            continue
        block, missing = updated(text[start:end], output)
        if len(missing) == len([line for line in text[start:end].splitlines() if skeleton(line)]):
            print(f"{page.name}: not an output of {command[:80]}, or all of it has changed")
            continue
        after = after[:start] + block + after[end:]
        for line in missing:
            print(f"{page.name}: {command[:60]}: not in the output: {line[:110]}")
    return text, after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    stale = 0
    for page in chosen.pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before, after = refresh(page)
        stale += before != after
        if before != after and not chosen.check:
            page.write_text(after, "utf-8")
        print(f"{page.name}: {'out of date' if before != after else 'as printed'}", flush=True)
    return int(bool(chosen.check and stale))


if __name__ == "__main__":
    sys.exit(main())
