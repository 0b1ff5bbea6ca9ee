"""What a simulation keeps of its steps while it runs: 60 bytes per step, or 36 per step of a stretch."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from planner.coasting import Stretch
from planner.records import StepTable

_PENDING_ROWS = 4096
_STEP_TYPES = "idd" + "iii" + "qq" + "iiq"
_STRETCH_TYPES = "iddiqq"

Row = tuple[int, float, float, int, int, int, int, int, int, int, int]
"""Number of the step (of a stretch: minus how many steps it has), start, duration, group, prompt tokens, decoding
sequences, context tokens, KV blocks, waiting requests, draw, and prompt tokens found in caches."""


class StepLog:
    """Rows of steps, and of stretches that keep apart what differs between their steps.

    Both are gathered as they come and packed many at a time, which is several times faster than one by one.
    """

    __slots__ = ("_gathered", "_rows", "_stretches", "_within")

    def __init__(self) -> None:
        self._rows = [array(code) for code in _STEP_TYPES]
        self._within = [array(code) for code in _STRETCH_TYPES]
        """Number, start, duration, draw, context tokens and blocks of the steps of stretches."""
        self._gathered: list[Row] = []
        self._stretches: list[tuple[Iterable[float], ...]] = []

    def step(self, row: Row) -> None:
        """Append one step."""
        self._gathered.append(row)
        if len(self._gathered) > _PENDING_ROWS:
            self._pack()

    def stretch(
        self,
        stretch: Stretch,
        contexts: Sequence[Iterable[int]],
        blocks: Sequence[Iterable[int]],
        alike: tuple[int, int, int],
    ) -> None:
        """Append decode steps with group, sequences and waiting requests `alike`; the others are [ranks][num_steps]."""
        within = (stretch.number, stretch.start_s, stretch.step_s, stretch.draw, _added(contexts), _added(blocks))
        self._stretches.append(within)
        group, decode_seqs, num_waiting = alike
        self.step((-len(stretch.step_s), 0.0, 0.0, group, 0, decode_seqs, 0, 0, num_waiting, 0, 0))

    def _pack(self) -> None:
        for column, values in zip(self._rows, zip(*self._gathered, strict=True), strict=False):
            column.fromlist(list(values))
        for column, parts in zip(self._within, zip(*self._stretches, strict=True), strict=False):
            column.fromlist(list(chain.from_iterable(parts)))
        self._gathered.clear()
        self._stretches.clear()

    def table(self, block_tokens: int, has_caches: bool) -> StepTable:
        """The step table; blocks hold `block_tokens` tokens, and what caches found is a column where there are any."""
        self._pack()
        rows = [np.asarray(column) for column in self._rows]
        count = np.where(rows[0] < 0, -rows[0], 1)
        in_stretch = np.repeat(rows[0] < 0, count)
        place = np.repeat(rows[0], count)
        place[in_stretch] = self._within[0]

        def spread(field: int, within: int | None = None) -> NDArray[np.float64]:
            values = np.repeat(rows[field], count)
            if within is not None:
                values[in_stretch] = self._within[within]
            ordered = np.empty_like(values)
            ordered[place] = values
            return ordered

        def whole(field: int, within: int | None = None) -> NDArray[np.int64]:
            return spread(field, within).astype(np.int64)

        return StepTable(
            start_s=spread(1, 1),
            step_s=spread(2, 2),
            group=whole(3),
            prefill_tokens=whole(4),
            decode_seqs=whole(5),
            context_tokens=whole(6, 4),
            kv_tokens_used=whole(7, 5) * block_tokens,
            num_waiting=whole(8),
            draw=whole(9, 3),
            cached_tokens=whole(10) if has_caches else None,
        )


def _added(of_ranks: Sequence[Iterable[int]]) -> Iterable[int]:
    return of_ranks[0] if len(of_ranks) == 1 else [*map(sum, zip(*of_ranks, strict=False))]
