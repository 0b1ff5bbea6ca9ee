"""How popular experts are: laws of the load shares of a layer, their presets, and the text users name them by.

Popularity is log-normal with one sigma per layer unless the user says otherwise: sixteen real routing records
(DeepSeek-V2-Lite from deepseek-ai/ESFT@579a7711, OLMoE and Mixtral-8x7B from allenai/OLMoE@357454f) follow it within
11 %, typically 3 %, where a rank power law overshoots by 10-200 %. The other laws reproduce what other tools assume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from planner.errors import WorkloadError, nearest
from planner.routing.experts import check_picks, inclusion_from_load

Floats = NDArray[np.float64]

_MAX_SIGMA = 3.0
_POWER_LAW_TOP = 0.8
"""Largest load of AIConfigurator's generator over the tokens of the step (collector/helper.py @095f58a)."""
_HASH_VOCAB = 32_000
"""Vocabulary behind hashed routing, whose token frequencies follow Zipf's law with exponent 1."""


class Law(Protocol):
    """A hashable law; `weights` are loads [layers, experts] up to a factor per layer, all positive."""

    @property
    def name(self) -> str:
        """How users call it."""
        ...

    def __hash__(self) -> int: ...

    def weights(self, num_experts: int, layers: int, rng: np.random.Generator) -> Floats:
        """Loads of `layers` layers whose hot experts are independent."""
        ...


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Layer sigmas are spread uniformly over [sigma_low, sigma_high]; sigma = sqrt(ln(1 + CV^2)) of the loads.

    Sigmas are the mid-quantiles of the interval in random order, so few layers cover it evenly.
    """

    name: str
    sigma_low: float
    sigma_high: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.sigma_low <= self.sigma_high <= _MAX_SIGMA:
            raise WorkloadError(
                f"skew {self.name!r}: sigma {self.sigma_low:g} to {self.sigma_high:g} is no interval within 0 to 3. "
                "Real records lie between 0.10 and 1.17."
            )

    def weights(self, num_experts: int, layers: int, rng: np.random.Generator) -> Floats:
        """exp(sigma z) with one sigma per layer."""
        sigma = self.sigma_low + (self.sigma_high - self.sigma_low) * (rng.permutation(layers) + 0.5) / max(layers, 1)
        return np.asarray(np.exp(sigma[:, None] * rng.standard_normal((layers, num_experts))))


@dataclass(frozen=True, slots=True)
class Zipf:
    """The expert of rank r gets a load in proportion to r^-exponent; ranks are shuffled per layer."""

    exponent: float

    @property
    def name(self) -> str:
        """`zipf:1`."""
        return f"zipf:{self.exponent:g}"

    def weights(self, num_experts: int, layers: int, rng: np.random.Generator) -> Floats:
        """Shuffled powers of the rank."""
        ranked = np.arange(1, num_experts + 1, dtype=float) ** -self.exponent
        return rng.permuted(np.tile(ranked, (layers, 1)), axis=1)


@dataclass(frozen=True, slots=True)
class Dirichlet:
    """Load shares drawn from a symmetric Dirichlet; a smaller concentration is more skewed."""

    concentration: float

    @property
    def name(self) -> str:
        """`dirichlet:3`."""
        return f"dirichlet:{self.concentration:g}"

    def weights(self, num_experts: int, layers: int, rng: np.random.Generator) -> Floats:
        """Gamma variates, of which Dirichlet shares are the normalised form; the tiniest are lifted to 1e-9."""
        drawn = rng.gamma(self.concentration, size=(layers, num_experts))
        return np.asarray(np.maximum(drawn / drawn.mean(axis=1, keepdims=True), 1e-9))


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """AIConfigurator's generator: loads of density x^-alpha on [1, 0.8 x tokens], `tokens` per step.

    Its skew grows with the tokens of the step, where real skew falls: for reproducing its tables only.
    """

    alpha: float
    tokens: int = 8192

    @property
    def name(self) -> str:
        """`powerlaw:1.2@8192`."""
        return f"powerlaw:{self.alpha:g}@{self.tokens}"

    def weights(self, num_experts: int, layers: int, rng: np.random.Generator) -> Floats:
        """Inverse of the distribution function at uniform draws."""
        u, top, power = rng.random((layers, num_experts)), _POWER_LAW_TOP * self.tokens, 1.0 - self.alpha
        if abs(power) < 1e-9:
            return np.asarray(top**u)
        return np.asarray(((top**power - 1) * u + 1) ** (1 / power))


@dataclass(frozen=True, slots=True)
class Hashed:
    """Every token id is hashed to an expert (hash layers): loads follow the frequency of the ids that share one."""

    vocab: int = _HASH_VOCAB

    @property
    def name(self) -> str:
        """`hash:32000`."""
        return f"hash:{self.vocab}"

    def weights(self, num_experts: int, layers: int, rng: np.random.Generator) -> Floats:
        """Sum of Zipf frequencies per expert, ids dealt out evenly (balanced hash) and shuffled per layer."""
        frequency = 1.0 / np.arange(1, self.vocab + 1)
        dealt = np.arange(self.vocab) % num_experts
        loads = [np.bincount(rng.permutation(dealt), frequency, minlength=num_experts) for _ in range(layers)]
        return np.maximum(np.stack(loads), 1e-9)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Positive loads [layers, experts] of a routing record.

    `prompt_spread` is how far single prompts of the record stray from it, None where it does not tell.
    """

    name: str
    load: Floats
    prompt_spread: LogNormal | None = None

    def weights(self, num_experts: int, layers: int, rng: np.random.Generator) -> Floats:
        """The recorded loads of up to `layers` layers, spread evenly over those recorded.

        Raises WorkloadError when the record has another number of experts.
        """
        if self.load.shape[1] != num_experts:
            raise WorkloadError(
                f"{self.name} has {self.load.shape[1]} experts per layer, the model {num_experts}: "
                "it was recorded on another model"
            )
        chosen = np.linspace(0, len(self.load) - 1, min(layers, len(self.load))).round().astype(int)
        return np.asarray(self.load[chosen])


