"""What the same GPUs generate without splitting attention from feed-forward: the best layout, decoding only."""

from __future__ import annotations

import numpy as np

from planner.cost import StepCost
from planner.disaggregation.attention_ffn import PlainPoint
from planner.engine import Engine, Limits
from planner.enumeration import backends, layouts
from planner.hardware import Cluster
from planner.layout import Layout
from planner.memory import Ledger
from planner.model import ModelConfig

_BATCHES = np.unique(np.round(np.geomspace(1, 4096, 240)))


def plain_point(model: ModelConfig, cluster: Cluster, engine: Engine, context: int, tpot_s: float) -> PlainPoint | None:
    """The layout without pipeline that generates most per GPU within `tpot_s`; None where none does."""
    ledger, best = Ledger(model, cluster.system, engine), None
    for layout in layouts(model, cluster, engine):
        if layout.pp > 1:
            continue
        for backend in backends(engine, layout):
            point = plain_layout(model, cluster, engine, layout, backend, ledger, context, tpot_s)
            if point and (best is None or point.output_tok_per_s_per_gpu > best.output_tok_per_s_per_gpu):
                best = point
    return best


def plain_layout(
    model: ModelConfig,
    cluster: Cluster,
    engine: Engine,
    layout: Layout,
    backend: str,
    ledger: Ledger,
    context: int,
    tpot_s: float,
) -> PlainPoint | None:
    """The largest batch of `layout` within `tpot_s`, its memory and, with DeepEP, its low-latency buffer."""
    cap = engine.overheads.low_latency_tokens if backend == "deepep" else int(_BATCHES[-1])
    use = ledger.use(layout, Limits(min(cap, 1024), max(256, min(cap, 1024))), backend, context)
    most = min(cap, use.kv_tokens // context)
    if use.breaking_term or most < 1:
        return None
    batch = _BATCHES[most >= _BATCHES]
    cost = StepCost(model, layout, cluster, engine, backend)
    seconds = np.asarray(cost.decode(batch, np.full_like(batch, context)).total_s)
    kept = np.flatnonzero(seconds <= tpot_s)
    if not len(kept):
        return None
    rate = batch[kept] * layout.attention_dp / seconds[kept] / layout.replica_gpus
    i = int(np.argmax(rate))
    return PlainPoint(layout, int(batch[kept][i]), float(seconds[kept][i]), float(rate[i]))
