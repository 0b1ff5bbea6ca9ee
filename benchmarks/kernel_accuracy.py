"""Leave measured kernel times out, predict them from the rest, and write docs/kernel_accuracy.md.

    python benchmarks/kernel_accuracy.py

Nothing is fitted here and nothing outside the project is read: the tables are those shipped in hardware_profiles,
the exchange rows those of tests/data/published_exchange.csv. Samples are drawn with a fixed seed.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planner.hardware import system
from planner.measurements import Tables
from planner.measurements.library import Library, measured_directory
from planner.measurements.roofline import Ceilings
from planner.measurements.store import Table

sys.path.insert(0, str(Path(__file__).parent))
from exchange_rows import errors as exchange_errors
from kernel_report import Held, write_report

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Ask = Callable[[Tables], Callable[[Floats, Floats], Floats]]
"""Opens the operation of a held-out series on tables that lack it; gives its time at (first axis, second axis)."""

SYSTEMS = (
    "a100-80-sxm",
    "l40s",
    "h100-sxm",
    "h200-sxm",
    "b200-sxm",
    "b300-sxm",
    "gb200-nvl72",
    "gb300-nvl72",
    "rtx-pro-6000",
)
OPS = (
    "gemm",
    "expert_gemm",
    "prefill_attention",
    "decode_attention",
    "mla_prefill",
    "mla_decode",
    "sparse_mla_prefill",
    "sparse_mla_decode",
    "linear_prefill",
    "linear_decode",
    "collective",
    "dispatch",
)
MODEL = ("hidden", "num_experts", "top_k", "num_matrices")
ASKED_AS = {"vllm": "vllm", "sglang": "sglang", "trtllm": "trtllm", "deepep": "vllm", "nccl": "vllm"}
"""Engine of a table -> engine of a plan that reads it; what no plan reads is not judged."""
SERIES, POINTS = 40, 6
"""Series per system, engine and operation; points or sizes left out of each."""
SEED = 20261122


class Borrowed(Library):
    """A library whose only table is the one given."""

    def __init__(self, op: str, table: Table) -> None:
        super().__init__(None)
        self._tables[op] = table

    def table(self, op: str) -> Table | None:
        """The given table, or None for any other operation."""
        return self._tables.get(op)


@dataclass(frozen=True, slots=True)
class Case:
    """One measured series and how to ask the planner for it."""

    table: Table
    series: int
    engine: str
    ask: Ask

    def predict(self, tables: Table, name: str, at: tuple[Floats, Floats]) -> Floats:
        """Seconds from `tables`, which lack what is asked."""
        machine = system(name)
        opened = Tables(machine, self.engine, Borrowed(tables.op, tables), Ceilings.of(machine))
        return self.ask(opened)(*at)


def keep_series(table: Table, keep: NDArray[np.bool_]) -> Table:
    """`table` with the chosen series only."""
    rows = np.repeat(keep, np.diff(table.start))
    return replace(
        table,
        keys={name: column[keep] for name, column in table.keys.items()},
        axes={name: column[rows] for name, column in table.axes.items()},
        start=np.concatenate([[0], np.cumsum(np.diff(table.start)[keep])]),
        seconds=table.seconds[rows],
    )


def keep_rows(table: Table, keep: NDArray[np.bool_]) -> Table:
    """A table of one series with the chosen rows only."""
    axes = {name: column[keep] for name, column in table.axes.items()}
    return replace(table, axes=axes, start=np.array([0, int(keep.sum())]), seconds=table.seconds[keep])


def asker(table: Table, series: int) -> Ask:
    """How the planner is asked for the shape of `series`."""
    op = table.op
    k = {name: int(column[series]) for name, column in table.keys.items()}
    label = {name: table.label(name, series) for name in table.categories}
    kv, fmt = label.get("kv_fmt", ""), label.get("fmt", label.get("gemm_fmt", ""))
    fmt = "bf16" if fmt == "kernel" else fmt
    heads = [k.get(name, 0) for name in ("heads", "kv_heads", "head_dim")]
    deltas = [k.get(name, 0) for name in ("k_heads", "v_heads", "k_dim", "v_dim")]
    expert = [k.get(name, 0) for name in ("hidden", "width", "local_experts", "num_experts", "top_k", "num_matrices")]
    exchange = [k.get(name, 0) for name in ("num_gpus", "nodes", "hidden", "top_k", "num_experts")]
    surfaces: dict[str, Callable[[Tables], object]] = {
        "prefill_attention": lambda t: t.prefill_attention(*heads, kv, k["window"] or None),
        "decode_attention": lambda t: t.decode_attention(*heads, kv, k["window"] or None),
        "mla_prefill": lambda t: t.mla_prefill(k["heads"], kv, fmt),
        "mla_decode": lambda t: t.mla_decode(k["heads"], kv, fmt),
        "sparse_mla_prefill": lambda t: t.sparse_mla_prefill(k["heads"], kv, fmt),
        "sparse_mla_decode": lambda t: t.sparse_mla_decode(k["heads"], kv, fmt),
        "linear_prefill": lambda t: t.linear_attention("prefill", *deltas),
        "linear_decode": lambda t: t.linear_attention("decode", *deltas),
    }
    if op in surfaces:
        return lambda t: surfaces[op](t).seconds  # type: ignore[attr-defined, no-any-return]
    curves: dict[str, Callable[[Tables], object]] = {
        "gemm": lambda t: t.gemm(fmt, k["rows"], k["cols"]),
        "expert_gemm": lambda t: t.expert_gemm(fmt, *expert),
        "collective": lambda t: (
            t.all_reduce(k["num_gpus"], bool(k["graph"]))
            if label["op"] == "all_reduce"
            else t._collective(label["op"], k["num_gpus"])
        ),
        "dispatch": lambda t: getattr(t, label["step"])(label["mode"], *exchange, fmt),
    }
    return lambda t: lambda x, _: curves[op](t).seconds(x)  # type: ignore[attr-defined, no-any-return]


def comparable(table: Table, series: int) -> NDArray[np.bool_]:
    """Series that may answer for `series`: MLA kernels and whole modules, NCCL and own kernels never mix."""
    same = np.ones(len(table.start) - 1, np.bool_)
    if table.op == "collective":
        nccl = table.keys["engine"] == table.code("engine", "nccl")
        same &= (nccl == nccl[series]) & (table.keys["op"] == table.keys["op"][series])
    elif table.op.startswith("mla"):
        kernel = table.keys["gemm_fmt"] == table.code("gemm_fmt", "kernel")
        same &= kernel == kernel[series]
    return same


def inner(values: Ints) -> Ints:
    """Distinct values without the first and last, which would have to be extrapolated."""
    return np.unique(values)[1:-1]


def left_out_of_grid(case: Case, name: str, rng: np.random.Generator) -> Iterator[tuple[str, Floats]]:
    """Errors when a single point, or everything of one size along one axis, is left out of a measured series."""
    table, alone = case.table, np.zeros(len(case.table.start) - 1, np.bool_)
    alone[case.series] = True
    mine = keep_series(table, alone)
    axes = list(mine.axes.values())
    first, second = axes[0], axes[-1]
    both = np.isin(first, inner(first)) & (np.isin(second, inner(second)) | (len(np.unique(second)) == 1))
    for row in rng.permutation(np.flatnonzero(both))[:POINTS]:
        yield "point", errors(case, name, keep_rows(mine, np.arange(len(first)) != row), mine, np.array([row]))
    if len(axes) == 1:
        return
    for axis, other in ((first, second), (second, first)):
        for value in rng.permutation(inner(axis))[: POINTS // 3]:
            gone = axis == value
            asked = np.flatnonzero(gone & np.isin(other, other[~gone]))
            if len(asked):
                yield "size", errors(case, name, keep_rows(mine, ~gone), mine, asked)


def left_out_of_table(case: Case, name: str) -> Iterator[tuple[str, Floats]]:
    """Errors when a shape is left out for every engine and format, and when a whole model is (expert layers)."""
    table, series = case.table, case.series
    alone = np.zeros(len(table.start) - 1, np.bool_)
    alone[series] = True
    mine = keep_series(table, alone)
    usable = comparable(table, series)
    numeric = [key for key in table.keys if key not in table.categories and key != "graph"]
    for kind, keys in (("shape", numeric), ("model", list(MODEL) if table.op == "expert_gemm" else [])):
        if not keys:
            continue
        same = np.all([table.keys[key] == table.keys[key][series] for key in keys], axis=0)
        owner = [table.keys[key] == table.keys[key][series] for key in ("engine", "fmt") if key in table.keys]
        if (usable & ~same & np.all(owner, axis=0)).sum() < 2:
            continue
        yield kind, errors(case, name, keep_series(table, usable & ~same), mine, np.arange(len(mine.seconds)))


def errors(case: Case, name: str, known: Table, mine: Table, asked: Ints) -> Floats:
    """|predicted / measured - 1| at rows `asked` of `mine` from what is `known`."""
    axes = list(mine.axes.values())
    at = axes[0][asked].astype(float), axes[-1][asked].astype(float)
    return np.asarray(np.abs(case.predict(known, name, at) / mine.seconds[asked] - 1))


def hold_out(name: str) -> list[Held]:
    """All errors of one system."""
    library = Library(measured_directory(name))
    found: dict[tuple[str, str, str], list[Floats]] = defaultdict(list)
    for op in OPS:
        table = library.table(op)
        if table is None:
            continue
        for owner in sorted(set(table.keys["engine"].tolist())):
            engine = table.categories["engine"][owner]
            if engine not in ASKED_AS:
                continue
            rng = np.random.default_rng([SEED, OPS.index(op), owner])
            for series in rng.permutation(np.flatnonzero(table.keys["engine"] == owner))[:SERIES]:
                case = Case(table, int(series), ASKED_AS[engine], asker(table, int(series)))
                for kind, wrong in (*left_out_of_grid(case, name, rng), *left_out_of_table(case, name)):
                    found[engine, op, kind].append(wrong)
    return [Held(name, *key, np.concatenate(parts)) for key, parts in found.items()]


def main(arguments: Sequence[str]) -> None:
    started = time.perf_counter()
    names = arguments or SYSTEMS
    with ProcessPoolExecutor(2) as pool:
        held = [h for some in pool.map(hold_out, names) for h in some]
    path = write_report(held, OPS, exchange_errors())
    print(f"{path} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
