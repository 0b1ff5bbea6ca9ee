"""`moeplan profiles import` on a small hand-made tree: normalisation, physics, newest version, errors."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import numpy as np
import pytest

from planner.errors import ProfileError
from planner.hardware import system
from planner.measurements.importer import import_tables
from planner.measurements.importer.clean import monotone
from planner.measurements.importer.experts import balanced_assignments
from planner.measurements.store import build_table, read_table

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")


def put(tree: Path, family: str, engine: str, version: str, op: str, frame: object) -> None:
    path = tree / "toy" / family / engine / version / f"{op}_perf.parquet"
    path.parent.mkdir(parents=True)
    frame.to_parquet(path)  # type: ignore[attr-defined]


def moe(**over: object) -> object:
    base = {
        "device": "NVIDIA H200",
        "moe_dtype": "bfloat16",
        "hidden_size": 4096,
        "inter_size": 1536,
        "topk": 8,
        "num_experts": 128,
        "moe_tp_size": 2,
        "moe_ep_size": 4,
        "distribution": "balanced",
    }
    return pd.DataFrame(base | over)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    gemm = pd.DataFrame({"device": "NVIDIA H200", "gemm_dtype": "bfloat16", "m": [1, 2, 3, 4], "n": 4096, "k": 4096})
    put(tmp_path, "gemm", "vllm", "0.9.0", "gemm", gemm.assign(latency=[1.0, 1.0, 1.0, 1.0]))
    put(tmp_path, "gemm", "vllm", "0.10.0", "gemm", gemm.assign(latency=[0.02, 0.021, 0.021, 1e-9]))
    put(tmp_path, "moe", "vllm", "0.10.0", "moe", moe(num_tokens=[1, 16, 1024], latency=[0.1, 0.3, 2.0]))
    sizes = {"message_size": [2**10, 2**28], "latency": [0.02, 2.04]}
    nccl = {"device": "NVIDIA H200", "nccl_dtype": "half", "num_gpus": 8, "op_name": "all_reduce"}
    put(tmp_path, "comm", "nccl", "2.29.2", "nccl", pd.DataFrame(nccl | sizes))
    return tmp_path


def test_import_normalises_and_drops(tree: Path, tmp_path: Path) -> None:
    summary = import_tables(tree, "toy", tmp_path / "out", "toy", system=system("h200-sxm"), date="2026-11-22")
    assert summary.dropped["gemm"] == {"faster than peak FLOP/s or HBM": 1}
    gemm = read_table(tmp_path / "out" / "toy" / "gemm.npz")
    assert gemm.axes["tokens"].tolist() == [1, 2], "3 is thinned out, 4 is impossible"
    assert gemm.seconds == pytest.approx([2e-5, 2.1e-5], rel=1e-3), "version 0.10.0 is newer than 0.9.0"
    experts = read_table(tmp_path / "out" / "toy" / "expert_gemm.npz")
    assert experts.axes["assignments"].tolist() == [2, 32, 2048], "tokens x 8 / 4"
    assert (experts.keys["width"][0], experts.keys["local_experts"][0]) == (768, 32)
    moves = read_table(tmp_path / "out" / "toy" / "collective.npz")
    assert moves.axes["size"].tolist() == [2**11, 2**29], "elements of two bytes"
    meta = json.loads((tmp_path / "out" / "toy" / "meta.json").read_text(encoding="utf-8"))
    assert meta["versions"]["gemm"] == {"vllm": "0.10.0"}
    assert meta["converted"] == "2026-11-22"
    assert "toy: 3 tables" in str(summary)


def test_import_is_deterministic(tree: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        import_tables(tree, "toy", tmp_path / out, "toy", system=system("h200-sxm"), date="2026-11-22")
    one, two = (read_table(tmp_path / out / "toy" / "gemm.npz") for out in ("one", "two"))
    assert np.array_equal(one.seconds, two.seconds)
    assert (tmp_path / "one/toy/meta.json").read_bytes() == (tmp_path / "two/toy/meta.json").read_bytes()


def test_kernels_that_compute_remote_assignments_lose_their_ep_rows(tmp_path: Path) -> None:
    frames = [moe(moe_tp_size=1, moe_ep_size=ep, num_tokens=[16, 16384], latency=[3.0 / ep, 60.0]) for ep in (1, 4)]
    put(tmp_path, "moe", "sglang", "0.5.10", "moe", pd.concat(frames))
    summary = import_tables(tmp_path, "toy", tmp_path / "out", "toy", system=system("h200-sxm"))
    assert summary.dropped["expert_gemm"] == {"EP > 1 of a kernel that computes other ranks' assignments too": 2}
    assert read_table(tmp_path / "out/toy/expert_gemm.npz").keys["local_experts"].tolist() == [128]


def test_group_limited_routing_is_counted_as_the_collector_made_it() -> None:
    """16,384 tokens put 8 T rows on rank 0 at EP 1 and 2, 5 T at EP 8 and about T at EP 256."""
    experts, top_k = np.full(4, 256.0), np.full(4, 8.0)
    ep = np.array([1.0, 2, 8, 256])
    rows = balanced_assignments(np.full(4, 16384.0), experts, top_k, ep, True)
    assert rows / 16384 == pytest.approx([8, 8, 5, 1 + 1 / 32], rel=1e-3)
    few = balanced_assignments(np.full(4, 4.0), experts, top_k, ep, True)
    assert few[:3].tolist() == [20, 20, 8], "four hot experts plus four per token, one group of them at EP 8"
    plain = balanced_assignments(np.full(4, 4.0), experts, top_k, ep, False)
    assert plain.tolist() == [32, 16, 4, 1]


def test_monotone_repairs_spikes_and_keeps_the_rest() -> None:
    columns = {"engine": ["a"] * 5, "tokens": [1, 2, 3, 4, 5]}
    table = build_table("toy", columns, ("engine",), ("tokens",), np.array([1.0, 1.1, 9.0, 1.2, 1.3]))
    fixed, changed = monotone(table)
    assert changed == 1
    assert fixed.seconds == pytest.approx([1.0, 1.1, 1.2, 1.2, 1.3])


def test_errors_say_what_to_do(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProfileError, match="h200_sxm, b200_sxm"):
        import_tables(tmp_path, "missing", tmp_path, "h200-sxm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProfileError, match="no known table"):
        import_tables(tmp_path, "empty", tmp_path / "out", "h200-sxm")
    genuine = builtins.__import__

    def without_pyarrow(name: str, *args: object, **kwargs: object) -> object:
        if name == "pyarrow":
            raise ImportError("No module named 'pyarrow'")
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ProfileError, match=r"moeplan\[import\]"):
        import_tables(tree, "toy", tmp_path / "out", "h200-sxm")
