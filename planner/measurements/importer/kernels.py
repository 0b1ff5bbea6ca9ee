"""Dense GEMM and attention tables of three engines, one converter per operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.measurements.formats import FORMATS, KV_BYTES, canonical
from planner.measurements.importer.clean import Cleaned, monotone, peak_flop_per_s, possible, thin
from planner.measurements.importer.source import ENGINES, Source
from planner.measurements.roofline import Ceilings
from planner.measurements.store import build_table

Columns = dict[str, Any]

GEMM_TOKENS = np.array(
    [1, 2, 4, *range(8, 33, 8), 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768]
    + [size * 1024 for size in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)]
)
"""Kept token counts of GEMMs; the source has 74, most of them multiples of 16 below 512."""
_HOST_FLOOR_S = 30e-6
ATTENTION_HEAD_DIMS = (64, 128, 192, 256, 512)
MS = 1e-3


@dataclass
class Rows:
    """Long columns of several engines, appended one after another, with the rows dropped so far."""

    columns: dict[str, list[Any]]
    dropped: dict[str, int]

    @classmethod
    def empty(cls) -> Rows:
        """No rows yet."""
        return cls({}, {})

    def add(self, columns: Mapping[str, Any]) -> None:
        """Append equal-length columns; scalars are repeated."""
        length = next(np.size(values) for values in columns.values() if np.ndim(values))
        for name, values in columns.items():
            column = np.full(length, values) if np.ndim(values) == 0 else np.asarray(values)
            self.columns.setdefault(name, []).append(column)

    def drop(self, reason: str, count: Any) -> None:
        """Count dropped rows."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + int(count)

    def joined(self) -> Columns:
        """Columns of all engines."""
        return {name: np.concatenate(parts) for name, parts in self.columns.items()}

    def table(self, op: str, keys: Sequence[str], axes: Sequence[str], mask: Any = None) -> Cleaned | None:
        """Monotone table of the rows in `mask`, or None when there are none."""
        columns = self.joined()
        if not columns or not len(columns["seconds"]) or (mask is not None and not mask.any()):
            return None
        chosen = columns if mask is None else {name: values[mask] for name, values in columns.items()}
        table, changed = monotone(build_table(op, chosen, keys, axes, chosen["seconds"]))
        counts = dict(self.dropped)
        if changed:
            counts["not dropped: smoothed to be monotone by more than 2 %"] = changed
        return Cleaned(table, counts)


def _formats(values: Any) -> Any:
    names, codes = np.unique(values.astype(str), return_inverse=True)
    return np.array([canonical(str(name)) for name in names])[codes]