UNIFORM = LogNormal("uniform", 0.0, 0.0)
SKEWS: dict[str, Law] = {
    law.name: law
    for law in (
        UNIFORM,
        LogNormal("mixed", 0.38, 0.58),
        LogNormal("single-domain", 0.55, 0.92),
        LogNormal("aux-balanced-8-experts", 0.10, 0.15),
    )
}
"""Fitted: four tasks mixed on 64 experts, one task alone, 8-expert models (Mixtral-8x7B); uniform is the ideal."""

PROMPT_SPREAD = LogNormal("prompt", 0.40, 0.71)
"""How far the popularity inside one prompt strays from that of mixed traffic: single-domain is mixed x prompt,
0.55^2 = 0.38^2 + 0.40^2 and 0.92^2 = 0.58^2 + 0.71^2."""


def _log_normal(text: str) -> Law:
    low, _, high = text.partition("-")
    return LogNormal(f"lognormal:{text}", _number(low, 0.0, _MAX_SIGMA), _number(high or low, 0.0, _MAX_SIGMA))


def _power_law(text: str) -> Law:
    alpha, _, tokens = text.partition("@")
    return PowerLaw(_number(alpha, 0.0, 10.0), int(_number(tokens or "8192", 2, 1e7)))


KINDS: dict[str, Callable[[str], Law]] = {
    "lognormal": _log_normal,
    "zipf": lambda text: Zipf(_number(text, 0.0, 10.0)),
    "dirichlet": lambda text: Dirichlet(_number(text, 1e-3, 1e6)),
    "powerlaw": _power_law,
    "hash": lambda text: Hashed(int(_number(text or str(_HASH_VOCAB), 2, 1e7))),
}
"""Laws with a parameter: `lognormal:0.38-0.58`, `zipf:1`, `dirichlet:3`, `powerlaw:1.2@8192`, `hash:32000`."""


def named_skew(skew: Law | str) -> Law:
    """The law called `skew`, or `skew` itself. Raises WorkloadError on an unknown name or an impossible parameter."""
    if not isinstance(skew, str):
        return skew
    if skew in SKEWS:
        return SKEWS[skew]
    kind, colon, parameter = skew.partition(":")
    if kind in KINDS and (colon or kind == "hash"):
        return KINDS[kind](parameter)
    known = [*SKEWS, *(f"{name}:..." for name in KINDS)]
    raise WorkloadError(f"routing skew {skew!r} is unknown: {nearest(skew, known)}")


def skew_for(num_experts: int, phase: Literal["prefill", "decode"]) -> Law:
    """The class real records suggest.

    A decode batch of many users looks like mixed traffic, a prefill chunk of one prompt like a single domain;
    models with 8 large experts were trained to stay balanced in both (ESFT and OLMoE records).
    """
    if num_experts <= 8:
        return SKEWS["aux-balanced-8-experts"]
    return SKEWS["single-domain" if phase == "prefill" else "mixed"]


def popularity(num_experts: int, top_k: int, skew: Law | str, layers: int = 1, seed: int = 0) -> Floats:
    """Load shares [layers, experts] under `skew`; rows sum to 1 and no share exceeds 1 / top_k."""
    check_picks(num_experts, top_k)
    weights = named_skew(skew).weights(num_experts, layers, np.random.default_rng(seed))
    return inclusion_from_load(weights, top_k) / top_k


def _number(text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise WorkloadError(f"routing skew: {text!r} is not a number from {low:g} to {high:g}")
    return value
