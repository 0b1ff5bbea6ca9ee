"""What a simulation keeps of its steps while it runs: 88 bytes per step, or 40 per step of a stretch."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from planner.coasting import Stretch
from planner.records import StepTable

_FIELDS = 11


class StepLog:
    """Rows of steps, and of stretches that keep apart what differs between their steps.

    A row is the number of the step (of a stretch: minus how many steps it has), start, duration, group, prompt tokens,
    decoding sequences, context tokens, KV blocks, waiting requests, draw, and prompt tokens found in caches.
    """

    __slots__ = ("_blocks", "_context_tokens", "_draw", "_number", "_rows", "_start_s", "_step_s")

    def __init__(self) -> None:
        self._rows = array("d")
        self._start_s, self._step_s = array("d"), array("d")
        self._context_tokens, self._blocks = array("q"), array("q")
        self._number, self._draw = array("i"), array("i")

    def step(self, row: tuple[float, ...]) -> None:
        """Append one step."""
        self._rows.extend(row)

    def stretch(
        self,
        stretch: Stretch,
        contexts: Sequence[Iterable[int]],
        blocks: Sequence[Iterable[int]],
        alike: tuple[int, int, int],
    ) -> None:
        """Append decode steps with group, sequences and waiting requests `alike`; the others are [ranks][num_steps]."""
        self._number.fromlist(stretch.number)
        self._start_s.fromlist(stretch.start_s)
        self._step_s.fromlist(stretch.step_s)
        self._draw.fromlist(stretch.draw)
        self._context_tokens.fromlist(_added(contexts))
        self._blocks.fromlist(_added(blocks))
        group, decode_seqs, num_waiting = alike
        self._rows.extend((-len(stretch), 0, 0, group, 0, decode_seqs, 0, 0, num_waiting, 0, 0))

    def table(self, block_tokens: int, has_caches: bool) -> StepTable:
        """The step table; blocks hold `block_tokens` tokens, and what caches found is a column where there are any."""
        rows = np.array(self._rows).reshape(-1, _FIELDS)
        number = rows[:, 0].astype(np.int64)
        count = np.where(number < 0, -number, 1)
        in_stretch = np.repeat(number < 0, count)
        place = np.repeat(number, count)
        place[in_stretch] = self._number

        def spread(field: int, within: array[float] | array[int] | None = None) -> NDArray[np.float64]:
            values = np.repeat(rows[:, field], count)
            if within is not None:
                values[in_stretch] = within
            ordered = np.empty_like(values)
            ordered[place] = values
            return ordered

        def whole(field: int, within: array[int] | None = None) -> NDArray[np.int64]:
            return spread(field, within).astype(np.int64)

        return StepTable(
            start_s=spread(1, self._start_s),
            step_s=spread(2, self._step_s),
            group=whole(3),
            prefill_tokens=whole(4),
            decode_seqs=whole(5),
            context_tokens=whole(6, self._context_tokens),
            kv_tokens_used=whole(7, self._blocks) * block_tokens,
            num_waiting=whole(8),
            draw=whole(9, self._draw),
            cached_tokens=whole(10) if has_caches else None,
        )


def _added(of_ranks: Sequence[Iterable[int]]) -> list[int]:
    return list(of_ranks[0]) if len(of_ranks) == 1 else [*map(sum, zip(*of_ranks, strict=False))]
