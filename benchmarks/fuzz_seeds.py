"""Sane files of every kind that moeplan reads, from which fuzzing starts."""

from __future__ import annotations

import base64
import csv
import io
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "planner" / "model" / "configs"
TRACE = "arrival_s,prompt_tokens,output_tokens\n0,100,20\n0.5,200,30\n1.25,50,1\n"
SHARED = (
    "arrival_s,prompt_tokens,output_tokens,prefix_group,shared_tokens,conversation\n0,100,20,a,50,x\n1,150,9,a,50,x\n"
)
POINTS = (
    "id,model,gpu,engine,precision,num_gpus,tp,attention_dp,moe_ep,pp,isl,osl,lengths,concurrency,ttft_mean_ms,"
    "tpot_mean_ms,output_tok_s_per_gpu\na,mixtral-8x7b,h100-sxm,vllm,bf16,8,8,1,1,1,1024,128,fixed,4,120.5,11.2,40\n"
    "b,mixtral-8x7b,h100-sxm,vllm,bf16,8,8,1,8,1,1024,128,uniform_0.8_1.0,16,,,\n"
)
WORKLOADS = (
    'name = "mine"\nnum_requests = 50\n[prompt]\nkind = "lognormal"\nmean = 500.0\nsigma = 0.6\n[output]\n'
    'kind = "fixed"\n'
    'tokens = 100\n[arrivals]\nkind = "poisson"\nrate_per_s = 2.0\n[prefix]\ngroups = 10\nzipf = 1.0\n[prefix.tokens]\n'
    'kind = "fixed"\ntokens = 100\n',
    'num_requests = 50\n[prompt]\nkind = "uniform"\nminimum = 5\nmaximum = 50\n[output]\nkind = "empirical"\n'
    'csv = "lengths.csv"\ncolumn = "tokens"\n[arrivals]\nkind = "gamma"\nrate_per_s = 2.0\ncv = 2.0\n[turns]\n'
    "think_s = 2.0\n"
    'max_context_tokens = 4000\n[turns.count]\nkind = "uniform"\nminimum = 1\nmaximum = 5\n',
    '[prompt]\nkind = "fixed"\ntokens = 5\n[output]\nkind = "fixed"\ntokens = 5\n'
    '[arrivals]\nkind = "closed"\nconcurrency = 8\n',
)
GEMM = (
    "engine,fmt,rows,cols,tokens,time_us,p90_us,spread,repeats,library,origin\n"
    "torch,bf16,4096,4096,1,20,30.5,0.01,50,torch 2.13,measured\n"
    "torch,bf16,4096,4096,128,30,30.5,0.01,50,torch 2.13,measured\n"
)
META = {"device": "NVIDIA H200", "source": "moeplan microbench 1", "license": "CC0", "engines": ["torch"]}
ENGINE = (
    'base = "vllm"\nname = "mine"\nversion = "1"\n[overheads]\nfrontend_s = 0.01\nfrontend_s_source = "measured"\n'
    "[[budgets]]\nmin_hbm_bytes = 0.0\nmax_num_seqs = 64\nmax_batched_tokens = 2048\n"
)
CALIBRATION = (
    'source = "mine"\nas_of = "2026-11-22"\ncommand = "moeplan calibrate"\n[[entry]]\nengine = "vllm"\n'
    'generation = "hopper"\nnum_points = 3\nnum_combinations = 1\n[entry.values]\nexperts = 1.1\nlayer_s = 1e-5\n'
)
LOG = """# nThread 1 nGpus 8 minBytes 8 maxBytes 134217728 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1
# Using devices
#  Rank  0 Group  0 Pid  1 on node1 device  0 [0x1b] NVIDIA H200
#  Rank  1 Group  0 Pid  1 on node1 device  1 [0x43] NVIDIA H200
# NCCL version 2.29.2
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
     1048576        262144     float     sum      -1    20.00   52.43   52.43      0    20.10   52.17   52.17      0
   134217728      33554432     float     sum      -1   700.00  191.74  191.74      0   701.00  191.47  191.47      0
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 122
"""
FLAGS = {
    "cluster": ("h200-sxm:2x8", "gb200-nvl72:72", "h100-sxm"),
    "layout": ("tp=8,ep=8,replicas=2", "tp=2,dp=4,ep=8,redundant=8"),
    "slo": ("ttft_p95=2s,tpot_p95=50ms",),
    "workload": ("chat", "fixed:1024/256", "uniform:819-1024/819-1024", "lognormal:1024~0.6/256~0.8"),
    "bytes": ("128GB", "1.5 TiB"),
    "drives": ("2TB@7GB/s",),
    "skew": ("mixed", "zipf:1", "lognormal:0.5", "powerlaw:1.2@8192", "dirichlet:3"),
    "top-k": ("6~1.5",),
    "speculative": ("mtp:1", "draft:llama-3.1-8b:4", "ngram:3"),
    "engine": ("vllm-0.33.0",),
    "model": ("deepseek-v3", "mistralai/Mixtral-8x7B-v0.1"),
    "weights": ("experts=nvfp4,attention=bf16",),
}
COMMANDS = (
    ["describe", "mixtral-8x7b"],
    ["fit", "mixtral-8x7b", "--gpu", "h100-sxm", "--json"],
    ["engines", "show", "vllm"],
    ["profiles", "show", "h200-sxm"],
    ["profiles", "coverage", "mixtral-8x7b", "--gpu", "h100-sxm", "--layout", "tp=8"],
    ["experts", "drops", "mixtral-8x7b", "--capacity-factor", "1.25"],
    ["experts", "residency", "mixtral-8x7b", "--gpu", "rtx-4090", "--dram", "128GB"],
    ["failures", "mixtral-8x7b", "--cluster", "h100-sxm:1x8", "--layout", "tp=4"],
)


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def ids() -> Any:
    rng = np.random.default_rng(0)
    return np.argsort(rng.random((2, 12, 8)), axis=2)[:, :, :2]


