"""Bills in whole nodes and racks, $ per token, energy, break-even and rent against buy."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.economics import (
    DEFAULT_TERMS,
    Allocation,
    Api,
    DemandProfile,
    Owning,
    Renting,
    Site,
    Spares,
    Terms,
    bill,
    billed_gpus,
    break_even,
    break_even_utilisation,
    capex_usd_per_gpu,
    capital_recovery_factor,
    energy,
    gpu_hour,
    gpus_per_rack,
    kwh_per_mtok,
    monthly_usd,
    owned_cost,
    rent_or_buy,
    sinking_fund_factor,
    token_costs,
    usd_per_mtok,
)
from planner.errors import InputError
from planner.hardware import Price, System, system, systems
from planner.units import format_usd

HOURS = 730.0
H100 = system("h100-sxm")
NVL72 = system("gb200-nvl72")


def test_rented_gpus_are_billed_one_by_one_unless_sold_in_nodes() -> None:
    by_gpu = bill(H100, 12)
    assert (by_gpu.basis, by_gpu.billed_gpus, by_gpu.nodes, by_gpu.racks, by_gpu.capex_usd) == ("rental", 12, 2, 1, 0.0)
    assert by_gpu.usd_per_month == pytest.approx(12 * 3.2 * HOURS)
    by_node = bill(H100, 12, Terms(renting=Renting(sold_by="node")))
    assert by_node.billed_gpus == 16 and by_node.usd_per_month == pytest.approx(16 * 3.2 * HOURS)
    assert bill(NVL72, 8, Terms(renting=Renting(sold_by="rack"))).billed_gpus == 72
    assert bill(H100, 8, Terms(spares=Spares(1))).spare_nodes == 0


def test_own_hardware_comes_in_whole_nodes_racks_and_spares() -> None:
    owned = bill(H100, 12, basis="owned")
    assert (owned.billed_gpus, owned.nodes, owned.racks, owned.spare_nodes) == (16, 2, 1, 0)
    assert owned.capex_usd == pytest.approx(16 * 35_625 * 1.12)
    spared = bill(H100, 12, Terms(spares=Spares(1)), "owned")
    assert (spared.billed_gpus, spared.nodes, spared.spare_nodes) == (24, 3, 1)
    assert bill(H100, 33, basis="owned").racks == 2
    racks = {gpus: bill(NVL72, gpus, basis="owned").billed_gpus for gpus in (4, 72, 73)}
    assert racks == {4: 72, 72: 72, 73: 144}
    assert bill(NVL72, 68, Terms(spares=Spares(1)), "owned").billed_gpus == 72
    assert bill(NVL72, 72, Terms(spares=Spares(1)), "owned").racks == 2


def test_t1_the_owned_node_of_the_handbook_as_a_bill() -> None:
    terms = Terms(owning=Owning(discount_rate=0.0)).with_price("h100-sxm", "purchase", 325_000 / 8, "2026-11")
    answer = bill(H100, 8, terms, "owned")
    hours = 8 * HOURS
    assert answer.usd_per_gpu_hour == pytest.approx(2.030, rel=5e-4)
    assert answer.parts["hardware"] + answer.parts["fabric"] == pytest.approx(1.299 * hours, rel=5e-4)
    assert answer.parts["opex"] == pytest.approx(0.260 * hours, rel=2e-3)
    assert answer.parts["colo"] == pytest.approx(0.349 * hours, rel=2e-3)
    assert answer.parts["energy"] == pytest.approx(0.122 * hours, rel=5e-3)
    assert (answer.it_power_w, answer.facility_power_w) == pytest.approx((10_200, 12_240))
    useful = dataclasses.replace(terms, demand=DemandProfile(peak_to_mean=1 / 0.6))
    assert answer.usd_per_gpu_hour is not None
    assert answer.usd_per_gpu_hour / useful.demand.mean_over_peak == pytest.approx(3.383, rel=5e-4)


def test_the_price_of_a_plan_is_that_of_the_bill() -> None:
    for name in systems():
        known, price = system(name), gpu_hour(system(name))
        answer = bill(known, known.gpus_per_node)
        assert answer.usd_per_gpu_hour == (price.usd if price else None)
        if price and price.basis == "rental":
            assert answer.usd_per_month == pytest.approx(price.usd * known.gpus_per_node * HOURS)


def test_an_unknown_price_stays_unknown() -> None:
    for answer in (bill(system("gaudi-3"), 8), bill(system("tpu-v5e"), 8, basis="owned")):
        money = (answer.capex_usd, answer.usd_per_month, answer.usd_per_gpu_hour, answer.price)
        assert (answer.basis, answer.parts, money) == ("unknown", {}, (None,) * 4)
    assert bill(system("tpu-v5e"), 8).racks is None
    assert monthly_usd(system("gaudi-3"), [8, 16]) is None
    assert rent_or_buy(system("gaudi-3"), 8) is None
    assert token_costs(None, 1e9, 1e9).usd_per_mtok_output is None


def test_a_given_hourly_price_replaces_the_quote() -> None:
    answer = bill(H100, 8, usd_per_gpu_hour=2.0)
    assert (answer.usd_per_gpu_hour, answer.usd_per_month) == (2.0, 16 * HOURS)
    assert bill(system("gaudi-3"), 8, usd_per_gpu_hour=2.0).usd_per_month == 16 * HOURS
    assert bill(H100, 4, basis="owned", usd_per_gpu_hour=2.0).usd_per_month == 16 * HOURS
    for call in (
        lambda: bill(H100, 0),
        lambda: bill(H100, 8, usd_per_gpu_hour=-1.0),
        lambda: monthly_usd(H100, [8, 0]),
    ):
        with pytest.raises(InputError):
            call()


OWNED_TERMS = st.builds(
    lambda years, rate, residual, pue, staff, plus, includes: Terms(
        basis="owned",
        owning=Owning(years, rate, residual, storage_share=0.05, spares_share=0.02, staff_usd_per_gpu_year=staff),
        site=Site(pue, colo_includes_power=includes),
        spares=Spares(plus),
    ),
    st.floats(1, 8),
    st.floats(0, 0.3),
    st.floats(0, 0.5),
    st.floats(1, 2),
    st.floats(0, 1000),
    st.integers(0, 2),
    st.booleans(),
)


@given(OWNED_TERMS, st.lists(st.integers(1, 300), min_size=1, max_size=5), st.sampled_from([H100, NVL72]))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_parts_add_up_and_arrays_agree_with_bills(terms: Terms, counts: list[int], known: System) -> None:
    answers = [bill(known, count, terms) for count in counts]
    for answer in answers:
        assert answer.usd_per_month is not None and answer.usd_per_gpu_hour is not None
        assert math.fsum(answer.parts.values()) == pytest.approx(answer.usd_per_month)
        assert answer.usd_per_gpu_hour * answer.billed_gpus * HOURS == pytest.approx(answer.usd_per_month)
        assert answer.billed_gpus >= answer.num_gpus + answer.spare_nodes * known.gpus_per_node
        assert answer.nodes * known.gpus_per_node == answer.billed_gpus
    assert monthly_usd(known, counts, terms) == pytest.approx([a.usd_per_month for a in answers])
    dear = [2 * (terms.prices(known).purchase_usd_per_gpu() or pytest.fail()).usd] * len(counts)
    stated = terms.with_price(known.name, "purchase", dear[0], "2026-11")
    expected = [bill(known, count, stated).usd_per_month for count in counts]
    assert monthly_usd(known, counts, terms, quote_usd=dear) == pytest.approx(expected)


@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_bills_of_whole_nodes_are_additive(first: int, second: int, is_owned: bool) -> None:
    basis: Literal["rental", "owned"] = "owned" if is_owned else "rental"
    one, two, both = (bill(H100, 8 * n, basis=basis) for n in (first, second, first + second))
    assert (one.usd_per_month or 0) + (two.usd_per_month or 0) == pytest.approx(both.usd_per_month)
    for part in both.parts:
        assert one.parts[part] + two.parts[part] == pytest.approx(both.parts[part])
    assert (one.capex_usd or 0) + (two.capex_usd or 0) == pytest.approx(both.capex_usd)
    assert (one.it_power_w or 0) + (two.it_power_w or 0) == pytest.approx(both.it_power_w)


def test_arrays_of_rentals_and_quotes_broadcast() -> None:
    terms = Terms(renting=Renting(reserved=False), demand=DemandProfile("office"))
    counts = np.array([[8], [64]])
    found = monthly_usd(H100, counts, terms, quote_usd=np.array([2.0, 3.0]))
    assert found.shape == (2, 2)
    expected = [[bill(H100, int(n), terms, usd_per_gpu_hour=usd).usd_per_month for usd in (2.0, 3.0)] for n in (8, 64)]
    assert found.tolist() == [pytest.approx(row) for row in expected]
    assert billed_gpus(NVL72, counts, basis="owned").tolist() == [[72], [72]]


def test_on_demand_rent_follows_the_hours_and_reserved_rent_does_not() -> None:
    day = DemandProfile((1.0,) * 6 + (0.5,) * 18)
    followed = Terms(renting=Renting(reserved=False), demand=day)
    assert bill(H100, 16, followed).usd_per_month == pytest.approx(16 * 3.2 * HOURS * 0.625)
    assert bill(H100, 16, followed, replica_gpus=16).usd_per_month == pytest.approx(16 * 3.2 * HOURS)
    assert bill(H100, 16, Terms(demand=day)).usd_per_month == pytest.approx(16 * 3.2 * HOURS)
    assert bill(H100, 16, followed, "owned").usd_per_month == bill(H100, 16, basis="owned").usd_per_month


def test_a_colocation_that_includes_power_charges_no_energy_beside_it() -> None:
    without = bill(H100, 8, Terms(site=Site(colo_includes_power=True)), "owned")
    metered = bill(H100, 8, basis="owned")
    assert "energy" not in without.parts and without.parts["colo"] == metered.parts["colo"]
    energy_usd = metered.parts["energy"]
    assert energy_usd == pytest.approx(10.2 * 1.2 * 0.08 * HOURS)
    assert (metered.usd_per_month or 0) - (without.usd_per_month or 0) == pytest.approx(energy_usd)


def test_energy_paid_as_used_follows_the_demand() -> None:
    terms = Terms(site=Site(power="utilisation_scaled", idle_share=0.4), demand=DemandProfile(peak_to_mean=2.0))
    ratio = bill(H100, 8, terms, "owned").parts["energy"] / bill(H100, 8, basis="owned").parts["energy"]
    assert ratio == pytest.approx(0.4 + 0.6 * 0.5)


@given(st.floats(0.0, 0.4), st.floats(1.0, 10.0), st.floats(0.0, 0.9))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_the_annuity_repays_the_capital_less_its_discounted_residual(rate: float, years: float, kept: float) -> None:
    rate = 0.0 if rate < 1e-6 else rate
    cost = owned_cost(10_000, 1_000, Terms(owning=Owning(years, rate, kept)))
    capex = 10_000 * 1.12
    yearly = cost.capital_usd * 8760
    assert yearly == pytest.approx(
        capex * (capital_recovery_factor(rate, years) - kept * sinking_fund_factor(rate, years))
    )
    present_value = yearly * (years if rate == 0 else (1 - (1 + rate) ** -years) / rate)
    assert present_value == pytest.approx(capex * (1 - kept * (1 + rate) ** -years), rel=1e-6)


def test_racks_hold_what_their_power_feeds() -> None:
    assert gpus_per_rack(H100, Site()) == 32
    assert gpus_per_rack(H100, Site(rack_kw=15.0)) == 8
    assert gpus_per_rack(H100, Site(rack_kw=5.0)) == 8
    assert gpus_per_rack(NVL72, Site(rack_kw=5.0)) == 72
    assert gpus_per_rack(system("tpu-v5p"), Site()) is None


def test_e5_a_day_of_deepseek_by_every_rule() -> None:
    """$87,072 for 608e9 input and 168e9 output tokens: $0.518/M all on output, $0.1122/M alike (serving.md E5)."""
    on_output = token_costs(87_072, 608e9, 168e9)
    assert on_output.usd_per_mtok_output == pytest.approx(0.518, rel=1e-3)
    assert on_output.usd_per_mtok_input == 0.0
    alike = token_costs(87_072, 608e9, 168e9, Allocation("total"))
    assert alike.usd_per_mtok_input == alike.usd_per_mtok_output == alike.usd_per_mtok_total
    assert alike.usd_per_mtok_total == on_output.usd_per_mtok_total == pytest.approx(0.1122, rel=5e-4)
    assert on_output.rule != alike.rule


@given(st.floats(1, 1e7), st.floats(0, 1e12), st.floats(1, 1e12), st.sampled_from(["output", "total", "1:4", "2:3"]))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_every_rule_divides_the_whole_bill(usd: float, tokens_in: float, tokens_out: float, rule: str) -> None:
    costs = token_costs(usd, tokens_in, tokens_out, Allocation(rule))
    paid = ((costs.usd_per_mtok_input or 0.0) * tokens_in + (costs.usd_per_mtok_output or 0.0) * tokens_out) / 1e6
    assert paid == pytest.approx(usd)
    assert (costs.usd_per_mtok_total or 0) * (tokens_in + tokens_out) / 1e6 == pytest.approx(usd)


def test_tokens_of_a_month_agree_with_the_price_of_a_running_server() -> None:
    answer = bill(H100, 8)
    made = DEFAULT_TERMS.demand.per_month(1_000.0)
    assert token_costs(answer.usd_per_month, 4 * made, made).usd_per_mtok_output == pytest.approx(
        usd_per_mtok(answer.usd_per_gpu_hour, 8, 1_000.0)
    )
    office = DemandProfile("office")
    assert token_costs(answer.usd_per_month, 0.0, office.per_month(1_000.0)).usd_per_mtok_output == pytest.approx(
        usd_per_mtok(answer.usd_per_gpu_hour, 8, 1_000.0, utilisation=office.mean_over_peak)
    )


def test_t2_energy_provisioned_and_as_used() -> None:
    found = energy(10_200 / 8, 1_850, 0.6, Site(idle_share=0.3))
    assert found.kwh_per_mtok_provisioned == pytest.approx(0.2297, rel=2e-4)
    assert found.kwh_per_mtok_scaled == pytest.approx(0.2297 * 0.72, rel=2e-4)
    assert found.tok_per_s_per_mw_provisioned == pytest.approx(1_850 / (1275 * 1.2) * 1e6)
    assert found.kwh_per_mtok_provisioned is not None
    assert found.kwh_per_mtok_provisioned * found.tok_per_s_per_mw_provisioned == pytest.approx(1e9 / 3600)
    assert energy(10_200, 0.0, 0.0, Site()).kwh_per_mtok_scaled is None
    assert kwh_per_mtok(10_200, 100.0, 1.0) == pytest.approx(10.2e6 / 360_000)


def test_break_even_load_costs_what_the_api_charges() -> None:
    api = Api(0.27, 1.10, "2025-02", "DeepSeek", "api-docs.deepseek.com")
    answer = bill(H100, 16)
    point = break_even(answer.usd_per_month, 20.0, 1000.0, 250.0, api)
    assert point is not None
    charged = point.input_tok_per_month / 1e6 * 0.27 + point.output_tok_per_month / 1e6 * 1.10
    assert charged == pytest.approx(answer.usd_per_month)
    assert point.utilisation == pytest.approx(point.requests_per_s / 20.0)
    assert point.api_usd_per_month_at_most * point.utilisation == pytest.approx(answer.usd_per_month)
    only_output = break_even(answer.usd_per_month, 20.0, 1000.0, 250.0, Api(None, 1.10, "2025-02"))
    expected = break_even_utilisation(answer.usd_per_gpu_hour, 16, 20.0 * 250.0, 1.10)
    assert only_output is not None and only_output.utilisation == pytest.approx(expected)
    assert break_even(None, 20.0, 1000.0, 250.0, api) is None
    assert break_even(1.0, 20.0, 1000.0, 250.0, Api()) is None


def priced(rental: float, purchase: float, power_w: float = 0.0) -> System:
    quotes = [Price("rental", rental, "2026", "test", "test"), Price("purchase", purchase, "2026", "test", "test")]
    return dataclasses.replace(H100, prices=tuple(quotes), node_power_w=power_w)


CASH = Terms(owning=Owning(discount_rate=0.0, fabric_share=0.0, opex_share_per_year=0.0))


def test_buying_crosses_renting_when_rent_has_paid_the_capital() -> None:
    answer = rent_or_buy(priced(2.0, 14_600.0), 8, CASH, 24)
    assert answer is not None
    assert answer.buy_usd == (8 * 14_600.0,) * 25
    assert answer.rent_usd[1] == pytest.approx(8 * 2.0 * HOURS)
    assert answer.crossing_month == 10 and answer.cheaper_at_the_end == "buy"
    assert answer.book_usd[24] == pytest.approx(8 * 14_600.0 / 2)
    dear = rent_or_buy(priced(0.2, 14_600.0), 8, CASH, 24)
    assert dear is not None and dear.crossing_month is None and dear.cheaper_at_the_end == "rent"


def test_over_its_life_buying_costs_the_annuity() -> None:
    """Today's worth of all costs of ownership: capital less the discounted residual, plus what runs."""
    terms = Terms(owning=Owning(residual_share=0.3))
    answer = rent_or_buy(H100, 8, terms, 48)
    assert answer is not None
    capex = capex_usd_per_gpu(35_625, terms) * 8
    running = owned_cost(35_625, 10_200 / 8, terms).running_usd * 8 * HOURS
    worth = sum(1.1 ** (-month / 12) for month in range(1, 49))
    assert answer.buy_usd[-1] == pytest.approx(capex * (1 - 0.3 * 1.1**-4) + running * worth)
    assert answer.rent_usd[-1] == pytest.approx(8 * 3.2 * HOURS * worth)
    again = rent_or_buy(H100, 8, terms, 49)
    assert again is not None and again.buy_usd[48] == pytest.approx(answer.buy_usd[-1] + capex * 1.1**-4)


