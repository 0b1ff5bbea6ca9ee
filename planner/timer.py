"""Step times for the event loop: the tables of `StepCost` flattened to lists, a few look-ups per step."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from math import log2
from typing import Self

import numpy as np
from numpy.typing import NDArray

from planner.coasting import FEW, Batch, Draws, Floats
from planner.cost import StepCost
from planner.decodeattention import DecodeAttention
from planner.engine import Limits, padding
from planner.loads import KNOTS, NUM_DRAWS, LoadTable, nearest_knot
from planner.scheduler import RankWork
from planner.steptime import LENGTHS, SEQS, TOKENS, bilinear

_CONTEXT_STEPS = 8
_ROW_POINTS = 20 * _CONTEXT_STEPS + 2
"""Grid points per doubling of context in the decode-attention rows, and of a row."""
_DRAW_SEED, _DRAW_PERIOD, _GROUP_STRIDE = 20261122, 1021, 631
"""Steps take the cached draws in a random order that repeats after a prime number of steps; groups start apart."""
_DRAWS: list[int] = np.random.default_rng(_DRAW_SEED).integers(NUM_DRAWS, size=_DRAW_PERIOD).tolist()
_DRAWS_TWICE = _DRAWS * 2
_DRAWS_ARRAY = np.array(_DRAWS_TWICE)


class CostTimer:
    """`StepTimer` of a layout: attention is that of the slowest rank, experts see the tokens of all ranks.

    Ranks of a group meet in every layer. A rank without work runs a batch of one token; one rank with prompts takes
    all to kernels and exchange for prompts; a step that runs as a CUDA graph is padded on every rank to the tokens of
    the fullest, which the dense parts and an all-gather pay for and experts do not (handbook serving 2.4, appendix B).
    """

    def __init__(self, cost: StepCost, limits: Limits) -> None:
        self._host_s = cost.host_s
        self._pair_s = cost.pair_s
        self._each, most_decoded = cost.query_tokens, limits.max_num_seqs * cost.query_tokens
        largest = limits.max_batched_tokens + most_decoded
        graphs = cost.engine.graphs
        sizes = graphs.sizes(most_decoded, cost.cluster.system.gpu.arch)
        self._largest_graph = sizes[-1] if sizes else 0
        self._pad = padding(sizes, most_decoded)
        self._mixed_pad = padding(sizes, largest) if graphs.mixed_steps else list(range(largest + 1))
        self._tokens = tabulated(cost.token_table.terms, np.arange(largest + 1))
        self._prompt_tokens = tabulated(cost.prompt_token_table.terms, np.arange(largest + 1))
        self._mixed_tokens = [self._prompt_tokens[min(padded, largest)] for padded in self._mixed_pad]
        self._head = tabulated(cost.head_table.terms, np.arange(most_decoded + 64))
        self._stride = cost.layout.attention_dp
        grid = np.arange(largest + 1) * self._stride
        self._moe = {phase: tabulated(cost.moe_table(phase).terms, grid) for phase in ("prefill", "decode")}
        self._exchange = _exchange(cost, grid) if self._stride > 1 else {}
        self._knot: list[int] = nearest_knot(grid).tolist()
        self._place = -1
        """That of the last step in `_DRAWS`."""
        self.draw, self.link_s = 0, 0.0
        self.misses = cost.routed.misses() if cost.offload else {}
        """Hit rate, bytes fetched and link time of a step by phase and name, [knots, draws]; empty if all is in HBM."""
        self._attention = DecodeAttention(np.sum(list(cost.decode_table.terms.values()), axis=0))
        self._prefill = np.sum(list(cost.prefill_table.terms.values()), axis=0)
        self._prefill_rows: dict[int, list[float]] = {}
        decoded = range(0, most_decoded + 1, self._each)
        self._dense = [self._tokens[self._pad[n]] + self._head[n] for n in decoded]
        self.loads: list[dict[str, LoadTable]] = [cost.routed.loads()] if cost.model.moe else []
        """Draws of the router by phase, one entry per epoch of a run; a run without drift has one."""
        self.use_factors({phase: cost.draw_factors(phase) for phase in self._moe} if cost.model.moe else None)
        self._encoder: tuple[list[float], list[float]] | None = None
        if cost.has_encoder:
            self._encoder = (
                tabulated(cost.encoder_table.terms, np.arange(largest + 1)),
                tabulated(cost.encoder_moe_table.terms, grid),
            )

    def use_factors(self, factors: dict[str, np.ndarray] | None) -> None:
        """From now on, the expert part of a step takes its mean times a draw of `factors` [knots, draws] by phase."""
        even = np.ones((len(KNOTS), NUM_DRAWS))
        self._factor: dict[str, list[list[float]]] = {
            phase: (factors[phase] if factors else even).tolist() for phase in self._moe
        }
        moe, factor, each = self._moe["decode"], self._factor["decode"], self._each
        self._alone = [
            [dense + moe[n * each] * factor[self._knot[n * each]][draw] for n, dense in enumerate(self._dense)]
            for draw in range(NUM_DRAWS if self._stride == 1 else 0)
        ]
        """Everything but attention of a pure decode step, by draw and sequences, where one rank is the whole group."""
        self._others: dict[int, tuple[list[float], NDArray[np.float64]]] = {}
        """The same and the host, by sequences and draw, as far as it was needed; as list and as array."""

    def _next_draw(self) -> int:
        self._place = place = self._place + 1 if self._place < _DRAW_PERIOD - 1 else 0
        return _DRAWS[place]

    def _moe_s(self, phase: str, tokens: int) -> float:
        """Experts and exchange of `tokens` of all ranks in the draw of this step."""
        index = -(-tokens // self._stride)
        return self._moe[phase][index] * self._factor[phase][self._knot[index]][self.draw]

    def step_s(self, ranks: Sequence[RankWork]) -> float:
        """Seconds of one lockstep step of `ranks`, through all pipeline stages without waiting for other batches."""
        self.draw = self._next_draw()
        if len(ranks) == 1 and self._encoder is None:
            return self._lone_rank_s(ranks[0])
        prefill = any(rank.prefill_tokens for rank in ranks)
        most_tokens = most_rows = total_tokens = most_prompt = total_prompt = num_idle = 0
        attention_s = 0.0
        for rank in ranks:
            seqs, prompt = rank.decode_seqs, rank.prefill_tokens
            rank_s = self._attention.step_s(seqs, rank.decode_context_tokens) if seqs else 0.0
            if prompt:
                rank_s += self._prefill_s(prompt, rank.num_prefills, rank.prefill_pairs)
            elif not seqs:
                num_idle += 1
            attention_s = max(attention_s, rank_s)
            most_tokens = max(most_tokens, seqs + prompt)
            most_prompt = max(most_prompt, prompt)
            most_rows = max(most_rows, seqs + rank.num_prefills)
            total_tokens += seqs + prompt
            total_prompt += prompt
        if self._encoder is not None:
            return self._encoder_step_s(most_prompt, total_prompt, most_rows, total_tokens - total_prompt, attention_s)
        phase, padded = ("prefill", self._mixed_pad) if prefill else ("decode", self._pad)
        tokens = self._prompt_tokens if prefill else self._tokens
        return (
            self._host_s
            + attention_s
            + tokens[min(padded[most_tokens], len(tokens) - 1)]
            + self._head[min(most_rows, len(self._head) - 1)]
            + self._moe_s(phase, total_tokens + num_idle)
            + self._padded_exchange_s(phase, padded[most_tokens], total_tokens + num_idle)
        )

    def _padded_exchange_s(self, phase: str, padded: int, total_tokens: int) -> float:
        """What an all-gather of ranks padded to `padded` tokens takes beyond one of `total_tokens`, in a graph."""
        exchange = self._exchange.get(phase)
        if exchange is None or padded > self._largest_graph:
            return 0.0
        return max(0.0, exchange[min(padded, len(exchange) - 1)] - exchange[-(-total_tokens // self._stride)])

    def _lone_rank_s(self, rank: RankWork) -> float:
        """`step_s` of a group of one, the commonest case, without the bookkeeping over ranks."""
        seqs, prompt = rank.decode_seqs, rank.prefill_tokens
        seconds = self._host_s
        if seqs:
            seconds += self._attention.step_s(seqs, rank.decode_context_tokens)
        if not prompt:
            return seconds + self._alone[self.draw][seqs]
        tokens, rows = seqs + prompt, seqs + rank.num_prefills
        seconds += self._prefill_s(prompt, rank.num_prefills, rank.prefill_pairs)
        return (
            seconds
            + self._mixed_tokens[tokens]
            + self._head[min(rows, len(self._head) - 1)]
            + self._moe_s("prefill", tokens)
        )

    def coming(self, batches: Sequence[Batch], steps: int) -> tuple[Floats, Draws] | None:
        """As `planner.coasting.CoastingTimer`, for groups of several ranks without encoder."""
        if self._encoder is not None or len(batches) == 1:
            return None
        seqs = [count for count, _ in batches]
        tokens = sum(seqs) + seqs.count(0)
        padded, index = self._pad[max(seqs)], -(-tokens // self._stride)
        factor, mean_s = self._factor["decode"][self._knot[index]], self._moe["decode"][index]
        dense_s = self._tokens[min(padded, len(self._tokens) - 1)]
        head_s = self._head[min(max(seqs), len(self._head) - 1)]
        padding_s, host_s = self._padded_exchange_s("decode", padded, tokens), self._host_s
        draws = self._coming_draws(steps)
        if steps < FEW:
            few_s = [self._attention.few_s(count, contexts) for count, contexts in batches if count]
            seconds = [
                host_s + max(of_ranks) + dense_s + head_s + mean_s * factor[draw] + padding_s
                for draw, of_ranks in zip(draws, zip(*few_s, strict=True), strict=True)
            ]
            return seconds, draws
        attention_s = np.zeros(steps)
        for count, contexts in batches:
            if count:
                np.maximum(attention_s, self._attention.many_s(count, contexts), out=attention_s)
        return host_s + attention_s + dense_s + head_s + mean_s * np.array(factor)[draws] + padding_s, draws

    def take(self, steps: int) -> None:
        """As `planner.coasting.CoastingTimer`."""
        self._place = (self._place + steps) % _DRAW_PERIOD
        self.draw = _DRAWS[self._place]

    def of_group(self, group: int) -> Self:
        """As `planner.coasting.CoastingTimer`: groups take the draws in the same order from other places on."""
        own = copy(self)
        own._place = group * _GROUP_STRIDE % _DRAW_PERIOD - 1
        return own

    def _coming_draws(self, steps: int) -> Draws:
        twice = _DRAWS_TWICE if steps < FEW else _DRAWS_ARRAY
        return twice[self._place + 1 : self._place + 1 + steps]

    def _encoder_step_s(
        self, prompt: int, total_prompt: int, rows: int, total_decode: int, attention_s: float
    ) -> float:
        """Encoder-decoder models: prompts pass the encoder, generated tokens the decoder."""
        tokens, moe = self._encoder or ([], [])
        index = -(-total_prompt // self._stride)
        drawn = self._factor["prefill"][self._knot[index]][self.draw]
        seconds = self._host_s + attention_s + tokens[prompt] + moe[index] * drawn
        if rows:
            seconds += self._tokens[rows] + self._head[min(rows, len(self._head) - 1)]
            seconds += self._moe_s("decode", total_decode)
        return seconds

    def _prefill_s(self, tokens: int, chunks: int, pairs: float) -> float:
        row = self._prefill_rows.get(chunks)
        if row is None:
            row = self._prefill_rows[chunks] = log_row(self._prefill, float(chunks))
        each = tokens / chunks
        extra_pairs = pairs - chunks * each * (each + 1) / 2
        return at_log(row, each) + max(0.0, extra_pairs) * self._pair_s


class LoneRankTimer(CostTimer):
    """`CostTimer` of groups of one rank without pipeline, the commonest and hottest case: one call per step."""

    def step_s(self, ranks: Sequence[RankWork]) -> float:
        """Seconds of one step of the only rank."""
        self._place = place = self._place + 1 if self._place < _DRAW_PERIOD - 1 else 0
        self.draw = draw = _DRAWS[place]
        rank = ranks[0]
        seqs = rank.decode_seqs
        if rank.prefill_tokens:
            return self._lone_rank_s(rank)
        others = self._others.get(seqs) or self._tabulate(seqs)
        return others[0][draw] + self._attention.step_s(seqs, rank.decode_context_tokens)

    def coming(self, batches: Sequence[Batch], steps: int) -> tuple[Floats, Draws] | None:
        """As `planner.coasting.CoastingTimer`, for the only rank."""
        ((seqs, contexts),) = batches
        others, draws = self._others.get(seqs) or self._tabulate(seqs), self._coming_draws(steps)
        if steps < FEW:
            by_draw, few_s = others[0], self._attention.few_s(seqs, contexts)
            return [by_draw[draw] + seconds for draw, seconds in zip(draws, few_s, strict=True)], draws
        return others[1][draws] + self._attention.many_s(seqs, contexts), draws

    def _tabulate(self, seqs: int) -> tuple[list[float], NDArray[np.float64]]:
        seconds = [self._host_s + by_seqs[seqs] for by_seqs in self._alone]
        others = self._others[seqs] = seconds, np.array(seconds)
        return others


class OffloadTimer(CostTimer):
    """`CostTimer` that also says how long the fetches of a step keep the host link busy."""

    def __init__(self, cost: StepCost, limits: Limits) -> None:
        super().__init__(cost, limits)
        self._link_s: dict[str, list[list[float]]] = {
            phase: found["link_s"].tolist() for phase, found in self.misses.items()
        }

    def step_s(self, ranks: Sequence[RankWork]) -> float:
        """Seconds of one step of the only rank."""
        rank = ranks[0]
        seconds = super().step_s(ranks)
        prompt, seqs = rank.prefill_tokens, rank.decode_seqs
        if self._encoder is not None:
            self.link_s = self._fetch_s("prefill", prompt) + self._fetch_s("decode", seqs)
        else:
            self.link_s = self._fetch_s("prefill" if prompt else "decode", prompt + seqs)
        return seconds

    def coming(self, batches: Sequence[Batch], steps: int) -> tuple[Floats, Draws] | None:
        """None: every step asks for the link."""
        return None

    def _fetch_s(self, phase: str, tokens: int) -> float:
        return self._link_s[phase][self._knot[tokens]][self.draw] if tokens else 0.0


def step_timer(cost: StepCost, limits: Limits) -> CostTimer:
    """The fastest timer that is exact for the layout of `cost`."""
    if cost.offload is not None:
        return OffloadTimer(cost, limits)
    lone = cost.layout.attention_dp == 1 and cost.layout.pp == 1 and not cost.has_encoder
    return (LoneRankTimer if lone else CostTimer)(cost, limits)


def tabulated(terms: dict[str, np.ndarray], x: np.ndarray) -> list[float]:
    """Sum of `terms` tabulated on TOKENS, at `x`; 0 tokens cost nothing."""
    if not terms:
        return [0.0] * len(x)
    values: list[float] = np.where(x > 0, np.interp(x, TOKENS, np.sum(list(terms.values()), axis=0)), 0.0).tolist()
    return values


def _exchange(cost: StepCost, grid: np.ndarray) -> dict[str, list[float]]:
    """Seconds of all-gather and reduce-scatter at `grid` tokens of all ranks, by the phases that run as graphs."""
    if cost.model.moe is None or cost.backend != "allgather_reducescatter":
        return {}
    phases = ("prefill", "decode") if cost.engine.graphs.mixed_steps else ("decode",)
    terms = {phase: cost.moe_table(phase).terms for phase in phases}
    return {
        phase: tabulated({name: found[name] for name in ("dispatch", "combine")}, grid)
        for phase, found in terms.items()
    }


def log_row(table: np.ndarray, seqs: float) -> list[float]:
    """`table` [SEQS, LENGTHS] at `seqs`, on lengths 2**(i / _CONTEXT_STEPS)."""
    lengths = 2.0 ** (np.arange(_ROW_POINTS) / _CONTEXT_STEPS)
    row: list[float] = bilinear(
        np.full_like(lengths, min(seqs, SEQS[-1])), np.clip(lengths, 1, LENGTHS[-1]), table
    ).tolist()
    return row


def at_log(row: list[float], length: float) -> float:
    """Linear interpolation of `row` on its logarithmic length axis."""
    position = log2(max(length, 1.0)) * _CONTEXT_STEPS
    index = min(int(position), len(row) - 2)
    low = row[index]
    return low + (row[index + 1] - low) * (position - index)
