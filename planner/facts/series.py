"""Series of one run, short enough to draw: quantiles of latencies, queue and batch over time."""

from __future__ import annotations

import numpy as np

from planner.deployment import Run
from planner.facts.basic import Facts

_CDF_POINTS = 101
_TIMELINE_POINTS = 200


def cdf_facts(run: Run) -> Facts:
    """Quantiles of the measured requests, warm-up and cool-down removed as in the percentiles."""
    requests, summary = run.simulation.requests, run.summary
    measured = slice(summary.num_warmup, len(requests) - summary.num_cooldown)
    quantiles = np.linspace(0, 1, _CDF_POINTS)
    columns = {"ttft_s": requests.ttft_s[measured], "tpot_s": requests.tpot_s[measured]}
    return {
        name: np.quantile(values[np.isfinite(values)], quantiles).tolist()
        for name, values in columns.items()
        if np.isfinite(values).any()
    }


def timeline_facts(run: Run) -> Facts:
    """Waiting requests, running sequences and share of the KV pool at evenly picked steps, over the whole run."""
    steps = run.simulation.steps
    start = np.asarray(steps.start_s)
    pick = np.unique(np.linspace(0, len(start) - 1, _TIMELINE_POINTS).astype(int))
    pool = run.deployment.memory.kv_tokens * run.deployment.layout.attention_dp
    return {
        "time_s": start[pick].tolist(),
        "queue": np.asarray(steps.num_waiting)[pick].tolist(),
        "batch": np.asarray(steps.decode_seqs)[pick].tolist(),
        "kv_share": (np.asarray(steps.kv_tokens_used)[pick] / max(pool, 1)).tolist(),
    }
