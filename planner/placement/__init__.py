"""Where experts live: policies, lower bounds, files, what a change costs and how a placement ages."""

from planner.placement.bound import balance_bound, within
from planner.placement.formats import FORMATS, read_placement, write_placement
from planner.placement.mapping import Placement
from planner.placement.moves import Moves, moved, rebalance_seconds
from planner.placement.policies import PLACEMENTS, contiguous_max_over_mean, place
from planner.placement.stale import Staleness, stale, stale_table

__all__ = [
    "FORMATS",
    "PLACEMENTS",
    "Moves",
    "Placement",
    "Staleness",
    "balance_bound",
    "contiguous_max_over_mean",
    "moved",
    "place",
    "read_placement",
    "rebalance_seconds",
    "stale",
    "stale_table",
    "within",
    "write_placement",
]
