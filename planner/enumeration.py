"""What a deployment can choose among: layouts of one replica, exchange backends, batch limits."""

from __future__ import annotations

from collections.abc import Iterator

from planner.engine import Engine
from planner.hardware import Cluster
from planner.layout import Layout, layout_problem
from planner.model import ModelConfig

MAX_SEQS = (8, 16, 32, 64, 128, 256, 512, 1024)
BATCHED_TOKENS = (2048, 4096, 8192, 16384)
MIN_BATCHED_TOKENS = 256
PIPELINES = (1, 2, 3, 4, 8)
"""Pipeline depths engines are run with; 3 serves clusters of three nodes."""


def layouts(model: ModelConfig, cluster: Cluster, engine: Engine) -> Iterator[Layout]:
    """Valid layouts of one replica on up to all GPUs of `cluster`.

    Replicas inside a node may have any size that divides it, larger ones take whole nodes where there is a network
    between them; tensor parallelism stays inside the scale-up domain.
    """
    node, domain = cluster.gpus_per_node, cluster.scale_up_gpus
    sizes = [s for s in range(1, cluster.num_gpus + 1) if (node % s == 0 if s <= node else s % node == 0)]
    reachable = cluster.num_gpus if cluster.system.scale_out is not None else domain
    for gpus in (size for size in sizes if size <= reachable):
        for pp in (d for d in PIPELINES if gpus % d == 0):
            stage = gpus // pp
            for tp in (d for d in _divisors(stage) if d <= domain):
                for ep in _expert_degrees(model, engine, stage):
                    layout = Layout(tp, pp, ep, stage // tp, stage // ep)
                    attends_alone = layout.attention_dp == 1 or (model.moe and engine.moe_backends)
                    if attends_alone and layout_problem(model, layout) is None:
                        yield layout


def backends(engine: Engine, layout: Layout) -> tuple[str, ...]:
    """How ranks of `layout` can meet at the experts under `engine`."""
    if layout.attention_dp == 1:
        return ("all_reduce",)
    whole_experts = layout.ep > 1 and layout.moe_tp == 1  # DeepEP sends tokens to ranks that hold whole experts
    return engine.moe_backends if whole_experts else engine.moe_backends[:1]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _expert_degrees(model: ModelConfig, engine: Engine, stage: int) -> list[int]:
    if model.moe is None or engine.expert_parallel == "none":
        return [1]
    return sorted({1, stage}) if engine.expert_parallel == "all_or_none" else _divisors(stage)
