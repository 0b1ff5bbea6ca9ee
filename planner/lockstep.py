"""What the ranks of an attention-DP group agree on before a step: here, whether prompts may enter it."""

from __future__ import annotations

from collections.abc import Sequence

from planner.engine import BatchWait, PrefillBalance
from planner.scheduler import Rank


class PrefillHold:
    """TensorRT-LLM's attention-DP balance (PyExecutor._balance_adp_requests, handbook serving 2.4).

    A step with prompts on few ranks makes the others wait. So prompts are held until every rank has one that it could
    take, every rank has a free place, and, where all ranks decode, `batching_wait_steps` more steps have passed. They
    enter all the same at every `timeout_steps`-th step in which that is not so, and when a rank has nothing to decode.
    """

    __slots__ = ("_batching_steps", "_rule", "_waiting_steps")

    def __init__(self, rule: PrefillBalance) -> None:
        self._rule = rule
        self._waiting_steps = self._batching_steps = 0

    def decide(self, ranks: Sequence[Rank]) -> None:
        """Let prompts into the next step of `ranks`, or hold them on all."""
        holds = self._holds(ranks)
        for rank in ranks:
            rank.holds_prompts = holds

    def _holds(self, ranks: Sequence[Rank]) -> bool:
        all_decode = all(rank.num_decoding for rank in ranks)
        have_places = all(rank.num_decoding < rank.max_num_seqs for rank in ranks)
        if have_places and all(rank.can_prefill() for rank in ranks):
            self._waiting_steps = 0
            if all_decode and self._batching_steps < self._rule.batching_wait_steps:
                self._batching_steps += 1
                return True
            self._batching_steps = 0
            return False
        self._waiting_steps += 1
        if self._waiting_steps < self._rule.timeout_steps and all_decode:
            return True
        self._waiting_steps = 0
        return False


class PromptHold:
    """TensorRT-LLM's batch waiting (PyExecutor._waiting_requests, batch_wait_timeout_iters).

    Prompts of a lone rank that decodes are held until those waiting and the decodes make up the rule's share of the
    token budget, or for as many steps as it allows.
    """

    __slots__ = ("_rule", "_waiting_steps")

    def __init__(self, rule: BatchWait) -> None:
        self._rule = rule
        self._waiting_steps = 0

    def decide(self, ranks: Sequence[Rank]) -> None:
        """Let prompts into the next step of the only rank, or hold them."""
        rank = ranks[0]
        rank.holds_prompts = self._holds(rank)
        self._waiting_steps = self._waiting_steps + 1 if rank.holds_prompts else 0

    def _holds(self, rank: Rank) -> bool:
        if not rank.num_decoding or self._waiting_steps >= self._rule.timeout_steps or not rank.can_prefill():
            return False
        wanted = self._rule.token_share * rank.max_batched_tokens - rank.num_decoding
        wanted -= rank.partial.target if rank.partial is not None else 0
        for request in rank.waiting:
            if wanted <= 0:
                break
            wanted -= request.target
        return wanted > 0
