"""Exchange and grouped GEMMs as an engine's own wide-EP path runs them, kept apart from the bare library kernels.

The engine labels say so: times through an engine's Python API include launch and quantisation (270 us at 16 tokens
where the bare DeepEP kernel takes 30), so `Tables` does not take them for kernels inside a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from planner.measurements.formats import canonical
from planner.measurements.importer.clean import Cleaned, peak_flop_per_s, possible
from planner.measurements.importer.kernels import MS, Rows
from planner.measurements.importer.source import Source
from planner.measurements.roofline import Ceilings

US = 1e-6
UNSTATED = "unstated"
"""vLLM's table does not say in which format tokens travel."""
_MODES = {"deepep_ht": "normal", "deepep_ll": "low_latency"}
_COMM_FORMATS = {"default": UNSTATED, "bfloat16": "bf16", "fp8": "fp8", "nvfp4": "nvfp4"}
MASKED_KEYS = ("engine", "fmt", "hidden", "width", "local_experts", "num_experts", "top_k", "num_matrices")


def add_engine_exchange(rows: Rows, source: Source) -> None:
    """`moe_a2a` of vLLM and TensorRT-LLM: DeepEP through the engine's API, tokens per rank (its HT rows reach
    65,536 tokens at 200 GB/s per GPU; read as group totals they would be at 25)."""
    for engine in ("vllm", "trtllm"):
        found = source.newest("comm", engine, "moe_a2a")
        if found is None:
            continue
        version, frame = found
        label = f"{engine} api"
        mode = frame["comm_backend"].str.removeprefix("trtllm_").map(_MODES)
        fmt = frame["comm_dtype"].map(_COMM_FORMATS)
        # Combine takes the same time whatever the label: it sends bf16, except where the label is a format of its own.
        combine = (frame["phase"] == "combine") & frame["comm_dtype"].isin(["bfloat16", "default"])
        keep = mode.notna() & fmt.notna() & (combine | (frame["phase"] == "dispatch"))
        rows.drop("exchange without a plain equivalent (DeepEP v2 preview, low-precision combine)", (~keep).sum())
        chosen = frame[keep]
        if not len(chosen):
            continue
        source.note("dispatch", label, version, chosen)
        rows.add(_columns(label, chosen, mode[keep], fmt[keep]))


def _columns(label: str, frame: Any, mode: Any, fmt: Any) -> dict[str, Any]:
    return {
        "engine": label,
        "mode": mode.to_numpy(),
        "step": frame["phase"].to_numpy(),
        "fmt": np.where(frame["phase"] == "combine", "bf16", fmt),
        "num_gpus": frame["ep_size"].to_numpy(),
        "nodes": frame["node_num"].to_numpy(),
        "hidden": frame["hidden_size"].to_numpy(),
        "top_k": frame["topk"].to_numpy(),
        "num_experts": frame["num_experts"].to_numpy(),
        "tokens": frame["num_tokens"].to_numpy(),
        "seconds": frame["latency"].to_numpy() * US,
    }


def expert_gemm_masked(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """SGLang's grouped GEMMs behind DeepEP low-latency dispatch; `num_tokens` is the group's, routing uniform.

    tokens x top_k / EP assignments per rank fit: EP 256 at 32,768 tokens gives 1.02 PFLOP/s on one expert, EP 4 at
    512 tokens streams all 64 experts at 3.8 TB/s (H200).
    """
    found = source.newest("moe", "sglang", "wideep_generation_moe")
    if found is None:
        return None
    version, frame = found
    frame = frame[frame["distribution"] == "uniform"]
    source.note("expert_gemm_masked", "sglang", version, frame)
    rows = Rows.empty()
    assigned = frame["num_tokens"] * frame["topk"] // frame["moe_ep_size"]
    names, codes = np.unique(frame["moe_dtype"].to_numpy().astype(str), return_inverse=True)
    rows.add(
        {
            "engine": "sglang",
            "fmt": np.array([canonical(str(name)) for name in names])[codes],
            "hidden": frame["hidden_size"].to_numpy(),
            "width": (frame["inter_size"] // frame["moe_tp_size"]).to_numpy(),
            "local_experts": (frame["num_experts"] // frame["moe_ep_size"]).to_numpy(),
            "num_experts": frame["num_experts"].to_numpy(),
            "top_k": frame["topk"].to_numpy(),
            "num_matrices": 3,
            "assignments": np.maximum(assigned.to_numpy(), 1),
            "seconds": frame["latency"].to_numpy() * MS,
        }
    )
    c = rows.joined()
    flop = 2.0 * c["assignments"] * 3 * c["hidden"] * c["width"]
    ok = possible(source.system, c["seconds"], flop, 0 * flop, peak_flop_per_s(source.system, c["fmt"]))
    rows.drop("faster than peak FLOP/s", np.count_nonzero(~ok))
    return rows.table("expert_gemm_masked", MASKED_KEYS, ("assignments",), ok)
