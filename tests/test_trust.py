"""The trust page says what the results say."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import mutation
import trust

SOURCE = '''
LIMIT = 3
def use(a: int, b: int = 2) -> int:
    """1 + 1 in a docstring is no code."""
    assert a != 0
    return max(a, b) * 2 if a < LIMIT and not b else a - b
'''


def test_mutants_change_one_thing_that_runs() -> None:
    tree = ast.parse(SOURCE)
    changes = {(mutant.line, mutant.change) for mutant in mutation.mutants(tree)}
    assert changes == {
        (2, "3 -> 4"),
        (3, "2 -> 3"),
        (6, "max -> min"),
        (6, "Mult -> Div"),
        (6, "2 -> 3"),
        (6, "And -> Or"),
        (6, "Lt -> LtE"),
        (6, "Sub -> Add"),
        (6, "condition negated: a < LIMIT and (not b)"),
    }
    for mutant in mutation.mutants(tree):
        changed = ast.unparse(mutation.mutated(SOURCE, mutant))
        assert changed != ast.unparse(tree)
        compile(changed, "changed", "exec")


def test_a_module_of_the_changed_tree_is_imported() -> None:
    module = "planner.does_not_exist_yet"
    finder = mutation.Changed(module, ast.parse("VALUE = 7"), Path("changed.py"))
    sys.meta_path.insert(0, finder)
    try:
        assert __import__(module, fromlist=["VALUE"]).VALUE == 7
    finally:
        sys.meta_path.remove(finder)
        sys.modules.pop(module, None)


def test_the_page_has_every_row() -> None:
    stamp = {"date": "2026-01-02", "machine": "4 x CPU", "python": "3.11.7", "version": "1"}
    finding = {"kind": "mutant", "verdict": "KeyError trace.py:1 read: 'x'"}
    fuzz = {"trace CSV": {"seconds": 600.2, "read": 10, "refused": 1990, "findings": [finding], **stamp}}
    survivor = {"line": 4, "change": "Lt -> LtE", "code": "if a < b | c:"}
    mutants = {"planner.memory": {"mutants": 300, "tried": 80, "killed": 72, "survivors": [survivor], **stamp}}
    soak = {"requests": 5, "steps": 9000, "checks": 9, "preemptions": 2, "hours": 24.0, "cpu_s": 12.3, **stamp}
    soak |= {"rss_first_third_mb": 100.0, "rss_last_third_mb": 101.5}
    page = trust.page(fuzz, mutants, {"vLLM": soak})
    assert "2,000 inputs, 1 open findings" in page and "90% of 80 mutants killed" in page
    assert "| trace CSV | 600 | 2,000 | 10 | 1,990 | 1 |" in page
    assert "| `planner.memory` | 300 | 80 | 72 | 90% |" in page and "`if a < b \\| c:`" in page
    assert "| vLLM | 24 | 5 | 9,000 | 9 | 2 | 100 and 101.5 MB | 12 s |" in page
    assert "machine: 4 x CPU" in page and "{" not in page.replace("{=", "")
    assert "tokens in are tokens out in flight or dropped" in page and "M/M/1" in page
