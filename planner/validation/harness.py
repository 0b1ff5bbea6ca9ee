"""All points of a file: predicted on several cores, in any order with the same result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from planner.calibration import Calibrations
from planner.cores import num_cores
from planner.errors import PlannerError
from planner.validation.points import Point, PointsFile, Row
from planner.validation.replay import Costs, Prediction, replay, rounds_of

_TASK_STEPS = 500_000
"""Steps of the points one worker takes at a time: seconds of work, so that none ends long after the others."""
_ALONE_STEPS = 200_000
"""Files with fewer steps are predicted at once: starting workers would take longer."""


@dataclass(frozen=True, slots=True)
class Validation:
    """Points with their predictions, in the order of the file; rows that state no point are `unsupported`."""

    source: PointsFile
    predictions: tuple[Prediction, ...]

    @property
    def pairs(self) -> list[tuple[Row, Prediction]]:
        """Rows with their predictions."""
        return list(zip(self.source.rows, self.predictions, strict=True))


def validate(
    source: PointsFile,
    *,
    calibrations: Calibrations | None = None,
    breaks_down: bool = False,
    workers: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Validation:
    """Replay every point of `source` on `workers` processes, all cores by default.

    `calibrations` and `breaks_down` as in `replay`. `progress` is called with the share of steps done. PlannerError
    when the system ends a worker.
    """
    points = source.points
    work = partial(_replayed, calibrations=calibrations, breaks_down=breaks_down)
    done = dict(zip(map(id, points), _predicted(points, work, workers, progress), strict=True))
    return Validation(source, tuple(done[id(row.point)] if row.point else _unread(row) for row in source.rows))


def _unread(row: Row) -> Prediction:
    return Prediction(f"unsupported: {row.fault}")


def _predicted(
    points: Sequence[Point],
    work: Callable[[Sequence[Point]], list[Prediction]],
    workers: int | None,
    progress: Callable[[float], None] | None,
) -> list[Prediction]:
    """Predictions in the order of `points`, which `work` makes of some of them."""
    tasks, total = _tasks(points), sum(map(_steps, points))
    cores = min(workers or num_cores(), len(tasks))
    if cores == 1 or (workers is None and total < _ALONE_STEPS):
        return work(points)
    found: dict[int, Prediction] = {}
    share = 0.0
    # Forking under the threads of a progress bar is not safe, and newer Pythons warn about it.
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(work, [points[i] for i in task]): task for task in tasks}
        try:
            for future in as_completed(futures):
                task = futures[future]
                found |= dict(zip(task, future.result(), strict=True))
                share += sum(_steps(points[i]) for i in task) / total
                if progress is not None:
                    progress(min(share, 1.0))
        except BrokenProcessPool as error:
            raise PlannerError("a worker was ended by the system; is memory short? Free some and try again.") from error
        finally:
            pool.shutdown(cancel_futures=True)
    return [found[i] for i in range(len(points))]


def _replayed(points: Sequence[Point], calibrations: Calibrations | None, breaks_down: bool) -> list[Prediction]:
    """One worker's share; step times of a server are kept for its next point."""
    costs: Costs = {}
    return [replay(point, costs, calibrations, breaks_down) for point in points]


def _steps(point: Point) -> int:
    return rounds_of(point) * point.osl


def _tasks(points: Sequence[Point]) -> list[list[int]]:
    """Indices of points to predict together: the same server first, so that its tables are read once."""
    order = sorted(range(len(points)), key=lambda i: (points[i].combination, points[i].deployed, i))
    tasks: list[list[int]] = []
    steps = _TASK_STEPS
    for i in order:
        if steps >= _TASK_STEPS or points[tasks[-1][-1]].combination != points[i].combination:
            tasks.append([])
            steps = 0
        tasks[-1].append(i)
        steps += _steps(points[i])
    return sorted(tasks, key=lambda task: -sum(_steps(points[i]) for i in task))
