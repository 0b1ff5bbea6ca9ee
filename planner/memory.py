"""Memory of one GPU, term by term, under the engine's own rule; what fits and which term breaks it.

Handbook serving 5.1-5.4. Every rank of a layout is alike except for pipeline stages, so the ledger is that of
the stage with the least room for KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from planner.engine import Engine, Limits
from planner.hardware import System
from planner.layout import Layout
from planner.model import ModelConfig
from planner.model.config import Attention, Layer, Recurrent, Weight
from planner.model.precision import kv_bytes_per_layer, stored_bytes
from planner.tactics import PLAIN, Tactics

TERMS = (
    "experts",
    "attention",
    "dense",
    "embeddings",
    "draft",
    "activations",
    "cuda_graphs",
    "communication_buffers",
    "context",
    "kv_cache",
    "draft_kv_cache",
    "reserve",
)
"""Order in which memory is claimed; the first term that overflows the device is the breaking term.

`draft` and `draft_kv_cache`, the drafter's weights and cache, are there with speculative decoding only.
"""
_BEFORE_CACHE = TERMS[: TERMS.index("kv_cache")]
_CACHES = ("kv_cache", "draft_kv_cache", "reserve")

_TERM_OF_PART = {
    "expert": "experts",
    "attention": "attention",
    "router": "dense",
    "shared_expert": "dense",
    "dense_ffn": "dense",
    "norm": "dense",
    "embedding": "embeddings",
    "lm_head": "embeddings",
}
WEIGHT_TERMS = ("experts", "attention", "dense", "embeddings")
_STATE_BYTES = 4.0  # recurrent state is kept in fp32 (handbook models 5)
_CONV_BYTES = 2.0
_ACTIVATION_COPIES = {1: 10, 2: 6, 4: 5, 8: 5}  # AIConfigurator sdk/memory.py prior, by TP
_SAMPLER_BYTES = 20.0  # per logit: fp32 logits, sorted copy and probabilities, int64 sort indices (top-p sampling)
_SGLANG_FLOOR_BYTES = 10 * 2**30  # SGLang keeps at least 10 GiB back on devices above 60 GiB


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Ledger of one GPU. `terms` sums to `capacity_bytes` when the layout fits.

    `budget_bytes` is what the engine's memory rule lets weights, KV cache and the other claims take together.

    `kv_tokens` is the number of cached tokens of one scheduler rank (an attention-DP rank over its TP GPUs and
    all pipeline stages), `kv_bytes_per_token` the mean bytes per cached token on the tightest GPU.
    """

    terms: Mapping[str, float]
    capacity_bytes: float
    budget_bytes: float
    kv_tokens: int
    kv_bytes_per_token: float
    breaking_term: str | None

    @property
    def fits(self) -> bool:
        """True when everything but KV fits and at least one token can be cached."""
        return self.breaking_term is None

    @property
    def needed_bytes(self) -> float:
        """Everything but KV cache and reserve."""
        return sum(value for term, value in self.terms.items() if term not in _CACHES)

    @property
    def weight_bytes(self) -> float:
        """Weights on this GPU."""
        return sum(self.terms[term] for term in WEIGHT_TERMS)


def _cached_tokens(pool_bytes: float, bytes_per_token: float) -> float:
    """Tokens that a pool holds; any number where tokens leave nothing behind."""
    if bytes_per_token > 0:
        return pool_bytes / max(bytes_per_token, 1e-9)
    return 1e12 if pool_bytes > 0 else 0.0


