"""Tokens to their experts and back over `all_to_all_single`: the NCCL baseline, not DeepEP.

Every (token, expert) pair is a row of its own, without deduplication; split sizes are known on the host before the
clock starts. fp8 dispatch moves one byte per value, quantised before the clock starts; combine is always bf16.
`layer` is permute, dispatch, sort by expert, grouped GEMM, combine and the weighted sum; `layer_overlapped` runs two
halves of the tokens, one half's exchange under the other half's GEMM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from microbench.cases import Case
from microbench.device import Device
from microbench.errors import Unsupported, WrongResult
from microbench.experts import Experts, grouped_rows, looped_rows, make_experts
from microbench.precision import check_close
from microbench.ranks import Team
from microbench.routing import Ids, expert_ids, send_counts
from microbench.work import Work

Tensor = torch.Tensor
Finish = Callable[[], Tensor]
_CHECKED_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Trip:
    """Routes of one rank's tokens. `order`: own assignments [A] in the order sent; `sent`, `received`: rows per rank;
    `arrival`: order of arrived rows by local expert; `ends`: end of each local expert's rows; `tags`: what the
    arrived rows must be, as numbers rank x 2^32 + assignment.
    """

    order: Tensor
    sent: list[int]
    received: list[int]
    arrival: Tensor
    ends: Tensor
    tags: Tensor

    @classmethod
    def of(cls, chosen: list[Ids], rank: int, num_experts: int, device: torch.device) -> Trip:
        """Routes of `rank` when rank r's tokens chose `chosen[r]` [tokens, top_k]."""
        size, local = len(chosen), num_experts // len(chosen)
        sequences = [np.argsort(ids.ravel(), kind="stable") for ids in chosen]
        arrived, tags = [], []
        for source, (ids, sequence) in enumerate(zip(chosen, sequences, strict=True)):
            mine = sequence[ids.ravel()[sequence] // local == rank]
            arrived.append(ids.ravel()[mine] - rank * local)
            tags.append(source * 2**32 + mine)
        local_ids = np.concatenate(arrived)
        ends = np.cumsum(np.bincount(local_ids, minlength=local)).astype(np.int32)
        return cls(
            torch.from_numpy(sequences[rank]).to(device),
            send_counts(chosen[rank], num_experts, size).tolist(),
            [int(send_counts(ids, num_experts, size)[rank]) for ids in chosen],
            torch.from_numpy(np.argsort(local_ids, kind="stable")).to(device),
            torch.from_numpy(ends).to(device),
            torch.from_numpy(np.concatenate(tags)).to(device),
        )

    def dispatch(self, rows: Tensor, group: Any, wait: bool = True) -> Finish:
        """Start sending rows [A, ...] to their experts' ranks; the result waits for the arrived rows."""
        return _swap(rows, self.received, self.sent, group, wait)

    def combine(self, rows: Tensor, group: Any, wait: bool = True) -> Finish:
        """Start sending arrived rows back; the result waits for rows [A, ...] in the order sent."""
        return _swap(rows, self.sent, self.received, group, wait)


def _swap(rows: Tensor, into: list[int], out_of: list[int], group: Any, wait: bool) -> Finish:
    result = rows.new_empty(sum(into), *rows.shape[1:])
    request = dist.all_to_all_single(result, rows, into, out_of, group=group, async_op=not wait)

    def finish() -> Tensor:
        if request is not None:
            request.wait()
        return result

    return finish


def exchange(case: Case, device: Device, team: Team) -> Work:
    """One step of the exchange for `tokens` tokens per rank."""
    step, fmt = case.text("step"), case.text("fmt")
    if fmt not in (("bf16", "fp8") if step == "dispatch" else ("bf16",)):
        raise Unsupported(f"{step} is measured in bf16{' and fp8' if step == 'dispatch' else ''}, not {fmt}")
    tokens, top_k, num_experts = case.number("tokens"), case.number("top_k"), case.number("num_experts")
    if step.startswith("layer") and not case.width:
        raise Unsupported('the shapes file gives no expert "width" for this layer')
    chosen = [expert_ids(case.text("distribution"), tokens, top_k, num_experts, rank) for rank in range(team.size)]
    trip = team.together(lambda: _routes(case, device, team, chosen))
    _check_routes(trip, device, team)
    if step == "dispatch":
        return _one_way(case, device, team, trip.dispatch, len(trip.order))
    if step == "combine":
        return _one_way(case, device, team, trip.combine, len(trip.arrival))
    return _layer(case, device, team, chosen)


def _routes(case: Case, device: Device, team: Team, chosen: list[Ids]) -> Trip:
    trip = Trip.of(chosen, team.rank, case.number("num_experts"), device.torch_device)
    device.require(8.0 * case.number("hidden") * (len(trip.order) + len(trip.arrival)))
    return trip


def _check_routes(trip: Trip, device: Device, team: Team) -> None:
    """Dispatch numbered rows: what arrives must be what the routing of all ranks, in sequence, says."""
    numbers = trip.order + team.rank * 2**32
    arrived = trip.dispatch(numbers, team.data)()
    returned = trip.combine(arrived, team.data)()
    device.synchronise()
    right = torch.equal(arrived, trip.tags) and torch.equal(returned, numbers)
    if not all(team.gather(right)):
        raise WrongResult("rows did not arrive where their experts are")


def _one_way(case: Case, device: Device, team: Team, move: Callable[..., Finish], num_rows: int) -> Work:
    rows = device.random(num_rows, case.number("hidden"), seed=team.rank)
    if case.text("fmt") == "fp8":
        rows = rows.to(torch.float8_e4m3fn).view(torch.uint8)
    library = "all_to_all_single (rows only; splits known on the host)"
    return Work(lambda: move(rows, team.data)(), library, 0.0, float(rows.nbytes))


def _layer(case: Case, device: Device, team: Team, chosen: list[Ids]) -> Work:
    local, hidden = case.number("num_experts") // team.size, case.number("hidden")
    experts = team.together(lambda: _experts(case, device, team, local))
    halves = 2 if case.text("step") == "layer_overlapped" else 1
    if case.number("tokens") < halves:
        raise Unsupported("one token cannot be halved")
    x = device.random(case.number("tokens"), hidden, seed=100 + team.rank)
    cuts = [len(x) * part // halves for part in range(halves + 1)]
    parts = [slice(start, stop) for start, stop in pairwise(cuts)]
    number = case.number("num_experts")
    trips = [Trip.of([ids[part] for ids in chosen], team.rank, number, device.torch_device) for part in parts]
    run = _round_trip(experts, x, parts, trips, case.number("top_k"), team)
    out = run()
    device.synchronise()
    team.together(lambda: _check_layer(case, device, x, chosen[team.rank], out))
    arrived = sum(len(trip.arrival) for trip in trips)
    flop = 6.0 * arrived * hidden * case.width
    multiply = "torch grouped_mm" if hasattr(F, "grouped_mm") else "loop"
    library = f"all_to_all_single (eager round trip; {multiply} width {case.width}; splits known on the host)"
    return Work(run, library, flop, 2.0 * arrived * hidden)


def _experts(case: Case, device: Device, team: Team, local: int) -> Experts:
    device.require(6.0 * local * case.number("hidden") * case.width + 64.0 * case.number("tokens") * case.width)
    return make_experts(device, local, case.number("hidden"), case.width, first=team.rank * local)


def _round_trip(
    experts: Experts, x: Tensor, parts: list[slice], trips: list[Trip], top_k: int, team: Team
) -> Callable[[], Tensor]:
    """The layer over `parts` of the tokens; the exchange of a part runs under the GEMM of the one before."""
    overlapped = len(parts) > 1

    def send(index: int) -> Finish:
        rows = x[parts[index]][trips[index].order // top_k]
        return trips[index].dispatch(rows, team.data, wait=not overlapped)

    def run() -> Tensor:
        arriving, returning = send(0), []
        for index, trip in enumerate(trips):
            arrived = arriving()
            if index + 1 < len(trips):
                arriving = send(index + 1)
            returning.append(trip.combine(_multiply(experts, trip, arrived), team.data, wait=not overlapped))
        return torch.cat([_merge(finish(), trip, top_k) for finish, trip in zip(returning, trips, strict=True)])

    return run


def _multiply(experts: Experts, trip: Trip, arrived: Tensor) -> Tensor:
    if len(arrived) == 0:
        return arrived
    multiply = grouped_rows if hasattr(F, "grouped_mm") else looped_rows
    out = multiply(experts, arrived[trip.arrival], trip.ends)
    return torch.empty_like(out).index_copy_(0, trip.arrival, out)


def _merge(returned: Tensor, trip: Trip, top_k: int) -> Tensor:
    """Mean over the top_k copies of each token; equal weights cost the same as others."""
    rows = torch.empty_like(returned).index_copy_(0, trip.order, returned)
    return (rows.view(-1, top_k, returned.shape[1]) * (1.0 / top_k)).sum(dim=1)


def _check_layer(case: Case, device: Device, x: Tensor, ids: Ids, out: Tensor) -> None:
    """Some tokens against the plain sum over their experts, whose weights every process can make."""
    tokens = sorted({0, len(x) - 1})[:_CHECKED_TOKENS]
    reference = torch.zeros(len(tokens), x.shape[1], device=x.device)
    for place, token in enumerate(tokens):
        for expert in ids[token].tolist():
            single = make_experts(device, 1, x.shape[1], case.width, first=expert)
            reference[place] += single.one(0, x[token : token + 1])[0] / len(ids[token])
    check_close(out[tokens], reference)
