"""What charts of an answer rest on beyond the simulation: cost against demand, sensitivities, loads of the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from math import ceil

import numpy as np

from planner.balance import router_question
from planner.deployment import Run
from planner.economics import bill, hourly_usd, served_costs
from planner.facts.basic import Facts
from planner.facts.certainty import ratios_of
from planner.loads import Floats, rank_shares, weights_of
from planner.sensitivity import Effect, sensitivity, tight_metric

_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
_MOST_LAYERS, _MOST_RANKS = 12, 64
_METRIC = {"ttft": "ttft"}


def cost_curve(run: Run, sustained_factor: float) -> list[Facts]:
    """Monthly cost and price of output at multiples of the demand, in whole replicas of the layout of `run`.

    A replica is taken to carry what the simulation showed: its share of the demand times `sustained_factor`.
    Empty where the price is unknown or the layout does not carry the demand.
    """
    deployment = run.deployment
    layout = deployment.layout
    if deployment.usd_per_hour is None or not sustained_factor:
        return []
    rows = []
    for factor in _FACTORS:
        num_gpus = max(1, ceil(layout.replicas * factor / sustained_factor - 1e-9)) * layout.replica_gpus
        usd = hourly_usd(deployment.cluster.system, num_gpus, deployment.terms, replica_gpus=layout.replica_gpus)
        costs = served_costs(usd, run.output_tok_per_s * factor, run.workload, deployment.terms)
        rows.append(
            {
                "demand_factor": factor,
                "num_gpus": num_gpus,
                "usd_per_month": monthly_usd(run, num_gpus),
                "usd_per_mtok_output": costs.usd_per_mtok_output,
                "is_offered": num_gpus <= deployment.cluster.num_gpus,
            }
        )
    return rows


def monthly_usd(run: Run, num_gpus: int) -> float | None:
    """Bill of `num_gpus` of the system of `run`, None where no price is known."""
    deployment = run.deployment
    system, step = deployment.cluster.system, deployment.layout.replica_gpus
    return bill(system, num_gpus, deployment.terms, replica_gpus=step).usd_per_month


def sensitivity_facts(run: Run, steps: Mapping[str, Mapping[str, float]], share: Mapping[str, float]) -> list[Facts]:
    """Rows of a tornado: the tightest objective over its limit at the low and the high end of each input.

    The first row is the prediction itself, at the ends of its 80 % interval.
    """
    metric = tight_metric(run)
    if metric is None:
        return []
    error = ratios_of(run.deployment, _METRIC.get(metric, "tpot"), share)
    ends = (run.worst_ratio * error.low, run.worst_ratio * error.high)
    own = Effect("error of the prediction", "80 % low", "80 % high", *ends)
    return [asdict(effect) for effect in (own, *sensitivity(run, steps["decode"], steps["prefill"]))]


def heat_facts(run: Run, balance: Facts | None) -> Facts | None:
    """Loads over the even share, [layers][ranks], as placed and as balanced; without EP those of the experts, most
    popular first. None for dense models.

    Layers are representative draws of the popularity; wide groups are cut to their first ranks or experts.
    """
    if run.deployment.model.moe is None:
        return None
    if balance is None:
        question = router_question(run.deployment)
        popular = weights_of(question.law, question.num_experts, question.num_layers)
        shares = np.sort(popular / popular.mean(axis=1, keepdims=True), axis=1)[:, ::-1]
        return {"unit": "expert", "before": _grid(shares, "by popularity"), "after": None}
    others = [option for option in balance["options"] if option["placement"] != "contiguous"]
    best = max(others, key=lambda option: float(option["gain"])) if others else None
    facts: Facts = {"unit": "rank", "before": _loads(run, None), "after": None}
    if best is not None and best is not balance["options"][0]:
        facts["after"] = _loads(run, best)
    return facts


def _loads(run: Run, option: Facts | None) -> Facts:
    deployment = run.deployment
    if option is not None:
        deployment = replace(
            deployment,
            experts=replace(deployment.experts, placement=option["placement"]),
            layout=replace(deployment.layout, redundant_experts=option["redundant_experts"]),
        )
    copies = deployment.layout.redundant_experts
    name = deployment.experts.placement_name + (f" with {copies} copies" if copies else "")
    return _grid(rank_shares(router_question(deployment)), name)


def _grid(shares: Floats, name: str) -> Facts:
    layers = np.unique(np.linspace(0, len(shares) - 1, _MOST_LAYERS).round().astype(int))
    return {
        "placement": name,
        "layers": [int(layer) for layer in layers],
        "num_ranks": shares.shape[1],
        "loads": [[round(float(load), 4) for load in shares[layer, :_MOST_RANKS]] for layer in layers],
        "busiest_mean": round(float(shares.max(axis=1).mean()), 4),
        "busiest_worst": round(float(shares.max()), 4),
    }
