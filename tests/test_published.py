"""benchmarks/published.py: exact numbers hold, signs hold, and the replay reads, runs and explains a tiny file."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("published", "published_points", "published_tables", "published_targets", "published_memory", "pools")
BURST = {
    "source": "lab",
    "model": "meta-llama/Llama-3.1-8B",
    "gpu": "H100",
    "n_gpus": "1.0",
    "engine": "vLLM",
    "weight_dtype": "bf16",
    "kv_dtype": "",
    "tp": "1.0",
    "ep": "1.0",
    "dp": "1.0",
    "isl_mean": "200.0",
    "osl_mean": "20.0",
    "concurrency": "40.0",
    "request_rate": "inf",
    "notes": "all 40 requests sent at once; served as: vllm serve x --max-num-seqs 8",
}
COLUMNS = (*BURST, "metric", "value", "run_group")


@pytest.fixture(scope="module")
def published() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("published")
    for name in (*NAMES, "tactics"):
        sys.modules.pop(name, None)


def points(path: Path, *runs: dict[str, str]) -> Path:
    """A points file with three values per run."""
    values = {"output_tok_s_total": "1000", "total_tok_s": "11000", "itl_mean_ms": "8"}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for i, run in enumerate(runs):
            for metric, value in values.items():
                scaled = str(float(value) * (1 + int(run.get("scale", i))))
                fields = {key: text for key, text in (BURST | run).items() if key != "scale"}
                writer.writerow({"run_group": f"run-{i}", **fields, "metric": metric, "value": scaled})
    return path


def test_numbers_stated_as_exact_are_within_their_tolerance(published: ModuleType) -> None:
    rows = published.published_tables.economics() + published.published_tables.step3()
    assert {row.name for row in rows} == {f"E{i}" for i in range(1, 9)} | {f"S{i}" for i in range(1, 8)}
    assert [row.what for row in rows if not row.met] == []
    assert all(row.tolerance <= 0.01 for row in rows)


def test_signs_of_the_wider_targets(published: ModuleType) -> None:
    targets = published.published_targets
    rows = [*targets.overlap_target(), *targets.eplb_target(), *targets.afd_target(), *targets.crossover_target()[1:]]
    assert [row.name for row in rows if not row.met] == []
    assert all("%" in row.dominant for row in rows)


def test_decode_of_ep72_is_in_its_band_only_with_the_overlap_that_ran(published: ModuleType) -> None:
    overlapped, plain = published.published_targets.decode_target()
    assert overlapped.met and not plain.met and plain.why and not overlapped.why


def test_a_burst_is_replayed_with_its_flags_and_every_row_is_accounted_for(
    published: ModuleType, tmp_path: Path
) -> None:
    module = published.published_points
    steady = {"request_rate": "8", "concurrency": "", "notes": "; 50 requests; params: --max-model-len=4096"}
    unknown, static = {"gpu": "GH200"}, {"engine": "TensorRT-LLM (static batch)"}
    runs = module.read(points(tmp_path / "p.csv", {}, {"notes": ""}, steady, unknown, static))
    found = module.replay_all(runs, workers=1)
    limited, free, slow = (found[f"run-{i}"].predicted for i in range(3))
    assert limited["output_tok_s_total"] < 0.6 * free["output_tok_s_total"]  # 8 sequences at once against 40
    assert limited["total_tok_s"] == pytest.approx(limited["output_tok_s_total"] * 220 / 20)
    assert slow["output_tok_s_total"] == pytest.approx(8 * 20, rel=0.1)
    assert slow["itl_mean_ms"] < free["itl_mean_ms"]
    assert "GH200" in found["run-3"].reason and "static" in found["run-4"].reason
    text = published.points_section(runs, found)
    assert "9 of 15 values" in text and "| 3 | static batches are not modelled |" in text and "nan" not in text.split()


def test_figures_stated_for_two_gpus_count_for_neither(published: ModuleType, tmp_path: Path) -> None:
    module = published.published_points
    same = [{"scale": "0"}, {"scale": "0"}, {"gpu": "A100", "scale": "1"}, {"gpu": "H100", "scale": "1"}]
    reasons = module.repeated(module.read(points(tmp_path / "p.csv", *same)))
    assert set(reasons) == {"run-1", "run-2", "run-3"}
    assert "twice" in reasons["run-1"] and "A100 vLLM and H100 vLLM" in reasons["run-2"]


def test_closed_loops_bursts_and_users_are_told_apart(published: ModuleType, tmp_path: Path) -> None:
    module = published.published_points
    guide = {"request_rate": "1000", "concurrency": "10.0", "notes": "all 30 requests sent at once"}
    burst, loop = (module.workload_of(run) for run in module.read(points(tmp_path / "p.csv", {}, guide)))
    assert (burst.arrivals.concurrency, burst.num_requests) == (40, 40)
    assert (loop.arrivals.concurrency, loop.num_requests) == (10, 30)


def test_memory_rows(published: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    path.write_text(
        "id,model,gpu,tp,engine,weight_dtype,gpu_mem_util,quantity,value,unit,notes\n"
        "a,meta-llama/Llama-2-7b-hf,H100,1.0,vLLM,bf16,0.9,kv_cache_tokens,119392,tokens,"
        '"max_num_batched_tokens 2048, max_num_seqs 128"\n'
        "b,nobody/knows,H100,1.0,vLLM,bf16,,model_weights_loaded,1,GiB,\n"
    )
    known, unknown = published.published_memory.rows(path)
    assert abs(known.deviation) < 0.05 and not known.note
    assert unknown.ours is None and "nobody/knows" in unknown.note
