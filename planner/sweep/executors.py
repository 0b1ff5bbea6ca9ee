"""Where units are answered: in this process, in processes beside it, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from planner.cores import num_cores
from planner.errors import InputError, PlannerError, nearest
from planner.sweep.units import Result, Unit

Work = Callable[[Unit], Result]
EXECUTORS = ("processes", "serial", "ray")
_MOST_LOSSES = 3
"""A unit that took so many workers with it is not tried again."""


class Executor(Protocol):
    """Answers up to `num_workers` units at once."""

    num_workers: int

    def start(self, unit: Unit) -> None:
        """Begin with `unit`; called while fewer than `num_workers` are under way."""

    def finished(self) -> list[tuple[int, Result | None]]:
        """Wait until one or more are done: number and result of each, None where the worker was lost."""

    def close(self) -> None:
        """Stop all workers; what is under way is given up."""


def check_executor(name: str, num_workers: int | None) -> None:
    """InputError on an unknown name, or fewer workers than one."""
    if num_workers is not None and num_workers < 1:
        raise InputError(f"--workers {num_workers}: at least one worker is needed")
    if name not in EXECUTORS and not name.startswith("ray://"):
        raise InputError(f"--executor {name}: {nearest(name, EXECUTORS)}")


def executor(name: str, work: Work, num_workers: int | None = None) -> Executor:
    """Executor called `processes`, `serial`, `ray` or `ray://host:port`. InputError on another name."""
    check_executor(name, num_workers)
    if name == "serial":
        return Serial(work)
    if name == "processes":
        return Processes(work, num_workers)
    from planner.sweep.raycluster import RayCluster

    return RayCluster(work, name.removeprefix("ray").removeprefix("://"), num_workers)


def stream(executor: Executor, todo: Iterable[Unit]) -> Iterator[tuple[Unit, Result]]:
    """Results as they come. Units of lost workers are tried again.

    Not more units are handed out than there are workers, so a crash of this process loses at most one per worker.
    Raises PlannerError, after all others are answered, for a unit that has lost its worker three times.
    """
    waiting, running = deque(todo), dict[int, Unit]()
    losses, given_up = Counter[int](), list[Unit]()
    while waiting or running:
        while waiting and len(running) < executor.num_workers:
            unit = waiting.popleft()
            running[unit.number] = unit
            executor.start(unit)
        for number, result in executor.finished():
            unit = running.pop(number)
            if result is not None:
                yield unit, result
                continue
            losses[number] += 1
            (given_up if losses[number] == _MOST_LOSSES else waiting).append(unit)
    if given_up:
        commands = "\n".join(f"  moeplan {' '.join(unit.arguments)}" for unit in given_up[:5])
        raise PlannerError(
            f"{len(given_up)} units lost their worker {_MOST_LOSSES} times (out of memory?); the others are done. "
            f"Give more memory or fewer --workers and run the sweep again:\n{commands}"
        )


class Serial:
    """Answers units in this process, one after the other."""

    num_workers = 1

    def __init__(self, work: Work) -> None:
        self._work = work
        self._done: list[tuple[int, Result | None]] = []

    def start(self, unit: Unit) -> None:
        """Answer `unit`."""
        self._done.append((unit.number, self._work(unit)))

    def finished(self) -> list[tuple[int, Result | None]]:
        """The unit just answered."""
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Nothing is left to stop."""


class _Worker:
    """One process, the pipe to it, and the unit it works on (None: idle)."""

    def __init__(self, work: Work) -> None:
        # A spawned process inherits no pipe of its siblings, so all notice when this process is gone.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()
        self.number: int | None = None


class Processes:
    """Answers units in `num_workers` processes, by default one per usable core."""

    def __init__(self, work: Work, num_workers: int | None = None) -> None:
        self._work = work
        self.num_workers = num_workers or num_cores()
        self._workers: list[_Worker] = []

    def start(self, unit: Unit) -> None:
        """Give `unit` to an idle worker, or to a new one."""
        worker = next((w for w in self._workers if w.number is None), None)
        if worker is None:
            worker = _Worker(self._work)
            self._workers.append(worker)
        worker.number = unit.number
        try:
            worker.pipe.send(unit)
        except OSError:
            return  # it died while idle: its pipe is at its end, which `finished` reports as a loss

    def finished(self) -> list[tuple[int, Result | None]]:
        """Results that have come, and losses: the pipe of a dead process is at its end."""
        done: list[tuple[int, Result | None]] = []
        busy = {worker.pipe: worker for worker in self._workers if worker.number is not None}
        for pipe in wait(list(busy)):
            assert isinstance(pipe, Connection)
            worker, number = busy[pipe], busy[pipe].number
            assert number is not None
            try:
                done.append((number, pipe.recv()))
                worker.number = None
            except (EOFError, OSError):
                done.append((number, None))
                self._workers.remove(worker)
                worker.process.join()
        return done

    def close(self) -> None:
        """Stop all processes."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
        self._workers = []


def _serve(pipe: Any, work: Work) -> None:
    """Life of a worker: answer units until the other end of `pipe` is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which stops its workers
    try:
        while True:
            pipe.send(work(pipe.recv()))
    except (EOFError, OSError):
        return
