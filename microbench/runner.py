"""One run: take the next case, prepare and check it, time it, hold it against physics, record it."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from microbench.benches import SHARED, local_benches
from microbench.cases import OPS, Case
from microbench.ceilings import peaks_of, violation
from microbench.device import Device
from microbench.environment import Meta, clocks
from microbench.errors import Unsupported, WrongResult
from microbench.group_timing import GroupSampler
from microbench.ranks import Ranks, Team
from microbench.results import Store
from microbench.schedule import Queue
from microbench.timing import Timing, measure, sampler
from microbench.work import Work

_CASE_SHARE, _SHORTEST_CASE_S, _LONGEST_CASE_S = 1 / 600, 0.02, 1.0
_CLOCK_PERIOD_S = 30.0
_WARM_UP_S, _WARM_UP_SIDE = 1.0, 4096


class GpuLost(Exception):
    """The GPU is in an error state that only a new process clears."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a case: a time, or a `kind` of failure with its reason. `extremes`: (fastest, slowest) process [s].

    It holds numbers only, so that the tensors of the case are freed before the next one is prepared.
    """

    library: str = ""
    timing: Timing | None = None
    flop: float = 0.0
    bytes: float = 0.0
    kind: str = ""
    reason: str = ""
    extremes: tuple[float, float] | None = None


@dataclass(slots=True)
class Run:
    """A run of `minutes` on one device. `store`, `meta` and `queue` are the leader's, None on other processes."""

    device: Device
    ranks: Ranks
    minutes: float
    nvme: Path | None = None
    store: Store | None = None
    meta: Meta | None = None
    queue: Queue | None = None
    measured: int = 0
    failed: int = 0

    @property
    def case_s(self) -> float:
        """Time spent on sampling one case at most [s]."""
        return min(_LONGEST_CASE_S, max(_SHORTEST_CASE_S, self.minutes * 60 * _CASE_SHARE))

    def go(self) -> None:
        """Measure until the time is used or nothing is left. Raises GpuLost."""
        start = sampled = time.monotonic()
        _warm_up(self.device)
        while True:
            case = self.ranks.everyone.share(self._next(time.monotonic() - start))
            if case is None:
                break
            began = time.monotonic()
            outcome = self._attempt(case)
            self._record(case, outcome, time.monotonic() - began)
            if self.store is not None and time.monotonic() - sampled > _CLOCK_PERIOD_S:
                sampled = time.monotonic()
                self.store.note("clocks.jsonl", {"elapsed_s": round(sampled - start, 1), "clocks": clocks()})

    def _next(self, elapsed_s: float) -> Case | None:
        """The leader's choice; None when its time is used or all is done."""
        if self.queue is None or self.store is None or elapsed_s > self.minutes * 60:
            return None
        while (case := self.queue.next()) is not None:
            if self.store.begin(case):
                left, used = len(self.queue), f"{elapsed_s / 60:.1f} of {self.minutes:g} min"
                print(f"[{self.measured} measured, {left} left, {used}] {case}", file=sys.stderr, flush=True)
                return case
        return None

    def _attempt(self, case: Case) -> Outcome | None:
        """Outcome on the processes that take part, None elsewhere."""
        collective = OPS[case.op].collective
        team = self.ranks.team(case.number("num_gpus")) if collective else None
        if (collective and team is None) or (not collective and self.ranks.rank != 0):
            return None
        try:
            return self._shared(case, team) if team is not None else self._alone(case)
        except Unsupported as error:
            return Outcome(kind="unsupported", reason=str(error))
        except WrongResult as error:
            return Outcome(kind="wrong", reason=str(error))
        except torch.OutOfMemoryError as error:
            return Outcome(kind="memory", reason=str(error)[:200])
        except torch.AcceleratorError as error:
            return Outcome(kind="gpu", reason=str(error)[:200])
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            return Outcome(kind="error", reason=f"{type(error).__name__}: {error}"[:300])
        finally:
            self.device.release()

    def _alone(self, case: Case) -> Outcome:
        work = local_benches(self.nvme)[case.op](case, self.device)
        sample, library = sampler(work, self.device)
        return self._judged(work, measure(sample, self.case_s), library)

    def _shared(self, case: Case, team: Team) -> Outcome:
        work = SHARED[case.op](case, self.device, team)
        sample = GroupSampler(work.run, self.device, team, case.text("family"), self.case_s)
        timing = measure(sample, self.case_s, team.share)
        extremes = sorted(sample.fastest)[len(sample.fastest) // 2], sorted(sample.slowest)[len(sample.slowest) // 2]
        return self._judged(work, timing, work.library, extremes)

    def _judged(self, work: Work, timing: Timing, library: str, extremes: tuple[float, float] | None = None) -> Outcome:
        impossible = violation(work, timing.median_s, peaks_of(self.device.name))
        if impossible is not None:
            return Outcome(kind="physics", reason=f"{timing.median_s * 1e6:.6g} us: {impossible}")
        return Outcome(library, timing, work.flop, work.bytes, extremes=extremes)

    def _record(self, case: Case, outcome: Outcome | None, spent_s: float) -> None:
        """The leader writes; every process stops when its GPU is lost."""
        lost = outcome is not None and outcome.kind == "gpu"
        if self.store is not None and self.queue is not None and outcome is not None:
            self.queue.spend(case.op, spent_s)
            if outcome.timing is None:
                self.failed += 1
                self.store.fail(case, outcome.kind, outcome.reason)
                print(f"  {outcome.kind}: {outcome.reason}", file=sys.stderr, flush=True)
            else:
                self._write_row(self.store, case, outcome, outcome.timing)
        if lost and outcome is not None:
            raise GpuLost(outcome.reason)

    def _write_row(self, store: Store, case: Case, outcome: Outcome, timing: Timing) -> None:
        self.measured += 1
        if outcome.extremes is not None:
            fastest, slowest = (value * 1e6 for value in outcome.extremes)
            entry: dict[str, object] = {"case": str(case), "min_us": round(fastest, 3)}
            entry["max_minus_min_us"] = round(slowest - fastest, 3)
            store.note("ranks.jsonl", entry)
        store.add(case, timing, outcome.library)
        print(line(case, outcome, timing), flush=True)


def line(case: Case, outcome: Outcome, timing: Timing) -> str:
    """One measured case as text: shape, time, rates, repeats."""
    time_us, p90_us = timing.median_s * 1e6, timing.p90_s * 1e6
    rates = f"{outcome.flop / timing.median_s / 1e12:8.3g} TFLOP/s {outcome.bytes / timing.median_s / 1e9:8.3g} GB/s"
    return f"{case!s:<96} {time_us:10.4g} us {rates}  (n={timing.repeats}, p90 {p90_us:.4g} us)"


def _warm_up(device: Device) -> None:
    """Bring the clocks of an idle GPU up before the first case."""
    if not device.is_cuda:
        return
    a, b = (device.random(_WARM_UP_SIDE, _WARM_UP_SIDE, seed=seed) for seed in (1, 2))
    deadline = time.monotonic() + _WARM_UP_S
    while time.monotonic() < deadline:
        torch.mm(a, b)
        device.synchronise()
