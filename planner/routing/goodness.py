"""Which law a routing record follows: parameters per law, and predicted against seen load of the busiest rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from planner.routing.experts import Floats
from planner.routing.laws import Dirichlet, Law, LogNormal, Zipf, popularity
from planner.routing.records import Record
from planner.routing.statistics import LoadSpread, load_spread, rank_max_over_mean

_DRAWS = 200
"""Random placements per layer; the standard error of a predicted max/mean is below 1 %."""
_SEED = 20250711
_TOLERANCE = 0.11
"""Mean error up to which the log-normal is kept: its worst on sixteen real records (3 % is typical)."""

_CONCENTRATIONS = (0.01, 1e6)
"""From one expert that takes nearly all to equal loads."""


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Laws fitted to a record layer by layer, and how well they tell the load of the busiest rank.

    Attributes
    ----------
    law
        "lognormal" unless its mean error exceeds 11 % and another law has a smaller one.
    sigma_low, sigma_high
        Smallest and largest `sigma_cv` over the layers (the range, no quantiles), as in `lognormal:low-high`.
    zipf_exponent, dirichlet_concentration
        Mean over layers of the exponent; concentration for the mean cv.
    eps
        EP sizes compared.
    seen
        [eps], load of the busiest rank over the mean, contiguous placement, mean over layers.
    predicted
        law -> [eps], the same under each law with its parameter of each layer, mean over random placements.
    """

    law: str
    sigma_low: float
    sigma_high: float
    zipf_exponent: float
    dirichlet_concentration: float
    eps: tuple[int, ...]
    seen: Floats
    predicted: dict[str, Floats]

    def error(self, law: str) -> float:
        """Mean over the EP sizes of |predicted / seen - 1|; 0 without EP sizes."""
        return float(np.abs(self.predicted[law] / self.seen - 1).mean()) if self.eps else 0.0


def fit(record: Record, eps: Sequence[int], seed: int = _SEED) -> Fit:
    """Laws fitted to `record` and compared at the EP sizes `eps`; raises LayoutError if one divides no experts."""
    spread = load_spread(record.counts)
    seen = np.array([rank_max_over_mean(record.counts, ep).mean() for ep in eps])
    predicted = {
        law: _predicted(
            record, [make(spread, layer, record.num_experts) for layer in range(record.num_layers)], eps, seed
        )
        for law, make in LAWS.items()
    }
    sigmas = spread.sigma_cv
    answer = Fit(
        "lognormal",
        float(sigmas.min()),
        float(sigmas.max()),
        float(spread.zipf_exponent.mean()),
        concentration(float(spread.cv.mean()), record.num_experts),
        tuple(eps),
        seen,
        predicted,
    )
    closest = min(LAWS, key=answer.error)
    if answer.error("lognormal") <= _TOLERANCE or closest == "lognormal":
        return answer
    return dataclasses.replace(answer, law=closest)


def concentration(cv: float, num_experts: int) -> float:
    """Concentration of a symmetric Dirichlet whose shares have this `cv`, from cv^2 = (E - 1) / (alpha E + 1).

    >>> round(concentration(0.5, 64), 2)
    3.92
    """
    alpha = ((num_experts - 1) / max(cv, 1e-6) ** 2 - 1) / num_experts
    return float(np.clip(alpha, *_CONCENTRATIONS))


LAWS: dict[str, Callable[[LoadSpread, int, int], Law]] = {
    "lognormal": lambda spread, layer, _: LogNormal("fit", *[min(float(spread.sigma_cv[layer]), 3.0)] * 2),
    "zipf": lambda spread, layer, _: Zipf(float(spread.zipf_exponent[layer])),
    "dirichlet": lambda spread, layer, experts: Dirichlet(concentration(float(spread.cv[layer]), experts)),
}
"""Law -> the law with its parameter for one layer, from the spread, the layer's row and the number of experts."""


def _predicted(record: Record, laws: Sequence[Law], eps: Sequence[int], seed: int) -> Floats:
    """Expected load of the busiest rank over the mean [eps], mean over layers, each with its own law."""
    total = np.zeros(len(eps))
    for layer, law in enumerate(laws):
        shares = popularity(record.num_experts, record.top_k or 1, law, _DRAWS, seed + layer)
        total += [float(rank_max_over_mean(shares, ep).mean()) for ep in eps]
    return total / len(laws)
