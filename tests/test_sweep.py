"""Sweeps: the same bytes however they are run and however often they are killed."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sweep_work
from sweep_work import LOG, cheap_units, work

from planner.cli.sweep_text import sweep_text
from planner.errors import InputError, PlannerError
from planner.sweep import (
    Processes,
    Result,
    Serial,
    SweepFolder,
    executor,
    read_description,
    row,
    run_sweep,
    seed_groups,
    stream,
    units,
)
from planner.sweep.description import described
from tests.conftest import Command

SCRIPT = Path(sweep_work.__file__)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "log"
    file.touch()
    monkeypatch.setenv(LOG, str(file))
    return file


def uninterrupted(folder: Path, count: int) -> dict[str, bytes]:
    with SweepFolder(folder, {"count": count}) as held:
        run_sweep(held, cheap_units(count), lambda: Serial(work))
    return tree(folder)


def kill_and_go_on(folder: Path, log: Path, count: int, workers: int, kills: list[int]) -> int:
    """Kill the sweep whenever so many more units are done; how many kills hit a running sweep."""
    hit = 0
    command = [sys.executable, str(SCRIPT), str(folder), str(log), str(count), str(workers)]
    for more in kills:
        before = len(list(folder.glob("units/*.json")))
        with subprocess.Popen(command) as running:
            while len(list(folder.glob("units/*.json"))) < before + more and running.poll() is None:
                time.sleep(0.001)
            hit += running.poll() is None
            running.send_signal(signal.SIGKILL)
    subprocess.run(command, check=True)
    return hit


def test_a_killed_sweep_goes_on_and_ends_the_same(tmp_path: Path, log: Path) -> None:
    count, workers = 40, 2
    whole = uninterrupted(tmp_path / "whole", count)
    log.write_text("")
    hit = kill_and_go_on(tmp_path / "killed", log, count, workers, kills=[1, 7, 13])
    assert hit == 3
    assert tree(tmp_path / "killed") == whole
    begun = log.read_text().split()
    assert set(begun) == {str(i) for i in range(count)}
    assert len(begun) <= count + workers * hit


@pytest.mark.slow
def test_a_sweep_survives_many_random_kills(tmp_path: Path, log: Path) -> None:
    count, workers, draw = 300, 3, random.Random(7)
    whole = uninterrupted(tmp_path / "whole", count)
    log.write_text("")
    kills = [draw.randrange(0, 15) for _ in range(30)]
    hit = kill_and_go_on(tmp_path / "killed", log, count, workers, kills)
    assert tree(tmp_path / "killed") == whole
    assert hit > 10
    assert len(log.read_text().split()) <= count + workers * hit


def test_units_of_a_lost_worker_are_tried_again(log: Path) -> None:
    todo = cheap_units(8, "lose")
    found, pool = [], Processes(work, 2)
    with pytest.raises(PlannerError, match=r"1 units lost their worker 3 times.*\n  moeplan plan 5 lose"):
        found.extend(unit.number for unit, _ in stream(pool, todo))
    pool.close()
    assert sorted(found) == [0, 1, 2, 3, 4, 6, 7]
    begun = log.read_text().split()
    assert (begun.count("3"), begun.count("5")) == (2, 3)
    assert len(begun) == 8 + 1 + 2


def test_a_full_disk_stops_the_sweep_and_loses_nothing(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = uninterrupted(tmp_path / "whole", 6)
    calls, real = [0], os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(InputError, match="No space left on device.*run the same command again"),
        SweepFolder(tmp_path / "full", {"count": 6}) as held,
    ):
        run_sweep(held, cheap_units(6), lambda: Serial(work))
    assert not list((tmp_path / "full").rglob(".*.part"))
    assert uninterrupted(tmp_path / "full", 6) == whole


def test_what_a_kill_leaves_half_written_is_removed_and_damage_redone(tmp_path: Path, log: Path) -> None:
    whole = uninterrupted(tmp_path / "s", 4)
    (tmp_path / "s/units/.00002.json.part").write_text("{")
    (tmp_path / "s/units/00001.json").write_text('{"arguments": [')
    log.write_text("")
    assert uninterrupted(tmp_path / "s", 4) == whole
    assert log.read_text().split() == ["1"]


def test_a_folder_is_used_by_one_sweep_at_a_time_and_never_by_another(tmp_path: Path, log: Path) -> None:
    folder = tmp_path / "s"
    with (
        SweepFolder(folder, {"seed": [1]}),
        pytest.raises(InputError, match="another sweep is running"),
        SweepFolder(folder, {"seed": [1]}),
    ):
        pass
    with (
        pytest.raises(InputError, match="holds another sweep .it differs in seed."),
        SweepFolder(folder, {"seed": [2]}),
    ):
        pass
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty and holds no sweep"), SweepFolder(other, {}):
        pass
    assert tree(other) == {"thesis.txt": b"precious"}
    with pytest.raises(InputError, match="does not exist"), SweepFolder(tmp_path / "a/b", {}):
        pass


def test_units_are_the_product_of_the_axes_in_order() -> None:
    asked = described(
        {"model": ["a", "b"], "cluster": "c:1", "rate": [1, 2.5], "concurrency": 8, "layout": ["auto", "tp=8"]}
        | {"seed": [0, 7], "options": {"kv": "fp8", "no_rails": True, "fail_at": ["1s", "2s"]}},
        "here",
    )
    found = units(asked)
    assert len(found) == 2 * 3 * 2 * 2
    assert [unit.number for unit in found] == list(range(24))
    assert found[0].arguments[:8] == ("plan", "a", "--cluster", "c:1", "--workload", "chat", "--rate", "1.0")
    assert found[-1].arguments[:10] == (
        *("simulate", "b", "--cluster", "c:1", "--workload", "chat", "--concurrency", "8"),
        *("--layout", "tp=8"),
    )
    assert found[-1].arguments[-7:] == ("--kv", "fp8", "--no-rails", "--fail-at", "1s", "--fail-at", "2s")
    assert dict(found[3].point)["seed"] == 7


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"model": "a"}, "cluster"),
        ({"model": "a", "cluster": "c", "seeds": [1]}, "seeds: unknown key .did you mean seed"),
        ({"model": "a", "cluster": []}, "cluster: the list is empty"),
        ({"model": ["a", "a"], "cluster": "c"}, "model a is given twice"),
        ({"model": "a", "cluster": "c", "rate": "fast"}, "rate.0"),
        ({"model": "a", "cluster": "c", "options": {"seed": 1}}, "options.seed"),
        ({"model": "a", "cluster": "c", "options": {"out": "x"}}, "options.out"),
        ({"model": "a", "cluster": "c", "seed": list(range(100_001))}, "100,001 units; at most 100,000"),
    ],
)
def test_a_bad_description_is_refused(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        units(described(axes, "sweep.toml"))


def test_units_carry_their_files_under_the_hash_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text('[prompt]\nkind = "empirical"\ncsv = "lengths.csv"\n')
    (tmp_path / "lengths.csv").write_text("n\n5\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("{}")
    (tmp_path / "study.toml").write_text('model = "mine"\ncluster = "x:1"\nworkload = ["my.toml", "chat"]\n')
    asked = read_description(tmp_path / "study.toml")
    first, second = units(asked, tmp_path)
    names = [name for name, _ in first.files]
    assert sorted(name.split("/", 2)[2] for name in names) == ["lengths.csv", "mine/config.json", "my.toml"]
    workload = first.arguments[first.arguments.index("--workload") + 1]
    assert workload in names
    assert first.arguments[1] + "/config.json" in names
    assert dict(first.point)["workload"] == "my.toml"
    assert [n for n, _ in second.files] == [first.arguments[1] + "/config.json"]
    (tmp_path / "lengths.csv").write_text("n\n6\n")
    assert units(asked, tmp_path)[0].arguments != first.arguments
    assert units(asked, tmp_path)[1] == second
    (tmp_path / "my.toml").write_text('csv = "../x.csv"\n')
    (tmp_path.parent / "x.csv").write_text("")
    with pytest.raises(InputError, match=r"names ../x.csv"):
        units(asked, tmp_path)


def test_rows_say_what_became_of_a_unit() -> None:
    unit = cheap_units(1)[0]
    layout = {"layout": {"name": "tp8", "num_gpus": 8}}
    cases = {
        "meets": Result(0, "", layout | {"meets_slo": True}),
        "misses": Result(3, "", layout | {"meets_slo": False}),
        "answered": Result(0, "", layout | {"meets_slo": None}),
        "infeasible": Result(3, "no", {"feasible": False}),
        "refused": Result(2, "bad", None),
        "failed": Result(1, "fault", None),
    }
    assert {name: row(unit, result)["status"] for name, result in cases.items()} == {name: name for name in cases}
    point = dict.fromkeys(("model", "cluster", "workload", "rate", "concurrency", "layout", "engine", "slo"), "x")
    lines = [{**point, **row(unit, Result(0, "", {"layout": {"name": "tp8", "num_gpus": n}}))} for n in (8, 16, 32)]
    (group,) = seed_groups(lines)
    assert group["num_gpus"] == [8, 56 / 3, 32]
    assert group["statuses"] == {"answered": 3}


def test_unknown_executors_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean processes"):
        executor("process", work)
    with pytest.raises(InputError, match="--workers 0"):
        executor("processes", work, 0)


@pytest.mark.slow
def test_a_ray_cluster_that_is_not_there_is_said_at_once() -> None:
    pytest.importorskip("ray")
    with pytest.raises(InputError, match=r"ray://127.0.0.1:1: no Ray cluster answers there"):
        executor("ray://127.0.0.1:1", work)


ASKED = ["sweep", "--model", "mixtral-8x7b", "--cluster", "h100-sxm:1x8", "--rate", "2", "--option", "num_requests=40"]


def test_a_unit_is_what_its_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moeplan: Command) -> None:
    (tmp_path / "w.csv").write_text(
        "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{i},90,9\n" for i in range(30))
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.toml").write_text(
        'model = "mixtral-8x7b"\ncluster = "h100-sxm:1x1"\nworkload = "w.csv"\n'
        'layout = ["tp=1", "auto", "tp=2"]\noptions = {weights = "int4_g128", num_requests = 40}\n'
    )
    code, out, err = moeplan("sweep", "s.toml", "--out", "s", "--executor", "serial", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    rows, text = facts["rows"], sweep_text(facts)
    assert "3 units: 2 meets, 1 refused" in text
    assert "1 x tp2 needs 2 GPUs" in text
    assert [line["status"] for line in rows] == ["meets", "meets", "refused"]
    assert "has 1" in rows[2]["message"]
    held = json.loads((tmp_path / "s/units/00001.json").read_text())
    monkeypatch.chdir(tmp_path / "s")
    code, out, _ = moeplan(*held["arguments"], "--json")
    assert code == held["exit_code"]
    printed = json.loads(out)
    printed.pop("wall_s", None)
    assert printed == held["facts"]


def test_bad_input_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moeplan: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    for more, said in (
        (["--layout", "tp=x"], "tp=x"),
        (["--engine", "vlm"], "vllm"),
        (["--workload", "chatt"], "chat"),
        (["--option", "max_num_sqs=4"], "max-num-sqs"),
        (["--option", "kv"], "NAME=VALUE"),
        (["--executor", "dask"], "known"),
    ):
        code, _, err = moeplan(*ASKED, "--out", "s", *more)
        assert code == 2
        assert said in err
        assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_processes_and_ray_give_the_bytes_of_a_serial_sweep(tmp_path: Path, moeplan: Command) -> None:
    asked = [*ASKED, "--layout", "tp=2", "--layout", "auto", "--layout", "tp=3", "--seed", "0", "--seed", "1"]
    for name in ("serial", "processes"):
        more = ["--executor", name, "--out", str(tmp_path / name), "--workers", "3"]
        assert moeplan(*asked, *more)[0] == 0
    assert tree(tmp_path / "serial") == tree(tmp_path / "processes")
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert moeplan(*asked, "--executor", "ray", "--out", str(tmp_path / "ray"))[0] == 0
    finally:
        ray.shutdown()
    assert tree(tmp_path / "serial") == tree(tmp_path / "ray")


@pytest.mark.slow
def test_ray_retries_the_units_of_a_killed_worker(tmp_path: Path, log: Path) -> None:
    ray = pytest.importorskip("ray")
    here = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent.parent)])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": here}})
    try:
        pool = executor("ray", work)
        found = []
        with pytest.raises(PlannerError, match="plan 5 lose"):
            found.extend(unit.number for unit, _ in stream(pool, cheap_units(8, "lose")))
        pool.close()
    finally:
        ray.shutdown()
    assert sorted(found) == [0, 1, 2, 3, 4, 6, 7]
    assert log.read_text().split().count("3") == 2


@pytest.mark.slow
def test_a_killed_sweep_of_real_commands_ends_the_same(tmp_path: Path, moeplan: Command) -> None:
    asked = [*ASKED, "--layout", "tp=2", "--layout", "tp=4", "--layout", "tp=8"]
    asked += [part for seed in range(6) for part in ("--seed", str(seed))]
    assert moeplan(*asked, "--executor", "serial", "--out", str(tmp_path / "whole"))[0] == 0
    killed, draw = tmp_path / "killed", random.Random(3)
    command = [sys.executable, "-m", "planner", *asked, "--workers", "2", "--out", str(killed)]
    for _ in range(4):
        before = len(list(killed.glob("units/*.json")))
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
            while len(list(killed.glob("units/*.json"))) < before + 2 and running.poll() is None:
                time.sleep(0.005)
            time.sleep(draw.random() * 0.1)
            running.kill()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert tree(killed) == tree(tmp_path / "whole")
