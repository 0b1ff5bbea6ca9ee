"""Text logs of nccl-tests and rccl-tests as rows of `collective`.

The out-of-place columns are read; sizes follow nccl-tests, which are the table's. Ranks and nodes come from the
`# Rank` lines. NCCL and RCCL share one API, so both are engine `nccl`; `library` says which ran.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from planner.errors import ProfileError, nearest
from planner.profiles.ops import OPS
from planner.profiles.rows import Rows, quality_of
from planner.textfile import check_file
from planner.units import US

TESTS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "sendrecv": "send_recv",
}
_OTHER_TESTS = ("broadcast", "gather", "hypercube", "reduce", "scatter")
_RANK = re.compile(r"#\s+Rank\s+(\d+)\s.*?\bon\s+(\S+)\s+device\s+\S+\s+(?:\[\S+\]\s+)?(.*)")
_TEST = re.compile(r"\b([a-z_]+)_perf\b")
_PREFIX = re.compile(r"^(?:\[[\d,]+\]<std(?:out|err)>:\s?|\d+:\s)")
_LIBRARY = re.compile(r"(?:nccl-library=|NCCL version |RCCL version[ :]+)([\w.+-]+)")
_ITERS = re.compile(r"(?<!warmup )\biters:\s*(\d{1,9})\b")
_MOST_SIZE = 2**60
_LOOSE = 0.05
"""algbw is printed with two decimals."""


@dataclass(slots=True)
class _Section:
    """One run of one test inside a log."""

    test: str = ""
    hosts: list[str] = field(default_factory=list)
    device: str = ""
    repeats: int = 1
    names: list[str] = field(default_factory=list)
    unit: str = ""
    lines: list[tuple[int, list[str]]] = field(default_factory=list)
    finished: bool = False
    failed: str = ""


def looks_like_log(text: str) -> bool:
    """True for output of nccl-tests or rccl-tests, whole or cut off."""
    return "busbw" in text and bool(re.search(r"^\D{0,20}#\s+Rank\s|nThread", text, re.MULTILINE))


def read_log(path: Path) -> tuple[Rows | None, str, list[str]]:
    """Rows of one log (None when faulty), the device it names, and every fault."""
    check_file(path, ProfileError)
    text = path.read_text(encoding="utf-8", errors="replace")
    library = _library(text)
    parts, faults = [], []
    device = ""
    for section in _sections(text, path.stem):
        device = device or section.device
        found, wrong = _section_rows(section, library, path.name)
        faults += wrong
        parts += found
    if not parts and not faults:
        faults.append(f"{path.name}: no result lines of nccl-tests. Give the text the test printed.")
    return (None if faults else _rows(parts)), device, faults


def _library(text: str) -> str:
    version = _LIBRARY.search(text)
    name = "rccl" if re.search(r"rccl|gfx9|Instinct|\bMI\d{3}", text, re.IGNORECASE) else "nccl"
    return f"{name} {version[1]}" if version else name


def _sections(text: str, stem: str) -> Iterator[_Section]:
    section, named = _Section(), ""
    for number, raw in enumerate(text.splitlines(), start=1):
        line = _PREFIX.sub("", raw).rstrip()
        test = _TEST.search(line)
        if test and (test[1] in TESTS or test[1] in _OTHER_TESTS):
            named = test[1]
        if "nThread" in line:
            if section.names:
                yield section
            section = _Section(repeats=int(m[1]) if (m := _ITERS.search(line)) else 1)
        section.test = named or section.test
        _take(section, number, line)
    if section.names or section.hosts:
        section.test = section.test or next((t for t in (*TESTS, *_OTHER_TESTS) if t in stem), "")
        yield section


def _take(section: _Section, number: int, line: str) -> None:
    """Note what one line says about its section."""
    words = line.lstrip("# ").split()
    rank = _RANK.match(line)
    if rank:
        section.hosts.append(rank[2])
        section.device = section.device or rank[3].strip()
    elif line.startswith("#") and "busbw" in words and "size" in words:
        section.names = words
    elif line.startswith("#") and words[:1] == ["(B)"]:
        units = [word for word in words if word in ("(s)", "(ms)", "(us)", "(ns)")]
        section.unit = units[0] if units else ""
    elif "Avg bus bandwidth" in line:
        section.finished = True
    elif "Out of bounds values" in line and "OK" not in line:
        section.failed = line.lstrip("# ")
    elif section.names and words and words[0].isdigit() and not line.startswith("#"):
        section.lines.append((number, words))


def _section_rows(section: _Section, library: str, file: str) -> tuple[list[dict[str, object]], list[str]]:
    faults = _section_faults(section, file)
    rows = []
    for number, words in section.lines:
        row, fault = _line(section, words)
        if fault:
            faults.append(f"{file}: line {number}: {fault}")
        else:
            rows.append(row | {"library": library, "repeats": section.repeats})
    return ([] if faults else rows), faults


def _section_faults(section: _Section, file: str) -> list[str]:
    faults = []
    if section.test not in TESTS:
        known = ", ".join(f"{test}_perf" for test in TESTS)
        hint = nearest(section.test, TESTS) if section.test else f"name the file after the test, one of {known}"
        faults.append(f"{file}: test {section.test or '(not named)'!r} is not imported: {hint}")
    if len(section.hosts) < 2:
        faults.append(f"{file}: {len(section.hosts)} '# Rank' lines, two or more are needed to know who takes part")
    if section.unit not in ("", "(us)"):
        faults.append(f"{file}: the time column is in {section.unit}, nccl-tests prints (us). Convert it first.")
    if section.failed:
        faults.append(f"{file}: the test failed its own check: {section.failed}")
    if not section.finished:
        faults.append(f"{file}: cut off: no '# Avg bus bandwidth' line at the end. Run the test again.")
    return faults


def _line(section: _Section, words: Sequence[str]) -> tuple[dict[str, object], str]:
    """Row of one result line; the first time, algbw and #wrong are the out-of-place ones."""
    if len(words) < len(section.names):
        return {}, f"{len(words)} of {len(section.names)} values: cut off"
    missing = [name for name in ("size", "time", "algbw") if name not in section.names]
    if missing:
        return {}, f"no column {', '.join(missing)} in the header above it"
    at = {name: words[section.names.index(name)] for name in ("size", "time", "algbw")}
    try:
        size, time_us, algbw = int(at["size"]), float(at["time"]), float(at["algbw"])
    except ValueError:
        return {}, f"not a number among {', '.join(at.values())}"
    if size > _MOST_SIZE:
        return {}, f"size {at['size'][:30]}: no message has that many bytes"
    if not np.isfinite(time_us) or time_us <= 0:
        return {}, f"time {at['time']}: a positive number of microseconds is needed"
    wrong = next((words[section.names.index(n)] for n in ("#wrong", "error") if n in section.names), "0")
    if wrong not in ("0", "N/A", "0e+00"):
        return {}, f"{wrong} wrong values: the collective computed nonsense"
    implied = size / time_us / 1e3
    if algbw > 1 and abs(implied / algbw - 1) > _LOOSE:
        return {}, f"time {at['time']} gives {implied:.4g} GB/s, the line says {algbw:g}: is the time in microseconds?"
    return {
        "op": TESTS.get(section.test, ""),
        "num_gpus": len(section.hosts),
        "num_nodes": len(set(section.hosts)),
        "bytes": size,
        "seconds": time_us * US,
    }, ""


