"""`moeplan profiles check`: every fault of a profile, as facts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from planner.errors import ProfileError, nearest
from planner.hardware import System, system, systems
from planner.measurements.library import measured_directory
from planner.measurements.store import read_table
from planner.profiles.bounds import Peaks, shortest_s
from planner.profiles.checks import KINDS, Finding, findings
from planner.profiles.csvfiles import read_folder
from planner.profiles.meta import Meta, read_meta
from planner.profiles.rows import Rows, joined, rows_of
from planner.profiles.time_unit import wrong_unit
from planner.textfile import is_folder

Facts = dict[str, Any]


def profile_folder(name_or_folder: str) -> Path:
    """Folder of a profile given by system name or by path. Raises ProfileError with near names."""
    folder = Path(name_or_folder)
    if is_folder(folder):
        return folder
    found = measured_directory(name_or_folder)
    if found is None:
        known = [name for name in systems() if measured_directory(name) is not None]
        raise ProfileError(
            f"profile {name_or_folder!r}: no such folder and no measured system of that name: "
            f"{nearest(name_or_folder, known)}"
        )
    return found


def read_profile_rows(folder: Path) -> tuple[Meta, list[Rows], list[str]]:
    """meta.json, rows per operation, and faults of reading, of a compiled profile or a folder of CSV files."""
    faults: list[str] = []
    try:
        meta = read_meta(folder / "meta.json")
    except ProfileError as error:
        meta, faults = {}, [str(error)]
    parts: dict[str, list[Rows]] = {}
    for path in sorted(folder.glob("*.npz")):
        try:
            rows = rows_of(read_table(path))
        except (ProfileError, KeyError) as error:
            faults.append(str(error))
            continue
        parts.setdefault(rows.op.name, []).append(rows)
    found = [joined(each) for each in parts.values()]
    if not parts:
        found, wrong = read_folder(folder)
        faults += wrong
    if not found and not faults:
        raise ProfileError(f"{folder}: no tables. A profile folder holds <op>.npz or <op>.csv files and meta.json.")
    return meta, found, faults


def check_facts(name_or_folder: str, worst: int = 10) -> Facts:
    """What `profiles check --json` prints: counts per operation and kind, and the worst rows of each."""
    folder = profile_folder(name_or_folder)
    meta, tables, faults = read_profile_rows(folder)
    device = _device(str(meta.get("system") or folder.name))
    found: list[Finding] = []
    for rows in tables:
        faults += _unit_fault(rows, device)
        found += findings(rows, device)
    return {
        "profile": str(meta.get("system") or folder.name),
        "folder": str(folder),
        "checked_against": device.name if device else "the fastest of all known devices",
        "rows": {rows.op.name: len(rows) for rows in tables},
        "unreadable": faults,
        "counts": _counts(found),
        "findings": _worst(found, worst),
        "clean": not faults and not found,
    }


def _device(name: str) -> System | None:
    return system(name) if name in systems() else None


def _unit_fault(rows: Rows, device: System | None) -> list[str]:
    peaks = Peaks.fastest() if device is None else Peaks.of(device)
    unit = wrong_unit(rows.seconds, shortest_s(rows, peaks), peaks.name)
    return [f"{rows.op.name}: {unit}"] if unit else []


def _counts(found: list[Finding]) -> dict[str, dict[str, int]]:
    counted = Counter((finding.op, finding.kind) for finding in found)
    ops = sorted({op for op, _ in counted})
    return {op: {kind: counted[op, kind] for kind in KINDS if counted[op, kind]} for op in ops}


def _worst(found: list[Finding], worst: int) -> list[Facts]:
    """The worst rows of each operation and kind."""
    shown = []
    for key in sorted({(finding.op, finding.kind) for finding in found}):
        mine = sorted((f for f in found if (f.op, f.kind) == key), key=lambda f: (-f.factor, f.row))
        shown += [{"op": f.op, "kind": f.kind, "row": f.row, "why": f.why} for f in mine[:worst]]
    return shown
