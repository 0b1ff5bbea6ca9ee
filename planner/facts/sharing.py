"""Facts of prefix caches and conversations, where the requests of a run share anything."""

from __future__ import annotations

import math

import numpy as np

from planner.deployment import Run
from planner.facts.basic import Facts
from planner.prefixhits import caches_prefixes

_FILLINGS = 3
"""Durations of a conversation that a run should last: one to fill the system and two to measure."""


def sharing_facts(run: Run) -> Facts:
    """What the prefix caches found; nothing where requests share nothing."""
    deployment, requests, spec = run.deployment, run.simulation.requests, run.simulation.spec
    if requests.cached_tokens is None:
        return {}
    cached = caches_prefixes(deployment.model, deployment.engine)
    found: Facts = {
        "enabled": cached,
        "block_tokens": deployment.engine.block_tokens,
        "num_caches": spec.num_groups * spec.ranks_per_group,
        "router": deployment.router,
        "hit_rate": run.summary.prefix_hit_rate,
        "cached_tokens": int(requests.cached_tokens.sum()),
    }
    if deployment.engine.prefix_caching and not cached:
        found["disabled_because"] = f"{deployment.model.name} has recurrent layers or an encoder"
    return {"prefix_cache": found}


def sharing_warnings(run: Run) -> list[str]:
    """Whether the run of an open loop was too short for its conversations."""
    workload, requests = run.simulation.workload, run.simulation.requests
    if workload.turns is None or workload.arrivals.kind == "closed":
        return []
    arriving_s = float(requests.arrival_s[-1] - requests.arrival_s[0])
    answers_s = workload.mean_turns * float(np.nan_to_num(np.nanmean(requests.e2e_s)))
    talk_s = workload.conversation_think_s + answers_s
    if arriving_s >= (_FILLINGS - 1) * talk_s:
        return []
    wanted = math.ceil(_FILLINGS * talk_s * workload.arrivals.rate_per_s / 100) * 100
    return [
        f"Requests came for {arriving_s:,.0f} s and a conversation takes {talk_s:,.0f} s: later turns are too few, and "
        f"with them hits and load. Use --num-requests {wanted} or more."
    ]
