"""A sweep of cheap units in a process of its own, which tests kill: `python sweep_work.py FOLDER LOG UNITS WORKERS`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from planner.sweep import Processes, Result, SweepFolder, Unit, run_sweep

LOG = "MOEPLAN_TEST_LOG"


def work(unit: Unit) -> Result:
    """Log that the unit began; unit 3 takes its worker with it once, unit 5 always, where the log says so."""
    log = Path(os.environ[LOG])
    with log.open("a") as file:
        file.write(f"{unit.number}\n")
    begun = log.read_text().split().count(str(unit.number))
    if "lose" in unit.arguments and ((unit.number == 3 and begun == 1) or unit.number == 5):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.004)
    facts = {"layout": {"name": f"tp{unit.number}", "num_gpus": unit.number}, "meets_slo": unit.number % 2 == 0}
    return Result(0, "", facts)


def cheap_units(count: int, *more: str) -> list[Unit]:
    return [Unit(i, (("seed", i),), ("plan", str(i), *more), (("inputs/a/x.csv", b"1\n"),)) for i in range(count)]


def run(folder: Path, count: int, workers: int) -> None:
    with SweepFolder(folder, {"count": count}) as held:
        run_sweep(held, cheap_units(count), lambda: Processes(work, workers))


if __name__ == "__main__":
    os.environ[LOG] = sys.argv[2]
    run(Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]))
