"""What comes in: CSV files, logs, compiled tables; and every bad input with the message it prints."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import ProfileError
from planner.measurements.store import read_table, write_table
from planner.profiles.csvfiles import read_file, write_file
from planner.profiles.importing import import_profile
from planner.profiles.nccl_logs import read_log
from planner.profiles.ops import OPS, tables_schema
from planner.profiles.rows import Rows, joined, quality_of, rows_of, tables_of

GEMM = "engine,fmt,rows,cols,tokens,time_us,p90_us,spread,repeats,library,origin\n"
LINE = "torch,bf16,4096,4096,{tokens},{time},30.5,0.01,50,torch 2.13,measured\n"
META = {"device": "NVIDIA H200", "source": "moeplan microbench 1", "licence": "CC0", "engines": ["torch"]}


def folder(tmp_path: Path, **files: str) -> Path:
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    (source / "meta.json").write_text(json.dumps(META))
    for stem, text in files.items():
        (source / f"{stem}.csv").write_text(text)
    return source


def fails(tmp_path: Path, **files: str) -> str:
    with pytest.raises(ProfileError) as caught:
        import_profile(folder(tmp_path, **files), "h200-sxm", tmp_path / "out")
    assert not (tmp_path / "out" / "h200-sxm").exists(), "nothing is written when anything is wrong"
    return str(caught.value)


def test_csv_to_npz_and_back(tmp_path: Path) -> None:
    text = GEMM + "".join(LINE.format(tokens=n, time=t) for n, t in ((1, 20), (8, 21), (128, 30)))
    experts = "engine,fmt,hidden,width,local_experts,num_experts,top_k,num_matrices,distribution,assignments,time_us\n"
    experts += "torch,bf16,2048,768,128,128,8,3,balanced,64,300\ntorch,bf16,2048,768,128,128,8,3,one_hot,64,90\n"
    out = import_profile(folder(tmp_path, gemm=text, expert_gemm=experts), "h200-sxm", tmp_path / "out").directory
    plain, skewed = read_table(out / "expert_gemm.npz"), read_table(out / "expert_gemm_detail.npz")
    assert plain.seconds == pytest.approx([3e-4], rel=1e-3), "the planner's table holds balanced rows only"
    assert "distribution" not in plain.keys and skewed.label("distribution", 0) == "one_hot"
    back = joined([rows_of(read_table(out / f"{stem}.npz")) for stem in ("expert_gemm", "expert_gemm_detail")])
    assert sorted(back.columns["distribution"]) == ["balanced", "one_hot"]
    write_file(tmp_path / "gemm.csv", rows_of(read_table(out / "gemm.npz")))
    again, faults = read_file(tmp_path / "gemm.csv", OPS["gemm"])
    assert not faults and again is not None and again.quality is not None
    assert again.columns["tokens"].tolist() == [1, 8, 128]
    assert again.seconds == pytest.approx([20e-6, 21e-6, 30e-6], rel=6e-4)
    assert again.quality.p90_s == pytest.approx([30.5e-6] * 3, rel=6e-4)
    assert (again.quality.spread[0], again.quality.repeats[0]) == (pytest.approx(0.01), 50)
    assert again.quality.libraries == ("torch 2.13",)
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["engines"], meta["license"], meta["rows"]["gemm"]) == (["torch"], "CC0", 3)
    assert meta["files"][0]["name"] == "expert_gemm.csv" and len(meta["files"][0]["sha256"]) == 64


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(["nccl", "vllm"]), st.integers(2, 8), st.integers(1, 4), st.integers(1, 2**33)),
        min_size=1,
        max_size=12,
        unique=True,
    ),
    st.floats(1e-6, 1e-1),
)
def test_any_rows_survive_the_compiled_form(cases: list[tuple[str, int, int, int]], seconds: float) -> None:
    count = len(cases)
    columns = {
        "engine": np.array([c[0] for c in cases]),
        "op": np.full(count, "all_to_all"),
        "graph": np.ones(count, np.int64),
        "num_gpus": np.array([c[1] for c in cases]),
        "num_nodes": np.array([c[2] for c in cases]),
        "family": np.full(count, "chained"),
        "bytes": np.array([c[3] for c in cases]),
    }
    times = np.full(count, seconds)
    quality = quality_of(times, times, np.arange(count) + 1, [c[0] for c in cases], ["measured"] * count)
    with tempfile.TemporaryDirectory() as name:
        parts = []
        for stem, table in tables_of(Rows(OPS["collective"], columns, times, quality)).items():
            write_table(Path(name) / f"{stem}.npz", table)
            parts.append(rows_of(read_table(Path(name) / f"{stem}.npz")))
    back = joined(parts)
    assert back.quality is not None
    names = ("engine", "num_gpus", "num_nodes", "bytes")
    found = set(zip(*(back.columns[n].tolist() for n in names), strict=True))
    assert found == set(cases)
    assert back.seconds == pytest.approx(times, rel=6e-4)
    assert sorted(back.quality.repeats) == sorted(quality.repeats)


def test_every_fault_of_every_file_at_once(tmp_path: Path) -> None:
    bad_times = (
        GEMM + LINE.format(tokens=1, time="nan") + LINE.format(tokens=2, time=-3) + LINE.format(tokens=0, time=9)
    )
    message = fails(tmp_path, gemm=bad_times, norm="engine,kind,tokens,time_us\n", gem="a,b\n", head="")
    assert "6 faults, nothing was imported" in message
    assert "gemm.csv: line 2: time_us = 'nan': not a finite number" in message
    assert "gemm.csv: line 3: time_us = '-3': a time must be positive" in message
    assert "gemm.csv: line 4: tokens = '0': must be at least 1" in message
    assert "norm.csv: column 'hidden' is missing (hidden size)" in message
    assert "gem.csv: operation 'gem' is unknown: did you mean" in message and "gemm" in message
    assert "head.csv: empty file" in message


def test_truncated_file_is_named_with_its_line(tmp_path: Path) -> None:
    message = fails(tmp_path, gemm=GEMM + LINE.format(tokens=1, time=20) + "torch,bf16,40")
    assert "gemm.csv: line 3 has 3 of 11 values: the file is cut off" in message
    whole_cells = GEMM + LINE.format(tokens=1, time=20).rstrip("\n")
    assert "no line end: the file is cut off" in fails(tmp_path, gemm=whole_cells)


def test_missing_and_unknown_columns_have_a_remedy(tmp_path: Path) -> None:
    message = fails(tmp_path, gemm="engine,fmt,rows,cols,tokens,time_s\ntorch,bf16,1,1,1,1\n")
    assert "column 'time_us' is missing: the median time of one call in microseconds" in message
    assert "column 'time_s' is unknown: did you mean time_us" in message
    message = fails(tmp_path, gemm=GEMM + LINE.format(tokens=1, time=20).replace("bf16", "bf61"))
    assert "fmt = 'bf61'" in message and "bf16" in message


@pytest.mark.parametrize(("scale", "unit"), [(1e6, "seconds"), (1e3, "milliseconds")])
@pytest.mark.parametrize("name", ["h200-sxm", "unheard-of-node"])
def test_another_unit_is_recognised(tmp_path: Path, scale: float, unit: str, name: str) -> None:
    times = {1: 20.0, 128: 25.0, 8192: 420.0, 16384: 830.0}
    text = GEMM + "".join(LINE.format(tokens=n, time=t / scale) for n, t in times.items())
    with pytest.raises(ProfileError, match=rf"gemm.csv: time_us: .*is the column in {unit}\?"):
        import_profile(folder(tmp_path, gemm=text), name, tmp_path / "out")


def test_impossible_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    text = GEMM + LINE.format(tokens=8, time=20) + LINE.format(tokens=16, time=20) + LINE.format(tokens=16384, time=200)
    summary = import_profile(folder(tmp_path, gemm=text), "h200-sxm", tmp_path / "out")
    assert summary.rows == {"gemm": 2}
    assert summary.dropped == {"gemm": {"faster than the data sheet of h200-sxm allows": 1}}


def test_merge_replaces_measured_cases_and_keeps_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = GEMM + LINE.format(tokens=1, time=20) + LINE.format(tokens=8, time=21)
    import_profile(folder(tmp_path, gemm=first), "h200-sxm", out)
    second = GEMM + LINE.format(tokens=8, time=25) + LINE.format(tokens=64, time=28)
    norm = "engine,kind,hidden,tokens,time_us\ntorch,rmsnorm,4096,8,5\n"
    import_profile(folder(tmp_path, gemm=second, norm=norm), "h200-sxm", out, merge=True)
    table = read_table(out / "h200-sxm" / "gemm.npz")
    assert table.axes["tokens"].tolist() == [1, 8, 64]
    assert table.seconds == pytest.approx([20e-6, 25e-6, 28e-6], rel=1e-3), "8 tokens were measured anew"
    assert (out / "h200-sxm" / "norm.npz").is_file()
    assert not list(out.glob(".importing*")), "no traces"


def test_sources_that_are_nothing_say_what_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello\n")
    for source, words in (("none", "no such file"), ("empty", "nothing to import"), ("notes.txt", "not a log")):
        with pytest.raises(ProfileError, match=words):
            import_profile(tmp_path / source, "h200-sxm", tmp_path / "out")
    with pytest.raises(ProfileError, match="plain folder name"):
        import_profile(tmp_path / "empty", "../evil", tmp_path / "out")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "gemm.csv").write_text(GEMM + LINE.format(tokens=1, time=20))
    with pytest.raises(ProfileError, match=r"meta\.json"):
        import_profile(tmp_path / "bare", "h200-sxm", tmp_path / "out")


def test_damaged_parquet_and_missing_columns_are_named(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    gemm, moe = tmp_path / "toy/gemm/vllm/1.0/gemm_perf.parquet", tmp_path / "toy/moe/vllm/1.0/moe_perf.parquet"
    for path in (gemm, moe):
        path.parent.mkdir(parents=True)
    gemm.write_bytes(b"PAR1 cut off")
    pd.DataFrame({"moe_dtype": ["bfloat16"], "latency": [1.0]}).to_parquet(moe)
    with pytest.raises(ProfileError) as caught:
        import_profile(tmp_path, "h200-sxm", tmp_path / "out", system_dir="toy")
    assert "gemm_perf.parquet: not a readable parquet file" in str(caught.value)
    assert "moe_perf.parquet: column 'distribution' is missing" in str(caught.value)
    with pytest.raises(ProfileError, match="several systems. Add --system with one of toy"):
        import_profile(tmp_path, "h200-sxm", tmp_path / "out")


LOG = """# nThread 1 nGpus 1 minBytes 1048576 maxBytes 134217728 step: 8(factor) warmup iters: 5 iters: 20 agg iters: 1
# Using devices
{ranks}
NCCL version 2.27.3+cuda12.9
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
     1048576        262144     float     sum      -1    34.00   30.84   53.97      0    33.10   31.68   55.44      0
   134217728      33554432     float     sum      -1    580.0  231.41  404.97      0    579.0  231.81  405.67      0
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 229.5
#
"""


def log(tmp_path: Path, name: str, hosts: int = 1, ranks: int = 8, text: str = LOG) -> Path:
    each = ranks // hosts
    lines = [
        f"#  Rank {r:2} Group  0 Pid  {100 + r} on node{r // each:02} device  {r % each} [0x07] NVIDIA H100 80GB HBM3"
        for r in range(ranks)
    ]
    path = tmp_path / name
    path.write_text(text.replace("{ranks}", "\n".join(lines)))
    return path


def test_log_of_one_node(tmp_path: Path) -> None:
    rows, device, faults = read_log(log(tmp_path, "all_reduce_perf.log"))
    assert not faults and rows is not None and rows.quality is not None
    assert device == "NVIDIA H100 80GB HBM3"
    assert rows.columns["bytes"].tolist() == [1048576, 134217728]
    assert rows.seconds == pytest.approx([34e-6, 580e-6]), "out of place"
    assert set(rows.columns["num_gpus"]) == {8} and set(rows.columns["num_nodes"]) == {1}
    assert rows.quality.libraries == ("nccl 2.27.3+cuda12.9",) and set(rows.quality.repeats) == {20}


def test_logs_of_several_tests_and_nodes_become_one_table(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for name, hosts in (("all_reduce_perf.log", 1), ("all_gather_perf.log", 1), ("sendrecv_perf.txt", 1)):
        log(logs, name, hosts)
    log(logs, "again_all_reduce_perf.log", text=LOG.replace("34.00   30.84", "36.00   29.13"))
    log(logs, "alltoall_perf_16.out", hosts=2, ranks=16)
    tagged = log(logs, "reduce_scatter_perf.log")
    tagged.write_text("".join(f"[1,0]<stdout>:{line}\n" for line in tagged.read_text().splitlines()))
    out = import_profile(logs, "h100-sxm", tmp_path / "out").directory
    plain, detail = read_table(out / "collective.npz"), read_table(out / "collective_detail.npz")
    assert set(plain.categories["op"]) == {"all_reduce", "all_gather", "send_recv", "reduce_scatter"}
    assert detail.label("op", 0) == "all_to_all" and detail.keys["num_nodes"][0] == 2
    reduce = next(s for s in range(len(plain.start) - 1) if plain.label("op", s) == "all_reduce")
    assert plain.seconds[plain.rows(reduce)][0] == pytest.approx(35e-6, rel=1e-3), "median of the two logs"
    assert plain.quality is not None and plain.quality.repeats[plain.rows(reduce)][0] == 40


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("# Avg bus bandwidth    : 229.5\n", ""), "cut off: no '# Avg bus bandwidth' line"),
        (("   580.0  231.41  404.97      0    579.0  231.81  405.67      0", "   580.0"), "values: cut off"),
        (("34.00   30.84", "-nan   30.84"), "a positive number of microseconds"),
        (("34.00   30.84", "0.034   30.84"), "is the time in microseconds?"),
        (("(us)  (GB/s)", "(ms)  (GB/s)"), "the time column is in (ms)"),
        (("404.97      0", "404.97    512"), "512 wrong values"),
        (("0 OK", "3 FAILED"), "failed its own check"),
    ],
)
def test_faulty_logs(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    path = log(tmp_path, "all_reduce_perf.log", text=LOG.replace(*change))
    with pytest.raises(ProfileError) as caught:
        import_profile(path, "h100-sxm", tmp_path / "out")
    assert words in str(caught.value) and "all_reduce_perf.log" in str(caught.value)


def test_log_without_a_test_name_or_ranks(tmp_path: Path) -> None:
    message = "\n".join(read_log(log(tmp_path, "run7.log"))[2])
    assert "name the file after the test, one of all_reduce_perf" in message
    message = "\n".join(read_log(log(tmp_path, "broadcast_perf.log", ranks=1))[2])
    assert "'broadcast' is not imported" in message and "1 '# Rank' lines" in message


def test_schema_lists_every_operation_and_required_column() -> None:
    schema = tables_schema()
    assert set(schema["properties"]) == {"meta", *OPS}
    row = schema["properties"]["gemm"]["items"]
    assert row["required"] == ["engine", "fmt", "rows", "cols", "tokens", "time_us"]
    assert row["properties"]["tokens"] == {"type": "integer", "description": "tokens of one call", "minimum": 1}
    assert "num_nodes" not in schema["properties"]["collective"]["items"]["required"]


def test_a_failed_import_leaves_the_old_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    good = GEMM + LINE.format(tokens=1, time=20)
    import_profile(folder(tmp_path, gemm=good), "h200-sxm", out)
    before = (out / "h200-sxm" / "meta.json").read_bytes()
    genuine = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "h200-sxm" and Path(target).parent == out:
            raise PermissionError(13, "Permission denied")
        return genuine(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ProfileError, match="may write to"):
        import_profile(folder(tmp_path, gemm=good + LINE.format(tokens=8, time=30)), "h200-sxm", out)
    assert (out / "h200-sxm" / "meta.json").read_bytes() == before
    assert [path.name for path in out.iterdir()] == ["h200-sxm"]


def test_rccl_answers_where_the_planner_asks_for_nccl(tmp_path: Path) -> None:
    text = "engine,op,num_gpus,family,bytes,time_us,library\n"
    text += "rccl,all_reduce,8,chained,1048576,60,RCCL 2.22\nrccl,all_reduce,8,fresh,1048576,90,RCCL 2.22\n"
    out = import_profile(folder(tmp_path, collective=text), "mi300x", tmp_path / "out").directory
    table = read_table(out / "collective.npz")
    assert table.categories["engine"] == ("nccl",) and table.seconds == pytest.approx([60e-6], rel=1e-3)
    assert table.quality is not None and table.quality.libraries == ("RCCL 2.22",)
