"""What a user is told about money beyond the bill: utilisation, energy, an API to beat, the rule behind a price."""

from __future__ import annotations

import dataclasses

import pytest

from planner.economics import DEFAULT_TERMS, Allocation, Api, DemandProfile, Terms, bill, served_costs, usd_per_mtok
from planner.facts.money import money_facts
from planner.hardware import system
from planner.moneytext import money_lines
from planner.workload import Arrivals, Lengths, Workload

H100 = system("h100-sxm")
API = Api(0.27, 1.10, "2025-02", "an API")


def test_utilisation_energy_and_break_even_follow_from_the_demand() -> None:
    terms = Terms(demand=DemandProfile(peak_to_mean=2.0), api=API)
    facts = money_facts(H100, 8, terms, 1_000.0, 4_000.0, 4.0, 5.0)
    assert facts["utilisation"] == pytest.approx(0.5 * 4 / 5)
    kw = 10.2 * 1.2
    assert facts["kwh_per_mtok_provisioned"] == pytest.approx(kw * 1e6 / (3600 * 500.0))
    assert facts["kwh_per_mtok_scaled"] == pytest.approx(facts["kwh_per_mtok_provisioned"] * (0.3 + 0.7 * 0.4))
    assert facts["tok_per_s_per_mw_provisioned"] == pytest.approx(500.0 / kw * 1e3)
    assert facts["tok_per_s_per_mw_scaled"] > facts["tok_per_s_per_mw_provisioned"]
    point = facts["break_even"]
    charged = 1_000.0 * 0.27 + 250.0 * 1.10
    assert point["api_usd_per_month"] == pytest.approx(2.0 * 730 * 3600 * charged / 1e6)
    assert point["usd_per_month"] == bill(H100, 8, terms).usd_per_month
    assert point["is_cheaper_than_api"] is False
    assert point["utilisation"] == pytest.approx(point["requests_per_s"] / 5.0) and point["utilisation"] > 0.4
    assert point["provider"] == "an API" and facts["allocation"] == "all cost on output tokens"


def test_without_an_api_a_ceiling_or_tokens_nothing_is_made_up() -> None:
    facts = money_facts(H100, 8, DEFAULT_TERMS, 1_000.0, 4_000.0, 4.0, 5.0)
    assert facts["break_even"] is None and facts["utilisation"] == pytest.approx(0.8)
    for ceiling in (None, 0.0, 3.0):
        missed = money_facts(H100, 8, Terms(api=API), 1_000.0, 4_000.0, 4.0, ceiling)
        assert missed["utilisation"] is None and missed["break_even"] is None
        assert missed["kwh_per_mtok_scaled"] is None
        assert missed["kwh_per_mtok_provisioned"] == facts["kwh_per_mtok_provisioned"]
    assert money_facts(H100, 8, DEFAULT_TERMS, 0.0, 0.0, 4.0, 5.0)["kwh_per_mtok_provisioned"] is None
    unpriced = dataclasses.replace(H100, prices=())
    weighted = money_facts(unpriced, 8, Terms(api=API, allocation=Allocation("1:4")), 1e3, 4e3, 4.0, 5.0)
    assert weighted["break_even"] is None and weighted["utilisation"] == pytest.approx(0.8)
    assert weighted["allocation"] == "input to output tokens weighted 1:4"


def test_the_rule_of_the_terms_divides_the_bill_and_the_default_changes_nothing() -> None:
    load = Workload("w", Lengths.fixed(512), Lengths.fixed(64), Arrivals.poisson(2.0), 10)
    office = DemandProfile("office")
    plain = served_costs(25.6, 117.3, load, Terms(demand=office))
    assert plain.usd_per_mtok_output == usd_per_mtok(25.6, 1, 117.3, office.mean_over_peak)
    weighted = served_costs(25.6, 117.3, load, Terms(demand=office, allocation=Allocation("1:4")))
    assert weighted.usd_per_mtok_output == pytest.approx((plain.usd_per_mtok_output or 0.0) * 4 / (8 + 4))
    assert weighted.usd_per_mtok_input == pytest.approx((weighted.usd_per_mtok_output or 0.0) / 4)
    assert weighted.usd_per_mtok_total == plain.usd_per_mtok_total


def test_a_plan_says_what_an_api_would_charge() -> None:
    terms = Terms(api=Api(2.7, 11.0, "2025-02", "an API"))
    facts = {"allocation": terms.allocation.name, "money": money_facts(H100, 2, terms, 1e3, 4e3, 4.0, 8.0)}
    power, charged = money_lines(facts)
    assert "kWh/Mtok output" in power and power.endswith("busy at most 50%")
    assert "a month, cheaper than" in charged and "of an API (2025-02)" in charged
    assert "requests/s in the mean" in charged
    dear = Terms(api=dataclasses.replace(API, usd_per_mtok_input=0.0))
    facts["money"] = money_facts(H100, 8, dear, 1e3, 4e3, 4.0, 5.0)
    assert "dearer than" in money_lines(facts)[1] and "beyond the load" in money_lines(facts)[1]
    facts["money"] = money_facts(H100, 8, DEFAULT_TERMS, 1e3, 4e3, 4.0, None)
    assert len(money_lines(facts)) == 1 and "drawn" not in money_lines(facts)[0]
