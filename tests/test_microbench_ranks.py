"""Microbenchmarks over several processes (gloo), kill and resume, and the bare folder; each in its own processes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("torch")

from microbench.cases import OPS, Case
from microbench.errors import InputError
from microbench.results import Store
from microbench.timing import Timing

ROOT = Path(__file__).parents[1]
RANKS = 4

SMALL_GRID = """
import sys
import microbench.grid as grid
grid.AXES = {op: {axis: ((4096,) if axis == "bytes" else POINTS,) for axis in axes} for op, axes in grid.AXES.items()}
import microbench.runner as runner
runner._LONGEST_CASE_S = 0.02
runner._WARM_UP_SIDE, runner._WARM_UP_S = 64, 0.05
from microbench.__main__ import main
if __name__ == "__main__":
    sys.exit(main())
"""

UNEVEN = """
import numpy as np
import torch
from microbench.device import open_device
from microbench.exchange import Trip, _round_trip
from microbench.experts import make_experts
from microbench.precision import check_close
from microbench.ranks import join
from microbench.routing import expert_ids

torch.set_num_threads(1)
TOKENS, TOP_K, EXPERTS, HIDDEN, WIDTH = 6, 2, 8, 16, 8
device, ranks = open_device("cpu"), join(False)
team = ranks.everyone
chosen = [expert_ids("lognormal", TOKENS, TOP_K, EXPERTS, rank) for rank in range(team.size)]
local = EXPERTS // team.size
inputs = [device.random(TOKENS, HIDDEN, seed=50 + rank) for rank in range(team.size)]
trip = Trip.of(chosen, team.rank, EXPERTS, device.torch_device)
assert len(set(trip.sent)) > 1 or len(set(trip.received)) > 1, "splits are even"

