"""Breaks the cost and memory modules in one place at a time and counts how often their own tests notice.

    nice -n 10 python benchmarks/mutation.py --sample 30 --seed 0 --json mutation.json [--only planner.memory]

Operators: arithmetic and comparisons exchanged, `and` for `or`, conditions negated, minimum for maximum, numbers
changed. Of all mutants of a module a seeded sample is tried, each in a fork with the module compiled from the changed
tree; it is killed when a test fails or takes ten times as long. Survivors are listed with line and change.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import os
import random
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from machine import stamp

ROOT = Path(__file__).parents[1]
TESTS = {
    "planner.memory": ("test_memory_terms", "test_memory"),
    "planner.cost": ("test_cost_terms", "test_cost"),
    "planner.routedcost": ("test_cost_terms", "test_cost", "test_capacity", "test_residency_plans"),
    "planner.steptime": ("test_cost_terms", "test_steptime", "test_cost"),
}
"""Tests of a module, in the order in which they are run until one fails."""
GOAL = 0.85
_SLOWER = 10.0
_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_GUARDS = ("strict", "maxsize")
_NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "argmin": "argmax"}


@dataclass(frozen=True)
class Mutant:
    """A change of the node number `index` (in the order of `ast.walk`), and of its part number `part`."""

    index: int
    part: int
    line: int
    change: str


def mutants(tree: ast.AST) -> list[Mutant]:
    """All single changes of `tree`; annotations and decorators are left alone."""
    idle = _idle(tree)
    found = []
    for index, node in enumerate(ast.walk(tree)):
        if id(node) not in idle:
            for part, change in _changes(node):
                found.append(Mutant(index, part, node.lineno, change))  # type: ignore[attr-defined]
    return found


def _idle(tree: ast.AST) -> set[int]:
    """Nodes that do nothing at run time, or only when the program is wrong."""
    idle: set[int] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.arg | ast.AnnAssign):
            parts.append(node.annotation)
        if isinstance(node, ast.FunctionDef):
            parts += [node.returns, *node.decorator_list]
        if isinstance(node, ast.ClassDef):
            parts += node.decorator_list
        if isinstance(node, ast.keyword) and node.arg in _GUARDS:
            parts.append(node.value)
        if isinstance(node, ast.Assert):
            parts.append(node)
        for part in parts:
            idle |= {id(each) for each in ast.walk(part)} if part is not None else set()
    return idle


def _changes(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Parts of `node` that can be changed, with a description."""
    if (isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _SWAPS) or isinstance(node, ast.BoolOp):
        yield 0, f"{type(node.op).__name__} -> {_SWAPS[type(node.op)].__name__}"
    elif isinstance(node, ast.Compare):
        for part, op in enumerate(node.ops):
            if type(op) in _SWAPS:
                yield part, f"{type(op).__name__} -> {_SWAPS[type(op)].__name__}"
    elif isinstance(node, ast.IfExp | ast.If):
        yield 0, f"condition negated: {ast.unparse(node.test)[:60]}"
    elif isinstance(node, ast.Call) and _called(node) in _NAMES:
        yield 0, f"{_called(node)} -> {_NAMES[_called(node)]}"
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield 0, f"{node.value!r} -> {_number(node.value)!r}"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield 0, f"{node.value} -> {not node.value}"


def _called(node: ast.Call) -> str:
    function = node.func
    return (
        function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
    )


def _number(value: float) -> float:
    return value + 1 if isinstance(value, int) or value == 0 else value * 2


