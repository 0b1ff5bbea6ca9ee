"""Writes docs/trust.md from the promises and from what fuzzing, mutation check and soak found.

    python benchmarks/fuzz.py --seconds 600 --json benchmarks/trust/fuzz.json
    python benchmarks/mutation.py --json benchmarks/trust/mutation.json
    python benchmarks/soak.py --json benchmarks/trust/soak.json
    python benchmarks/trust.py

Invariants and theory are read from the tests themselves: names, docstrings, numbers of draws.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "trust"
PROMISES = RESULTS / "promises.md"
PAGE = ROOT / "docs" / "trust.md"
Rows = dict[str, dict[str, Any]]


def page(fuzz: Rows, mutation: Rows, soak: Rows) -> str:
    """The page: the promises, with the results below them."""
    totals = {
        "fuzz_inputs": f"{sum(r['read'] + r['refused'] for r in fuzz.values()):,}",
        "fuzz_readers": str(len(fuzz)),
        "fuzz_findings": str(sum(len(r["findings"]) for r in fuzz.values())),
        "killed": f"{_killed(mutation):.0%}",
        "mutants": f"{sum(r['tried'] for r in mutation.values()):,}",
        "soak_hours": f"{min(r['hours'] for r in soak.values()):g}",
        "soak_checks": f"{sum(r['checks'] for r in soak.values()):,}",
    }
    parts = [
        PROMISES.read_text("utf-8").format(**totals).rstrip(),
        "\n".join(_invariants()),
        "\n".join(_theory()),
        "\n".join(_fuzz(fuzz)),
        "\n".join(_mutation(mutation)),
        "\n".join(_soak(soak)),
        "\n".join(_made([*fuzz.values(), *mutation.values(), *soak.values()])),
    ]
    return "\n\n".join(parts) + "\n"


def _killed(mutation: Rows) -> float:
    return sum(r["killed"] for r in mutation.values()) / sum(r["tried"] for r in mutation.values())


def _tests(name: str) -> Iterator[ast.FunctionDef]:
    tree = ast.parse((ROOT / "tests" / f"{name}.py").read_text("utf-8"))
    yield from (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def _sentence(test: ast.FunctionDef) -> str:
    """What a test says: its name, and the first paragraph of its docstring."""
    title = test.name.removeprefix("test_").replace("_", " ")
    text = (ast.get_docstring(test) or "").split("\n\n")[0].replace("\n", " ")
    return f"{title}: {text}" if text else title


def _invariants() -> Iterator[str]:
    yield "## Invariants\n"
    yield "`tests/test_invariants.py`: draws of models, systems, layouts and loads, by default and with `-m slow`.\n"
    yield "| invariant | draws | slow |\n|---|---|---|"
    for test in _tests("test_invariants"):
        for call in test.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "draws":
                numbers = [n.value for n in call.args if isinstance(n, ast.Constant)]
                yield f"| {_sentence(test)} | {numbers[0]} | {numbers[1] if len(numbers) > 1 else 1500:,} |"


def _theory() -> Iterator[str]:
    yield "## Theory\n"
    yield "`tests/test_theory.py`, where an interval is named, its 99.9 % from 30 independent runs:\n"
    yield from (f"- {_sentence(test)}" for test in _tests("test_theory"))


def _fuzz(fuzz: Rows) -> Iterator[str]:
    yield "## Fuzzing\n"
    yield "| reader | seconds | inputs | answered | refused with one message | open findings |"
    yield "|---|---|---|---|---|---|"
    for name, row in sorted(fuzz.items()):
        numbers = f"{row['seconds']:.0f} | {row['read'] + row['refused']:,} | {row['read']:,} | {row['refused']:,}"
        yield f"| {name} | {numbers} | {len(row['findings']) or 'none'} |"
    for name, row in sorted(fuzz.items()):
        yield from (f"\n{name}, {found['kind']}: `{found['verdict'][:150]}`" for found in row["findings"])


def _mutation(mutation: Rows) -> Iterator[str]:
    yield "## Mutation check\n"
    yield "| module | mutants | tried | killed | share |\n|---|---|---|---|---|"
    for name, row in sorted(mutation.items()):
        share = row["killed"] / row["tried"]
        yield f"| `{name}` | {row['mutants']:,} | {row['tried']} | {row['killed']} | {share:.0%} |"
    yield "\nSurvivors:\n"
    for name, row in sorted(mutation.items()):
        for one in row["survivors"]:
            code = one["code"].replace("|", "\\|")[:90]
            yield f"- `{name}` line {one['line']}, {one['change']}: `{code}`"


def _soak(soak: Rows) -> Iterator[str]:
    yield "## Soak\n"
    yield "| server | hours | requests | steps | checks | preemptions | memory, first and last third | CPU |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, row in sorted(soak.items()):
        memory = f"{row['rss_first_third_mb']:g} and {row['rss_last_third_mb']:g} MB"
        counts = " | ".join(f"{row[key]:,}" for key in ("requests", "steps", "checks", "preemptions"))
        yield f"| {name} | {row['hours']:g} | {counts} | {memory} | {row['cpu_s']:.0f} s |"


def _made(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "## Made\n"
    for key in ("date", "machine", "python", "version"):
        yield f"- {key}: {', '.join(sorted({str(row[key]) for row in rows if key in row}))}"


def main() -> None:
    read = [json.loads((RESULTS / f"{name}.json").read_text("utf-8")) for name in ("fuzz", "mutation", "soak")]
    PAGE.write_text(page(read[0]["readers"], read[1]["modules"], read[2]["servers"]), encoding="utf-8")


if __name__ == "__main__":
    main()