def gemm(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """y[m, n] = x[m, k] w[k, n]: keys rows = n, cols = k."""
    rows = Rows.empty()
    for engine in ENGINES:
        found = source.newest("gemm", engine, "gemm")
        if found is None:
            continue
        version, frame = found
        frame = frame[thin(frame["m"].to_numpy(), GEMM_TOKENS) & (frame["n"] >= 32)]
        source.note("gemm", engine, version, frame)
        rows.add(
            {
                "engine": engine,
                "fmt": _formats(frame["gemm_dtype"].to_numpy()),
                "rows": frame["n"].to_numpy(),
                "cols": frame["k"].to_numpy(),
                "tokens": frame["m"].to_numpy(),
                "seconds": frame["latency"].to_numpy() * MS,
            }
        )
    c = rows.joined()
    if not c:
        return None
    m, n, k = (c[name].astype(np.float64) for name in ("tokens", "rows", "cols"))
    weight_bytes = _per_format(c["fmt"], lambda form: form.weight_bytes)
    # Operands below 256 MB may sit in L2 from one repeat to the next; only larger weights prove a speed violation.
    streamed = np.where(weight_bytes * n * k > 256e6, weight_bytes * n * k, 0.0)
    ok = possible(source.system, c["seconds"], 2 * m * n * k, streamed, peak_flop_per_s(source.system, c["fmt"]))
    rows.drop("faster than peak FLOP/s or HBM", np.count_nonzero(~ok))
    waiting = ok & _host_bound(c)
    rows.drop("launched from the host without a CUDA graph, time is the host's", np.count_nonzero(waiting))
    return rows.table("gemm", ("engine", "fmt", "rows", "cols"), ("tokens",), ok & ~waiting)


def _host_bound(c: Columns) -> Any:
    """Rows of an engine and format whose smallest products take far longer than anybody else's.

    vLLM 0.24 fp8_block takes 59 us (H200) to 390 us (GB300) for products that SGLang and TensorRT-LLM finish in 5,
    whatever their size: the collector launched several kernels per call from Python. Served from a CUDA graph, as
    in decode, the same DeepGEMM kernels do not wait for the host.
    """
    small = (c["tokens"] == 1) & (c["rows"] <= 2048) & (c["cols"] <= 2048)
    floors = {}
    for engine in np.unique(c["engine"]):
        for fmt in np.unique(c["fmt"]):
            mine = small & (c["engine"] == engine) & (c["fmt"] == fmt)
            if mine.any():
                floors[engine, fmt] = float(np.median(c["seconds"][mine]))
    slow = np.zeros(len(small), dtype=np.bool_)
    for (engine, fmt), floor in floors.items():
        others = [seconds for (name, other), seconds in floors.items() if name != engine and other == fmt]
        if others and floor > _HOST_FLOOR_S and floor > 5 * min(others):
            slow |= (c["engine"] == engine) & (c["fmt"] == fmt)
    return slow


def _per_format(formats: Any, value: Callable[[Any], float]) -> Any:
    names, codes = np.unique(formats.astype(str), return_inverse=True)
    return np.array([value(FORMATS[str(name)]) for name in names])[codes]


def prefill_attention(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """Causal prompts from an empty cache; the faster of bf16 and fp8 arithmetic per KV format."""
    rows = _attention(source, "prefill_attention", "context_attention", "isl")
    c = rows.joined()
    if not c:
        return None
    b, s, h, d = (c[name].astype(np.float64) for name in ("batch", "length", "heads", "head_dim"))
    seen = _pairs(s, c["window"].astype(np.float64))
    peak = source.system.gpu.peak_flop_per_s("fp8")
    ok = possible(source.system, c["seconds"], 4 * h * d * b * seen, np.zeros_like(b), peak)
    rows.drop("faster than peak FLOP/s", np.count_nonzero(~ok))
    slow = ok & _outlying(c, 4 * h * d * b * seen)
    rows.drop("over 8 x slower than the rest of its series (window sentinel)", np.count_nonzero(slow))
    return rows.table("prefill_attention", _ATTENTION_KEYS, ("batch", "length"), ok & ~slow)


def decode_attention(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """One token per sequence against `length` cached tokens."""
    rows = _attention(source, "decode_attention", "generation_attention", None)
    c = rows.joined()
    if not c:
        return None
    b, s, kv, d = (c[name].astype(np.float64) for name in ("batch", "length", "kv_heads", "head_dim"))
    seen = np.where(c["window"] > 0, np.minimum(s, c["window"]), s)
    cache = b * seen * kv * d * 2 * np.where(c["kv_fmt"] == "fp8", KV_BYTES["fp8"], KV_BYTES["bf16"])
    streamed = np.where(cache > 256e6, cache, 0.0)
    ok = possible(source.system, c["seconds"], np.zeros_like(b), streamed, 1.0)
    rows.drop("faster than HBM", np.count_nonzero(~ok))
    return rows.table("decode_attention", _ATTENTION_KEYS, ("batch", "length"), ok)


_ATTENTION_KEYS = ("engine", "kv_fmt", "window", "head_dim", "kv_heads", "heads")


def _attention(source: Source, op: str, file: str, length: str | None) -> Rows:
    rows = Rows.empty()
    for engine in ENGINES:
        found = source.newest("attention", engine, file)
        if found is None:
            continue
        version, frame = found
        frame = frame[frame["head_dim"].isin(ATTENTION_HEAD_DIMS)]
        source.note(op, engine, version, frame)
        heads = frame["num_heads"].to_numpy()
        tokens = frame["isl"] + frame["step"] if length is None else frame[length]
        rows.add(
            {
                "engine": engine,
                "kv_fmt": _formats(frame["kv_cache_dtype"].to_numpy()),
                "window": frame["window_size"].to_numpy() if "window_size" in frame else 0,
                "head_dim": frame["head_dim"].to_numpy(),
                "heads": heads,
                "kv_heads": np.where(frame["num_key_value_heads"] == 0, heads, frame["num_key_value_heads"]),
                "batch": frame["batch_size"].to_numpy(),
                "length": tokens.to_numpy(),
                "seconds": frame["latency"].to_numpy() * MS,
            }
        )
    return rows


def _pairs(length: Any, window: Any) -> Any:
    outside = np.where(window > 0, np.maximum(length - window, 0.0), 0.0)
    return length * (length + 1) / 2 - outside * (outside + 1) / 2


def _outlying(c: Columns, flop: Any) -> Any:
    """Rows of heavy work (over 1 TFLOP) at less than 1/8 of the median speed of their kernel and window."""
    import pandas as pd

    keys = {name: c[name] for name in ("engine", "kv_fmt", "window", "head_dim")}
    heavy = flop > 1e12
    speed = pd.Series(np.where(heavy, flop / c["seconds"], np.nan))
    median = speed.groupby([pd.Series(column) for column in keys.values()]).transform("median")
    return heavy & (speed < median / 8).to_numpy()


def mla_prefill(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """MLA prompts: whole module where the engine has it, else the kernel (gemm_fmt `kernel`)."""
    return _mla(source, "mla_prefill", ("mla_context_module", "context_mla"), ceilings)


def mla_decode(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """MLA decode, as `mla_prefill`."""
    return _mla(source, "mla_decode", ("mla_generation_module", "generation_mla"), ceilings)


def _mla(source: Source, op: str, files: tuple[str, str], ceilings: Ceilings) -> Cleaned | None:
    rows = Rows.empty()
    for engine in ENGINES:
        for file in files:
            found = source.newest("mla", engine, file)
            if found is not None:
                version, frame = found
                source.note(op, engine, version, frame)
                fmt = _formats(frame["gemm_type"].to_numpy()) if "gemm_type" in frame else "kernel"
                rows.add(_mla_columns(engine, fmt, frame, op.endswith("decode")))
    return _checked_mla(source, rows, op, ("engine", "gemm_fmt", "kv_fmt", "heads"), ceilings)


def _mla_columns(engine: str, fmt: Any, frame: Any, decode: bool) -> Columns:
    return {
        "engine": engine,
        "gemm_fmt": fmt,
        "kv_fmt": _formats(frame["kv_cache_dtype"].to_numpy()),
        "heads": frame["num_heads"].to_numpy(),
        "batch": frame["batch_size"].to_numpy(),
        "length": _mla_length(frame, decode),
        "seconds": frame["latency"].to_numpy() * MS,
    }


def _mla_length(frame: Any, decode: bool) -> Any:
    """Context of a decode row: kernel files count it as isl + step, module files as step."""
    if not decode:
        return frame["isl"].to_numpy()
    module = "gemm_type" in frame
    return frame["step"].to_numpy() if module else (frame["isl"] + frame["step"]).to_numpy()


def _checked_mla(source: Source, rows: Rows, op: str, keys: Sequence[str], ceilings: Ceilings) -> Cleaned | None:
    """Drop MLA rows faster than the attention arithmetic or, in decode, than reading the latent cache."""
    c = rows.joined()
    if not c:
        return None
    b, s, h = (c[name].astype(np.float64) for name in ("batch", "length", "heads"))
    sparse = op.startswith("sparse")
    chosen = np.minimum(s, 2048.0) if sparse else s
    flop = 2 * h * 320 * b * _pairs(s, np.where(sparse, 2048.0, 0.0)) if op.endswith("prefill") else 0 * b
    cache = b * chosen * 576 * np.where(c["kv_fmt"] == "fp8", 1.0, 2.0) if op.endswith("decode") else 0 * b
    streamed = np.where(cache > 256e6, cache, 0.0)
    ok = possible(source.system, c["seconds"], flop, streamed, source.system.gpu.peak_flop_per_s("fp8"))
    rows.drop("faster than peak FLOP/s or HBM", np.count_nonzero(~ok))
    return rows.table(op, keys, ("batch", "length"), ok)


def sparse_mla_prefill(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """DeepSeek sparse attention module on prompts from an empty cache."""
    return _sparse(source, "sparse_mla_prefill", "dsa_context_module", ceilings)


def sparse_mla_decode(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """DeepSeek sparse attention module, decode."""
    return _sparse(source, "sparse_mla_decode", "dsa_generation_module", ceilings)


def _sparse(source: Source, op: str, file: str, ceilings: Ceilings) -> Cleaned | None:
    rows = Rows.empty()
    for engine in ENGINES:
        found = source.newest("sparse_attention", engine, file)
        if found is None:
            continue
        version, frame = found
        frame = frame[(frame["model"] == "deepseek-ai/DeepSeek-V3.2") & (frame["op_name"] == file)]
        # Rows of a prompt after a cached prefix (step > 0) answer another question.
        frame = frame[frame["step"] == 0] if op.endswith("prefill") else frame
        source.note(op, engine, version, frame)
        rows.add(_mla_columns(engine, _formats(frame["gemm_type"].to_numpy()), frame, op.endswith("decode")))
    return _checked_mla(source, rows, op, ("engine", "gemm_fmt", "kv_fmt", "heads"), ceilings)


def linear_prefill(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """Gated delta net on prompts: convolution plus chunked recurrence."""
    return _linear(source, "linear_prefill", "context", ceilings)


def linear_decode(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """Gated delta net, one token: convolution update plus recurrence."""
    return _linear(source, "linear_decode", "generation", ceilings)


def _linear(source: Source, op: str, phase: str, ceilings: Ceilings) -> Cleaned | None:
    rows = Rows.empty()
    keys = ["num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "batch_size", "seq_len"]
    for engine in ENGINES:
        found = source.newest("linear_attention", engine, "gdn")
        if found is None:
            continue
        version, frame = found
        frame = frame[frame["phase"] == phase]
        source.note(op, engine, version, frame)
        # Models of different width share the same heads: take the fastest per kernel, then add the two kernels.
        per_kernel = frame.groupby([*keys, "kernel_source"], as_index=False)["latency"].min()
        both = per_kernel.groupby(keys, as_index=False)["latency"].agg(["sum", "count"]).reset_index()
        both = both[both["count"] == 2]
        rows.add(
            {
                "engine": engine,
                "k_heads": both["num_k_heads"].to_numpy(),
                "v_heads": both["num_v_heads"].to_numpy(),
                "k_dim": both["head_k_dim"].to_numpy(),
                "v_dim": both["head_v_dim"].to_numpy(),
                "batch": both["batch_size"].to_numpy(),
                "length": both["seq_len"].to_numpy(),
                "seconds": both["sum"].to_numpy() * MS,
            }
        )
    return rows.table(op, ("engine", "k_heads", "v_heads", "k_dim", "v_dim"), ("batch", "length"))
