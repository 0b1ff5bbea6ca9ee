"""What would make an infeasible question feasible, in order of price. Every remedy was computed, none is a guess."""

from __future__ import annotations

from planner.deployment import Run
from planner.economics import gpu_hour
from planner.engine import Engine
from planner.errors import PlannerError
from planner.fit import Fit, fit
from planner.hardware import Cluster, System, system, systems
from planner.model import ModelConfig
from planner.model.precision import override
from planner.units import format_usd
from planner.workload import Workload

_NARROWER = {
    "bf16": ("fp8", "int4_g128"),
    "fp16": ("fp8", "int4_g128"),
    "fp8": ("int4_g128",),
    "fp8_block": ("int4_g128",),
}
_OTHER_SYSTEMS = 2


def remedies(
    model: ModelConfig, clusters: list[Cluster], workload: Workload, engine: Engine, nearest: Run | None
) -> tuple[str, ...]:
    """Remedies for a plan without a layout that meets its SLO; each with its hourly rent when a price is known."""
    context = workload.max_prompt_tokens + workload.max_output_tokens
    priced: list[tuple[float, str]] = []
    if nearest is not None:
        priced.append(_relax(nearest))
    for cluster in clusters:
        priced += _more_gpus(model, cluster, engine, context, nearest)
        if nearest is None:
            priced += _lower_precision(model, cluster.system, engine, context)
    if nearest is None:
        offered = {cluster.system.name for cluster in clusters}
        priced += sorted(_other_systems(model, engine, context, offered))[:_OTHER_SYSTEMS]
    return tuple(text for _, text in sorted(priced))


def _relax(nearest: Run) -> tuple[float, str]:
    reached = ",".join(
        f"{r.objective.name}={r.value_s * 1000:.0f}ms" for r in nearest.summary.objectives if not r.is_met
    )
    cost = nearest.deployment.usd_per_hour
    wish = f"accept {reached}" if reached else "accept less load"
    text = f"{wish} on {nearest.deployment.cluster.name} ({nearest.deployment.layout})"
    return (cost if cost is not None else float("inf")), text + _rent(cost)


def _more_gpus(
    model: ModelConfig, cluster: Cluster, engine: Engine, context: int, nearest: Run | None
) -> list[tuple[float, str]]:
    if nearest is not None:
        factor = max(2, round(nearest.worst_ratio + 0.5))
        wanted = cluster.num_gpus * min(factor, 16)
        cost = _cost(cluster.system, wanted)
        return [(cost, f"offer {wanted} GPUs of {cluster.system.name} instead of {cluster.num_gpus}{_rent(cost)}")]
    answer = _fit(model, cluster.system, engine, context)
    if answer is None or answer.num_gpus <= cluster.num_gpus:
        return []
    cost = _cost(cluster.system, answer.num_gpus)
    return [(cost, f"{answer.num_gpus} GPUs of {cluster.system.name} hold it as {answer.layout}{_rent(cost)}")]


def _lower_precision(model: ModelConfig, chosen: System, engine: Engine, context: int) -> list[tuple[float, str]]:
    stored = model.format_of("expert" if model.moe else "dense_ffn")
    found = []
    for fmt in _NARROWER.get(stored, ()):
        answer = _fit(override(model, experts=fmt, attention=fmt, dense=fmt), chosen, engine, context)
        if answer is not None:
            cost = _cost(chosen, answer.num_gpus)
            found.append((cost, f"{fmt} weights fit {answer.num_gpus} x {chosen.name} (--weights {fmt}){_rent(cost)}"))
    return found


def _other_systems(model: ModelConfig, engine: Engine, context: int, offered: set[str]) -> list[tuple[float, str]]:
    found = []
    for name in systems():
        if name in offered:
            continue
        candidate = system(name)
        answer = _fit(model, candidate, engine, context) if gpu_hour(candidate) else None
        if answer is not None:
            cost = _cost(candidate, answer.num_gpus)
            found.append((cost, f"{answer.num_gpus} x {name} hold it as {answer.layout}{_rent(cost)}"))
    return found


def _fit(model: ModelConfig, chosen: System, engine: Engine, context: int) -> Fit | None:
    """The fit on `chosen`, or None when there is none or the profile lacks a fact the ledger needs."""
    try:
        answer = fit(model, chosen, engine, context_tokens=context)
    except PlannerError:
        return None
    return answer if answer.fits else None


def _cost(chosen: System, num_gpus: int) -> float:
    price = gpu_hour(chosen)
    return price.usd * num_gpus if price else float("inf")


def _rent(cost: float | None) -> str:
    return f", {format_usd(cost)}/h" if cost is not None and cost != float("inf") else ", price unknown"
