"""Routing statistics against published values of real records, and against laws whose parameters are known."""

from __future__ import annotations

import csv
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from planner.cli.experts_inspect import inspect_records, inspect_text
from planner.errors import InputError, LayoutError, WorkloadError
from planner.facts.routing import inspect_facts, record_facts
from planner.routing import goodness
from planner.routing.formats import READERS, read_record
from planner.routing.records import Record, mixture, record_from_counts, record_from_ids
from planner.routing.statistics import (
    best_max_over_mean,
    ep_sizes,
    expected_active,
    load_correlation,
    load_spread,
    rank_max_over_mean,
    request_concentration,
    reuse,
    sampling_cv,
    window_correlation,
)

DATA = Path("/work/shared/data/routing")
COUNTS = DATA / "expert_counts_olmoe_mixtral.csv"
real = pytest.mark.skipif(not COUNTS.exists(), reason="the shared records are not here")
TASKS = ("intent", "law", "summary", "translation")
OLMOE = ("c4", "tulu", "book", "github", "wikipedia", "arxiv")
MIXTRAL = ("c4", "wikipedia", "arxiv", "book", "github")


@lru_cache(maxsize=32)
def record(name: str) -> Record:
    if name == "mixed":
        return mixture([record(task) for task in TASKS], "mixed")
    if name in TASKS:
        return read_record(DATA / f"deepseek_v2_lite_{name}.npz")
    return all_counts()[name]


@lru_cache(maxsize=1)
def all_counts() -> dict[str, Record]:
    return READERS[".csv"](COUNTS, None)


@lru_cache(maxsize=1)
def published() -> dict[tuple[str, str, str, int], float]:
    """(model, data set and metric with parameter, layer) -> value of routing_stats.csv."""
    with (DATA / "routing_stats.csv").open() as file:
        return {
            (row["model"], row["dataset"], f"{row['metric']} {row['param']}", int(row["layer"])): float(row["value"])
            for row in csv.DictReader(file)
        }


def mean_ep(found: Record, ep: int) -> float:
    return float(rank_max_over_mean(found.counts, ep).mean())


# --- published numbers -----------------------------------------------------------------------------------------------


@real
@pytest.mark.parametrize(
    ("name", "max_over_mean", "cv", "log_std", "zipf", "eps"),
    [
        ("mixed", "2.73", "0.51", "0.51", "0.51", ("1.27", "1.54", "1.96")),
        ("law", "3.52", "0.61", "0.59", "0.58", ("1.39", "1.70", "2.35")),
        ("intent", "3.81", "0.79", "0.89", "0.84", ("1.44", "1.80", "2.45")),
        ("summary", "4.28", "0.74", "0.69", "0.68", ("1.40", "1.83", "2.68")),
        ("translation", "5.62", "1.17", "1.04", "1.08", ("1.69", "2.36", "3.54")),
    ],
)
def test_table_of_skew(name: str, max_over_mean: str, cv: str, log_std: str, zipf: str, eps: tuple[str, ...]) -> None:
    spread = load_spread(record(name).counts)
    means = [f"{x.mean():.2f}" for x in (spread.max_over_mean, spread.cv, spread.log_std, spread.zipf_exponent)]
    assert means == [max_over_mean, cv, log_std, zipf]
    assert tuple(f"{mean_ep(record(name), ep):.2f}" for ep in (8, 16, 32)) == eps


@real
def test_ranges_of_mixed_traffic() -> None:
    found = record("mixed").counts
    spread = load_spread(found)
    columns = (spread.max_over_mean, spread.cv, *(rank_max_over_mean(found, ep) for ep in (8, 16, 32)))
    assert [f"{x.min():.2f}-{x.max():.2f}" for x in columns] == [
        "1.87-3.42",
        "0.39-0.63",
        "1.08-1.51",
        "1.24-2.03",
        "1.47-2.61",
    ]


@real
def test_mixtral_and_olmoe_rows() -> None:
    tops = [load_spread(record(f"Mixtral-8x7B/{d}").counts).max_over_mean.mean() for d in MIXTRAL]
    assert [f"{x:.2f}" for x in tops] == ["1.11", "1.14", "1.19", "1.19", "1.29"]
    tops = [load_spread(record(f"OLMoE-1B-7B/{d}").counts).max_over_mean.mean() for d in OLMOE]
    assert [f"{x:.1f}" for x in tops] == ["2.7", "3.9", "3.5", "5.2", "5.9", "7.2"]
    assert [f"{mean_ep(record('OLMoE-1B-7B/c4'), ep):.2f}" for ep in (8, 16)] == ["1.16", "1.40"]
    others = [record(f"OLMoE-1B-7B/{d}") for d in OLMOE[1:]]
    for ep, (low, high) in {8: ("1.41", "1.66"), 16: ("1.78", "2.27")}.items():
        loads = [mean_ep(r, ep) for r in others]
        assert (f"{min(loads):.2f}", f"{max(loads):.2f}") == (low, high)


