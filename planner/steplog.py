"""What a simulation keeps of its steps while it runs: 64 bytes per step, or 36 per step of a stretch."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, cycle, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.coasting import FEW, Draws, Floats, Stretch
from planner.decodebatch import Used
from planner.records import StepTable

_PENDING_ROWS = 4096
_STEP_TYPES = "idd" + "iii" + "qq" + "iiq"
_STRETCH_TYPES = "ddiqq"

Row = tuple[int, float, float, int, int, int, int, int, int, int, int]
"""How many steps (1, or minus those of a stretch), start, duration, group, prompt tokens, decoding sequences, context
tokens, KV blocks, waiting requests, draw, and prompt tokens found in caches."""


class StepLog:
    """Rows of steps, and of stretches that keep apart what differs between their steps.

    All are gathered as they come and packed many at a time, which is several times faster than one by one.
    """

    __slots__ = ("_gathered", "_long", "_rows", "_short", "_within_long", "_within_short")

    def __init__(self) -> None:
        self._rows = [array(code) for code in _STEP_TYPES]
        self._within_short = [array(code) for code in _STRETCH_TYPES]
        self._within_long = [array(code) for code in _STRETCH_TYPES]
        """Start, duration, draw, context tokens and blocks of the steps of stretches of fewer than FEW steps or not."""
        self._gathered: list[Row] = []
        self._short: list[tuple[Iterable[float], ...]] = []
        self._long: list[tuple[Floats, Floats, Draws, Sequence[int], Used]] = []

    def step(self, row: Row) -> None:
        """Append one step."""
        self._gathered.append(row)
        if len(self._gathered) > _PENDING_ROWS:
            self._pack()

    def stretch(self, stretch: Stretch, steps: int, used: Sequence[Used], group: int, waiting: int) -> None:
        """Append `steps` steps of `stretch` of `group` with `waiting` requests; `used` are the blocks of its ranks."""
        start_s, step_s, draws = stretch.bounds_s[:steps], stretch.step_s[:steps], stretch.draws[:steps]
        contexts = [found[:steps] for seqs, found in stretch.batches if seqs]
        context = contexts[0] if len(contexts) == 1 else _added(contexts)
        before, opened = used[0] if len(used) == 1 else (sum([u[0] for u in used]), _added([u[1] for u in used]))
        if steps < FEW:
            blocks = islice(accumulate(cycle(opened), initial=before), 1, steps + 1)
            self._short.append((_listed(start_s), _listed(step_s), _listed(draws), context, blocks))
        else:
            self._long.append((start_s, step_s, draws, context, (before, opened)))
        seqs = sum([seqs for seqs, _ in stretch.batches])
        self.step((-steps, 0.0, 0.0, group, 0, seqs, 0, 0, waiting, 0, 0))

    def _pack(self) -> None:
        for column, values in zip(self._rows, zip(*self._gathered, strict=True), strict=False):
            column.fromlist(list(values))
        for column, parts in zip(self._within_short, zip(*self._short, strict=True), strict=False):
            column.fromlist(list(chain.from_iterable(parts)))
        if self._long:
            start_s, step_s, draws, contexts, used = zip(*self._long, strict=True)
            steps = np.array([len(found) for found in draws])
            whole = *map(np.concatenate, (start_s, step_s, draws)), _contexts(contexts, steps), _blocks(used, steps)
            for column, packed in zip(self._within_long, whole, strict=True):
                column.frombytes(packed.astype(column.typecode, copy=False).tobytes())
        self._gathered.clear()
        self._short.clear()
        self._long.clear()

    def table(self, block_tokens: int, has_caches: bool) -> StepTable:
        """The step table; blocks hold `block_tokens` tokens, and what caches found is a column where there are any."""
        self._pack()
        rows = [np.asarray(column) for column in self._rows]
        count = abs(rows[0]).astype(np.int64)
        stretches = np.flatnonzero(rows[0] < 0)
        is_long = count[stretches] >= FEW
        step = np.cumsum(count) - count
        short, long = (_runs(step[chosen], count[chosen]) for chosen in (stretches[~is_long], stretches[is_long]))

        def spread(field: int, within: int | None = None) -> NDArray[Any]:
            values = np.repeat(rows[field], count)
            if within is not None:
                values[short], values[long] = self._within_short[within], self._within_long[within]
            return values

        order = np.lexsort((spread(3), spread(1, 0))) if rows[3].any() else slice(None)
        """In order of their start: steps of a stretch were noted when it ended."""

        def real(field: int, within: int) -> NDArray[np.float64]:
            return np.asarray(spread(field, within)[order])

        def whole(field: int, within: int | None = None) -> NDArray[np.int64]:
            return np.asarray(spread(field, within)[order].astype(np.int64, copy=False))

        return StepTable(
            start_s=real(1, 0),
            step_s=real(2, 1),
            group=whole(3),
            prefill_tokens=whole(4),
            decode_seqs=whole(5),
            context_tokens=whole(6, 3),
            kv_tokens_used=whole(7, 4) * block_tokens,
            num_waiting=whole(8),
            draw=whole(9, 2),
            cached_tokens=whole(10) if has_caches else None,
        )


def _runs(first: NDArray[Any], count: NDArray[Any]) -> NDArray[np.int64]:
    """Places of runs of `count` steps from the step `first` on."""
    return np.asarray(np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count))


def _listed(values: Floats | Draws) -> list[Any]:
    return values if isinstance(values, list) else values.tolist()


def _added(of_ranks: Sequence[Sequence[int]]) -> Sequence[int]:
    """Sums over the ranks in step after step."""
    ranges = [steps for steps in of_ranks if isinstance(steps, range)]
    if len(ranges) < len(of_ranks):
        return [*map(sum, zip(*of_ranks, strict=True))]
    first, each = sum([steps.start for steps in ranges]), sum([steps.step for steps in ranges])
    return range(first, first + each * len(ranges[0]), each)


def _contexts(contexts: Sequence[Sequence[int]], steps: NDArray[Any]) -> NDArray[np.int64]:
    """All of `contexts`, of stretches of `steps` steps, in a row."""
    if not all(isinstance(found, range) for found in contexts):
        return np.concatenate([np.array(found) for found in contexts])
    first, each = (np.repeat([found[i] - found[0] * i for found in contexts], steps) for i in (0, 1))
    return first + each * _runs(np.zeros(len(steps), dtype=np.int64), steps)


def _blocks(used: Sequence[Used], steps: NDArray[Any]) -> NDArray[np.int64]:
    """Blocks in use in every step of stretches of `steps` steps, in a row."""
    opened = np.fromiter(chain.from_iterable(found[1] for found in used), np.int64)
    period = np.array([len(found[1]) for found in used])
    start = np.cumsum(period) - period
    total = np.add.reduceat(opened, start)
    before = np.cumsum(opened) - np.repeat(np.cumsum(total) - total, period)
    """Opened by a step and those before it in its period."""
    whole, part = np.divmod(_runs(np.zeros(len(steps), dtype=np.int64), steps), np.repeat(period, steps))
    begun = np.array([found[0] for found in used])
    in_period = before[np.repeat(start, steps) + part]
    return np.asarray(np.repeat(begun, steps) + whole * np.repeat(total, steps) + in_period)
