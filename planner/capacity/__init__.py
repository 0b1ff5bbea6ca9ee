"""Capacity limits of experts: exact `rules`, who keeps a place (`assignment`), drops in expectation (`limit`).

`defaults` knows which published models were made for a limit, `buffers` what limits dropless engines instead.
"""

from planner.capacity.assignment import Assignment, assign
from planner.capacity.buffers import BufferLimit, buffer_limit
from planner.capacity.defaults import QUALITY_NOTE, Caution, Published, caution, default_limit, published
from planner.capacity.draws import DrawnDrops, simulate
from planner.capacity.limit import CapacityLimit, Drops
from planner.capacity.rules import POLICIES, RULES, Rule, rule

__all__ = [
    "POLICIES",
    "QUALITY_NOTE",
    "RULES",
    "Assignment",
    "BufferLimit",
    "CapacityLimit",
    "Caution",
    "DrawnDrops",
    "Drops",
    "Published",
    "Rule",
    "assign",
    "buffer_limit",
    "caution",
    "default_limit",
    "published",
    "rule",
    "simulate",
]
