"""Does it fit, on how few GPUs, with how many cached tokens, and which term breaks it: the most asked question."""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.engine import Engine, Limits
from planner.enumeration import MIN_BATCHED_TOKENS, layouts
from planner.errors import InputError
from planner.hardware import Cluster, System
from planner.layout import Layout
from planner.memory import Ledger, MemoryUse
from planner.model import ModelConfig

MAX_GPUS = 1024
"""Largest replica that is tried; one copy of a model on more GPUs than this is not a serving layout."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Answer of `fit`: the roomiest layout of the smallest replica that fits, or of the last one that does not.

    Layouts without a pipeline come first. `alternatives` are the roomiest fitting layouts of the other families at
    the same GPU count, `smaller` is the roomiest layout of the next smaller GPU count, which shows what breaks there.
    """

    fits: bool
    layout: Layout
    use: MemoryUse
    limits: Limits
    context_tokens: int
    alternatives: tuple[tuple[Layout, MemoryUse], ...]
    smaller: tuple[Layout, MemoryUse] | None

    @property
    def num_gpus(self) -> int:
        """GPUs of the layout shown."""
        return self.layout.replica_gpus

    @property
    def kv_tokens(self) -> int:
        """Cached tokens of one replica, all attention-DP ranks together."""
        return self.use.kv_tokens * self.layout.attention_dp

    @property
    def breaking_term(self) -> str | None:
        """Term that overflows on the next smaller GPU count (or here, when nothing fits)."""
        if not self.fits:
            return self.use.breaking_term
        return self.smaller[1].breaking_term if self.smaller else None

    @property
    def concurrent_requests(self) -> int:
        """Sequences of `context_tokens` that can run at once on one replica."""
        per_rank = self.use.kv_tokens // max(1, self.context_tokens)
        return self.layout.attention_dp * min(per_rank, self.limits.max_num_seqs)


def fit(
    model: ModelConfig,
    system: System,
    engine: Engine,
    *,
    context_tokens: int = 4096,
    num_gpus: int | None = None,
    limits: Limits | None = None,
) -> Fit:
    """Smallest replica of `model` on `system` that holds its weights and one sequence of `context_tokens`.

    With `num_gpus` only that count is tried. InputError on a non-positive or unreachable count.
    """
    limits = limits or limits_for(engine, system)
    ledger = Ledger(model, system, engine)
    smaller: tuple[Layout, MemoryUse] | None = None
    for size in _sizes(system, num_gpus):
        if num_gpus is None and size > 1 and model.weight_bytes / size > system.gpu.hbm_bytes:
            continue
        tried = _by_room(ledger, size, limits, context_tokens)
        if not tried:
            continue
        layout, use = tried[0]
        if use.fits:
            return Fit(True, layout, use, limits, context_tokens, _other_families(tried), smaller)
        smaller = (layout, use)
    if smaller is None:
        raise InputError(
            f"no valid layout of {model.name} uses exactly {num_gpus} GPUs of {system.name}; try 1, 2, 4 or 8"
        )
    return Fit(False, *smaller, limits, context_tokens, (), None)


def limits_for(
    engine: Engine,
    system: System,
    max_num_seqs: int | None = None,
    max_batched_tokens: int | None = None,
    attention_dp: int = 1,
) -> Limits:
    """The engine's default limits per rank on `system`, with the given ones in their place."""
    budget = engine.budget(system.gpu.hbm_bytes, system.gpu.arch)
    share = attention_dp if engine.divides_prefill_by_attention_dp else 1
    tokens = max_batched_tokens or max(MIN_BATCHED_TOKENS, budget.max_batched_tokens // share)
    return Limits(max_num_seqs or min(budget.max_num_seqs, tokens), tokens)


def _sizes(system: System, num_gpus: int | None) -> list[int]:
    """GPU counts to try, ascending: divisors of a node, then whole nodes as far as the system has a network."""
    node = system.gpus_per_node
    reachable = MAX_GPUS if system.scale_out is not None else max(node, system.scale_up.size)
    if num_gpus is not None:
        if not 1 <= num_gpus <= reachable or (num_gpus > node and num_gpus % node):
            raise InputError(
                f"{num_gpus} GPUs of {system.name}: use 1 to {node}, or whole nodes of {node} up to {reachable} GPUs"
            )
        return [num_gpus]
    inside = [s for s in range(1, node + 1) if node % s == 0]
    return inside + list(range(2 * node, reachable + 1, node))


def _by_room(ledger: Ledger, size: int, limits: Limits, context_tokens: int) -> list[tuple[Layout, MemoryUse]]:
    """Layouts of `size` GPUs: fitting ones first, without pipeline first, then by cached tokens or least overflow.

    A layout that cannot cache one sequence of `context_tokens` does not fit.
    """
    node = ledger.system.gpus_per_node
    cluster = Cluster(ledger.system, max(1, size // node), min(size, node))
    found = []
    for layout in layouts(ledger.model, cluster, ledger.engine):
        if layout.replica_gpus == size:
            use = ledger.use(layout, limits, "allgather_reducescatter", context_tokens)
            if use.fits and use.kv_tokens < context_tokens:
                use = replace(use, breaking_term="kv_cache")
            found.append((layout, use))
    return sorted(found, key=_room, reverse=True)


def _room(tried: tuple[Layout, MemoryUse]) -> tuple[bool, bool, float, float]:
    layout, use = tried
    fixed = use.needed_bytes
    return (use.fits, use.fits and layout.pp == 1, float(use.kv_tokens * layout.attention_dp), -fixed)


def _other_families(tried: list[tuple[Layout, MemoryUse]]) -> tuple[tuple[Layout, MemoryUse], ...]:
    best: dict[tuple[str, bool], tuple[Layout, MemoryUse]] = {}
    for layout, use in tried:
        if use.fits:
            best.setdefault((layout.family, layout.pp > 1), (layout, use))
    return tuple(best.values())[1:]
