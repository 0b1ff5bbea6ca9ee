"""Where tokens go: popularity `laws`, picks of `experts`, `samplers` of a step, distinct `ranks`, `messages`."""

from planner.routing.experts import active_experts, inclusion_from_load, inclusion_from_weights
from planner.routing.laws import (
    PROMPT_SPREAD,
    SKEWS,
    UNIFORM,
    Law,
    LogNormal,
    Measured,
    named_skew,
    popularity,
    skew_for,
)
from planner.routing.messages import DISPATCH_FORMATS, combine_bytes, dispatch_bytes
from planner.routing.ranks import assignment_variance, distinct_ranks
from planner.routing.samplers import Selection, exact_counts, fast_counts

__all__ = [
    "DISPATCH_FORMATS",
    "PROMPT_SPREAD",
    "SKEWS",
    "UNIFORM",
    "Law",
    "LogNormal",
    "Measured",
    "Selection",
    "active_experts",
    "assignment_variance",
    "combine_bytes",
    "dispatch_bytes",
    "distinct_ranks",
    "exact_counts",
    "fast_counts",
    "inclusion_from_load",
    "inclusion_from_weights",
    "named_skew",
    "popularity",
    "skew_for",
]
