"""Would another placement of the experts, or copies of the hot ones, serve more? The what-ifs around one layout.

Copies level the ranks and take memory from the KV cache; a placement grows stale when traffic changes, and learning
it anew costs a pause. All are estimates from the closed-form steady state of `planner.steady`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.cost import StepCost
from planner.deployment import Deployment, Run, deploy
from planner.epochs import rebalance
from planner.errors import Infeasible, LayoutError
from planner.experts import ExpertSettings
from planner.layout import Layout
from planner.loads import Question, load_table, placement_of, weights_of
from planner.routing import PROMPT_SPREAD, UNIFORM, Measured
from planner.routing.drift import Drift
from planner.steady import steady_state
from planner.steptime import Floats
from planner.workload import Workload

BALANCER = "eplb"
"""What vLLM, SGLang and TensorRT-LLM ship."""
_COPIES_PER_RANK = (0, 1, 2, 4)
_SHIFT_SEED = 7
_NOTICEABLE = 1e-3
"""Share of a step below which a difference is noise."""


@dataclass(frozen=True, slots=True)
class BalanceOption:
    """A way to place the experts of a layout.

    `decode_s` is the decode step at the batch of the run, `max_over_mean` the load of its busiest rank,
    `capacity_per_s` the requests per second that all replicas sustain, `kv_tokens` the cache of one replica.
    """

    deployment: Deployment
    max_over_mean: float
    decode_s: float
    kv_tokens: int
    capacity_per_s: float


@dataclass(frozen=True, slots=True)
class Staleness:
    """What happens to a learned placement when the dominant task changes.

    `stale_max_over_mean` is its busiest rank then, against `fresh_max_over_mean` learned anew; a rebalance pauses the
    ranks for `rebalance_s` and has paid after `break_even_steps` decode steps (None when nothing is gained).
    `interval_steps` is how often to place anew under the drift of the run, None for never, or without a drift.
    """

    fresh_max_over_mean: float
    stale_max_over_mean: float
    rebalance_s: float
    break_even_steps: int | None
    interval_steps: int | None


def balance_options(run: Run) -> tuple[BalanceOption, ...]:
    """The placement of `run` and balanced ones with 0, 1, 2 and 4 copies per rank, as far as they fit.

    Empty where there is nothing to balance: no expert parallelism.
    """
    deployment = run.deployment
    if deployment.model.moe is None or deployment.layout.ep == 1:
        return ()
    tried = [deployment]
    for copies in _COPIES_PER_RANK:
        experts = replace(deployment.experts, placement=BALANCER)
        layout = replace(deployment.layout, redundant_experts=_copies(deployment, copies))
        if (experts, layout) != (deployment.experts, deployment.layout):
            tried += _deployable(deployment, layout, experts, run.workload)
    return tuple(_option(d, run) for d in tried)


def router_question(deployment: Deployment) -> Question:
    """What decides the loads of the ranks of `deployment` in decode steps; only for models with experts."""
    cost, moe = deployment.cost(), deployment.model.moe
    assert moe is not None
    return cost.routed.question(cost.experts.router(moe), "decode")


def uneven_s(run: Run) -> float:
    """Seconds of a decode step of `run` that uneven experts cost: its step less that of uniform popularity."""
    cost, knots = run.deployment.cost(), _knots(run)
    return float((_routed_s(cost, knots=knots) - _routed_s(cost, knots=knots, law=UNIFORM))[0])


def staleness(run: Run) -> Staleness | None:
    """What a change of task does to a balanced placement of `run`; None without expert parallelism."""
    deployment = run.deployment
    moe = deployment.model.moe
    if moe is None or deployment.layout.ep == 1:
        return None
    balanced = replace(deployment, experts=replace(deployment.experts, placement=BALANCER))
    cost, tokens = balanced.cost(), _tokens(run)
    fresh = cost.routed.question(cost.experts.router(moe), "decode")
    base = weights_of(fresh.law, moe.num_experts, fresh.num_layers)
    task = PROMPT_SPREAD.weights(base.shape[1], base.shape[0], np.random.default_rng(_SHIFT_SEED))
    other = Measured("another task", base * task)
    stale = replace(fresh, learned=other)
    pause_s, _ = rebalance(cost, placement_of(stale), placement_of(fresh))
    knots = _knots(run)
    lost_s = float((_routed_s(cost, knots=knots, learned=other) - _routed_s(cost, knots=knots))[0])
    decode_s = float(cost.decode(np.array(_batch(run)), np.array(_context(run.workload))).total_s)
    return Staleness(
        float(load_table(fresh).max_over_mean(tokens)),
        float(load_table(stale).max_over_mean(tokens)),
        pause_s,
        int(np.ceil(pause_s / lost_s)) if lost_s > _NOTICEABLE * decode_s else None,
        _interval(deployment.experts.drift, pause_s, lost_s) if lost_s > _NOTICEABLE * decode_s else None,
    )


def _interval(drift: Drift | None, pause_s: float, lost_s: float) -> int | None:
    """Steps between rebalances with the least mean loss: the pause spread over them, and growing staleness.

    A placement of age t has lost 1 - 2^(-t / half-life) of its gain; where tasks last N steps, one of interval I is
    wrong for I / (2 N) of the time.
    """
    if drift is None:
        return None
    steps = np.unique(np.geomspace(10, 1e7, 121).round())
    kept = np.ones_like(steps)
    if drift.half_life_steps:
        ages = np.log(2) * steps / drift.half_life_steps
        kept = -np.expm1(-ages) / ages
    if drift.switch_steps:
        kept = kept * np.maximum(0.0, 1 - steps / (2 * drift.switch_steps))
    loss = pause_s / steps + lost_s * (1 - kept)
    best = int(np.argmin(loss))
    return int(steps[best]) if loss[best] < lost_s else None


def _knots(run: Run) -> tuple[int, ...]:
    """The tokens of a decode step of `run`, to be drawn as they are: between knots the step is no straight line."""
    return (max(1, round(_tokens(run))),)


def _routed_s(cost: StepCost, **change: Any) -> Floats:
    """Seconds of the expert part of a decode step at the knots of the router's question, `change`d."""
    kinds = [(layer, count) for layer, count in cost.model.layer_kinds if layer.stack == "decoder"]
    return np.asarray(cost.routed.drawn_seconds("decode", kinds, lambda q: replace(q, **change)).mean(axis=1))


