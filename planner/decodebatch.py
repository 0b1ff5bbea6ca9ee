"""The requests a rank decodes, as sums and counts.

No list is walked: a step in which no request comes or goes costs the same for 2 and for 2,000 requests, and many such
steps can be taken at once.
"""

from __future__ import annotations

from collections.abc import Sequence

Used = tuple[int, Sequence[int]]
"""Blocks in use before a stretch, and those that its steps open, over and over where these are fewer than the steps."""


class DecodeBatch:
    """Counts of the decoding requests of one rank and of its KV pool of `total_blocks` blocks.

    A request that joined when the rank had made d decode steps with n tokens in its KV has, at decode step t, a
    context of n + t - d tokens. So whether its next token opens a new block depends on (n - d) mod block_tokens alone:
    `_residues` counts the requests of each remainder.
    """

    __slots__ = (
        "_residues",
        "block_tokens",
        "context_tokens",
        "decode_steps",
        "free_blocks",
        "num_decoding",
        "total_blocks",
    )

    def __init__(self, total_blocks: int, block_tokens: int) -> None:
        self.total_blocks, self.block_tokens = total_blocks, block_tokens
        self.free_blocks = total_blocks
        """Blocks no running request holds; those of the prefix cache are among them."""
        self.num_decoding = 0
        self.context_tokens = 0
        """KV tokens of the decoding requests."""
        self.decode_steps = 0
        self._residues = [0] * block_tokens

    def blocks(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)

    def coming_contexts(self, steps: int) -> Sequence[int]:
        """KV tokens that the decodes of each of the next `steps` steps read while no request comes or goes."""
        each = self.num_decoding
        return range(self.context_tokens + each, self.context_tokens + each * steps + 1, each) if each else (0,) * steps

    def steps_with_blocks(self) -> int:
        """A number of steps for which there are blocks: each decoding request opens one every `block_tokens` steps."""
        return self.free_blocks // self.num_decoding * self.block_tokens

    def pass_steps(self, steps: int) -> Used:
        """Take `steps` decode steps, of the last one only its blocks; returns the blocks in use during them."""
        before, size = self.total_blocks - self.free_blocks, self.block_tokens
        turn = -self.decode_steps % size
        opened = self._residues[turn::-1]
        if turn + 1 < size:
            opened += self._residues[:turn:-1]
        whole, part = divmod(steps, size)
        self.free_blocks -= whole * sum(opened) + sum(opened[:part])
        if self.num_decoding:
            self.decode_steps += steps - 1
            self.context_tokens += self.num_decoding * (steps - 1)
        return before, opened