def test_the_verdict_never_says_more_than_the_months_show() -> None:
    """A fresh replacement at the end of life puts renting ahead again."""
    one_life = rent_or_buy(priced(0.5, 14_600.0), 8, CASH)
    assert one_life is not None and one_life.months[-1] == 48 and one_life.book_usd[-1] == 0
    assert one_life.crossing_month == 40 and one_life.verdict == "buying is cheaper from month 40 of 48"
    replaced = rent_or_buy(priced(0.5, 14_600.0), 8, CASH, 60)
    assert replaced is not None and replaced.bought_cheaper == ((40, 47),) and replaced.crossing_month is None
    assert replaced.verdict.startswith("buying is cheaper in months 40 to 47, renting over 60; buying too, if ")
    assert format_usd(8 * 14_600.0 * 0.75) in replaced.verdict
    twice = rent_or_buy(priced(0.5, 14_600.0), 8, CASH, 96)
    assert twice is not None and twice.crossing_month == 80
    assert twice.verdict == "buying is cheaper in months 40 to 47 and from month 80 of 96"
    dear, cheap = (rent_or_buy(priced(usd, 14_600.0), 8, CASH) for usd in (0.2, 25.0))
    assert dear is not None and dear.verdict == "renting is cheaper throughout 48 months"
    assert cheap is not None and cheap.verdict == "buying is cheaper throughout 48 months"


