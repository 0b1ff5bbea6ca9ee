"""What is fuzzed: every reader of moeplan with sane files to start from, and what a command does next with the result."""

from __future__ import annotations

import csv
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    'name = "mine"\nnum_requests = 50\n[prompt]\nkind = "lognormal"\nmean = 500.0\nsigma = 0.6\n[output]\nkind = "fixed"\n'
    'tokens = 100\n[arrivals]\nkind = "poisson"\nrate_per_s = 2.0\n[prefix]\ngroups = 10\nzipf = 1.0\n[prefix.tokens]\n'
    'kind = "fixed"\ntokens = 100\n',
    'num_requests = 50\n[prompt]\nkind = "uniform"\nminimum = 5\nmaximum = 50\n[output]\nkind = "empirical"\n'
    'csv = "lengths.csv"\ncolumn = "tokens"\n[arrivals]\nkind = "gamma"\nrate_per_s = 2.0\ncv = 2.0\n[turns]\nthink_s = 2.0\n'
    'max_context_tokens = 4000\n[turns.count]\nkind = "uniform"\nminimum = 1\nmaximum = 5\n',
    '[prompt]\nkind = "fixed"\ntokens = 5\n[output]\nkind = "fixed"\ntokens = 5\n[arrivals]\nkind = "closed"\nconcurrency = 8\n',
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


@dataclass(frozen=True)
class Reader:
    """A reader: the suffix it goes by, sane contents, and `read(path, scratch)` with what a command does next."""

    suffix: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path, Path], Any]
    members: bool = False
    """Whether its files are archives, which have lies of their own."""
    limit_s: float = 2.0


def _config(path: Path, scratch: Path) -> None:
    from planner.facts import model_facts
    from planner.model import load

    _model_next(load(str(path)), model_facts)


def _model_next(model: Any, model_facts: Any) -> None:
    from planner.engine import engine
    from planner.fit import fit
    from planner.hardware import system
    from planner.text import describe_text

    describe_text(model_facts(model))
    fit(model, system("h200-sxm"), engine("vllm"))


def _hardware(path: Path, scratch: Path) -> None:
    from planner.facts import profile_facts
    from planner.hardware import parse_cluster
    from planner.text import profile_text

    profile_text(profile_facts(str(path)))
    parse_cluster(f"{path}:1")


def _table(path: Path, scratch: Path) -> None:
    from planner.measurements.library import Library, find
    from planner.profiles.inspect import check_facts

    folder = scratch / "profile"
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps(META))
    _put(path, folder / "gemm.npz")
    check_facts(str(folder), 5)
    find(Library(folder).table("gemm"), "torch", {"rows": (4096, 1.0), "cols": (4096, 1.0)})


def _put(path: Path, target: Path) -> None:
    """The file under the name that its reader looks for; odd files are linked."""
    if path.is_file() and path.stat().st_size < 10**9:
        shutil.copyfile(path, target)
    else:
        target.symlink_to(path)


def _profile(name: str) -> Callable[[Path, Path], None]:
    def read(path: Path, scratch: Path) -> None:
        from planner.profiles.importing import import_profile

        source = scratch / "source"
        source.mkdir()
        (source / "meta.json").write_text(json.dumps(META))
        (source / "gemm.csv").write_text(GEMM)
        (source / name).unlink(missing_ok=True)
        _put(path, source / name)
        import_profile(source, "h200-sxm", scratch / "out")

    return read


def _log(path: Path, scratch: Path) -> None:
    from planner.profiles.importing import import_profile

    source = scratch / "source"
    source.mkdir()
    _put(path, source / "all_reduce_perf.log")
    import_profile(source / "all_reduce_perf.log", "h200-sxm", scratch / "out")
    import_profile(source, "h200-sxm", scratch / "out", merge=True)


def _parquet(path: Path, scratch: Path) -> None:
    from planner.profiles.importing import import_profile

    folder = scratch / "tree" / "toy" / "gemm" / "vllm" / "0.10.0"
    folder.mkdir(parents=True)
    _put(path, folder / "gemm_perf.parquet")
    import_profile(scratch / "tree", "h200-sxm", scratch / "out", system_dir="toy")


def _engine(path: Path, scratch: Path) -> None:
    from planner.engine import engine, engine_text

    found = engine(str(path))
    found.budget(80e9, "sm90")
    found.num_graphs(64, "sm90")
    engine_text(str(path))


def _calibration(path: Path, scratch: Path) -> None:
    from planner.calibration import calibrations, to_toml

    found = calibrations(str(path))
    found.of("vllm", "sm90").factor("experts")
    to_toml(found)


def _workload(path: Path, scratch: Path) -> None:
    from planner.workload import load_workload

    (path.parent / "lengths.csv").write_text("tokens\n1\n20\n30\n")
    found = load_workload(str(path))
    if found.num_requests <= 10_000:
        found.requests(0)
    for _ in (found.mean_prompt_tokens, found.max_prompt_tokens, found.mean_turns, str(found.prompt)):
        pass


