"""Damages every kind of file moeplan reads, a given time each, and keeps what it must not do.

    nice -n 10 python benchmarks/fuzz.py --seconds 120 --json fuzz.json [--only "trace CSV"]

A reader passes when each input ends in an answer or in one PlannerError, within 2 s of CPU and 500 MB of memory above
what the process had after reading sane files (RLIMIT_AS). A child process reads, so that a crash of it is seen too.
Inputs that broke something are kept in tests/data/fuzz, where tests/test_fuzz.py reads them ever after.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz_mutations import archive_specials, mutate, odd_paths, specials
from fuzz_readers import READERS, Reader, members_of
from machine import stamp

from planner.errors import PlannerError

KEPT = Path(__file__).parents[1] / "tests" / "data" / "fuzz"
VICTIM = Path("/tmp/moeplan-was-here")
"""What hostile inputs would create if anything executed them."""
MOST_BYTES = 500_000_000
MOST_MESSAGE = 10_000
MOST_INPUT = 5_000_000
_WALL = 15
"""Wall time allowed over CPU time allowed: other work may have the cores."""
_STUCK_S = 300.0
_MOST_KEPT_BYTES = 4096


class Hang(BaseException):
    """More CPU or wall time than a reader may take."""


def _alarm(_signal: int, _frame: FrameType | None) -> None:
    raise Hang


def attempt(reader: Reader, path: Path, scratch: Path) -> str:
    """`ok`, `refused`, or what went wrong and where."""
    signal.signal(signal.SIGPROF, _alarm)
    signal.signal(signal.SIGALRM, _alarm)
    try:
        try:
            signal.setitimer(signal.ITIMER_PROF, reader.limit_s)
            signal.setitimer(signal.ITIMER_REAL, _WALL * reader.limit_s)
            reader.read(path, scratch)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        verdict = "ok"
    except PlannerError as error:
        verdict = _message_fault(error) or "refused"
    except Hang as error:
        verdict = f"hang {_where(error)}"
    except BaseException as error:
        verdict = f"{type(error).__name__} {_where(error)}: {str(error)[:120]}"
    if VICTIM.exists():
        VICTIM.unlink()
        verdict = "executed what is in the file"
    return verdict


def _message_fault(error: BaseException) -> str:
    """What is wrong with a refusal: nothing said, pages said, or memory that ran out behind it."""
    text = str(error)
    if not text.strip() or len(text) > MOST_MESSAGE or "Traceback" in text:
        return f"message of {len(text)} characters {_where(error)}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"MemoryError behind a message {_where(cause)}"
        cause = cause.__cause__ or cause.__context__
    return ""


def _where(error: BaseException) -> str:
    """The innermost line of planner in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    last = ([f for f in frames if "/planner/" in f.filename] or frames or [None])[-1]
    return "" if last is None else f"{Path(last.filename).name}:{last.lineno} {last.name}"


