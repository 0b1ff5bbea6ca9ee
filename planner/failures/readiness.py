"""Time until one more replica serves: machine, weights, compilation, graphs, warm-up (handbook serving 8.4)."""

from __future__ import annotations

from dataclasses import dataclass

from planner.engine import Engine, Limits
from planner.errors import InputError
from planner.failures.recovery import loader_rate, network_rate, recovery
from planner.failures.settings import RecoverySettings
from planner.hardware import Cluster
from planner.layout import Layout
from planner.memory import MemoryUse
from planner.model import ModelConfig
from planner.residency.tiers import NVME_BYTES_PER_S, PEER_SHARE, link_bytes_per_s
from planner.units import format_bytes


@dataclass(frozen=True, slots=True)
class Term:
    """One part of the start of a replica [s] and what it rests on."""

    name: str
    seconds: float
    source: str


@dataclass(frozen=True, slots=True)
class Readiness:
    """What passes, one after the other, before a replica answers; `weight_bytes` is what its GPUs load in all."""

    terms: tuple[Term, ...]
    weight_bytes: float

    @property
    def total_s(self) -> float:
        """From the decision to start a replica to its first request [s]."""
        return sum(term.seconds for term in self.terms)


def readiness(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    engine: Engine,
    limits: Limits,
    memory: MemoryUse,
    settings: RecoverySettings,
) -> Readiness:
    """Time to ready of one replica of `layout`; all its GPUs start at once.

    Weights take the longer of filling one GPU through the engine's loader and reading what a node needs at the rate
    of the node; nodes load side by side. Raises InputError where weights cannot come from the wanted place.
    """
    facts = recovery(engine)
    graphs = engine.num_graphs(limits.max_num_seqs, cluster.system.gpu.arch)
    per_stage = -(-model.num_layers // layout.pp)
    capture_s = graphs * per_stage * facts.graph_s_per_layer.value
    terms = (
        Term("provision", settings.provision_s, "--provision" if settings.provision_s else "not counted: --provision"),
        _weights(model, cluster, layout, memory, settings),
        Term("compile", facts.compile.value, facts.compile.source),
        Term("graphs", capture_s, f"{graphs} sizes x {per_stage} layers: {facts.graph_s_per_layer.source}"),
        Term("warm_up", facts.warm_up.value, facts.warm_up.source),
    )
    return Readiness(terms, memory.weight_bytes * layout.replica_gpus)


def _weights(
    model: ModelConfig, cluster: Cluster, layout: Layout, memory: MemoryUse, settings: RecoverySettings
) -> Term:
    """Loading of the weights; a node reads what its GPUs hold, what several of them hold once."""
    gpu_bytes = memory.weight_bytes
    gpus = min(layout.replica_gpus, cluster.gpus_per_node)
    node_bytes = min(model.weight_bytes, gpu_bytes * gpus)
    loader, system = loader_rate(), cluster.system
    if settings.load_from == "peer":
        return _from_peer(cluster, gpu_bytes)
    if settings.load_from == "dram":
        rate = loader.value if system.pcie is None else min(loader.value, link_bytes_per_s(system.pcie))
        return Term("weights", gpu_bytes / rate, f"{format_bytes(gpu_bytes)} per GPU: {loader.source}")
    if settings.load_from == "network":
        network = network_rate()
        return Term("weights", gpu_bytes / network.value, f"{format_bytes(gpu_bytes)} per GPU: {network.source}")
    node_rate, whose = NVME_BYTES_PER_S, "one NVMe drive per node, handbook serving 5B.2"
    if settings.load_from == "rate":
        assert settings.node_bytes_per_s is not None
        node_rate, whose = settings.node_bytes_per_s, "--load-from"
    elif system.nvme_bytes_per_s:
        node_rate, whose = system.nvme_bytes_per_s, system.source("node.nvme_bytes_per_s") or system.name
    if node_bytes / node_rate >= gpu_bytes / loader.value:
        why = f"{format_bytes(node_bytes)} per node at {format_bytes(node_rate)}/s: {whose}"
        return Term("weights", node_bytes / node_rate, why)
    return Term("weights", gpu_bytes / loader.value, f"{format_bytes(gpu_bytes)} per GPU: {loader.source}")


def _from_peer(cluster: Cluster, gpu_bytes: float) -> Term:
    """Every GPU copies from its twin in a running replica, over the network where there is one."""
    link = cluster.system.scale_out or cluster.system.scale_up
    if not link.bytes_per_s > 0:
        raise InputError(f"--load-from peer: no link between GPUs of {cluster.name} is on record. Use nvme or dram.")
    rate = PEER_SHARE * link.bytes_per_s
    source = (
        f"{format_bytes(gpu_bytes)} per GPU at 0.7 of {link.name} (0.65 to 0.75, kernels 10), from a running replica"
    )
    return Term("weights", gpu_bytes / rate, source)
