"""The processes of a run under torchrun, one per GPU, and the teams of them that a collective case uses.

Control messages (next case, stop or go on, times) go over gloo, data over NCCL (RCCL on ROCm answers to the same
name) or, on CPUs, gloo. Every process must call the methods in the same order.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from microbench.errors import Unsupported, WrongResult

T = TypeVar("T")
_PATIENCE = dt.timedelta(hours=2)
"""How long idle processes wait for the one that measures local operations."""
_DATA_PATIENCE = dt.timedelta(minutes=10)


def host_hash() -> str:
    """Short hash of the host name: tells machines apart without naming them."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Team:
    """The first `size` processes. `data` and `control` are process groups, None for one process alone."""

    rank: int
    size: int
    data: Any = None
    control: Any = None

    def gather(self, value: T) -> list[T]:
        """The `value` of every member, in rank order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def share(self, value: T) -> T:
        """The first member's `value`."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        """Wait on the host until all members are here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def together(self, act: Callable[[], T]) -> T:
        """Result of `act`, which must not communicate; when one member fails, all raise."""
        failure: Exception | None = None
        result: T | None = None
        try:
            result = act()
        except (RuntimeError, Unsupported, WrongResult) as error:
            failure = error
        reports = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        others = [f"process {rank}: {report}" for rank, report in enumerate(reports) if report is not None]
        if others:
            raise Unsupported("; ".join(others)[:300])
        return result  # type: ignore[return-value]


@dataclass(slots=True)
class Ranks:
    """All processes of the run. `nodes[r]` is the machine of rank r; `engine` the communication library."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    engine: str = ""
    nodes: list[int] = field(default_factory=lambda: [0])
    _teams: dict[int, Team | None] = field(default_factory=dict)

    @property
    def everyone(self) -> Team:
        """The team of all processes."""
        return cast(Team, self.team(self.size))

    def team(self, size: int) -> Team | None:
        """The team of the first `size` processes, None for a process outside it."""
        if size not in self._teams:
            self._teams[size] = self._make_team(size)
        return self._teams[size]

    def _make_team(self, size: int) -> Team | None:
        if self.size == 1:
            return Team(0, 1)
        members = list(range(size))
        control = dist.new_group(members, backend="gloo", timeout=_PATIENCE)
        data = dist.group.WORLD if size == self.size else dist.new_group(members)
        return Team(self.rank, size, data, control) if self.rank < size else None

    def groups(self) -> tuple[tuple[int, int], ...]:
        """(processes, machines) of the groups to measure: all, then powers of two below, at least 2."""
        sizes = [self.size] + [2**power for power in range(12, 0, -1) if 2**power < self.size]
        return tuple((size, len(set(self.nodes[:size]))) for size in sizes if size > 1)

    def close(self) -> None:
        """Leave the process group, all together: gloo aborts a process at exit when its peers were gone before."""
        if self.size > 1:
            self.everyone.barrier()
            self._teams.clear()
            dist.destroy_process_group()


def local_rank() -> int:
    """Number of this process on its machine, as torchrun sets it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join(is_cuda: bool) -> Ranks:
    """The processes torchrun started; one process alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
    dist.init_process_group(backend, timeout=_DATA_PATIENCE)
    engine = ("rccl" if torch.version.hip else "nccl") if is_cuda else "gloo"
    ranks = Ranks(dist.get_rank(), size, local_rank(), engine)
    hosts = ranks.everyone.gather(os.environ.get("GROUP_RANK", "") + host_hash())
    names = list(dict.fromkeys(hosts))
    ranks.nodes = [names.index(host) for host in hosts]
    return ranks
