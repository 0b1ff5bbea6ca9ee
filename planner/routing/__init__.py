"""Where tokens go: popularity of `experts`, load of `ranks`, size of `messages`."""

from planner.routing.experts import (
    SKEWS,
    Skew,
    active_experts,
    inclusion_from_load,
    inclusion_from_weights,
    named_skew,
    popularity,
    skew_for,
)
from planner.routing.messages import DISPATCH_FORMATS, combine_bytes, dispatch_bytes
from planner.routing.ranks import RankLoad, assignment_variance, distinct_ranks, max_over_mean, rank_load

__all__ = [
    "DISPATCH_FORMATS",
    "SKEWS",
    "RankLoad",
    "Skew",
    "active_experts",
    "assignment_variance",
    "combine_bytes",
    "dispatch_bytes",
    "distinct_ranks",
    "inclusion_from_load",
    "inclusion_from_weights",
    "max_over_mean",
    "named_skew",
    "popularity",
    "rank_load",
    "skew_for",
]
