"""DeepSeek's expert parallelism load balancer.

Source of the algorithm: deepseek-ai/EPLB@d52c72d (README and `eplb.py`), the default of vLLM and SGLang. Expert
groups go to nodes, hot experts are copied inside their node, copies go to the ranks of the node. Without groups,
the nodes are ignored. Equal loads keep the order of their ids; loads are compared in float64, the original in float32.
"""

from __future__ import annotations

import numpy as np

from planner.placement.greedy import packed, with_copies
from planner.placement.mapping import Floats, Ints


def eplb_slots(load: Floats, num_slots: int, num_ranks: int, num_nodes: int, num_groups: int) -> Ints:
    """Experts in slots [layers, num_slots] for `load` [layers, experts].

    Hierarchical if the nodes divide the groups, else global: one group, one node.
    """
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    layers, experts = load.shape
    on_node = grouped(load, num_nodes, num_groups)
    node_load = np.take_along_axis(load, on_node, axis=1).reshape(layers * num_nodes, -1)
    items, weight = with_copies(node_load, num_slots // num_nodes)
    placed = np.take_along_axis(items, _unpacked(weight, num_ranks // num_nodes), axis=1)
    first = np.arange(num_nodes)[None, :, None] * (experts // num_nodes)
    local = placed.reshape(layers, num_nodes, -1) + first
    return np.take_along_axis(on_node, local.reshape(layers, num_slots), axis=1)


def grouped(load: Floats, num_nodes: int, num_groups: int) -> Ints:
    """Experts in node order [layers, experts], groups kept whole and their loads balanced over the nodes."""
    layers, experts = load.shape
    size = experts // num_groups
    group = _unpacked(load.reshape(layers, num_groups, size).sum(axis=2), num_nodes)
    return np.asarray((group[:, :, None] * size + np.arange(size)).reshape(layers, experts))


def _unpacked(weight: Floats, num_packs: int) -> Ints:
    """Items [layers, items] in the order pack, seat; one item per pack stays where it is, as published."""
    if weight.shape[1] == num_packs:
        return np.broadcast_to(np.arange(num_packs), weight.shape)
    pack, seat = packed(weight, num_packs, np.argsort(-weight, axis=1, kind="stable"))
    out = np.empty(weight.shape, dtype=np.int64)
    np.put_along_axis(out, pack * (weight.shape[1] // num_packs) + seat, np.arange(weight.shape[1])[None, :], axis=1)
    return out
