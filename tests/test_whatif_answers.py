"""What the dashboard claims is true: verdicts, reasons, intervals, comparisons and remedies."""

from __future__ import annotations

from dataclasses import replace

from planner.whatif import analytic, charts, edits, lab, rivals, rows
from planner.whatif.analytic import Answer, Tile, answer
from planner.whatif.bottleneck import bottleneck
from planner.whatif.scenario import Scenario
from planner.whatif.tornado import keeps_slo, tornado

SMALL = Scenario(model="mistralai/Mixtral-8x7B-v0.1", system="h100-sxm", gpus=8, rate=4.0)
DROPPING = replace(SMALL, capacity_factor=1.0, skew="zipf:1")


def _answer(scenario: Scenario) -> Answer:
    found = answer(scenario)
    assert isinstance(found, Answer), found
    return found


def test_an_answer_that_drops_work_is_no_success() -> None:
    found, knobs = _answer(DROPPING), lab.lab(DROPPING)
    assert isinstance(knobs, lab.Lab) and knobs.knobs
    assert found.meets_slo and found.drops and not found.is_good
    assert found.drop_rate["decode"] == knobs.knobs.drop_rate
    said = analytic.headline(found)
    assert f"{knobs.knobs.drop_rate:.1%} in decode" in said and "expected to meet" not in said
    shown = {row[""]: row for row in rows.pinned(_answer(SMALL), found)}
    assert shown["Dropped assignments"]["pinned"] == "0.0%" != shown["Dropped assignments"]["now"]
    tried = edits.edits(found)
    assert tried and all(_answer(edit.scenario).is_good for edit in tried)
    assert _answer(SMALL).is_good


def test_systems_are_compared_with_experts_over_more_than_a_node() -> None:
    (row,) = rivals.rivals(replace(SMALL, ep=16, redundant=8, rate=1.0), ("h100-sxm",))
    assert "8 are offered" not in row.problem
    (row,) = rivals.rivals(Scenario(ep=16), ("h200-sxm",))
    assert (row.problem, row.num_gpus, row.nodes) == ("", 16, 2) and "ep16" in row.layout


def test_a_cautious_size_says_with_how_few_gpus_it_may_do() -> None:
    (row,) = rivals.rivals(Scenario(), ("h200-sxm",))
    near = analytic.borderline(_answer(Scenario()))
    assert row.num_gpus == 16 and row.may_do_gpus == near[0].num_gpus == 8
    assert rows.systems([row])[0]["may do with"] == "8"
    assert "cautious" in rows.SYSTEMS_CAPTION and "moeplan compare" in rows.SYSTEMS_CAPTION


def test_memory_is_blamed_only_where_it_is_short() -> None:
    said = analytic.headline(_answer(replace(SMALL, gpus=1)))
    assert "memory is short by" in said
    for change, says in (
        ({"ep": 6, "redundant": 16}, "EP 4 or 8 can"),
        ({"redundant": 3}, "2 or 4 redundant experts do"),
        ({"residency": "lru", "resident": 99}, "99 resident experts"),
    ):
        found = _answer(replace(SMALL, **change))  # type: ignore[arg-type]
        said = analytic.headline(found)
        assert says in said and "memory" not in said, said
        assert says in edits.shortfall(found) and edits.edits(found)


def test_a_missed_slo_is_not_called_kept_in_the_tornado() -> None:
    missed = _answer(replace(SMALL, slo="ttft_p95=2s,tpot_p95=2ms"))
    assert not keeps_slo(missed) and keeps_slo(_answer(SMALL))
    rate, usd, bars = tornado(missed)
    said = rows.tornado_caption(rate, usd, keeps_slo(missed))
    assert rate > 0 and "misses the SLO" in said and "SLO aside" in said and "within the SLO" not in said
    assert not [bar for bar in bars if bar.name.startswith("Limit")]
    assert "SLO aside" in str(charts.tornado(rate, bars, within=False))
    tight = _answer(replace(SMALL, slo=f"tpot_p95={_least_tpot_ms(1.02):.3f}ms"))
    slower = next(bar for bar in tornado(tight)[2] if bar.name.startswith("Step time"))
    assert slower.high_requests_per_s == 0.0 and slower.high_usd_per_mtok is None


def _least_tpot_ms(share: float) -> float:
    """`share` of the p95 TPOT of one request at a time on the layout that is chosen for the least load."""
    found = _answer(replace(SMALL, slo="tpot_p95=2ms", rate=0.001))
    assert found.chosen is not None
    return found.chosen.ratios["tpot_p95"] * 2 * share


