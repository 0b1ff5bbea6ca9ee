"""A case made ready to run: inputs allocated, result checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Work:
    """What is timed and what it costs at least.

    `run` does the operation once. `read_bytes` and `write_bytes` are the fewest bytes moved through device memory;
    `arithmetic` is the format whose peak `flop` is held against. `is_captured` asks for replay from a CUDA graph,
    so that operations of many kernels are not timed by the host that launches them. `on_host` times with the host
    clock, `stopwatch` with the bench's own [s].
    """

    run: Callable[[], object]
    library: str
    flop: float = 0.0
    read_bytes: float = 0.0
    write_bytes: float = 0.0
    arithmetic: str = "bf16"
    is_captured: bool = False
    on_host: bool = False
    stopwatch: Callable[[], float] | None = None

    @property
    def bytes(self) -> float:
        """Bytes read and written."""
        return self.read_bytes + self.write_bytes
