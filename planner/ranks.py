"""The kind of rank that the rules of a deployment ask for."""

from __future__ import annotations

from planner.enginespec import EngineSpec
from planner.retraction import RetractingRank
from planner.scheduler import Rank
from planner.speculation import AcceptanceWalk
from planner.speculativerank import SpeculativeRank


def rank_of(spec: EngineSpec) -> Rank:
    """A rank with drafts, one that retracts, or a plain one; with drafts `spec.admission_reserve` admits."""
    if spec.acceptance:
        return SpeculativeRank(spec)
    return Rank(spec) if spec.token_ratio is None else RetractingRank(spec)


def share_walk(ranks: list[Rank], acceptance: tuple[float, ...], seed: int) -> None:
    """Let the `ranks` of a run draw acceptance from one walk seeded by `seed`."""
    walk = AcceptanceWalk(acceptance, [seed, 2])
    for rank in ranks:
        if isinstance(rank, SpeculativeRank):
            rank.walk = walk
