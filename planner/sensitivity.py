"""What a little more or less of each input does to the tightest objective of one layout.

Traffic is changed in the closed-form steady state of `planner.steady`; a kernel that is slower lengthens the step by
its share of it. Both scale the simulated value, so the middle of every bar is what the simulation said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from planner.deployment import UNSUSTAINED, Run, scaled
from planner.steady import steady_state
from planner.workload import Workload

CHANGE = 0.1
"""Relative change of every input: what demand forecasts and kernel tables are easily off by."""
_KERNELS = 4
_LEAST_SHARE = 0.03
"""Share of the step below which a kernel is not worth a bar."""
_UNITS = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}


@dataclass(frozen=True, slots=True)
class Effect:
    """The tightest objective over its limit when one input is lower and when it is higher."""

    input: str
    low_label: str
    high_label: str
    low_ratio: float
    high_ratio: float

    @property
    def swing(self) -> float:
        """How far the input moves the objective."""
        return abs(self.high_ratio - self.low_ratio)


def sensitivity(run: Run, decode: Mapping[str, float], prefill: Mapping[str, float]) -> tuple[Effect, ...]:
    """Effects on the tightest objective of `run`, largest first; `decode` and `prefill` are seconds of its steps.

    Empty without an objective or where the queue grows: there is nothing to scale.
    """
    metric = tight_metric(run)
    if metric is None:
        return ()
    effects = [*_traffic(run, metric), *_kernels(run, prefill if metric == "ttft" else decode)]
    return tuple(sorted(effects, key=lambda effect: -effect.swing))


def tight_metric(run: Run) -> str | None:
    """`ttft`, `tpot`, `itl` or `e2e` of the tightest objective; None where no number is judged."""
    if run.worst_objective == UNSUSTAINED:
        return None
    return next((m for m, unit in _UNITS.items() if run.worst_objective.startswith(unit)), None)


def _traffic(run: Run, metric: str) -> list[Effect]:
    load = run.workload
    own = _estimate_s(run, load, metric)
    name = "users" if load.arrivals.concurrency else "requests per second"
    changed = {name: [scaled(load, 1 + sign * CHANGE) for sign in (-1, 1)]}
    if load.turns is None:
        for field in ("prompt", "output"):
            lengths = getattr(load, field)
            longer = [replace(lengths, mean=max(1.0, lengths.mean * (1 + sign * CHANGE))) for sign in (-1, 1)]
            changed[f"{field} tokens"] = [replace(load, **{field: length}) for length in longer]
    ratios = {
        name: [run.worst_ratio * _estimate_s(run, other, metric) / own for other in others]
        for name, others in changed.items()
    }
    return [_effect(name, *low_high) for name, low_high in ratios.items()]


def _kernels(run: Run, terms: Mapping[str, float]) -> list[Effect]:
    total = sum(terms.values())
    shares = sorted(((seconds / total, name) for name, seconds in terms.items()), reverse=True) if total else []
    return [
        _effect(f"time of {name}", run.worst_ratio * (1 - CHANGE * share), run.worst_ratio * (1 + CHANGE * share))
        for share, name in shares[:_KERNELS]
        if share >= _LEAST_SHARE
    ]


def _effect(name: str, low: float, high: float) -> Effect:
    return Effect(name, f"-{CHANGE:.0%}", f"+{CHANGE:.0%}", low, high)


def _estimate_s(run: Run, load: Workload, metric: str) -> float:
    """Mean `metric` [s] of `run`'s layout under `load` in the closed form; overload saturates at what memory allows."""
    deployment = run.deployment
    layout, limits = deployment.layout, deployment.limits
    hit_rate = run.summary.prefix_hit_rate
    steady = steady_state(deployment.cost(), limits.max_batched_tokens, deployment.engine.policy, load, hit_rate)
    ranks = layout.replicas * layout.pp * layout.attention_dp
    context = load.mean_prompt_tokens + load.mean_output_tokens / 2
    most = min(limits.max_num_seqs // layout.pp, steady.batch_within(deployment.memory.kv_tokens / layout.pp, context))
    if load.arrivals.concurrency:
        batch = steady.batch_of(
            np.array(load.arrivals.concurrency / ranks), load.conversation_think_s / load.mean_turns
        )
    else:
        batch = steady.batch_at(np.array(load.arrivals.rate_per_s / ranks))
    batch = np.minimum(batch, most)
    prompts = load.requests(seed=0).prompt_tokens
    ttft_s = float(steady.ttft_at(batch, float(prompts.var() / prompts.mean() ** 2)))
    tpot_s = float(steady.tpot_at(batch))
    return {"ttft": ttft_s, "e2e": ttft_s + tpot_s * load.mean_output_tokens}.get(metric, tpot_s)
