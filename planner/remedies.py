"""What would make an infeasible question feasible, in order of price, and how far each remedy was checked."""

from __future__ import annotations

from planner.deployment import UNSUSTAINED, Run
from planner.economics import DEFAULT_TERMS, Terms, gpu_hour, hourly_usd
from planner.engine import Engine
from planner.errors import PlannerError
from planner.fit import Fit, fit
from planner.hardware import Cluster, System, system, systems
from planner.model import ModelConfig
from planner.model.precision import override
from planner.search import CANNOT_SUSTAIN, SearchResult
from planner.units import format_usd, significant
from planner.workload import Workload

_NARROWER = {
    "bf16": ("fp8", "int4_g128"),
    "fp16": ("fp8", "int4_g128"),
    "fp8": ("int4_g128",),
    "fp8_block": ("int4_g128",),
}
_OTHER_SYSTEMS = 2
Priced = tuple[float, str]


def remedies(
    model: ModelConfig,
    searches: list[tuple[str, SearchResult]],
    clusters: list[Cluster],
    workload: Workload,
    engine: Engine,
    nearest: Run | None,
    terms: Terms = DEFAULT_TERMS,
) -> tuple[str, ...]:
    """Remedies for a plan without a layout that meets its SLO, each with its hourly rent when a price is known.

    A question that fails on memory gets the fewest GPUs, a lower precision, and other systems that hold the weights;
    one that fails on load or latency gets the load that can be served, more GPUs, and the objectives in reach.
    """
    context = workload.max_prompt_tokens + workload.max_output_tokens
    priced: list[Priced] = []
    if any(found.fitting for _, found in searches):
        for (_, found), cluster in zip(searches, clusters, strict=True):
            priced += _more_capacity(found, cluster, workload, terms)
        priced += [_relax(nearest)] if nearest is not None else []
    else:
        return memory_remedies(model, clusters, engine, context, terms)
    return tuple(text for _, text in sorted(priced))


def memory_remedies(
    model: ModelConfig, clusters: list[Cluster], engine: Engine, context: int, terms: Terms = DEFAULT_TERMS
) -> tuple[str, ...]:
    """What would hold the weights and one sequence of `context` tokens, cheapest first."""
    priced: list[Priced] = []
    for cluster in clusters:
        priced += _more_gpus(model, cluster, engine, context, terms)
        priced += _lower_precision(model, cluster.system, engine, context, terms)
    offered = {cluster.system.name for cluster in clusters}
    priced += sorted(_other_systems(model, engine, context, offered, terms))[:_OTHER_SYSTEMS]
    return tuple(text for _, text in sorted(priced))


def _relax(nearest: Run) -> Priced:
    """Objectives the nearest run reaches, or a lower load when its queue grows."""
    cost = nearest.deployment.usd_per_hour
    where = f"{nearest.deployment.layout} on {nearest.deployment.cluster.name}{_rent(cost)}"
    missed = [r for r in nearest.summary.objectives if not r.is_met]
    if nearest.worst_objective == UNSUSTAINED or not missed:
        text = f"lower the load: the queue grows with {where}"
    else:
        reached = ",".join(f"{r.objective.name}={r.value_s * 1000:.0f}ms" for r in missed)
        text = f"accept {reached} with {where} (simulated)"
    return (cost if cost is not None else float("inf")), text


def _more_capacity(found: SearchResult, cluster: Cluster, workload: Workload, terms: Terms) -> list[Priced]:
    """More GPUs of the same kind, or the share of the load these can carry, from the capacity that was missing."""
    if CANNOT_SUSTAIN not in found.nearest_miss or found.survivors:
        return []
    factor = found.nearest_miss[CANNOT_SUSTAIN][0]
    wanted = -(-int(cluster.num_gpus * factor * 1.2) // cluster.gpus_per_node) * cluster.gpus_per_node
    name = cluster.system.name
    now, then = _cost(cluster.system, cluster.num_gpus, terms), _cost(cluster.system, wanted, terms)
    load = f"{1 / factor:.0%} of the load"
    if workload.arrivals.rate_per_s:
        load = f"{significant(workload.arrivals.rate_per_s / factor)} requests/s"
    return [
        (now, f"lower the load to at most {load} on {cluster.name} (estimated){_rent(now)}"),
        (then, f"about {wanted} GPUs of {name} for the whole load (estimated, 20 % reserve){_rent(then)}"),
    ]


def _more_gpus(model: ModelConfig, cluster: Cluster, engine: Engine, context: int, terms: Terms) -> list[Priced]:
    answer = _fit(model, cluster.system, engine, context)
    if answer is None or answer.num_gpus <= cluster.num_gpus:
        return []
    cost = _cost(cluster.system, answer.num_gpus, terms)
    return [(cost, f"{answer.num_gpus} GPUs of {cluster.system.name} hold it as {answer.layout}{_rent(cost)}")]


def _lower_precision(model: ModelConfig, chosen: System, engine: Engine, context: int, terms: Terms) -> list[Priced]:
    stored = model.format_of("expert" if model.moe else "dense_ffn")
    found = []
    for fmt in _NARROWER.get(stored, ()):
        answer = _fit(override(model, experts=fmt, attention=fmt, dense=fmt), chosen, engine, context)
        if answer is not None:
            cost = _cost(chosen, answer.num_gpus, terms)
            found.append((cost, f"{fmt} weights fit {answer.num_gpus} x {chosen.name} (--weights {fmt}){_rent(cost)}"))
    return found


def _other_systems(model: ModelConfig, engine: Engine, context: int, offered: set[str], terms: Terms) -> list[Priced]:
    """Systems that hold the weights within one scale-up domain."""
    found = []
    for name in systems():
        candidate = system(name)
        if name in offered or not gpu_hour(candidate, terms):
            continue
        answer = _fit(model, candidate, engine, context)
        if answer is not None and answer.num_gpus <= max(candidate.scale_up.size, 1):
            cost = _cost(candidate, answer.num_gpus, terms)
            found.append(
                (cost, f"{answer.num_gpus} x {name} hold it as {answer.layout} (load not checked){_rent(cost)}")
            )
    return found


def _fit(model: ModelConfig, chosen: System, engine: Engine, context: int) -> Fit | None:
    """The fit on `chosen`, or None when there is none or the profile lacks a fact the ledger needs."""
    try:
        answer = fit(model, chosen, engine, context_tokens=context)
    except PlannerError:
        return None
    return answer if answer.fits else None


def _cost(chosen: System, num_gpus: int, terms: Terms) -> float:
    cost = hourly_usd(chosen, num_gpus, terms)
    return float("inf") if cost is None else cost


def _rent(cost: float | None) -> str:
    return f", {format_usd(cost)}/h" if cost is not None and cost != float("inf") else ", price unknown"
