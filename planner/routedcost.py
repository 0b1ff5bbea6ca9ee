"""Seconds of the routed experts of a step: the busiest rank's expert layer, and tokens to experts and back.

Imbalance enters as the load of the busiest rank per layer (`planner.loads`), in expert GEMM and in received bytes,
never as a multiplier of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.calibration import NEUTRAL, Calibration
from planner.capacity import BufferLimit
from planner.experts import ExpertSettings
from planner.hardware import Cluster
from planner.layout import Layout
from planner.loads import LoadTable, Question, load_table, rank_load
from planner.measurements import Curve, Origin, Tables
from planner.measurements.formats import FORMATS, canonical
from planner.model import ModelConfig
from planner.model.config import Layer, Moe
from planner.model.precision import compute_format
from planner.offload import Offload, moe_layers
from planner.placement import Placement
from planner.residency.timing import LayerTime
from planner.routing import distinct_ranks
from planner.steptime import TOKENS, Floats, Sum

_BF16_BYTES = 2.0
Kinds = list[tuple[Layer, int]]


def _unchanged(question: Question) -> Question:
    return question


class RoutedCost:
    """Expert layers of one layout of one model; `backend` as in `planner.cost.StepCost`.

    With `offload` some experts lie outside HBM; `rest_s` is then the other work of a layer by tokens and phase, behind
    which fetches may hide.

    `buffer` is what a rank may send through low-latency exchange at once, None for anything. `mxfp4_by_fp8` says that
    MXFP4 experts multiply FP8 activations, `calibration` has the factors of experts, exchange and prompts; fetches from
    outside HBM have none.
    """

    def __init__(
        self,
        model: ModelConfig,
        layout: Layout,
        cluster: Cluster,
        tables: Tables,
        backend: str,
        settings: ExpertSettings,
        offload: Offload | None = None,
        rest_s: Callable[[Floats, str], Floats] | None = None,
        buffer: BufferLimit | None = None,
        mxfp4_by_fp8: bool = False,
        calibration: Calibration = NEUTRAL,
    ) -> None:
        self.model, self.layout, self.cluster, self.tables = model, layout, cluster, tables
        self.backend, self.settings = backend, settings
        self.offload, self._rest_s, self._buffer = offload, rest_s, buffer
        self._calibration = calibration
        stored = compute_format(model.format_of("expert"))
        self._format = "mxfp4_fp8" if stored == "mxfp4" and mxfp4_by_fp8 else stored
        self._nodes = -(-layout.stage_gpus // cluster.scale_up_gpus)
        self._tables: dict[tuple[str, tuple[tuple[Layer, int], ...]], Sum] = {}

    def table(self, phase: str, kinds: Kinds) -> Sum:
        """Experts, dispatch and combine of `kinds` on TOKENS, all ranks together, in expectation over draws."""
        key = phase, tuple(kinds)
        if key not in self._tables:
            self._tables[key] = self._table(phase, kinds)
        return self._tables[key]

    def _table(self, phase: str, kinds: Kinds) -> Sum:
        total = Sum(TOKENS.shape)
        for layer, count in kinds:
            if layer.moe:
                moe = self.settings.router(layer.moe)
                loads = load_table(self.question(moe, phase))
                load = rank_load(loads, TOKENS)
                passes = self._passes(phase, TOKENS)
                seconds, origin = self._seconds(moe, phase, load.max_assignments / passes, load.active_on_busiest)
                seconds = seconds * passes
                if self.offload is not None:
                    share, exposed = self._beside(moe, phase, loads)
                    seconds = seconds * share
                    total.add("expert_misses", exposed * count, self.offload.origin)
                total.add("experts", seconds * count, origin)
                if self.layout.attention_dp > 1:
                    hottest = load.max_assignments / np.maximum(load.mean_assignments, 1e-12)
                    self._add_exchange(total, moe, count, phase, hottest, TOKENS)
        return total

    def _beside(self, moe: Moe, phase: str, loads: LoadTable) -> tuple[Floats, Floats]:
        """On TOKENS: share of its work that the GPU keeps when a CPU helps, and the seconds it waits besides."""
        time, knots = self.offloaded(moe, phase, loads), np.log(np.array(loads.question.knots, dtype=float))
        kept = (time.total_s - time.exposed_s).mean(axis=(1, 2)) / self._gpu_s(moe, phase, loads).mean(axis=(1, 2))
        exposed = np.log(np.maximum(time.exposed_s.mean(axis=(1, 2)), 1e-12))
        return np.interp(np.log(TOKENS), knots, kept), np.exp(np.interp(np.log(TOKENS), knots, exposed))

    def drawn_seconds(self, phase: str, kinds: Kinds, ask: Callable[[Question], Question] = _unchanged) -> Floats:
        """Seconds of `table` in each cached draw [knots, draws], the loads being those of `ask`ed questions."""
        seconds: Floats = np.zeros(())
        for layer, count in kinds:
            if layer.moe:
                moe = self.settings.router(layer.moe)
                question = ask(self.question(moe, phase))
                loads, tokens = load_table(question), np.array(question.knots, dtype=float)[:, None, None]
                passes = self._passes(phase, tokens)
                drawn = self._seconds(moe, phase, loads.max_assigned / passes, loads.max_active)[0] * passes
                if self.offload is not None:
                    drawn = self.offloaded(moe, phase, loads).total_s
                if self.layout.attention_dp > 1:
                    even = tokens * moe.top_k / self.layout.ep
                    exchange = Sum(loads.max_assigned.shape)
                    self._add_exchange(exchange, moe, 1, phase, loads.max_assigned / even, tokens)
                    drawn = drawn + sum(exchange.terms.values())
                seconds = seconds + drawn.mean(axis=-1) * count
        return seconds

    def offloaded(self, moe: Moe, phase: str, loads: LoadTable) -> LayerTime:
        """Expert part of a layer in every draw of `loads`, arrays [knots, draws, layers]. Only with an offload."""
        assert self.offload is not None and self._rest_s is not None
        rest_s = self._rest_s(np.array(loads.question.knots, dtype=float), phase)
        # Slots that padding fills on a GPU are no work for others: no more experts than tokens that came to them.
        needed = np.minimum(loads.max_active, np.maximum(loads.max_load, 1.0))
        times = [
            self.offload.layer_time(moe, phase, tokens, active, served, gpu, float(rest))
            for tokens, active, served, gpu, rest in zip(
                loads.question.knots, needed, loads.max_load, self._gpu_s(moe, phase, loads), rest_s, strict=True
            )
        ]
        return LayerTime(**{name: np.stack([getattr(t, name) for t in times]) for name in LayerTime.__slots__})

    def layer(self, phase: str, tokens: int) -> LayerTime:
        """Expert part of a layer in a step of `tokens` tokens, arrays [draws, layers]. Only with an offload."""
        assert self.model.moe is not None
        moe = self.settings.router(self.model.moe)
        loads = load_table(replace(self.question(moe, phase), knots=(tokens,)))
        found = self.offloaded(moe, phase, loads)
        return LayerTime(**{name: getattr(found, name)[0] for name in LayerTime.__slots__})

    def misses(self) -> dict[str, dict[str, Floats]]:
        """What lay outside HBM in a step by phase, [knots, draws] each; over all layers but for the hit rate.

        Hit rate, bytes fetched, bytes of experts computed on the CPU, and seconds of the host link.
        """
        assert self.model.moe is not None
        moe, found = self.settings.router(self.model.moe), {}
        for phase, loads in self.loads().items():
            time, count = self.offloaded(moe, phase, loads), moe_layers(self.model, phase)
            found[phase] = {
                "hit_rate": time.hit_rate.mean(axis=-1),
                **{name: getattr(time, name).mean(axis=-1) * count for name in ("miss_bytes", "cpu_bytes", "link_s")},
            }
        return found

    def _gpu_s(self, moe: Moe, phase: str, loads: LoadTable) -> Floats:
        """Seconds of an expert layer with all experts in HBM, [knots, draws, layers]."""
        return self._seconds(moe, phase, loads.max_assigned, loads.max_active)[0]

    def loads(self, ask: Callable[[Question], Question] = _unchanged) -> dict[str, LoadTable]:
        """Draws of the router in the first kind of MoE layer, by phase. Only for models with experts."""
        assert self.model.moe is not None
        moe = self.settings.router(self.model.moe)
        return {phase: load_table(ask(self.question(moe, phase))) for phase in ("prefill", "decode")}

    def question(self, moe: Moe, phase: str) -> Question:
        """What decides the loads of the ranks in `phase`."""
        return self.settings.question(moe, self.layout, phase, self._nodes)

    def _phase_factor(self, phase: str) -> float:
        """Factor of `phase` on every kernel: steps with prompts are launched one by one."""
        return self._calibration.prompts if phase == "prefill" else 1.0

    def _seconds(self, moe: Moe, phase: str, assigned: Floats, active: Floats) -> tuple[Floats, NDArray[np.int8]]:
        """Seconds and origin of a rank that computes `assigned` token-expert pairs on `active` of its experts.

        Tables are measured with balanced routing, where A assignments touch min(A, local) experts. Real routing
        touches fewer, so the weight-bound part is looked up at the active experts and the growth beyond full
        coverage is added (handbook serving 7.5).
        """
        local = (moe.num_experts + self.layout.redundant_experts) // self.layout.ep
        curve, substituted = self._curve(moe, local)
        assigned = np.maximum(assigned, 1.0)
        active = np.clip(active, 1.0, local)
        covered = np.minimum(assigned, local)
        seconds = curve.seconds(active) + curve.seconds(assigned) - curve.seconds(covered)
        least = Origin.EXTRAPOLATED if substituted else Origin.MEASURED
        origin = np.maximum(curve.origin(assigned), np.int8(least))
        # A table timed on weights that stayed in the cache of the GPU beats its memory; in a server they do not stay.
        gpu, read = self.cluster.system.gpu, active * self._expert_bytes(moe)
        cached = seconds < read / gpu.hbm_bytes_per_s
        streamed = read / (gpu.hbm_bytes_per_s * gpu.hbm_efficiency)
        seconds = np.where(cached, streamed, seconds) * self._calibration.experts * self._phase_factor(phase)
        return seconds, np.where(cached, np.int8(Origin.ROOFLINE), origin)

    def _expert_bytes(self, moe: Moe) -> float:
        """Bytes of the slice of one expert that a GPU holds."""
        values = moe.num_matrices * moe.expert_hidden * moe.expert_width / self.layout.moe_tp
        return values * FORMATS[canonical(self._format)].weight_bytes

    def _curve(self, moe: Moe, local: int) -> tuple[Curve, bool]:
        """Fused experts in the checkpoint's format; other 8-bit ones through block-scaled kernels where faster.

        The per-tensor series of vLLM 0.24 on Hopper reaches 0.2 of the memory bandwidth, the block-scaled one 0.7, for
        the same bytes: nobody serves with the slower. A block-scaled checkpoint has no such choice. The second value
        says that another format's kernel answers.
        """
        stored = self._format
        formats = (stored, "fp8_block") if stored in ("fp8", "int8") else (stored,)
        width = moe.expert_width // self.layout.moe_tp
        dispatched = self.backend == "deepep" and self.layout.attention_dp > 1
        shape = (moe.expert_hidden, width, local, moe.num_experts, moe.top_k, moe.num_matrices)
        curves = [self.tables.expert_gemm(fmt, *shape, dispatched=dispatched) for fmt in formats]
        best = int(np.argmin([float(curve.seconds(np.array(float(local)))) for curve in curves]))
        return curves[best], best > 0

    def _add_exchange(self, total: Sum, moe: Moe, count: int, phase: str, hottest: Floats, tokens: Floats) -> None:
        """Tokens to experts and back. `hottest` scales the bytes to the busiest receiver (DeepEP issue 250)."""
        gpus, inside = self.layout.stage_gpus, self._inside(phase, tokens)
        factor = self._calibration.exchange * self._phase_factor(phase)
        if inside.any():
            mode: Literal["normal", "low_latency"] = "low_latency" if phase == "decode" else "normal"
            passes = self._passes(phase, tokens)
            per_gpu = tokens / gpus / passes * (hottest if mode == "low_latency" else self._distinct(moe, hottest))
            shape = (gpus, self._nodes, moe.expert_hidden, moe.top_k, moe.num_experts)
            limit = self._node_limit(moe)
            times = (count * passes * inside).astype(float) * factor
            dispatch = self.tables.dispatch(mode, *shape, self._dispatch_format(), node_limit=limit)
            total.curve("dispatch", dispatch, per_gpu, times)
            total.curve("combine", self.tables.combine(mode, *shape, "bf16", node_limit=limit), per_gpu, times)
        if not inside.all():
            bytes_ = tokens * np.ones_like(hottest) * moe.expert_hidden * _BF16_BYTES
            times = (count * ~inside).astype(float) * factor
            total.curve("dispatch", self.tables.all_gather(gpus), bytes_, times)
            total.curve("combine", self.tables.reduce_scatter(gpus), bytes_, times)

    def _inside(self, phase: str, tokens: Floats) -> NDArray[np.bool_]:
        """Where DeepEP exchanges the tokens, not all-gather and reduce-scatter; shape of `tokens`, all ranks' own."""
        if self.backend != "deepep" or self.layout.ep == 1:
            return np.zeros(tokens.shape, dtype=bool)
        if self._buffer is None or phase != "decode":
            return np.ones(tokens.shape, dtype=bool)
        return ~self._buffer.falls_back(tokens / self.layout.stage_gpus)

    def _passes(self, phase: str, tokens: Floats) -> NDArray[np.int64]:
        """Times an expert layer runs because its tokens exceed the buffer, shape of `tokens`."""
        if self._buffer is None or phase != "decode" or self.backend != "deepep" or self.layout.attention_dp == 1:
            return np.ones(tokens.shape, dtype=np.int64)
        return self._buffer.passes(tokens / self.layout.stage_gpus)

    def _distinct(self, moe: Moe, hottest: Floats) -> Floats:
        """Tokens of the busiest receiver over the mean when a token with several experts there is sent once.

        With independent picks a rank that gets a share s of them sees 1 - (1 - s)^k of the tokens.
        """
        even = 1.0 / self.layout.ep
        share = np.minimum(even * hottest, 1.0)
        return np.asarray((1 - (1 - share) ** moe.top_k) / (1 - (1 - even) ** moe.top_k))

    def _node_limit(self, moe: Moe) -> float:
        """Scale-up domains that a token of a group-limited router visits on average, 0 for no limit.

        Groups are whole runs of experts; a placement that tears them apart (greedy, EPLB over nodes that do not divide
        the groups) loses the limit. Of a placement from a file it is the most that a token can visit.
        """
        placement, nodes = self.settings.placement, self._nodes
        if moe.top_groups >= moe.num_groups or moe.num_experts % nodes:
            return 0
        if isinstance(placement, Placement):
            if placement.num_ranks % nodes:
                return 0
            on_nodes = replace(placement, num_nodes=nodes)
            return int(on_nodes.nodes_reached(moe.num_groups, moe.top_groups).max())
        if placement not in ("contiguous", "node-limited", "eplb") or (placement == "eplb" and moe.num_groups % nodes):
            return 0
        return distinct_ranks(moe.num_experts, moe.top_k, nodes, moe.num_groups, moe.top_groups)

    def _dispatch_format(self) -> str:
        fmt = self._format
        return "fp8" if fmt in ("fp8", "fp8_block") else "nvfp4" if fmt == "nvfp4" else "bf16"
