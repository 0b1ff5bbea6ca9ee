"""Flags that the servers of measured points were started with, where they differ from the engine's defaults.

`flags.toml` holds them as rules, each with the script it was read from.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from planner.engine import Limits
from planner.validation.points import Point

_TOKEN_STEP = 64


@dataclass(frozen=True, slots=True)
class Match:
    """Which runs a rule is about; what is not stated matches any."""

    engine: str
    gpus: tuple[str, ...]
    models: tuple[str, ...]
    precision: str = ""
    min_users: int = 0
    max_tp: int | None = None
    isl: int | None = None
    osl: int | None = None

    def holds(self, point: Point, engine: str) -> bool:
        """True when `point`, served by the profile `engine`, is such a run."""
        return (
            engine == self.engine
            and point.gpu.upper() in self.gpus
            and any(_is_named(point.model, name) for name in self.models)
            and self.precision in ("", point.precision.lower())
            and point.concurrency >= self.min_users
            and (self.max_tp is None or point.tp <= self.max_tp)
            and self.isl in (None, point.isl)
            and self.osl in (None, point.osl)
        )


def _is_named(model: str, part: str) -> bool:
    """True when `part` is in the name of `model`, whole: DeepSeek-V3 is no part of DeepSeek-V3.2."""
    _, found, rest = model.partition(part)
    return bool(found) and not rest.startswith(".")


@dataclass(frozen=True, slots=True)
class Flags:
    """What differs from the defaults; None or 1 where nothing does. `max_num_seqs` 0 stands for the users of a run."""

    kv: str | None = None
    max_num_seqs: int | None = None
    max_batched_tokens: int | None = None
    tokens_per_isl: int | None = None
    holds_prompt: bool = False
    receive_interval: int = 1
    mxfp4_activations: str | None = None
    memory_fraction: float | None = None
    frontend_workers: bool | None = None
    prefill_balance: tuple[int, int] | None = None
    batch_wait: tuple[int, float] | None = None

    def limits(self, default: Limits, point: Point) -> Limits:
        """`default` limits of one rank as these flags change them."""
        seqs = default.max_num_seqs if self.max_num_seqs is None else self.max_num_seqs or point.concurrency
        tokens = self.max_batched_tokens or default.max_batched_tokens
        if self.tokens_per_isl:
            tokens = self.tokens_per_isl * point.isl
        if self.holds_prompt:
            needed = point.isl + point.concurrency + _TOKEN_STEP
            tokens = max(tokens, -(-needed // _TOKEN_STEP) * _TOKEN_STEP)
        return Limits(seqs, tokens)


def flags_of(point: Point, engine: str) -> Flags:
    """Flags of the run `point` under the engine profile `engine`; the defaults where no rule is about it."""
    found: dict[str, Any] = {}
    for match, settings in _rules():
        if match.holds(point, engine):
            found |= settings
    return Flags(**found)


@lru_cache(maxsize=1)
def _rules() -> tuple[tuple[Match, dict[str, Any]], ...]:
    text = resources.files("planner.validation").joinpath("flags.toml").read_text("utf-8")
    rules = []
    for rule in tomllib.loads(text)["rule"]:
        when: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in rule["when"].items()}
        settings = {key: tuple(v) if isinstance(v, list) else v for key, v in rule["set"].items()}
        rules.append((Match(**when), settings))
    return tuple(rules)
