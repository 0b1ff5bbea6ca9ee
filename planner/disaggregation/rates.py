"""How much one replica of a pool can do, closed-form, and how pools are matched to each other and to a load.

N_p x mu_p = rate x prompt tokens, N_d x mu_d = rate x output tokens (handbook serving 2.6). The throughput of a
matched pair per GPU is that of TensorRT-LLM's tech blog 05: out tok/s over prefill GPUs x (decode request rate /
prefill request rate) + decode GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.cost import StepCost
from planner.deployment import Deployment
from planner.disaggregation.handover import Handover
from planner.steptime import TOKENS, Floats, Sum, bilinear
from planner.workload import Workload

_BATCHES = 28
_SHARES = np.linspace(0.02, 0.98, 49)
_FULL = 0.98
"""Share of its capacity that a queue is never loaded beyond in an estimate."""


def matched_units(
    prompt_tok_per_s: float, output_tok_per_s: float, prefill_tok_per_s: float, decode_tok_per_s: float
) -> tuple[float, float]:
    """Prefill and decode units (nodes, replicas) that keep up with a load; rates are per unit.

    DeepSeek's published day, 608e9 prompt and 168e9 output tokens on nodes of 73.7k and 14.8k tok/s:

    >>> [round(n, 2) for n in matched_units(608e9 / 86400, 168e9 / 86400, 73.7e3, 14.8e3)]
    [95.48, 131.38]
    """
    return prompt_tok_per_s / prefill_tok_per_s, output_tok_per_s / decode_tok_per_s


def matched_tok_per_s_per_gpu(
    output_tokens: float, prefill_per_s: float, prefill_gpus: float, decode_per_s: float, decode_gpus: float
) -> float:
    """Output tok/s per GPU when prefill replicas are added until a decode replica is busy (TensorRT-LLM blog 05).

    `prefill_per_s` and `decode_per_s` are requests per second of one replica of `prefill_gpus` and `decode_gpus` GPUs.
    """
    return output_tokens * decode_per_s / (prefill_gpus * decode_per_s / prefill_per_s + decode_gpus)


@dataclass(frozen=True, eq=False)
class Demand:
    """The workload as the estimates see it: requests per second, drawn prompts, and moments of the lengths.

    `prompt_length` is the mean length seen from a prompt token, E[L^2] / E[L], `context` the mean context of a running
    sequence, `prompts` [num_requests] lengths in order of arrival.
    """

    rate_per_s: float
    prompt_tokens: float
    prompt_cv2: float
    output_tokens: float
    context: float
    prompts: Floats

    @classmethod
    def of(cls, workload: Workload) -> Demand:
        """Moments of the lengths that a simulation of `workload` draws with seed 0."""
        drawn = workload.requests(seed=0)
        prompt, output = drawn.prompt_tokens.astype(float), drawn.output_tokens.astype(float)
        context = float((output * (prompt + output / 2)).mean() / output.mean())
        cv2 = float(prompt.var() / prompt.mean() ** 2)
        return cls(workload.arrivals.rate_per_s, float(prompt.mean()), cv2, float(output.mean()), context, prompt)

    @property
    def prompt_length(self) -> float:
        """Length of the prompt of a random prompt token."""
        return self.prompt_tokens * (1 + self.prompt_cv2)

    def excess_pairs(self, budget: int, ranks: int) -> float:
        """Query-key pairs by which the busiest of `ranks` ranks exceeds the mean in a step of `budget` tokens each.

        The prompts fill steps one after the other; the expected largest of `ranks` independent steps follows from
        their order statistics: sum of x_(i) ((i / n)^R - ((i - 1) / n)^R).
        """
        ends = np.concatenate([[0.0], np.cumsum(self.prompts)])
        done = np.concatenate([[0.0], np.cumsum(self.prompts * (self.prompts + 1) / 2)])
        edges = np.arange(int(ends[-1] // budget) + 1) * float(budget)
        if ranks == 1 or len(edges) < 2:
            return 0.0
        prompt = np.searchsorted(ends, edges, side="right") - 1
        into = edges - ends[prompt]
        pairs = np.sort(np.diff(done[prompt] + into * (into + 1) / 2))
        share = np.arange(len(pairs) + 1) / len(pairs)
        return float(pairs @ np.diff(share**ranks) - pairs.mean())


@dataclass(frozen=True)
class PrefillRate:
    """One replica of a prefill pool: a step of full budget on every rank, the time of one prompt, its request rate."""

    deployment: Deployment
    step_s: float
    prompt_s: float
    requests_per_s: float
    prompt_cv2: float
    frontend_s: float

    def ttft_s(self, share: Floats) -> Floats:
        """Mean time until a prompt is computed at `share` of the capacity: front end, own prompt, queue, running step.

        The queue is M/G/1 of the replica (Pollaczek-Khinchine), its service 1 / `requests_per_s`.
        """
        load = np.minimum(share, _FULL)
        queue_s = load / (1 - load) * (1 + self.prompt_cv2) / 2 / self.requests_per_s
        return np.asarray(self.frontend_s + self.prompt_s + queue_s + load * self.step_s / 2)

    def within_per_s(self, limit_s: float) -> float:
        """Request rate of one replica at which `ttft_s` just keeps `limit_s`; 0 where an idle pool does not."""
        kept = _SHARES[self.ttft_s(_SHARES) <= limit_s]
        return float(kept[-1]) * self.requests_per_s if len(kept) else 0.0


def prefill_rate(cost: StepCost, deployment: Deployment, demand: Demand) -> PrefillRate:
    """Rate of a replica whose steps are full: whole prompts where the token budget has room, else chunks of them.

    A lockstep group waits for the rank whose prompts have the most query-key pairs.
    """
    layout, budget = deployment.layout, deployment.limits.max_batched_tokens
    length = demand.prompt_length
    step_s = _prompt_step_s(cost, float(budget), length, layout.attention_dp)
    step_s += cost.pair_s * demand.excess_pairs(budget, layout.attention_dp)
    rate = layout.attention_dp * budget / step_s / demand.prompt_tokens
    chunk = min(demand.prompt_tokens, float(budget))
    alone_s = _prompt_step_s(cost, chunk, demand.prompt_tokens, 1) * demand.prompt_tokens / chunk
    constant_s, per_token_s = deployment.engine.frontend(deployment.cluster.system.gpu.arch)
    frontend_s = constant_s + per_token_s * demand.prompt_tokens
    # Stages of a pipeline work on different batches at once.
    return PrefillRate(deployment, step_s, alone_s, rate * layout.pp, demand.prompt_cv2, frontend_s)


def _prompt_step_s(cost: StepCost, tokens: float, length: float, ranks: int) -> float:
    """A step of `tokens` on each of `ranks` ranks, cut from prompts of `length`."""
    if tokens < length:
        past = np.array((length - tokens) / 2)
        return float(cost.prefill(np.array(tokens), past, ranks).total_s)
    prompts = np.array(tokens / length)
    attention = bilinear(prompts, np.array(length), _sum(cost.prefill_table))
    rest = _at(cost.prompt_token_table, tokens) + _at(cost.moe_table("prefill"), tokens * ranks)
    return float(attention) + rest + _at(cost.head_table, float(prompts)) + cost.host_s


def _sum(table: Sum) -> Floats:
    return np.asarray(np.sum(list(table.terms.values()), axis=0), dtype=np.float64)


def _at(table: Sum, tokens: float) -> float:
    return float(np.interp(tokens, TOKENS, _sum(table))) if table.terms else 0.0


@dataclass(frozen=True)
class DecodeCurve:
    """Decode steps of a layout, before limits: `batch` sequences per rank, seconds per token, requests per second."""

    batch: Floats
    tpot_s: Floats
    requests_per_s: Floats


@dataclass(frozen=True)
class DecodeRate:
    """One replica of a decode pool on its `curve`, whose limits and KV allow `most` sequences per rank."""

    deployment: Deployment
    curve: DecodeCurve
    most: float

    @cached_property
    def capacity_per_s(self) -> float:
        """Highest request rate of a replica."""
        return self.within_per_s(np.inf)

    def batch_at(self, rate_per_s: float) -> float:
        """Smallest batch per rank of a replica that answers `rate_per_s`."""
        best = np.maximum.accumulate(self.curve.requests_per_s)
        rising = best + np.arange(len(best)) * 1e-12 * best[-1]
        return float(np.interp(rate_per_s, rising, self.curve.batch))

    def tpot_at(self, rate_per_s: float) -> float:
        """Mean time per output token of a replica that answers `rate_per_s` [s]."""
        return float(np.interp(self.batch_at(rate_per_s), self.curve.batch, self.curve.tpot_s))

    def within_per_s(self, limit_s: float) -> float:
        """Request rate of a replica whose tokens take `limit_s` at most; 0 where one sequence takes longer."""
        batch = np.linspace(1.0, max(1.0, self.most), 256)
        tpot_s = np.interp(batch, self.curve.batch, self.curve.tpot_s)
        rate = np.interp(batch, self.curve.batch, self.curve.requests_per_s)
        kept = rate[(tpot_s <= limit_s) & (batch <= self.most)]
        return float(kept.max()) if len(kept) else 0.0


def decode_curve(cost: StepCost, demand: Demand, handover: Handover) -> DecodeCurve:
    """Pure decode steps over the batch; the token of the prefill engine is not made again."""
    batch = np.unique(np.round(np.geomspace(1, 4096, _BATCHES)))
    steps = max(1.0, demand.output_tokens - (handover.first_token != "decoded"))
    tpot_s = np.asarray(cost.decode(batch, np.full_like(batch, demand.context)).total_s)
    ranks = cost.layout.attention_dp * cost.layout.pp
    return DecodeCurve(batch, tpot_s, ranks * batch / (steps * tpot_s))


def decode_rate(curve: DecodeCurve, deployment: Deployment, demand: Demand, handover: Handover) -> DecodeRate:
    """`curve` as far as the limits and the KV of `deployment` allow, its reserve of tokens per request included."""
    layout = deployment.layout
    room = deployment.memory.kv_tokens / layout.pp / (demand.context + handover.reserved_decode_tokens)
    most = min(max(1, deployment.limits.max_num_seqs // layout.pp), room)
    return DecodeRate(deployment, curve, float(most))
