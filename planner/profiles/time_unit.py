"""Does a column of times look like another unit than microseconds?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SHORTEST_KERNEL_S = 0.3e-6
"""No kernel launch, let alone a collective, is timed below this; an empty CUDA kernel takes about 2 us."""
_MILLI, _SECONDS = 1e3, 1e6
_FAR = 30.0
"""A wrong unit is at least a factor of 1,000; a wrong device at most about this."""


def wrong_unit(seconds: Floats, shortest_s: Floats, device: str) -> str:
    """What is wrong when the times must be another unit read as microseconds, empty when they may be right."""
    known = shortest_s > 0
    ratio = float(np.median(shortest_s[known] / seconds[known])) if known.any() else 0.0
    median = float(np.median(seconds))
    if ratio < _FAR and median >= SHORTEST_KERNEL_S:
        return ""
    # The smallest factor that brings both above their floor is the unit.
    lacking = max(ratio, SHORTEST_KERNEL_S / median)
    unit = "milliseconds" if lacking < _MILLI else "seconds"
    allowed = f"{ratio:.3g} x faster than the rates of {device} allow" if ratio >= _FAR else "no kernel is that fast"
    return f"time_us: median {median * _SECONDS:.3g}: {allowed}; is the column in {unit}?"
