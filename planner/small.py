"""Small machines: tokens per second of a model whose experts do not all fit HBM, under every residency policy.

The GPU's own work comes from `cost.StepCost`, the expert layers from its `RoutedCost` as in the event loop, memory from
`memory.Ledger`. One step is the sum over MoE layers of the policy's layer time plus everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.cost import StepCost
from planner.engine import Engine, Limits
from planner.engine import engine as load_engine
from planner.errors import DoesNotFit, InputError, PlannerError
from planner.experts import AS_SERVED, ExpertSettings
from planner.hardware import Cluster, System
from planner.layout import Layout, check_layout
from planner.memory import Ledger
from planner.model import ModelConfig
from planner.model.config import Moe
from planner.offload import Offload, moe_layers, offload
from planner.residency import POLICIES, REUSES, Residency, Spread, Tiers, tiers_of
from planner.residency.hosts import Host
from planner.residency.timing import LayerTime
from planner.steptime import StepTime
from planner.units import format_bytes

PAST_ERROR = (
    "13 published runs of KTransformers, llama.cpp, MoE-Infinity and vLLM: -42 to +25 %, half within 6 %; eight of "
    "them set the CPU's rates and hand-over time, the other five lie -42, -32, -6, -5 and -3 % off"
)
"""Predicted over measured decode rate less 1; tests/test_small.py names the runs. Engines that launch every kernel from
Python (MoE-Infinity on DeepSeek-V2-Lite) are several times slower than predicted."""


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs of one node and what lies behind them: DRAM, NVMe and HBM of other GPUs that are free for experts [bytes].

    `dram_bytes` and `host` None take the profile's. `gpus_per_root` GPUs share one host link.
    """

    system: System
    num_gpus: int = 1
    dram_bytes: float | None = None
    nvme_bytes: float = 0.0
    nvme_bytes_per_s: float | None = None
    host: Host | None = None
    gpus_per_root: int = 1
    peer_bytes: float = 0.0

    @classmethod
    def of(cls, system: System, num_gpus: int, experts: ExpertSettings) -> Machine:
        """`num_gpus` GPUs with what `experts` says of the host."""
        return cls(
            system,
            num_gpus,
            experts.dram_bytes,
            experts.nvme_bytes,
            experts.nvme_bytes_per_s,
            experts.host,
            experts.gpus_per_root,
            experts.peer_bytes,
        )

    @property
    def cluster(self) -> Cluster:
        """The GPUs as nodes of the system: one, or several where there is no host to share."""
        per_node = min(self.num_gpus, self.system.gpus_per_node)
        if self.num_gpus < 1 or (self.num_gpus > per_node and self.system.pcie is not None):
            raise InputError(
                f"{self.num_gpus} GPUs of {self.system.name}: experts outside HBM are modelled on one node and its "
                f"host. Use 1 to {self.system.gpus_per_node}."
            )
        if self.num_gpus % per_node:
            raise InputError(f"{self.num_gpus} GPUs of {self.system.name}: use whole nodes of {per_node}")
        return Cluster(self.system, self.num_gpus // per_node, per_node)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one policy gives. Rates are tokens per second of all sequences together; `terms` are seconds of a decode
    step that add up to it, `bytes_by_tier` experts only, `other_hbm_bytes` everything else in HBM.

    `miss_bytes_per_token` are fetched, experts of `cpu_bytes_per_token` computed on the CPU. `tok_per_s_by_reuse` is
    the decode rate under every preset of reuse, empty where the past does not decide what HBM holds.
    """

    residency: Residency
    decode_tok_per_s: float
    prefill_tok_per_s: float
    decode_s: float
    prefill_s: float
    held: Spread
    hit_rate: float
    miss_bytes_per_token: float
    cpu_bytes_per_token: float
    bytes_by_tier: Mapping[str, float]
    other_hbm_bytes: float
    terms: Mapping[str, float]
    bound: str
    prefill_bound: str
    origin_share: Mapping[str, float]
    tok_per_s_by_reuse: Mapping[str, float]


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
    experts: ExpertSettings = AS_SERVED,
) -> Estimate:
    """Tokens per second of `model` on `machine` with `batch` sequences of `context` tokens under `residency`.

    Prompts are read in chunks of `chunk` tokens, the engine's budget when None (llama.cpp calls it ubatch). Of
    `experts` popularity, experts per token and capacity limit count. Experts are cut over the GPUs, each fetches its
    slice. Raises InputError for a dense model or a system that cannot do what the policy asks, DoesNotFit when HBM
    cannot hold the rest of the model or the tiers the experts.
    """
    return _Question(model, machine, context, batch, chunk, engine or load_engine("vllm"), experts).answer(residency)


def compare(
    model: ModelConfig,
    machine: Machine,
    policies: Sequence[Residency] | None = None,
    *,
    context: int = 4096,
    batch: int = 1,
    chunk: int | None = None,
    engine: Engine | None = None,
    experts: ExpertSettings = AS_SERVED,
) -> Comparison:
    """All `policies` (every policy with its defaults when None), fastest decode first.

    Where everything fits HBM only `all-resident` is answered. Raises what `estimate` raises when no policy works.
    """
    question = _Question(model, machine, context, batch, chunk, engine or load_engine("vllm"), experts)
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
    """A decode step or a prefill chunk: the GPU's own time, the experts of each of `layers`, the slowest tier."""

    step: StepTime
    layer: LayerTime
    layers: int
    slowest_tier: str


class _Question:
    """One model on one machine: what every policy needs is computed once."""

    def __init__(
        self,
        model: ModelConfig,
        machine: Machine,
        context: int,
        batch: int,
        chunk: int | None,
        engine: Engine,
        experts: ExpertSettings,
    ) -> None:
        if model.moe is None:
            raise InputError(f"{model.name} is dense: it has no experts to keep elsewhere")
        if context < 1 or batch < 1 or (chunk is not None and chunk < 1):
            raise InputError(f"context {context}, batch {batch}, chunk {chunk}: positive whole numbers are needed")
        self.model, self.machine, self.batch, self.experts = model, machine, batch, experts
        self.moe = experts.router(model.moe)
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
        # One sequence on a card of few multiprocessors reaches its rooflines: published rates agree without the factor.
        plain = replace(engine, calibrations=replace(engine.fitted, data_sheets=1.0))
        self._cost = (model, layout, cluster, plain, "allgather_reducescatter", experts)
        cost, seqs, length = StepCost(*self._cost), np.array([float(batch)]), np.array([float(context)])
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
            peer_bytes=machine.peer_bytes,
            gpus_per_root=machine.gpus_per_root,
            host=machine.host,
        )

    def answer(self, residency: Residency) -> Estimate:
        """The estimate under one policy."""
        found = offload(self.model, residency, self.free_bytes, self.tiers, self.experts.skew)
        decode, prefill = (self._phase(found, phase) for phase in ("decode", "prefill"))
        terms, prefill_terms = _terms(decode), _terms(prefill)
        step_s, chunk_s = sum(terms.values()), sum(prefill_terms.values())
        miss_bytes, cpu_bytes = (
            float(values.mean()) * decode.layers / self.batch
            for values in (decode.layer.miss_bytes, decode.layer.cpu_bytes)
        )
        return Estimate(
            residency=found.residency,
            decode_tok_per_s=self.batch / step_s,
            prefill_tok_per_s=self.chunk / chunk_s,
            decode_s=step_s,
            prefill_s=chunk_s,
            held=found.held,
            hit_rate=float(decode.layer.hit_rate.mean()),
            miss_bytes_per_token=miss_bytes,
            cpu_bytes_per_token=cpu_bytes,
            bytes_by_tier=found.bytes_by_tier(),
            other_hbm_bytes=self.other_bytes,
            terms=terms,
            bound=self._bound(terms, decode.slowest_tier),
            prefill_bound=self._bound(prefill_terms, prefill.slowest_tier),
            origin_share=_origins(decode, found.residency.row.origin),
            tok_per_s_by_reuse=self._by_reuse(found),
        )

    def _by_reuse(self, found: Offload) -> dict[str, float]:
        """Decode rate under every preset of reuse that was counted somewhere."""
        if found.residency.row.choice != "lru":
            return {}
        presets = {name: replace(found, residency=replace(found.residency, reuse=REUSES[name])) for name in _COUNTED}
        return {n: self.batch / sum(_terms(self._phase(f, "decode")).values()) for n, f in presets.items()}

    def _phase(self, found: Offload, phase: str) -> _Phase:
        tokens, step = self.steps[phase]
        layer = StepCost(*self._cost, found).routed.layer(phase, tokens)
        backing = found.tiers.backing
        seconds = found.held.shares(found.hits(self.moe, phase, tokens))[1:] / np.array(
            [t.bytes_per_s for t in backing]
        )
        slowest = backing[int(np.argmax(seconds))].name if len(seconds) else ""
        return _Phase(step, layer, moe_layers(self.model, phase), slowest)

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


_COUNTED = ("records", "decode-reports")
"""Presets of reuse between which decode rates are given as a range."""


def _terms(phase: _Phase) -> dict[str, float]:
    """Seconds of a step by what it waits for; they add up to the step."""
    layer, rest_s = phase.layer, float(np.sum(phase.step.total_s)) - float(np.sum(phase.step.terms["experts"]))
    busy = layer.cpu_s + layer.handover_s
    on_cpu = layer.exposed_s * layer.cpu_s / np.maximum(busy, 1e-30)
    seconds = {
        "experts_on_gpu": layer.total_s - layer.exposed_s,
        "experts_on_cpu": on_cpu,
        "hand_over": np.where(busy > 0, layer.exposed_s - on_cpu, 0.0),
        "fetching": np.where(busy > 0, 0.0, layer.exposed_s),
    }
    return {"attention_and_dense": rest_s} | {n: phase.layers * float(s.mean()) for n, s in seconds.items()}


def _origins(phase: _Phase, origin: str) -> dict[str, float]:
    """Share of the decode step by origin: the GPU's own, and `origin` for what the policy adds."""
    added = phase.layers * float(phase.layer.exposed_s.mean())
    own = sum(_terms(phase).values()) - added
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
