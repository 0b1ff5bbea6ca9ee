"""Sourced numbers of failures and recovery, from `recovery.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from planner.engine import Engine
from planner.errors import InputError
from planner.units import DAY_S


@dataclass(frozen=True, slots=True)
class Sourced:
    """A number and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class Recovery:
    """How one engine notices a dead rank and comes back [s]; None where the engine has nothing of the kind.

    `graph_s_per_layer` is per captured batch size and layer of a stage. `elastic_pause` is how long survivors stop to
    go on without a rank, `join_pause` to take one in again, `drain` how long a planned scale-down may wait.
    """

    detect: Sourced
    compile: Sourced
    graph_s_per_layer: Sourced
    warm_up: Sourced
    drain: Sourced | None = None
    elastic_detect: Sourced | None = None
    elastic_pause: Sourced | None = None
    join_pause: Sourced | None = None


@lru_cache
def _table() -> dict[str, Any]:
    text = resources.files("planner.failures").joinpath("recovery.toml").read_text("utf-8")
    return tomllib.loads(text)


def recovery(engine: Engine) -> Recovery:
    """Numbers of `engine`: of its name, else of the engine whose kernels it has; InputError where there are none."""
    table = _table()
    known = [name for name in table if "detect" in table[name]]
    found = next((name for name in (engine.name, engine.kernels) if name in known), None)
    if found is None:
        raise InputError(
            f"engine {engine.name!r}: how it notices a failure and starts is not known. Use --engine "
            f"{' or '.join(known)}, or a profile with one of them as base."
        )
    return Recovery(**{name: Sourced(**entry) for name, entry in table[found].items()})


def mtbf_gpu() -> Sourced:
    """Mean time between failures of one GPU with its share of everything around it [s].

    >>> round(mtbf_gpu().value / 3600)
    50677
    """
    seen = _table()["interruptions"]
    return Sourced(seen["days"] * DAY_S * seen["gpus"] / seen["count"], seen["source"])


def loader_rate() -> Sourced:
    """Rate at which an engine's loader fills one GPU from host memory [bytes/s]."""
    return _rate("loader")


def network_rate() -> Sourced:
    """Rate per GPU from a fast shared file system, all GPUs of a node at once [bytes/s]."""
    return _rate("network")


def _rate(name: str) -> Sourced:
    entry = _table()[name]
    return Sourced(entry["bytes_per_s_per_gpu"], entry["source"])
