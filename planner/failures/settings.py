"""Times, rates and failure moments from what a user typed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from planner.engine import Engine
from planner.errors import InputError
from planner.failures.choices import FailureChoices, OnFailure, RecoveryChoices
from planner.failures.recovery import Sourced, recovery
from planner.units import whole_number

_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|min|h|d)\s*")
_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_RATE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(GB|MB|TB)/s\s*", re.IGNORECASE)
_BYTES = {"mb": 1e6, "gb": 1e9, "tb": 1e12}
LOAD_SOURCES = ("nvme", "dram", "network", "peer")
GIVEN = "given"
"""Source of a number that the user stated."""


@dataclass(frozen=True, slots=True)
class RecoverySettings:
    """`detect` [s], `provision_s` before an engine starts, and where weights come from.

    `load_from` is a name of `LOAD_SOURCES` or "rate", with `node_bytes_per_s` then the rate of one node.
    """

    detect: Sourced
    load_from: str
    node_bytes_per_s: float | None
    provision_s: float


@dataclass(frozen=True, slots=True)
class FailureSettings:
    """Failures of a run: `fixed` (seconds, replica), and at random every `mtbf_gpu_s` per GPU (None: never)."""

    recovery: RecoverySettings
    fixed: tuple[tuple[float, int], ...]
    mtbf_gpu_s: float | None
    on_failure: OnFailure
    elastic: bool


def parse_duration(option: str, text: str, *, positive: bool = False) -> float:
    """Seconds of `60s`, `5min` or `50000h`; InputError naming `option` otherwise, or for 0 where `positive`."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise InputError(f"{option} {text}: give a time with its unit, such as 60s, 5min or 50000h")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if positive and not 0.0 < seconds < math.inf:
        raise InputError(f"{option} {text}: a time above 0 is needed")
    return seconds


def recovery_settings(engine: Engine, chosen: RecoveryChoices) -> RecoverySettings:
    """Settings of `chosen` with the defaults of `engine`. Raises InputError on a malformed time, source or rate."""
    detect = recovery(engine).detect
    if chosen.detect is not None:
        detect = Sourced(parse_duration("--detect", chosen.detect), GIVEN)
    source, rate = _load_source(chosen.load_from)
    return RecoverySettings(detect, source, rate, parse_duration("--provision", chosen.provision))


def failure_settings(engine: Engine, chosen: FailureChoices) -> FailureSettings | None:
    """Settings of a run; None when nothing fails in it.

    Raises InputError on a malformed time or replica, and when options say how failures go but none happens.
    """
    if not chosen.fail_at and chosen.mtbf_gpu is None:
        idle = next((name for name, given in _given(chosen).items() if given), None)
        if idle:
            raise InputError(f"{idle} is used only when ranks fail: add --fail-at 60s or --mtbf-gpu 50000h")
        return None
    mtbf_s = None if chosen.mtbf_gpu is None else parse_duration("--mtbf-gpu", chosen.mtbf_gpu, positive=True)
    fixed = tuple(sorted(_fail_at(text) for text in chosen.fail_at))
    return FailureSettings(recovery_settings(engine, chosen), fixed, mtbf_s, chosen.on_failure, chosen.elastic)


def _given(chosen: FailureChoices) -> dict[str, bool]:
    default = FailureChoices()
    names = ("detect", "load_from", "provision", "on_failure", "elastic")
    return {f"--{name.replace('_', '-')}": getattr(chosen, name) != getattr(default, name) for name in names}


def _fail_at(text: str) -> tuple[float, int]:
    time, comma, replica = text.partition(",")
    number = whole_number(replica.strip()) if comma else 0
    if number is None:
        raise InputError(f"--fail-at {text}: {replica!r} is no replica. Write 60s,1 for replica 1; the first is 0.")
    return parse_duration("--fail-at", time), number


def _load_source(text: str) -> tuple[str, float | None]:
    if text in LOAD_SOURCES:
        return text, None
    match = _RATE.fullmatch(text)
    if match is None:
        raise InputError(f"--load-from {text}: use {', '.join(LOAD_SOURCES)}, or a rate per node such as 10GB/s")
    rate = float(match[1]) * _BYTES[match[2].lower()]
    if rate <= 0:
        raise InputError(f"--load-from {text}: a rate above 0 is needed")
    return "rate", rate


def parse_share(option: str, text: str) -> float:
    """A share between 0 and 1 from `99.9%` or `0.999`; InputError naming `option` otherwise."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100.0 if percent else 1.0)
    except ValueError:
        raise InputError(f"{option} {text}: give a share such as 99.9% or 0.999") from None
    if not 0.0 < share < 1.0:
        raise InputError(f"{option} {text}: a share between 0 and 1 is needed, such as 99.9%")
    return share