@real
def test_every_layer_to_five_digits() -> None:
    checked = 0
    for name in (*TASKS, "mixed"):
        checked += _check_layers(record(name), "DeepSeek-V2-Lite (ESFT-vanilla-lite)", name, (2, 4, 8, 16, 32))
    for d in OLMOE:
        checked += _check_layers(record(f"OLMoE-1B-7B/{d}"), "OLMoE-1B-7B-0924", d, ())
        checked += _check_layers(record(f"OLMoE-1B-7B/{d}"), "olmoe", d, (2, 4, 8, 16, 32))
    for d in MIXTRAL:
        checked += _check_layers(record(f"Mixtral-8x7B/{d}"), "Mixtral-8x7B-v0.1", d, ())
        checked += _check_layers(record(f"Mixtral-8x7B/{d}"), "mistral", d, (2, 4, 8))
    assert checked == 26 * (5 * 10 + 4) + 6 * 3 * (5 + 5) + 5 * 3 * (5 + 3)


def _check_layers(found: Record, model: str, dataset: str, eps: tuple[int, ...]) -> int:
    spread = load_spread(found.counts)
    size = {64: "64 experts top-" + ("8" if "LMo" in model or model == "olmoe" else "6"), 8: "8 experts top-2"}
    per_layer = {f"ep_max_over_mean_full ep={ep} contiguous": rank_max_over_mean(found.counts, ep) for ep in eps}
    if not model.islower():
        names = {"lognormal_sigma": "log_std", "zipf_alpha": "zipf_exponent"}
        for metric in ("max_over_mean", "cv", "gini", "lognormal_sigma", "zipf_alpha"):
            per_layer[f"{metric} {size[found.num_experts]}"] = getattr(spread, names.get(metric, metric))
    again = reuse(found) if dataset != "mixed" else None
    if again is not None:
        per_layer["next_token_expert_reuse_fraction same layer, consecutive tokens"] = again
    for metric, values in per_layer.items():
        expected = [published()[model, dataset, metric, int(layer)] for layer in found.layers]
        np.testing.assert_allclose(values, expected, rtol=0, atol=5.0001e-6, err_msg=f"{dataset} {metric}")
    return found.num_layers * len(per_layer)


@real
def test_next_token_reuse() -> None:
    assert [f"{reuse(record(task)).mean():.2f}" for task in TASKS] == ["0.26", "0.29", "0.29", "0.27"]
    law = reuse(record("law"))
    assert (f"{law.min():.2f}", f"{law.max():.2f}") == ("0.16", "0.35")


@real
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mixed", {1: 6, 2: 11.3, 4: 20.1, 8: 32.7, 16: 47.0, 32: 57.6, 64: 62.6, 128: 63.8}),
        ("translation", {8: 26.6, 16: 37.4, 32: 48.1}),
    ],
)
def test_active_experts(name: str, expected: dict[int, float]) -> None:
    found = expected_active(record(name), list(expected))
    # The published values come from 40 random batches, good to about 0.2 experts.
    np.testing.assert_allclose(found, list(expected.values()), atol=0.25)


@real
def test_log_normal_tells_the_busiest_rank_of_sixteen_records() -> None:
    sets = dict.fromkeys((*TASKS, "mixed", *(f"OLMoE-1B-7B/{d}" for d in OLMOE)), (8, 16, 32))
    sets |= {f"Mixtral-8x7B/{d}": (8,) for d in MIXTRAL}
    fits = {name: goodness.fit(record(name), eps) for name, eps in sets.items()}
    assert len(fits) == 16
    errors = np.concatenate([np.abs(f.predicted["lognormal"] / f.seen - 1) for f in fits.values()])
    assert errors.mean() < 0.05
    assert errors.max() < 0.12
    assert {f.law for f in fits.values()} == {"lognormal"}
    mixed = fits["mixed"]
    np.testing.assert_allclose(mixed.predicted["lognormal"], [1.28, 1.52, 1.98], atol=0.015)
    np.testing.assert_allclose(mixed.predicted["zipf"], [1.42, 1.86, 2.76], atol=0.015)
    assert (f"{mixed.sigma_low:.2f}", f"{mixed.sigma_high:.2f}") == ("0.38", "0.58")
    assert all(f.error("zipf") > f.error("lognormal") for name, f in fits.items() if "Mixtral" not in name)


