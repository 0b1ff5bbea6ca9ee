"""Replicas of one demand on one system, as asked or with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from planner.compare.question import Demand, Question
from planner.errors import PlannerError
from planner.experts import ExpertSettings
from planner.hardware import Cluster, System
from planner.layout import Layout
from planner.model import ModelConfig
from planner.model.precision import override
from planner.recommend import default_kv_formats
from planner.sizing import Anchor, Replica, demand_of, fewest, gpus_needed, replicas
from planner.workload import Workload

_FEW_NODES = 4


@dataclass(frozen=True, slots=True)
class Estimator:
    """`system` is a cluster of any size; replicas are looked for on `most_nodes` of its nodes."""

    question: Question
    demand: Demand
    experts: ExpertSettings
    system: Cluster

    @property
    def widest(self) -> Cluster:
        """As many nodes as the largest replica may take: a scale-up domain, or a few nodes beyond it."""
        per_node = self.system.system.gpus_per_node
        domain = -(-self.system.system.scale_up.size // per_node)
        return replace(self.system, nodes=max(_FEW_NODES, domain), gpus_per_node=per_node)

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
        gpus, carried = gpus_needed(
            found, demand_of(workload), self.demand.slo, workload.mean_output_tokens, anchor
        )
        least = int(fewest(gpus))
        best = max((i for i in range(len(found)) if gpus[i] == least), key=lambda i: carried[i] / found[i].num_gpus)
        return None if least < 0 else (least, found[best])

    def with_domain(self, size: int) -> Cluster:
        """`widest` with scale-up domains of `size` GPUs."""
        system = self.system.system
        return self._on(replace(system, scale_up=replace(system.scale_up, size=size)))

    def with_network(self, factor: float) -> Cluster:
        """`widest` with `factor` times the bytes per second of each network card."""
        system = self.system.system
        card = system.scale_out
        return self._on(
            system if card is None else replace(system, scale_out=replace(card, bytes_per_s=factor * card.bytes_per_s))
        )

    def _on(self, system: System) -> Cluster:
        return replace(self.widest, system=system)
