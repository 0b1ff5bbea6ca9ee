"""Closed-form steady state of one attention-DP rank: the fast estimate that ranks layouts before simulation.

A rank with b running sequences makes a token for each of them in every decode step. Prompts interrupt: in a
mixed scheduler a chunk rides in a decode step and lengthens it, in a prefill-first scheduler it takes a step of
its own, and in a lockstep group a chunk on any rank delays all (handbook serving 2.4). Balance of work gives the
mean time per output token T(b) and the request rate X(b) = b / (output x T). With drafts a step makes several.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from planner.cost import StepCost
from planner.pipeline import unevenness
from planner.prefixhits import HitModel
from planner.steptime import Floats
from planner.workload import Workload

_BATCHES: Floats = np.unique(np.round(np.geomspace(1, 4096, 28)))
_HIT_ROUNDS = 4
"""Hits change the rate and the rate the hits: rounds after which the share found is within 0.7 percentage points of its
limit at every batch of the cases of `benchmarks/prefix_hits.py`."""


@dataclass(frozen=True, slots=True)
class SteadyState:
    """Arrays over `batch` (running sequences per rank): seconds and requests per second of one rank."""

    batch: Floats
    tpot_s: Floats
    requests_per_s: Floats
    decode_s: Floats
    prefill_s: Floats
    prefill_share: Floats
    """Share of what a rank can prefill that its own prompts take: behind it they queue."""
    frontend_s: float
    """What a request takes to its queue and its first token back to the client."""
    tokens_per_step: float
    """Tokens that a sequence makes in one decode step."""
    hit_rate: Floats | None = None
    """Share of the prompt tokens found in the prefix cache, where requests share anything."""
    running_tokens: Floats | None = None
    """KV tokens of `batch` sequences, a shared prefix counted once; None where nothing is shared."""

    def batch_within(self, kv_tokens: float, context: float) -> float:
        """Running sequences whose `context` tokens each, less what they share, fit `kv_tokens`."""
        if self.running_tokens is None:
            return kv_tokens / context
        return float(np.interp(kv_tokens, [0.0, *self.running_tokens], [0.0, *self.batch]))

    def batch_of(self, users: Floats, think_s: float) -> Floats:
        """Running sequences of `users` per rank who think `think_s` per request: users = batch + rate x think time."""
        if not think_s:
            return users
        busy = np.concatenate([[0.0], self.batch + np.maximum.accumulate(self.requests_per_s) * think_s])
        return np.asarray(np.interp(users, busy, [0.0, *self.batch]))

    def capacity_per_s(self, max_batch: Floats) -> Floats:
        """Highest request rate of one rank when at most `max_batch` sequences run."""
        best = np.maximum.accumulate(self.requests_per_s)
        return np.where(max_batch >= 1, np.interp(max_batch, self.batch, best), 0.0)

    def batch_at(self, rate_per_s: Floats) -> Floats:
        """Smallest running batch that sustains `rate_per_s` on one rank."""
        best = np.maximum.accumulate(self.requests_per_s)
        rising = best + np.arange(len(best)) * 1e-12 * best[-1]
        return np.interp(rate_per_s, rising, self.batch)

    def tpot_at(self, batch: Floats) -> Floats:
        """Mean time per output token with `batch` running sequences."""
        return np.interp(batch, self.batch, self.tpot_s)

    def ttft_at(self, batch: Floats, prompt_cv2: float) -> Floats:
        """Mean time to first token: front end, own prefill, rest of the running step, M/G/1 waiting behind prompts."""
        service = np.interp(batch, self.batch, self.prefill_s)
        busy = np.minimum(np.interp(batch, self.batch, self.prefill_share), 0.99)
        waiting = busy * service * (1 + prompt_cv2) / 2 / (1 - busy)
        return np.asarray(self.frontend_s + service + waiting + self.tpot_at(batch) * self.tokens_per_step / 2)


@lru_cache(maxsize=4)
def _decoding(cost: StepCost, context: float) -> tuple[Floats, Floats]:
    """Decode steps with `context` tokens per sequence, and their longest stage over the mean one: for any budget."""
    return cost.decode(_BATCHES, np.full_like(_BATCHES, context)).total_s, unevenness(cost, _BATCHES)


def steady_with_hits(
    cost: StepCost, max_batched_tokens: int, policy: str, workload: Workload, model: HitModel, kv_tokens: float
) -> SteadyState:
    """`steady_state` where `model` says what requests find in the prefix cache of a rank with a pool of `kv_tokens`."""
    share: Floats | float = model.most
    for _ in range(_HIT_ROUNDS):
        steady = steady_state(cost, max_batched_tokens, policy, workload, share)
        found = model.hits(kv_tokens, steady.batch, steady.requests_per_s)
        share = (share + found.share) / 2
    steady = steady_state(cost, max_batched_tokens, policy, workload, found.share)
    return replace(steady, hit_rate=found.share, running_tokens=found.running_tokens)


def steady_state(
    cost: StepCost, max_batched_tokens: int, policy: str, workload: Workload, hit_rate: Floats | float = 0.0
) -> SteadyState:
    """Steady state of `cost`'s layout under `workload`, for batches up to the largest the engine can run.

    `hit_rate` is the share of the prompt tokens that a prefix cache spares, [batch] or one for all.
    """
    dp = cost.layout.attention_dp
    max_batched_tokens = min(max_batched_tokens, cost.engine.ubatch_tokens or max_batched_tokens)
    whole, output = workload.mean_prompt_tokens, max(1.0, workload.mean_output_tokens)
    prompt, found = whole * (1.0 - hit_rate), whole * hit_rate
    batch = _BATCHES
    context = whole + output / 2
    output = max(1.0, output / cost.tokens_per_step)
    contexts = np.full_like(batch, context)
    decode_s, longest_stage = _decoding(cost, context)
    # Prompt tokens per step: as many prompts as arrive while `batch` sequences make one token, one chunk at least.
    chunk = np.clip(prompt * batch / output, np.minimum(prompt, max_batched_tokens), max_batched_tokens)
    chunks = prompt / chunk
    share = np.minimum(1.0, chunks * batch / output)
    overload = np.maximum(1.0, chunks * batch / output)
    any_rank = 1 - (1 - share) ** dp
    ranks_prefilling = dp * share / np.maximum(any_rank, 1e-12)
    past = (prompt - np.minimum(chunk, prompt)) / 2 + found
    alone: Floats | float = 1.0
    if policy == "mixed":
        # A chunk in any batch of a pipeline lengthens the round of all of them.
        any_batch = 1 - (1 - any_rank) ** cost.layout.pp
        prompt_step_s = cost.mixed(chunk, past, ranks_prefilling, batch, contexts).total_s
        tpot_s = (any_batch * prompt_step_s + (1 - any_batch) * decode_s) * overload
    else:
        prompt_step_s = cost.prefill(chunk, past, ranks_prefilling).total_s
        # m chunks hold their own batch for m + p - 1 stage times (handbook serving 6.8), and each of them holds every
        # stage once for the p - 1 other batches.
        stages = cost.layout.pp
        own = (np.maximum(chunks, 1.0) + stages - 1) / (stages * np.maximum(chunks, 1.0))
        tpot_s = decode_s + any_rank * (own + (stages - 1) / stages) * prompt_step_s * overload
        alone = own
    per_prompt_s = chunks * prompt_step_s * alone
    tpot_s = tpot_s * longest_stage
    rate = batch / (output * tpot_s)
    # Prompts share a mixed step up to its token budget; in a prefill-first scheduler they take the rank for themselves.
    busy = rate * tpot_s * prompt / max_batched_tokens if policy == "mixed" else rate * per_prompt_s
    waiting_share = np.minimum(busy, 1.0)
    own_s = np.maximum(per_prompt_s, prompt_step_s)
    constant_s, per_token_s = cost.engine.frontend(cost.cluster.system.gpu.arch)
    frontend_s = constant_s + per_token_s * whole
    each = cost.tokens_per_step
    return SteadyState(batch, tpot_s / each, rate, decode_s / each, own_s, waiting_share, frontend_s, each)
