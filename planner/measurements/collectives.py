"""Curves of collectives and expert exchange: measured inside a node, link laws beyond it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from planner.measurements import links, transfer
from planner.measurements.curves import Curve, Origin, curve_of, roofline_curve
from planner.measurements.exchange import Exchange, exchange
from planner.measurements.library import Match, find, format_penalty
from planner.measurements.roofline import Ceilings, Roof
from planner.measurements.store import Table

Floats = NDArray[np.float64]
_INSTANT_S = 1e-12


def collective_curve(table: Table | None, ceilings: Ceilings, op: links.Op, num_gpus: int) -> tuple[Curve, str]:
    """NCCL time of `op` over `num_gpus` contiguous ranks, and what it rests on."""
    return _hierarchical(ceilings, op, num_gpus, partial(_inside, table, ceilings, op, "nccl", 1))


def all_reduce_curve(
    table: Table | None, ceilings: Ceilings, engine: str, num_gpus: int, graph: bool
) -> tuple[Curve, str]:
    """The faster of NCCL and the engine's own all-reduce at every size."""

    def inside(local: int) -> tuple[Curve, str]:
        nccl, nccl_source = _inside(table, ceilings, "all_reduce", "nccl", 1, local)
        own, own_source = _inside(table, ceilings, "all_reduce", engine, int(graph), local)
        if own.shape_origin > nccl.shape_origin or own.shape_origin == Origin.ROOFLINE:
            return nccl, nccl_source
        if nccl.shape_origin > own.shape_origin:
            return own, own_source
        roof = links.inside(ceilings, "all_reduce", local)
        return _faster(own, nccl, roof), f"{own_source} or {nccl_source}, the faster"

    return _hierarchical(ceilings, "all_reduce", num_gpus, inside)


def _hierarchical(
    ceilings: Ceilings, op: links.Op, num_gpus: int, inside: Callable[[int], tuple[Curve, str]]
) -> tuple[Curve, str]:
    """Curve within the domain plus the link law between domains."""
    if num_gpus == 1:
        return roofline_curve(lambda x: np.full_like(x, _INSTANT_S)), "nothing to send"
    local, domains = links.span(ceilings, num_gpus)
    if domains == 1:
        return inside(local)
    between = links.outside(ceilings, op, local, domains)
    if local == 1:
        return roofline_curve(between), "link law between nodes"
    near, source = inside(local)
    source = f"{source}, link law between nodes"
    if op == "all_to_all":
        # Parts for the own node and for others travel at the same time.
        return _on(near, lambda x: np.maximum(near.seconds(x / domains), between(x))), source
    return _on(near, lambda x: near.seconds(x) + between(x)), source


def _on(near: Curve, seconds: Roof) -> Curve:
    """`seconds` on the sizes of `near`; EXTRAPOLATED, or ROOFLINE if `near` already is."""
    x = np.exp(near.log_x)
    log_s = np.maximum.accumulate(np.log(seconds(x)))
    origin = max(near.shape_origin, Origin.EXTRAPOLATED)
    return Curve(near.log_x, log_s, np.zeros(len(x), np.bool_), near.first, near.last, origin)


def _inside(
    table: Table | None, ceilings: Ceilings, op: links.Op, engine: str, graph: int, local: int
) -> tuple[Curve, str]:
    roof = links.inside(ceilings, op, local)
    if table is None or table.code("op", op) < 0:
        return roofline_curve(roof), "link law"
    mask = table.keys["op"] == table.code("op", op)
    if engine == "nccl":
        mask &= table.keys["engine"] == table.code("engine", "nccl")
    else:
        mask &= table.keys["engine"] != table.code("engine", "nccl")
    graphs = 0.2 * (table.keys["graph"] != graph)
    sizes = table.keys["num_gpus"][mask & (table.keys["graph"] == graph)]
    # Between two measured sizes both answer; outside, the one farther away would only add its own switch effects.
    count = 2 if len(sizes) and sizes.min() < local < sizes.max() else 1
    match = find(table, engine, {"num_gpus": (local, 1.0)}, graphs, mask, count) if mask.any() else None
    if match is None:
        return roofline_curve(roof), "link law"
    keys = match.table.keys
    curve = transfer.curve(match, "size", roof, lambda s: links.inside(ceilings, op, int(keys["num_gpus"][s])))
    return curve, f"{match.engine} {op} on {int(keys['num_gpus'][match.neighbours[0].series])} GPUs"


def _faster(one: Curve, other: Curve, roof: Roof) -> Curve:
    """Pointwise minimum of two measured curves on the union of their sizes."""
    last = max(one.last, other.last)
    grids = [c.log_x[(c.log_x <= last) & c.measured] for c in (one, other)]
    log_x = np.unique(np.concatenate(grids))
    x = np.exp(log_x)
    seconds = np.minimum(one.seconds(x), other.seconds(x))
    return curve_of(x, seconds, roof, min(one.shape_origin, other.shape_origin))


def exchange_curve(table: Table | None, ceilings: Ceilings, engine: str, what: Exchange) -> tuple[Curve, str]:
    """Dispatch or combine: measured kernels carried along the exchange law, or the law alone.

    DeepEP is one library under vLLM and SGLang, so its kernel times serve both; TensorRT-LLM's one-sided kernels
    serve TensorRT-LLM. A measurement inside a node says nothing about the network, nor the other way round.
    """
    if what.num_gpus == 1:
        return roofline_curve(lambda x: np.full_like(x, _INSTANT_S)), "nothing to send"
    roof = exchange(ceilings, what)
    match = _exchange_match(table, engine, what)
    if match is None or table is None:
        return roofline_curve(roof), f"{ceilings.exchange_library} law"
    keys = table.keys

    def roof_of(series: int) -> Roof:
        names = ("num_gpus", "nodes", "hidden", "top_k", "num_experts")
        gpus, nodes, hidden, top_k, experts = (int(keys[name][series]) for name in names)
        label = table.label("fmt", series)
        return exchange(ceilings, Exchange(what.step, what.mode, gpus, nodes, hidden, top_k, experts, label))

    return transfer.curve(match, "tokens", roof, roof_of), f"{match.engine} {what.step}"


def _exchange_match(table: Table | None, engine: str, what: Exchange) -> Match | None:
    if table is None:
        return None
    mask = (table.keys["mode"] == table.code("mode", what.mode)) & (table.keys["step"] == table.code("step", what.step))
    mask &= (table.keys["nodes"] > 1) == (what.nodes > 1)
    own = mask & (table.keys["engine"] == table.code("engine", engine))
    owner = engine if own.any() else "deepep"
    mask = own if own.any() else mask & (table.keys["engine"] == table.code("engine", "deepep"))
    if not mask.any():
        return None
    wanted_formats = (what.fmt, *(name for name in ("fp8", "bf16", "nvfp4") if name != what.fmt))
    penalties = format_penalty(table, "fmt", wanted_formats)
    shape = {"num_gpus": (what.num_gpus, 1.0), "nodes": (what.nodes, 0.5), "hidden": (what.hidden, 1.0)}
    shape |= {"top_k": (what.top_k, 0.7), "num_experts": (what.num_experts, 0.1)}
    return find(table, owner, shape, penalties, mask, count=2)
