"""`moeplan profiles import`: published kernel tables to the compact tables the planner ships.

    source       find the newest table of an engine, read parquet
    clean        physics, monotone order, thinning
    kernels      GEMM, attention, MLA, sparse and linear attention
    experts      fused expert layers, normalised to assignments on the timed rank
    exchange     collectives and expert dispatch / combine
    engines_exchange  the same through an engine's API, and masked grouped GEMMs
    small        absorbed MLA projections, activation quantisation

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
from planner.measurements.importer import engines_exchange, exchange, experts, kernels, small
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
    "expert_gemm_masked": engines_exchange.expert_gemm_masked,
    "mla_bmm": small.mla_bmm,
    "quantize": small.quantize,
}
SKIPPED = {
    "moe/sglang/*/wideep_context_moe": "at equal assignments per rank it falls from 1.1 to 0.29 PFLOP/s as EP grows, "
    "so what was timed is not what the columns count",
    "moe/trtllm/*/wideep_moe": "power-law routing only; the assignments on the timed rank are not recorded",
    "moe/sglang/*/dsv4_megamoe_module": "dispatch, GEMMs and combine in one kernel: no operation of the planner",
    "mla/sglang/*/wideep_context_mla": "launched from the host without a CUDA graph: 0.6 ms for a prompt of one token",
    "mla/sglang/*/wideep_generation_mla": "module of SGLang 0.5.10; the newer kernel and GEMM tables (0.5.14) are used",
    "mlp/sglang/*/wideep_*_mlp": "two GEMMs of one shape, which the GEMM table has",
    "comm/trtllm/*/trtllm_alltoall (NVLinkTwoSided, low-precision combine)": "superseded by the one-sided kernels",
    "linear_attention/*/*/mamba2": "only the convolution was timed, not the scan",
    "moe/*/*/moe (power_law)": "imbalance differs by collector (1.27 to 3.99 x at EP 64): skew comes from real routing",
}
"""Families of the source that are not imported, and why."""


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """What an import wrote: rows and bytes per table, rows dropped per reason."""

    name: str
    directory: Path
    rows: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kept, lost = sum(self.rows.values()), sum(sum(d.values()) for d in self.dropped.values())
        size_mb = sum(self.bytes.values()) / 1e6
        return f"{self.name}: {len(self.rows)} tables, {kept:,} rows, {size_mb:.2f} MB; {lost:,} rows dropped"


def import_tables(
    tree: Path, system_dir_name: str, out: Path, name: str, *, system: System | None = None, date: str | None = None
) -> ImportSummary:
    """Convert `tree/<system_dir_name>` into `out/<name>/*.npz` and `meta.json`.

    `name` is a hardware profile (its peaks decide what is faster than physics) unless `system` is given. Raises
    ProfileError when the folder is missing, holds no usable table or faulty ones (all named), or pyarrow is not
    installed.
    """
    folder = tree / system_dir_name
    if not folder.is_dir():
        raise ProfileError(f"{folder}: no such folder. Give the folder that holds h200_sxm, b200_sxm ... as TREE.")
    source = Source(folder, system or find_system(name))
    ceilings = Ceilings.of(source.system)
    target = out / name
    summary = ImportSummary(name, target)
    converted = _convert(source, ceilings)
    for op, cleaned in converted.items():
        if cleaned is None or not len(cleaned.table.seconds):
            (target / f"{op}.npz").unlink(missing_ok=True)
            continue
        write_table(target / f"{op}.npz", cleaned.table)
        summary.rows[op] = len(cleaned.table.seconds)
        summary.bytes[op] = (target / f"{op}.npz").stat().st_size
        summary.dropped[op] = dict(cleaned.dropped)
    if not summary.rows:
        raise ProfileError(f"{folder}: no known table. Expected <family>/<engine>/<version>/*_perf.parquet.")
    summary.skipped.update({pattern: why for pattern, why in SKIPPED.items() if _present(folder, pattern)})
    _write_meta(target / "meta.json", source, summary, date or dt.date.today().isoformat())
    return summary


def _convert(source: Source, ceilings: Ceilings) -> dict[str, Cleaned | None]:
    """Every family converted. Raises ProfileError naming each family that could not be."""
    converted: dict[str, Cleaned | None] = {}
    faults = []
    for op, convert in FAMILIES.items():
        try:
            converted[op] = convert(source, ceilings)
        except KeyError as error:
            faults.append(f"{source.last}: column {error} is missing (needed for {op})")
        except ProfileError as error:
            faults.append(str(error))
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            faults.append(f"{source.last}: a column of {op} holds another kind of value than it should ({error})")
    if faults:
        raise ProfileError("\n".join(dict.fromkeys(faults)))
    return converted


def _present(folder: Path, pattern: str) -> bool:
    return next(folder.glob(f"{pattern.split(' ')[0]}_perf.parquet"), None) is not None


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
        "skipped": summary.skipped,
    }
    path.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
