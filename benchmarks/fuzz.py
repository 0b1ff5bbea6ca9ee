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
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz_mutations import archive_specials, mutate, odd_paths, specials
from fuzz_readers import READERS, Reader, members_of

from planner.errors import PlannerError

KEPT = Path(__file__).parents[1] / "tests" / "data" / "fuzz"
VICTIM = Path("/tmp/moeplan-was-here")
MOST_BYTES = 500_000_000
MOST_MESSAGE = 20_000
_STUCK_S = 60.0
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
        signal.setitimer(signal.ITIMER_PROF, reader.limit_s)
        signal.setitimer(signal.ITIMER_REAL, 15 * reader.limit_s)
        reader.read(path, scratch)
        verdict = "ok"
    except PlannerError as error:
        verdict = _message_fault(error) or "refused"
    except Hang:
        verdict = f"hang {_where(sys.exc_info()[1])}"
    except BaseException as error:
        verdict = f"{type(error).__name__} {_where(error)}: {str(error)[:120]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if VICTIM.exists():
        VICTIM.unlink()
        verdict = "executed what is in the file"
    return verdict


def _message_fault(error: BaseException) -> str:
    text = str(error)
    if not text.strip() or len(text) > MOST_MESSAGE or "Traceback" in text:
        return f"message of {len(text)} characters {_where(error)}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"MemoryError behind a message {_where(cause)}"
        cause = cause.__cause__ or cause.__context__
    return ""


def _where(error: BaseException | None) -> str:
    """The innermost line of planner in a traceback."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    ours = [f for f in frames if "/planner/" in f.filename]
    last = (ours or frames or [None])[-1]
    return "" if last is None else f"{Path(last.filename).name}:{last.lineno} {last.name}"


def inputs(reader: Reader, seeds: list[bytes], rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """First the contents that are wrong for everybody, then damaged seeds without end."""
    for number, seed in enumerate(seeds):
        yield f"seed {number}", seed
    yield from specials()
    if reader.members:
        yield from archive_specials(members_of(seeds[0]))
    while True:
        raw = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            raw = mutate(rng, raw, reader.suffix)
        yield "mutant", raw


def child(name: str, seconds: float, seed: int, skip: int, out: Path) -> None:
    """Reads until the time is over; a line of JSON for every finding, and the count in the end."""
    reader, rng = READERS[name], random.Random(f"{name}{seed}{skip}")
    base = Path(tempfile.mkdtemp(prefix="moeplan-fuzz-"))
    seeds, counts, seen = reader.seeds(), {"ok": 0, "refused": 0}, set()
    limited, until = False, time.monotonic() + seconds
    state = out.with_suffix(".state")
    with out.open("a") as report:

        def judge(kind: str, path: Path, raw: bytes) -> None:
            scratch = base / "scratch"
            scratch.mkdir()
            state.write_text(json.dumps({"kind": kind, "path": str(path)}))
            verdict = attempt(reader, path, scratch)
            shutil.rmtree(scratch, ignore_errors=True)
            counts[verdict if verdict in counts else "findings"] = counts.get(verdict if verdict in counts else "findings", 0) + 1
            if verdict not in ("ok", "refused") and verdict.split(":")[0:2] not in seen_list:
                seen_list.append(verdict.split(":")[0:2])
                report.write(json.dumps({"reader": name, "kind": kind, "verdict": verdict, "kept": _keep(name, raw)}) + "\n")
                report.flush()

        seen_list: list[list[str]] = []
        if not skip:
            odd = base / "odd"
            odd.mkdir()
            _limit_memory()
            for kind, path in odd_paths(odd, reader.suffix):
                judge(kind, path, b"")
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for number, (kind, raw) in enumerate(inputs(reader, seeds, rng)):
            if number < skip:
                continue
            if kind == "mutant" and time.monotonic() > until:
                break
            path = base / f"input{reader.suffix}"
            path.write_bytes(raw)
            if not limited and not kind.startswith("seed"):
                _limit_memory()
                limited = True
            judge(kind, path, raw)
            state.with_suffix(".number").write_text(str(number + 1))
        report.write(json.dumps({"reader": name, "counts": counts}) + "\n")
    shutil.rmtree(base, ignore_errors=True)


def _limit_memory() -> None:
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + MOST_BYTES, resource.RLIM_INFINITY))


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
    found: dict[str, Any] = {"reader": name, "seconds": 0.0, "ok": 0, "refused": 0, "findings": []}
    began, skip = time.monotonic(), 0
    while (left := seconds - (time.monotonic() - began)) > 0 or not found["seconds"]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "report.jsonl"
            arguments = [name, str(max(left, 1.0)), str(seed), str(skip), str(out)]
            process = subprocess.Popen([sys.executable, __file__, "--child", *arguments], stderr=subprocess.PIPE)
            try:
                _, errors = process.communicate(timeout=left + _STUCK_S + 240)
            except subprocess.TimeoutExpired:
                process.kill()
                _, errors = process.communicate()
            for line in out.read_text().splitlines() if out.is_file() else []:
                row = json.loads(line)
                if "counts" in row:
                    found["ok"] += row["counts"]["ok"]
                    found["refused"] += row["counts"]["refused"]
                else:
                    found["findings"].append(row)
            found["seconds"] = round(time.monotonic() - began, 1)
            if process.returncode == 0:
                break
            state = out.with_suffix(".state")
            at = json.loads(state.read_text()) if state.is_file() else {}
            text = errors.decode("utf-8", "replace")[-300:]
            found["findings"].append({"reader": name, "verdict": f"exit code {process.returncode}: {text}", **at})
            number = state.with_suffix(".number")
            skip = int(number.read_text()) + 1 if number.is_file() else skip + 1
    found["findings"] = list({f["verdict"]: f for f in found["findings"]}.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of every reader")
    parser.add_argument("--only", action="append", help="name of a reader; all otherwise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        name, seconds, seed, skip, out = chosen.child
        child(name, float(seconds), int(seed), int(skip), Path(out))
        return
    results = []
    for name in chosen.only or READERS:
        found = run(name, chosen.seconds, chosen.seed + zlib.crc32(name.encode()) % 1000)
        results.append(found)
        print(f"{name}: {found['ok']:,} read, {found['refused']:,} refused, {len(found['findings'])} findings")
        for finding in found["findings"]:
            print(f"    {finding.get('kind', '')}: {finding['verdict']} {finding.get('kept', '')}", flush=True)
        if chosen.json:
            chosen.json.write_text(json.dumps({"seconds_each": chosen.seconds, "readers": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
