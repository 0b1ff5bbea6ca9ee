"""Replicas of one demand on one system, as asked or with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from planner.compare.question import Demand, Offer, Question
from planner.errors import PlannerError
from planner.experts import ExpertSettings
from planner.hardware import Cluster
from planner.layout import Layout
from planner.model import ModelConfig
from planner.model.precision import override
from planner.recommend import default_kv_formats
from planner.sizing import Anchor, Replica, demand_of, fewest, gpus_needed, replicas
from planner.workload import Workload

_FEW_NODES = 4


@dataclass(frozen=True, slots=True)
class Estimator:
    """Replicas of `demand` on what `offer` offers."""

    question: Question
    demand: Demand
    experts: ExpertSettings
    offer: Offer

    @property
    def widest(self) -> Cluster:
        """As many nodes as the largest replica may take: a scale-up domain, or a few nodes beyond it."""
        offered = self.offer.cluster
        per_node = offered.system.gpus_per_node if self.offer.is_open else offered.gpus_per_node
        few = _FEW_NODES if offered.system.scale_out is not None else 1
        nodes = max(few, -(-offered.system.scale_up.size // per_node))
        return replace(
            offered, nodes=nodes if self.offer.is_open else min(nodes, offered.nodes), gpus_per_node=per_node
        )

    def replicas(
        self,
        model: ModelConfig | None = None,
        workload: Workload | None = None,
        cluster: Cluster | None = None,
        experts: ExpertSettings | None = None,
        only: Callable[[Layout], bool] = lambda layout: True,
    ) -> list[Replica]:
        """Every kind of replica with what is given instead of what was asked; none when the system cannot run any."""
        model, offered = model or self.demand.model, cluster or self.widest
        formats = self.question.kv_formats or default_kv_formats(model, offered)
        variants = [override(model, kv=kv) for kv in formats]
        try:
            return replicas(
                variants,
                offered,
                self.question.engine,
                workload or self.demand.workload,
                experts or self.experts,
                only,
            )
        except PlannerError:
            return []

    def fewest(self, found: list[Replica], anchor: Anchor) -> tuple[int, Replica] | None:
        """Fewest GPUs for the demand over kinds, and the kind; None when none can."""
        if not found:
            return None
        workload = self.demand.workload
        gpus, carried = gpus_needed(found, demand_of(workload), self.demand.slo, workload.mean_output_tokens, anchor)
        least = int(fewest(gpus))
        best = max((i for i in range(len(found)) if gpus[i] == least), key=lambda i: carried[i] / found[i].num_gpus)
        return None if least < 0 else (least, found[best])