def _lengths(path: Path, scratch: Path) -> None:
    from planner.workload import load_workload

    _put(path, scratch / "lengths.csv")
    (scratch / "w.toml").write_text(WORKLOADS[1])
    load_workload(str(scratch / "w.toml")).requests(0)


def _routing(path: Path, scratch: Path) -> None:
    from planner.routing.formats import read_record

    record = read_record(path, num_experts=8)
    assert np.isfinite(record.counts).all()


def _placement(path: Path, scratch: Path) -> None:
    from planner.placement import read_placement

    read_placement(path, 8, 4, layers=[0, 1])


def _points(path: Path, scratch: Path) -> None:
    from planner.calibration import calibrations
    from planner.validation import read_points, write_predictions
    from planner.validation import validate as replay

    found = read_points(path)
    if not any(row.point for row in found.rows):
        write_predictions(replay(found, calibrations=calibrations("off")), scratch / "out.csv")


def _flag(path: Path, scratch: Path) -> None:
    kind, _, text = path.read_bytes().decode("utf-8", "surrogateescape").partition("=")
    parse = _flag_parsers().get(kind)
    if parse is not None:
        parse(text.rstrip("\n"))


def _flag_parsers() -> dict[str, Callable[[str], Any]]:
    from planner import options
    from planner.choices import ExpertChoices
    from planner.engine import engine
    from planner.hardware import parse_cluster
    from planner.layout import check_layout, parse_layout
    from planner.model import load
    from planner.tactics import parse_tactics
    from planner.workload import load_workload, parse_slo

    mixtral = load("mixtral-8x7b")
    return {
        "cluster": parse_cluster,
        "layout": lambda text: check_layout(mixtral, parse_layout(text)),
        "slo": parse_slo,
        "workload": lambda text: load_workload(text, num_requests=20).requests(0),
        "bytes": lambda text: options.parse_bytes("--dram", text),
        "drives": options.parse_drives,
        "skew": lambda text: options.experts(mixtral, ExpertChoices(skew=text)),
        "top-k": lambda text: options.experts(mixtral, ExpertChoices(top_k=text)),
        "speculative": lambda text: parse_tactics(text, "0.8", None, mixtral, engine("vllm")),
        "engine": engine,
        "model": load,
        "weights": lambda text: options.precision("mixtral-8x7b", text, None),
    }


def _command(path: Path, scratch: Path) -> None:
    """A whole command in this process; anything but exit codes 0, 2 and 3 with a message is a fault."""
    import contextlib

    from cyclopts import CycloptsError

    from planner.cli import app

    try:
        words = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
    except (ValueError, RecursionError):
        return
    if not isinstance(words, list) or any("/" in str(word)[:6] or "\0" in str(word) for word in words):
        return
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(out), contextlib.suppress(CycloptsError):
        try:
            app([str(word) for word in words], exit_on_error=False, print_error=False)
        except SystemExit as stop:
            if stop.code not in (None, 0, 2, 3):
                raise RuntimeError(f"exit code {stop.code}") from None


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _ids() -> Any:
    rng = np.random.default_rng(0)
    return np.argsort(rng.random((2, 12, 8)), axis=2)[:, :, :2]


def _tables() -> list[bytes]:
    import tempfile

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


def _parquets() -> list[bytes]:
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


def _pickled(storage: bytes = np.arange(16, dtype="<i8").tobytes()) -> bytes:
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


def _npy() -> list[bytes]:
    buffer = io.BytesIO()
    np.save(buffer, _ids().transpose(1, 0, 2))
    return [buffer.getvalue()]


def _dumps() -> list[bytes]:
    identity = [list(range(8))] * 2
    counts = np.arange(1, 17).reshape(2, 8).tolist()
    import base64

    passes = [
        {"forward_mode": 1, "topk_ids_of_layer": _ids().tolist(), "extend_seq_lens": [5, 7]},
        {"forward_mode": 2, "topk_ids_of_layer": _ids().tolist()},
    ]
    documents: list[Any] = [
        {"logical_count": [counts, counts]},
        {"records": [{"forward_mode": 1, "global_physical_count": counts}], "last_physical_to_logical_map": identity},
        {"records": passes, "last_physical_to_logical_map": identity},
        {"routed_experts": _ids().transpose(1, 0, 2).tolist(), "num_experts": 8},
        {"routed_experts": base64.b64encode(_npy()[0]).decode(), "num_experts": 8},
        {"expert_ids": _ids().tolist(), "num_experts": 8, "sequence_lengths": [5, 7], "top_k": 2},
    ]
    return [json.dumps(document).encode() for document in documents]


