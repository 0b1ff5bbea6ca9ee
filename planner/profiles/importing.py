"""`moeplan profiles import`: whatever a user measured or downloaded, as compact tables the planner reads.

A source is one of: a tree of published parquet tables, text logs of nccl-tests or rccl-tests, or a folder of our
own CSV files with meta.json. Everything is read and checked before anything is written, and the new folder takes
the place of the old one in a single step.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from planner.errors import ProfileError
from planner.hardware import System, system, systems
from planner.measurements.importer import ImportSummary, import_tables
from planner.measurements.store import SCHEMA_VERSION, read_table, write_table
from planner.profiles.bounds import SLACK, Peaks, shortest_s
from planner.profiles.csvfiles import read_folder
from planner.profiles.meta import Meta, read_meta, write_meta
from planner.profiles.nccl_logs import looks_like_log, median_of_repeats, read_log
from planner.profiles.rows import Rows, group_numbers, joined, rows_of, tables_of
from planner.profiles.time_unit import wrong_unit
from planner.textfile import is_file, is_folder

_LOG_ENDINGS = (".log", ".txt", ".out")
_KINDS = (
    "a folder with meta.json and <op>.csv files (python -m microbench --out DIR), "
    "text logs of nccl-tests or rccl-tests (*.log, *.txt, *.out), "
    "or a tree <system>/<family>/<engine>/<version>/*_perf.parquet"
)
_MERGED = ("engines", "versions", "dropped", "skipped", "files")


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows read from a source, and what is known of where they come from."""

    rows: tuple[Rows, ...]
    meta: Meta
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)


def source_kind(source: Path, system_dir: str | None = None) -> str:
    """`csv`, `logs` or `parquet`. Raises ProfileError when the source is none of them."""
    if is_file(source):
        if source.suffix in _LOG_ENDINGS and looks_like_log(_start(source)):
            return "logs"
        raise ProfileError(f"{source}: not a log of nccl-tests. Give {_KINDS}.")
    if not is_folder(source):
        raise ProfileError(f"{source}: no such file or folder. Give {_KINDS}.")
    if system_dir is not None or next(source.glob("**/*_perf.parquet"), None) is not None:
        return "parquet"
    if any(source.glob("*.csv")) or (source / "meta.json").is_file():
        return "csv"
    if any(looks_like_log(_start(path)) for path in _log_files(source)):
        return "logs"
    raise ProfileError(f"{source}: nothing to import there. Give {_KINDS}.")


def import_profile(
    source: Path,
    name: str,
    out: Path,
    *,
    system_dir: str | None = None,
    merge: bool = False,
    date: str | None = None,
) -> ImportSummary:
    """Read `source` and write `out/<name>/*.npz` and meta.json.

    `name` should be that of a hardware profile: its data sheet is what rows are checked against. `system_dir` picks
    one system of a parquet tree. `merge` keeps tables already there; a case measured anew replaces the old row.
    Raises ProfileError with every fault of the source.
    """
    day = date or dt.date.today().isoformat()
    _check_name(name)
    kind = source_kind(source, system_dir)
    if kind == "parquet":
        if merge:
            raise ProfileError("--merge adds measurements to a profile; a parquet tree is imported as a whole.")
        tree, folder = (source, system_dir) if system_dir else _split_tree(source)
        return _in_one_step(out, name, lambda target: import_tables(tree, folder, target, name, date=day))
    device = _device(name)
    peaks = Peaks.fastest() if device is None else Peaks.of(device)
    measured = _read_logs(source, device) if kind == "logs" else _read_csv(source)
    measured = _physical(measured, peaks)
    if merge and (out / name / "meta.json").is_file():
        measured = _with_old(measured, out / name)
    return _in_one_step(out, name, lambda target: _write(target / name, name, measured, day))


def _check_name(name: str) -> None:
    if not name or name != Path(name).name or name.startswith("."):
        raise ProfileError(f"--name {name!r}: a plain folder name is needed, such as h200-sxm or my-node.")


def _split_tree(source: Path) -> tuple[Path, str]:
    """Parent and name of a system folder given directly; several systems need --system."""
    if next(source.glob("*/*/*/*_perf.parquet"), None) is not None:
        return source.resolve().parent, source.resolve().name
    found = sorted({path.parts[len(source.parts)] for path in source.glob("*/*/*/*/*_perf.parquet")})
    raise ProfileError(f"{source} holds several systems. Add --system with one of {', '.join(found) or 'its folders'}.")


def _device(name: str) -> System | None:
    return system(name) if name in systems() else None


def _start(path: Path) -> str:
    with path.open("r", encoding="utf-8", errors="replace") as file:
        return file.read(200_000)


def _log_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    return sorted(path for path in source.rglob("*") if path.suffix in _LOG_ENDINGS and path.is_file())


def _read_csv(source: Path) -> Measured:
    faults: list[str] = []
    meta: Meta = {}
    try:
        meta = read_meta(source / "meta.json")
    except ProfileError as error:
        faults.append(str(error))
    rows, wrong = read_folder(source)
    faults += wrong
    if not rows and not faults:
        faults.append(f"{source}: no rows in any <op>.csv. Run the benchmark longer.")
    _raise(faults, source)
    return Measured(tuple(rows), meta | {"files": _digests(sorted(source.glob("*.csv")))})


