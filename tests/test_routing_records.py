"""Routing records: every format is read, and bad input gets one message."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import WorkloadError
from planner.routing import formats
from planner.routing.formats import read_record, read_records
from planner.routing.records import check_model, mixture, record_from_counts, record_from_ids

DATA = Path("/work/shared/data/routing")
HEADER = "layer,expert,assignments\n"


def picks(layers: int, tokens: int, experts: int, top_k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((layers, tokens, experts)).argsort(axis=2)[:, :, :top_k]


def csv_of(tmp_path: Path, rows: str, header: str = HEADER) -> Path:
    path = tmp_path / "counts.csv"
    path.write_text(header + rows)
    return path


# --- the record ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 12), st.data())
@settings(max_examples=50, deadline=None)
def test_counts_follow_the_ids(layers: int, tokens: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    ids = picks(layers, tokens, experts, top_k, seed=tokens)
    found = record_from_ids(ids, experts, "drawn", sequence_lengths=[tokens])
    assert found.counts.shape == (layers, experts)
    assert (found.counts.sum(axis=1) == tokens * top_k).all()
    assert found.num_tokens == tokens
    assert found.counts[0, ids[0, 0, 0]] == (ids[0] == ids[0, 0, 0]).sum()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[1.0, -3.0]], "expert 1: -3 assignments"),
        ([[1.0, float("nan")]], "expert 1: nan assignments"),
        ([[1.0, float("inf")]], "inf assignments"),
        ([[0.0, 0.0]], "layer 0 has no assignments"),
        ([], "shape"),
        ([1.0, 2.0], "shape"),
    ],
)
def test_impossible_counts(counts: Any, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        record_from_counts(counts, "x")


def test_huge_counts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.csv"
    path.write_text("layer,expert,assignments\n0,0,1e308\n0,1,1e308\n")
    with pytest.raises(WorkloadError, match=r"layer 0, expert 0: 1e\+308 assignments; a count is a number from 0 to 9"):
        read_record(path)
    stat = tmp_path / "stat.json"
    stat.write_text('{"logical_count": [[[1e308, 1]], [[1e308, 1]]]}')
    with pytest.raises(WorkloadError, match=r"counts from 1 to 1e\+308"):
        read_record(stat)


def test_numpys_advice_to_load_unsafely_is_not_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(b"\x80\x04]\x94.")
    for suffix in (".npz", ".npy"):
        with pytest.raises(WorkloadError) as refused:
            read_record(path.rename(path.with_suffix(suffix)))
        assert "unsafely" not in str(refused.value) and "allow_pickle" not in str(refused.value)
        path = path.with_suffix(suffix)


def test_layer_numbers_are_distinct() -> None:
    with pytest.raises(WorkloadError, match=r"layer numbers \[3, 3\] for 2 rows"):
        record_from_counts(np.ones((2, 4)), "x", [3, 3])


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([[[0, 4]]], None, "expert 4 of a model with 4 experts"),
        ([[[-1, 2]]], None, "expert -1"),
        ([[[2, 2]]], None, "takes an expert twice"),
        ([[[0.5, 1.0]]], None, "integers"),
        ([[0, 1]], None, "shape"),
        ([[[0, 1], [1, 2]]], [3], "sum to 3 for 2 tokens"),
        ([[[0, 1], [1, 2]]], [2, 0], "one positive length"),
    ],
)
def test_impossible_ids(ids: Any, lengths: Any, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        record_from_ids(ids, 4, "x", sequence_lengths=lengths)


def test_mixture_is_the_tokens_together() -> None:
    parts = [record_from_ids(picks(2, n, 8, 2, n), 8, str(n), sequence_lengths=[n]) for n in (5, 9)]
    whole = mixture(parts)
    np.testing.assert_array_equal(whole.counts, parts[0].counts + parts[1].counts)
    assert whole.expert_ids is not None and whole.expert_ids.shape == (2, 14, 2)
    assert whole.sequence_lengths is not None and whole.sequence_lengths.tolist() == [5, 9]
    counted = record_from_counts(np.ones((2, 8)), "counts")
    assert mixture([*parts, counted]).expert_ids is None
    with pytest.raises(
        WorkloadError, match="counts has 2 layers from 0 of 8 experts, but other has 2 layers from 0 of 16"
    ):
        mixture([record_from_counts(np.ones((2, 16)), "other"), counted])
    with pytest.raises(WorkloadError, match="3 experts per token, but 5 has 2"):
        mixture([parts[0], record_from_ids(picks(2, 4, 8, 3), 8, "three")])
    with pytest.raises(WorkloadError, match="no routing record"):
        mixture([])


def test_a_record_of_another_model() -> None:
    found = record_from_ids(picks(2, 50, 8, 2), 8, "trace")
    check_model(found, 8, 32, 2)
    with pytest.raises(WorkloadError, match="trace counts 8 experts, but V3 has 256"):
        check_model(found, 256, 58, 8, "V3")
    with pytest.raises(WorkloadError, match="2 MoE layers, but the model has 1"):
        check_model(found, 8, 1, 2)
    with pytest.raises(WorkloadError, match="2 experts per token, but the model picks 1"):
        check_model(found, 8, 2, 1)
    with pytest.raises(WorkloadError, match=r"70.0% of the assignments; at top-2 no expert of the model can exceed 50"):
        check_model(record_from_counts([[7.0, 1, 1, 1]], "one rank"), 4, 1, 2)


# --- counts as CSV ---------------------------------------------------------------------------------------------------


def test_counts_csv(tmp_path: Path) -> None:
    found = read_record(csv_of(tmp_path, "3,0,5\n3,1,7\n\n9,1,2\n9,0,1.5\n"))
    assert (found.layers.tolist(), found.top_k) == ([3, 9], None)
    np.testing.assert_array_equal(found.counts, [[5, 7], [1.5, 2]])


def test_groups_are_selected(tmp_path: Path) -> None:
    rows = "".join(f"{m},{d},0,{e},{e + 1}\n" for m in ("A", "B") for d in ("c4", "wiki") for e in range(4))
    path = csv_of(tmp_path, rows, "model,domain," + HEADER)
    assert read_records(path, "B/wiki")[0].source.endswith("counts.csv:B/wiki")
    assert len(read_records(path, "c4")) == 2
    assert read_record(path, "A").counts[0].tolist() == [2, 4, 6, 8]
    with pytest.raises(WorkloadError, match="4 records; select one of A/c4, A/wiki, B/c4, B/wiki"):
        read_records(path)
    with pytest.raises(WorkloadError, match=r"no record 'A/c5'.*did you mean A/c4"):
        read_records(path, "A/c5")
    with pytest.raises(WorkloadError, match="leave select away"):
        read_records(csv_of(tmp_path, "0,0,1\n"), "c4")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,0,5\n0,0,6\n", "line 3: layer 0, expert 0 a second time"),
        ("0,0,5\n0,2,6\n", "layer 0 has no row for expert 1 of 3"),
        ("0,0,5\n\n0,1,-6\n", "line 4: assignments '-6' is not a finite number"),
        ("0,0,nan\n", "line 2: assignments 'nan'"),
        ("0,0,many\n", "line 2: assignments 'many'"),
        ("0,0.5,1\n", "line 2: expert '0.5' is not a whole number"),
        ("-1,0,1\n", "line 2: layer '-1'"),
        ("0,99999999,1\n", "line 2: expert '99999999'"),
        ("0,0,\n", "line 2: assignments ''"),
        ("0,0,0\n", "layer 0 has no assignments"),
        ("", "a header without rows"),
        ("0,0,1,2,3\n0,1\n", "cannot be read as CSV"),
    ],
)
def test_bad_rows(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        read_records(csv_of(tmp_path, rows))


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkloadError, match="missing column assignments .*did you mean assignment"):
        read_records(csv_of(tmp_path, "0,0,1\n", "layer,expert,assignment\n"))
    with pytest.raises(WorkloadError, match="the file is empty"):
        read_records(csv_of(tmp_path, "", ""))
    with pytest.raises(WorkloadError, match="gone.csv: cannot be read: No such file"):
        read_records(tmp_path / "gone.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(WorkloadError, match="is a folder, not a file"):
        read_records(tmp_path / "folder.csv")
    with pytest.raises(WorkloadError, match=r"suffix '.txt' is no routing record. did you mean .pt"):
        read_records(tmp_path / "notes.txt")
    (tmp_path / "binary.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(WorkloadError, match=r"binary.csv"):
        read_records(tmp_path / "binary.csv")
    monkeypatch.setattr(formats, "MAX_TEXT_BYTES", 10)
    with pytest.raises(WorkloadError, match="at most 0 MB are read. Record a shorter stretch or save it as .npz"):
        read_records(csv_of(tmp_path, "0,0,1\n"))


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_token_ids(tmp_path: Path) -> None:
    path, ids = tmp_path / "ids.npz", picks(3, 20, 16, 2)
    np.savez(path, expert_ids=ids, sequence_lengths=[12, 8], first_moe_layer=1, num_experts=16, top_k=2)
    found = read_record(path)
    np.testing.assert_array_equal(found.expert_ids, ids)
    assert (found.layers.tolist(), found.top_k, found.num_experts) == ([1, 2, 3], 2, 16)
    np.savez(path, expert_ids=ids)
    assert read_record(path, num_experts=32).num_experts == 32
    with pytest.raises(WorkloadError, match="does not tell how many experts"):
        read_record(path)
    np.savez(path, expert_ids=ids, num_experts=16, top_k=8)
    with pytest.raises(WorkloadError, match="for top_k 8"):
        read_record(path)


def test_arrays_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, expert_ids=np.array([{}], dtype=object), num_experts=4)
    with pytest.raises(WorkloadError, match="never loaded: save plain numbers"):
        read_record(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(WorkloadError, match="keys other; expected one of expert_ids, routed_experts"):
        read_record(path)
    path.write_bytes(b"no zip at all")
    with pytest.raises(WorkloadError, match="never loaded: save plain numbers"):
        read_record(path)
    np.savez_compressed(path, expert_ids=np.zeros((1, 100_000, 1), int), num_experts=4)
    monkeypatch.setattr(formats, "MAX_ARRAY_BYTES", 500_000)
    assert path.stat().st_size < 10_000
    with pytest.raises(WorkloadError, match="1 MB; at most"):
        read_record(path)


# --- engines ---------------------------------------------------------------------------------------------------------

STEPS = np.random.default_rng(7).integers(1, 50, (5, 4, 8))
STEPS[:, 0] = 0  # a dense layer
STEPS[4] = 0  # the unfilled end of the buffer


@pytest.mark.parametrize("suffix", ["npz", "json", "jsonl", "pt"])
def test_sglang_stat(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"expert_distribution_recorder_1.{suffix}"
    if suffix == "npz":
        np.savez(path, logical_count=STEPS, rank=0)
    elif suffix == "pt":
        torch = pytest.importorskip("torch")
        torch.save({"rank": 0, "logical_count": torch.tensor(STEPS, dtype=torch.int32), "utilization": None}, path)
    elif suffix == "json":
        path.write_text(json.dumps({"logical_count": STEPS.tolist()}))
    else:
        path.write_text("\n".join(json.dumps({"logical_count": step.tolist()}) for step in STEPS[:4]))
    found = read_record(path)
    assert found.layers.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(found.counts, STEPS.sum(axis=0)[1:])
    if suffix != "jsonl":
        np.testing.assert_array_equal(found.windows, STEPS[:4, 1:])


def test_sglang_passes_are_mapped_to_logical_experts(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    slots = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 3]])
    counts = torch.arange(12).reshape(2, 6)
    one = {"forward_pass_id": 7, "rank": 0, "gatherer_key": "primary", "global_physical_count": counts}
    torch.save({"records": [one, one], "last_physical_to_logical_map": slots}, tmp_path / "a.pt")
    found = read_record(tmp_path / "a.pt")
    np.testing.assert_array_equal(found.counts, [[8, 12, 4, 6], [18, 16, 14, 54]])
    torch.save({"records": [one]}, tmp_path / "b.pt")
    with pytest.raises(WorkloadError, match="need last_physical_to_logical_map"):
        read_record(tmp_path / "b.pt")
    torch.save({"records": [], "last_physical_to_logical_map": slots}, tmp_path / "c.pt")
    with pytest.raises(WorkloadError, match="no recorded pass"):
        read_record(tmp_path / "c.pt")


def test_sglang_tokens(tmp_path: Path) -> None:
    """Three picks in a buffer of eight, a dense layer, a padding token, one prefill and one decode pass."""
    slots = np.stack([np.arange(6), np.array([0, 1, 2, 3, 4, 0])])

    def one(ids: np.ndarray, **more: Any) -> dict[str, Any]:
        buffer = np.full((2, ids.shape[0] + 1, 8), -1)
        buffer[1, :-1, :3] = ids
        return {"topk_ids_of_layer": buffer.tolist(), **more}

    prefill = one(np.array([[5, 1, 2], [2, 3, 4]]), forward_mode=1, extend_seq_lens=[3])
    decode = one(np.array([[1, 2, 3]]), forward_mode=2)
    decode["topk_ids_of_layer"] = [layer[:1] for layer in decode["topk_ids_of_layer"]]
    idle = {"topk_ids_of_layer": [[], []], "forward_mode": 4}
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps({"records": [prefill, decode, idle], "last_physical_to_logical_map": slots.tolist()}))
    found = read_record(path)
    assert found.expert_ids is not None and found.sequence_lengths is not None
    assert found.expert_ids.tolist() == [[[0, 1, 2], [2, 3, 4], [1, 2, 3]]]
    assert (found.layers.tolist(), found.sequence_lengths.tolist(), found.top_k) == ([1], [2, 1], 3)
    assert read_record(path, "decode").num_tokens == 1
    fused = one(np.array([[6, 1, 2]]))
    path.write_text(json.dumps({"records": [fused], "last_physical_to_logical_map": slots.tolist()}))
    with pytest.raises(WorkloadError, match="disable-shared-experts-fusion"):
        read_record(path)


def test_sglang_without_traffic(tmp_path: Path) -> None:
    np.savez(tmp_path / "idle.npz", logical_count=np.zeros((3, 2, 4)))
    with pytest.raises(WorkloadError, match="all counts are 0; start the recorder"):
        read_record(tmp_path / "idle.npz")
    (tmp_path / "ragged.json").write_text('{"logical_count": [[1, 2], [3]]}')
    with pytest.raises(WorkloadError, match="rows of equal length"):
        read_record(tmp_path / "ragged.json")


@pytest.mark.parametrize("form", ["npz", "npy", "lists", "base64"])
def test_vllm_requests(tmp_path: Path, form: str) -> None:
    """Requests are [tokens, layers, k] with zeros for dense layers; each is a sequence."""
    requests = [np.zeros((n, 3, 2), np.uint8) for n in (6, 4)]
    for request in requests:
        request[:, 1:] = picks(len(request), 2, 8, 2, len(request))
    whole, path = np.concatenate(requests), tmp_path / f"r.{form if form.startswith('np') else 'jsonl'}"
    if form == "npz":
        np.savez(path, routed_experts=whole, num_experts=8)
    elif form == "npy":
        np.save(path, whole)
    else:
        lines = [r.tolist() if form == "lists" else _base64(r) for r in requests]
        path.write_text("".join(json.dumps({"routed_experts": line}) + "\n" for line in lines))
    found = read_record(path, num_experts=8)
    np.testing.assert_array_equal(found.expert_ids, whole[:, 1:].transpose(1, 0, 2))
    assert found.layers.tolist() == [1, 2] and found.sequence_lengths is not None
    assert found.sequence_lengths.tolist() == ([6, 4] if path.suffix == ".jsonl" else [10])


def _base64(array: np.ndarray) -> str:
    stream = io.BytesIO()
    np.save(stream, array)
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"routed_experts": [[[0, 0]]], "num_experts": 4}', "every routed expert is 0"),
        ('{"routed_experts": [[0, 1]], "num_experts": 4}', "shapes"),
        ('{"routed_experts": "AAAA", "num_experts": 4}', "no base64 of a .npy file of plain numbers"),
        ('{"routed_experts": [[["a"]]], "num_experts": 4}', "not numbers"),
        ('{"routed_experts": [[[1]]], "num_experts": 4}\n{"other": 1}', "an object without routed_experts"),
        ('{"routed_experts": [[[1', "not valid JSON"),
        ("[1, 2]", "expected an object"),
        ("\n", "expected an object"),
    ],
)
def test_bad_json(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=message):
        read_record(path)


@pytest.mark.skipif(not DATA.exists(), reason="the shared records are not here")
def test_the_shared_records() -> None:
    law = read_record(DATA / "deepseek_v2_lite_law.npz")
    assert (law.num_layers, law.num_experts, law.top_k, law.num_tokens) == (26, 64, 6, 8327)
    check_model(law, 64, 26, 6)
    counts = read_record(DATA / "expert_counts_olmoe_mixtral.csv", "Mixtral-8x7B/arxiv")
    assert (counts.layers.tolist(), counts.counts[0, 0]) == ([0, 7, 15], 55713)