# Sequential reference: for every source rank, its assignments in order of expert (then of token), mine only.
expected = []
for source in range(team.size):
    pairs = [(e, t * TOP_K + k, t) for t, row in enumerate(chosen[source].tolist()) for k, e in enumerate(row)]
    expected += [inputs[source][t] for e, _, t in sorted(pairs) if e // local == team.rank]
rows = inputs[team.rank][trip.order // TOP_K]
arrived = trip.dispatch(rows, team.data)()
assert torch.equal(arrived, torch.stack(expected))
assert torch.equal(trip.combine(arrived, team.data)(), rows)

every = make_experts(device, EXPERTS, HIDDEN, WIDTH)
mine = make_experts(device, local, HIDDEN, WIDTH, first=team.rank * local)
x, ids = inputs[team.rank], chosen[team.rank]
reference = torch.stack([sum(every.one(int(e), x[t : t + 1])[0] for e in ids[t]) / TOP_K for t in range(TOKENS)])
for parts in ([slice(0, 6)], [slice(0, 3), slice(3, 6)], [slice(0, 1), slice(1, 6)]):
    trips = [Trip.of([c[part] for c in chosen], team.rank, EXPERTS, device.torch_device) for part in parts]
    check_close(_round_trip(mine, x, parts, trips, TOP_K, team)(), reference)

failed = None
try:
    team.together(lambda: check_close(torch.ones(1), torch.full((1,), 2.0 if team.rank == 2 else 1.0)))
except Exception as error:
    failed = str(error)
assert "relative error" in str(failed), failed
ranks.close()
print("right", team.rank)
"""


def start(script: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(script), *arguments]
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_ranks(script: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(script, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(RANKS)]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, out + err
    return outputs


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_uneven_splits_over_four_ranks_equal_a_sequential_reference(tmp_path: Path) -> None:
    script = tmp_path / "uneven.py"
    script.write_text(UNEVEN)
    outputs = finish(start_ranks(script))
    assert sorted(out.strip() for out, _ in outputs) == [f"right {rank}" for rank in range(RANKS)]


def test_four_ranks_measure_every_collective_and_exchange(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.json"
    exchange = {"op": "exchange", "hidden": 32, "top_k": 2, "num_experts": 8, "fmt": "bf16", "width": 16}
    shapes.write_text(json.dumps({"cases": [exchange, {"op": "norm", "kind": "rmsnorm", "hidden": 8}]}))
    script, out = tmp_path / "run.py", tmp_path / "out"
    script.write_text(SMALL_GRID.replace("POINTS", "(6,)"))
    arguments = ("--out", str(out), "--model-shapes", str(shapes), "--device", "cpu", "--only")
    outputs = finish(start_ranks(script, *arguments, "collective,exchange,norm", "--minutes", "5"))
    assert not (out / "failures.csv").exists(), (out / "failures.csv").read_text()
    collective = rows_of(out / "collective.csv")
    found = {(row["op"], row["num_gpus"], row["family"]) for row in collective}
    operations = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
    assert found == {(op, n, family) for op in operations for n in ("4", "2") for family in ("fresh", "chained")}
    assert {(row["engine"], row["num_nodes"]) for row in collective} == {("gloo", "1")}
    exchanged = rows_of(out / "exchange.csv")
    assert {row["engine"] for row in exchanged} == {"gloo baseline"}
    assert {row["step"] for row in exchanged} == {"dispatch", "combine", "layer", "layer_overlapped"}
    assert {row["step"] for row in exchanged if row["family"] == "chained"} == {"layer", "layer_overlapped"}
    assert {row["distribution"] for row in exchanged} == {"balanced", "lognormal", "one_hot"}
    assert all(float(row["time_us"]) > 0 for row in (*collective, *exchanged))
    assert len(rows_of(out / "norm.csv")) == 1
    extremes = [json.loads(text) for text in (out / "ranks.jsonl").read_text().splitlines()]
    assert len(extremes) == len(collective) + len(exchanged)
    assert all(entry["min_us"] > 0 and entry["max_minus_min_us"] >= 0 for entry in extremes)
    assert json.loads((out / "meta.json").read_text())["world_size"] == RANKS
    assert [len(printed) > 0 for printed, _ in outputs] == [True, False, False, False]


def test_a_killed_run_goes_on_without_loss_or_repetition(tmp_path: Path) -> None:
    shapes, out, script = tmp_path / "shapes.json", tmp_path / "out", tmp_path / "run.py"
    cases = [{"op": "gemm", "fmt": "bf16", "rows": 8 * (1 + n), "cols": 16} for n in range(25)]
    shapes.write_text(json.dumps({"cases": cases}))
    script.write_text(SMALL_GRID.replace("POINTS", "(4, 16)"))
    arguments = (
        "--out",
        str(out),
        "--model-shapes",
        str(shapes),
        "--device",
        "cpu",
        "--only",
        "gemm",
        "--minutes",
        "5",
    )
    process = start(script, *arguments)
    assert process.stdout is not None
    seen = [process.stdout.readline() for _ in range(8)]
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    printed = [line for line in (*seen, *rest.splitlines(keepends=True)) if line.endswith("\n")]
    before = (out / "gemm.csv").read_text()
    assert len(printed) <= before.count("\n") - 1 <= len(printed) + 1  # at most the line of the last row is unprinted
    assert before.count("\n") - 1 < 50
    with (out / "gemm.csv").open("a") as file:
        file.write("torch,bf16,8,16,4,1")  # as torn by a kill in the middle of a write
    resumed = start(script, *arguments)
    ((_, err),) = finish([resumed])
    after = (out / "gemm.csv").read_text()
    assert after.startswith(before)
    counts = Counter((row["rows"], row["tokens"]) for row in rows_of(out / "gemm.csv"))
    assert len(counts) == 50 and set(counts.values()) == {1}
    assert f"{before.count(chr(10)) - 1} on disk already" in err
    assert len(json.loads((out / "meta.json").read_text())["runs"]) == 2
    assert not (out / "running.json").exists()


def gemm_case(tokens: int) -> Case:
    return Case.of("gemm", {"engine": "torch", "fmt": "bf16", "rows": 8, "cols": 8, "tokens": tokens})


TIMING = Timing(1e-6, 2e-6, 0.01, 7)


@pytest.mark.parametrize("torn", ["torch,bf16,8", "torch,bf16,8,8,9,1,2,0.1,5,torch li", "torch,bf16\n", "\0\0\0\n"])
def test_a_torn_last_line_is_cut(torn: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(gemm_case(1), TIMING, 'torch "linear", plain')
    store.fail(gemm_case(2), "unsupported", "two\nlines")
    store.close()
    whole = (tmp_path / "gemm.csv").read_bytes()
    with (tmp_path / "gemm.csv").open("ab") as file:
        file.write(torn.encode())
    again = Store(tmp_path)
    assert (tmp_path / "gemm.csv").read_bytes() == whole
    assert again.done == {("gemm", gemm_case(1).values), ("gemm", gemm_case(2).values)}
    again.close()


def test_a_torn_header_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "gemm.csv").write_text("engine,fm")
    store = Store(tmp_path)
    store.add(gemm_case(1), TIMING, "torch linear")
    store.close()
    (row,) = rows_of(tmp_path / "gemm.csv")
    assert (row["time_us"], row["p90_us"], row["repeats"], row["tokens"]) == ("1", "2", "7", "1")


def test_a_case_in_which_three_runs_died_is_given_up(tmp_path: Path) -> None:
    for _ in range(3):
        store = Store(tmp_path)
        assert store.begin(gemm_case(1))
        store.close()
    store = Store(tmp_path)
    assert not store.begin(gemm_case(1))
    assert store.begin(gemm_case(2))
    store.finish()
    store.close()
    assert rows_of(tmp_path / "failures.csv")[0]["kind"] == "died"


def test_foreign_files_and_second_writers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "gemm.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="its columns are a,b"):
        Store(tmp_path)
    (tmp_path / "gemm.csv").unlink()
    store = Store(tmp_path)
    with pytest.raises(InputError, match="another microbench is writing there"):
        Store(tmp_path)
    store.close()


def test_the_folder_runs_alone(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "microbench", tmp_path / "microbench", ignore=shutil.ignore_patterns("__pycache__"))
    check = textwrap.dedent(
        """
        import importlib, pathlib, sys
        for path in pathlib.Path("microbench").glob("*.py"):
            importlib.import_module(f"microbench.{path.stem}") if path.stem != "__init__" else None
        sys.exit("planner" in sys.modules or "pandas" in sys.modules)
        """
    )
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = subprocess.run(
        [sys.executable, "-m", "microbench", "--help"], cwd=tmp_path, env=settings, capture_output=True, text=True
    )
    assert asked.returncode == 0 and all(op in asked.stdout for op in OPS)
    assert time.monotonic() - began < 60
