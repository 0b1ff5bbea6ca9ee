"""Cores that this process may use."""

from __future__ import annotations

import os
import sys


def num_cores() -> int:
    """Cores the system lets this process run on; all of them where it cannot say."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