def _copies(deployment: Deployment, per_rank: int) -> int:
    """Redundant experts that make the slots divide: `per_rank` on every rank, the least that is possible for 0."""
    moe, ep = deployment.model.moe, deployment.layout.ep
    assert moe is not None
    return -moe.num_experts % ep + per_rank * ep


def _deployable(
    deployment: Deployment, layout: Layout, experts: ExpertSettings, workload: Workload
) -> list[Deployment]:
    fixed = (deployment.engine, deployment.limits, deployment.backend, int(_context(workload)))
    asked = (deployment.router, deployment.terms)
    try:
        return [deploy(deployment.model, deployment.cluster, layout, *fixed, experts, deployment.tactics, *asked)]
    except (Infeasible, LayoutError):
        return []


def _option(deployment: Deployment, run: Run) -> BalanceOption:
    cost = deployment.cost()
    context = _context(run.workload)
    steady = steady_state(
        cost, deployment.limits.max_batched_tokens, deployment.engine.policy, run.workload, run.summary.prefix_hit_rate
    )
    layout = deployment.layout
    running = min(deployment.limits.max_num_seqs, deployment.memory.kv_tokens / max(context, 1.0))
    table = load_table(router_question(deployment))
    return BalanceOption(
        deployment,
        float(table.max_over_mean(_tokens(run))),
        float(cost.decode(np.array(_batch(run)), np.array(context)).total_s),
        deployment.memory.kv_tokens * layout.attention_dp,
        float(steady.capacity_per_s(np.array(running))) * layout.attention_dp * layout.replicas,
    )


def _context(workload: Workload) -> float:
    return workload.mean_prompt_tokens + workload.mean_output_tokens / 2


def _batch(run: Run) -> float:
    """Mean running sequences per rank of the run's decode steps."""
    decoding = run.simulation.steps.decode_seqs[run.simulation.steps.decode_seqs > 0]
    return float(round(max(1.0, decoding.mean() / run.deployment.layout.attention_dp))) if len(decoding) else 1.0


def _tokens(run: Run) -> float:
    return _batch(run) * run.deployment.layout.attention_dp * run.deployment.tactics.query_tokens
