"""Residency policies: which experts HBM keeps, and what happens to the others.

A policy is a row of `POLICIES`; a new one needs the choice of experts, whether slower tiers keep copies, and a
function of `timing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from planner.errors import DoesNotFit, InputError, nearest
from planner.residency import timing
from planner.residency.hits import Choice, hit_curve
from planner.residency.hosts import HANDOVER_S
from planner.residency.reuse import REUSES, Reuse
from planner.residency.spread import Spread, spread
from planner.residency.tiers import Tiers
from planner.residency.timing import LayerTime, LayerWork
from planner.residency.traces import Floats
from planner.routing.laws import Law

PREFETCH_ACCURACY = 0.85
"""Middle of the 80 to 90 % of a published speculative prefetcher (handbook routing 5)."""
KTRANSFORMERS_FETCH_TOKENS = 400
"""Chunk from which KTransformers streams whole layers to the GPU (--kt-gpu-prefill-token-threshold of its guide for
RTX 4090s, doc/en/Kimi-K2-Thinking-Native.md @1aef382; its tuner starts from 4,096). Decode stays on the CPU."""
LLAMA_FETCH_TOKENS = 32
"""Batch from which llama.cpp copies weights to the GPU instead (GGML_OP_OFFLOAD_MIN_BATCH, its default)."""


@dataclass(frozen=True, slots=True)
class Policy:
    """`choice` of resident experts, whether slower tiers are `is_inclusive`, who computes the others and how long.

    `engines` are those that offer it; without `is_offered` none does, and it only shows what could be. With
    `keeps_copies` every socket of the host has the experts, if the memory suffices.
    """

    choice: Choice
    is_inclusive: bool
    uses_cpu: bool
    origin: str
    seconds: Callable[[Residency, LayerWork, Tiers, Spread, Floats], LayerTime] = field(compare=False)
    meaning: str
    engines: str
    is_offered: bool = True
    keeps_copies: bool = False


@dataclass(frozen=True, slots=True)
class Residency:
    """A policy and its settings. `resident_experts` per layer stay in HBM; None: as many as fit.

    `reuse` is how routing repeats itself; `accuracy` and `lookahead_layers` are of `prefetch`. Raises InputError on an
    unknown policy or an impossible setting.
    """

    policy: str = "all-resident"
    resident_experts: int | None = None
    reuse: Reuse = REUSES["records"]
    accuracy: float = PREFETCH_ACCURACY
    lookahead_layers: int = 1

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"residency policy {self.policy!r} is unknown: {nearest(self.policy, POLICIES)}")
        if not 0.0 <= self.accuracy <= 1.0:
            raise InputError(f"prefetch accuracy {self.accuracy:g} is no share from 0 to 1")
        if self.lookahead_layers < 1:
            raise InputError(f"look-ahead of {self.lookahead_layers} layers: at least 1 is needed")
        if self.resident_experts is not None and self.resident_experts < 0:
            raise InputError(f"{self.resident_experts} resident experts per layer: 0 or more are needed")
        if self.resident_experts is not None and self.policy == "all-resident":
            raise InputError(f"all-resident keeps every expert: leave {self.resident_experts} resident experts away")

    @property
    def row(self) -> Policy:
        """The policy's row of `POLICIES`."""
        return POLICIES[self.policy]

    def spread(self, tiers: Tiers, layer_bytes: float, num_experts: int, what: str = "the experts") -> Spread:
        """Experts per layer in each tier; `layer_bytes` is one expert of every layer together. See `spread.spread`."""
        copies = tiers.cpu.num_sockets if tiers.cpu is not None and self.row.keeps_copies else 1
        found = spread(
            tiers,
            layer_bytes,
            num_experts,
            resident=self.resident_experts,
            is_inclusive=self.row.is_inclusive,
            copies=copies,
            what=what,
        )
        if self.policy == "all-resident" and found.resident < num_experts:
            fitting = f"only {found.resident} of {num_experts} experts per layer fit HBM"
            raise DoesNotFit(
                f"{what}: {fitting}", ("another policy: lru, prefetch, cpu", "a lower precision", "more GPUs")
            )
        return found

    def hits(
        self, num_experts: int, top_k: int, tokens: int, skew: Law | str, hot_skew: Law | str
    ) -> tuple[float, ...]:
        """Hit rate by capacity for steps of `tokens` tokens of traffic `skew`.

        Static choices were learned on other traffic: they see the popularity of `hot_skew`.
        """
        law = hot_skew if self.row.choice == "static" else skew
        reuse = self.reuse if self.row.choice == "lru" else None
        return hit_curve(self.row.choice, num_experts, top_k, tokens, law, reuse)


