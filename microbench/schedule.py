"""What to measure next."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from microbench.cases import Case

ORDER_SEED = 20261122
"""Fixed, so that a resumed run goes on in the order of the first."""


class Queue:
    """Cases still to do. First the coarse grid (class 0) of every operation, then refinement; inside a class the order
    is random with a fixed seed, and the operation that has used the least time goes next.
    """

    def __init__(self, cases: Iterable[Case]) -> None:
        shuffled = list(cases)
        random.Random(ORDER_SEED).shuffle(shuffled)
        self._waiting: dict[str, list[Case]] = {}
        for case in sorted(shuffled, key=lambda case: -case.level):
            self._waiting.setdefault(case.op, []).append(case)
        self._spent_s = dict.fromkeys(sorted(self._waiting), 0.0)

    def __len__(self) -> int:
        return sum(len(cases) for cases in self._waiting.values())

    def next(self) -> Case | None:
        """The case to measure now, removed from the queue; None when all are done."""
        ready = [op for op in self._spent_s if self._waiting[op]]
        if not ready:
            return None
        op = min(ready, key=lambda op: (self._waiting[op][-1].level > 0, self._spent_s[op], op))
        return self._waiting[op].pop()

    def spend(self, op: str, seconds: float) -> None:
        """Book the time that a case of `op` took [s]."""
        self._spent_s[op] += seconds


def without(cases: Sequence[Case], done: set[tuple[str, tuple[int | str, ...]]]) -> list[Case]:
    """Cases that are not on disk yet; `done` holds (op, values)."""
    return [case for case in cases if (case.op, case.values) not in done]
