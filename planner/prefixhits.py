"""Expected hits of a prefix cache in closed form: what ranks layouts before the simulation.

Che's approximation of an LRU cache (handbook serving 5B.3; Che, Tung and Wang, IEEE JSAC 20(7), 2002): a block survives
a characteristic time t after its last use, the same for all, and t is such that what survives fills the cache. Here the
last use of a block is the end of the last request that held it, so a prefix of popularity p is there if a request of
its group runs or ended within t: with probability 1 - exp(-rate p (t + W)) when requests stay W = batch / rate (Little)
and arrive as a Poisson process. The pool of a rank holds, in tokens,

    KV = batch x own tokens of a running request                  (with the history of its conversation)
       + sum over groups of prefix tokens x (1 - exp(-rate p (t + W)))
       + rate x E[own tokens at the end x min(t, time to the next turn on this rank)],

where the time is infinite for what nobody asks for again. A turn finds its history if the last turn on this rank ended
within t; without affinity it comes back to one of R ranks with probability 1 / R, and then finds what an older turn
left there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.engine import Engine
from planner.model import Attention, ModelConfig
from planner.steptime import Floats
from planner.workload import RequestArrays, Workload

_SAMPLED_ROWS = 4000
_TIMES_S: Floats = np.concatenate([[0.0], np.geomspace(1e-3, 1e7, 121)])
"""Characteristic times that are tried [s]; the last one stands for a cache that forgets nothing."""
_COUNTS: Floats = np.concatenate([[0.0], np.geomspace(1e-3, 1e9, 241)])
"""Numbers of requests at which the presence of groups is tabulated."""
_MOST_KINDS = 2000
"""Groups up to which each counts by itself; more are taken together with neighbours of nearly the same popularity."""
_MAX_AGE = 12
"""Turns after which what is left on a rank that a conversation comes back to counts as gone."""


def caches_prefixes(model: ModelConfig, engine: Engine) -> bool:
    """Whether `engine` finds prefixes of `model` again: it must cache, and all of a prompt's state must be KV blocks.

    Encoders see whole prompts. Recurrent layers keep a state beside the blocks, of which vLLM caches snapshots at the
    ends of blocks of hundreds of tokens (`--mamba-cache-mode align`): not modelled.
    """
    plain = all(isinstance(mixer, Attention) for layer in model.layers for mixer in layer.mixers)
    return engine.prefix_caching and plain and not any(layer.stack == "encoder" for layer in model.layers)


@dataclass(frozen=True, slots=True)
class Hits:
    """Over running sequences per rank: share of the prompt tokens found, and tokens of the pool that they hold."""

    share: Floats
    running_tokens: Floats


class HitModel:
    """Hits of `workload` in one of `num_ranks` caches with blocks of `block_tokens`.

    With `affinity` groups are divided among ranks and conversations stay on theirs.
    """

    def __init__(self, workload: Workload, block_tokens: int, num_ranks: int, affinity: bool) -> None:
        sent = _sample(workload)
        assert sent.sharing is not None
        shared = sent.sharing.shared_tokens.astype(float)
        prompt, output = sent.prompt_tokens.astype(float), sent.output_tokens.astype(float)
        self._mean_prompt = float(prompt.mean())
        self._running = float((prompt + output / 2 - shared).mean())
        self._tabulate_groups(workload, sent, block_tokens, num_ranks if affinity else 1)
        self._tabulate_history(sent, block_tokens, 1 if affinity else num_ranks)

    @property
    def most(self) -> float:
        """Share of the prompt tokens that a cache which forgets nothing finds."""
        return float((self._group_hits[-1] + self._history_hits[-1]) / self._mean_prompt)

    def hits(self, kv_tokens: float, batch: Floats, rate_per_s: Floats) -> Hits:
        """Hits of a rank with a pool of `kv_tokens` that runs `batch` sequences at `rate_per_s` requests per second."""
        alive = np.interp(batch, _COUNTS, self._group_tokens)
        running = batch * self._running + alive
        found = np.empty(len(batch))
        for i, (seqs, rate) in enumerate(zip(batch, rate_per_s, strict=True)):
            groups = np.interp(rate * _TIMES_S + seqs, _COUNTS, self._group_tokens)
            held = seqs * self._running + groups + rate * self._left_tokens
            time_s = float(np.interp(kv_tokens, held, _TIMES_S)) if held[0] < kv_tokens else 0.0
            found[i] = np.interp(rate * time_s + seqs, _COUNTS, self._group_hits)
            found[i] += np.interp(time_s, _TIMES_S, self._history_hits)
        return Hits(found / self._mean_prompt, running)

    def _tabulate_groups(self, workload: Workload, sent: RequestArrays, block_tokens: int, spread: int) -> None:
        """Tokens of the groups that are there, and tokens found per request, after `_COUNTS` requests on a rank."""
        popularity, tokens, number = _groups(workload, sent, block_tokens)
        spread = max(1, min(spread, int(number.sum())))
        present = 1.0 - np.exp(-np.outer(_COUNTS, popularity * spread))
        self._group_tokens = present @ (number * tokens) / spread
        self._group_hits = present @ (number * popularity * tokens)

    def _tabulate_history(self, sent: RequestArrays, block_tokens: int, num_ranks: int) -> None:
        """Over `_TIMES_S`: tokens left behind per request that are still there, and tokens of the history found."""
        assert sent.sharing is not None
        order, follows, gap_s = _turns(sent)
        talk = sent.sharing.conversation[order]
        shared = sent.sharing.shared_tokens[order].astype(float)
        end = (sent.prompt_tokens[order] + sent.output_tokens[order] - 1).astype(float)
        left = end - shared
        count = len(order)
        self._left_tokens = np.zeros(len(_TIMES_S))
        self._history_hits = np.zeros(len(_TIMES_S))
        unseen, since_s = np.ones(count), np.zeros(count)
        for age in range(1, _MAX_AGE + 1):
            # `later` turns come `age` after the turns `earlier` of their conversations, `since_s` after those ended.
            later = np.arange(age, count)
            earlier = later - age
            same = (talk[later] == talk[earlier]) & follows[later]
            later, earlier = later[same], earlier[same]
            if not len(later):
                break
            since_s[earlier] += gap_s[earlier + age]
            chance = (1 - 1 / num_ranks) ** (age - 1) / num_ranks
            found = np.floor(end[earlier] / block_tokens) * block_tokens - shared[earlier]
            elapsed_s = since_s[earlier]
            self._history_hits += chance * _up_to(elapsed_s, np.maximum(found, 0.0)) / count
            self._left_tokens += chance * _until(elapsed_s, left[earlier]) / count
            unseen[earlier] -= chance
        self._left_tokens += (unseen * left).sum() / count * _TIMES_S


def _sample(workload: Workload) -> RequestArrays:
    count = min(workload.num_requests, _SAMPLED_ROWS) if workload.recorded else _SAMPLED_ROWS
    return workload.with_num_requests(count).requests(0)


def _groups(workload: Workload, sent: RequestArrays, block_tokens: int) -> tuple[Floats, Floats, Floats]:
    """Kinds of groups: share of the requests of one of them, tokens in whole blocks, how many there are."""
    assert sent.sharing is not None
    belongs = sent.sharing.group >= 0
    member = sent.sharing.group[belongs]
    shared = np.minimum(sent.sharing.shared_tokens, sent.prompt_tokens - 1)[belongs]
    whole = (shared // block_tokens * block_tokens).astype(float)
    if workload.prefix is None:
        size = np.bincount(member)
        return size / len(belongs), np.bincount(member, whole) / np.maximum(size, 1), np.ones(len(size))
    popularity = workload.prefix.popularity
    size = np.bincount(member, minlength=len(popularity))
    tokens = np.where(size, np.bincount(member, whole, len(popularity)) / np.maximum(size, 1), whole.mean())
    first = np.unique(np.geomspace(1, len(popularity) + 1, _MOST_KINDS).astype(np.int64))[:-1] - 1
    if len(popularity) <= _MOST_KINDS:
        first = np.arange(len(popularity))
    number = np.diff(first, append=len(popularity)).astype(float)
    return np.add.reduceat(popularity, first) / number, np.add.reduceat(tokens, first) / number, number


def _turns(sent: RequestArrays) -> tuple[NDArray[np.int64], NDArray[np.bool_], Floats]:
    """Rows with the turns of a conversation beside each other, which follow another turn, and after what time [s].

    The times of a trace lie between arrivals, so they contain the answers.
    """
    assert sent.sharing is not None
    talk = sent.sharing.conversation
    order = np.argsort(talk, kind="stable")
    follows = np.zeros(len(talk), dtype=bool)
    follows[1:] = (talk[order][1:] == talk[order][:-1]) & (talk[order][1:] >= 0)
    if sent.sharing.think_s is not None:
        return order, follows, np.nan_to_num(sent.sharing.think_s[order])
    arrival_s = sent.arrival_s[order]
    return order, follows, np.maximum(np.diff(arrival_s, prepend=arrival_s[0]), 0.0)


def _up_to(times_s: Floats, values: Floats) -> Floats:
    """Sum of the `values` whose `times_s` are at most each of `_TIMES_S`."""
    order = np.argsort(times_s)
    sums = np.concatenate([[0.0], np.cumsum(values[order])])
    return np.asarray(sums[np.searchsorted(times_s[order], _TIMES_S, side="right")])


def _until(times_s: Floats, values: Floats) -> Floats:
    """Sum of `values` x min(`times_s`, t) over each t of `_TIMES_S`."""
    reached = _up_to(times_s, values * times_s)
    return np.asarray(reached + _TIMES_S * (values.sum() - _up_to(times_s, values)))
