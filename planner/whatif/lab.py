"""What the knobs of an MoE do together to one layout: rank loads, drops, hit rate, step time and price."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from planner.balance import BALANCER
from planner.capacity import QUALITY_NOTE, CapacityLimit, caution, rule
from planner.deployment import Deployment
from planner.economics import usd_per_mtok
from planner.loads import Question as Load
from planner.loads import load_table, placement_of, weights_of
from planner.model.config import Moe
from planner.offload import moe_layers
from planner.whatif.analytic import Answer, answer
from planner.whatif.catalogue import Estimate, curve, layout_text, price_per_gpu_hour
from planner.whatif.drops import drop_rate, load_of
from planner.whatif.question import Problem
from planner.whatif.scenario import Scenario

FACTORS = (0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
_PLAIN = "contiguous"
_HEAT_LAYERS = 16
"""Layers shown of the representative ones: the others are alike."""


@dataclass(frozen=True, slots=True)
class Measures:
    """One setting of the knobs at one batch: rates are shares, `usd_per_mtok_output` is at the load within the SLO."""

    layout: str
    max_over_mean: float
    active_experts: float
    experts_per_rank: int
    drop_rate: float
    hit_rate: float
    decode_s: float
    kv_tokens: int
    requests_per_s: float
    usd_per_mtok_output: float | None


@dataclass(frozen=True, slots=True)
class Lab:
    """The layout with the engine's own treatment of experts (`plain`) and with the knobs; None where it does not fit.

    `tokens` are those of all ranks in a decode step.
    """

    tokens: float
    plain: Measures | None
    knobs: Measures | None
    note: str


@dataclass(frozen=True, slots=True, eq=False)
class Heat:
    """Expected load of every rank over the even share `[layers, ranks]`, before and after balancing."""

    before: np.ndarray
    after: np.ndarray
    policy: str
    kept: str


@lru_cache(maxsize=128)
def lab(scenario: Scenario) -> Lab | tuple[Problem, ...]:
    """Knobs of `scenario` against none, on the layout that the planner chooses with them."""
    found = answer(scenario)
    if not isinstance(found, Answer):
        return found
    if found.question.model.moe is None:
        return Lab(0.0, None, None, f"{found.question.model.name} is dense: there are no experts to look at.")
    plain = answer(_same_layout(scenario, found))
    unchanged = _measures(plain, None) if isinstance(plain, Answer) else None
    if found.chosen is None:
        what = found.misfits[0][1] if found.misfits else "no layout is left"
        return Lab(0.0, unchanged, None, f"With these knobs nothing fits: {what}.")
    batch = max(1.0, found.chosen.candidate.batch)
    note = ""
    if scenario.capacity_factor:
        doubt = caution(found.question.model, found.question.experts.limit)
        note = f"{doubt.text}. {QUALITY_NOTE}" if doubt else QUALITY_NOTE
    tokens = batch * found.chosen.candidate.deployment.layout.attention_dp
    same = _measures(plain, batch) if isinstance(plain, Answer) else None
    return Lab(tokens, same, _measures(found, batch), note)


def heat(scenario: Scenario) -> Heat | str:
    """Loads of the ranks without balancing, and under the chosen placement and copies (EPLB where none is chosen).

    A sentence where there is nothing to see.
    """
    found = answer(scenario)
    if not isinstance(found, Answer) or found.chosen is None or found.question.model.moe is None:
        return "There are no experts to place."
    deployment = found.chosen.candidate.deployment
    if deployment.layout.ep == 1:
        return (
            f"{deployment.layout} cuts every expert over its ranks: all ranks have the same load. Set expert "
            f"parallelism above, such as {deployment.layout.stage_gpus}, to see whole experts on ranks."
        )
    asked = load_of(deployment)
    policy = BALANCER if asked.placement == _PLAIN else asked.placement
    least = -asked.num_experts % asked.num_ranks
    before = replace(asked, placement=_PLAIN, redundant=least)
    name = policy if isinstance(policy, str) else policy.policy
    copies = f" with {asked.redundant} copies" if asked.redundant else ""
    return Heat(_rank_loads(before), _rank_loads(replace(asked, placement=policy)), f"{name}{copies}", _PLAIN)


def drop_curve(scenario: Scenario, tokens: float) -> list[dict[str, float | str]]:
    """Share of token-expert assignments, and of tokens, lost against the capacity factor: decode steps of `tokens`,
    and steps with prompts of the token budget."""
    found = answer(scenario)
    if not isinstance(found, Answer) or found.chosen is None or found.question.model.moe is None or tokens < 1:
        return []
    deployment = found.chosen.candidate.deployment
    sizes = {"decode": round(tokens), "prefill": deployment.limits.max_batched_tokens}
    rows: list[dict[str, float | str]] = []
    for phase, size in sizes.items():
        asked = load_of(deployment, phase)
        for factor in FACTORS:
            limit = _limit(asked, found.question.experts.limit, factor)
            table = load_table(replace(asked, limit=limit, knots=(max(1, size),)))
            lost = {"drop_rate": table.drop_rate.mean(), "fully_dropped_rate": table.fully_dropped_rate.mean()}
            named: dict[str, float | str] = {"step": f"{phase}, {size:,} tokens", "capacity_factor": factor}
            rows.append(named | {name: float(value) for name, value in lost.items()})
    return rows


def _limit(asked: Load, own: CapacityLimit | None, factor: float) -> CapacityLimit:
    if own is not None:
        return replace(own, factor=factor)
    return CapacityLimit("megatron", factor, group_tokens=rule("megatron", asked.selection.top_k).group_tokens)


def _same_layout(scenario: Scenario, found: Answer) -> Scenario:
    """The scenario without knobs, on the layout that was chosen with them where it stays possible."""
    if found.chosen is None:
        return scenario.without_knobs()
    layout = replace(found.chosen.candidate.deployment.layout, redundant_experts=0)
    moe = found.question.model.moe
    if moe is not None and moe.num_experts % layout.ep:
        return scenario.without_knobs()
    backend = found.chosen.candidate.deployment.backend
    return replace(scenario.without_knobs(), layout=layout_text(layout), backend=backend, ep=0)


def _measures(found: Answer, batch: float | None) -> Measures | None:
    chosen = found.chosen
    moe = found.question.model.moe
    if chosen is None or moe is None:
        return None
    deployment = chosen.candidate.deployment
    at = max(1.0, batch if batch is not None else chosen.candidate.batch)
    tokens = at * deployment.layout.attention_dp
    context = found.question.workload.mean_prompt_tokens + found.question.workload.mean_output_tokens / 2
    table = load_table(load_of(deployment))
    rate, usd = _within_slo(found, chosen)
    return Measures(
        str(deployment.layout),
        float(table.max_over_mean(tokens)),
        float(table.active(tokens)),
        table.question.local_slots,
        drop_rate(deployment, tokens),
        _hit_rate(deployment, moe, round(tokens)),
        float(deployment.cost().decode(np.array(at), np.array(context)).total_s),
        deployment.memory.kv_tokens,
        rate,
        usd,
    )


def _within_slo(found: Answer, chosen: Estimate) -> tuple[float, float | None]:
    """Requests per second of all replicas within the SLO, and the price of a million output tokens at that load."""
    line = curve(found.question, chosen.kind)
    if line.within is None:
        return 0.0, None
    rate = float(line.requests_per_s[line.within]) * chosen.candidate.deployment.layout.replicas
    tok_per_s = rate * found.question.workload.mean_output_tokens
    return rate, usd_per_mtok(price_per_gpu_hour(found.question), chosen.num_gpus, tok_per_s)


def _hit_rate(deployment: Deployment, moe: Moe, tokens: int) -> float:
    """Share of the experts of a decode step found in HBM."""
    away = deployment.offload
    if away is None or moe_layers(deployment.model, "decode") == 0:
        return 1.0
    return float(deployment.cost().routed.layer("decode", max(1, tokens)).hit_rate.mean())


def _rank_loads(asked: Load) -> np.ndarray:
    loads = placement_of(asked).rank_loads(weights_of(asked.law, asked.num_experts, asked.num_layers))
    return np.asarray((loads / loads.mean(axis=1, keepdims=True))[:_HEAT_LAYERS])
