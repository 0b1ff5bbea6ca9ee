"""What is fuzzed: every reader of moeplan, and what a command does next with what it read."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_seeds as seeds
import numpy as np

from planner.textfile import check_file, is_file


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
    (folder / "meta.json").write_text(json.dumps(seeds.META))
    _put(path, folder / "gemm.npz")
    check_facts(str(folder), 5)
    find(Library(folder).table("gemm"), "torch", {"rows": (4096, 1.0), "cols": (4096, 1.0)})


def _put(path: Path, target: Path) -> None:
    """The file under the name that its reader looks for; odd files are linked."""
    if is_file(path) and path.stat().st_size < 10**9:
        shutil.copyfile(path, target)
    else:
        target.symlink_to(path)


def _profile(name: str) -> Callable[[Path, Path], None]:
    def read(path: Path, scratch: Path) -> None:
        from planner.profiles.importing import import_profile

        source = scratch / "source"
        source.mkdir()
        (source / "meta.json").write_text(json.dumps(seeds.META))
        (source / "gemm.csv").write_text(seeds.GEMM)
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


def _terms(path: Path, scratch: Path) -> None:
    from planner.economics.bills import hourly_usd, monthly_usd
    from planner.economics.sources import read_terms, terms_rows, terms_tables
    from planner.hardware import system
    from planner.tomlfile import to_toml

    terms = read_terms(path)
    to_toml(terms_tables(terms), {})
    terms_rows(terms)
    h100 = system("h100-sxm")
    hourly_usd(h100, 16, terms)
    monthly_usd(h100, 16, terms)


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
    (scratch / "w.toml").write_text(seeds.WORKLOADS[1])
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
    check_file(path, most_bytes=1e6)
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

    check_file(path, most_bytes=1e6)
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
    "config.json": Reader(".json", lambda: seeds.bundled(*_SMALL_CONFIGS), _config),
    "model TOML": Reader(".toml", lambda: [p.read_bytes() for p in sorted(seeds.CONFIGS.glob("*.toml"))], _config),
    "hardware TOML": Reader(".toml", seeds.systems, _hardware),
    "measured table": Reader(".npz", seeds.tables, _table, members=True),
    "profile CSV": Reader(".csv", lambda: [seeds.GEMM.encode()], _profile("gemm.csv")),
    "meta.json": Reader(".json", lambda: [json.dumps(seeds.META).encode()], _profile("meta.json")),
    "nccl-tests log": Reader(".log", lambda: [seeds.LOG.encode()], _log),
    "parquet": Reader(".parquet", seeds.parquets, _parquet),
    "engine TOML": Reader(
        ".toml",
        lambda: [
            seeds.ENGINE.encode(),
            *(p.read_bytes() for p in sorted((seeds.ROOT / "planner" / "engines").glob("*.toml"))),
        ],
        _engine,
    ),
    "calibration TOML": Reader(
        ".toml",
        lambda: [seeds.CALIBRATION.encode(), (seeds.ROOT / "planner" / "calibrations.toml").read_bytes()],
        _calibration,
    ),
    "terms TOML": Reader(".toml", seeds.terms, _terms),
    "workload TOML": Reader(".toml", lambda: [text.encode() for text in seeds.WORKLOADS], _workload),
    "trace CSV": Reader(".csv", lambda: [seeds.TRACE.encode(), seeds.SHARED.encode()], _workload),
    "lengths CSV": Reader(".csv", lambda: [b"tokens,other\n5,a\n1000,b\n"], _lengths),
    "routing CSV": Reader(".csv", lambda: [seeds.counts()], _routing),
    "routing JSON": Reader(".json", seeds.dumps, _routing),
    "routing JSON lines": Reader(".jsonl", lambda: [d + b"\n" + d + b"\n" for d in seeds.dumps()], _routing),
    "routing npz": Reader(
        ".npz",
        lambda: [
            seeds.npz(
                expert_ids=seeds.ids(), num_experts=8, sequence_lengths=np.array([5, 7]), first_moe_layer=3, top_k=2
            ),
            seeds.npz(logical_count=np.arange(1, 33).reshape(2, 2, 8)),
            seeds.npz(routed_experts=seeds.ids().transpose(1, 0, 2), num_experts=8),
        ],
        _routing,
        members=True,
    ),
    "routing npy": Reader(".npy", seeds.npy, _routing),
    "routing pt": Reader(".pt", lambda: [seeds.pickled()], _routing, members=True),
    "placement JSON": Reader(".json", seeds.placements, _placement),
    "placement CSV": Reader(".csv", lambda: [seeds.slots()], _placement),
    "placement npz": Reader(
        ".npz",
        lambda: [seeds.npz(physical_to_logical_map=np.tile(np.arange(8), (2, 1)))],
        _placement,
        members=True,
    ),
    "points.csv": Reader(".csv", lambda: [seeds.POINTS.encode()], _points),
    "flags": Reader(".flag", lambda: [f"{k}={v}".encode() for k, values in seeds.FLAGS.items() for v in values], _flag),
    "command line": Reader(
        ".json", lambda: [json.dumps(words).encode() for words in seeds.COMMANDS], _command, limit_s=4.0
    ),
}


def members_of(raw: bytes) -> dict[str, bytes]:
    """Members of an archive by name."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def kept(folder: Path) -> Iterator[tuple[str, Path]]:
    """Reader and path of every input that broke something once."""
    for path in sorted(folder.glob("*/*")):
        yield path.parent.name.replace("_", " "), path
