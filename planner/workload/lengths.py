"""How many tokens a prompt or an answer has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.errors import WorkloadError

LengthKind = Literal["fixed", "uniform", "lognormal", "empirical", "replay"]

MAX_TOKENS = 100_000_000
_Z_999 = 3.090232306167813
"""Standard normal quantile of 0.999."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Distribution of a token count; build one with the constructors below, which check their arguments.

    `mean`, `minimum` and `maximum` [tokens] hold for every kind: they are what capacity rules need. `log_mean` and
    `sigma` belong to the log-normal kind, `values` to the empirical kind (drawn with replacement) and to the replay
    kind (taken in order, so that prompt and answer of one trace row stay together).
    """

    kind: LengthKind
    mean: float
    minimum: int
    maximum: int
    log_mean: float = 0.0
    sigma: float = 0.0
    values: tuple[int, ...] = ()

    @classmethod
    def fixed(cls, tokens: int) -> Lengths:
        """Every request has `tokens` tokens."""
        _check_tokens(tokens)
        return cls("fixed", float(tokens), tokens, tokens)

    @classmethod
    def uniform(cls, minimum: int, maximum: int) -> Lengths:
        """Every integer from `minimum` to `maximum`, both included, is equally likely."""
        _check_tokens(minimum)
        _check_tokens(max(minimum, maximum))
        if maximum < minimum:
            raise WorkloadError(f"uniform lengths {minimum}-{maximum}: the range is empty. Write {maximum}-{minimum}.")
        return cls("uniform", (minimum + maximum) / 2, minimum, maximum)

    @classmethod
    def lognormal(cls, mean: float, sigma: float, *, minimum: int = 1, maximum: int | None = None) -> Lengths:
        """Log-normal with the given `mean` [tokens] and standard deviation `sigma` of the logarithm, then clipped.

        Without `maximum` the tail is cut at the 99.9th percentile. `Lengths.mean` is the mean after clipping, so it
        lies slightly below `mean`.
        """
        if not (math.isfinite(mean) and mean >= 1):
            raise WorkloadError(f"log-normal lengths: mean {mean:g} is not a number of tokens >= 1.")
        if not (math.isfinite(sigma) and 0 < sigma <= 5):
            raise WorkloadError(f"log-normal lengths: sigma {sigma:g} must lie in (0, 5]. Use fixed lengths for 0.")
        log_mean = math.log(mean) - sigma**2 / 2
        top = maximum if maximum is not None else math.ceil(math.exp(log_mean + _Z_999 * sigma))
        _check_tokens(minimum)
        _check_tokens(max(minimum, top))
        if top < minimum:
            raise WorkloadError(f"log-normal lengths: maximum {top} is below minimum {minimum}. Raise the maximum.")
        return cls("lognormal", _clipped_mean(log_mean, sigma, minimum, top), minimum, top, log_mean, sigma)

    @classmethod
    def empirical(cls, values: Sequence[int]) -> Lengths:
        """Drawn with replacement from measured `values` [tokens]."""
        return cls._from_values("empirical", values)

    @classmethod
    def replay(cls, values: Sequence[int]) -> Lengths:
        """Measured `values` [tokens] in their order, from the top again when more are asked for."""
        return cls._from_values("replay", values)

    @classmethod
    def _from_values(cls, kind: LengthKind, values: Sequence[int]) -> Lengths:
        if not values:
            raise WorkloadError(f"{kind} lengths: no values. Give at least one token count.")
        whole = tuple(int(v) for v in values)
        _check_tokens(min(whole))
        _check_tokens(max(whole))
        return cls(kind, sum(whole) / len(whole), min(whole), max(whole), values=whole)

    def scaled(self, factor: float) -> Lengths:
        """The same distribution with every length times `factor`, in whole tokens of which one is the least."""
        low, high = max(1, round(self.minimum * factor)), max(1, round(self.maximum * factor))
        _check_tokens(high)
        if self.kind == "lognormal":
            log_mean = self.log_mean + math.log(factor)
            return replace(
                self,
                mean=_clipped_mean(log_mean, self.sigma, low, high),
                minimum=low,
                maximum=high,
                log_mean=log_mean,
            )
        values = tuple(max(1, round(value * factor)) for value in self.values)
        return replace(self, mean=self.mean * factor, minimum=low, maximum=high, values=values)

    def sample(self, rng: np.random.Generator, num_requests: int) -> NDArray[np.int64]:
        """Token counts of `num_requests` requests, int64 `[num_requests]`, each >= 1."""
        if self.kind == "fixed":
            return np.full(num_requests, self.minimum, dtype=np.int64)
        if self.kind == "uniform":
            return rng.integers(self.minimum, self.maximum + 1, num_requests, dtype=np.int64)
        if self.kind == "lognormal":
            tokens = np.rint(np.exp(rng.normal(self.log_mean, self.sigma, num_requests)))
            return np.clip(tokens, self.minimum, self.maximum).astype(np.int64)
        values = np.asarray(self.values, dtype=np.int64)
        if self.kind == "empirical":
            return values[rng.integers(0, len(values), num_requests)]
        return values[np.arange(num_requests) % len(values)]

    def __str__(self) -> str:
        if self.kind == "fixed":
            return f"{self.minimum:,}"
        if self.kind == "uniform":
            return f"{self.minimum:,}-{self.maximum:,}"
        return f"{self.mean:,.0f} (mean, {self.kind})"


def _check_tokens(tokens: int) -> None:
    if tokens < 1:
        raise WorkloadError(f"{tokens} tokens: a prompt and an answer have at least 1 token. Use 1 or more.")
    if tokens > MAX_TOKENS:
        raise WorkloadError(f"{tokens:,} tokens: no model reads more than {MAX_TOKENS:,}. Is the unit right?")


def _clipped_mean(log_mean: float, sigma: float, low: int, high: int) -> float:
    """Mean of a log-normal variable clipped to [low, high].

    E[clip(X)] = low F(low) + high (1 - F(high)) + partial expectation between them, with the partial expectation
    E[X; X <= x] = exp(mu + sigma^2 / 2) Phi((ln x - mu) / sigma - sigma) (standard result for the log-normal law).
    """
    z_low, z_high = (math.log(low) - log_mean) / sigma, (math.log(high) - log_mean) / sigma
    inside = math.exp(log_mean + sigma**2 / 2) * (_normal_cdf(z_high - sigma) - _normal_cdf(z_low - sigma))
    return low * _normal_cdf(z_low) + high * (1 - _normal_cdf(z_high)) + inside


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))
