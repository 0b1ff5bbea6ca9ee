"""A variant of a model, and what one decode step of it costs on given GPUs with the layout that suits each batch.

At a fixed number of GPUs and of running sequences the shortest step is also the highest throughput and the lowest
price, so there is one best layout per batch. Prompts are not counted here: `planner.steady` does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from planner.cost import StepCost
from planner.engine import Engine, Limits
from planner.experts import ExpertSettings
from planner.hardware import Cluster
from planner.layout import Layout
from planner.memory import Ledger, MemoryUse
from planner.model import ModelConfig
from planner.routing import Measured
from planner.steptime import Floats

StepLaw = Callable[[StepCost, Floats, Floats], Floats]
"""(cost of a layout, sequences of each attention-DP rank, tokens of context of each) -> seconds of a decode step."""
HeldLaw = Callable[[Layout], float]
"""Bytes that a layout keeps on every GPU beside the model."""


def whole_step_s(cost: StepCost, seqs: Floats, context: Floats) -> Floats:
    """Seconds of the decode step as the cost model gives it."""
    return cost.decode(seqs, context).total_s


def nothing_held(layout: Layout) -> float:
    """No bytes beside the model."""
    return 0.0


@dataclass(frozen=True, slots=True)
class Variant:
    """A model with one thing changed. `note` says what no number shows, `details` are facts of this kind of variant."""

    name: str
    model: ModelConfig
    note: str = ""
    step_s: StepLaw = whole_step_s
    held_bytes: HeldLaw = nothing_held
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """One decode step of `batch` sequences over all GPUs with the best layout (replicas included)."""

    batch: int
    layout: Layout
    backend: str
    step_s: float

    @property
    def tok_per_s_per_gpu(self) -> float:
        """Output tokens per second and GPU; every sequence gets one token per step."""
        return self.batch / self.step_s / self.layout.num_gpus


def decode_points(
    variant: Variant,
    cluster: Cluster,
    engine: Engine,
    limits: Limits,
    layouts: Iterable[Layout],
    batches: Sequence[int],
    context: int,
    experts: ExpertSettings | None = None,
) -> list[DecodePoint | None]:
    """The shortest decode step for each batch of sequences on all GPUs of `cluster`.

    Parameters
    ----------
    variant
        Model, step law and held bytes.
    cluster
        GPUs that share the batch, as replicas of one layout.
    engine, limits
        Memory rule and the most sequences of a scheduler rank.
    layouts
        Layouts of one replica to choose from (`planner.search.layouts`).
    batches
        Running sequences over all GPUs.
    context
        Tokens of each sequence.
    experts
        Popularity, placement and limits of the experts; what engines do unasked when absent.

    Returns
    -------
    list
        One point per batch, None where no layout has room for its KV cache.
    """
    ledger, settings = Ledger(variant.model, cluster.system, engine), _settings(variant.model, experts)
    best: list[DecodePoint | None] = [None] * len(batches)
    for layout, backend in placed(layouts, cluster, engine):
        room = _room(variant, ledger.use(layout, limits, backend, context), layout)
        slots = layout.replicas * layout.attention_dp * layout.pp
        seqs = np.ceil(np.asarray(batches, dtype=float) / slots)
        holds = (seqs * layout.pp * context <= room) & (seqs <= most_seqs(layout, backend, engine, limits))
        if not holds.any():
            continue
        cost = StepCost(variant.model, layout, cluster, engine, backend, settings)
        step_s = variant.step_s(cost, seqs, np.full_like(seqs, float(context)))
        for i, seconds in enumerate(step_s):
            known = best[i]
            if holds[i] and (known is None or seconds < known.step_s * (1 - 1e-9)):
                best[i] = DecodePoint(batches[i], layout, backend, float(seconds))
    return best


def roomiest_kv_tokens(
    variant: Variant, cluster: Cluster, engine: Engine, limits: Limits, layouts: Iterable[Layout], context: int
) -> int:
    """Most tokens that any layout can cache on all GPUs of `cluster`; 0 when the variant does not fit."""
    ledger = Ledger(variant.model, cluster.system, engine)
    tokens = [0]
    for layout, backend in placed(layouts, cluster, engine):
        room = _room(variant, ledger.use(layout, limits, backend, context), layout)
        tokens.append(int(room) * layout.attention_dp * layout.replicas)
    return max(tokens)


def placed(layouts: Iterable[Layout], cluster: Cluster, engine: Engine) -> Iterator[tuple[Layout, str]]:
    """`layouts` of one replica as replicas over all GPUs, with the ways attention-DP ranks may exchange tokens."""
    for layout in layouts:
        if cluster.num_gpus % layout.replica_gpus:
            continue
        whole = replace(layout, replicas=cluster.num_gpus // layout.replica_gpus)
        yield whole, "allgather_reducescatter"
        if layout.attention_dp > 1 and layout.ep > 1 and layout.moe_tp == 1 and "deepep" in engine.moe_backends:
            yield whole, "deepep"


def most_seqs(layout: Layout, backend: str, engine: Engine, limits: Limits) -> int:
    """Sequences that one batch of a scheduler rank may have: a pipeline shares the limit, DeepEP has a buffer."""
    most = limits.max_num_seqs // layout.pp
    return min(most, engine.overheads.low_latency_tokens) if backend == "deepep" else most


def _settings(model: ModelConfig, experts: ExpertSettings | None) -> ExpertSettings:
    """`experts` as they can be for `model`: a record of more experts says nothing about a pruned model's traffic."""
    settings = experts or ExpertSettings()
    if isinstance(settings.skew, Measured) and settings.skew.load.shape[1] != model.num_experts:
        return replace(settings, skew=None)
    return settings


def _room(variant: Variant, use: MemoryUse, layout: Layout) -> float:
    """Tokens that one scheduler rank can cache after what the variant keeps beside the model."""
    if not use.fits:
        return 0.0
    held = variant.held_bytes(layout)
    return max(0.0, use.kv_tokens - held / use.kv_bytes_per_token) if use.kv_bytes_per_token else float(use.kv_tokens)
