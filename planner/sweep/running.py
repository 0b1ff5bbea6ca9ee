"""The flow of a sweep: skip what is done, answer the rest, write the tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing

from planner.sweep.executors import Executor, stream
from planner.sweep.folder import SweepFolder
from planner.sweep.results import Row, results_csv, row
from planner.sweep.units import Unit

Progress = Callable[[int, int], None]


def run_sweep(
    folder: SweepFolder, todo: Sequence[Unit], executor: Callable[[], Executor], progress: Progress | None = None
) -> list[Row]:
    """Answer all units of `todo` that `folder` has no result of; `results.csv` and `results.json` at the end.

    `executor` is called when there is something to do; `progress` with how many units are done, and of how many.
    Results are stored in the order they come and tabled in the order of the units, so that neither the executor nor
    an interruption shows in any byte. Raises what `stream` and `SweepFolder.write` raise; then the next call goes on.
    """
    for name, content in sorted({file for unit in todo for file in unit.files}):
        if not (folder.path / name).exists():
            folder.write(name, content)
    missing = [unit for unit in todo if folder.result(unit) is None]
    done = len(todo) - len(missing)
    if missing:
        with closing(executor()) as started:
            for unit, result in stream(started, missing):
                folder.store(unit, result)
                done += 1
                if progress:
                    progress(done, len(todo))
    rows = []
    for unit in todo:
        kept = folder.result(unit)
        assert kept is not None
        rows.append(row(unit, kept))
    folder.write("results.csv", results_csv(rows).encode())
    folder.write("results.json", (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode())
    return rows
