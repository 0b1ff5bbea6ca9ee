"""Step times for the event loop where tokens are drafted or the exchange is overlapped: `TacticCost` flattened."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.coasting import Batch, Draws, Floats
from planner.cost import StepCost
from planner.engine import Limits
from planner.overlap import compute_share, two_batch_s
from planner.scheduler import RankWork
from planner.tacticcost import EXCHANGE, TacticCost
from planner.timer import CostTimer, LoneRankTimer, at_log, log_row, step_timer, tabulated

_PHASES = ("prefill", "decode")


class TacticTimer(CostTimer):
    """`CostTimer` of a `TacticCost`. `decode_seqs` of a rank's work counts sequences, of several tokens each."""

    def __init__(self, cost: TacticCost, limits: Limits) -> None:
        super().__init__(cost, limits)
        rows = np.arange(limits.max_num_seqs + 1)
        arch = cost.cluster.system.gpu.arch
        padded = np.array([cost.engine.padded_batch(int(n), arch) if n else 0 for n in rows])
        self._draft = tabulated(cost.draft_table.terms, padded)
        self._dense = [plain + draft for plain, draft in zip(self._dense, self._draft, strict=True)]
        self.use_factors({phase: cost.draw_factors(phase) for phase in _PHASES} if cost.model.moe else None)
        self._hidden = _Hidden(cost, limits) if cost.tactics.overlap is not None else None

    def step_s(self, ranks: Sequence[RankWork]) -> float:
        """Seconds of one lockstep step of `ranks`, through all pipeline stages without waiting for other batches."""
        self.draw = self._next_draw()
        if len(ranks) == 1 and self._hidden is None:
            return self._lone_rank_s(ranks[0])
        each = self._each
        prefill = any(rank.prefill_tokens for rank in ranks)
        most_tokens = most_rows = most_seqs = total_tokens = num_idle = 0
        attention_s = 0.0
        for rank in ranks:
            seqs, prompt = rank.decode_seqs, rank.prefill_tokens
            rank_s = self._attention.step_s(seqs, rank.decode_context_tokens) if seqs else 0.0
            if prompt:
                rank_s += self._prefill_s(prompt, rank.num_prefills, rank.prefill_pairs)
            elif not seqs:
                num_idle += 1
            attention_s = max(attention_s, rank_s)
            most_tokens = max(most_tokens, seqs * each + prompt)
            most_rows = max(most_rows, seqs * each + rank.num_prefills)
            most_seqs = max(most_seqs, seqs + rank.num_prefills)
            total_tokens += seqs * each + prompt
        total_tokens += num_idle
        phase, pad = ("prefill", self._mixed_pad) if prefill else ("decode", self._pad)
        padded = min(pad[most_tokens], len(self._tokens) - 1)
        seconds = (
            self._host_s
            + attention_s
            + (self._prompt_tokens if prefill else self._tokens)[padded]
            + self._head[min(most_rows, len(self._head) - 1)]
            + self._draft[min(most_seqs, len(self._draft) - 1)]
            + self._moe_s(phase, total_tokens)
            + self._padded_exchange_s(phase, padded, total_tokens)
        )
        if self._hidden is None or not self._hidden.agreed(ranks, each):
            return seconds
        full, half = (-(-total_tokens // (self._stride * parts)) for parts in (1, 2))
        factors = [self._factor[phase][self._knot[index]][self.draw] for index in (full, half)]
        return seconds - self._hidden.seconds(phase, ranks, padded, (full, half), (factors[0], factors[1]))

    def coming(self, batches: Sequence[Batch], steps: int) -> tuple[Floats, Draws] | None:
        """None: what is overlapped differs from step to step, and drafts of several ranks are timed step by step."""
        return None

    def _lone_rank_s(self, rank: RankWork) -> float:
        """`step_s` of a group of one, without the bookkeeping over ranks."""
        prompt = rank.prefill_tokens
        if not prompt:
            return super()._lone_rank_s(rank)
        seqs, decoded = rank.decode_seqs, rank.decode_seqs * self._each
        seconds = self._host_s + self._draft[min(seqs + rank.num_prefills, len(self._draft) - 1)]
        if seqs:
            seconds += self._attention.step_s(seqs, rank.decode_context_tokens)
        tokens, rows = decoded + prompt, decoded + rank.num_prefills
        seconds += self._prefill_s(prompt, rank.num_prefills, rank.prefill_pairs)
        return (
            seconds
            + self._mixed_tokens[tokens]
            + self._head[min(rows, len(self._head) - 1)]
            + self._moe_s("prefill", tokens)
        )


class LoneTacticTimer(TacticTimer, LoneRankTimer):
    """`TacticTimer` of groups of one rank without pipeline."""

    step_s = LoneRankTimer.step_s
    coming = LoneRankTimer.coming


class _Hidden:
    """What overlap takes off a step: the layers with experts one after the other, less the same overlapped.

    All lists are seconds of all layers with experts, by tokens of one rank or, for experts and exchange, by tokens of
    all ranks over their number.
    """

    def __init__(self, cost: TacticCost, limits: Limits) -> None:
        part, overlap = cost.moe_part, cost.tactics.overlap
        assert overlap is not None
        self._overlap, self._layers = overlap, cost.model.num_moe_layers
        gpu = cost.cluster.system.gpu
        self._kept = {phase: compute_share(gpu, phase) for phase in _PHASES} if overlap.is_two_batch else {}
        tokens = np.arange(limits.max_batched_tokens + limits.max_num_seqs * cost.query_tokens + 1)
        tables = {"prefill": part.prompt_token_table.terms, "decode": part.token_table.terms}
        self._dense: dict[str, tuple[list[float], list[float]]] = {}
        """Before the exchange, and shared experts."""
        self._routed: dict[str, tuple[list[float], list[float], list[float]]] = {}
        for phase, own in tables.items():
            shared = tabulated({k: v for k, v in own.items() if k == "shared_experts"}, tokens)
            self._dense[phase] = tabulated({k: v for k, v in own.items() if k != "shared_experts"}, tokens), shared
            terms, grid = part.moe_table(phase).terms, tokens * cost.layout.attention_dp
            experts = tabulated({k: v for k, v in terms.items() if k not in EXCHANGE}, grid)
            dispatch, combine = (tabulated({name: terms[name]}, grid) for name in EXCHANGE)
            self._routed[phase] = (experts, dispatch, combine)
        self._attention = _Attention(part)

    def agreed(self, ranks: Sequence[RankWork], each: int) -> bool:
        """Every rank has as many tokens as the engine asks for, or is idle where that does not matter."""
        overlap = self._overlap
        for rank in ranks:
            tokens = rank.decode_seqs * each + rank.prefill_tokens
            least = overlap.prefill_tokens if rank.prefill_tokens else overlap.decode_tokens
            if tokens < least and (tokens or not overlap.idle_agrees):
                return False
        return True

    def seconds(
        self,
        phase: str,
        ranks: Sequence[RankWork],
        padded: int,
        spread: tuple[int, int],
        factors: tuple[float, float],
    ) -> float:
        """Seconds saved, negative where two half batches take longer than one.

        `spread` and `factors` are tokens of all ranks over their number, and the draw of the router there, of the
        whole step and of half of it.
        """
        experts, dispatch, combine = self._routed[phase]
        before, shared = self._dense[phase]
        whole, factor = spread[0], factors[0]
        if not self._overlap.is_two_batch:
            return min(dispatch[whole] * factor, shared[padded])
        before_s = before[padded] + max(self._attention.whole_s(rank) for rank in ranks)
        after_s = shared[padded] + experts[whole] * factor
        full_s = before_s + after_s + (dispatch[whole] + combine[whole]) * factor
        half, factor, padded = spread[1], factors[1], -(-padded // 2)
        before_s = before[padded] + max(self._attention.half_s(rank) for rank in ranks)
        after_s = shared[padded] + experts[half] * factor
        exchange_s = dispatch[half] * factor, combine[half] * factor
        layers = self._layers
        overlapped: float = two_batch_s(
            before_s / layers,
            exchange_s[0] / layers,
            after_s / layers,
            exchange_s[1] / layers,
            layers,
            self._kept[phase],
        )
        return full_s - overlapped


class _Attention:
    """Attention of the layers with experts, of a whole step or of half of it; prompts are cut in equal halves."""

    def __init__(self, part: StepCost) -> None:
        self._decode = np.sum(list(part.decode_table.terms.values()), axis=0)
        self._prefill = np.sum(list(part.prefill_table.terms.values()), axis=0)
        self._pair_s = part.pair_s
        self._decode_rows: dict[float, list[float]] = {}
        self._prefill_rows: dict[int, list[float]] = {}

    def whole_s(self, rank: RankWork) -> float:
        """Seconds of all of the rank's work."""
        return self._part_s(rank, 1.0)

    def half_s(self, rank: RankWork) -> float:
        """Seconds of half of the rank's work."""
        return self._part_s(rank, 0.5)

    def _part_s(self, rank: RankWork, share: float) -> float:
        seconds = 0.0
        if rank.decode_seqs:
            seqs = rank.decode_seqs * share
            row = self._decode_rows.get(seqs)
            if row is None:
                row = self._decode_rows[seqs] = log_row(self._decode, seqs)
            seconds = at_log(row, rank.decode_context_tokens / rank.decode_seqs)
        if rank.prefill_tokens:
            chunks = rank.num_prefills
            chunk_row = self._prefill_rows.get(chunks)
            if chunk_row is None:
                chunk_row = self._prefill_rows[chunks] = log_row(self._prefill, float(chunks))
            each = rank.prefill_tokens / chunks
            extra_pairs = rank.prefill_pairs - chunks * each * (each + 1) / 2
            seconds += share * (at_log(chunk_row, each) + max(0.0, extra_pairs) * self._pair_s)
        return seconds


def tactic_timer(cost: StepCost, limits: Limits) -> CostTimer:
    """The fastest timer that is exact for `cost`."""
    if not isinstance(cost, TacticCost):
        return step_timer(cost, limits)
    lone = cost.layout.attention_dp == 1 and cost.layout.pp == 1
    return (LoneTacticTimer if lone else TacticTimer)(cost, limits)
