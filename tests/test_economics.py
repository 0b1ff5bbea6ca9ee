"""Acceptance numbers of serving.md 10.2 (E1-E8, T1, T2) and the rules around unknown prices."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.economics import (
    Owning,
    Renting,
    Site,
    Terms,
    break_even_utilisation,
    capital_recovery_factor,
    fleet_usd,
    gpu_hour,
    it_power_w_per_gpu,
    kwh_per_mtok,
    nodes_needed,
    owned_cost,
    owned_gpu_hour,
    profit_margin,
    rental_usd_per_gpu_hour,
    revenue_usd,
    scaled_power_w,
    sinking_fund_factor,
    usd_per_mtok,
    usd_text,
)
from planner.errors import InputError
from planner.hardware import Price, System, system

# DeepSeek open-infra-index, day 6 (2025-03): one day of V3/R1 on 8-GPU H800 nodes at $2 per GPU-hour.
NODES, USD_PER_GPU_HOUR, DAY_H, DAY_S = 226.75, 2.0, 24.0, 86_400.0
INPUT_TOKENS, CACHED_TOKENS, OUTPUT_TOKENS = 608e9, 342e9, 168e9
PREFILL_TOK_PER_S, DECODE_TOK_PER_S = 73_700.0, 14_800.0
COST_USD = 87_072.0


def near(expected: float, rel: float = 5e-5) -> object:
    return pytest.approx(expected, rel=rel)


def test_e1_daily_cost() -> None:
    assert fleet_usd(USD_PER_GPU_HOUR, NODES * 8, DAY_H) == near(COST_USD)


def test_e2_theoretical_revenue() -> None:
    prices = (0.14, 0.55, 2.19)
    rounded = revenue_usd(zip((CACHED_TOKENS, INPUT_TOKENS - CACHED_TOKENS, OUTPUT_TOKENS), prices, strict=True))
    assert rounded == near(562_100)
    assert rounded == near(562_027, rel=2e-4)
    hit = 0.563
    by_share = revenue_usd(zip((INPUT_TOKENS * hit, INPUT_TOKENS * (1 - hit), OUTPUT_TOKENS), prices, strict=True))
    assert by_share == near(561_975, rel=2e-4)


def test_e3_margin() -> None:
    assert profit_margin(562_027, COST_USD) == near(5.4547)


def test_e4_nodes() -> None:
    prefill = nodes_needed(INPUT_TOKENS, DAY_S, PREFILL_TOK_PER_S)
    decode = nodes_needed(OUTPUT_TOKENS, DAY_S, DECODE_TOK_PER_S)
    assert prefill == near(95.48, rel=1e-4)
    assert decode == near(131.38, rel=1e-4)
    assert prefill + decode == near(226.86, rel=1e-4)
    assert prefill + decode == near(NODES, rel=5e-4 + 1e-5)


def test_e5_usd_per_mtok_by_allocation() -> None:
    assert usd_per_mtok(USD_PER_GPU_HOUR, 8, DECODE_TOK_PER_S) == near(0.3003, rel=2e-4)
    assert usd_per_mtok(USD_PER_GPU_HOUR, 8, PREFILL_TOK_PER_S) == near(0.0603, rel=5e-4)
    assert usd_per_mtok(USD_PER_GPU_HOUR, NODES * 8, OUTPUT_TOKENS / DAY_S) == near(0.518, rel=1e-3)
    assert usd_per_mtok(USD_PER_GPU_HOUR, NODES * 8, (INPUT_TOKENS + OUTPUT_TOKENS) / DAY_S) == near(0.1122, rel=5e-4)


def test_e6_allocated_cost_over_usage_cost_is_the_load_factor() -> None:
    peak, mean = 278.0, NODES
    on_demand = fleet_usd(USD_PER_GPU_HOUR, mean * 8, DAY_H)
    reserved = fleet_usd(USD_PER_GPU_HOUR, peak * 8, DAY_H)
    assert on_demand is not None and reserved is not None
    assert on_demand / reserved == near(0.8156, rel=1e-4)
    at_load = usd_per_mtok(USD_PER_GPU_HOUR, peak * 8, OUTPUT_TOKENS / DAY_S / (mean / peak), utilisation=mean / peak)
    assert at_load == near(reserved / OUTPUT_TOKENS * 1e6)


def test_e7_sequences_per_gpu_price_one_user() -> None:
    """A user at 20-22 tok/s shares a GPU with 84-93 others: the price per token must not depend on who shares."""
    for user_tok_per_s, sequences in ((20.0, 92.5), (22.0, 84.09)):
        assert DECODE_TOK_PER_S / 8 / user_tok_per_s == near(sequences)
        one_user = usd_per_mtok(USD_PER_GPU_HOUR, 1 / sequences, user_tok_per_s)
        assert one_user == near(0.3003, rel=5e-4)


def test_e8_prefill_without_cache_hits() -> None:
    computed = PREFILL_TOK_PER_S * (1 - 0.563)
    assert computed == near(32_207)
    nodes = nodes_needed(INPUT_TOKENS * (1 - 0.563), DAY_S, computed)
    assert nodes == near(nodes_needed(INPUT_TOKENS, DAY_S, PREFILL_TOK_PER_S))


def test_t1_owned_node() -> None:
    straight = owned_cost(325_000 / 8, 10_200 / 8, Terms(owning=Owning(discount_rate=0.0)))
    assert straight.capital_usd == near(1.299, rel=5e-4)
    assert straight.opex_usd == near(0.260, rel=2e-3)
    assert straight.colo_usd == near(0.349, rel=2e-3)
    assert straight.energy_usd == near(0.122, rel=5e-3)
    assert straight.usd_per_gpu_hour == near(2.030, rel=5e-4)
    assert straight.usd_per_gpu_hour / 0.6 == near(3.383, rel=5e-4)
    assert owned_cost(325_000 / 8, 10_200 / 8).capital_usd == near(1.639, rel=5e-4)


def test_t2_energy() -> None:
    assert kwh_per_mtok(10_200 / 8, 1_850, pue=1.2) == near(0.2297, rel=2e-4)


def test_residual_lowers_the_capital_part_only() -> None:
    kept, sold = (owned_cost(40_000, 1_000, Terms(owning=Owning(residual_share=share))) for share in (0.0, 0.3))
    saved = 0.3 * 40_000 * 1.12 * sinking_fund_factor(0.10, 4) / 8760
    assert kept.capital_usd - sold.capital_usd == near(saved)
    assert (kept.opex_usd, kept.colo_usd, kept.energy_usd) == (sold.opex_usd, sold.colo_usd, sold.energy_usd)


@given(st.floats(0.0, 0.5), st.floats(0.5, 15.0))
@settings(deadline=None, derandomize=True)
def test_recovery_is_sinking_fund_plus_interest(rate: float, years: float) -> None:
    assert capital_recovery_factor(rate, years) == pytest.approx(sinking_fund_factor(rate, years) + rate, rel=1e-6)


@given(st.floats(0.1, 20), st.integers(1, 512), st.floats(1, 1e6), st.floats(0.01, 1))
@settings(deadline=None, derandomize=True)
def test_break_even_is_where_own_cost_meets_the_api_price(usd: float, gpus: int, rate: float, share: float) -> None:
    own = usd_per_mtok(usd, gpus, rate, share)
    assert own is not None
    assert break_even_utilisation(usd, gpus, rate, own) == pytest.approx(share)


def test_scaled_power() -> None:
    assert scaled_power_w(2_000, 10_200, 0.5) == 6_100


def test_rental_is_preferred_and_discounted() -> None:
    h100 = system("h100-sxm")
    listed = h100.rental_usd_per_gpu_hour()
    assert listed is not None
    price = gpu_hour(h100, Terms(renting=Renting(commit_discount=0.25)))
    assert price is not None
    assert (price.basis, price.as_of) == ("rental", listed.as_of)
    assert price.usd == pytest.approx(0.75 * listed.usd)
    assert price.source == listed.source


def test_owned_cost_when_only_a_purchase_price_is_known() -> None:
    price = gpu_hour(without_rental(system("h200-sxm")))
    assert price is not None and price.basis == "owned"
    expected = owned_cost(46_250, 10_200 / 8).usd_per_gpu_hour
    assert price.usd == pytest.approx(expected)
    assert "46,250" in price.source
    straight = owned_gpu_hour(system("h200-sxm"), Terms(owning=Owning(discount_rate=0.0)))
    assert straight is not None and straight.usd < price.usd


def test_unknown_price_stays_unknown() -> None:
    nobody_sells = system("gaudi-3")
    assert gpu_hour(nobody_sells) is None
    assert usd_per_mtok(None, 8, 1_000) is None
    assert break_even_utilisation(None, 8, 1_000, 1.0) is None
    assert fleet_usd(None, 8, 24) is None
    assert profit_margin(1.0, None) is None
    assert kwh_per_mtok(None, 1_000) is None
    assert usd_text(None) == "price unknown"


def test_no_tokens_have_no_price_per_token() -> None:
    assert usd_per_mtok(2.0, 8, 0.0) is None
    assert kwh_per_mtok(700.0, 0.0) is None


def test_power_per_gpu() -> None:
    assert it_power_w_per_gpu(system("h100-sxm")) == 10_200 / 8
    l4 = system("l4")
    assert l4.node_power_w is None and it_power_w_per_gpu(l4) == pytest.approx(72 * 10_200 / 5_600)
    assert it_power_w_per_gpu(system("tpu-v5e")) is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: usd_per_mtok(2.0, 8, 100.0, utilisation=0.0),
        lambda: usd_per_mtok(2.0, 8, 100.0, utilisation=60.0),
        lambda: usd_per_mtok(2.0, 8, -1.0),
        lambda: kwh_per_mtok(700.0, -1.0),
        lambda: break_even_utilisation(2.0, 8, 100.0, 0.0),
        lambda: capital_recovery_factor(0.1, 0.0),
        lambda: Site(pue=0.9),
        lambda: Owning(residual_share=1.0),
        lambda: Renting(commit_discount=1.0),
        lambda: rental_usd_per_gpu_hour(2.0, 1.0),
        lambda: profit_margin(1.0, 0.0),
        lambda: nodes_needed(1.0, 0.0, 1.0),
    ],
)
def test_impossible_inputs_are_refused(call: object) -> None:
    with pytest.raises(InputError):
        call()  # type: ignore[operator]


def test_newest_price_wins_and_the_cheaper_of_equals() -> None:
    def offer(usd: float, as_of: str) -> Price:
        return Price("rental", usd, as_of, f"at {usd}", "test")

    offers = (offer(1.0, "2024-01"), offer(5.0, "2026-03-02"), offer(4.0, "2026-03-02"), offer(2.0, "2026"))
    assert dataclasses.replace(system("l4"), prices=offers).rental_usd_per_gpu_hour() == offers[2]


def without_rental(known: System) -> System:
    return dataclasses.replace(known, prices=tuple(p for p in known.prices if p.basis == "purchase"))
