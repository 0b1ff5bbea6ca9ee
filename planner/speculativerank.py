"""A rank whose decoding requests advance by a random number of tokens per step, at no work per request and step.

When a request joins the decode batch, the steps its remaining tokens take are drawn at once (`AcceptanceWalk`), so it
still finishes at a known decode step. In between it advances evenly: at step t of K it has made floor(R t / K) of its
R tokens, which is what an unfinished or preempted one is credited with. The mean rate of R / K tokens per step is kept
as an integer in units of 2^-20 token, so the sum over the batch is exact however many requests come and go, and the
blocks their growth takes are that sum rounded up: they never run below zero and all come back.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.decodebatch import Used
from planner.enginespec import EngineSpec
from planner.scheduler import Rank, Request
from planner.speculation import AcceptanceWalk

_SHIFT = 20


class SpeculativeRank(Rank):
    """`Rank` with drafts. `walk` draws acceptance and is shared by the ranks of a run.

    Slots for the drafts of the running step are taken when a request joins (vLLM's look-ahead slots).
    """

    __slots__ = ("_drafts", "_growth", "_growth_blocks", "_paths", "_rate", "_short_s", "_unit", "walk")

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self._drafts = len(spec.acceptance)
        self._unit = spec.block_tokens << _SHIFT
        self._growth = self._rate = self._growth_blocks = 0
        self._short_s = -1.0
        self._paths: dict[Request, tuple[int, int, int]] = {}
        """Of each decoding request: tokens left when it joined, steps they take, tokens per step x 2^20."""
        self.walk = AcceptanceWalk(spec.acceptance, 0)

    def can_ever_hold(self, request: Request) -> bool:
        """Whether the pool is large enough for `request` alone, its drafts and a block begun twice."""
        return self._most_blocks(request) <= self.total_blocks

    def enqueue(self, request: Request) -> None:
        """Put a new request at the end of the queue; the caller has checked `can_ever_hold`."""
        request.final_blocks = self._most_blocks(request)
        self.waiting.append(request)

    def _most_blocks(self, request: Request) -> int:
        return self.blocks(request.prompt_tokens + request.output_tokens + self._drafts) + 1

    def unfinished(self) -> list[Request]:
        """Every request here, with its `produced` tokens brought up to date; ends the use of this rank."""
        for request in self._paths:
            request.produced += self._decoded(request)
        return [*self.running, *self.waiting]

    def take_decodes(self) -> None:
        """Put the drafts and the next token of every decoding request into the step, preempting until blocks fit."""
        grown = -(-(self._growth + self._rate) // self._unit)
        while grown - self._growth_blocks > self.free_blocks:
            self._preempt_last()
            grown = -(-(self._growth + self._rate) // self._unit)
        self.free_blocks -= grown - self._growth_blocks
        self._growth_blocks = grown
        self.work.decode_seqs = self.num_decoding
        tokens = self.context_tokens + ((self._growth + self._rate) >> _SHIFT)
        self.work.decode_context_tokens = tokens if self.num_decoding else 0

    def take_prefills(self, budget: int) -> None:
        """As `Rank`, less the drafts of the decodes that are in the step already."""
        super().take_prefills(budget - self._drafts * self.work.decode_seqs)
        self._is_blocked = self._is_blocked and self._short_s != self.now_s

    def complete(self, now_s: float) -> list[Request]:
        """End the planned step at `now_s`; returns the requests that produced their last token."""
        if self.work.decode_seqs:
            # The base counts one token per sequence and step; growth is kept apart.
            self._growth += self._rate
            self.context_tokens -= self.work.decode_seqs
        return super().complete(now_s)

    def coming_contexts(self, steps: int) -> Sequence[int]:
        """As `DecodeBatch.coming_contexts`."""
        if not self.num_decoding:
            return (0,) * steps
        return [self.context_tokens + (tokens >> _SHIFT) for tokens in self._coming_growth(steps)]

    def steps_with_blocks(self) -> int:
        """Steps for which there are blocks."""
        return ((self._growth_blocks + self.free_blocks) * self._unit - self._growth) // self._rate

    def pass_steps(self, steps: int) -> Used:
        """As `DecodeBatch.pass_steps`."""
        before, last = self.total_blocks - self.free_blocks, self._growth_blocks
        if not self.num_decoding:
            return before, [0] * steps
        opened = []
        for tokens in self._coming_growth(steps):
            blocks = -(-tokens // self._unit)
            opened.append(blocks - last)
            last = blocks
        self._growth += self._rate * (steps - 1)
        self.free_blocks -= last - self._growth_blocks
        self._growth_blocks = last
        self.decode_steps += steps - 1
        return before, opened

    def _coming_growth(self, steps: int) -> range:
        """`_growth` during each of the next `steps` steps in which no request comes or goes."""
        first = self._growth + self._rate
        return range(first, first + self._rate * steps, self._rate)

    def _has_room(self, request: Request, held: int) -> bool:
        """As `Rank`, but nobody comes back in the step that preempted (vLLM): what it gave up may suffice here."""
        return self._short_s != self.now_s and super()._has_room(request, held)

    def _preempt_last(self) -> None:
        self._short_s = self.now_s
        super()._preempt_last()

    def _join_decode(self, request: Request, remaining: int) -> None:
        steps = self.walk.steps(remaining)
        rate = (remaining << _SHIFT) // steps
        self._paths[request] = (remaining, steps, rate)
        self._rate += rate
        self._growth += self._drafts << _SHIFT
        self._finish_in(request, steps)
        self.num_decoding += 1
        self.context_tokens += request.target

    def _decoded(self, request: Request) -> int:
        """Tokens that a decoding request has produced since it joined."""
        remaining, steps, _ = self._paths[request]
        return remaining * (self.decode_steps - request.joined_decode_step) // steps

    def _leave_decode(self, request: Request) -> None:
        decoded = self._decoded(request)
        request.produced += decoded
        _, _, rate = self._paths.pop(request)
        decoded_steps = self.decode_steps - request.joined_decode_step
        self._rate -= rate
        self._growth -= rate * decoded_steps + (self._drafts << _SHIFT)
        # Draft slots of requests that have just joined are not taken yet.
        held = min(self._growth_blocks, -(-self._growth // self._unit))
        self.free_blocks += self._growth_blocks - held
        self._growth_blocks = held
        self.num_decoding -= 1
        self.context_tokens -= request.target
        self._release(request, request.target, request.target + decoded)
