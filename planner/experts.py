"""How a deployment treats its experts: traffic, placement, capacity, and how these change over the steps of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from planner.capacity.limit import CapacityLimit
from planner.errors import InputError
from planner.layout import Layout
from planner.loads import KNOTS, PROMPT_KNOTS, Question, traffic
from planner.model.config import Moe
from planner.placement import Placement
from planner.residency import REUSES, Residency, Reuse
from planner.residency.hosts import Host
from planner.routing import Law, LogNormal, Selection
from planner.routing.drift import Drift


@dataclass(frozen=True, slots=True)
class ExpertSettings:
    """What a user may say about the experts of a deployment; the defaults are what engines do unasked.

    `skew` is the popularity of experts, None for what real records suggest per phase. `placement` is a policy of
    `planner.placement.PLACEMENTS` or a placement that was read from a file; how many redundant experts there are is a
    matter of the `Layout`. `limit` is a capacity limit, None for dropless. `top_k` replaces
    the model's experts per token, `top_k_spread` lets them vary from token to token with this standard deviation
    (adaptive routing). `drift` moves the popularity over the steps;
    every `rebalance_steps` the experts are placed anew for what was seen since the last time, None for never; the
    ranks wait for the move unless `rebalance_async`. With `residency`, what HBM cannot hold lies in `dram_bytes` of
    host memory (None: the profile's), `nvme_bytes` of drives of `nvme_bytes_per_s` (None: the profile's or one drive),
    and `peer_bytes` in the HBM of other GPUs, all of a node; `gpus_per_root` GPUs share a link to `host` (None: the
    profile's or a usual one). `reuse` is how routing repeats itself under policies that no `residency` names.
    """

    skew: Law | None = None
    placement: str | Placement = "contiguous"
    limit: CapacityLimit | None = None
    top_k: int | None = None
    top_k_spread: float = 0.0
    drift: Drift | None = None
    rebalance_steps: int | None = None
    rebalance_async: bool = False
    residency: Residency | None = None
    dram_bytes: float | None = None
    nvme_bytes: float = 0.0
    nvme_bytes_per_s: float | None = None
    peer_bytes: float = 0.0
    gpus_per_root: int = 1
    host: Host | None = None
    reuse: Reuse = REUSES["records"]

    def __post_init__(self) -> None:
        if self.rebalance_steps is not None and self.rebalance_steps < 1:
            raise InputError(f"rebalancing every {self.rebalance_steps} steps: use 1 or more")
        if self.rebalance_steps is not None and self.placement in ("contiguous", "round-robin", "random"):
            raise InputError(
                f"rebalancing does nothing under placement {self.placement!r}, which ignores load: use --placement eplb"
            )
        if self.rebalance_async and self.rebalance_steps is None:
            raise InputError("asynchronous rebalancing needs an interval: give --rebalance-steps")
        if isinstance(self.placement, Placement) and self.rebalance_steps is not None:
            raise InputError("a placement from a file stays as it is: rebalance under a policy (--placement eplb)")
        if not 0.0 <= self.top_k_spread < 100.0:
            raise InputError(f"experts per token vary by {self.top_k_spread:g}: use 0 or a few")

    @property
    def placement_name(self) -> str:
        """Policy of the placement."""
        return self.placement if isinstance(self.placement, str) else self.placement.policy

    def router(self, moe: Moe) -> Moe:
        """`moe` with the experts per token that cost anything: identity experts do not, adaptive ones may vary."""
        return replace(moe, top_k=self.top_k or max(1, round(moe.active_experts)))

    def question(self, moe: Moe, layout: Layout, phase: str, num_nodes: int = 1) -> Question:
        """What `planner.loads` needs to know of a layer in `phase` (prefill or decode) on ranks of `num_nodes`."""
        law, spread = traffic(moe.num_experts, phase, self.skew)
        selection = Selection(moe.top_k, moe.num_groups, moe.top_groups, self.top_k_spread)
        balanced = self.placement != "contiguous"
        nodes = num_nodes if balanced and layout.ep % num_nodes == 0 else 1
        return Question(
            moe.num_experts,
            selection,
            law,
            layout.ep,
            spread,
            self.placement,
            layout.redundant_experts,
            nodes,
            limit=self.limit,
            num_sources=layout.attention_dp if self.limit is not None else _prompts(layout.attention_dp, spread),
            knots=KNOTS if spread is None or self.limit or self.residency else PROMPT_KNOTS,
        )


def _prompts(ranks: int, spread: LogNormal | None) -> int:
    """Prompts of a prefill step, in few classes so that layouts share draws; 1 where they make no difference."""
    return 1 if spread is None or ranks == 1 else 4 if ranks < 8 else 16


AS_SERVED = ExpertSettings()
"""What engines do unasked, with the traffic real records suggest."""
