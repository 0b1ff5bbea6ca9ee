"""The kind of rank that the rules of a deployment ask for."""

from __future__ import annotations

from planner.enginespec import EngineSpec
from planner.retraction import RetractingRank
from planner.scheduler import Rank
from planner.speculation import AcceptanceWalk
from planner.speculativerank import SpeculativeRank


def rank_of(spec: EngineSpec, walk: AcceptanceWalk | None = None) -> Rank:
    """A rank with drafts, one that retracts, or a plain one; with drafts `spec.admission_reserve` admits.

    `walk` draws the acceptance of drafts; a rank without one has its own.
    """
    if spec.acceptance:
        rank = SpeculativeRank(spec)
        rank.walk = walk or rank.walk
        return rank
    return Rank(spec) if spec.token_ratio is None else RetractingRank(spec)