def _rows(parts: Sequence[dict[str, object]]) -> Rows:
    parts = [part for part in parts if part["bytes"]]
    count = len(parts)
    columns = {name: np.array([part[name] for part in parts]) for name in ("op", "num_gpus", "num_nodes", "bytes")}
    columns |= {"engine": np.full(count, "nccl"), "family": np.full(count, "chained")}
    columns["graph"] = np.ones(count, np.int64)
    seconds = np.array([part["seconds"] for part in parts], dtype=np.float64)
    libraries = [str(part["library"]) for part in parts]
    repeats = np.array([part["repeats"] for part in parts], dtype=np.int64)
    quality = quality_of(seconds, np.zeros(count), repeats, libraries, ["measured"] * count)
    return Rows(OPS["collective"], columns, seconds, quality)


def median_of_repeats(rows: Rows) -> Rows:
    """One row per case: the median over several logs, with p90 and spread over them."""
    _, size = np.unique(rows.columns["bytes"], return_inverse=True)
    case_of = rows.groups() * (int(size.max(initial=0)) + 1) + size
    _, first, case = np.unique(case_of, return_index=True, return_inverse=True)
    if rows.quality is None or len(first) == len(rows):
        return rows
    every = [np.flatnonzero(case == number) for number in range(len(first))]
    median = np.array([np.median(rows.seconds[each]) for each in every])
    kept = rows.quality.take(first)
    quality = replace(
        kept,
        p90_s=np.array([np.quantile(rows.seconds[each], 0.9) for each in every]),
        spread=np.array([np.ptp(rows.seconds[each]) / 2 for each in every]) / median,
        repeats=np.array([rows.quality.repeats[each].sum() for each in every]),
    )
    return Rows(rows.op, {name: column[first] for name, column in rows.columns.items()}, median, quality)
