"""What moeplan depends on: the lock of CI, its oldest versions, and the licences.

    python .ci/supply.py lock      > .ci/requirements.lock     of the environment it runs in
    python .ci/supply.py oldest    > .ci/oldest.txt            every lower bound of pyproject.toml
    python .ci/supply.py licences  > docs/licences.md

`lock` and `licences` follow the requirements of pyproject.toml through the metadata of what is installed.
"""

from __future__ import annotations

import re
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
RUNTIME: list[str] = PROJECT["dependencies"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
_HEAVY = ("torch", "ortools", "ruff", "mypy", "pandas-stubs", "streamlit", "playwright")
"""Not needed by the tests that run on the oldest versions."""


def closure(wanted: Iterable[str]) -> Iterator[tuple[Distribution, str]]:
    """Installed distributions that the requirements `wanted` need, each once, with who asked first."""
    queue, seen = [(Requirement(text), "moeplan") for text in wanted], set()
    while queue:
        requirement, by = queue.pop(0)
        name = _plain(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        yield found, by
        queue += [(Requirement(text), found.metadata["Name"]) for text in found.requires or ()]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lock() -> Iterator[str]:
    """`name==version` of everything the test extra needs; local versions such as +cpu are left out."""
    yield "# Written by `python .ci/supply.py lock`; versions with which the whole suite passed."
    rows = {_plain(d.metadata["Name"]): d.version.partition("+")[0] for d, _ in closure([*RUNTIME, *EXTRAS["test"]])}
    yield from (f"{name}=={version}" for name, version in sorted(rows.items()))


def oldest() -> Iterator[str]:
    """`name==lower bound` of the runtime, the import extra and what runs the tests."""
    yield "# Written by `python .ci/supply.py oldest`: the lower bounds of pyproject.toml."
    for text in sorted({*RUNTIME, *EXTRAS["import"], *EXTRAS["test"]}):
        requirement = Requirement(text)
        if requirement.name not in _HEAVY:
            lowest = next(spec.version for spec in requirement.specifier if spec.operator in (">=", "=="))
            yield f"{requirement.name}=={lowest}"


def licences() -> Iterator[str]:
    """Tables of runtime and optional dependencies with their licences."""
    yield "# Licences of what moeplan needs\n"
    day = time.strftime("%Y-%m-%d", time.gmtime())
    yield f"Written {day} by `python .ci/supply.py licences > docs/licences.md` from metadata of installed packages."
    yield "moeplan itself is Apache-2.0; [NOTICE](../NOTICE) names the data it ships."
    seen: set[str] = set()
    for title, wanted in (("Always", RUNTIME), *((f"`moeplan[{extra}]`", texts) for extra, texts in EXTRAS.items())):
        rows = [(d, by) for d, by in closure(wanted) if _plain(d.metadata["Name"]) not in seen]
        seen |= {_plain(d.metadata["Name"]) for d, _ in rows}
        if rows:
            yield f"\n## {title}\n\n| package | version | licence | needed by |\n|---|---|---|---|"
            yield from (f"| {d.metadata['Name']} | {d.version} | {licence(d)} | {by} |" for d, by in rows)


def licence(found: Distribution) -> str:
    """SPDX expression where a package states one, else its classifiers, else the first line of its licence field."""
    data = found.metadata
    if expression := data.get("License-Expression"):
        return str(expression)
    classified = [c.rpartition(" :: ")[2] for c in data.get_all("Classifier") or () if c.startswith("License ::")]
    named = [c for c in classified if c != "OSI Approved"]
    return ", ".join(named) or str(data.get("License") or "not stated").strip().splitlines()[0][:60]


if __name__ == "__main__":
    commands = {"lock": lock, "oldest": oldest, "licences": licences}
    if sys.argv[1:2] and sys.argv[1] in commands:
        print("\n".join(commands[sys.argv[1]]()))
    else:
        sys.exit(f"one of {', '.join(commands)}")
