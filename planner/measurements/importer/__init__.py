"""`moeplan profiles import`: published kernel tables to the compact tables the planner ships.

    source       find the newest table of an engine, read parquet
    clean        physics, monotone order, thinning
    kernels      GEMM, attention, MLA, sparse and linear attention
    experts      fused expert layers, normalised to assignments on the timed rank
    exchange     collectives and expert dispatch / combine

Source tables: PyPI package aiconfigurator-core, folder systems/data (NVIDIA, Apache-2.0).
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.errors import ProfileError
from planner.hardware import System
from planner.hardware import system as find_system
from planner.measurements.importer import exchange, experts, kernels
from planner.measurements.importer.clean import Cleaned
from planner.measurements.importer.source import Source
from planner.measurements.roofline import Ceilings
from planner.measurements.store import SCHEMA_VERSION, write_table

SOURCE_PACKAGE = "aiconfigurator-core 0.12.0"
ATTRIBUTION = (
    "Kernel times measured and published by NVIDIA in the PyPI package aiconfigurator-core (Apache License 2.0, "
    "Copyright NVIDIA CORPORATION & AFFILIATES). Selected, normalised, cleaned and re-encoded by moeplan."
)

FAMILIES: dict[str, Callable[[Source, Ceilings], Cleaned | None]] = {
    "gemm": kernels.gemm,
    "expert_gemm": experts.expert_gemm,
    "prefill_attention": kernels.prefill_attention,
    "decode_attention": kernels.decode_attention,
    "mla_prefill": kernels.mla_prefill,
    "mla_decode": kernels.mla_decode,
    "sparse_mla_prefill": kernels.sparse_mla_prefill,
    "sparse_mla_decode": kernels.sparse_mla_decode,
    "linear_prefill": kernels.linear_prefill,
    "linear_decode": kernels.linear_decode,
    "collective": exchange.collective,
    "dispatch": exchange.dispatch,
}


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """What an import wrote: rows and bytes per table, rows dropped per reason."""

    name: str
    directory: Path
    rows: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        kept, lost = sum(self.rows.values()), sum(sum(d.values()) for d in self.dropped.values())
        size_mb = sum(self.bytes.values()) / 1e6
        return f"{self.name}: {len(self.rows)} tables, {kept:,} rows, {size_mb:.2f} MB; {lost:,} rows dropped"


def import_tables(
    tree: Path, system_dir_name: str, out: Path, name: str, *, system: System | None = None, date: str | None = None
) -> ImportSummary:
    """Convert `tree/<system_dir_name>` into `out/<name>/*.npz` and `meta.json`.

    `name` is a hardware profile (its peaks decide what is faster than physics) unless `system` is given. Raises
    ProfileError when the folder is missing, holds no usable table, or pyarrow is not installed.
    """
    folder = tree / system_dir_name
    if not folder.is_dir():
        raise ProfileError(f"{folder}: no such folder. Give the folder that holds h200_sxm, b200_sxm ... as TREE.")
    source = Source(folder, system or find_system(name))
    ceilings = Ceilings.of(source.system)
    target = out / name
    summary = ImportSummary(name, target)
    for op, convert in FAMILIES.items():
        cleaned = convert(source, ceilings)
        if cleaned is None or not len(cleaned.table.seconds):
            (target / f"{op}.npz").unlink(missing_ok=True)
            continue
        write_table(target / f"{op}.npz", cleaned.table)
        summary.rows[op] = len(cleaned.table.seconds)
        summary.bytes[op] = (target / f"{op}.npz").stat().st_size
        summary.dropped[op] = dict(cleaned.dropped)
    if not summary.rows:
        raise ProfileError(f"{folder}: no known table. Expected <family>/<engine>/<version>/*_perf.parquet.")
    _write_meta(target / "meta.json", source, summary, date or dt.date.today().isoformat())
    return summary


def _write_meta(path: Path, source: Source, summary: ImportSummary, date: str) -> None:
    meta: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "system": summary.name,
        "device": source.device,
        "engines": sorted({engine for engine, _ in source.used if engine in ("vllm", "sglang", "trtllm")}),
        "versions": {op: dict(sorted(versions.items())) for op, versions in sorted(source.versions.items())},
        "source": SOURCE_PACKAGE,
        "license": "Apache-2.0",
        "attribution": ATTRIBUTION,
        "converted": date,
        "rows": summary.rows,
        "dropped": {op: reasons for op, reasons in summary.dropped.items() if reasons},
    }
    path.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
