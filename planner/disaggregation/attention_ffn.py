"""Attention on some GPUs, feed-forward on others: how many of each, and what they generate (handbook serving 8.2).

Three micro-batches are in flight, one in attention, one on the network, one in feed-forward; each stage of a pass
through all layers takes a third of the time per token at most (Step-3 report). Attention GPUs hold attention weights
and the cache, feed-forward GPUs everything else. Analytic: stage times come from the same tables as any step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.cost import StepCost
from planner.disaggregation.transfer import POINT_TO_POINT_S
from planner.engine import Engine, Limits
from planner.errors import DoesNotFit, InputError
from planner.hardware import Cluster
from planner.layout import Layout, layout_problem
from planner.measurements import Fabric
from planner.measurements.links import INSIDE_SHARE, OUTSIDE_SHARE, RACK_SHARE, distinct, message_bytes, network_rate
from planner.measurements.roofline import Ceilings
from planner.memory import Ledger
from planner.model import ModelConfig
from planner.steptime import TOKENS, Floats, Sum, bilinear

STAGES = 3
"""Micro-batches in flight: attention, network, feed-forward (Step-3 report, handbook serving 8.2)."""
_BATCHES = np.unique(np.round(np.geomspace(1, 4096, 240)))
"""Sequences of a micro-batch on one attention rank."""
_ATTENTION_TERMS = ("attention_projections", "router", "norms", "small_kernels")
_FFN_TERMS = ("shared_experts", "dense_ffn")


def roofline_batch(sparsity: float, flop_per_s: float, bytes_per_s: float, weight_bytes: float = 1.0) -> float:
    """Tokens of a micro-batch at which experts turn from memory- to compute-bound: F B_w / (2 S BW).

    `sparsity` is the share of the experts a token uses, `weight_bytes` the bytes of a weight.

    >>> round(roofline_batch(8 / 256, 1.979e15, 3.35e12))
    9452
    """
    return flop_per_s * weight_bytes / (2 * sparsity * bytes_per_s)


def sparsity_floor(
    hidden: int, layers: int, flop_per_s: float, bytes_per_s: float, net_bytes_per_s: float, stage_s: float
) -> float:
    """Least sparsity at which the network can feed `roofline_batch` within a stage: S >= 3 H F L / (2 Net BW stage).

    A token takes one byte per value out and two back (FP8, BF16). `net_bytes_per_s` is that of the GPUs which hold
    the experts once, `stage_s` a third of the time per token.

    >>> round(sparsity_floor(7168, 61, 1.979e15, 3.35e12, 400e9, 0.05 / 3), 3)
    0.058
    """
    return 3 * hidden * flop_per_s * layers / (2 * net_bytes_per_s * bytes_per_s * stage_s)


def tok_per_s_per_gpu(tokens_in_flight: float, num_gpus: float, tpot_s: float) -> float:
    """Each token in flight makes one token per `tpot_s` (Step-3: 6,144 on 32 GPUs at 4,039 tok/s/GPU take 47.5 ms).

    >>> round(tok_per_s_per_gpu(6144, 32, 0.0475))
    4042
    """
    return tokens_in_flight / (num_gpus * tpot_s)


def at_other_ratio(per_gpu: float, gpus: float, other_gpus: float) -> float:
    """Throughput per GPU when the same tokens need `other_gpus` instead of `gpus`, as attention grows with context.

    >>> round(at_other_ratio(4039, 4, 6)), round(at_other_ratio(4039, 4, 18))
    (2693, 898)
    """
    return per_gpu * gpus / other_gpus


@dataclass(frozen=True, slots=True)
class AfdPoint:
    """One split with its largest micro-batch: `batch` sequences per attention rank, three such in flight.

    Stage times [s] are of one pass through all layers; `bound` names what stops a larger batch.
    """

    attention_tp: int
    attention_gpus: int
    ffn_gpus: int
    batch: int
    attention_s: float
    network_s: float
    ffn_s: float
    tpot_s: float
    output_tok_per_s: float
    bound: str
    kv_tokens_per_rank: int

    @property
    def num_gpus(self) -> int:
        """GPUs of both sides."""
        return self.attention_gpus + self.ffn_gpus

    @property
    def output_tok_per_s_per_gpu(self) -> float:
        """Generated tokens per second and GPU, attention and feed-forward GPUs together."""
        return self.output_tok_per_s / self.num_gpus

    @property
    def ffn_batch(self) -> int:
        """Tokens of a micro-batch that reach the feed-forward GPUs."""
        return self.batch * (self.attention_gpus // self.attention_tp)


@dataclass(frozen=True, slots=True)
class PlainPoint:
    """The best layout without splitting attention from feed-forward, decoding only."""

    layout: Layout
    batch: int
    tpot_s: float
    output_tok_per_s_per_gpu: float


@dataclass(frozen=True)
class AfdAnswer:
    """Splits of the offered GPUs, best first, and the plain layout they must beat.

    `sparsity` is the share of experts a token uses, `sparsity_floor` what the link between the two sides would need to
    feed a compute-bound feed-forward; both None for dense models, the floor also without a link.
    """

    model: ModelConfig
    cluster: Cluster
    context: int
    tpot_s: float
    points: tuple[AfdPoint, ...]
    plain: PlainPoint | None
    sparsity: float | None
    sparsity_floor: float | None
    roofline_batch: float

    @property
    def best(self) -> AfdPoint:
        """The split with the highest throughput per GPU."""
        return self.points[0]

    @property
    def gain(self) -> float | None:
        """Throughput per GPU over that of the plain layout, less one."""
        if self.plain is None:
            return None
        return self.best.output_tok_per_s_per_gpu / self.plain.output_tok_per_s_per_gpu - 1


class AttentionFfn:
    """Stage times and sizes of `model` on `cluster` under `engine` at `context` tokens per sequence."""

    def __init__(self, model: ModelConfig, cluster: Cluster, engine: Engine, context: int) -> None:
        if any(layer.stack == "encoder" for layer in model.layers):
            raise InputError(f"{model.name} is an encoder-decoder model: attention-FFN disaggregation is for decoders.")
        if not 1 <= context <= (model.max_context or context):
            raise InputError(f"--context {context}: 1 to {model.max_context:,} tokens for {model.name}")
        self.model, self.cluster, self.engine, self.context = model, cluster, engine, context
        self._ledger = Ledger(model, cluster.system, engine)
        self._ceilings = Ceilings.of(cluster.system, Fabric(cluster.oversubscription, cluster.rail_optimised))

    # --- stages of one pass ------------------------------------------------------------------------------------

    def attention_s(self, tp: int) -> Floats:
        """Attention, router, small kernels, lm_head, sampling and host of `_BATCHES` sequences on `tp` GPUs [s]."""
        cost = self._cost(Layout(tp=tp, moe_tp=tp))
        mixers = np.asarray(np.sum(list(cost.decode_table.terms.values()), axis=0))
        seconds = bilinear(_BATCHES, np.full_like(_BATCHES, self.context), mixers) + _at(cost.head_table, _BATCHES)
        seconds = seconds + cost.host_s
        for term in _ATTENTION_TERMS:
            seconds = seconds + _at(cost.token_table, _BATCHES, term)
        if tp > 1:
            summed = cost.tables.all_reduce(tp).seconds(2.0 * _BATCHES * self.model.hidden)
            seconds = seconds + self.model.num_layers * cost.calibration.exchange * summed
        return np.asarray(seconds)

    def ffn_s(self, layout: Layout, tokens: Floats) -> Floats:
        """Experts, shared experts and dense layers of micro-batches of `tokens` on the GPUs of `layout` [s]."""
        cost = self._cost(layout)
        seconds = np.zeros_like(tokens)
        if self.model.moe is not None:
            seconds = seconds + _at(cost.moe_table("decode"), tokens, "experts")
        for term in _FFN_TERMS:
            seconds = seconds + _at(cost.token_table, np.maximum(1.0, tokens / layout.num_gpus), term)
        return np.asarray(seconds)

    def network_s(self, attention_gpus: int, ffn_gpus: int, tokens: Floats) -> Floats:
        """Activations of micro-batches of `tokens` to the feed-forward GPUs and back, all layers [s].

        A token goes once to every scale-up domain (or, within one, to every GPU) that has an expert of its choice; the
        busier of the two sides counts. Out and back share the stage, as in the Step-3 report.
        """
        inside = attention_gpus + ffn_gpus <= self.cluster.scale_up_gpus
        rate, latency_s = self._link(inside)
        places = ffn_gpus if inside else -(-ffn_gpus // self.cluster.scale_up_gpus)
        fewer = min(attention_gpus, ffn_gpus)
        seconds = np.zeros_like(tokens)
        for layer, count in self.model.layer_kinds:
            moe = layer.moe
            copies = distinct(places, moe.num_experts, moe.top_k) if moe and places > 1 else 1.0
            hidden = moe.expert_hidden if moe else self.model.hidden
            out = message_bytes("fp8" if self._sends_fp8 else "bf16", hidden)
            moved = tokens * copies * (out + message_bytes("bf16", hidden))
            seconds = seconds + count * (moved / fewer / rate + 2 * latency_s)
        return seconds * self.engine.calibration(self.cluster.gpu.arch).exchange

    def _link(self, inside: bool) -> tuple[float, float]:
        """Bytes per second of one GPU and seconds of latency between the two sides."""
        system = self.cluster.system
        if inside:
            share = RACK_SHARE if self.cluster.nodes > 1 else INSIDE_SHARE
            return system.scale_up.bytes_per_s * share, max(system.scale_up.latency_s or 0.0, POINT_TO_POINT_S)
        rate = network_rate(self._ceilings, OUTSIDE_SHARE, same_rail=False)
        card = system.scale_out
        return rate, max((card.latency_s if card else None) or 0.0, POINT_TO_POINT_S)

    @cached_property
    def _sends_fp8(self) -> bool:
        stored = self.model.format_of("expert" if self.model.moe else "dense_ffn")
        return self.cluster.gpu.compute_format(stored) in ("fp8", "fp4")

    def _cost(self, layout: Layout) -> StepCost:
        whole = layout.ep > 1 and layout.moe_tp == 1 and "deepep" in self.engine.moe_backends
        return StepCost(self.model, layout, self.cluster, self.engine, "deepep" if whole else "allgather_reducescatter")

    # --- memory ------------------------------------------------------------------------------------------------

    def kv_tokens(self, tp: int, batch: int) -> int:
        """Cached tokens of an attention rank of `tp` GPUs without experts, shared experts and dense layers."""
        layout = Layout(tp=tp, moe_tp=tp)
        use = self._ledger.use(layout, Limits(batch, max(batch, 256)), "all_reduce", self.context)
        own = sum(use.terms[term] for term in ("attention", "embeddings", "cuda_graphs", "context"))
        stream = 2.0 * STAGES * batch * self.model.hidden  # residual of every micro-batch in flight
        return int(max(0.0, use.budget_bytes - own - stream) / max(use.kv_bytes_per_token, 1e-9))

    def ffn_fits(self, layout: Layout, tokens: float) -> bool:
        """Whether experts, shared experts and dense layers fit, with the activations of a micro-batch."""
        use = self._ledger.use(layout, Limits(1, 256), "all_reduce", self.context)
        own = sum(use.terms[term] for term in ("experts", "dense", "context"))
        width = self.model.moe.active_experts if self.model.moe else 1.0
        return own + 4.0 * tokens / layout.num_gpus * width * self.model.hidden <= use.budget_bytes

    # --- splits ------------------------------------------------------------------------------------------------

    def ffn_layouts(self) -> Iterator[Layout]:
        """One layout for every number of feed-forward GPUs: experts whole where they divide, else cut in width."""
        node, total = self.cluster.gpus_per_node, self.cluster.num_gpus
        for gpus in range(1, total):
            if gpus % node and node % gpus:
                continue
            for ep in sorted((d for d in range(1, gpus + 1) if gpus % d == 0), reverse=True):
                layout = Layout(ep=ep if self.model.moe else 1, attention_dp=gpus, moe_tp=gpus // ep)
                if self.model.moe is None or layout_problem(self.model, layout) is None:
                    yield layout
                    break

    def split(self, attention_gpus: int, ffn: Layout, tp: int, limit_s: float, attention: Floats) -> AfdPoint | None:
        """The largest micro-batch of a split whose stages keep a third of `limit_s`; None where none does."""
        ranks = attention_gpus // tp
        tokens = _BATCHES * ranks
        network, work = self.network_s(attention_gpus, ffn.num_gpus, tokens), self.ffn_s(ffn, tokens)
        slowest = np.maximum(attention, np.maximum(network, work))
        room = self.kv_tokens(tp, int(_BATCHES[-1]))
        held = STAGES * _BATCHES * self.context <= room
        kept = np.flatnonzero(held & (slowest <= limit_s / STAGES))
        if not len(kept) or not self.ffn_fits(ffn, float(tokens[kept[-1]])):
            return None
        i = int(kept[-1])
        stages = {"attention": float(attention[i]), "network": float(network[i]), "feed-forward": float(work[i])}
        bound = max(stages, key=lambda name: stages[name])
        if i + 1 < len(_BATCHES) and not held[i + 1]:
            bound = "KV memory"
        tpot_s = max(sum(stages.values()), STAGES * max(stages.values()))
        return AfdPoint(
            tp,
            attention_gpus,
            ffn.num_gpus,
            int(_BATCHES[i]),
            stages["attention"],
            stages["network"],
            stages["feed-forward"],
            tpot_s,
            float(STAGES * tokens[i] / tpot_s),
            bound,
            room,
        )

    def splits(self, limit_s: float) -> list[AfdPoint]:
        """The best attention width of every split of all GPUs, highest throughput per GPU first."""
        total, found = self.cluster.num_gpus, []
        widths = [tp for tp in (1, 2, 4, 8) if layout_widths(self.model, tp) and tp <= self.cluster.gpus_per_node]
        attention = {tp: self.attention_s(tp) for tp in widths}
        for ffn in self.ffn_layouts():
            gpus = total - ffn.num_gpus
            tried = [self.split(gpus, ffn, tp, limit_s, attention[tp]) for tp in widths if gpus % tp == 0]
            points = [point for point in tried if point is not None]
            if points:
                found.append(max(points, key=lambda p: p.output_tok_per_s))
        return sorted(found, key=lambda p: -p.output_tok_per_s_per_gpu)


def layout_widths(model: ModelConfig, tp: int) -> bool:
    """Whether attention of `model` can be cut over `tp` GPUs."""
    heads = [m.num_heads for layer in model.layers for m in layer.mixers if hasattr(m, "num_heads")]
    return all(n % tp == 0 for n in heads)


def _at(table: Sum, tokens: Floats, term: str | None = None) -> Floats:
    """Seconds of a table on TOKENS at `tokens`, of one term or all."""
    values = [v for name, v in table.terms.items() if term in (None, name)]
    return np.interp(tokens, TOKENS, np.sum(values, axis=0)) if values else np.zeros_like(tokens)


def plan_attention_ffn(model: ModelConfig, cluster: Cluster, engine: Engine, context: int, tpot_s: float) -> AfdAnswer:
    """Splits of all GPUs of `cluster` between attention and feed-forward, beside the best plain layout.

    Raises DoesNotFit where no split keeps `tpot_s` or fits in memory.
    """
    from planner.disaggregation.plain import plain_point

    if cluster.num_gpus < 2:
        raise InputError(f"{cluster.name} has one GPU: attention and feed-forward need one each at least.")
    sizing = AttentionFfn(model, cluster, engine, context)
    points = sizing.splits(tpot_s)
    if not points:
        raise DoesNotFit(
            f"no split of {cluster.num_gpus} GPUs of {cluster.name} fits {model.name} at {context:,} tokens and "
            f"{tpot_s * 1e3:g} ms per token",
            ["a longer time per token (--tpot)", "more GPUs", "a lower precision (--weights, --kv)"],
        )
    gpu, moe, card = cluster.gpu, model.moe, cluster.system.scale_out
    fmt = model.format_of("expert" if moe else "dense_ffn")
    rate = gpu.peak_flop_per_s(fmt)
    stored = {"fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5, "mxfp4": 0.5, "fp4": 0.5, "int4": 0.5, "int8": 1.0}
    sparsity = moe.active_experts / moe.num_experts if moe else None
    floor = None
    link = cluster.system.scale_up if cluster.num_gpus <= cluster.scale_up_gpus else card
    if moe and link:
        net = link.bytes_per_s * cluster.gpus_per_node
        floor = sparsity_floor(model.hidden, model.num_layers, rate, gpu.hbm_bytes_per_s, net, tpot_s / STAGES)
    batch = roofline_batch(sparsity or 1.0, rate, gpu.hbm_bytes_per_s, stored.get(fmt, 2.0))
    plain = plain_point(model, cluster, engine, context, tpot_s)
    return AfdAnswer(model, cluster, context, tpot_s, tuple(points), plain, sparsity, floor, batch)
