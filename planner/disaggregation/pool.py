"""One pool: groups of ranks that step together, their timer, the links of their GPUs, and who is on the way.

`planner.disaggregation.simulation` joins two of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np
import simpy

from planner.coasting import StepTimer
from planner.disaggregation.ranks import DecodeRank, PrefillRank
from planner.disaggregation.transfer import Nic
from planner.enginespec import EngineSpec
from planner.pipeline import StageSplit, pipelines
from planner.records import StepTable
from planner.scheduler import Request

_NUM_STEP_COLUMNS = 9

AnyRank = PrefillRank | DecodeRank


class Journey:
    """One request on its way through both pools."""

    __slots__ = ("decode", "decode_rank", "index", "prefill", "prefill_rank")

    def __init__(self, index: int, prompt_tokens: int, output_tokens: int, sent_s: float) -> None:
        self.index = index
        self.prefill = Request(index, prompt_tokens, 1, sent_s)
        self.decode = Request(index, prompt_tokens, output_tokens, sent_s)
        self.prefill_rank = self.decode_rank = -1


class Group:
    """Ranks of one pool that step together; `wake` is the event it sleeps on while none has work."""

    __slots__ = ("index", "ranks", "wake")

    def __init__(self, index: int, ranks: Sequence[AnyRank]) -> None:
        self.index = index
        self.ranks = ranks
        self.wake: simpy.Event | None = None

    def rouse(self) -> None:
        """Wake the group up if it sleeps."""
        if self.wake is not None and not self.wake.triggered:
            self.wake.succeed()


class Pool:
    """Groups of one pool, their timer, their links and their step table."""

    def __init__(
        self,
        spec: EngineSpec,
        timer: StepTimer,
        split: StageSplit | None,
        new_rank: Callable[[], AnyRank],
        choose: Callable[[list[int]], int],
    ) -> None:
        self.spec, self.timer, self.choose = spec, timer, choose
        self.pipelines = pipelines(split, spec.num_groups)
        pipeline = split.num_stages if split else 1
        per_group = spec.ranks_per_group
        self.groups = [Group(i, [new_rank() for _ in range(per_group)]) for i in range(spec.num_groups)]
        self.ranks = [rank for group in self.groups for rank in group.ranks]
        self.in_flight = [0] * len(self.ranks)
        # The scheduler slots of a pipeline run on the same GPUs and share their links.
        nics = [Nic() for _ in range(-(-spec.num_groups // pipeline) * per_group)]
        self.nics = [nics[g // pipeline * per_group + r] for g in range(spec.num_groups) for r in range(per_group)]
        self.step_rows = array("d")

    def group_of(self, rank: int) -> Group:
        """The group of a rank."""
        return self.groups[rank // self.spec.ranks_per_group]

    def take(self) -> int:
        """A rank for a new request, by the router's rule."""
        chosen = self.choose(self.in_flight)
        self.in_flight[chosen] += 1
        return chosen

    def record(self, group: Group, start_s: float, step_s: float) -> None:
        """Append a row of `StepTable`."""
        prompt = seqs = context = blocks = queue = 0
        for rank in group.ranks:
            work = rank.work
            prompt += work.prefill_tokens
            seqs += work.decode_seqs
            context += work.decode_context_tokens
            blocks += rank.total_blocks - rank.free_blocks
            queue += len(rank.waiting) + len(rank.asking) + len(rank.arrived)
        kv_tokens = blocks * self.spec.block_tokens
        row = (start_s, step_s, group.index, prompt, seqs, context, kv_tokens, queue, self.timer.draw)
        self.step_rows.extend(row)

    def step_table(self) -> StepTable:
        """Columns of the steps of this pool."""
        return StepTable.from_rows(np.array(self.step_rows).reshape(-1, _NUM_STEP_COLUMNS))

    def busy_share(self, simulated_s: float) -> float:
        """Busy share of the links of the busiest rank."""
        return min(1.0, max(nic.busy_s for nic in self.nics) / simulated_s) if simulated_s > 0 else 0.0
