"""Attention of decode batches for the event loop, by sequences and their mean context."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from planner.steptime import LENGTHS, SEQS, bilinear

_PIECE_BITS = 10
_PIECE = 1 << _PIECE_BITS
_MOST_PIECES = 4096
"""Contexts tabulated at once, and how many such pieces are kept (of 8 KiB each)."""
_KEY_BITS = 16
_LAST = _PIECE - 1

Floats = NDArray[np.float64]


class DecodeAttention:
    """Seconds from `table` [SEQS, LENGTHS] at whole mean contexts, tabulated where steps have been.

    A mean context is rounded to the nearest token. In a stretch of steps without drafts (contexts are a range then) it
    grows by one token a step, so what the steps take lies side by side.
    """

    __slots__ = ("_pieces", "_rows", "_table")

    def __init__(self, table: Floats) -> None:
        self._table = table
        self._rows: dict[int, Floats] = {}
        self._pieces: dict[int, tuple[array[float], Floats]] = {}

    def step_s(self, seqs: int, tokens: int) -> float:
        """Seconds of a decode of `seqs` > 0 sequences with `tokens` context tokens together."""
        length = (2 * tokens + seqs) // (2 * seqs)
        piece = self._pieces.get(seqs << _KEY_BITS | length >> _PIECE_BITS)
        if piece is None:
            piece = self._tabulated(seqs, length >> _PIECE_BITS)
        return piece[0][length & _LAST]

    def few_s(self, seqs: int, contexts: Sequence[int]) -> Sequence[float]:
        """`step_s` for each of a few `contexts`, tokens of `seqs` sequences in step after step."""
        length = (2 * contexts[0] + seqs) // (2 * seqs)
        start = length & _LAST
        if start + len(contexts) > _PIECE or contexts.__class__ is not range:
            return [self.step_s(seqs, tokens) for tokens in contexts]
        piece = self._pieces.get(seqs << _KEY_BITS | length >> _PIECE_BITS)
        if piece is None:
            piece = self._tabulated(seqs, length >> _PIECE_BITS)
        return piece[0][start : start + len(contexts)]

    def many_s(self, seqs: int, contexts: Sequence[int]) -> Floats:
        """As `few_s`."""
        if not isinstance(contexts, range):
            lengths = (2 * np.array(contexts) + seqs) // (2 * seqs)
            return np.asarray(np.interp(lengths, LENGTHS, self._row(seqs)))
        first, steps = (2 * contexts[0] + seqs) // (2 * seqs), len(contexts)
        number, start = first >> _PIECE_BITS, first & _LAST
        parts = []
        while steps > 0:
            piece = self._pieces.get(seqs << _KEY_BITS | number) or self._tabulated(seqs, number)
            parts.append(piece[1][start : start + steps])
            number, steps, start = number + 1, steps - (_PIECE - start), 0
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _row(self, seqs: int) -> Floats:
        row = self._rows.get(seqs)
        if row is None:
            within = np.full(LENGTHS.shape, min(float(seqs), SEQS[-1]))
            row = self._rows[seqs] = bilinear(within, LENGTHS, self._table)
        return row

    def _tabulated(self, seqs: int, number: int) -> tuple[array[float], Floats]:
        """The piece of contexts from `number` times its size on; the oldest make room."""
        if len(self._pieces) == _MOST_PIECES:
            del self._pieces[next(iter(self._pieces))]
        lengths = np.arange(number * _PIECE, (number + 1) * _PIECE)
        seconds = array("d", np.interp(lengths, LENGTHS, self._row(seqs)).tobytes())
        piece = self._pieces[seqs << _KEY_BITS | number] = seconds, np.frombuffer(seconds)
        return piece
