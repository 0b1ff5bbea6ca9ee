"""Collectives of torch.distributed over message size.

Bytes: all_reduce, the tensor on one rank; all_gather and reduce_scatter, the whole tensor (all ranks' parts);
all_to_all, what one rank sends, its own part included; send_recv, what every rank sends to the next in a ring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from microbench.cases import Case
from microbench.device import Device
from microbench.errors import Unsupported
from microbench.precision import check_close
from microbench.ranks import Team
from microbench.work import Work

Tensor = torch.Tensor
_BYTES_PER_VALUE = 2
_SMALL_VALUES = 8
"""Values run through 0 ... 7, so that bf16 sums over ranks can be compared."""


def collective(case: Case, device: Device, team: Team) -> Work:
    """One collective of bf16 values among the team."""
    size = case.number("bytes")
    count = size // _BYTES_PER_VALUE // team.size * team.size
    if count == 0:
        raise Unsupported(f"{size} bytes are less than one value per process")
    sent = team.together(lambda: _values(device, count, team.rank, size))
    make = {
        "all_reduce": _all_reduce,
        "all_gather": _all_gather,
        "reduce_scatter": _reduce_scatter,
        "all_to_all": _all_to_all,
        "send_recv": _send_recv,
    }[case.text("op")]
    run, result, expected = make(sent, team)
    run()
    device.synchronise()
    team.together(lambda: check_close(result, expected))
    return Work(run, f"torch.distributed {case.text('op')}", 0.0, float(count * _BYTES_PER_VALUE))


def _values(device: Device, count: int, rank: int, size: int) -> Tensor:
    device.require(16.0 * size)
    return _pattern(torch.arange(count, device=device.torch_device), rank)


def _pattern(places: Tensor, rank: int) -> Tensor:
    """What `rank` holds at `places`; every process can compute it for every other."""
    return ((places + rank) % _SMALL_VALUES).to(torch.bfloat16)


Prepared = tuple[Callable[[], object], Tensor, Tensor]


def _summed(sent: Tensor, team: Team) -> Tensor:
    places = torch.arange(len(sent), device=sent.device)
    return sum((_pattern(places, rank).float() for rank in range(team.size)), torch.zeros(1, device=sent.device))


def _all_reduce(sent: Tensor, team: Team) -> Prepared:
    """In place, as engines call it; the values grow to infinity over the repeats, which costs no time."""
    return (lambda: dist.all_reduce(sent, group=team.data)), sent, _summed(sent, team)


def _all_gather(sent: Tensor, team: Team) -> Prepared:
    part = len(sent) // team.size
    gathered, mine = torch.empty_like(sent), sent[:part].clone()
    expected = torch.cat([_pattern(torch.arange(part, device=sent.device), rank) for rank in range(team.size)])
    call = _named("all_gather_single", "all_gather_into_tensor")
    return (lambda: call(gathered, mine, group=team.data)), gathered, expected


def _reduce_scatter(sent: Tensor, team: Team) -> Prepared:
    part = len(sent) // team.size
    mine = torch.empty_like(sent[:part])
    call = _named("reduce_scatter_single", "reduce_scatter_tensor")
    run = lambda: call(mine, sent, group=team.data)  # noqa: E731
    return run, mine, _summed(sent, team)[team.rank * part : (team.rank + 1) * part]


def _all_to_all(sent: Tensor, team: Team) -> Prepared:
    part = len(sent) // team.size
    received = torch.empty_like(sent)
    places = torch.arange(team.rank * part, (team.rank + 1) * part, device=sent.device)
    expected = torch.cat([_pattern(places, rank) for rank in range(team.size)])
    return (lambda: dist.all_to_all_single(received, sent, group=team.data)), received, expected


def _send_recv(sent: Tensor, team: Team) -> Prepared:
    received = torch.empty_like(sent)
    after, before = (team.rank + 1) % team.size, (team.rank - 1) % team.size

    def run() -> None:
        ring = [dist.P2POp(dist.isend, sent, after, team.data), dist.P2POp(dist.irecv, received, before, team.data)]
        for request in dist.batch_isend_irecv(ring):
            request.wait()

    return run, received, _pattern(torch.arange(len(sent), device=sent.device), before)


def _named(new: str, old: str) -> Callable[..., Any]:
    """The function by its name since torch 2.13, or by the one before."""
    return getattr(dist, new, None) or getattr(dist, old)  # type: ignore[no-any-return]
