"""Continuous batching on one rank: which tokens go into the next step, and which KV blocks they need.

A `Rank` is one attention-data-parallel rank: a queue, a KV pool of blocks, and the requests it runs. A policy of
`SCHEDULERS` fills its next step.

The rules are those of vLLM 0.33 (`v1/core/sched/scheduler.py`) and SGLang 0.5.23 (`managers/scheduler.py`): whole
prompts are admitted when their blocks are free, blocks run out later because outputs grow, and then the request
admitted last is preempted, loses its KV, and is recomputed from the head of the queue.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

from planner.decodebatch import DecodeBatch, Used
from planner.enginespec import EngineSpec
from planner.prefixcache import Prefix, PrefixCache


class Request:
    """One request on its way through a rank; times are simulated seconds, NaN until they happen.

    `target` is the number of tokens to compute before the next output token can be produced: the prompt, and after
    a preemption also the tokens produced so far. `computed` of them are done. `prefix` says what its prompt shares.
    """

    __slots__ = (
        "admitted_s",
        "arrival_s",
        "computed",
        "final_blocks",
        "finish_decode_step",
        "first_token_s",
        "index",
        "joined_decode_step",
        "num_preemptions",
        "output_tokens",
        "prefix",
        "produced",
        "prompt_tokens",
        "target",
    )

    def __init__(self, index: int, prompt_tokens: int, output_tokens: int, arrival_s: float) -> None:
        self.index = index
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.arrival_s = arrival_s
        self.admitted_s = math.nan
        self.first_token_s = math.nan
        self.num_preemptions = 0
        self.produced = 0
        self.target = prompt_tokens
        self.computed = 0
        self.joined_decode_step = 0
        self.finish_decode_step = 0
        self.final_blocks = 0
        self.prefix: Prefix | None = None


class RankWork:
    """What one rank computes in one step; all zero when it takes part in the lockstep without work of its own.

    `prefill_pairs` counts query-key pairs, the sum over chunks of q x past + q (q + 1) / 2; likewise
    `decode_context_tokens` counts the KV tokens the decode queries read, each one's own token included. The object
    is filled anew each step: a timer that wants to keep values copies them.
    """

    __slots__ = ("decode_context_tokens", "decode_seqs", "num_prefills", "prefill_pairs", "prefill_tokens")

    def __init__(
        self,
        prefill_tokens: int = 0,
        prefill_pairs: int = 0,
        num_prefills: int = 0,
        decode_seqs: int = 0,
        decode_context_tokens: int = 0,
    ) -> None:
        self.prefill_tokens = prefill_tokens
        self.prefill_pairs = prefill_pairs
        self.num_prefills = num_prefills
        self.decode_seqs = decode_seqs
        self.decode_context_tokens = decode_context_tokens

    def clear(self) -> None:
        """Back to an idle step."""
        self.prefill_tokens = self.prefill_pairs = self.num_prefills = 0
        self.decode_seqs = self.decode_context_tokens = 0


class Rank(DecodeBatch):
    """Queue, KV pool and running requests of one attention-data-parallel rank.

    A step is `plan(now_s)`, which fills `work`, and later `complete(now_s)`; when a decoding request joins, its last
    decode step is known (`_finish_at`). Steps that change nothing but the counts of `DecodeBatch` need no plan.
    """

    __slots__ = (
        "_finish_at",
        "_finish_steps",
        "_is_blocked",
        "_policy",
        "_prefilled",
        "admission_reserve",
        "cache",
        "final_blocks",
        "holds_prompts",
        "largest_request_tokens",
        "max_batched_tokens",
        "max_num_seqs",
        "now_s",
        "num_preemptions",
        "partial",
        "running",
        "waiting",
        "work",
    )

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec.kv_blocks_per_rank, spec.block_tokens)
        self.max_num_seqs = spec.max_num_seqs
        self.max_batched_tokens = spec.max_batched_tokens
        self.admission_reserve = spec.admission_reserve
        self.cache: PrefixCache | None = None
        self.largest_request_tokens = spec.largest_request_tokens
        self.holds_prompts = False
        self.final_blocks = 0
        """Blocks the running requests will hold at their ends."""
        self.waiting: deque[Request] = deque()
        self.running: dict[Request, None] = {}
        """Admitted requests in order of admission."""
        self.partial: Request | None = None
        """The one request whose prompt is cut by the token budget of a step."""
        self.num_preemptions = 0
        self.now_s = 0.0
        self.work = RankWork()
        self._policy = SCHEDULERS[spec.policy]
        self._prefilled: list[Request] = []
        self._finish_at: dict[int, list[Request]] = {}
        self._finish_steps: list[int] = []
        """Heap of the keys of `_finish_at`, and of some that are gone."""
        self._is_blocked = False
        """Whether the first waiting request found no room and can find none before the decode batch changes."""

    def can_ever_hold(self, request: Request) -> bool:
        """Whether a rank takes a request as large as `request` at all; its last token is never written to the KV."""
        return request.prompt_tokens + request.output_tokens - 1 <= self.largest_request_tokens

    def enqueue(self, request: Request) -> None:
        """Put a new request at the end of the queue; the caller has checked `can_ever_hold`."""
        request.final_blocks = self.blocks(request.prompt_tokens + request.output_tokens - 1)
        self.waiting.append(request)

    def unfinished(self) -> list[Request]:
        """Every request here, with its `produced` tokens brought up to date; ends the use of this rank."""
        for bucket in self._finish_at.values():
            for request in bucket:
                request.produced += self.decode_steps - request.joined_decode_step
        return [*self.running, *self.waiting]

    def plan(self, now_s: float) -> None:
        """Fill `work` with the step that starts at `now_s` and take the KV blocks it writes."""
        self.now_s = now_s
        self.work.clear()
        if self.running or self.waiting:
            self._policy(self)

    def quiet_steps(self) -> int:
        """Coming steps certain to be decodes of the present batch unless a request comes, the last one may finish some.

        A lower bound; `sys.maxsize` for an empty rank.
        """
        if self.partial is not None or (self.waiting and not self._is_blocked):
            return 0
        if not self.num_decoding:
            return sys.maxsize
        return min(self._next_finish() - self.decode_steps, self.steps_with_blocks())

    def coast(self, steps: int) -> Used:
        """Take `steps` quiet steps at once, the last only planned; returns the blocks in use during them."""
        self.work.clear()
        self.work.decode_seqs = self.num_decoding
        return self.pass_steps(steps)

    def _next_finish(self) -> int:
        """Decode step after which the next request is done."""
        steps = self._finish_steps
        while steps[0] not in self._finish_at:
            heappop(steps)
        return steps[0]

    def can_prefill(self) -> bool:
        """Whether a step could hold prompt tokens: of the cut prompt, or of a waiting request that has room."""
        if self.partial is not None or not self.waiting or len(self.running) >= self.max_num_seqs:
            return self.partial is not None
        return self._has_room(self.waiting[0], self._held_blocks(self.waiting[0]))

    def take_decodes(self) -> None:
        """Put one token of every decoding request into the step, preempting requests until the new blocks fit.

        The last one preempted heads the queue and cannot come back within this step: it would need more blocks than
        it gave up, so vLLM's rule of admitting nobody after a preemption holds by itself.
        """
        turn = -self.decode_steps % self.block_tokens
        if self._residues[turn] > self.free_blocks:
            self._make_room(turn)
        self.free_blocks -= self._residues[turn]
        self.work.decode_seqs = self.num_decoding
        self.work.decode_context_tokens = self.context_tokens + self.num_decoding

    def take_prefills(self, budget: int) -> None:
        """Put up to `budget` prompt tokens into the step: first the cut prompt, then waiting ones.

        None while `holds_prompts`. First come first served, a request is admitted when a place, a token and the blocks
        of its whole prompt are free; these are taken at once. vLLM checks the same but takes blocks chunk by chunk.
        """
        if self.holds_prompts:
            return
        if self.partial is not None and budget > 0:
            budget -= self._take_chunk(self.partial, budget)
        while budget > 0 and self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            held = self._held_blocks(request)
            if not self._has_room(request, held):
                break
            self.waiting.popleft()
            self.running[request] = None
            if self.cache is not None:
                self.cache.admit(request)
            self.free_blocks -= self.blocks(request.target) - held
            self.final_blocks += request.final_blocks - held
            if request.admitted_s != request.admitted_s:
                request.admitted_s = self.now_s
            budget -= self._take_chunk(request, budget)
        # Quiet steps only take blocks, so who finds none now finds none in them; caches may be found to hold others.
        self._is_blocked = budget > 0 and not self.work.prefill_tokens and self.cache is None

    def complete(self, now_s: float) -> list[Request]:
        """End the planned step at `now_s`; returns the requests that produced their last token."""
        finished: list[Request] = []
        if self.work.decode_seqs:
            self.decode_steps += 1
            self.context_tokens += self.work.decode_seqs
            if self.decode_steps in self._finish_at:
                finished = self._finish_at.pop(self.decode_steps)
                while self._finish_steps and self._finish_steps[0] <= self.decode_steps:
                    heappop(self._finish_steps)
                self._is_blocked = False
                for request in finished:
                    self._leave_decode(request)
                    del self.running[request]
        if self._prefilled:
            for request in self._prefilled:
                self._end_prefill(request, now_s, finished)
            self._prefilled.clear()
        return finished

    def _held_blocks(self, request: Request) -> int:
        """Blocks of `request` that others hold and it would find."""
        return self.cache.held_blocks(request, self.free_blocks) if self.cache is not None else 0

    def _has_room(self, request: Request, held: int) -> bool:
        """Whether `request` may be admitted when others hold `held` of its blocks."""
        needed = self.blocks(request.target) - held
        unwritten = self.final_blocks + request.final_blocks - held - (self.total_blocks - self.free_blocks) - needed
        return self.free_blocks - needed >= self.admission_reserve * unwritten

    def _take_chunk(self, request: Request, budget: int) -> int:
        past = request.computed
        chunk = min(request.target - past, budget)
        request.computed = past + chunk
        work = self.work
        work.prefill_tokens += chunk
        work.prefill_pairs += chunk * past + chunk * (chunk + 1) // 2
        work.num_prefills += 1
        if request.computed == request.target:
            if self.cache is not None:
                self.cache.publish(request, request.target)
            self._prefilled.append(request)
            self.partial = None
        else:
            self.partial = request
        return chunk

    def _end_prefill(self, request: Request, now_s: float, finished: list[Request]) -> None:
        request.produced += 1
        if request.first_token_s != request.first_token_s:
            request.first_token_s = now_s
        remaining = request.output_tokens - request.produced
        if not remaining:
            self._release(request, request.target, request.target)
            del self.running[request]
            finished.append(request)
            return
        self._join_decode(request, remaining)

    def _join_decode(self, request: Request, remaining: int) -> None:
        """Put a request with `remaining` > 0 tokens to come into the decode batch."""
        self._finish_in(request, remaining)
        self._residues[(request.target - self.decode_steps) % self.block_tokens] += 1
        self.num_decoding += 1
        self.context_tokens += request.target

    def _finish_in(self, request: Request, steps: int) -> None:
        """Note that `request`, which joins the decode batch now, is done after so many steps."""
        request.joined_decode_step = self.decode_steps
        request.finish_decode_step = finish = self.decode_steps + steps
        bucket = self._finish_at.get(finish)
        if bucket is None:
            self._finish_at[finish] = [request]
            heappush(self._finish_steps, finish)
        else:
            bucket.append(request)

    def _leave_decode(self, request: Request) -> None:
        """Take a decoding request out of the batch, count its tokens and free its blocks."""
        decoded = self.decode_steps - request.joined_decode_step
        context = request.target + decoded
        self._residues[(request.target - request.joined_decode_step) % self.block_tokens] -= 1
        self.num_decoding -= 1
        self.context_tokens -= context
        self._release(request, context, context)
        request.produced += decoded

    def _release(self, request: Request, tokens: int, computed: int) -> None:
        """Give back the blocks of `tokens`; the `computed` first of them stay in the prefix cache, if there is one."""
        kept = self.cache.release(request, computed, self.free_blocks) if self.cache is not None else 0
        self.free_blocks += self.blocks(tokens) - kept
        self.final_blocks -= request.final_blocks - kept

    def _make_room(self, turn: int) -> None:
        """Preempt until the decoding requests of residue `turn`, whose next token opens a block, get one each."""
        while self._residues[turn] > self.free_blocks:
            self._preempt_last()

    def _preempt_last(self) -> None:
        request, _ = self.running.popitem()
        self._evict(request)
        self.waiting.appendleft(request)

    def _evict(self, request: Request) -> None:
        """Free the blocks of `request`, which has left `running`; it will compute its prompt and answer anew."""
        if request is self.partial:
            self.partial = None
            self._release(request, request.target, request.computed)
        else:
            self._leave_decode(request)
            bucket = self._finish_at[request.finish_decode_step]
            bucket.remove(request)
            if not bucket:
                del self._finish_at[request.finish_decode_step]
        self._is_blocked = False
        request.target = request.prompt_tokens + request.produced
        request.computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1


SchedulerPolicy = Callable[[Rank], None]


def mixed(rank: Rank) -> None:
    """vLLM: every running request decodes, and what is left of the token budget goes to prompts in the same step."""
    rank.take_decodes()
    if rank.partial is not None or rank.waiting:
        rank.take_prefills(rank.max_batched_tokens - rank.work.decode_seqs)


def prefill_first(rank: Rank) -> None:
    """SGLang: a step of prompts alone whenever one can be formed, otherwise a step of decodes alone."""
    if rank.partial is not None or rank.waiting:
        rank.take_prefills(rank.max_batched_tokens)
    if not rank.work.prefill_tokens:
        rank.take_decodes()


SCHEDULERS: dict[str, SchedulerPolicy] = {"mixed": mixed, "prefill_first": prefill_first}
