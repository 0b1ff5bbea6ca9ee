"""The page docs/kernel_accuracy.md from held-out errors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from exchange_rows import Row
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PAGE = Path(__file__).parent.parent / "docs" / "kernel_accuracy.md"
READING = Path(__file__).parent / "kernel_reading.md"
KINDS = {"point": "grid point", "size": "token count", "shape": "shape", "model": "model"}
TARGETS: dict[str, tuple[float, float | None]] = {
    "point": (0.03, 0.12),
    "size": (0.03, None),
    "shape": (0.08, None),
    "model": (0.08, None),
}
EXCHANGE_TARGET = 0.10
INTRO = """# Accuracy of kernel times nobody measured

Written by `python benchmarks/kernel_accuracy.py` from the tables shipped in `hardware_profiles/measured` (source:
PyPI package `aiconfigurator-core` 0.12.0, NVIDIA, Apache-2.0). Times are taken out of a table, asked of the planner
through the same methods a plan uses, and compared with what was taken out. Error is |predicted / measured - 1|.

- **grid point**: one measured size of a measured shape is removed, the sizes beside it stay. Only sizes inside the
  grid count. The gap to bridge is twice that of a real question, which falls between two neighbours.
- **token count**: everything at one batch or length is removed from a measured shape. For operations over a single
  axis (GEMM, expert layer, collectives, exchange) this is the same as the grid point.
- **shape**: a shape is removed for every engine and every format; all of its sizes are asked.
- **model**: every series of the model (hidden, experts, top-k, matrices) is removed for every engine and format.

Shapes at the rim of a table count too, so these columns mix interpolation and extrapolation. Nothing is asked where
fewer than two series of the engine and format are left.
"""


@dataclass(frozen=True, slots=True)
class Held:
    """Errors |predicted / measured - 1| of one system, engine, operation and kind of omission."""

    system: str
    engine: str
    op: str
    kind: str
    errors: Floats


def write_report(held: Sequence[Held], ops: Sequence[str], exchange: Sequence[tuple[Row, float, float]]) -> Path:
    """Write the page and return its path."""
    parts = [INTRO, "## All systems together\n", *_overall(held, ops)]
    parts += ["\n## Between nodes: published dispatch and combine\n", *_exchange(exchange)]
    parts += ["\n" + READING.read_text(encoding="utf-8")]
    parts += ["## Every system, engine and operation\n", "Median / p90; `-`: nothing to leave out.\n", *_all(held, ops)]
    PAGE.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return PAGE


def _overall(held: Sequence[Held], ops: Sequence[str]) -> list[str]:
    """One line per operation and omission, errors of all systems and engines pooled with equal weight per engine."""
    lines = ["| operation | left out | cases | median | p90 | target | met by |", "|---|---|---|---|---|---|---|"]
    for op in ops:
        for kind, title in KINDS.items():
            some = [h for h in held if h.op == op and h.kind == kind]
            if not some:
                continue
            middle, tail = TARGETS[kind]
            met = sum(_meets(h) for h in some)
            wanted = f"{middle:.0%}" + (f" / {tail:.0%}" if tail else "")
            median, p90 = _quantiles(np.concatenate([h.errors for h in some]))
            cases = sum(len(h.errors) for h in some)
            lines.append(f"| {op} | {title} | {cases:,} | {median:.1%} | {p90:.1%} | {wanted} | {met} of {len(some)} |")
    return [*lines, "\nCases are single times; `met by` counts pairs of system and engine that meet the target alone."]


def _meets(held: Held) -> bool:
    middle, tail = TARGETS[held.kind]
    median, p90 = _quantiles(held.errors)
    return median <= middle and (tail is None or p90 <= tail)


def _quantiles(errors: Floats) -> tuple[float, float]:
    return float(np.median(errors)), float(np.quantile(errors, 0.9))


def _all(held: Sequence[Held], ops: Sequence[str]) -> Iterable[str]:
    cells: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
    for h in held:
        median, p90 = _quantiles(h.errors)
        cells[h.system, h.engine, h.op][h.kind] = f"{median:.1%} / {p90:.0%}"
    yield "| system | engine | operation | " + " | ".join(KINDS.values()) + " |"
    yield "|" + "---|" * (3 + len(KINDS))
    for key in sorted(cells, key=lambda k: (k[0], ops.index(k[2]), k[1])):
        name, engine, op = key
        yield f"| {name} | {engine} | {op} | " + " | ".join(cells[key].get(kind, "-") for kind in KINDS) + " |"


def _exchange(exchange: Sequence[tuple[Row, float, float]]) -> Iterable[str]:
    yield (
        f"Rows of `tests/data/published_exchange.csv`, hidden 7168, top 8 of 256 experts; target {EXCHANGE_TARGET:.0%}."
        " *Law*: the planner's law, whose floor and NIC share come from these rows. *Left out*: the same law with both"
        " numbers fitted to the other rows of the library, mode and step.\n"
    )
    yield "| library | mode | step | rows | law: median, within 10 % | left out: median, within 10 % |"
    yield "|---|---|---|---|---|---|"
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
    for row, law, left_out in exchange:
        groups[row.law].append((law, left_out))
        groups["all", "", ""].append((law, left_out))
    for key, pairs in sorted(groups.items()):
        law, left_out = np.abs(np.array(pairs)).T
        cells = (f"{np.median(e):.1%}, {np.mean(e <= EXCHANGE_TARGET):.0%}" for e in (law, left_out))
        yield f"| {' | '.join(key)} | {len(pairs)} | {' | '.join(cells)} |"
    yield "\n| library | GPU | mode | step | ranks | tokens | published us | law us | error | left out |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row, law, left_out in exchange:
        what = row.what
        yield (
            f"| {row.library} | {row.gpu} | {what.mode} | {what.step} | {what.num_gpus} | {row.tokens:.0f} | "
            f"{row.seconds * 1e6:.0f} | {row.seconds * (1 + law) * 1e6:.0f} | {law:+.0%} | {left_out:+.0%} |"
        )
