"""What can go wrong in a run."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """The command cannot be carried out as given; printed as one message, exit code 2."""


class Unsupported(Exception):
    """This device or this torch cannot run the case; recorded with its reason and skipped."""


class WrongResult(Exception):
    """The timed code does not compute what a plain reference computes; the case is not timed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Remedy for an unknown `name`.

    >>> nearest("gem", ["gemm", "head"])
    'did you mean gemm?'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else "known: " + ", ".join(names)
