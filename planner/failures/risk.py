"""Renewal theory of groups that stop as a whole: availability, spares, what a failure costs.

A group of R GPUs fails when its first GPU does, so with independent failures at a constant rate its mean time to
failure is the GPU's over R (handbook serving 8.3); alternating up and down times give MTTF / (MTTF + MTTR).
"""

from __future__ import annotations

import math

from planner.errors import InputError

_MOST_SPARE_REPLICAS = 100


def group_mttf_s(mtbf_gpu_s: float, num_gpus: int) -> float:
    """Mean time to the first failure among `num_gpus` GPUs [s]."""
    return mtbf_gpu_s / num_gpus


def availability(mttf_s: float, mttr_s: float) -> float:
    """Share of the time that a group which works `mttf_s` and is away `mttr_s` on average works.

    >>> availability(99.0, 1.0)
    0.99
    """
    return mttf_s / (mttf_s + mttr_s)


def at_least_up(num_replicas: int, needed: int, share_up: float) -> float:
    """Probability that at least `needed` of `num_replicas` independent replicas work.

    >>> round(at_least_up(3, 2, 0.9), 3)
    0.972
    """
    down = 1.0 - share_up
    terms = (
        math.comb(num_replicas, up) * share_up**up * down ** (num_replicas - up)
        for up in range(needed, num_replicas + 1)
    )
    return min(1.0, math.fsum(terms))


def replicas_for(needed: int, share_up: float, target: float) -> int:
    """Fewest replicas of which `needed` work with probability `target` or more. InputError where none suffice.

    >>> replicas_for(4, 0.999, 0.9999)
    5
    """
    if not 0.0 < target < 1.0:
        raise InputError(f"availability {target:g} must lie between 0 and 1, such as 0.999")
    for num in range(needed, needed + _MOST_SPARE_REPLICAS):
        if at_least_up(num, needed, share_up) >= target:
            return num
    raise InputError(
        f"{_MOST_SPARE_REPLICAS} spare replicas do not keep {needed} working {target:.4%} of the time when each works "
        f"{share_up:.1%}. Recover faster or ask for less."
    )


def spares_for(failures_per_s: float, repair_s: float, target: float) -> int:
    """Fewest spare machines that are not all in repair with probability `target`: a Poisson number are (M/G/infinity).

    >>> spares_for(1 / 86400, 86400, 0.99)
    4
    """
    mean = failures_per_s * repair_s
    if mean > 500:
        # Far above any deployment: the normal quantile would do, and exp(-mean) underflows.
        raise InputError(f"{mean:,.0f} machines in repair on average: shorten --repair or the deployment")
    term = total = math.exp(-mean)
    spares = 0
    while total < target:
        spares += 1
        term *= mean / spares
        total += term
    return spares
