"""When a model does not fit in HBM: every residency policy on every offered cluster, and deployments of the best."""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.deployment import Deployment, deploy
from planner.engine import Engine, Limits
from planner.errors import PlannerError
from planner.experts import ExpertSettings
from planner.hardware import Cluster
from planner.layout import Layout
from planner.model import ModelConfig
from planner.residency import POLICIES, Residency
from planner.small import Comparison, Estimate, Machine, compare
from planner.workload import Workload

_TRIED = 2
"""Policies per cluster that are simulated: the fastest in decode of those that an engine offers and that keep up."""
_MOST_SEQUENCES = 16
"""Sequences at once: experts from outside HBM serve few users, and their caches take the room of experts."""


@dataclass(frozen=True, slots=True)
class Outside:
    """What residency policies give on one node of `cluster`, and why none works where `comparison` is None."""

    cluster: Cluster
    batch: int
    context: int
    comparison: Comparison | None
    reason: str
    deployments: tuple[Deployment, ...]


def outside(
    model: ModelConfig, cluster: Cluster, workload: Workload, engine: Engine, experts: ExpertSettings
) -> Outside:
    """Policies for `model` on the GPUs of one node, one replica per node.

    The policy of `experts` alone if it names one. A context is the mean prompt and answer of `workload`. Only what an
    engine offers becomes a deployment, unless the user named it.
    """
    context = max(1, int(workload.mean_prompt_tokens + workload.mean_output_tokens))
    batch = min(_MOST_SEQUENCES, -(-workload.arrivals.concurrency // cluster.nodes) or _MOST_SEQUENCES)
    machine = Machine.of(cluster.system, cluster.gpus_per_node, experts)
    named = experts.residency
    asked = [named] if named else [Residency(name, reuse=experts.reuse) for name in POLICIES]
    try:
        found = compare(model, machine, asked, context=context, batch=batch, engine=engine, experts=experts)
    except PlannerError as error:
        return Outside(cluster, batch, context, None, str(error), ())
    usable = [e for e in found.estimates if e.residency.row.is_offered or named is not None]
    ranked = [e.residency for e in usable if _keeps_up(e, workload, cluster.nodes)][:_TRIED]
    deployments = (
        _deployed(model, cluster, workload, engine, replace(experts, residency=r), batch, context) for r in ranked
    )
    return Outside(cluster, batch, context, found, "", tuple(d for d in deployments if d is not None))


def _keeps_up(answer: Estimate, workload: Workload, nodes: int) -> bool:
    """The estimate serves the demanded rate when prompts and answers take turns; users in a closed loop wait."""
    prompt_s = workload.mean_prompt_tokens / answer.prefill_tok_per_s
    answer_s = workload.mean_output_tokens / answer.decode_tok_per_s
    return workload.arrivals.concurrency > 0 or workload.arrivals.rate_per_s * (prompt_s + answer_s) <= nodes


def _deployed(
    model: ModelConfig,
    cluster: Cluster,
    workload: Workload,
    engine: Engine,
    experts: ExpertSettings,
    batch: int,
    context: int,
) -> Deployment | None:
    gpus, gpu = cluster.gpus_per_node, cluster.system.gpu
    budget = engine.budget(gpu.hbm_bytes, gpu.arch).max_batched_tokens
    # One request must fit the cache whole, however few run at once.
    longest = workload.max_prompt_tokens + workload.max_output_tokens
    room = max(context, -(-longest // batch))
    layout = Layout(tp=gpus, moe_tp=gpus, replicas=cluster.nodes)
    try:
        return deploy(model, cluster, layout, engine, Limits(batch, max(budget, batch)), "all_reduce", room, experts)
    except PlannerError:
        return None