def layer_seconds(
    residency: Residency, tiers: Tiers, held: Spread, curve: tuple[float, ...], work: LayerWork
) -> LayerTime:
    """Expert part of one layer under `residency`: arrays of the shape of `work`.

    `held` says what lies where (`Residency.spread`), `curve` how often it is needed (`Residency.hits`).
    """
    if held.resident == held.num_experts:
        return timing.all_resident(work)
    return residency.row.seconds(residency, work, tiers, held, held.shares(curve))


def _demand(residency: Residency, work: LayerWork, tiers: Tiers, held: Spread, shares: Floats) -> LayerTime:
    return timing.demand(work, tiers, shares)


def _stream(residency: Residency, work: LayerWork, tiers: Tiers, held: Spread, shares: Floats) -> LayerTime:
    return timing.stream(work, tiers, held)


def _prefetch(residency: Residency, work: LayerWork, tiers: Tiers, held: Spread, shares: Floats) -> LayerTime:
    return timing.prefetch(work, tiers, shares, residency.accuracy, residency.lookahead_layers)


def _cpu(residency: Residency, work: LayerWork, tiers: Tiers, held: Spread, shares: Floats) -> LayerTime:
    return timing.cpu(work, tiers, shares, held.copies, HANDOVER_S, KTRANSFORMERS_FETCH_TOKENS)


def _cpu_or_fetch(residency: Residency, work: LayerWork, tiers: Tiers, held: Spread, shares: Floats) -> LayerTime:
    return timing.cpu_or_fetch(work, tiers, shares, held.copies, HANDOVER_S)


def _cpu_layers(residency: Residency, work: LayerWork, tiers: Tiers, held: Spread, shares: Floats) -> LayerTime:
    return timing.cpu_layers(work, tiers, shares, LLAMA_FETCH_TOKENS)


POLICIES: dict[str, Policy] = {
    "all-resident": Policy("uniform", False, False, "roofline", _demand, "every expert in HBM", "every engine"),
    "static-hot": Policy(
        "static",
        False,
        False,
        "roofline",
        _demand,
        "the hottest experts in HBM, others on demand",
        "no engine (KTransformers and SGLang compute the others on the CPU)",
        is_offered=False,
    ),
    "lru": Policy(
        "lru",
        True,
        False,
        "roofline",
        _demand,
        "recently used experts in HBM, others on demand",
        "SGLang (paged experts)",
    ),
    "lfu": Policy(
        "lfu",
        True,
        False,
        "roofline",
        _demand,
        "often used experts in HBM, others on demand",
        "no engine (research systems)",
        is_offered=False,
    ),
    "stream": Policy(
        "uniform",
        False,
        False,
        "roofline",
        _stream,
        "some layers in HBM, others streamed every step",
        "vLLM (cpu_offload_gb, prefetch offload)",
    ),
    "prefetch": Policy(
        "lru", True, False, "roofline", _prefetch, "recently used experts in HBM, others foreseen", "MoE-Infinity"
    ),
    "cpu": Policy(
        "static",
        False,
        True,
        "extrapolated",
        _cpu,
        "hot experts in HBM, CPU computes others",
        "KTransformers, SGLang (kt mode)",
        keeps_copies=True,
    ),
    "cpu-or-fetch": Policy(
        "static",
        False,
        True,
        "extrapolated",
        _cpu_or_fetch,
        "hot experts in HBM, others computed by the CPU or fetched, the faster of the two",
        "no engine (Fiddler, research code for Mixtral)",
        is_offered=False,
    ),
    "cpu-layers": Policy(
        "uniform",
        False,
        True,
        "extrapolated",
        _cpu_layers,
        "some layers in HBM, CPU computes others",
        "llama.cpp (--n-cpu-moe)",
    ),
}
"""Name -> policy. `origin` says what the seconds rest on: data-sheet links (roofline), or a CPU rate fitted on other
machines (extrapolated). Engines: handbook serving 5B.1."""