@real
def test_tasks_share_few_hot_experts() -> None:
    together = load_correlation([record(task) for task in TASKS])
    assert together.shape == (4, 5)
    np.testing.assert_allclose(np.diag(together), 1.0)
    between = together[:, :4][~np.eye(4, dtype=bool)]
    assert 0.1 < between.min() < between.max() < 0.3
    assert together[:, 4].min() > between.max()


@real
def test_requests_of_mixed_traffic_differ_more_than_those_of_one_task() -> None:
    mixed, single = request_concentration(record("mixed")), request_concentration(record("summary"))
    assert mixed is not None and single is not None
    assert 50 < np.median(mixed) < 300 < np.median(single)
    drift = window_correlation(record("mixed"))
    assert drift is not None and drift > 0.7  # the tasks follow each other in the mixture


# --- known answers ---------------------------------------------------------------------------------------------------


def test_equal_loads_have_no_skew() -> None:
    flat = record_from_counts(np.full((3, 8), 10.0), "flat")
    spread = load_spread(flat.counts)
    for values in (spread.cv, spread.sigma_cv, spread.log_std, spread.gini, spread.zipf_exponent):
        np.testing.assert_allclose(values, 0.0, atol=1e-12)
    fit = goodness.fit(flat, [2, 8])
    for law in goodness.LAWS:
        np.testing.assert_allclose(fit.predicted[law], 1.0, atol=0.01)


def test_one_expert_that_takes_all() -> None:
    alone = record_from_counts([[40.0] + [0.0] * 7], "alone")
    spread = load_spread(alone.counts)
    assert spread.max_over_mean[0] == 8
    assert spread.gini[0] == pytest.approx(7 / 8)
    assert best_max_over_mean(alone.counts, 4)[0] == 4
    fit = goodness.fit(alone, [2, 4, 8])
    assert np.isfinite([*fit.predicted["dirichlet"], *fit.predicted["zipf"]]).all()


def test_single_expert_layer() -> None:
    spread = load_spread([[5.0]])
    assert (spread.max_over_mean[0], spread.zipf_exponent[0]) == (1.0, 0.0)


def test_parameters_of_known_laws_come_back() -> None:
    rank = np.arange(1, 65.0)
    assert load_spread([1e6 * rank**-0.7]).zipf_exponent[0] == pytest.approx(0.7)
    loads = np.exp(0.5 * np.random.default_rng(0).standard_normal((200, 256)))
    assert load_spread(1e4 * loads).sigma_cv.mean() == pytest.approx(0.5, abs=0.01)
    shares = np.random.default_rng(1).dirichlet(np.full(64, 3.0), size=400)
    cv = float(np.sqrt((load_spread(shares).cv ** 2).mean()))
    assert goodness.concentration(cv, 64) == pytest.approx(3.0, rel=0.05)


def test_requests_drawn_around_a_mean_give_their_concentration() -> None:
    rng = np.random.default_rng(2)
    shares = rng.dirichlet(np.full(16, 40.0 / 16), size=400)
    ids = np.concatenate([rng.choice(16, size=(1, 60, 1), p=p) for p in shares], axis=1)
    kappa = request_concentration(record_from_ids(ids, 16, "drawn", sequence_lengths=[60] * 400))
    assert kappa is not None
    assert kappa[0] == pytest.approx(40.0, rel=0.15)


def test_tokens_without_memory_reuse_by_chance() -> None:
    ids = np.random.default_rng(3).random((2, 6000, 32)).argsort(axis=2)[:, :, :4]
    drawn = record_from_ids(ids, 32, "random", sequence_lengths=[3000, 2000, 1000])
    np.testing.assert_allclose(reuse(drawn), 4 / 32, atol=0.006)
    lag = window_correlation(drawn, 500)
    assert lag is not None and abs(lag) < 0.25
    assert sampling_cv(drawn) == pytest.approx(load_spread(drawn.counts).cv.mean(), rel=0.25)


def test_reuse_does_not_cross_sequences() -> None:
    ids = np.array([[[0, 1], [0, 2], [0, 2], [3, 4]]])
    assert reuse(record_from_ids(ids, 8, "x", sequence_lengths=[2, 2]))[0] == pytest.approx((0.5 + 0.0) / 2)
    assert reuse(record_from_ids(ids, 8, "x", sequence_lengths=[1, 1, 1, 1])) is None
    assert reuse(record_from_ids(ids, 8, "x")) is None