def _counts() -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("domain", "layer", "expert", "assignments"))
    writer.writerows((name, layer, expert, 10 + expert) for name in "a" for layer in (3, 4) for expert in range(8))
    return text.getvalue().encode()


def _placements() -> list[bytes]:
    table = [[0, 1, 2, 3, 4, 5, 6, 7]] * 2
    devices = [{"device_id": rank, "device_expert": [2 * rank, 2 * rank + 1]} for rank in range(4)]
    ascend = {"moe_layer_count": 2, "layer_list": [{"layer_id": n, "device_list": devices} for n in range(2)]}
    return [json.dumps(value).encode() for value in ({"physical_to_logical_map": table}, table, ascend)]


def _bundled(*names: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(CONFIGS.glob("*.json")) if any(name in path.name for name in names)]


def _systems() -> list[bytes]:
    names = ("h200-sxm", "mi300x", "gb200-nvl72", "dgx-spark", "tpu-v5p")
    return [(ROOT / "hardware_profiles" / f"{name}.toml").read_bytes() for name in names]


def _slots() -> bytes:
    return ("layer,slot,expert\n" + "".join(f"{n},{slot},{slot}\n" for n in range(2) for slot in range(8))).encode()


_SMALL_CONFIGS = (
    "Mixtral-8x7B-v0.1",
    "DeepSeek-V3.json",
    "gpt-oss-20b",
    "Hunyuan-A13B",
    "Nano-30B",
    "Qwen3-Next",
    "NLLB",
)
READERS: dict[str, Reader] = {
    "config.json": Reader(".json", lambda: _bundled(*_SMALL_CONFIGS), _config),
    "model TOML": Reader(".toml", lambda: [p.read_bytes() for p in sorted(CONFIGS.glob("*.toml"))], _config),
    "hardware TOML": Reader(".toml", _systems, _hardware),
    "measured table": Reader(".npz", _tables, _table, members=True),
    "profile CSV": Reader(".csv", lambda: [GEMM.encode()], _profile("gemm.csv")),
    "meta.json": Reader(".json", lambda: [json.dumps(META).encode()], _profile("meta.json")),
    "nccl-tests log": Reader(".log", lambda: [LOG.encode()], _log),
    "parquet": Reader(".parquet", _parquets, _parquet),
    "engine TOML": Reader(
        ".toml",
        lambda: [ENGINE.encode(), *(p.read_bytes() for p in sorted((ROOT / "planner" / "engines").glob("*.toml")))],
        _engine,
    ),
    "calibration TOML": Reader(
        ".toml", lambda: [CALIBRATION.encode(), (ROOT / "planner" / "calibrations.toml").read_bytes()], _calibration
    ),
    "workload TOML": Reader(".toml", lambda: [text.encode() for text in WORKLOADS], _workload),
    "trace CSV": Reader(".csv", lambda: [TRACE.encode(), SHARED.encode()], _workload),
    "lengths CSV": Reader(".csv", lambda: [b"tokens,other\n5,a\n1000,b\n"], _lengths),
    "routing CSV": Reader(".csv", lambda: [_counts()], _routing),
    "routing JSON": Reader(".json", _dumps, _routing),
    "routing JSON lines": Reader(".jsonl", lambda: [d + b"\n" + d + b"\n" for d in _dumps()], _routing),
    "routing npz": Reader(
        ".npz",
        lambda: [
            _npz(expert_ids=_ids(), num_experts=8, sequence_lengths=np.array([5, 7]), first_moe_layer=3, top_k=2),
            _npz(logical_count=np.arange(1, 33).reshape(2, 2, 8)),
            _npz(routed_experts=_ids().transpose(1, 0, 2), num_experts=8),
        ],
        _routing,
        members=True,
    ),
    "routing npy": Reader(".npy", _npy, _routing),
    "routing pt": Reader(".pt", lambda: [_pickled()], _routing, members=True),
    "placement JSON": Reader(".json", _placements, _placement),
    "placement CSV": Reader(".csv", lambda: [_slots()], _placement),
    "placement npz": Reader(
        ".npz",
        lambda: [_npz(physical_to_logical_map=np.tile(np.arange(8), (2, 1)))],
        _placement,
        members=True,
    ),
    "points.csv": Reader(".csv", lambda: [POINTS.encode()], _points),
    "flags": Reader(".flag", lambda: [f"{k}={v}".encode() for k, values in FLAGS.items() for v in values], _flag),
    "command line": Reader(".json", lambda: [json.dumps(words).encode() for words in COMMANDS], _command, limit_s=4.0),
}


def members_of(raw: bytes) -> dict[str, bytes]:
    """Members of an archive by name."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def kept(folder: Path) -> Iterator[tuple[str, Path]]:
    """Reader and path of every input that broke something once."""
    for path in sorted(folder.glob("*/*")):
        yield path.parent.name.replace("_", " "), path
