"""Where experts live when HBM cannot hold them all: HBM, a peer's HBM, host DRAM, NVMe.

policies   Residency and POLICIES: which experts stay, what happens to the others; `layer_seconds`
timing     seconds of a layer per policy
hits       hit rates by capacity: hot, recently used, often used experts
reuse      the routing process with temporal reuse behind them
traces     exact caches on recorded expert ids
tiers      rates, latencies and room behind HBM
hosts      memory bandwidth and cores of hosts (hosts.toml)
spread     how many experts of a layer lie where
"""

from __future__ import annotations

from planner.residency.hits import che_hits, hit_curve, static_hits
from planner.residency.policies import POLICIES, Policy, Residency, layer_seconds
from planner.residency.reuse import REUSES, Reuse, calibrate, sample_ids
from planner.residency.spread import Spread, spread
from planner.residency.tiers import Tier, Tiers, tiers_of
from planner.residency.timing import LayerTime, LayerWork
from planner.residency.traces import hits_by_capacity, next_token_reuse, stack_distances

__all__ = [
    "POLICIES",
    "REUSES",
    "LayerTime",
    "LayerWork",
    "Policy",
    "Residency",
    "Reuse",
    "Spread",
    "Tier",
    "Tiers",
    "calibrate",
    "che_hits",
    "hit_curve",
    "hits_by_capacity",
    "layer_seconds",
    "next_token_reuse",
    "sample_ids",
    "spread",
    "stack_distances",
    "static_hits",
    "tiers_of",
]
