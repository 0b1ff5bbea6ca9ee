"""What a simulation keeps of its steps while it runs: 36 bytes per step and 40 per stretch of alike ones."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from planner.coasting import Coast
from planner.records import StepTable


class StepLog:
    """Steps in order of their start; those of one batch that only grows are one stretch.

    Start, duration, context, blocks and draw differ from step to step; group, prompt tokens, sequences and waiting
    requests are kept once per stretch.
    """

    __slots__ = ("_blocks", "_context_tokens", "_draw", "_start_s", "_step_s", "_stretches")

    def __init__(self) -> None:
        self._start_s, self._step_s = array("d"), array("d")
        self._context_tokens, self._blocks, self._draw = array("q"), array("q"), array("i")
        self._stretches = array("q")

    def step(
        self, start_s: float, step_s: float, context_tokens: int, blocks: int, draw: int, alike: tuple[int, ...]
    ) -> None:
        """Append one step; `alike` are group, prompt tokens, decoding sequences and waiting requests."""
        self._start_s.append(start_s)
        self._step_s.append(step_s)
        self._context_tokens.append(context_tokens)
        self._blocks.append(blocks)
        self._draw.append(draw)
        self._stretches.append(1)
        self._stretches.extend(alike)

    def stretch(
        self,
        coast: Coast,
        contexts: Sequence[Iterable[int]],
        blocks: Sequence[Iterable[int]],
        alike: tuple[int, ...],
    ) -> None:
        """Append steps that have `alike` in common; `contexts` and `blocks` are [ranks][num_steps]."""
        self._start_s.extend(coast.start_s)
        self._step_s.extend(coast.step_s)
        self._context_tokens.extend(contexts[0] if len(contexts) == 1 else map(sum, zip(*contexts, strict=False)))
        self._blocks.extend(blocks[0] if len(blocks) == 1 else map(sum, zip(*blocks, strict=True)))
        self._draw.extend(coast.draw)
        self._stretches.append(len(coast.step_s))
        self._stretches.extend(alike)

    def table(self, block_tokens: int, cached_tokens: NDArray[np.int64] | None) -> StepTable:
        """The step table; blocks hold `block_tokens` tokens, and `cached_tokens` is a column of its own, or None."""
        num_steps, *alike = np.array(self._stretches).reshape(-1, 5).T
        group, prefill_tokens, decode_seqs, num_waiting = (np.repeat(column, num_steps) for column in alike)
        return StepTable(
            start_s=np.array(self._start_s),
            step_s=np.array(self._step_s),
            group=group,
            prefill_tokens=prefill_tokens,
            decode_seqs=decode_seqs,
            context_tokens=np.array(self._context_tokens),
            kv_tokens_used=np.array(self._blocks) * block_tokens,
            num_waiting=num_waiting,
            draw=np.array(self._draw, dtype=np.int64),
            cached_tokens=cached_tokens,
        )