def test_resale_at_the_end_of_life_is_money_and_book_value_is_not() -> None:
    kept = dataclasses.replace(CASH, owning=dataclasses.replace(CASH.owning, residual_share=0.25))
    answer = rent_or_buy(priced(0.32, 14_600.0), 8, kept)
    assert answer is not None and answer.buy_usd[47] == 8 * 14_600.0
    assert answer.buy_usd[48] == pytest.approx(8 * 14_600.0 * 0.75) and answer.book_usd[48] == 0
    assert answer.verdict == "buying is cheaper from month 48 of 48"


def test_growth_adds_whole_nodes_once_the_headroom_is_gone() -> None:
    growing = dataclasses.replace(CASH, demand=DemandProfile(growth_per_year=1.0))
    answer = rent_or_buy(priced(2.0, 14_600.0), 16, growing, 25, headroom=1.5)
    assert answer is not None
    assert answer.num_gpus[:8] == (16,) * 8 and answer.num_gpus[8] == 24
    assert answer.num_gpus[24] == 48
    assert all(n % 8 == 0 and n >= need for n, need in zip(answer.owned_gpus, answer.num_gpus, strict=True))
    racks = rent_or_buy(NVL72, 64, growing, 12)
    assert racks is not None and set(racks.owned_gpus) == {72, 144}


