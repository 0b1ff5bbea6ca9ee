"""Which rank a new request goes to: the policies of routers in front of engines.

Load-aware gateways come close to `least_requests`; `power_of_two` stands for routers that see only part of the fleet.
Between the ranks of one engine its own balancer may decide (`planner.balancer`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planner.affinity import PrefixAffinity

Router = Callable[[list[int]], int]
"""Chooses a rank from the number of unfinished requests each one has."""


def round_robin(rng: np.random.Generator) -> Router:
    """One rank after the other."""
    last = -1

    def choose(in_flight: list[int]) -> int:
        nonlocal last
        last = (last + 1) % len(in_flight)
        return last

    return choose


def least_requests(rng: np.random.Generator) -> Router:
    """A rank with the fewest unfinished requests; ties go round."""
    last = -1

    def choose(in_flight: list[int]) -> int:
        nonlocal last
        fewest = min(in_flight)
        try:
            last = in_flight.index(fewest, last + 1)
        except ValueError:
            last = in_flight.index(fewest)
        return last

    return choose


def power_of_two(rng: np.random.Generator) -> Router:
    """The less loaded of two ranks drawn at random: what a router with partial knowledge achieves."""

    def choose(in_flight: list[int]) -> int:
        first, second = rng.integers(0, len(in_flight), 2).tolist()
        return int(first if in_flight[first] <= in_flight[second] else second)

    return choose


ROUTERS: dict[str, Callable[[np.random.Generator], Router]] = {
    "round_robin": round_robin,
    "least_requests": least_requests,
    "power_of_two": power_of_two,
    "prefix_affinity": PrefixAffinity,
}
