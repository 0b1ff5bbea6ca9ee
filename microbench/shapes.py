"""A shapes file: `{"models": [...], "cases": [{"op": "gemm", "fmt": "bf16", "rows": 4096, "cols": 4096}, ...]}`.

Each case holds the key columns of one operation, the most informative first. Columns that the run fills may be left
out (engine, group sizes, families, and distribution, for which all three are measured); token counts and sizes are the
microbench's own. `exchange` takes an optional `width`, the expert width its layer round trip multiplies with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from microbench.cases import CHOICES, OPS, TEXT, Value
from microbench.errors import InputError, nearest
from microbench.models import Shape, machine_shapes

_MOST_FAULTS = 12
_MAY_BE_ZERO = ("window",)


def read_shapes(path: Path) -> list[tuple[str, Shape]]:
    """(operation, key columns) of a shapes file.

    What the file does not list is added: memory, host and collective, which depend on the machine only, and
    expert_parts and exchange of the experts it lists.

    Raises InputError with every fault of the file.
    """
    document = _read_json(path)
    cases = document.get("cases") if isinstance(document, dict) else None
    if not isinstance(cases, list) or not cases:
        raise InputError(
            f'{path}: no list "cases" with at least one case. Write it with: moeplan profiles shapes MODEL'
        )
    faults = [fault for index, case in enumerate(cases) for fault in _faults(case, f"cases[{index}]")]
    if faults:
        more = [f"... and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
        raise InputError("\n".join(f"{path}: {fault}" for fault in faults[:_MOST_FAULTS] + more))
    found = [(str(case["op"]), _keys(case)) for case in cases]
    listed = {op for op, _ in found}
    added = [*_expert_shapes(found), *machine_shapes()]
    return _with_widths(found) + [(op, shape) for op, shape in added if op not in listed]


def _widest(found: list[tuple[str, Shape]]) -> dict[tuple[Value, Value, Value], int]:
    """Expert width of each model (hidden, num_experts, top_k): the widest listed, as tensor parallelism narrows it."""
    widths: dict[tuple[Value, Value, Value], int] = {}
    for op, shape in found:
        if op == "expert_gemm":
            model = shape["hidden"], shape["num_experts"], shape["top_k"]
            widths[model] = max(widths.get(model, 0), int(shape["width"]))
    return widths


def _expert_shapes(found: list[tuple[str, Shape]]) -> list[tuple[str, Shape]]:
    shapes: list[tuple[str, Shape]] = []
    for (hidden, num_experts, top_k), width in _widest(found).items():
        model: Shape = {"hidden": hidden, "num_experts": num_experts, "top_k": top_k, "fmt": "bf16", "width": width}
        shapes += [("expert_parts", {"part": part, **model}) for part in CHOICES["expert_parts"]["part"]]
        shapes.append(("exchange", model))
    return shapes


def _with_widths(found: list[tuple[str, Shape]]) -> list[tuple[str, Shape]]:
    """Exchanges that state no expert width take that of the same model's experts."""
    widths = _widest(found)
    completed = []
    for op, shape in found:
        if op == "exchange" and "width" not in shape:
            shape = {**shape, "width": widths.get((shape["hidden"], shape["num_experts"], shape["top_k"]), 0)}
        completed.append((op, shape))
    return completed


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error}). Write it with: moeplan profiles shapes MODEL") from error


def _faults(case: Any, where: str) -> list[str]:
    if not isinstance(case, dict) or not isinstance(case.get("op"), str):
        return [f'{where}: is no object with an "op"']
    op = case["op"]
    if op not in OPS:
        return [f"{where}: unknown op {op!r}; {nearest(op, OPS)}"]
    return [*_column_faults(op, case, where), *_value_faults(op, case, where)]


def _column_faults(op: str, case: dict[str, Any], where: str) -> list[str]:
    given = set(case) - {"op"}
    needed = [name for name in OPS[op].keys if name not in OPS[op].filled]
    faults = [f"{where} ({op}): missing key {_spelled(name)}" for name in needed if _spelled(name) not in given]
    unknown = sorted(given - {_spelled(name) for name in OPS[op].keys} - ({"width"} if op == "exchange" else set()))
    return faults + [f"{where} ({op}): unknown key {name}; {nearest(name, OPS[op].keys)}" for name in unknown]


def _value_faults(op: str, case: dict[str, Any], where: str) -> list[str]:
    faults = []
    for name in (*OPS[op].keys, *(("width",) if op == "exchange" else ())):
        value = case.get(_spelled(name))
        if value is None:
            continue
        if name in TEXT:
            choices = CHOICES.get(op, {}).get(name, ()) if name not in ("fmt", "gemm_fmt") else ()
            if not isinstance(value, str) or (choices and value not in choices):
                faults.append(f"{where} ({op}): {name} = {value!r}; use one of {', '.join(choices) or 'a word'}")
        elif not isinstance(value, int) or isinstance(value, bool) or value < (0 if name in _MAY_BE_ZERO else 1):
            faults.append(f"{where} ({op}): {name} = {value!r} is no positive integer")
    return faults


def _spelled(name: str) -> str:
    """The key `op` of collectives is spelled `collective` in a shapes file, where `op` names the operation."""
    return "collective" if name == "op" else name


def _keys(case: dict[str, Any]) -> Shape:
    return {"op" if name == "collective" else name: value for name, value in case.items() if name != "op"}
