"""SGLang's admission and eviction: a ratio guesses what running requests will still add to the KV cache.

Rules of SGLang 0.5.23: `srt/managers/schedule_policy.py` (PrefillAdder), `schedule_batch.py` (retract_decode) and
`scheduler_components/new_token_ratio_tracker.py`. The output limit of a request (max_new_tokens) is taken to be the
length of its answer, as in benchmarks that ignore the end of sequence.
"""

from __future__ import annotations

from planner.decodebatch import Used
from planner.engine import TokenRatio
from planner.enginespec import EngineSpec
from planner.scheduler import Rank, Request


class RetractingRank(Rank):
    """A `Rank` that admits by new_token_ratio and, when KV runs out, sends back those with the shortest answers.

    A decoding request is expected to add min(remaining, clip) x ratio tokens. The sum over them is kept exactly:
    those with more than `clip_tokens` to go are counted, of the others the sum of (finish step - now) is kept, and a
    request moves from one to the other at a known decode step.
    """

    __slots__ = (
        "_admitted_tokens",
        "_decay",
        "_has_retracted",
        "_least",
        "_num_long",
        "_num_short",
        "_set_ratio",
        "_set_step",
        "_short_finish_steps",
        "rule",
        "start_ratio",
    )

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        assert spec.token_ratio is not None
        self.rule: TokenRatio = spec.token_ratio
        factor = self.rule.attention_dp_factor if spec.ranks_per_group > 1 else 1.0
        self.start_ratio = min(1.0, self.rule.start * factor)
        self._least = self.start_ratio * self.rule.settled_share
        self._decay = (self.start_ratio - self._least) / self.rule.decay_steps
        self._set_ratio, self._set_step = self.start_ratio, 0
        """The ratio when it was last set, and the decode step from which it falls."""
        self._num_long = self._num_short = self._short_finish_steps = 0
        self._admitted_tokens = 0
        """While prompts are taken: tokens that those ending in this step may add, in full."""
        self._has_retracted = False

    @property
    def ratio(self) -> float:
        """new_token_ratio now; it never falls below its settled value, but retraction may set it lower."""
        steps = max(0, self.decode_steps - self._set_step)
        return max(self._set_ratio - steps * self._decay, self._least) if steps else self._set_ratio

    @property
    def expected_tokens(self) -> int:
        """KV tokens that the decoding requests add if each uses its whole output, clipped; before the ratio."""
        return self._num_long * self.rule.clip_tokens + self._short_finish_steps - self._num_short * self.decode_steps

    def take_prefills(self, budget: int) -> None:
        """As `Rank.take_prefills`, but nobody comes in when others were just sent back."""
        if not self._has_retracted:
            super().take_prefills(budget)
            self._admitted_tokens = 0
        self._is_blocked = False  # the ratio falls, so room may appear in any step

    def complete(self, now_s: float) -> list[Request]:
        """As `Rank.complete`; an empty rank starts with the first ratio again."""
        if self.work.decode_seqs:
            self._shorten(1)
        self._has_retracted = False
        finished = super().complete(now_s)
        if finished and not self.running and not self.waiting:
            self._set_ratio, self._set_step = self.start_ratio, self.decode_steps
        return finished

    def coast(self, steps: int) -> Used:
        """As `Rank.coast`."""
        self._shorten(steps - 1)
        self._has_retracted = False
        return super().coast(steps)

    def _shorten(self, steps: int) -> None:
        """After the next `steps` decode steps some requests have no more than `clip_tokens` to go."""
        first = self.decode_steps + 1 + self.rule.clip_tokens
        for step in range(first, first + steps if self._num_long else first):
            shortened = self._finish_at.get(step)
            if shortened:
                self._num_long -= len(shortened)
                self._num_short += len(shortened)
                self._short_finish_steps += len(shortened) * step

    def _has_room(self, request: Request, held: int) -> bool:
        """Whether the prompt, its whole clipped answer and what the others are expected to add are free."""
        if not self.running:
            return True
        free_tokens = (self.free_blocks - self.blocks(request.target) + held) * self.block_tokens
        return free_tokens > self.ratio * self.expected_tokens + self._admitted_tokens + self._own_tokens(request)

    def _own_tokens(self, request: Request) -> int:
        """What a request may add after its prompt, with the block kept for rounding."""
        return min(request.output_tokens - request.produced, self.rule.clip_tokens) + self.block_tokens

    def _take_chunk(self, request: Request, budget: int) -> int:
        chunk = super()._take_chunk(request, budget)
        if request.computed == request.target:
            self._admitted_tokens += self._own_tokens(request)
        return chunk

    def _end_prefill(self, request: Request, now_s: float, finished: list[Request]) -> None:
        super()._end_prefill(request, now_s, finished)
        if request.produced < request.output_tokens:
            self._count(request, 1)

    def _leave_decode(self, request: Request) -> None:
        self._count(request, -1)
        super()._leave_decode(request)

    def _count(self, request: Request, sign: int) -> None:
        if request.finish_decode_step - self.decode_steps > self.rule.clip_tokens:
            self._num_long += sign
        else:
            self._num_short += sign
            self._short_finish_steps += sign * request.finish_decode_step

    def _make_room(self, turn: int) -> None:
        """Send requests back to the end of the queue, shortest answer and then longest prompt first, until all fit.

        At least one goes and at least one stays. The ratio becomes what those that stay show. O(running), and rare.
        """
        steps = self.decode_steps
        kept = [request for request in self.running if request is not self.partial]
        kept.sort(key=lambda r: (r.produced + steps - r.joined_decode_step, -r.prompt_tokens), reverse=True)
        while len(kept) > 1 and (not self._has_retracted or self._residues[turn] > self.free_blocks):
            request = kept.pop()
            del self.running[request]
            self._evict(request)
            self.waiting.append(request)
            self._has_retracted = True
        decoded = sum(r.produced + steps - r.joined_decode_step for r in kept)
        shown = (decoded + self.rule.retract_steps * len(kept)) / (sum(r.output_tokens for r in kept) + 1)
        self._set_ratio, self._set_step = min(1.0, shown), steps + 1
        super()._make_room(turn)
