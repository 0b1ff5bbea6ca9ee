"""Placement files of the engines, in and out, and the command that writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.cli.experts_place import place_experts
from planner.errors import InputError, LayoutError, PlannerError, WorkloadError
from planner.placement import FORMATS, Placement, balance_bound, contiguous_max_over_mean, place
from planner.placement.formats import MAX_BYTES, read_placement, write_placement

LOAD = np.random.default_rng(5).integers(1, 100, (3, 8))
SUFFIX = {"csv": ".csv", "npz": ".npz"}
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def placed() -> Placement:
    return place("greedy", LOAD, 4, redundant=4, num_nodes=2)


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    """LOAD as the counts of layers 1 to 3."""
    path = tmp_path / "counts.csv"
    rows = [f"{layer + 1},{expert},{n}" for layer, row in enumerate(LOAD) for expert, n in enumerate(row)]
    path.write_text("layer,expert,assignments\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def run(counts: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def facts(**options: Any) -> dict[str, Any]:
        place_experts(counts, json=True, **options)
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    return facts


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_comes_back(format: str, placed: Placement, tmp_path: Path) -> None:
    path = tmp_path / ("map" + SUFFIX.get(format, ".json"))
    write_placement(placed, path, format)
    back = read_placement(path, 8, 4, num_nodes=2)
    assert (back.physical_to_logical == placed.physical_to_logical).all()
    assert (back.num_ranks, back.num_nodes, back.policy) == (4, 2, path.name)
    assert list(tmp_path.iterdir()) == [path]


def test_sglang_file_has_a_row_for_every_layer_of_the_model(placed: Placement, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_placement(placed, path, "sglang", layers=[1, 2, 4])
    rows = json.loads(path.read_text())["physical_to_logical_map"]
    assert rows[0] == rows[3] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert [rows[1], rows[2], rows[4]] == placed.physical_to_logical.tolist()
    assert (read_placement(path, 8, 4, layers=[1, 2, 4]).physical_to_logical == placed.physical_to_logical).all()
    with pytest.raises(LayoutError, match="5 rows for 3 MoE layers, of which the last is layer 7"):
        read_placement(path, 8, 4, layers=[1, 2, 7])


def test_engine_files_look_as_the_engines_want_them(placed: Placement, tmp_path: Path) -> None:
    write_placement(placed, tmp_path / "vllm.json", "vllm")
    assert json.loads((tmp_path / "vllm.json").read_text()) == placed.physical_to_logical.tolist()
    write_placement(placed, tmp_path / "ascend.json", "vllm-ascend")
    ascend = json.loads((tmp_path / "ascend.json").read_text())
    assert ascend["moe_layer_count"] == 3
    assert ascend["layer_list"][2]["device_list"][3] == {
        "device_id": 3,
        "device_expert": placed.physical_to_logical[2, 9:].tolist(),
    }
    write_placement(placed, tmp_path / "map.csv", "csv", layers=[3, 4, 5])
    assert (tmp_path / "map.csv").read_text().startswith(f"layer,slot,expert\n3,0,{placed.physical_to_logical[0, 0]}\n")


def test_one_row_serves_every_layer(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text("[[1, 0, 3, 2]]")
    assert read_placement(path, 4, 2, layers=[3, 4]).physical_to_logical.tolist() == [[1, 0, 3, 2]] * 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[[0, 1, 2, 2]]", r"a.json: placement, layer 0: expert 3 has no slot"),
        ("a.json", "[[0, 1, 2, 3], [0, 1, 2, 4]]", "layer 1, slot 3: expert 4 is not one of the 4 experts"),
        ("a.json", "[[0, 1, 2, -1]]", "expert -1 is not one"),
        ("a.json", "[[0, 1, 2, 3], [0, 1, 2, 3, 3, 3]]", "row 1 has 6 slots, row 0 has 4"),
        ("a.json", "[[0, 1, 2, 3, 3]]", "5 slots do not divide over 2 ranks. Use 1 or 5 ranks"),
        ("a.json", "[[0, 1, 2, 3.0]]", r"row 0: 3.0 is not an expert id"),
        ("a.json", "[[0, 1, 2, true]]", "True is not an expert id"),
        ("a.json", "[[0, 1, 2, 99999999999999999999]]", "9999 is not an expert id"),
        ("a.json", "[[]]", "row 0 has 0 slots"),
        ("a.json", "[0, 1, 2, 3]", "list of layers"),
        ("a.json", "[]", "list of layers"),
        ("a.json", "3", "list of layers"),
        ("a.json", "[[0, 1", "not valid JSON: .* line 1"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", "", "not valid JSON"),
        ("a.json", "{}", "no key physical_to_logical_map: the object is empty"),
        ("a.json", '{"physical_to_logical": [[0]]}', "did you mean physical_to_logical[?]"),
        ("a.json", '{"logical_count": [[3, 4]]}', "counts .*--counts"),
        ("a.json", '{"layer_list": [{"devices": []}]}', "layer_list without device_list"),
        ("a.csv", "layer,expert\n0,1\n", "columns 'layer,expert'; a placement has layer,slot,expert"),
        ("a.csv", "layer,slot,expert\n0,0,x\n", "line 2: '0,0,x' is not three whole numbers"),
        ("a.csv", "layer,slot,expert\n0,0,1\n0,0,2\n", "line 3: layer 0, slot 0 a second time"),
        ("a.csv", "layer,slot,expert\n0,0,1\n0,2,2\n", "layer 0 has no slot 1"),
        ("a.csv", "layer,slot,expert\n", "list of layers"),
        ("a.npz", "text", "cannot be read as .npz"),
        ("a.pt", "text", "torch files are not read"),
        ("a.yaml", "text", ".json, .csv, .npz, not .yaml"),
    ],
)
def test_bad_files_are_one_message(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises((InputError, LayoutError), match=message) as caught:
        read_placement(path, 4, 2)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 400


def test_files_that_cannot_be_read_or_written(placed: Placement, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_placement(tmp_path / "none.json", 4, 2)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InputError, match="at most 64 MB"):
        read_placement(huge, 4, 2)
    np.savez(tmp_path / "other.npz", map=np.zeros(3))
    with pytest.raises(InputError, match="no array physical_to_logical_map"):
        read_placement(tmp_path / "other.npz", 4, 2)
    np.savez(tmp_path / "pickled.npz", physical_to_logical_map=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="not plain numbers"):
        read_placement(tmp_path / "pickled.npz", 4, 2)
    np.savez(tmp_path / "bomb.npz", physical_to_logical_map=np.zeros(MAX_BYTES // 8 + 1))
    with pytest.raises(InputError, match="at most 64 MB"):
        read_placement(tmp_path / "bomb.npz", 4, 2)
    with pytest.raises(InputError, match="'sglan' is unknown: did you mean sglang"):
        write_placement(placed, tmp_path / "x.json", "sglan")
    with pytest.raises(InputError, match=r"format csv is a .csv file. Use .*x\.csv"):
        write_placement(placed, tmp_path / "x.json", "csv")
    with pytest.raises(LayoutError, match="2 layer numbers for a placement of 3 layers"):
        write_placement(placed, tmp_path / "x.json", "vllm", layers=[0, 1])
    with pytest.raises(InputError, match="Choose a file"):
        write_placement(placed, huge / "x.json", "vllm")
    assert not (tmp_path / "x.json").exists()


def test_command_answers_before_after_bound_and_placement(run: Run) -> None:
    facts = run(ranks=4, redundant=4, policy="greedy")
    placed = place("greedy", LOAD, 4, redundant=4)
    assert facts["placement"] == placed.physical_to_logical.tolist()
    assert facts["max_over_mean_before"] == pytest.approx(contiguous_max_over_mean(LOAD, 4).mean())
    assert facts["max_over_mean_after"] == pytest.approx(placed.max_over_mean(LOAD).mean())
    assert facts["bound"] == pytest.approx(balance_bound(LOAD, 4, 4).mean())
    assert facts["within_of_bound_pct"] == pytest.approx(100 * (facts["max_over_mean_after"] / facts["bound"] - 1))
    assert (facts["policy"], facts["num_ranks"], facts["redundant"], facts["slots_per_rank"]) == ("greedy", 4, 4, 3)
    assert [row["layer"] for row in facts["per_layer"]] == [1, 2, 3]
    assert facts["served"] is None and facts["moved"]["copies"] > 0


def test_command_judges_other_traffic_and_files(run: Run, counts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    turned = LOAD[:, ::-1]
    rows = [f"{layer + 1},{expert},{n}" for layer, row in enumerate(turned) for expert, n in enumerate(row)]
    other.write_text("layer,expert,assignments\n" + "\n".join(rows) + "\n")
    out = tmp_path / "deep" / "map.json"
    facts = run(ranks=4, policy="greedy", serve=other, out=out)
    placed = place("greedy", LOAD, 4)
    assert facts["served"]["max_over_mean"] == pytest.approx(placed.max_over_mean(turned).mean())
    assert facts["served"]["max_over_mean_fresh"] == pytest.approx(
        place("greedy", turned, 4).max_over_mean(turned).mean()
    )
    again = run(ranks=4, policy=str(out), serve=other)
    assert again["placement"] == facts["placement"]
    assert again["max_over_mean_after"] == facts["max_over_mean_after"]
    assert again["served"]["max_over_mean_fresh"] is None
    assert run(ranks=4, policy="trivial")["max_over_mean_after"] == pytest.approx(facts["max_over_mean_before"])


def test_command_text_states_the_answer_first(counts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place_experts(counts, ranks=8, nodes=2, serve=counts)
    text = capsys.readouterr().out
    assert text.startswith("eplb: 8 experts on 8 ranks are within ")
    assert "% of perfect balance" in text.splitlines()[0]
    for part in ("no placement of these slots is below", "between nodes", "Served", "--redundant 8", "layer"):
        assert part in text


def test_command_refuses_bad_questions(counts: Path, tmp_path: Path) -> None:
    smaller = tmp_path / "small.csv"
    smaller.write_text("layer,expert,assignments\n1,0,5\n1,1,5\n")
    for options, message in (
        ({"ranks": 4, "serve": smaller}, r"2 experts in layers \[1\].*Use two records of one model"),
        (
            {"ranks": 3},
            "8 experts \\+ 0 redundant do not divide over 3 ranks. Use 1 redundant experts, or 2 or 4 ranks",
        ),
        ({"ranks": 4, "policy": "eplp"}, "did you mean eplb"),
        ({"ranks": 4, "policy": "none.json"}, "No such file"),
        ({"ranks": 2, "policy": "node-limited", "nodes": 2}, "1 groups do not divide over 2 nodes. Use 1 nodes"),
    ):
        with pytest.raises(PlannerError, match=message) as caught:
            place_experts(counts, out=tmp_path / "never.json", **options)  # type: ignore[arg-type]
        assert caught.value.exit_code == 2
    assert not (tmp_path / "never.json").exists()
    smaller.write_text("layer,expert,assignments\n1,0,5\n1,1,-5\n")
    with pytest.raises(WorkloadError, match="-5"):
        place_experts(smaller, ranks=2)


def test_command_tells_how_many_nodes_a_token_reaches(run: Run) -> None:
    assert run(ranks=4, nodes=2, groups=4, top_groups=1, policy="node-limited")["nodes_reached"] == 1
    assert run(ranks=4, nodes=2, groups=4, policy="node-limited")["nodes_reached"] is None
    with pytest.raises(InputError, match="--top-groups 5: a token picks from 1 to 4"):
        run(ranks=4, nodes=2, groups=4, top_groups=5)
