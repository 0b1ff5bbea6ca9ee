"""`StepCost` of engines that draft tokens or overlap the exchange.

A step that verifies b sequences of q = n + 1 tokens sends b q tokens through projections, router, exchange, experts and
head; attention reads each cache once for its q query rows (handbook serving 2.8). The drafter then runs n times: first
over the tokens of the step, as it must write their cache too (vLLM `v1/spec_decode`, SGLang's draft extend), later over
one token per sequence; every run ends in an lm_head (handbook serving 6.7).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner import inventory
from planner.cost import StepCost
from planner.engine import Engine
from planner.experts import AS_SERVED, ExpertSettings
from planner.hardware import Cluster
from planner.layout import Layout
from planner.measurements import Origin
from planner.memory import kv_shards
from planner.model import ModelConfig
from planner.model.config import Attention, Layer, Recurrent
from planner.model.precision import compute_format, kv_bytes_per_layer
from planner.offload import Offload
from planner.overlap import compute_share, two_batch_s
from planner.steptime import LENGTHS, SEQS, TOKENS, Fixed, Floats, Known, Line, Part, Plane, StepTime, Sum
from planner.tactics import PLAIN, Tactics

EXCHANGE = ("dispatch", "combine")
EXPERTS = ("experts", "shared_experts")
STAGES = ("attention", "dispatch", "experts", "combine")
_DRAFT, _DRAFT_HEAD = "draft", "draft_lm_head"
Flags = NDArray[np.bool_]


def step_cost(
    model: ModelConfig,
    layout: Layout,
    cluster: Cluster,
    engine: Engine,
    backend: str,
    experts: ExpertSettings = AS_SERVED,
    offload: Offload | None = None,
    tactics: Tactics = PLAIN,
) -> StepCost:
    """Step times with `tactics`; the plain ones without."""
    if tactics == PLAIN:
        return StepCost(model, layout, cluster, engine, backend, experts, offload)
    return TacticCost(model, layout, cluster, engine, backend, experts, offload, tactics)


class TacticCost(StepCost):
    """Step times under `tactics`; the tables of `StepCost` include the drafter's first run."""

    def __init__(
        self,
        model: ModelConfig,
        layout: Layout,
        cluster: Cluster,
        engine: Engine,
        backend: str,
        experts: ExpertSettings,
        offload: Offload | None,
        tactics: Tactics,
    ) -> None:
        super().__init__(model, layout, cluster, engine, backend, experts, offload)
        self.tactics = tactics
        self.query_tokens, self.tokens_per_step = tactics.query_tokens, tactics.tokens_per_step
        self._drafted: dict[str, Sum] = {}
        self.first, self.later = self._drafters()

    def _drafters(self) -> tuple[StepCost | None, StepCost | None]:
        """The drafter over the tokens of a step, and over one token per sequence; None where nothing is computed."""
        speculation = self.tactics.speculation
        if speculation is None or speculation.draft is None:
            return None, None
        layout = speculation.draft_layout(self.layout)
        experts = self.experts if speculation.method == "mtp" else AS_SERVED
        fixed = (speculation.draft, layout, self.cluster, self.engine, self.backend, experts, None)
        return TacticCost(*fixed, Tactics(replace(speculation, draft=None))), StepCost(*fixed)

    @cached_property
    def moe_part(self) -> StepCost:
        """The layers with experts alone, without drafts: what two half batches take turns in."""
        layers = tuple(layer for layer, count in self._kinds if layer.moe for _ in range(count))
        model, layout = replace(self.model, layers=layers), replace(self.layout, pp=1)
        speculation = self.tactics.speculation
        bare = Tactics(replace(speculation, draft=None)) if speculation else PLAIN
        return step_cost(model, layout, self.cluster, self.engine, self.backend, self.experts, self.offload, bare)

    # --- tables: those of the model, and the drafter's first run over the same tokens ---

    @cached_property
    def token_table(self) -> Sum:
        """Terms that grow with the tokens of one rank."""
        return _with_draft(self._own_tokens, self.first.token_table if self.first else None)

    @cached_property
    def prompt_token_table(self) -> Sum:
        """`token_table` of steps with prompts."""
        own = self._prompt_sum(self._own_tokens.copy(), self._kinds)
        return _with_draft(own, self.first.prompt_token_table if self.first else None)

    def moe_table(self, phase: str) -> Sum:
        """Terms that grow with the tokens of the whole expert-parallel group."""
        if phase not in self._drafted:
            own = super().moe_table(phase)
            self._drafted[phase] = _with_draft(own, self.first.moe_table(phase) if self.first else None)
        return self._drafted[phase]

    @cached_property
    def prefill_table(self) -> Sum:
        """Attention and recurrence of whole prompts."""
        return _with_draft(self._mixer_sum("prefill"), self.first.prefill_table if self.first else None)

    @cached_property
    def decode_table(self) -> Sum:
        """Attention and recurrence of one verifying step, and of all runs of the drafter."""
        if self.query_tokens == 1:
            return self._mixer_sum("decode")
        total = self._verify_sum()
        if self.first is not None and self.later is not None:
            total = _with_draft(total, self.first.decode_table)
            total = _with_draft(total, self.later.decode_table, self.query_tokens - 2)
        return total

    @cached_property
    def draft_table(self) -> Sum:
        """What depends on the sequences of a rank, on TOKENS: lm_head of every run, and all of the later runs."""
        total = Sum(TOKENS.shape)
        if self.later is None:
            return total
        runs = self.query_tokens - 1
        total = _with_draft(total, self.later._logits_sum(), runs, _DRAFT_HEAD)
        if runs > 1:
            total = _with_draft(total, self.later.token_table, runs - 1)
            everywhere = Sum.of(Line(self.later.moe_table("decode"), TOKENS * self.layout.attention_dp))
            total = _with_draft(total, everywhere, runs - 1)
        return total

    # --- attention of several query rows ---

    def _verify_sum(self) -> Sum:
        x, y = SEQS[:, None], LENGTHS[None, :]
        total = Sum((len(SEQS), len(LENGTHS)))
        for layer, count in self._kinds:
            for mixer in layer.mixers:
                if isinstance(mixer, Recurrent):
                    self._add_verified_recurrence(total, mixer, count)
                    continue
                label = "attention_module" if self._is_module(mixer) else "attention"
                context = y / mixer.compress_ratio
                seconds = self._verify_s(layer, mixer, x, context)
                # Timed with one query row: what several cost is computed.
                origin = np.maximum(self._attention(mixer, "decode").origin(x, context), np.int8(Origin.EXTRAPOLATED))
                total.add(label, seconds * count, origin)
        return total.scaled(self.calibration.factor)

    def _verify_s(self, layer: Layer, mixer: Attention, x: Floats, context: Floats) -> Floats:
        """Attention of `x` sequences of `context` tokens with q query rows each.

        The kernel reads the cache once, so its measured time grows only by as much as the roofline does when its FLOP
        are multiplied by q: not at all for grouped queries, up to q times for absorbed MLA, which is near the ridge
        with one row already. Projections inside a measured module see q times the tokens. No kernel is slower than
        treating the rows as sequences of their own. With sparse attention every row reads its own selection.
        """
        surface, q = self._attention(mixer, "decode"), self.query_tokens
        apart = surface.seconds(x * q, context)
        if mixer.index_topk:
            return apart
        once, many = (self._projections_s(layer, mixer, rows) for rows in (x, x * q))
        kernel = np.maximum(surface.seconds(x, context) - once, 0.0)
        return np.minimum(apart, kernel * self._row_growth(mixer) + many)

    def _projections_s(self, layer: Layer, mixer: Attention, tokens: Floats) -> Floats:
        total = np.zeros_like(tokens)
        if self._is_module(mixer):
            for gemm in inventory.layer_gemms(self.model, layer, self.layout):
                if gemm.label == "attention_projections":
                    curve = self.tables.gemm(compute_format(gemm.fmt), gemm.rows, gemm.cols)
                    total = total + curve.seconds(tokens) * gemm.count
        return total

    def _row_growth(self, mixer: Attention) -> float:
        """How much longer the kernel takes for q query rows than for one, by its roofline."""
        gpu, tp = self.cluster.system.gpu, self.layout.tp
        cached = kv_bytes_per_layer(mixer, self.model.kv_format) / kv_shards(mixer, tp)
        read_s = cached / (gpu.hbm_bytes_per_s * gpu.hbm_efficiency)
        width = mixer.qk_head_dim + mixer.v_head_dim
        if mixer.kind == "mla" and mixer.kv_lora_rank is not None:
            width = 2 * mixer.kv_lora_rank + (mixer.qk_rope_head_dim or 0)  # absorbed: queries in the latent space
        ceiling, _ = gpu.matmul_ceiling_flop_per_s("bf16")
        flop_s = 2.0 * mixer.num_heads / tp * width / ceiling
        return max(read_s, self.query_tokens * flop_s) / max(read_s, flop_s)

    def _add_verified_recurrence(self, total: Sum, mixer: Recurrent, count: int) -> None:
        """A state per token, so that a rejected one can be undone: as much as sequences of their own."""
        one = Sum((len(SEQS), len(LENGTHS)))
        self._add_recurrent(one, mixer, "decode", count)
        rows, lengths = np.broadcast_arrays(SEQS[:, None] * self.query_tokens, LENGTHS[None, :])
        total.add_sum(Sum.of(Plane(one, rows, lengths)))

    # --- whole steps ---

    def decode(self, seqs: Floats, context: Floats) -> StepTime:
        """Pure decode steps of `seqs` sequences on every rank with `context` tokens each, drafting included."""
        seqs, context = np.broadcast_arrays(np.asarray(seqs, float), np.asarray(context, float))
        whole = self._drafting(super().decode(seqs, context), seqs)
        overlap = self.tactics.overlap
        if overlap is None:
            return whole
        part, dp, q = self.moe_part, self.layout.attention_dp, self.query_tokens
        padded = self._padded(seqs * q)

        def layers(share: float) -> StepTime:
            return StepTime(
                [
                    Line(part.token_table, padded * share),
                    Line(part.moe_table("decode"), seqs * q * dp * share),
                    Plane(part.decode_table, seqs * share, context),
                ]
            )

        return self._overlapped(whole, layers, "decode", (seqs * q >= overlap.decode_tokens) & (seqs > 1))

    def prefill(self, tokens: Floats, past: Floats | float = 0.0, ranks: Floats | float | None = None) -> StepTime:
        """Steps that prefill a chunk of `tokens` after `past` cached ones on `ranks` attention-DP ranks (all)."""
        tokens = np.asarray(tokens, float)
        whole = self._drafting(super().prefill(tokens, past, ranks), np.ones_like(tokens))
        overlap, dp = self.tactics.overlap, self.layout.attention_dp if ranks is None else ranks
        if overlap is None:
            return whole
        # Where idle ranks must agree too, they do not: they have a token at most.
        agreed = (tokens >= overlap.prefill_tokens) & self._all_prefill(dp)
        none = np.zeros_like(tokens)
        layers = self._chunk_layers(tokens, np.asarray(past, float), np.asarray(dp, float), none, none)
        return self._overlapped(whole, layers, "prefill", agreed)

    def mixed(self, tokens: Floats, past: Floats, ranks: Floats, seqs: Floats, context: Floats) -> StepTime:
        """Steps in which `ranks` ranks prefill a chunk of `tokens` while all ranks decode `seqs` sequences."""
        whole = self._drafting(super().mixed(tokens, past, ranks, seqs, context), seqs + 1)
        overlap, decoded = self.tactics.overlap, seqs * self.query_tokens
        if overlap is None:
            return whole
        agreed = (tokens + decoded >= overlap.prefill_tokens) & (decoded >= overlap.decode_tokens)
        layers = self._chunk_layers(tokens, past, ranks, seqs, context)
        return self._overlapped(whole, layers, "prefill", agreed)

    def _all_prefill(self, ranks: Floats | float) -> Flags:
        """Whether no rank is idle, or idle ranks do not matter."""
        overlap = self.tactics.overlap
        assert overlap is not None
        return np.asarray(np.asarray(ranks) >= self.layout.attention_dp - 1e-9) | overlap.idle_agrees

    def _chunk_layers(self, tokens: Floats, past: Floats, ranks: Floats, seqs: Floats, context: Floats) -> Any:
        """Layers with experts of a step with prompts, by the share of its tokens; prompts are cut in equal halves."""
        part, decoded = self.moe_part, seqs * self.query_tokens

        def layers(share: float) -> StepTime:
            everywhere = tokens * ranks + decoded * self.layout.attention_dp
            parts: list[Part] = [
                Line(part.prompt_token_table, (tokens + decoded) * share),
                Line(part.moe_table("prefill"), everywhere * share),
                Plane(part.prefill_table, np.ones_like(tokens), tokens, share),
                Fixed("attention", part.pair_s * tokens * past * share, Origin.EXTRAPOLATED),
            ]
            if np.any(seqs > 0):
                parts.append(Plane(part.decode_table, seqs * share, context))
            return StepTime(parts)

        return layers

    def _drafting(self, step: StepTime, seqs: Floats) -> StepTime:
        """`step` and `draft_table` for `seqs` sequences, padded to a captured graph."""
        if not self.draft_table.terms:
            return step
        return StepTime([*step.parts, Line(self.draft_table, self._padded(seqs))])

    def _overlapped(self, whole: StepTime, layers: Any, phase: str, where: Flags) -> StepTime:
        """`whole` with its layers with experts overlapped, at points where the engine does so.

        Terms stay what they are, except that dispatch and combine count only as far as nothing hides them.
        """
        overlap, full = self.tactics.overlap, layers(1.0)
        assert overlap is not None
        if overlap.is_two_batch:
            half = layers(0.5)
            parts = stage_seconds(half.terms)
            count, kept = self.model.num_moe_layers, compute_share(self.cluster.system.gpu, phase)
            before, dispatch, after, combine = (parts[name] / count for name in STAGES)
            seconds = two_batch_s(before, dispatch, after, combine, count, kept, np.maximum)
            terms = {label: 2.0 * value for label, value in half.terms.items()}
            total, exchange = np.asarray(sum(terms.values())), sum(terms[label] for label in EXCHANGE)
            exposed = np.clip(1.0 - (total - seconds) / np.maximum(exchange, 1e-15), 0.0, 1.0)
            terms |= {label: terms[label] * exposed for label in EXCHANGE}
            apart, times = half, 2.0
        else:
            terms, total = dict(full.terms), full.total_s
            hidden = np.minimum(terms["dispatch"], terms.get("shared_experts", 0.0))
            terms["dispatch"] = terms["dispatch"] - hidden
            seconds, apart, times = total - hidden, full, 1.0

        def origin() -> dict[str, Floats]:
            overlapped = {k: times * v * seconds / total for k, v in apart.origin.items()}
            return {k: np.where(where, overlapped[k] - v, 0.0) for k, v in full.origin.items()}

        saved = {k: np.where(where, terms.get(k, 0.0) - v, 0.0) for k, v in full.terms.items()}
        return StepTime([*whole.parts, Known(saved, origin)])


def stage_seconds(terms: Any) -> dict[str, Any]:
    """Seconds of `terms` by stage of the overlap: attention (all before dispatch), dispatch, experts, combine."""
    found: dict[str, Any] = dict.fromkeys(STAGES, 0.0)
    for label, seconds in terms.items():
        stage = label if label in EXCHANGE else "experts" if label in EXPERTS else "attention"
        found[stage] = found[stage] + seconds
    return found


def _with_draft(own: Sum, draft: Sum | None, count: int = 1, label: str = _DRAFT) -> Sum:
    """`own` with `count` times `draft` as one term."""
    if draft is None or not count:
        return own
    total = own.copy()
    total.add_sum(draft, count, label)
    return total