def inputs(reader: Reader, seeds: list[bytes], rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """First the contents that are wrong for everybody, then damaged seeds without end."""
    for number, seed in enumerate(seeds):
        yield f"seed {number}", seed
    yield from specials()
    if reader.members:
        yield from archive_specials(members_of(seeds[0]))
    yield from mutants(reader, seeds, rng)


def mutants(reader: Reader, seeds: list[bytes], rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Damaged seeds without end."""
    while True:
        raw = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            raw = mutate(rng, raw, reader.suffix)[:MOST_INPUT]
        yield "mutant", raw


class Judge:
    """Reads one input after another and reports each new finding as a line of JSON."""

    def __init__(self, name: str, base: Path, out: Path) -> None:
        self.reader, self.name, self._base, self._out = READERS[name], name, base, out
        self.counts: Counter[str] = Counter()
        self._seen: set[str] = set()

    def judge(self, kind: str, path: Path, raw: bytes) -> None:
        scratch = self._base / "scratch"
        scratch.mkdir()
        verdict = attempt(self.reader, path, scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        self.counts[verdict if verdict in ("ok", "refused") else "findings"] += 1
        where = verdict.partition(":")[0]
        if verdict not in ("ok", "refused") and where not in self._seen:
            self._seen.add(where)
            self.report({"kind": kind, "verdict": verdict, "kept": _keep(self.name, raw)})

    def report(self, row: dict[str, Any]) -> None:
        with self._out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def child(name: str, seconds: float, seed: int, skip: int, out: Path) -> None:
    """Reads until the time is over, leaving out the first `skip` inputs; reports findings and the count in the end."""
    base = Path(tempfile.mkdtemp(prefix="moeplan-fuzz-"))
    judge, until = Judge(name, base, out), time.monotonic() + seconds
    reader, number_file = judge.reader, out.with_suffix(".number")
    seeds = reader.seeds()
    for number, raw in enumerate(seeds):  # what reading loads for good does not count as memory of an input
        judge.judge(f"seed {number}", _written(base, reader, raw), raw)
    if not skip:
        with limited():
            (base / "odd").mkdir()
            for kind, path in odd_paths(base / "odd", reader.suffix):
                judge.judge(kind, path, b"")
    for number, (kind, raw) in enumerate(inputs(reader, seeds, random.Random(f"{name}{seed}{skip}"))):
        if kind == "mutant" and time.monotonic() > until:
            break
        if number >= skip or kind == "mutant":
            number_file.write_text(f"{number} {kind}")
            path = _written(base, reader, raw)
            with limited():
                judge.judge(kind, path, raw)
    judge.report({"counts": judge.counts})
    shutil.rmtree(base, ignore_errors=True)


def _written(base: Path, reader: Reader, raw: bytes) -> Path:
    path = base / f"input{reader.suffix}"
    path.write_bytes(raw)
    return path


class limited:
    """No more than MOST_BYTES of memory above what the process has now."""

    def __enter__(self) -> None:
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (virtual + MOST_BYTES, resource.RLIM_INFINITY))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _keep(name: str, raw: bytes) -> str:
    """Small inputs are kept for the tests."""
    if not raw or len(raw) > _MOST_KEPT_BYTES:
        return ""
    folder = KEPT / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(raw).hexdigest()[:10]}{READERS[name].suffix}"
    path.write_bytes(raw)
    return path.name


def run(name: str, seconds: float, seed: int) -> dict[str, Any]:
    """Findings and counts of one reader; a child that dies or is stuck is replaced, and that is a finding."""
    counts: Counter[str] = Counter()
    findings: dict[str, dict[str, Any]] = {}
    began, skip, code = time.monotonic(), 0, -1
    while code != 0 and (skip == 0 or time.monotonic() - began < seconds):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "report.jsonl"
            left = max(1.0, seconds - (time.monotonic() - began))
            code, errors = _run_child([name, str(left), str(seed), str(skip), str(out)], left + _STUCK_S)
            rows = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
            for row in rows:
                counts.update(row.get("counts", {}))
            findings |= {row["verdict"]: row for row in rows if "verdict" in row}
            if code != 0:
                at = out.with_suffix(".number")
                number, _, kind = at.read_text().partition(" ") if at.is_file() else (str(skip), "", "seed")
                skip = int(number) + 1
                findings[f"exit code {code}: {errors}"] = {"kind": kind, "verdict": f"exit code {code}: {errors}"}
    return {
        "reader": name,
        "seconds": round(time.monotonic() - began, 1),
        "read": counts["ok"],
        "refused": counts["refused"],
        "findings": list(findings.values()),
    }


def _run_child(arguments: list[str], most_s: float) -> tuple[int, str]:
    process = subprocess.Popen([sys.executable, __file__, "--child", *arguments], stderr=subprocess.PIPE)
    try:
        _, errors = process.communicate(timeout=most_s)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
    return process.returncode, errors.decode("utf-8", "replace")[-300:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of every reader, besides its fixed inputs")
    parser.add_argument("--only", action="append", choices=list(READERS), help="name of a reader; all otherwise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the results; readers in it are replaced, others stay")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        name, seconds, seed, skip, out = chosen.child
        child(name, float(seconds), int(seed), int(skip), Path(out))
        return
    for name in chosen.only or READERS:
        found = run(name, chosen.seconds, chosen.seed) | stamp()
        print(f"{name}: {found['read']:,} read, {found['refused']:,} refused, {len(found['findings'])} findings")
        for finding in found["findings"]:
            print(f"    {finding['kind']}: {finding['verdict']} {finding.get('kept', '')}", flush=True)
        if chosen.json:
            held = json.loads(chosen.json.read_text())["readers"] if chosen.json.is_file() else {}
            text = json.dumps({"readers": held | {name: found}}, indent=1, sort_keys=True)
            chosen.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