def mutated(source: str, mutant: Mutant) -> ast.AST:
    """Tree of `source` with the change made."""
    tree = ast.parse(source)
    node = next(n for i, n in enumerate(ast.walk(tree)) if i == mutant.index)
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        node.op = _SWAPS[type(node.op)]()  # type: ignore[assignment]
    elif isinstance(node, ast.Compare):
        node.ops[mutant.part] = _SWAPS[type(node.ops[mutant.part])]()  # type: ignore[call-overload]
    elif isinstance(node, ast.IfExp | ast.If):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Call):
        name = _NAMES[_called(node)]
        if isinstance(node.func, ast.Name):
            node.func.id = name
        elif isinstance(node.func, ast.Attribute):
            node.func.attr = name
    elif isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else _number(node.value)  # type: ignore[arg-type]
    return ast.fix_missing_locations(tree)


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a changed tree."""

    def __init__(self, module: str, tree: ast.AST, path: Path) -> None:
        self._module, self._tree, self._path = module, tree, path

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._module:
            return None
        return importlib.util.spec_from_file_location(name, self._path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._tree, str(self._path), "exec"), module.__dict__)


def verdict(module: str, tree: ast.AST | None, limit_s: float) -> tuple[str, float]:
    """`killed` (a test failed), `hung` (too slow), or `survived`; and CPU seconds. A fork runs the tests."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            os._exit(_run_tests(module, tree, limit_s))
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    if os.WIFSIGNALED(status):
        return "hung", cpu_s
    return ("survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"), cpu_s


def _run_tests(module: str, tree: ast.AST | None, limit_s: float) -> int:
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s) + 1, int(limit_s) + 2))
    # CPU time of the fork starts at zero, that of the limit at the parent's: neither is inherited on Linux.
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    if tree is not None:
        sys.meta_path.insert(0, Changed(module, tree, path))
    files = [str(ROOT / "tests" / f"{name}.py") for name in TESTS[module]]
    quiet = [
        "-x",
        "-q",
        "-n",
        "0",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "--tb=no",
        "-W",
        "ignore",
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return int(pytest.main([*quiet, *files]))


def check(module: str, sample: int, seed: int, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Score of one module over a seeded sample of its mutants; of a check `before`, only survivors are tried again."""
    source = (ROOT / Path(*module.split(".")).with_suffix(".py")).read_text()
    every = mutants(ast.parse(source))
    chosen = random.Random(f"{module}{seed}").sample(every, min(sample, len(every)))
    tried, killed = len(chosen), 0
    if before is not None:
        left = {(one["line"], one["change"]) for one in before["survivors"]}
        chosen = [mutant for mutant in chosen if (mutant.line, mutant.change) in left]
        killed = tried - len(chosen)
    outcome, base_s = verdict(module, None, 600.0)
    if outcome != "survived":
        raise SystemExit(f"the tests of {module} fail without any change: mend them first")
    lines, survivors = source.splitlines(), []
    for mutant in sorted(chosen, key=lambda each: each.line):
        outcome, _ = verdict(module, mutated(source, mutant), _SLOWER * base_s + 5)
        killed += outcome != "survived"
        if outcome == "survived":
            code = lines[mutant.line - 1].strip()
            survivors.append({"line": mutant.line, "change": mutant.change, "code": code})
            print(f"{module}:{mutant.line}: {mutant.change}    {code[:90]}", flush=True)
    return {
        "module": module,
        "mutants": len(every),
        "tried": tried,
        "killed": killed,
        "seed": seed,
        "tests": list(TESTS[module]),
        "survivors": survivors,
        **stamp(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=30, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=list(TESTS))
    parser.add_argument("--again", action="store_true", help="try only what survived in --json, after tests were added")
    parser.add_argument("--json", type=Path, help="file for the results; modules in it are replaced, others stay")
    chosen = parser.parse_args()
    # What every fork needs and no mutant touches is imported once.
    import hypothesis  # noqa: F401
    import pandas  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import simpy  # noqa: F401

    for module in chosen.only or TESTS:
        held = json.loads(chosen.json.read_text())["modules"] if chosen.json and chosen.json.is_file() else {}
        found = check(module, chosen.sample, chosen.seed, held[module] if chosen.again else None)
        print(
            f"{module}: {found['killed']} of {found['tried']} killed ({found['killed'] / found['tried']:.0%})",
            flush=True,
        )
        if chosen.json:
            held = json.loads(chosen.json.read_text())["modules"] if chosen.json.is_file() else {}
            text = json.dumps({"goal": GOAL, "modules": held | {module: found}}, indent=1, sort_keys=True)
            chosen.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
