"""The ledger against measured KV capacities and loaded weights of memory_points.csv, one row each."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from planner.engine import Engine, Limits, engine
from planner.errors import PlannerError
from planner.layout import Layout
from planner.memory import Ledger
from planner.model import load
from planner.validation.names import engine_of, system_of

GIB = 2.0**30
_SETTING = re.compile(r"max[-_]num[-_](batched[-_]tokens|seqs)[ =]([0-9]+)")


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """One measured quantity with ours; `ours` is None where `note` says why."""

    name: str
    what: str
    measured: float
    ours: float | None
    unit: str
    note: str

    @property
    def deviation(self) -> float | None:
        """Ours over measured, less one."""
        return None if self.ours is None else self.ours / self.measured - 1


def rows(path: Path) -> list[MemoryRow]:
    """A row per line of the file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(fields) for fields in csv.DictReader(file)]


def _row(fields: dict[str, str]) -> MemoryRow:
    degree = f", TP{int(float(fields['tp']))} {fields['gpu']}" if fields["tp"] else ""
    what = f"{fields['model']}{degree}, {fields['engine']}: {fields['quantity'].replace('_', ' ')}"
    measured, unit = float(fields["value"]), fields["unit"]
    note = "" if fields["gpu_mem_util"] or fields["quantity"] != "kv_cache_tokens" else "memory fraction not stated"
    try:
        return MemoryRow(fields["id"], what, measured, _ours(fields), unit, note)
    except PlannerError as error:
        return MemoryRow(fields["id"], what, measured, None, unit, str(error))


def _ours(fields: dict[str, str]) -> float:
    """Our value of the row's quantity in its unit."""
    model = load(fields["model"].split(" ")[0])
    if fields["quantity"] == "model_file_size":
        return model.weight_bytes / GIB
    chosen, serving = system_of(fields["gpu"]), _engine(fields)
    tp = int(float(fields["tp"]))
    default = serving.budget(chosen.gpu.hbm_bytes, chosen.gpu.arch)
    stated = {key[0]: int(value) for key, value in _SETTING.findall(fields["notes"])}
    tokens = stated.get("b", default.max_batched_tokens)
    limits = Limits(min(stated.get("s", default.max_num_seqs), tokens), tokens)
    use = Ledger(model, chosen, serving).use(Layout(tp=tp, moe_tp=tp if model.moe else 1), limits, "all_reduce", 4096)
    quantities = {
        "kv_cache_tokens": float(use.kv_tokens),
        "model_weights_loaded": use.weight_bytes / (GIB if fields["unit"] == "GiB" else 1e9),
        "kv_cache_memory_available": use.terms.get("kv_cache", 0.0) / GIB,
    }
    return quantities[fields["quantity"]]


def _engine(fields: dict[str, str]) -> Engine:
    if fields["engine"] == "llama.cpp":
        return engine("llamacpp")
    serving = engine_of(fields["engine"])
    return serving.with_memory_fraction(float(fields["gpu_mem_util"])) if fields["gpu_mem_util"] else serving