def _read_logs(source: Path, device: System | None) -> Measured:
    faults: list[str] = []
    parts: list[Rows] = []
    names: list[str] = []
    files = [path for path in _log_files(source) if looks_like_log(_start(path))]
    for path in files:
        rows, name, wrong = read_log(path)
        faults += wrong
        names.append(name)
        if rows is not None:
            parts.append(rows)
    _raise(faults, source)
    rows = median_of_repeats(_domains(joined(parts), device))
    libraries = () if rows.quality is None else rows.quality.libraries
    meta: Meta = {
        "device": next((name for name in names if name), ""),
        "nccl": ", ".join(libraries),
        "source": "nccl-tests or rccl-tests logs",
        "license": "the measurer's own",
        "files": _digests(files),
    }
    return Measured((rows,), meta)


def _domains(rows: Rows, device: System | None) -> Rows:
    """Count scale-up domains instead of hosts where one domain spans hosts (NVL72)."""
    if device is None or device.scale_up.size <= device.gpus_per_node:
        return rows
    domains = -(-rows.columns["num_gpus"] // device.scale_up.size)
    return replace(rows, columns={**rows.columns, "num_nodes": domains})


def _digests(files: Sequence[Path]) -> list[dict[str, str]]:
    return [{"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in files]


def _raise(faults: Sequence[str], source: Path) -> None:
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise ProfileError(f"{source}: {len(faults)} fault{'s' * (len(faults) > 1)}, nothing was imported\n{listed}")


def _physical(measured: Measured, peaks: Peaks) -> Measured:
    """Drop and count rows faster than physics; raise when a whole file looks like another unit."""
    faults, kept, dropped = [], [], {}
    for rows in measured.rows:
        bound = shortest_s(rows, peaks)
        unit = wrong_unit(rows.seconds, bound, peaks.name)
        if unit:
            faults.append(f"{rows.op.name}.csv: {unit}")
        possible = rows.seconds * SLACK >= bound
        if not possible.all():
            reason = f"faster than the data sheet of {peaks.name} allows"
            dropped[rows.op.name] = {reason: int(np.count_nonzero(~possible))}
        if possible.any():
            kept.append(rows.take(possible))
    _raise(faults, Path(str(measured.meta.get("source", "source"))))
    if not kept:
        raise ProfileError(f"every row is faster than the data sheet of {peaks.name} allows; was --name chosen right?")
    return Measured(tuple(kept), measured.meta, dropped)


def _with_old(measured: Measured, folder: Path) -> Measured:
    """The profile in `folder` with the cases of `measured` in place of its own."""
    old: dict[str, list[Rows]] = {}
    for path in sorted(folder.glob("*.npz")):
        rows = rows_of(read_table(path))
        old.setdefault(rows.op.name, []).append(rows)
    fresh = {rows.op.name: rows for rows in measured.rows}
    merged = [_replaced(joined(parts), fresh.pop(name, None)) for name, parts in old.items()]
    before = read_meta(folder / "meta.json")
    meta = before | {key: value for key, value in measured.meta.items() if value}
    for key in _MERGED:
        meta[key] = _union(before.get(key), measured.meta.get(key))
    meta["source"] = "; ".join(dict.fromkeys(m.get("source", "") for m in (before, measured.meta)))
    return Measured((*merged, *fresh.values()), meta, measured.dropped)


def _union(one: Any, other: Any) -> Any:
    if isinstance(one, dict) or isinstance(other, dict):
        return {**(one or {}), **(other or {})}
    both = [*(one or []), *(other or [])]
    return [item for at, item in enumerate(both) if item not in both[:at]]


def _replaced(old: Rows, new: Rows | None) -> Rows:
    if new is None:
        return old
    both = joined([new, old])
    case = group_numbers([both.columns[column.name] for column in both.op.columns], len(both))
    measured_again = np.isin(case[len(new) :], case[: len(new)])
    return joined([new, old.take(~measured_again)]) if not measured_again.all() else new


def _write(folder: Path, name: str, measured: Measured, day: str) -> ImportSummary:
    summary = ImportSummary(name, folder, dropped=dict(measured.dropped))
    engines: set[str] = set()
    for rows in measured.rows:
        engines |= {str(engine) for engine in np.unique(rows.columns["engine"])}
        for stem, table in tables_of(rows).items():
            write_table(folder / f"{stem}.npz", table)
            summary.rows[stem] = len(table.seconds)
            summary.bytes[stem] = (folder / f"{stem}.npz").stat().st_size
    if measured.meta.get("is_representative") is False:
        summary.notes.append("whoever measured says that these times are not representative of any GPU")
    meta: Meta = {"schema_version": SCHEMA_VERSION, "system": name} | measured.meta
    meta["license"] = meta.pop("licence", meta.get("license", "not stated"))
    meta |= {"schema_version": SCHEMA_VERSION, "system": name, "engines": sorted(engines), "converted": day}
    before: dict[str, dict[str, int]] = meta.get("dropped") or {}
    meta |= {"rows": summary.rows, "dropped": before | measured.dropped}
    write_meta(folder / "meta.json", meta)
    return summary


def _in_one_step(out: Path, name: str, write: Any) -> ImportSummary:
    """Let `write(folder)` fill a folder aside, then put its `<name>` in place of `out/<name>`."""
    aside = out / f".importing-{name}-{os.getpid()}"
    target = out / name
    try:
        aside.mkdir(parents=True)
        summary: ImportSummary = write(aside)
        _replace(target, aside / name, aside / "old")
    except OSError as error:
        raise ProfileError(f"{out}: {error.strerror or error}. Choose an --out folder you may write to.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return replace(summary, directory=target)


def _replace(target: Path, new: Path, old: Path) -> None:
    """Put `new` where `target` is; what was there comes back when that fails."""
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
