"""Small machines: tokens per second of a model whose experts do not all fit HBM, under every residency policy.

The GPU's own work comes from `cost.StepCost`, memory from `memory.Ledger`; what lies behind HBM and who computes it
from `planner.residency`. One step is the sum over MoE layers of the policy's layer time plus everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.cost import StepCost
from planner.engine import Engine, Limits
from planner.engine import engine as load_engine
from planner.errors import DoesNotFit, InputError, PlannerError
from planner.hardware import Cluster, System
from planner.layout import Layout, check_layout
from planner.memory import Ledger
from planner.model import ModelConfig
from planner.model.config import Moe
from planner.offload import Offload, offload
from planner.residency import POLICIES, Residency, Spread, Tiers, tiers_of
from planner.residency.hosts import Host
from planner.residency.timing import LayerTime
from planner.routing import active_experts, popularity, skew_for
from planner.steptime import StepTime
from planner.units import format_bytes

PAST_ERROR = "12 published runs of KTransformers, llama.cpp, MoE-Infinity and vLLM: -42 to +21 %, half within 6 %"
"""Predicted over measured decode rate less 1; tests/test_small.py names the runs. Seven of them set the CPU's rate and
hand-over times; the other five lie -42, -32, -6, -5 and -3 % off. Engines that launch every kernel from Python
(MoE-Infinity on DeepSeek-V2-Lite) are several times slower than predicted, and so is llama.cpp without a GPU."""
_REPRESENTATIVE_LAYERS = 8
_SEED = 20250711


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs of one system and what lies behind them: host DRAM and NVMe that are free for experts [bytes].

    `dram_bytes` None takes the profile's. `gpus_per_root` GPUs share one host link.
    """

    system: System
    num_gpus: int = 1
    dram_bytes: float | None = None
    nvme_bytes: float = 0.0
    nvme_bytes_per_s: float | None = None
    host: Host | None = None
    gpus_per_root: int = 1

    @property
    def cluster(self) -> Cluster:
        """The GPUs as nodes of the system."""
        per_node = min(self.num_gpus, self.system.gpus_per_node)
        if self.num_gpus < 1 or self.num_gpus % per_node:
            raise InputError(
                f"{self.num_gpus} GPUs of {self.system.name}: use 1 to {self.system.gpus_per_node}, or whole nodes"
            )
        return Cluster(self.system, self.num_gpus // per_node, per_node)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one policy gives. Rates are tokens per second of all sequences together; `terms` are seconds of a decode
    step that add up to it, `bytes_by_tier` experts only, `other_hbm_bytes` everything else in HBM.
    """

    residency: Residency
    decode_tok_per_s: float
    prefill_tok_per_s: float
    decode_s: float
    prefill_s: float
    held: Spread
    hit_rate: float
    miss_bytes_per_token: float
    bytes_by_tier: Mapping[str, float]
    other_hbm_bytes: float
    terms: Mapping[str, float]
    bound: str
    prefill_bound: str
    origin_share: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Estimates, fastest decode first, and why the other policies are out."""

    estimates: tuple[Estimate, ...]
    rejected: Mapping[str, str]
    tiers: Tiers


def estimate(
    model: ModelConfig,
    machine: Machine,
    residency: Residency,
    *,
    context: int = 4096,
    batch: int = 1,
    chunk: int | None = None,
    engine: Engine | None = None,
) -> Estimate:
    """Tokens per second of `model` on `machine` with `batch` sequences of `context` tokens under `residency`.

    Prompts are read in chunks of `chunk` tokens, the engine's budget when None (llama.cpp calls it ubatch).
    Experts are cut over the GPUs, each fetches its slice. Raises InputError for a dense model or a system that
    cannot do what the policy asks, DoesNotFit when HBM cannot hold the rest of the model or the tiers the experts.
    """
    return _Question(model, machine, context, batch, chunk, engine or load_engine("vllm")).answer(residency)


def compare(
    model: ModelConfig,
    machine: Machine,
    policies: Sequence[Residency] | None = None,
    *,
    context: int = 4096,
    batch: int = 1,
    chunk: int | None = None,
    engine: Engine | None = None,
) -> Comparison:
    """All `policies` (every policy with its defaults when None), fastest decode first.

    Where everything fits HBM only `all-resident` is answered. Raises what `estimate` raises when no policy works.
    """
    question = _Question(model, machine, context, batch, chunk, engine or load_engine("vllm"))
    wanted = [Residency(name) for name in POLICIES] if policies is None else list(policies)
    found: list[Estimate] = []
    rejected: dict[str, str] = {}
    failure: PlannerError | None = None
    for residency in wanted:
        try:
            found.append(question.answer(residency))
        except (InputError, DoesNotFit) as error:
            rejected[residency.policy] = str(error)
            failure = error if failure is None or isinstance(error, DoesNotFit) else failure
        if found and found[0].residency.policy == "all-resident":
            break
    if failure is not None and not found:
        raise failure
    ranked = sorted(found, key=lambda e: (-e.decode_tok_per_s, e.residency.policy))
    return Comparison(tuple(ranked), rejected, question.tiers(question.free_bytes))


@dataclass(frozen=True, slots=True)
class _Phase:
    """A decode step or a prefill chunk: the GPU's own time, the experts of a layer, the tier that fetches longest."""

    step: StepTime
    layer: LayerTime
    slowest_tier: str


class _Question:
    """One model on one machine: what every policy needs is computed once."""

    def __init__(
        self, model: ModelConfig, machine: Machine, context: int, batch: int, chunk: int | None, engine: Engine
    ) -> None:
        if model.moe is None:
            raise InputError(f"{model.name} is dense: it has no experts to keep elsewhere")
        if context < 1 or batch < 1 or (chunk is not None and chunk < 1):
            raise InputError(f"context {context}, batch {batch}, chunk {chunk}: positive whole numbers are needed")
        self.model, self.machine, self.moe, self.batch = model, machine, model.moe, batch
        cluster, gpu = machine.cluster, machine.system.gpu
        layout = _layout(model, machine.num_gpus)
        self.chunk = min(context, chunk or engine.budget(gpu.hbm_bytes, gpu.arch).max_batched_tokens)
        limits = Limits(batch, self.chunk)
        use = Ledger(model, machine.system, engine).use(layout, limits, engine.moe_backends[0], context)
        kv_bytes = batch * context * use.kv_bytes_per_token
        self.other_bytes = machine.num_gpus * (use.needed_bytes - use.terms["experts"] + kv_bytes)
        self.free_bytes = machine.num_gpus * use.budget_bytes - self.other_bytes
        if self.free_bytes < 0:
            raise self._no_room(context)
        cost = StepCost(model, layout, cluster, engine)
        seqs, length = np.array([float(batch)]), np.array([float(context)])
        self.steps = {
            "decode": (batch, cost.decode(seqs, length)),
            "prefill": (self.chunk, cost.prefill(np.array([float(self.chunk)]))),
        }

    def tiers(self, hbm_bytes: float) -> Tiers:
        """Tiers with `hbm_bytes` of HBM left for experts."""
        machine = self.machine
        return tiers_of(
            machine.system,
            hbm_bytes,
            num_gpus=machine.num_gpus,
            dram_bytes=machine.dram_bytes,
            nvme_bytes=machine.nvme_bytes,
            nvme_bytes_per_s=machine.nvme_bytes_per_s,
            gpus_per_root=machine.gpus_per_root,
            host=machine.host,
        )

    def answer(self, residency: Residency) -> Estimate:
        """The estimate under one policy."""
        layers = self.model.num_moe_layers
        found = offload(self.model, residency, self.free_bytes, self.tiers)
        residency, tiers, held = found.residency, found.tiers, found.held
        decode, prefill = (self._phase(found, phase) for phase in ("decode", "prefill"))
        terms, prefill_terms = _terms(decode, layers), _terms(prefill, layers)
        step_s, chunk_s = sum(terms.values()), sum(prefill_terms.values())
        return Estimate(
            residency=residency,
            decode_tok_per_s=self.batch / step_s,
            prefill_tok_per_s=self.chunk / chunk_s,
            decode_s=step_s,
            prefill_s=chunk_s,
            held=held,
            hit_rate=float(decode.layer.hit_rate[0]),
            miss_bytes_per_token=float(decode.layer.miss_bytes[0]) * layers / self.batch,
            bytes_by_tier=held.bytes_by_tier(tiers, found.layer_bytes),
            other_hbm_bytes=self.other_bytes,
            terms=terms,
            bound=self._bound(terms, decode.slowest_tier),
            prefill_bound=self._bound(prefill_terms, prefill.slowest_tier),
            origin_share=_origins(decode, layers, residency.row.origin),
        )

    def _phase(self, found: Offload, phase: str) -> _Phase:
        tokens, step = self.steps[phase]
        layers, ones = self.model.num_moe_layers, np.ones(1)
        moe = replace(self.moe, top_k=max(1, round(self.moe.active_experts)))
        law = skew_for(moe.num_experts, "decode" if phase == "decode" and self.batch > 1 else "prefill")
        q = popularity(moe.num_experts, moe.top_k, law, _REPRESENTATIVE_LAYERS, _SEED) * moe.top_k
        active = ones * float(active_experts(tokens, q).mean())
        experts_s = np.asarray(step.terms["experts"]) / layers
        rest_s = float(np.sum(step.total_s)) / layers - float(experts_s[0])
        layer = found.layer_time(moe, phase, tokens, active, ones * tokens * moe.top_k, experts_s, rest_s)
        backing = found.tiers.backing
        seconds = found.held.shares(found.hits(moe, phase, tokens))[1:] / np.array([t.bytes_per_s for t in backing])
        slowest = backing[int(np.argmax(seconds))].name if len(seconds) else ""
        return _Phase(step, layer, slowest)

    def _bound(self, terms: Mapping[str, float], slowest_tier: str) -> str:
        """What most of a step waits for."""
        name = max(terms, key=lambda term: terms[term])
        if name != "fetching" and not (name == "experts_on_cpu" and slowest_tier == "nvme"):
            return _BOUNDS[name]
        link = self.machine.system.pcie
        named = {"nvme": "NVMe drives", "peer": f"peer link ({self.machine.system.scale_up.name})"}
        return named.get(slowest_tier, f"host link ({link.name if link else 'none'})")

    def _no_room(self, context: int) -> DoesNotFit:
        there = self.free_bytes + self.other_bytes
        return DoesNotFit(
            f"{self.model.name} does not fit even without its experts: attention, dense parts, buffers and "
            f"{self.batch} x {context:,} cached tokens need {format_bytes(self.other_bytes)}, "
            f"{format_bytes(there)} of HBM may be used",
            ("a lower precision for them (--weights int4_g32)", "fewer cached tokens (--context)", "more GPUs"),
        )


_BOUNDS = {
    "attention_and_dense": "GPU (attention and dense parts)",
    "experts_on_gpu": "GPU (experts)",
    "experts_on_cpu": "CPU and its memory",
    "hand_over": "hand-over between GPU and CPU",
}
"""Term of a step -> what binds when it is the largest; fetching is named by its tier."""


def _terms(phase: _Phase, layers: int) -> dict[str, float]:
    """Seconds of a step by what it waits for; they add up to the step."""
    total, exposed, cpu, passed = (
        layers * float(seconds[0])
        for seconds in (phase.layer.total_s, phase.layer.exposed_s, phase.layer.cpu_s, phase.layer.handover_s)
    )
    share = cpu / (cpu + passed) if cpu > 0 else 0.0
    return {
        "attention_and_dense": float(phase.step.total_s[0]) - float(np.asarray(phase.step.terms["experts"])[0]),
        "experts_on_gpu": total - exposed,
        "experts_on_cpu": exposed * share,
        "hand_over": exposed * (1 - share) if cpu > 0 else 0.0,
        "fetching": 0.0 if cpu > 0 else exposed,
    }


def _origins(phase: _Phase, layers: int, origin: str) -> dict[str, float]:
    """Share of the decode step by origin: the GPU's own, and `origin` for what the policy adds."""
    added = layers * float(phase.layer.exposed_s[0])
    own = sum(_terms(phase, layers).values()) - added
    share = {name: value * own / (own + added) for name, value in phase.step.origin_share().items()}
    share[origin] = share.get(origin, 0.0) + added / (own + added)
    return {name: value for name, value in share.items() if value > 0}


def _layout(model: ModelConfig, num_gpus: int) -> Layout:
    """Tensor parallelism over all GPUs; experts whole where their width cannot be cut."""
    moe: Moe | None = model.moe
    cut = moe is not None and moe.expert_width % num_gpus == 0
    layout = Layout(tp=num_gpus, moe_tp=num_gpus) if cut else Layout(tp=num_gpus, ep=num_gpus)
    check_layout(model, layout)
    return layout