def test_an_even_load_shows_on_a_white_page() -> None:
    even = lab.heat(replace(SMALL, ep=4))
    assert isinstance(even, lab.Heat)
    scale = str(charts.heat(even))
    assert charts.EVEN in scale and all(int(charts.EVEN[at : at + 2], 16) < 0xE8 for at in (1, 3, 5))


def test_pins_name_the_values_behind_the_defaults() -> None:
    shown = rows.pinned(_answer(SMALL), _answer(replace(SMALL, system="h200-sxm")))
    assert (shown[0][""], shown[0]["pinned"], shown[0]["now"]) == ("system", "h100-sxm", "h200-sxm")


def test_the_bottleneck_is_that_of_the_binding_objective() -> None:
    first = _answer(replace(SMALL, slo="ttft_p95=300ms,tpot_p95=10s"))
    assert first.chosen is not None and first.prefill is not None and first.chosen.worst[0] == "ttft_p95"
    said = bottleneck(first)
    largest = max(first.prefill.terms, key=lambda name: float(first.prefill.terms[name]))  # type: ignore[union-attr]
    assert "prefill binds" in said and "decode step" not in said
    assert largest.replace("_", " ") in said or largest in ("attention", "all_reduce", "dispatch", "combine", "host")
    assert "A decode step" in bottleneck(_answer(replace(SMALL, slo="tpot_p95=50ms")))


def _range(tile: Tile) -> tuple[float, float]:
    low, high = (part.split()[0].strip("$").replace(",", "") for part in tile.interval.split(" to "))
    return float(low), float(high)


def test_throughput_price_and_user_rate_have_intervals() -> None:
    light, full = (_answer(replace(SMALL, **change)) for change in ({}, {"users": 400, "slo": "tpot_p95=1s"}))  # type: ignore[arg-type]
    for found in (light, full):
        tiles = {tile.label: tile for tile in analytic.tiles(found)}
        assert found.chosen is not None and found.chosen.usd_per_mtok_output is not None
        per_user = _range(tiles["Per user"])
        assert per_user[0] < 1 / found.chosen.candidate.tpot_s < per_user[1]
        if found is light:
            assert analytic._carried(found) == (1.0, 1.0) and found.chosen.ratios["load"] < 0.3
            assert "set by the load" in tiles["Throughput"].interval and "set by" in tiles["Price per Mtok"].interval
            continue
        rate, price = _range(tiles["Throughput"]), _range(tiles["Price per Mtok"])
        per_gpu = found.chosen.output_tok_per_s / found.chosen.num_gpus
        assert rate[0] < per_gpu < rate[1] and price[0] < found.chosen.usd_per_mtok_output < price[1]
        assert abs(rate[0] * price[1] / (per_gpu * found.chosen.usd_per_mtok_output) - 1) < 0.02
    near = replace(SMALL, gpus=2, rate=25.0)
    low, high = analytic._carried(_answer(near))
    assert low < 1.0 <= high
    assert Tile("TTFT p95", "1 s", "mean 162 ms", "", "").help == "Mean 162 ms."


def test_no_more_gpus_are_used_than_were_offered() -> None:
    found, fits = _answer(replace(SMALL, gpus=12)), _answer(SMALL)
    assert found.question.cluster.num_gpus == 8 and found.chosen is not None and found.chosen.num_gpus <= 8
    assert "12 offered, whole nodes of 8" in analytic.headline(found)
    assert "h100-sxm:1x8" in analytic.plan_command(found)
    assert "offered" not in analytic.headline(fits) and _answer(replace(SMALL, gpus=3)).question.cluster.num_gpus == 3


def test_remedies_of_a_missed_slo_try_other_systems_and_smaller_weights_cheapest_first() -> None:
    missed = _answer(replace(SMALL, gpus=2, rate=60.0))
    tried = edits.edits(missed)
    assert 3 <= len(tried) <= 5 and all(_answer(edit.scenario).is_good for edit in tried)
    assert {edit.scenario.weights for edit in tried} > {""}
    assert {edit.scenario.system for edit in tried} > {"h100-sxm"}
    prices = [edit.usd_per_hour for edit in tried if edit.usd_per_hour is not None]
    assert prices == sorted(prices)
    stored_in_fp8 = edits._others(_answer(Scenario()), Scenario())
    assert [changed.weights for kind, _, changed in stored_in_fp8 if changed.weights] == ["int4_g128"]