def test_falling_rents_put_off_the_crossing() -> None:
    falling = dataclasses.replace(CASH, renting=Renting(price_change_per_year=-0.3))
    flat, cheaper = (rent_or_buy(priced(2.0, 14_600.0), 8, terms, 48) for terms in (CASH, falling))
    assert flat is not None and cheaper is not None
    assert flat.crossing_month is not None and cheaper.crossing_month is not None
    assert cheaper.crossing_month > flat.crossing_month
    assert cheaper.rent_usd[13] - cheaper.rent_usd[12] == pytest.approx(8 * 2.0 * HOURS * 0.7)
    with pytest.raises(InputError, match="months"):
        rent_or_buy(H100, 8, months=0)


def test_staff_storage_and_spare_parts_are_parts_of_their_own() -> None:
    terms = Terms(owning=Owning(storage_share=0.1, spares_share=0.05, staff_usd_per_gpu_year=1_200.0))
    answer = bill(H100, 8, terms, "owned")
    assert answer.parts["staff"] == pytest.approx(8 * 100.0)
    assert answer.parts["storage"] == pytest.approx(2 * answer.parts["spare_parts"])
    assert answer.parts["storage"] == pytest.approx(0.1 * answer.parts["hardware"])
    assert answer.capex_usd == pytest.approx(8 * 35_625 * 1.27)
    assert answer.parts["opex"] == pytest.approx(0.05 * (answer.capex_usd or 0) / 12)
