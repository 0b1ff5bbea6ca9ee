"""The tables and figures of benchmarks/study.py on their smallest cases."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from planner.figures import line_grid, svg

ROOT = Path(__file__).parents[1]
NAMES = ("study", "study_page", "study_facts")


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("study")
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def steps(study: ModuleType) -> pd.DataFrame:
    return study.placement_rows("h200-sxm", 32, ["single-domain"])


def test_placement_levels_the_ranks_and_copies_take_cache(study: ModuleType, steps: pd.DataFrame) -> None:
    decode = steps[(steps["phase"] == "decode") & (steps["tokens_per_gpu"] == 128)].set_index("placement")
    assert list(decode.index) == ["contiguous", "greedy", "greedy + 1"]
    assert decode["max_over_mean"].is_monotonic_decreasing and decode["max_over_mean"].iloc[-1] < 1.2
    assert decode["step_s"]["greedy"] < decode["step_s"]["contiguous"]
    assert decode["kv_tokens_per_gpu"]["greedy + 1"] < decode["kv_tokens_per_gpu"]["greedy"]
    assert (decode["experts_s"] + decode["exchange_s"] < decode["step_s"]).all()
    assert study.placements(72)["greedy"] == ("greedy", 32) and study.placements(72)["greedy + 1"] == ("greedy", 104)
    lines = study.study_page.placement_table(steps)
    assert len(lines) == 3 and lines[2].startswith("| 32 | single-domain |")
    assert len(study.study_page.gain_table(steps)) == 3


def test_a_placement_learned_elsewhere_serves_worse(study: ModuleType) -> None:
    found = study.stale_rows("h200-sxm", 16, 32).pivot_table("max_over_mean", "placement", "learned")
    assert found.loc["greedy", "itself"] < found.loc["greedy", "mixed"] < found.loc["contiguous", "mixed"]
    assert found.loc["greedy", "mixed"] < found.loc["greedy", "other"]


def test_drops_fall_with_the_factor(study: ModuleType) -> None:
    rows = study.drop_rows("v3", 1024, [1.0, 1.25], ["single-domain"])
    free, tight, loose, placed = rows["drop_rate"]
    assert free == placed == 0 < loose < tight
    assert rows["slots"].tolist() == [-1, 1, 2, -1]  # ceil(32 x 8 / 256 x factor) per source rank
    assert rows["step_s"].iloc[3] < rows["step_s"].iloc[0]
    names = [line.split("|")[1].strip() for line in study.study_page.drop_table(rows)[2:]]
    assert names == ["off", "1", "1.25", "off, placed"]


def test_rates_rise_with_the_resident_share(study: ModuleType) -> None:
    name = next(iter(study.MACHINES))
    rows = study.residency_rows(name, [0.0, 0.9])
    for _, part in rows.groupby("policy"):
        assert part["share"].iloc[-1] == 1.0 and part["is_most"].sum() == 1
        assert part["tok_per_s"].iloc[0] < part["tok_per_s"].iloc[1] < part["tok_per_s"].iloc[-1]
        assert part["fits"].tolist() == (part["resident"] <= part.loc[part["is_most"], "resident"].iloc[0]).tolist()
    points = study.study_page.residency_points(rows)
    figures = [svg(line_grid(points, "Experts in HBM", {0.0: "0", 1.0: "100"}, is_log_x=False), "f", "f") for _ in "ab"]
    assert figures[0] == figures[1] and "cpu-layers" in figures[0]


def test_the_page_links_what_it_names() -> None:
    page = (ROOT / "docs" / "study.md").read_text("utf-8")
    assert "`python benchmarks/study.py`" in page and "nan" not in page.split() and "{" not in page
    for figure in ("decode", "prefill", "drops", "residency"):
        assert f"figures/study_{figure}.svg" in page and (ROOT / "docs" / "figures" / f"study_{figure}.svg").exists()
    readings = tomllib.loads((ROOT / "benchmarks" / "claims_reading.toml").read_text("utf-8"))
    assert all(reading["verdict"] in page for reading in readings.values())


def test_records_follow_the_law(study: ModuleType) -> None:
    records = study.record_rows()
    if not len(records):
        pytest.skip("the shared records are not here")
    assert np.abs(records["law"] / records["record"] - 1).mean() < 0.05
