"""Collectives and expert dispatch / combine.

Sizes. NCCL and custom all-reduce tables count elements of 2 bytes (H100 x 8 all-reduce of 268,435,456 halves:
445 GB/s bus bandwidth; read as bytes, half of what the links do). The stored size follows nccl-tests: all-reduce the
tensor of one rank, all-gather the gathered tensor, reduce-scatter the tensor before, all-to-all what one rank sends.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.measurements.importer.clean import Cleaned
from planner.measurements.importer.engines_exchange import add_engine_exchange
from planner.measurements.importer.kernels import MS, Rows
from planner.measurements.importer.source import ENGINES, Source
from planner.measurements.roofline import Ceilings

Floats = NDArray[np.float64]

ELEMENT_BYTES = 2
BUS_FACTOR = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}
"""Bus bandwidth = factor x (n - 1) / n x size / time (nccl-tests PERFORMANCE.md)."""
_NCCL_OPS = {"all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter"}
_NCCL_OPS |= {"alltoall": "all_to_all"}
_BROKEN_SHARE = 1 / 3
DEEPEP_SMS = 20
"""SMs DeepEP gives to its normal kernels by default (handbook kernels 4); 24 is used where 20 was not measured."""
_NORMAL_NODES = 4
"""On 8 nodes this cluster's normal mode took 6.5 and 12.5 ms for 4,096 tokens where DeepEP publishes 51 and 50 GB/s
(handbook kernels 4), twice the time of the NIC law that its own 2 and 4 nodes obey."""
US = 1e-6


def bus_bytes_per_s(op: Any, num_gpus: Any, size: Any, seconds: Any) -> Floats:
    """Bus bandwidth of each row."""
    factor = np.array([BUS_FACTOR[str(name)] for name in op])
    return np.asarray(factor * (num_gpus - 1) / num_gpus * size / seconds)


def collective(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """NCCL (engine `nccl`) and engines' own all-reduce; `graph` 1 when captured in a CUDA graph."""
    rows = Rows.empty()
    found = source.newest("comm", "nccl", "nccl")
    if found is not None:
        version, frame = found
        frame = frame[frame["nccl_dtype"] == "half"]
        source.note("collective", "nccl", version, frame)
        names = np.array([_NCCL_OPS[name] for name in frame["op_name"]])
        rows.add(_collective_columns("nccl", names, np.ones(len(frame), np.int64), frame))
    for engine in ENGINES:
        for version, frame in source.every("comm", engine, "custom_allreduce"):
            source.note("collective", engine, version, frame)
            backend = frame["backend"].astype(str) if "backend" in frame else frame["op_name"].astype(str)
            graph = (~backend.str.contains("eager")).to_numpy().astype(np.int64)
            # Versions are merged: the fastest wins, because two hosts (L40S, GB200) were measured with broken
            # peer access in some versions and the kernels themselves did not change.
            rows.add(_collective_columns(engine, np.full(len(frame), "all_reduce"), graph, frame))
    c = rows.joined()
    if not c:
        return None
    ok = _plausible(source, c)
    rows.drop("under 1/3 of this node's best bus bandwidth (no peer access), or above the link rate", np.sum(~ok))
    return rows.table("collective", ("engine", "op", "graph", "num_gpus"), ("size",), ok)


def _collective_columns(engine: str, names: Any, graph: Any, frame: Any) -> dict[str, Any]:
    return {
        "engine": engine,
        "op": names,
        "graph": graph,
        "num_gpus": frame["num_gpus"].to_numpy(),
        "size": frame["message_size"].to_numpy() * ELEMENT_BYTES,
        "seconds": frame["latency"].to_numpy() * MS,
    }


def _plausible(source: Source, c: dict[str, Any]) -> Any:
    """Drop whole series whose large messages run far below the best of the node, and rows above the link rate.

    NVLink SHARP reduces in the switch, so an all-reduce may show up to twice the link as bus bandwidth.
    """
    import pandas as pd

    speed = bus_bytes_per_s(c["op"], c["num_gpus"], c["size"], c["seconds"])
    frame = pd.DataFrame({name: c[name] for name in ("engine", "op", "graph", "num_gpus")}).assign(speed=speed)
    series = frame.groupby(["engine", "op", "graph", "num_gpus"])["speed"].transform("max")
    best = frame.groupby("num_gpus")["speed"].transform("max")
    limit = source.system.scale_up.bytes_per_s * np.where(c["op"] == "all_reduce", 2.0, 1.0) * 1.1
    return ((series >= best * _BROKEN_SHARE) & (speed <= limit)).to_numpy()


