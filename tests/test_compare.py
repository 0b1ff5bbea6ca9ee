"""Clusters side by side: the order, its agreement with a plan, worlds that differ, what limits buy."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import options
from planner.compare import entrant
from planner.compare.comparison import Comparison, compare
from planner.compare.estimator import Estimator
from planner.compare.inverse import Limit, bought, check_limit, parse_limit
from planner.compare.question import Demand, DemandError, Offer, Question, parse_demand_error, parse_offers
from planner.compare.standing import Standing, World, standing
from planner.compare.uncertainty import odds, triangular
from planner.comparetext import compare_text
from planner.economics import DEFAULT_TERMS, Api, Terms, bill
from planner.errors import InputError
from planner.facts.comparison import comparison_facts
from planner.facts.plan import plan_facts
from planner.recommend import recommend
from planner.workload import parse_slo

SLO = parse_slo("ttft_p95=2s,tpot_p95=30ms")
OFFERS = ("h100-sxm:1x1", "l40s:1x2")


def question(rate: float = 6.0, seed: int = 0) -> Question:
    demand = options.plan_demand("chat", rate, None, None, SLO)
    return Question(
        (Demand(options.precision("gpt-oss-20b", None, None), demand, SLO),), options.engine("vllm"), seed=seed
    )


@pytest.fixture(scope="module")
def answer() -> Comparison:
    return compare(question(), parse_offers(list(OFFERS)), jobs=1)


@pytest.fixture(scope="module")
def facts(answer: Comparison) -> dict[str, Any]:
    return comparison_facts(answer, "moeplan compare")


def test_every_system_is_planned_as_plan_would_plan_it(answer: Comparison, facts: dict[str, Any]) -> None:
    asked = answer.question.demands[0]
    for one in facts["systems"][:1]:
        cluster = parse_offers([one["name"]])[0].cluster
        rec = recommend(asked.model, [cluster], asked.workload, asked.slo, answer.question.engine)
        planned = plan_facts(rec, "")
        assert rec.winner is not None
        assert one["num_gpus"] == rec.winner.num_gpus
        assert one["layout"] == planned["layout"]["name"]
        assert one["ttft_s"] == planned["ttft_s"]
        assert one["usd_per_mtok_output"] == pytest.approx(planned["usd_per_mtok_output"])
        assert one["usd_per_month"] == pytest.approx(bill(cluster.system, rec.winner.num_gpus).usd_per_month)


def test_the_winner_meets_the_slo_for_the_smallest_bill(facts: dict[str, Any]) -> None:
    bills = {s["name"]: s["usd_per_month"] for s in facts["systems"] if s["meets_slo"]}
    assert facts["winner"] == min(bills, key=lambda name: bills[name])
    assert [s["name"] for s in facts["systems"]] == sorted(bills, key=lambda name: bills[name])


def test_odds_add_up_and_regret_is_what_it_costs_beyond_the_cheapest(answer: Comparison) -> None:
    found = answer.odds
    assert sum(o.best or 0.0 for o in found.values()) == pytest.approx(1.0, abs=0.02)
    for one in found.values():
        assert 0.0 <= one.enough <= 1.0 - one.cannot
        assert one.regret_usd_per_month is not None and one.regret_usd_per_month[0] >= 0.0
        assert one.sure_gpus is None or one.num_gpus is None or one.sure_gpus >= one.num_gpus[0]
    best = max(found.values(), key=lambda o: o.best or 0.0)
    assert best.regret_usd_per_month == min(o.regret_usd_per_month for o in found.values() if o.regret_usd_per_month)


def test_draws_of_one_offer_do_not_depend_on_the_others(answer: Comparison) -> None:
    alone = odds(answer.standings[:1], DemandError(), 0)
    name = answer.standings[0].name
    assert alone[name].num_gpus == answer.odds[name].num_gpus
    assert alone[name].usd_per_month == answer.odds[name].usd_per_month
    assert alone[name].best == pytest.approx(1.0 - alone[name].cannot)
    assert odds(answer.standings, DemandError(), 1) != answer.odds


def test_the_plan_is_reproduced_in_the_world_it_was_made_for(answer: Comparison) -> None:
    for one in answer.standings:
        assert int(one.gpus_in(World())) == one.num_gpus


@pytest.mark.parametrize("field", ["rate", "prompt", "output"])
def test_more_demand_never_takes_fewer_gpus(answer: Comparison, field: str) -> None:
    for one in answer.standings:
        gpus = one.gpus_in(World(**{field: np.geomspace(0.5, 1.2, 8)}))  # type: ignore[arg-type]
        needed = np.where(gpus < 0, 10**9, gpus)
        assert (np.diff(needed) >= 0).all()


def test_slower_steps_and_tighter_limits_never_take_fewer_gpus(answer: Comparison) -> None:
    for one in answer.standings:
        slow = one.gpus_in(World(time={one.name: np.geomspace(0.5, 2.0, 10)}))
        assert (np.diff(np.where(slow < 0, 10**9, slow)) >= 0).all()
        tight = [int(one.gpus_in(World(limits={"tpot": limit}))) for limit in (1.5, 1.0, 0.7)]
        needed = [10**9 if n < 0 else n for n in tight]
        assert needed == sorted(needed)


def test_a_price_moves_the_bill_in_proportion(answer: Comparison) -> None:
    one = answer.standings[0]
    usd, double = one.usd_in(World()), one.usd_in(World(price={one.name: 2.0}))
    assert usd is not None and double is not None
    assert float(double) == pytest.approx(2 * float(usd))
    assert float(usd) == pytest.approx(one.usd_per_month or 0.0)


def test_the_tornado_has_ends_that_bracket_or_flip(answer: Comparison) -> None:
    assert 1 <= len(answer.swings) <= 10
    widths = [swing.width_usd for swing in answer.swings]
    assert widths == sorted(widths, reverse=True)
    names = {one.name for one in answer.standings} | {"none"}
    assert all({swing.winner_low, swing.winner_high} <= names for swing in answer.swings)


def test_bands_name_the_cheapest_of_every_ten_tokens(answer: Comparison) -> None:
    speeds = [band.tok_per_s_per_user for band in answer.bands]
    assert speeds == [10.0 * (i + 1) for i in range(len(speeds))]
    for band in answer.bands:
        reached = {name: usd for name, usd in band.usd_per_mtok_output.items() if usd is not None}
        assert reached[band.leader] == min(reached.values())
    for name, points in answer.fronts.items():
        rates = [point.output_tok_per_s_per_gpu for point in points]
        assert rates == sorted(rates, reverse=True), name


def test_owned_hardware_is_paid_in_whole_nodes(answer: Comparison) -> None:
    one = next(s for s in answer.standings if s.offer.cluster.system.name == "h100-sxm")
    opened = replace(one.offer, is_open=True, basis="owned")
    for offer, gpus in ((opened, 8), (replace(one.offer, basis="owned"), 1)):
        moved = standing(offer, one.demands, one.entrants, DEFAULT_TERMS)
        assert moved.bill is not None and moved.bill.billed_gpus == gpus and moved.name.endswith("@own")
        world = moved.usd_in(World())
        assert world is not None and float(world) == pytest.approx(moved.bill.usd_per_month or 0.0)


def test_a_budget_buys_whole_nodes_and_more_carries_more(answer: Comparison) -> None:
    open_offers = [replace(s, offer=Offer(s.offer.cluster, is_open=True)) for s in answer.standings]
    one, two = (bought(open_offers, Limit("monthly_budget", usd)) for usd in (30_000.0, 60_000.0))
    for small, large, offer in zip(one, two, open_offers, strict=True):
        assert small.num_gpus % offer.system.gpus_per_node == 0
        assert bill(offer.system, small.num_gpus).usd_per_month <= 30_000.0
        assert bill(offer.system, small.num_gpus + offer.system.gpus_per_node).usd_per_month > 30_000.0
        assert large.requests_per_s >= 1.9 * small.requests_per_s
        seconds = small.users / small.requests_per_s
        assert _e2e(offer) < seconds < 2.0 + 0.03 * 256


def _e2e(one: Standing) -> float:
    return float(one.entrants[0].plan["e2e_s"]["mean"])


def test_a_limit_below_one_node_is_refused_with_the_price_of_one(answer: Comparison) -> None:
    with pytest.raises(InputError, match="does not buy one node.*one node takes"):
        check_limit([one.offer for one in answer.standings], DEFAULT_TERMS, Limit("monthly_budget", 10.0))


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        (("5M", None, None), Limit("budget", 5e6)),
        (("$200k/month", None, None), Limit("monthly_budget", 2e5)),
        (("1,250,000", None, None), Limit("budget", 1.25e6)),
        ((None, 1.5, None), Limit("power", 1.5)),
        ((None, None, 4), Limit("racks", 4)),
        ((None, None, None), None),
    ],
)
def test_limits_are_read(arguments: tuple[str | None, float | None, int | None], limit: Limit | None) -> None:
    assert parse_limit(*arguments) == limit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("5M", 1.0, None), "one limit at a time"),
        (("cheap", None, None), "write dollars"),
        (("0", None, None), "write dollars"),
        ((None, float("nan"), None), "megawatts"),
        ((None, None, -1), "number of racks"),
        ((None, None, 1.5), "number of racks"),
        ((None, None, 10**20), "number of racks"),
    ],
)
def test_limits_that_mean_nothing_are_refused(
    arguments: tuple[str | None, float | None, int | None], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        parse_limit(*arguments)


def test_offers_and_errors_of_the_demand_are_read() -> None:
    first, second, third = parse_offers(["h200-sxm", "h200-sxm:2x8", "h200-sxm@own"])
    assert first.is_open and not second.is_open and second.cluster.num_gpus == 16
    assert third.basis == "owned" and third.hardware == first.hardware and third.name == "h200-sxm@own"
    with pytest.raises(InputError, match="@rent or @own"):
        parse_offers(["h200-sxm@lease"])
    assert parse_demand_error("rate=30%,output=5%") == DemandError(0.3, 0.1, 0.05)
    for wrong in ("rate=30", "users=3%", "rate=120%"):
        with pytest.raises(InputError, match="--uncertain"):
            parse_demand_error(wrong)
    with pytest.raises(InputError, match="twice"):
        parse_offers(["h200-sxm", "h200-sxm"])
    with pytest.raises(InputError, match="no cluster"):
        parse_offers([])


def test_fleet_models_are_read() -> None:
    demand = options.also("mixtral-8x7b rate=3 workload=rag slo=tpot_p95=80ms")
    assert demand.model.name.endswith("Mixtral-8x7B-v0.1")
    assert demand.workload.arrivals.rate_per_s == 3.0
    assert demand.slo.limits_s() == {"tpot": 0.08}
    for wrong in ("mixtral-8x7b rates=3", "mixtral-8x7b rate", "mixtral-8x7b rate=fast", " "):
        with pytest.raises(InputError, match="--also"):
            options.also(wrong)


def test_unknown_baseline_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match="--baseline h300"):
        compare(question(), parse_offers(list(OFFERS)), baseline="h300")


def test_facts_are_plain_json_and_text_tells_them(facts: dict[str, Any]) -> None:
    assert json.dumps(json.loads(json.dumps(facts, allow_nan=False))) == json.dumps(facts)
    text = compare_text(facts)
    assert text.startswith(facts["headline"])
    for name in OFFERS:
        assert name in text
    assert "Is the winner the winner?" in text and "Until the next purchase" in text


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(0.1, 10), st.floats(0, 10), st.floats(0, 10), st.floats(0, 1))
def test_triangular_draws_stay_between_their_bounds(low: float, rise: float, fall: float, uniform: float) -> None:
    value = float(triangular(np.array(uniform), low, low + rise, low + rise + fall))
    assert low - 1e-9 <= value <= low + rise + fall + 1e-9


def test_command_refuses_bad_input_and_writes_a_folder(tmp_path: Path, moeplan: Any) -> None:
    common = ["compare", "gpt-oss-20b", "--rate", "2", "--jobs", "1"]
    for arguments, message in (
        (["--cluster", "h100-sxm:1x1", "--cluster", "h100-sxm:1x1"], "given twice"),
        (["--cluster", "h100-sxm:1x1", "--budget", "5M", "--racks", "2"], "one limit at a time"),
        (["--cluster", "h100-sxm:1x1", "--power", "0.0001"], "one node takes 0.00153 MW"),
        (["--cluster", "h100-sxm:1x1", "--out", str(Path(__file__))], "is a file"),
        (["--cluster", "h100-sxm:1x1", "--terms", str(tmp_path / "none.toml")], "none.toml"),
    ):
        code, _, error = moeplan(*common, *arguments)
        assert code == 2 and message in error
    out = tmp_path / "run"
    code, text, error = moeplan(*common, "--cluster", "h100-sxm:1x1", "--out", str(out), "--json")
    assert code == 0, error
    written = json.loads((out / "comparison.json").read_text())
    printed = json.loads(text)
    printed.pop("wall_s")
    assert written == printed and written["winner"] == "h100-sxm:1x1"


def test_a_demand_no_offer_carries_has_no_winner(moeplan: Any) -> None:
    command = "compare gpt-oss-20b --rate 2000 --num-requests 300 --jobs 1 --cluster h100-sxm:1x1 --json"
    code, text, _ = moeplan(*command.split())
    assert code == 3
    found = json.loads(text)
    assert found["winner"] is None and found["next"] and found["systems"][0]["probability_best"] is None


def test_terms_reach_the_bill(answer: Comparison) -> None:
    first = answer.standings[0]
    dear = DEFAULT_TERMS.with_price(first.system.name, "rental", 9.0, "2026-11-01")
    again = standing(first.offer, first.demands, first.entrants, dear)
    assert again.usd_per_month == pytest.approx(9.0 * 730 * first.num_gpus)


def test_equal_hardware_shares_every_world_and_its_wins(answer: Comparison) -> None:
    first = answer.standings[0]
    twin = replace(first, offer=replace(first.offer, basis="rental"))
    found = odds([first, twin], DemandError(), 0)
    assert found[first.name].best == pytest.approx(found[twin.name].best)
    assert found[first.name].regret_usd_per_month == found[twin.name].regret_usd_per_month == (0.0, 0.0)


def test_what_is_carried_does_not_depend_on_the_demand_asked_about() -> None:
    offers = parse_offers([OFFERS[0]])
    carried = []
    for rate in (2.0, 8.0):
        one = compare(question(rate), offers, jobs=1).standings[0]
        carried.append(rate * one.entrants[0].carries)
        assert one.entrants[0].carries > 3.0
    assert carried[0] == pytest.approx(carried[1], rel=0.25)


def test_a_layout_that_never_misses_is_said_to_carry_as_much_as_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entrant, "scaled", lambda workload, factor: factor)
    rec = SimpleNamespace(sustained_factor=3.0, workload=None, slo=None, seed=0)
    for carried, found in ((1000.0, entrant.MOST_TESTED), (40.0, 36.0), (10.0, 9.0), (3.5, 3.0)):
        limit = partial(_meets_up_to, carried)
        monkeypatch.setattr(entrant, "run", limit)
        assert entrant._carries(rec, SimpleNamespace(deployment=None)) == found  # type: ignore[arg-type]


def _meets_up_to(carried: float, deployment: Any, factor: float, **_: Any) -> Any:
    return SimpleNamespace(meets_slo=factor <= carried)


def test_a_system_without_a_network_is_offered_node_by_node() -> None:
    offer = parse_offers(["rtx-4090"])[0]
    estimator = Estimator(question(), question().demands[0], question().experts[0], offer)
    found = estimator.replicas(only=lambda layout: layout.tp == layout.replica_gpus)
    assert found and all(replica.num_gpus <= offer.cluster.system.gpus_per_node for replica in found)


def test_terms_decide_the_plan_as_well_as_the_bill() -> None:
    owned = replace(question(), terms=Terms(basis="owned"))
    one = compare(owned, parse_offers([OFFERS[0]]), jobs=1).standings[0]
    asked = owned.demands[0]
    rec = recommend(asked.model, [one.offer.cluster], asked.workload, asked.slo, owned.engine, terms=owned.terms)
    assert rec.winner is not None
    assert one.num_gpus == rec.winner.num_gpus
    assert one.usd_per_month == pytest.approx(730 * (rec.winner.deployment.usd_per_hour or 0.0))


def test_an_api_price_gives_a_break_even_at_the_load_that_costs_as_much(answer: Comparison) -> None:
    api = Api(usd_per_mtok_input=0.1, usd_per_mtok_output=0.5, as_of="2026-11-01", provider="them")
    terms = replace(DEFAULT_TERMS, api=api)
    again = replace(
        answer,
        question=replace(answer.question, terms=terms),
        standings=tuple(standing(s.offer, s.demands, s.entrants, terms) for s in answer.standings),
    )
    one = comparison_facts(again, "")["systems"][0]
    found, workload = one["money"]["break_even"], answer.question.demands[0].workload
    usd_per_request = (workload.mean_prompt_tokens * 0.1 + workload.mean_output_tokens * 0.5) / 1e6
    assert found["requests_per_s"] * 730 * 3600 * usd_per_request == pytest.approx(one["usd_per_month"], rel=0.01)
    assert 0.0 < one["money"]["utilisation"] <= 1.0


def test_a_limit_is_asked_of_one_model() -> None:
    two = replace(question(), demands=question().demands * 2, experts=question().experts * 2)
    with pytest.raises(InputError, match="one model"):
        compare(two, parse_offers([OFFERS[0]]), limit=Limit("racks", 2), jobs=1)
