"""Where and when a result was made, to stand beside it."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import planner


def stamp() -> dict[str, str]:
    """Day (UTC), machine, Python and version of moeplan."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{os.cpu_count()} x {models[0] if models else platform.machine()}",
        "python": platform.python_version(),
        "version": planner.__version__,
    }
