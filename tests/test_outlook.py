"""What a plan says beyond its question: cost at other demands, sensitivities, rank loads; in facts, text and report."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner import decisionfigures, figures, report
from planner.balance import router_question
from planner.deployment import Run, simulate_layout
from planner.economics import bill
from planner.engine import Limits, engine
from planner.facts import simulation_facts
from planner.facts.outlook import cost_curve, heat_facts, sensitivity_facts
from planner.facts.plan import operating_point
from planner.hardware import parse_cluster
from planner.layout import parse_layout
from planner.loads import rank_shares
from planner.model import load
from planner.report.sections import evidence
from planner.sensitivity import CHANGE, sensitivity
from planner.text import simulation_text
from planner.workload import parse_slo
from tests.conftest import Command

_SHARE = {"measured": 0.2, "interpolated": 0.8, "extrapolated": 0.0, "roofline": 0.0}


@pytest.fixture(scope="module")
def run() -> Run:
    from planner.options import demand

    fixed = (load("mistralai/Mixtral-8x7B-v0.1"), parse_cluster("h200-sxm:1x8"), parse_layout("tp=4,ep=4,replicas=2"))
    slo = parse_slo("tpot_p95=50ms")
    return simulate_layout(
        *fixed,
        demand("fixed:512/64", 6.0, None, 120),
        engine("vllm"),
        slo,
        limits=Limits(64, 4096),
        backend="all_reduce",
    )


@pytest.fixture(scope="module")
def steps(run: Run) -> dict[str, dict[str, float]]:
    decode, prefill, _ = operating_point(run, run.deployment.cost())
    return {
        name: {term: float(value) for term, value in step.terms.items() if value > 0}
        for name, step in (("decode", decode), ("prefill", prefill))
    }


def test_cost_grows_by_whole_replicas(run: Run) -> None:
    rows = {row["demand_factor"]: row for row in cost_curve(run, 1.25)}
    assert rows[1.0]["num_gpus"] == 8 and rows[0.5]["num_gpus"] == 4 and rows[1.25]["num_gpus"] == 8
    assert rows[1.5]["num_gpus"] == 12 and not rows[1.5]["is_offered"] and rows[1.25]["is_offered"]
    assert rows[1.0]["usd_per_mtok_output"] == pytest.approx(run.usd_per_mtok_output)
    assert rows[1.0]["usd_per_month"] == bill(run.deployment.cluster.system, 8).usd_per_month
    # The same GPUs for more tokens: price and tokens balance.
    assert rows[1.25]["usd_per_mtok_output"] * 1.25 == pytest.approx(rows[1.0]["usd_per_mtok_output"])
    assert cost_curve(run, 0.0) == []


def test_sensitivities_surround_the_answer(run: Run, steps: dict[str, dict[str, float]]) -> None:
    effects = {effect.input: effect for effect in sensitivity(run, **steps)}
    assert {"requests per second", "prompt tokens", "output tokens"} <= set(effects)
    for effect in effects.values():
        assert effect.low_ratio <= run.worst_ratio * 1.001 and effect.high_ratio >= run.worst_ratio * 0.999
    rate = effects["requests per second"]
    assert rate.high_ratio > rate.low_ratio
    kernels = [effect for name, effect in effects.items() if name.startswith("time of")]
    assert 0 < sum(effect.swing for effect in kernels) <= 2 * CHANGE * run.worst_ratio * 1.001
    rows = sensitivity_facts(run, steps, _SHARE)
    assert rows[0]["input"] == "error of the prediction"
    assert rows[0]["low_ratio"] < run.worst_ratio < rows[0]["high_ratio"]


def test_rank_loads_are_shares_that_balancing_levels(run: Run) -> None:
    shares = rank_shares(router_question(run.deployment))
    assert shares.shape[1] == 4
    np.testing.assert_allclose(shares.mean(axis=1), 1.0)
    options = [
        {"placement": "contiguous", "redundant_experts": 0, "gain": 0.0},
        {"placement": "eplb", "redundant_experts": 4, "gain": 0.1},
    ]
    heat = heat_facts(run, {"options": options})
    assert heat is not None and heat["before"]["num_ranks"] == 4
    assert heat["after"]["placement"] == "eplb with 4 copies"
    assert 1.0 <= heat["after"]["busiest_mean"] <= heat["before"]["busiest_mean"]
    popular = heat_facts(run, None)
    assert popular is not None and popular["unit"] == "expert"
    first = popular["before"]["loads"][0]
    assert len(first) == 8 and first == sorted(first, reverse=True) and sum(first) == pytest.approx(8.0, abs=1e-3)


def test_simulation_has_launch_text_and_a_report(run: Run) -> None:
    facts = json.loads(json.dumps(simulation_facts(run, "moeplan simulate <b>toy</b>")))
    text = simulation_text(facts)
    assert "Launch, unverified\n  vllm serve mistralai/Mixtral-8x7B-v0.1 --tensor-parallel-size 4" in text
    assert "Start 2 replicas behind a load balancer." in text
    titles = [section.title for section in evidence(facts)]
    assert {"Latency of requests", "Queue and batch over time", "How to start it"} <= set(titles)
    told = report.markdown(facts)
    assert "    vllm serve mistralai/Mixtral-8x7B-v0.1" in told and told.startswith(
        "# mistralai/Mixtral-8x7B-v0.1 on h200"
    )
    assert "TPOT p95 at" in told


OUTLOOK: dict[str, Any] = {
    "layout": {"name": "tp8 <script>"},
    "worst_objective": "TPOT p95",
    "worst_ratio": 0.9,
    "cost_curve": [
        {
            "demand_factor": f,
            "num_gpus": n,
            "usd_per_month": 2e4 * n,
            "usd_per_mtok_output": n / f,
            "is_offered": n < 32,
        }
        for f, n in ((0.5, 8), (1.0, 8), (2.0, 16), (4.0, 32))
    ],
    "sensitivity": [
        {"input": "time of experts", "low_label": "-10%", "high_label": "+10%", "low_ratio": 0.8, "high_ratio": 1.02},
        {"input": "prompt tokens", "low_label": "-10%", "high_label": "+10%", "low_ratio": 0.88, "high_ratio": 0.92},
    ],
    "heat": {"unit": "rank"}
    | {
        side: {
            "placement": name,
            "layers": [0, 30],
            "num_ranks": 4,
            "loads": [[1 + spread, 1 - spread, 1.0, 1.0]] * 2,
            "busiest_mean": 1 + spread,
            "busiest_worst": 1 + spread,
        }
        for side, name, spread in (("before", "contiguous", 0.2), ("after", "eplb", 0.01))
    },
    "launch": [
        {
            "engine": "vllm 0.33.0",
            "role": "",
            "commands": [{"text": "vllm serve '<script>'", "num_gpus": 8}],
            "replicas": 1,
            "num_gpus": 8,
            "note": "Unverified starting point.",
        }
    ],
}


def test_sections_state_findings_and_numbers() -> None:
    found = {section.title: section for section in evidence(OUTLOOK)}
    cost = found["Cost against demand"]
    assert cost.finding == (
        "8 GPUs cost $160,000 a month at the asked demand, $8.00 per Mtok output; at half of it a million tokens cost "
        "$16.0. 2 x the demand needs 16 GPUs in whole replicas."
    )
    assert cost.tables[0].rows[-1] == ("4 x", "32", "640,000", "8.00", "no")
    tornado = found["What would change the answer"]
    assert tornado.finding == "TPOT p95 stands at 90% of its limit. It breaks with an unfavourable time of experts."
    assert tornado.tables[0].rows[0] == ("time of experts", "-10%", "80%", "+10%", "102%")
    heat = found["Load of the ranks by layer"]
    assert (
        "busiest of 4 ranks carries 1.20 x the even share" in heat.finding
        and "eplb brings that to 1.01 x" in heat.finding
    )
    assert found["How to start it"].code == ("vllm serve '<script>'",)
    for key in OUTLOOK:
        facts = copy.deepcopy(OUTLOOK) | {key: None}
        if key not in ("worst_ratio", "worst_objective"):
            assert report.markdown(facts).startswith("# ")


def test_figures_hold_the_data_and_escape_names() -> None:
    page = report.html(OUTLOOK)
    assert "<script" not in page and page.count("<svg") == 3
    drawn = decisionfigures.cost_against_demand({"a": OUTLOOK["cost_curve"]})
    assert drawn.axes[0].lines[0].get_ydata().tolist() == [1.6e5, 1.6e5, 3.2e5, 6.4e5]
    rows = [{"input": f"i{n}", "low": 1 - n, "high": 1 + n, "low_label": "", "high_label": ""} for n in range(1, 15)]
    bars = decisionfigures.tornado(rows, 1.0, "x").axes[0]
    assert len(bars.patches) == 20 and next(text.get_text() for text in bars.get_yticklabels()) == "i14"
    heat = decisionfigures.heat_map([OUTLOOK["heat"][side] for side in ("before", "after")])
    assert "1.20" in figures.svg(heat, "heat", "") and "<image" not in figures.svg(heat, "heat", "")


def test_labels_of_crowded_points_do_not_overlap() -> None:
    rows = [
        {"layout": f"tp{n}", "name": f"tp{n}, 1024 seqs, 8192 tok/step", "meets_slo": True}
        | {"interactivity_tok_per_s_per_user": 30 + 0.1 * n, "output_tok_per_s_per_gpu": 100 - 0.1 * n}
        for n in range(6)
    ]
    drawn = figures.frontier(rows, 2, 20.0)
    drawn.draw_without_rendering()
    texts = [text for text in drawn.axes[0].texts if text.get_text().startswith("tp")]
    boxes = [text.get_window_extent() for text in texts]
    assert any("(chosen)" in text.get_text() for text in texts)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_report_command_makes_the_same_bytes(moeplan: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    layout = ["--layout", "tp=2", "--rate", "2", "--num-requests", "60", "--workload", "fixed:128/16"]
    code, _, _ = moeplan("simulate", "mixtral-8x7b", "--cluster", "h200-sxm:1x2", *layout, "--out", str(folder))
    assert code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"simulation.json", "requests.csv", "steps.csv", "report.html", "report.md", "manifest.json"} == set(before)
    (folder / "report.html").unlink()
    code, out, _ = moeplan("report", str(folder))
    assert code == 0 and "report.html" in out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    code, _, err = moeplan("simulate", "mixtral-8x7b", "--cluster", "h200-sxm:1x2", *layout, "--out", str(folder))
    assert code == 2 and "is not empty" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    code, _, err = moeplan("report", str(tmp_path / "nowhere"))
    assert code == 2 and "no plan.json" in err