def dispatch(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """Expert dispatch and combine; axis: tokens per rank. Keys as `Tables.dispatch` takes them."""
    rows = Rows.empty()
    for version, frame in source.every("comm", "sglang", "wideep_deepep_ll"):
        source.note("dispatch", "deepep", version, frame)
        for step, fmt in (("dispatch", "fp8"), ("combine", "bf16")):
            rows.add(_deepep(source, frame, "low_latency", step, fmt, frame[f"{step}_avg_t_us"].to_numpy()))
    for version, frame in source.every("comm", "sglang", "wideep_deepep_normal"):
        source.note("dispatch", "deepep", version, frame)
        rows.drop("normal mode on 8 nodes at half the published DeepEP rate", (frame["node_num"] > _NORMAL_NODES).sum())
        for step, fmt in (("dispatch", "fp8"), ("combine", "bf16")):
            chosen = _default_sms(frame[frame["node_num"] <= _NORMAL_NODES], step)
            time_us = chosen[f"{step}_transmit_us"] + chosen[f"{step}_notify_us"]
            rows.add(_deepep(source, chosen, "normal", step, fmt, time_us.to_numpy()))
    found = source.newest("comm", "trtllm", "trtllm_alltoall")
    if found is not None:
        version, frame = found
        source.note("dispatch", "trtllm", version, frame)
        _add_one_sided(rows, frame)
    add_engine_exchange(rows, source)
    if not rows.columns:
        return None
    c = rows.joined()
    ok = c["seconds"] > 0
    rows.drop("no time", np.count_nonzero(~ok))
    keys = ("engine", "mode", "step", "fmt", "num_gpus", "nodes", "hidden", "top_k", "num_experts")
    return rows.table("dispatch", keys, ("tokens",), ok)


def _deepep(source: Source, frame: Any, mode: str, step: str, fmt: str, time_us: Floats) -> dict[str, Any]:
    nodes = frame["node_num"].to_numpy()
    per_node = min(source.system.gpus_per_node, 8)
    return {
        "engine": "deepep",
        "mode": mode,
        "step": step,
        "fmt": fmt,
        "num_gpus": nodes * per_node,
        "nodes": nodes,
        "hidden": frame["hidden_size"].to_numpy(),
        "top_k": frame["num_topk"].to_numpy(),
        # 288 is 256 experts and 32 redundant copies.
        "num_experts": np.where(frame["num_experts"] == 288, 256, frame["num_experts"]),
        "tokens": frame["num_token"].to_numpy(),
        "seconds": time_us * US,
    }


def _default_sms(frame: Any, step: str) -> Any:
    column = f"{step}_sms"
    shape = ["node_num", "hidden_size", "num_token", "num_topk", "num_experts"]
    near = frame.assign(far=(frame[column] - DEEPEP_SMS).abs()).sort_values([*shape, "far", column])
    return near.drop_duplicates(shape)


def _add_one_sided(rows: Rows, frame: Any) -> None:
    """TensorRT-LLM NVLink one-sided all-to-all; its dispatch includes the prepare step where there is one."""
    frame = frame[frame["kernel_source"] == "NVLinkOneSided"]
    shape = ["moe_dtype", "num_tokens", "hidden_size", "topk", "num_experts", "moe_ep_size"]
    for step, names in (
        ("dispatch", ["alltoall_prepare", "alltoall_dispatch"]),
        ("combine", ["alltoall_combine"]),
    ):
        chosen = frame[frame["op_name"].isin(names)].groupby(shape, as_index=False)["latency"].sum()
        if not len(chosen):
            continue
        fmt = chosen["moe_dtype"].replace({"bfloat16": "bf16"}) if step == "dispatch" else "bf16"
        for mode in ("low_latency", "normal"):
            rows.add(
                {
                    "engine": "trtllm",
                    "mode": mode,
                    "step": step,
                    "fmt": fmt if isinstance(fmt, str) else fmt.to_numpy(),
                    "num_gpus": chosen["moe_ep_size"].to_numpy(),
                    "nodes": 1,
                    "hidden": chosen["hidden_size"].to_numpy(),
                    "top_k": chosen["topk"].to_numpy(),
                    "num_experts": chosen["num_experts"].to_numpy(),
                    "tokens": chosen["num_tokens"].to_numpy(),
                    "seconds": chosen["latency"].to_numpy() * MS,
                }
            )