def test_drifting_load_is_seen_in_the_windows() -> None:
    rng = np.random.default_rng(4)
    x = np.zeros((64, 1, 32))
    for t in range(1, 64):
        x[t] = 0.9 * x[t - 1] + 0.3 * rng.standard_normal((1, 32))
    windows = np.round(1e4 * np.exp(x))
    found = window_correlation(record_from_counts(windows.sum(axis=0), "drift", windows=windows))
    assert found == pytest.approx(0.85, abs=0.1)
    with pytest.raises(WorkloadError, match="window of 0 tokens"):
        window_correlation(record_from_ids(np.zeros((1, 3, 1), int), 2, "x"), 0)


@given(arrays(np.int64, (2, 12), elements=st.integers(1, 1000)), st.sampled_from([2, 3, 4, 6, 12]))
@settings(max_examples=60, deadline=None)
def test_bounds_hold_for_any_loads(counts: np.ndarray, ep: int) -> None:
    spread, seen, best = load_spread(counts), rank_max_over_mean(counts, ep), best_max_over_mean(counts, ep)
    assert (best <= seen + 1e-9).all() and (seen <= spread.max_over_mean + 1e-9).all() and (best >= 1).all()
    assert ((spread.gini >= 0) & (spread.gini < 1)).all()
    assert load_spread(7 * counts).sigma_cv == pytest.approx(spread.sigma_cv)


def test_ep_sizes_and_their_error() -> None:
    assert ep_sizes(8) == (2, 4, 8)
    assert ep_sizes(256)[-1] == 256
    with pytest.raises(LayoutError, match=r"ep=24 does not divide 64 experts. Use 16 or 32."):
        rank_max_over_mean(np.ones((1, 64)), 24)


# --- the command -----------------------------------------------------------------------------------------------------


@real
def test_inspect_answers_first(capsys: pytest.CaptureFixture[str]) -> None:
    traces = [DATA / f"deepseek_v2_lite_{task}.npz" for task in TASKS]
    inspect_records(traces, model="deepseek-ai/DeepSeek-V2-Lite")
    text = capsys.readouterr().out
    assert text.startswith("log-normal, sigma 0.38-0.58; EP8/16/32 busiest rank 1.27/1.54/1.96 x mean; EPLB worth it")
    assert "--skew lognormal:0.38-0.58" in text and "deepseek_v2_lite_law.npz" in text
    inspect_records(traces, ep=[8], json=True)
    facts = json.loads(capsys.readouterr().out)
    assert [row["ep"] for row in facts["ep"]] == [8]
    assert len(facts["traces"]) == 4 and len(facts["per_layer"]) == 26
    assert facts["reuse"]["uniform"] == pytest.approx(6 / 64)


@real
def test_inspect_counts_of_a_named_model(capsys: pytest.CaptureFixture[str]) -> None:
    inspect_records([COUNTS], select="OLMoE-1B-7B/c4", model="allenai/OLMoE-1B-7B-0924", json=True)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["top_k"], facts["num_tokens"], facts["reuse"]) == (8, 208896, None)
    inspect_records([COUNTS], select="Mixtral-8x7B/c4")
    assert "token ids, which this record lacks" in capsys.readouterr().out
    with pytest.raises(InputError, match="has 256"):
        inspect_records([COUNTS], select="OLMoE-1B-7B/c4", model="deepseek-ai/DeepSeek-V3")
    with pytest.raises(WorkloadError, match="has no experts"):
        inspect_records([COUNTS], select="OLMoE-1B-7B/c4", model="Qwen/Qwen3-8B")


def test_balanced_and_short_records_are_called_so() -> None:
    flat = record_from_counts(np.full((2, 16), 1000.0), "flat")
    facts = record_facts(flat, [flat], (2, 4))
    assert facts["headline"].endswith("EPLB not worth it")
    ids = np.random.default_rng(5).random((2, 20, 16)).argsort(axis=2)[:, :, :2]
    short = record_from_ids(ids, 16, "short", sequence_lengths=[20])
    assert any("record is short" in note for note in record_facts(short, [short], (4,))["notes"])
    assert "flat" in inspect_text(facts)


def test_an_odd_number_of_experts_still_has_a_headline(tmp_path: Path) -> None:
    path = tmp_path / "seven.csv"
    path.write_text("layer,expert,assignments\n" + "".join(f"0,{e},{10 + e}\n" for e in range(7)))
    assert "EP7" in inspect_facts([path])["headline"]
