"""Seconds of one engine step, per operation, with the origin of every term.

A step is the sum over layers of attention, router, dispatch, the busiest rank's experts, combine and the dense
parts (handbook serving 1.2). Each operation's time comes from `planner.measurements`; this module only counts
how often, over how many tokens, and what overlaps with what. Imbalance enters as the expected maximum over
ranks per layer, in expert GEMM and in received bytes, never as a multiplier of the step.

Everything is evaluated once per layout on fixed grids (`TOKENS`, `SEQS`, `LENGTHS`) and interpolated, so a step
inside the simulation costs a few list look-ups.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from planner import inventory
from planner.calibration import Calibration
from planner.capacity import BufferLimit, buffer_limit
from planner.engine import MAX_GRAPH, Engine, Graphs, padding
from planner.experts import AS_SERVED, ExpertSettings
from planner.hardware import Cluster
from planner.layout import Layout
from planner.loads import on_knots
from planner.measurements import Fabric, Origin, Surface, Tables, open_tables
from planner.memory import kv_shards
from planner.model import ModelConfig
from planner.model.config import Attention, Layer, Recurrent
from planner.model.precision import compute_format
from planner.offload import Offload
from planner.routedcost import RoutedCost
from planner.steptime import LENGTHS, SEQS, TOKENS, Fixed, Floats, Line, Part, Plane, StepTime, Sum

_PAIR_FIT_LENGTHS = (2048.0, 65536.0)
_MODULE_SHAPE = (7168, 1536, 192)
"""Hidden size, query rank and query-key width of the attention modules in the published tables (DeepSeek-V3)."""
_BF16_BYTES = 2.0
_NORM_PASSES = 8.0
"""Two fused add-and-normalise kernels per layer, each reading and writing input and residual."""
_SAMPLING_PASSES = 4.0
"""Softmax, top-k/top-p and draw read the fp32 logits about this often (handbook serving 6.7: bytes-bound)."""


class StepCost:
    """Step times of one layout of one model on one cluster.

    `backend` is how attention-DP ranks exchange tokens with experts: `allgather_reducescatter` or `deepep`.
    `experts` says how popular experts are, where they live, and what limits them; `offload` which of them lie
    outside HBM.

    A running sequence has `query_tokens` tokens in a step and advances by `tokens_per_step`; more than one where
    tokens are drafted (`planner.tacticcost`).
    """

    query_tokens: int = 1
    tokens_per_step: float = 1.0

    def __init__(
        self,
        model: ModelConfig,
        layout: Layout,
        cluster: Cluster,
        engine: Engine,
        backend: str = "allgather_reducescatter",
        experts: ExpertSettings = AS_SERVED,
        offload: Offload | None = None,
    ) -> None:
        self.model, self.layout, self.cluster, self.engine, self.backend = model, layout, cluster, engine, backend
        fabric = Fabric(cluster.oversubscription, cluster.rail_optimised)
        self.tables: Tables = open_tables(cluster.system, engine.kernels, fabric)
        self.experts, self.offload = experts, offload
        self._moe_tables: dict[str, Sum] = {}
        gpu = cluster.system.gpu
        # Runs with experts outside HBM agree with published rates on plain rooflines (tests/test_small.py).
        self.calibration = engine.calibration(gpu.arch, self.tables.is_measured or offload is not None)
        self._stream_bytes_per_s = gpu.hbm_bytes_per_s * gpu.hbm_efficiency
        self._kinds = [(k, n) for k, n in model.layer_kinds if k.stack == "decoder"]
        self._encoder_kinds = [(k, n) for k, n in model.layer_kinds if k.stack == "encoder"]

    @property
    def has_encoder(self) -> bool:
        """True for encoder-decoder models."""
        return bool(self._encoder_kinds)

    @property
    def host_s(self) -> float:
        """Host time of a step that the GPU does not hide (scheduling, input preparation, sampling, detokenising)."""
        return self.engine.overheads.host_s_per_step + self.calibration.step_s

    @cached_property
    def routed(self) -> RoutedCost:
        """Costs of the routed experts, shared by layouts that differ in the number of stages or replicas only."""
        stage = replace(self.layout, pp=1, replicas=1)
        fixed = (self.model, stage, self.cluster, self.tables, self.backend, self.experts)
        by_fp8 = self.cluster.system.gpu.arch in self.engine.mxfp4_by_fp8
        buffer = buffer_limit(self.engine) if self.engine.dispatch_buffer else None
        if self.offload is None:
            return _shared(*fixed, buffer, by_fp8, self.calibration)
        return RoutedCost(*fixed, self.offload, self._rest_s, buffer, by_fp8, self.calibration)

    def _rest_s(self, tokens: Floats, phase: str) -> Floats:
        """Seconds of an average layer without experts and attention kernels, by tokens of one rank."""
        table = self.prompt_token_table if phase == "prefill" else self.token_table
        return np.asarray(np.interp(tokens, TOKENS, table.total / self.model.num_layers))

    # --- tabulated on TOKENS ---

    @cached_property
    def token_table(self) -> Sum:
        """Terms that grow with the tokens of one rank: projections, dense FFN, router, norms, all-reduce, hops."""
        return self._own_tokens

    @cached_property
    def _own_tokens(self) -> Sum:
        return self._token_sum(self._kinds)

    @cached_property
    def prompt_token_table(self) -> Sum:
        """`token_table` of steps with prompts, which are launched kernel by kernel."""
        return self._prompt_sum(self._own_tokens.copy(), self._kinds)

    @cached_property
    def encoder_table(self) -> Sum:
        """`prompt_token_table` of encoder layers, paid by prompt tokens of encoder-decoder models only."""
        return self._prompt_sum(self._token_sum(self._encoder_kinds), self._encoder_kinds)

    def _prompt_sum(self, own: Sum, kinds: list[tuple[Layer, int]]) -> Sum:
        total = own.scaled(lambda _: self.calibration.prompts)
        if self.calibration.prompt_layer_s and kinds:
            launches_s = self.calibration.prompt_layer_s * sum(count for _, count in kinds)
            total.add("prompt_launches", np.full(TOKENS.shape, launches_s), Origin.EXTRAPOLATED)
        return total

    def _token_sum(self, kinds: list[tuple[Layer, int]]) -> Sum:
        total = Sum(TOKENS.shape)
        for layer, count in kinds:
            self._add_gemms(total, layer, count)
            stream = _NORM_PASSES * TOKENS * self.model.hidden * _BF16_BYTES / self._stream_bytes_per_s
            total.add("norms", stream * count, Origin.ROOFLINE)
            if self.layout.tp > 1:
                for rows in inventory.reduced_rows(layer, self.layout):
                    total.on_tokens("all_reduce", self.tables.all_reduce(self.layout.tp), count, rows * _BF16_BYTES)
        if self.layout.pp > 1 and kinds:
            total.add("pipeline_hops", self._hop_s(), Origin.ROOFLINE)
        if self.calibration.layer_s and kinds:
            layers = sum(count for _, count in kinds)
            total.add("small_kernels", np.full(TOKENS.shape, self.calibration.layer_s * layers), Origin.EXTRAPOLATED)
        return total.scaled(self.calibration.factor)

    def _add_gemms(self, total: Sum, layer: Layer, count: int) -> None:
        module = any(self._is_module(m) for m in layer.mixers if isinstance(m, Attention))
        for gemm in inventory.layer_gemms(self.model, layer, self.layout):
            if module and gemm.label == "attention_projections":
                continue
            curve = self.tables.gemm(compute_format(gemm.fmt), gemm.rows, gemm.cols)
            total.on_tokens(gemm.label, curve, gemm.count * count)

    def _hop_s(self) -> Floats:
        """Point-to-point transfers of the residual stream between pipeline stages."""
        inside = self.layout.replica_gpus <= self.cluster.scale_up_gpus
        system = self.cluster.system
        link = system.scale_up if inside or system.scale_out is None else system.scale_out
        bytes_ = TOKENS * self.model.hidden * _BF16_BYTES
        return (self.layout.pp - 1) * ((link.latency_s or 0.0) + bytes_ / link.bytes_per_s)

    def moe_table(self, phase: str) -> Sum:
        """Terms that grow with the tokens of the whole expert-parallel group: experts, dispatch, combine."""
        if phase not in self._moe_tables:
            self._moe_tables[phase] = self.routed.table(phase, self._kinds)
        return self._moe_tables[phase]

    @cached_property
    def encoder_moe_table(self) -> Sum:
        """`moe_table` of encoder layers."""
        return self.routed.table("prefill", self._encoder_kinds)

    def draw_factors(self, phase: str) -> Floats:
        """Seconds of `moe_table` in each cached draw over their mean, [KNOTS, draws] of `planner.loads`."""
        assert self.model.moe is not None
        knots = self.routed.question(self.experts.router(self.model.moe), phase).knots
        seconds = self.routed.drawn_seconds(phase, self._kinds)
        return on_knots(seconds / np.maximum(seconds.mean(axis=1, keepdims=True), 1e-300), knots)

    @cached_property
    def head_table(self) -> Sum:
        """lm_head, sampling and host time per sequence, on TOKENS counting only the rows that need logits."""
        total = self._logits_sum()
        if self.calibration.sequence_s:
            total.add("host", TOKENS / self.query_tokens * self.calibration.sequence_s, Origin.EXTRAPOLATED)
        return total

    def _logits_sum(self) -> Sum:
        total = Sum(TOKENS.shape)
        gemm = inventory.head_gemm(self.model, self.layout)
        total.on_tokens("lm_head", self.tables.gemm(compute_format(gemm.fmt), gemm.rows, gemm.cols))
        stream = _SAMPLING_PASSES * TOKENS * self.model.vocab * 4.0 / self._stream_bytes_per_s
        total.add("sampling", stream, Origin.ROOFLINE)
        return total.scaled(self.calibration.factor)

    # --- tabulated on SEQS x LENGTHS -----------------------------------------------------------------------

    @cached_property
    def decode_table(self) -> Sum:
        """Attention and recurrence of one decode step: [SEQS, LENGTHS = context per sequence]."""
        return self._mixer_sum("decode")

    @cached_property
    def prefill_table(self) -> Sum:
        """Attention and recurrence of whole prompts: [SEQS, LENGTHS = tokens per sequence]."""
        return self._mixer_sum("prefill")

    def _mixer_sum(self, phase: str) -> Sum:
        total = Sum((len(SEQS), len(LENGTHS)))
        kinds = self._encoder_kinds if phase == "prefill" and self._encoder_kinds else self._kinds
        for layer, count in kinds:
            for mixer in layer.mixers:
                if isinstance(mixer, Attention):
                    label = "attention_module" if self._is_module(mixer) else "attention"
                    least = Origin.MEASURED if self._is_known_mla(mixer) else Origin.EXTRAPOLATED
                    total.on_plane(label, self._attention(mixer, phase), count, mixer.compress_ratio, least)
                else:
                    self._add_recurrent(total, mixer, phase, count)
        prompts = self.calibration.prompts if phase == "prefill" else 1.0
        return total.scaled(lambda label: self.calibration.factor(label) * prompts)

    def _attention(self, mixer: Attention, phase: str) -> Surface:
        heads = max(1, mixer.num_heads // self.layout.tp)
        kv_format = "fp8" if self.model.kv_format.startswith("fp8") else "bf16"
        if mixer.kind == "mla":
            gemm_format = compute_format(self.model.format_of("attention"))
            tables, prefill = self._mla_tables(mixer), phase == "prefill"
            if mixer.index_topk:
                lookup = tables.sparse_mla_prefill if prefill else tables.sparse_mla_decode
                sparse = lookup(heads, kv_format, gemm_format)
                if sparse is not None:
                    return sparse
            return (tables.mla_prefill if prefill else tables.mla_decode)(heads, kv_format, gemm_format)
        kv_heads = max(1, mixer.num_kv_heads // kv_shards(mixer, self.layout.tp))
        kernel = self.tables.prefill_attention if phase == "prefill" else self.tables.decode_attention
        return kernel(heads, kv_heads, mixer.qk_head_dim, kv_format, mixer.window)

    def _is_known_mla(self, mixer: Attention) -> bool:
        """True unless `mixer` is MLA of another shape than DeepSeek-V3's, on which the published modules were timed."""
        return mixer.kind != "mla" or (self.model.hidden, mixer.q_lora_rank, mixer.qk_head_dim) == _MODULE_SHAPE

    def _mla_tables(self, mixer: Attention) -> Tables:
        """The engine's tables, or SGLang's bare kernels where the engine's module is of another model.

        The kernel depends on heads and latent only; the projections are then the model's own GEMMs.
        """
        if self._is_known_mla(mixer) or mixer.index_topk:
            return self.tables
        fabric = Fabric(self.cluster.oversubscription, self.cluster.rail_optimised)
        return open_tables(self.cluster.system, "sglang", fabric)

    def _is_module(self, mixer: Attention) -> bool:
        return mixer.kind == "mla" and self._attention(mixer, "decode").includes_projections

    def _add_recurrent(self, total: Sum, mixer: Recurrent, phase: str, count: int) -> None:
        """Measured recurrence if there is one, else state traffic against the recurrence's own FLOP."""
        tp, x, y = self.layout.tp, SEQS[:, None], LENGTHS[None, :]
        if mixer.kind == "gated_delta":
            heads = (max(1, mixer.num_k_heads // tp), max(1, mixer.num_v_heads // tp))
            surface = self.tables.linear_attention(
                "prefill" if phase == "prefill" else "decode", *heads, mixer.k_head_dim, mixer.v_head_dim
            )
            if surface is not None:
                total.on_plane("recurrence", surface, count)
                return
        tokens = x * y if phase == "prefill" else x * np.ones_like(y)
        state_s = 2.0 * x * mixer.state_values * 4.0 / tp / self._stream_bytes_per_s
        ceiling, _ = self.cluster.system.gpu.matmul_ceiling_flop_per_s("bf16")
        flop_s = 6.0 * tokens * mixer.state_values / tp / ceiling
        total.add("recurrence", np.maximum(state_s, flop_s) * count, Origin.ROOFLINE)

    @cached_property
    def pair_s(self) -> float:
        """Seconds per extra query-key pair over all layers: the quadratic part of `prefill_table` at long lengths.

        A chunk of q tokens after p cached ones costs its own causal prefill plus q x p pairs. The part is found by
        least squares of relative error on 1, L and L^2; a causal prompt of L tokens has L^2 / 2 pairs.
        """
        table = self.prefill_table.total[0]
        first, last = np.searchsorted(LENGTHS, _PAIR_FIT_LENGTHS)
        lengths, seconds = LENGTHS[first:last], table[first:last]
        basis = np.stack([np.ones_like(lengths), lengths, lengths**2], axis=1) / seconds[:, None]
        quadratic = np.linalg.lstsq(basis, np.ones_like(lengths), rcond=None)[0][2]
        return max(0.0, 2.0 * float(quadratic))

    # --- whole steps ---------------------------------------------------------------------------------------

    def decode(self, seqs: Floats, context: Floats) -> StepTime:
        """Pure decode steps: `seqs` sequences on every attention-DP rank with `context` tokens each."""
        return self._step(self._decode_parts(seqs, context), np.broadcast_shapes(np.shape(seqs), np.shape(context)))

    def _decode_parts(self, seqs: Floats, context: Floats) -> list[Part]:
        seqs, context = np.broadcast_arrays(np.asarray(seqs, float), np.asarray(context, float))
        tokens = seqs * self.query_tokens
        return [
            Line(self.token_table, self._padded(tokens)),
            Line(self.moe_table("decode"), tokens * self.layout.attention_dp),
            Line(self.head_table, tokens),
            Plane(self.decode_table, seqs, context),
        ]

    def _padded(self, tokens: Floats) -> Floats:
        """Tokens of decode steps after padding to the next captured graph."""
        whole = tokens.astype(np.int64)
        padded = _padding(self.engine.graphs, self.cluster.system.gpu.arch)
        return np.where(whole <= MAX_GRAPH, padded[np.minimum(whole, MAX_GRAPH)], whole).astype(float)

    def prefill(self, tokens: Floats, past: Floats | float = 0.0, ranks: Floats | float | None = None) -> StepTime:
        """Steps that prefill a chunk of `tokens` after `past` cached ones on `ranks` attention-DP ranks (all)."""
        return self._step(self._prefill_parts(tokens, past, ranks), np.shape(tokens))

    def _prefill_parts(self, tokens: Floats, past: Floats | float, ranks: Floats | float | None) -> list[Part]:
        tokens = np.asarray(tokens, float)
        dp, one = self.layout.attention_dp if ranks is None else ranks, np.ones_like(tokens)
        encoder = bool(self._encoder_kinds)
        parts: list[Part] = [
            Line(self.encoder_table if encoder else self.prompt_token_table, tokens),
            Line(self.encoder_moe_table if encoder else self.moe_table("prefill"), tokens * dp),
            Line(self.head_table, one),
            Plane(self.prefill_table, one, tokens),
        ]
        pairs_s = self.pair_s * tokens * past
        return [*parts, Fixed("attention", pairs_s, Origin.EXTRAPOLATED)]

    def _step(self, parts: list[Part], shape: tuple[int, ...]) -> StepTime:
        """`parts` and the host time of steps, arrays of `shape`."""
        return StepTime([*parts, Fixed("host", np.full(shape, self.host_s), Origin.EXTRAPOLATED)])

    def mixed(self, tokens: Floats, past: Floats, ranks: Floats, seqs: Floats, context: Floats) -> StepTime:
        """Steps in which `ranks` ranks prefill a chunk of `tokens` while all ranks decode `seqs` sequences."""
        if self.has_encoder:
            parts = [*self._decode_parts(seqs, context), *self._prefill_parts(tokens, past, ranks)]
            return self._step(parts, np.shape(tokens))
        one, pairs_s = np.ones_like(tokens), self.pair_s * tokens * past
        decoded = seqs * self.query_tokens
        return self._step(
            [
                Line(self.prompt_token_table, tokens + decoded),
                Line(self.moe_table("prefill"), tokens * ranks + decoded * self.layout.attention_dp),
                Line(self.head_table, decoded + 1),
                Plane(self.prefill_table, one, tokens),
                Plane(self.decode_table, seqs, context),
                Fixed("attention", pairs_s, Origin.EXTRAPOLATED),
            ],
            np.shape(tokens),
        )


@lru_cache(maxsize=128)
def _shared(
    model: ModelConfig,
    stage: Layout,
    cluster: Cluster,
    tables: Tables,
    backend: str,
    experts: ExpertSettings,
    buffer: BufferLimit | None,
    by_fp8: bool,
    calibration: Calibration,
) -> RoutedCost:
    return RoutedCost(model, stage, cluster, tables, backend, experts, None, None, buffer, by_fp8, calibration)


@lru_cache(maxsize=16)
def _padding(graphs: Graphs, arch: str) -> NDArray[np.int64]:
    """Batch after padding to the next graph, for 0 to MAX_GRAPH sequences."""
    return np.array(padding(graphs.sizes(MAX_GRAPH, arch), MAX_GRAPH), dtype=np.int64)