def tables() -> list[bytes]:
    from planner.measurements.store import write_table
    from planner.profiles.csvfiles import read_file
    from planner.profiles.ops import OPS
    from planner.profiles.rows import tables_of

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "gemm.csv").write_text(GEMM)
        rows, _ = read_file(folder / "gemm.csv", OPS["gemm"])
        assert rows is not None
        for stem, table in tables_of(rows).items():
            write_table(folder / f"{stem}.npz", table)
        return [path.read_bytes() for path in sorted(folder.glob("*.npz"))]


def parquets() -> list[bytes]:
    import pandas as pd

    base = {"device": "NVIDIA H200", "gemm_dtype": "bfloat16", "m": [1, 2, 3, 4], "n": 4096, "k": 4096}
    frames = [pd.DataFrame(base).assign(latency=[0.02, 0.021, 0.021, 0.03])]
    for column in base:
        for value in ("x", None, -1, 0, 10**12, float("nan"), float("inf"), [1, 2], b"\xff", True, "1e9"):
            frames.append(frames[0].assign(**{column: [value] * 4}))
    frames += [frames[0].drop(columns=column) for column in base]
    frames += [frames[0].assign(latency=value) for value in (-1.0, 0.0, float("nan"), float("inf"), "x", 1e300)]
    found = []
    for frame in frames:
        buffer = io.BytesIO()
        frame.to_parquet(buffer)
        found.append(buffer.getvalue())
    return found


def pickled(storage: bytes = np.arange(16, dtype="<i8").tobytes()) -> bytes:
    """A file as torch.save writes it, for logical_count [2, 8]."""
    shape = "(I2\nI8\nt(I8\nI1\nt"
    held = "(S'storage'\nctorch\nLongStorage\nS'0'\nS'cpu'\nI16\ntQ"
    pickled = f"(S'logical_count'\nctorch._utils\n_rebuild_tensor_v2\n({held}I0\n{shape}I00\nNtRd.".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", storage)
    return buffer.getvalue()


def npy() -> list[bytes]:
    buffer = io.BytesIO()
    np.save(buffer, ids().transpose(1, 0, 2))
    return [buffer.getvalue()]


def dumps() -> list[bytes]:
    identity = [list(range(8))] * 2
    counts = np.arange(1, 17).reshape(2, 8).tolist()
    passes = [
        {"forward_mode": 1, "topk_ids_of_layer": ids().tolist(), "extend_seq_lens": [5, 7]},
        {"forward_mode": 2, "topk_ids_of_layer": ids().tolist()},
    ]
    documents: list[Any] = [
        {"logical_count": [counts, counts]},
        {"records": [{"forward_mode": 1, "global_physical_count": counts}], "last_physical_to_logical_map": identity},
        {"records": passes, "last_physical_to_logical_map": identity},
        {"routed_experts": ids().transpose(1, 0, 2).tolist(), "num_experts": 8},
        {"routed_experts": base64.b64encode(npy()[0]).decode(), "num_experts": 8},
        {"expert_ids": ids().tolist(), "num_experts": 8, "sequence_lengths": [5, 7], "top_k": 2},
    ]
    return [json.dumps(document).encode() for document in documents]


def counts() -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("domain", "layer", "expert", "assignments"))
    writer.writerows((name, layer, expert, 10 + expert) for name in "a" for layer in (3, 4) for expert in range(8))
    return text.getvalue().encode()


def placements() -> list[bytes]:
    table = [[0, 1, 2, 3, 4, 5, 6, 7]] * 2
    devices = [{"device_id": rank, "device_expert": [2 * rank, 2 * rank + 1]} for rank in range(4)]
    ascend = {"moe_layer_count": 2, "layer_list": [{"layer_id": n, "device_list": devices} for n in range(2)]}
    return [json.dumps(value).encode() for value in ({"physical_to_logical_map": table}, table, ascend)]


def bundled(*names: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(CONFIGS.glob("*.json")) if any(name in path.name for name in names)]


def terms() -> list[bytes]:
    """The example of the guide."""
    text = (ROOT / "docs" / "economics.md").read_text("utf-8")
    return [text.split("```toml\n")[1].split("```")[0].encode(), b'basis = "rental"\n[site]\npue = 1.2\n']


def systems() -> list[bytes]:
    names = ("h200-sxm", "mi300x", "gb200-nvl72", "dgx-spark", "tpu-v5p")
    return [(ROOT / "hardware_profiles" / f"{name}.toml").read_bytes() for name in names]


def slots() -> bytes:
    return ("layer,slot,expert\n" + "".join(f"{n},{slot},{slot}\n" for n in range(2) for slot in range(8))).encode()
