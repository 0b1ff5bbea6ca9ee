"""Refusing a value: one sentence, whether a file or a caller stated it."""

from __future__ import annotations

from planner.errors import InputError


class RefusedTermError(InputError, ValueError):
    """A commercial term cannot be used; a ValueError too, so that all faults of a file are listed at once."""


def refuse_unless(holds: bool, sentence: str) -> None:
    """Raise `sentence` unless it `holds`."""
    if not holds:
        raise RefusedTermError(sentence)


def within(name: str, value: float, low: float, high: float) -> None:
    """Refuse a `value` outside [low, high], NaN included."""
    refuse_unless(low <= value <= high, f"{name} must lie in {low:g} to {high:g}, got {value:g}")


def positive(name: str, value: float) -> None:
    """Refuse a `value` that is not finite and above 0."""
    refuse_unless(0 < value < float("inf"), f"{name} must be positive, got {value:g}")


def not_negative(name: str, value: float) -> None:
    """Refuse a `value` that is not finite or below 0."""
    refuse_unless(0 <= value < float("inf"), f"{name} must not be negative, got {value:g}")
