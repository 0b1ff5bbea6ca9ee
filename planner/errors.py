"""What can go wrong, as the user sees it.

    PlannerError
    ├── InputError            the user can fix the input             (exit code 2)
    │   ├── ModelConfigError  a config.json or model TOML
    │   ├── ProfileError      a hardware profile or measured table
    │   ├── LayoutError       a layout whose products do not match
    │   └── WorkloadError     a workload, trace or SLO
    ├── Infeasible            a fair question whose answer is no     (exit code 3)
    │   ├── DoesNotFit        memory
    │   └── MissesSlo         fits, but latency or throughput is short
    └── NoMeasurement         a table was asked for a point it cannot answer

Every message says what, the offending value, and the nearest remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice

_MOST_MESSAGE = 8000
_MOST_NAME = 80
"""Longer names are shown and compared by their beginning."""
_MOST_NAMES = 1000


class PlannerError(Exception):
    """Anything moeplan raises on purpose; the CLI prints it without a traceback.

    Messages quote offending values, which can be as long as a file: what is beyond some pages is left out.
    """

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        left_out = len(message) - _MOST_MESSAGE
        super().__init__(message if left_out <= 0 else f"{message[:_MOST_MESSAGE]}... ({left_out:,} characters more)")


class InputError(PlannerError):
    """The input is wrong and the message says how to repair it."""


class ModelConfigError(InputError):
    """A Hugging Face config.json or a model TOML cannot be read as a model."""


class ProfileError(InputError):
    """A hardware profile or a measured table is unknown, malformed or implausible."""


class LayoutError(InputError):
    """A parallel layout breaks a divisibility or product rule."""


class WorkloadError(InputError):
    """A workload, trace, arrival rate or SLO cannot be used."""


class Infeasible(PlannerError):
    """The question is fair and the answer is no; `remedies` are ordered by price."""

    exit_code = 3

    def __init__(self, message: str, remedies: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.remedies = tuple(remedies)


class DoesNotFit(Infeasible):
    """The model does not fit the memory of any offered layout."""


class MissesSlo(Infeasible):
    """The model fits, but no offered layout meets the SLO at the demanded rate."""


class NoMeasurement(PlannerError):
    """A measured table has no data for the asked point; callers fall back and flag it."""


def nearest(name: str, known: Iterable[str], count: int = 4) -> str:
    """Remedy for an unknown `name`: the closest `known` spellings, or all of them when few."""
    names = sorted({each[:_MOST_NAME] for each in islice(known, _MOST_NAMES)})
    name = name[:_MOST_NAME]
    matches = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=count, cutoff=0.4)
    close = [n for n in names if n.lower() in matches]
    if close:
        return "did you mean " + ", ".join(close) + "?"
    if len(names) <= 12:
        return "known: " + ", ".join(names) + "."
    return f"{len(names)} are known, for example " + ", ".join(names[:: max(1, len(names) // count)][:count]) + "."