def low_latency_buffer_bytes(max_tokens: int, hidden: int, num_experts: int) -> int:
    """DeepEP low-latency buffer of one rank [bytes] (deepseek-ai/DeepEP csrc/legacy/config.hpp, handbook 5.2).

    >>> round(low_latency_buffer_bytes(128, 7168, 256) / 2**30, 4)
    1.7773
    """
    scales = 4 * hidden // 128
    dispatch = 16 + max(2 * hidden, hidden + scales)
    combine = scales + 2 * hidden
    send = max(max_tokens * dispatch, num_experts * max_tokens * combine)
    receive = max(num_experts * max_tokens * dispatch, num_experts * max_tokens * combine)
    signal = -(-4 * num_experts // 128) * 128
    return -(-(2 * send + 2 * receive + 2 * signal) // 128) * 128


class Ledger:
    """Memory of one model on one system under one engine, for any layout and limits.

    With drafts among the `tactics` the drafter lies on the last pipeline stage, beside the head.
    """

    def __init__(self, model: ModelConfig, system: System, engine: Engine, tactics: Tactics = PLAIN) -> None:
        self.model, self.system, self.engine, self.tactics = model, system, engine, tactics
        self._weights = lru_cache(maxsize=None)(self._stage_weights)
        self._num_graphs = lru_cache(maxsize=None)(engine.num_graphs)
        self._draft = lru_cache(maxsize=None)(self._draft_bytes)

    def use(
        self, layout: Layout, limits: Limits, backend: str, context_tokens: int, resident_share: float = 1.0
    ) -> MemoryUse:
        """Ledger of `layout`; KV capacity is stated for sequences of `context_tokens` tokens.

        `resident_share` of the routed experts are in HBM, the others elsewhere.
        """
        stage_layout = layout if layout.replicas == 1 else replace(layout, replicas=1)
        weights, per_token = self._weights(stage_layout, context_tokens)
        if resident_share != 1.0:
            experts = WEIGHT_TERMS.index("experts")
            weights = [[*row[:experts], row[experts] * resident_share, *row[experts + 1 :]] for row in weights]
        fixed = self._fixed(layout, limits, backend)
        budget = self._budget(layout, limits, backend)
        claimed = sum(value for term, value in fixed.items() if term in self._claims)
        free = [budget - sum(row) - claimed for row in weights]
        draft = draft_per_token = 0.0
        if self.tactics.speculation is not None:
            draft, draft_per_token = self._draft(stage_layout, context_tokens)
            free[-1] -= draft
            per_token = [*per_token[:-1], per_token[-1] + draft_per_token]
        fraction = self.engine.kv_fraction if self.engine.kv_fraction_of == "free" else 1.0
        pools = [size * fraction for size in free]
        tokens = [_cached_tokens(pool, each) for pool, each in zip(pools, per_token, strict=True)]
        stage = min(range(layout.pp), key=lambda i: free[i] if free[i] < 0 else tokens[i])
        terms = dict(zip(WEIGHT_TERMS, weights[stage], strict=True)) | fixed
        if draft:
            last = stage == layout.pp - 1
            terms |= {"draft": draft * last, "draft_kv_cache": draft_per_token / per_token[stage] * last}
        room = (budget, pools[stage], int(max(0.0, min(tokens))), per_token[stage])
        return self._verdict(terms, *room)

    def _verdict(self, terms: dict[str, float], budget: float, pool: float, tokens: int, per_token: float) -> MemoryUse:
        capacity = self.system.gpu.hbm_bytes
        terms["kv_cache"] = max(0.0, pool)
        if "draft_kv_cache" in terms:
            terms["draft_kv_cache"] *= terms["kv_cache"]
            terms["kv_cache"] -= terms["draft_kv_cache"]
        spent, breaking = 0.0, None
        for term in _BEFORE_CACHE:
            spent += terms.get(term, 0.0) if term in self._claims else 0.0
            if spent > budget and breaking is None:
                breaking = term
        if breaking is None and tokens < self.engine.block_tokens:
            breaking = "kv_cache"
        terms["reserve"] = max(0.0, capacity - sum(terms.values()))
        ordered = {term: terms[term] for term in TERMS if term in terms}
        return MemoryUse(ordered, capacity, budget, 0 if breaking else tokens, per_token, breaking)

    def _budget(self, layout: Layout, limits: Limits, backend: str) -> float:
        """Bytes the engine lets weights, KV and what it counts beside them take of one GPU."""
        capacity = self.system.gpu.hbm_bytes
        if self.engine.kv_fraction_of == "total":
            return capacity * self.engine.kv_fraction
        if self.engine.static_fraction is not None:
            return capacity * self.engine.static_fraction
        return capacity - (self._static_reserve(layout, limits, backend) if self._is_static else 0.0)

    @property
    def _is_static(self) -> bool:
        return self.engine.kv_fraction_of == "static"

    @cached_property
    def _claims(self) -> tuple[str, ...]:
        """Terms but those that SGLang's static reserve already holds."""
        return (*WEIGHT_TERMS, "context", "draft") if self._is_static else TERMS

    def _static_reserve(self, layout: Layout, limits: Limits, backend: str) -> float:
        """SGLang's reserve [bytes]: srt/arg_groups/memory_hook.py as read in handbook 5.1.

        The default chunk counts as it is before attention-DP divides it (the hook runs before
        `handle_data_parallelism`); operators who give every rank more set the fraction themselves.
        """
        gpu, chunk = self.system.gpu, limits.max_batched_tokens
        if self.engine.divides_prefill_by_attention_dp:
            default = self.engine.budget(gpu.hbm_bytes, gpu.arch).max_batched_tokens
            chunk = max(chunk, min(chunk * layout.attention_dp, default))
        mebibytes = 512 + 1.5 * max(chunk, 2048)
        mebibytes += layout.stage_gpus * layout.pp / 8 * 1024
        mebibytes += limits.max_num_seqs * (2 + (3 * layout.attention_dp if layout.attention_dp > 1 else 0))
        mebibytes += 2048 if backend == "deepep" else 0
        reserve = mebibytes * 2**20
        return max(reserve, _SGLANG_FLOOR_BYTES) if self.system.gpu.hbm_bytes > 60 * 2**30 else reserve

    def _fixed(self, layout: Layout, limits: Limits, backend: str) -> dict[str, float]:
        overheads, arch = self.engine.overheads, self.system.gpu.arch
        return {
            "activations": self._activation_bytes(layout, limits),
            "cuda_graphs": self._num_graphs(limits.max_num_seqs * self.tactics.query_tokens, arch)
            * self.engine.graphs.bytes_per_graph,
            "communication_buffers": (overheads.nccl_bytes if layout.replica_gpus > 1 else 0.0)
            + (self._deepep_bytes(layout) if backend == "deepep" else 0.0),
            "context": overheads.context_bytes,
        }

    def _deepep_bytes(self, layout: Layout) -> float:
        moe = self.model.moe
        if moe is None or layout.ep == 1:
            return 0.0
        overheads = self.engine.overheads
        return overheads.deepep_normal_bytes + low_latency_buffer_bytes(
            overheads.low_latency_tokens, moe.expert_hidden, moe.num_experts + layout.redundant_experts
        )

    def _activation_bytes(self, layout: Layout, limits: Limits) -> float:
        """Peak of the profile run: residual stream copies and the fused expert workspace, or the sampler after them.

        The prior for copies is AIConfigurator's; the workspace holds gathered inputs, gate-up, activation and
        outputs of every assignment that balanced routing puts on the rank. Two half batches need half: SGLang ran
        prompts of 16k tokens where 8k was the limit (handbook serving 2.7).
        """
        tokens = -(-limits.max_batched_tokens // self.tactics.num_batches)
        tokens = min(tokens, self.engine.ubatch_tokens or tokens)
        copies = _ACTIVATION_COPIES.get(layout.tp, 5 if layout.tp > 4 else 6)
        stream = 2.0 * tokens * self.model.hidden * copies
        rows = min(limits.max_num_seqs * self.tactics.query_tokens, limits.max_batched_tokens)
        logits = _SAMPLER_BYTES * rows * self.model.vocab
        moe = self.model.moe
        if moe is None:
            return max(stream, logits)
        assignments = tokens * layout.attention_dp * moe.active_experts / layout.ep
        width = moe.expert_width / layout.moe_tp * moe.num_matrices
        chunk = min(assignments, 16384.0 * moe.active_experts)  # engines chunk the expert workspace at 16K tokens
        return max(stream + 2.0 * chunk * (2 * moe.expert_hidden + width), logits)

    def _stage_weights(self, layout: Layout, context_tokens: int) -> tuple[list[list[float]], list[float]]:
        """Weight bytes [stages, 4 terms] and KV bytes per cached token [stages] of one GPU."""
        tp, pp = layout.tp, layout.pp
        kinds = [layer for layer, _ in self.model.layer_kinds]
        order = np.array(self.model.layer_order)
        shares = np.array([self._layer_weights(layer, layout) for layer in kinds])
        caches = np.array([self._layer_cache(layer, tp, context_tokens) for layer in kinds])
        stages = np.array_split(order, pp)
        weights = np.array([shares[stage].sum(axis=0) for stage in stages])
        per_token = np.array([caches[stage].sum() for stage in stages])
        for weight in self.model.weights:
            share = stored_bytes(weight, self.model.format_of(weight.part)) / (tp if weight.shard == "vocab" else 1)
            stage = 0 if weight.part == "embedding" else pp - 1
            weights[stage, WEIGHT_TERMS.index(_TERM_OF_PART[weight.part])] += share
            if self.model.tied and pp > 1 and weight.part == "embedding":
                weights[pp - 1, WEIGHT_TERMS.index("embeddings")] += share
        return weights.tolist(), per_token.tolist()

    def _draft_bytes(self, layout: Layout, context_tokens: int) -> tuple[float, float]:
        """Weight bytes and cache bytes per token of the drafter on one GPU; MTP shares embedding and head."""
        speculation = self.tactics.speculation
        if speculation is None or speculation.draft is None:
            return 0.0, 0.0
        ledger = Ledger(speculation.draft, self.system, self.engine)
        weights, per_token = ledger._stage_weights(speculation.draft_layout(layout), context_tokens)
        held = weights[0] if speculation.method == "draft" else weights[0][: WEIGHT_TERMS.index("embeddings")]
        return sum(held), per_token[0]

    def _layer_weights(self, layer: Layer, layout: Layout) -> list[float]:
        totals = dict.fromkeys(WEIGHT_TERMS, 0.0)
        for weight in layer.weights:
            cut = shards(weight, layer, layout.tp, layout.ep, layout.moe_tp)
            copies = 1.0
            if layer.moe and weight.shard == "expert":
                copies += layout.redundant_experts / layer.moe.num_experts
            share = stored_bytes(weight, self.model.format_of(weight.part)) * copies / cut
            totals[_TERM_OF_PART[weight.part]] += share
        return list(totals.values())

    def _layer_cache(self, layer: Layer, tp: int, context_tokens: int) -> float:
        """Mean cache bytes per token of a sequence of `context_tokens` in one layer on one GPU."""
        total = cross = 0.0
        for mixer in layer.mixers:
            if isinstance(mixer, Recurrent):
                state = mixer.state_values * _STATE_BYTES + mixer.conv_values * _CONV_BYTES
                total += state * self.tactics.query_tokens / tp / context_tokens  # one to return to per draft
                continue
            held = min(context_tokens, mixer.window or context_tokens) / context_tokens
            share = kv_bytes_per_layer(mixer, self.model.kv_format) * held / kv_shards(mixer, tp)
            cross, total = (cross + share, total) if mixer.is_cross else (cross, total + share)
        return max(total, cross)  # a prompt token is in the cross cache only, an answer token in the other only


def kv_shards(attention: Attention, tp: int) -> int:
    """Over how many ranks the cache of `attention` is cut: KV heads at most, MLA not at all."""
    return 1 if attention.kind == "mla" else min(tp, attention.num_kv_heads)


def shards(weight: Weight, layer: Layer, tp: int, ep: int, moe_tp: int) -> int:
    """Over how many ranks `weight` of `layer` is cut."""
    if weight.shard == "expert":
        return ep * moe_tp
    if weight.shard == "kv_column":
        heads = [m.num_kv_heads for m in layer.mixers if isinstance(m, Attention)]
        return min(tp, max(heads)) if heads else tp
    return 1 if weight.shard == "replicated" else tp
