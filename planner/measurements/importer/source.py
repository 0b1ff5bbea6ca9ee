"""One system's folder of published tables: `<family>/<engine>/<version>/<op>_perf.parquet`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from planner.errors import ProfileError
from planner.hardware import System
from planner.textfile import check_file

ENGINES = ("vllm", "sglang", "trtllm")
_MOST_BYTES = 500e6
_MOST_ROWS = 5_000_000
"""The largest published table has 0.3 million rows."""


class Source:
    """Reads tables and remembers which engine versions were used for which operation."""

    def __init__(self, folder: Path, system: System) -> None:
        self.folder = folder
        self.system = system
        self.device = ""
        self.last = folder
        """File read last, for messages."""
        self.used: set[tuple[str, str]] = set()
        self.versions: dict[str, dict[str, str]] = {}

    def newest(self, family: str, engine: str, op: str) -> tuple[str, Any] | None:
        """Version and DataFrame of the newest table, or None when the engine has none."""
        found = self.every(family, engine, op)
        return found[-1] if found else None

    def every(self, family: str, engine: str, op: str) -> list[tuple[str, Any]]:
        """All versions with their DataFrames, oldest first."""
        files = (self.folder / family / engine).glob(f"*/{op}_perf.parquet")
        paths = sorted(files, key=lambda path: _order(path.parent.name))
        return [(path.parent.name, self._read(path)) for path in paths]

    def _read(self, path: Path) -> Any:
        self.last = path
        return _read(path)

    def note(self, op: str, engine: str, version: str, frame: Any) -> None:
        """Record that `frame` went into table `op`."""
        self.used.add((engine, version))
        self.versions.setdefault(op, {})[engine] = version
        if "device" in frame.columns and len(frame):
            self.device = self.device or str(frame["device"].iloc[0])


def _order(version: str) -> tuple[tuple[int, ...], int]:
    """Sort key of versions: 1.3.0rc20 after 1.3.0rc5, and a release after its candidates."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version.split("rc")[0]))
    candidate = re.search(r"rc(\d+)", version)
    return numbers, int(candidate[1]) if candidate else 1_000_000


def _read(path: Path) -> Any:
    try:
        import pandas as pd
        from pyarrow import parquet
    except ImportError as error:
        raise ProfileError(f"parquet needs pandas and pyarrow ({error}): pip install 'moeplan[import]'") from error
    check_file(path, ProfileError, _MOST_BYTES)
    try:
        rows = parquet.ParquetFile(path).metadata.num_rows
        if rows > _MOST_ROWS:
            raise ValueError(f"it claims {rows:,} rows, at most {_MOST_ROWS:,} are read")
        return pd.read_parquet(path)
    except Exception as error:  # a damaged file can raise nearly anything
        raise ProfileError(f"{path}: not a readable parquet file ({error}). Copy it again.") from error
