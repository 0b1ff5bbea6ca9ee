"""The link to the host over which groups of ranks fetch experts."""

from __future__ import annotations

from planner.enginespec import EngineSpec


class HostLink:
    """A link over which groups fetch experts, first come first served; a step's fetches are one job.

    Same waits as a `simpy.Resource` of capacity 1, without an event of its own.
    """

    __slots__ = ("free_s",)

    def __init__(self) -> None:
        self.free_s = 0.0

    def wait_s(self, now_s: float, busy_s: float) -> float:
        """How long a job of `busy_s` that comes at `now_s` waits for those before it [s]."""
        wait_s = max(0.0, self.free_s - now_s)
        self.free_s = now_s + wait_s + busy_s
        return wait_s


def host_links(spec: EngineSpec) -> list[HostLink]:
    """Link of each group; empty without fetching. Neighbours share one, groups of two nodes never do."""
    if not spec.groups_per_link:
        return []
    places = [divmod(group, spec.groups_per_node) for group in range(spec.num_groups)]
    roots = [(node, place // spec.groups_per_link) for node, place in places]
    links = {root: HostLink() for root in roots}
    return [links[root] for root in roots]
