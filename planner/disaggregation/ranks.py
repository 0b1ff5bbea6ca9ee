"""Ranks of the two pools: one keeps the KV it computed until it has left, one gets it ready-made."""

from __future__ import annotations

from collections import deque

from planner.disaggregation.handover import Handover
from planner.enginespec import EngineSpec
from planner.scheduler import Rank, Request


class PrefillRank(Rank):
    """A rank whose requests end with their prompt; `hold` and `release` bracket the way of their KV."""

    __slots__ = ("num_held",)
    arrived = asking = ()
    """Nothing comes to a prefill rank from another pool."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.num_held = 0
        """Prompts whose KV has not left yet."""

    def hold(self, prompt_tokens: int) -> None:
        """Keep the blocks of a prompt that has just been completed."""
        self._keep(self.blocks(prompt_tokens))
        self.num_held += 1

    def release(self, prompt_tokens: int) -> None:
        """Free the blocks of a prompt whose KV has arrived."""
        self._keep(-self.blocks(prompt_tokens))
        self.num_held -= 1

    def _keep(self, blocks: int) -> None:
        self.free_blocks -= blocks
        self.final_blocks += blocks


class DecodeRank(Rank):
    """A rank that takes over computed prompts: asked, reserved, arrived, then running.

    The blocks of a prompt are taken when it is reserved. Requests that lose their KV later are computed again on this
    rank, before anything new is reserved.
    """

    __slots__ = ("_fresh", "arrived", "asking", "handover", "num_coming", "seats")

    def __init__(self, spec: EngineSpec, handover: Handover) -> None:
        super().__init__(spec)
        self.handover = handover
        self.seats = handover.seats(spec.max_num_seqs)
        self.asking: deque[Request] = deque()
        """Requests that wait for room, in order."""
        self.num_coming = 0
        """Requests with reserved blocks that do not run yet."""
        self.arrived: deque[Request] = deque()
        """Requests whose KV is here and which have no place in the batch yet."""
        self._fresh: list[Request] = []

    def can_ever_hold(self, request: Request) -> bool:
        """Whether an empty pool has room for `request` and for what admission keeps free."""
        most = max(self._kept_tokens(request) + self.handover.reserved_decode_tokens, self._last_tokens(request))
        return self.blocks(most) <= self.total_blocks

    def reserve(self) -> list[Request]:
        """Take the blocks of asking requests as far as there is room, first come first served; returns them."""
        taken: list[Request] = []
        while self.asking and not self.waiting and len(self.running) + self.num_coming < self.seats:
            request = self.asking[0]
            request.target = self._kept_tokens(request)
            request.final_blocks = self.blocks(self._last_tokens(request))
            if not self._can_take(request):
                break
            self.asking.popleft()
            self.free_blocks -= self.blocks(request.target)
            self.final_blocks += request.final_blocks
            self.num_coming += 1
            taken.append(request)
        return taken

    def join(self, now_s: float) -> tuple[list[Request], list[Request]]:
        """Put arrived requests into the batch while it has places; returns who joined, and who is finished by that."""
        joined: list[Request] = []
        finished: list[Request] = []
        while self.arrived and len(self.running) < self.max_num_seqs:
            request = self.arrived.popleft()
            self.num_coming -= 1
            joined.append(request)
            if self.handover.first_token == "decoded":
                self._fresh.append(request)
            else:
                request.produced = 1
                if request.first_token_s != request.first_token_s:
                    request.first_token_s = now_s
            remaining = request.output_tokens - request.produced
            if remaining:
                self.running[request] = None
                self._join_decode(request, remaining)
            else:
                self.free_blocks += self.blocks(request.target)
                self.final_blocks -= request.final_blocks
                finished.append(request)
        return joined, finished

    def complete(self, now_s: float) -> list[Request]:
        """`Rank.complete`; the first decode step of a request may be what its client sees first."""
        if self._fresh and self.work.decode_seqs:
            for request in self._fresh:
                if request in self.running:
                    request.first_token_s = now_s
            self._fresh.clear()
        return super().complete(now_s)

    def _kept_tokens(self, request: Request) -> int:
        """Tokens in the KV when decoding starts: the last prompt token is computed again by engines that say so."""
        return request.prompt_tokens - (self.handover.first_token == "decoded")

    def _last_tokens(self, request: Request) -> int:
        return request.prompt_tokens + request.output_tokens - 1

    def _can_take(self, request: Request) -> bool:
        reserved = self.handover.reserved_decode_tokens
        if not reserved:
            return self._has_room(request, 0)
        others = len(self.running) + self.num_coming + 1
        return self.free_blocks >= self.blocks(request.target + reserved * others)
