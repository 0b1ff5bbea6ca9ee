"""The terms file, demand, ranges: what a buyer writes and how far it may move."""

from __future__ import annotations

import json
import math
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.economics import (
    DEFAULT_TERMS,
    RANGES,
    SOURCES,
    Allocation,
    DemandProfile,
    Owning,
    Renting,
    StatedPrice,
    Terms,
    bill,
    gpu_hour,
    load_terms,
    owned_gpu_hour,
    price_range,
    ranges_around,
    read_terms,
    terms_rows,
    terms_tables,
    token_costs,
)
from planner.economics.ranges import MANY_QUOTES, TYPICAL_SPREAD
from planner.errors import InputError
from planner.hardware import system, systems
from planner.text import plan_text
from planner.tomlfile import parse, to_toml

OWN = """
basis = "owned"
[owning]
years = 5
residual_share = 0.1
staff_usd_per_gpu_year = 150.0
[site]
usd_per_kwh = 0.15
[renting]
commit_discount = 0.2
sold_by = "node"
[demand]
shape = "office"
weekend_factor = 0.3
growth_per_year = 0.5
[api]
usd_per_mtok_input = 0.27
usd_per_mtok_output = 1.10
as_of = "2025-02"
provider = "an API"
[allocation]
rule = "1:4"
[spares]
nodes_plus = 1
[[price]]
system = "h100-sxm"
basis = "purchase"
usd = 260000
per = "node"
currency = "USD"
as_of = 2026-11-01
provider = "our supplier"
source = "quote 4711"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_terms_file_is_read_and_written_back(tmp_path: Path) -> None:
    terms = read_terms(written(tmp_path, OWN))
    assert (terms.owning.years, terms.site.usd_per_kwh, terms.site.pue) == (5.0, 0.15, 1.2)
    assert terms.price[0].as_of == "2026-11-01"
    quote = terms.prices(system("h100-sxm")).purchase_usd_per_gpu()
    assert quote is not None and (quote.usd, quote.provider, quote.source) == (32_500, "our supplier", "quote 4711")
    assert terms.prices(system("h200-sxm")) is system("h200-sxm")
    again = written(tmp_path, to_toml(terms_tables(terms), {}))
    assert load_terms(str(again)) == terms
    assert load_terms(None) == DEFAULT_TERMS == read_terms(written(tmp_path, ""))


def test_rentals_of_the_profile_stay_beside_a_stated_purchase(tmp_path: Path) -> None:
    terms = read_terms(written(tmp_path, OWN))
    h100 = system("h100-sxm")
    rented = gpu_hour(h100, terms, "rental")
    listed = h100.rental_usd_per_gpu_hour()
    assert rented is not None and listed is not None and rented.usd == pytest.approx(0.8 * listed.usd)
    owned = gpu_hour(h100, terms)
    assert owned is not None and owned.basis == "owned" and "quote 4711" in owned.source


def test_every_default_has_a_source_and_every_change_is_named(tmp_path: Path) -> None:
    assert all(SOURCES.values())
    assert all(row["is_default"] and row["source"] for row in terms_rows(DEFAULT_TERMS))
    rows = {row["name"]: row for row in terms_rows(read_terms(written(tmp_path, OWN)))}
    assert rows["owning.years"]["source"] == "stated by the buyer" and not rows["owning.years"]["is_default"]
    assert rows["site.pue"]["source"] == SOURCES["site.pue"]
    assert rows["price.h100-sxm.purchase"]["source"] == "our supplier: quote 4711, 2026-11-01"
    assert "2025-02" in rows["api.usd_per_mtok_output"]["source"]


PRICE = '[[price]]\nsystem = "h100-sxm"\nbasis = "rental"\nusd = 2.0\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PRICE + 'as_of = "2026-11"', ("no currency", 'currency = "USD"')),
        (PRICE + 'currency = "EUR"\nas_of = "2026-11"', ("EUR", "Convert it")),
        (PRICE + 'currency = "USD"', ("no date", "as_of")),
        (PRICE + 'currency = "USD"\nas_of = "last week"', ("last week", "2026-11-22")),
        (PRICE + 'currency = "USD"\nas_of = "2026-13"', ("2026-13",)),
        (PRICE + 'currency = "USD"\nas_of = "2026-02-30"', ("2026-02-30",)),
        (PRICE + 'currency = "USD"\nas_of = "2099-01-01"', ("2099-01-01", "lies after today", "the day of the quote")),
        ('[api]\nusd_per_mtok_output = 1.1\nas_of = "2099"', ("API price", "2099", "lies after today")),
        (PRICE.replace("h100-sxm", "h10") + 'currency = "USD"\nas_of = "2026"', ("'h10'", "h100-sxm")),
        (PRICE.replace("2.0", "-2.0") + 'currency = "USD"\nas_of = "2026"', ("positive", "-2")),
        (PRICE.replace("2.0", "280000") + 'currency = "USD"\nas_of = "2026"', ("280000", "per node")),
        (PRICE + 'per = "node"\ncurrency = "USD"\nas_of = "2026"', ("gpu_hour or node_hour",)),
        (PRICE + 'per = "node_hour"\ncurrency = "USD"\nas_of = "2026"\nkind = 1', ("kind", "unknown key")),
        ("[owning]\nyears = -4", ("years of life", "-4")),
        ("[owning]\nyears = 0", ("years of life", "0")),
        ("[owning]\nyears = nan", ("years of life", "nan")),
        ("[owning]\nyeers = 4", ("yeers", "did you mean years?")),
        ("[owning]\ndiscount_rate = -0.1", ("discount_rate", "-0.1")),
        ("[ownin]\nyears = 4", ("ownin", "owning")),
        ("[site]\npue = 0.9", ("pue", "0.9")),
        ("[site]\nusd_per_kwh = inf", ("usd_per_kwh", "inf")),
        ('[site]\npue = "low"', ("site.pue", "number")),
        ("[renting]\ncommit_discount = 1.0", ("commit_discount", "1")),
        ("[demand]\nutilisation = 0.6", ("utilisation", "unknown key")),
        ('[demand]\nshape = "offce"', ("offce", "office")),
        ("[demand]\nshape = [1, 2, 3]", ("3 numbers", "24")),
        (f"[demand]\nshape = {[1.0] * 23 + [1e300]}", ("shape", "1e+15")),
        (f"[demand]\nshape = {[0.0] * 24}", ("shape", "above 0")),
        (f'[allocation]\nrule = "1:{"9" * 400}"', ("weights are at most",)),
        ("[demand]\npeak_to_mean = 0.5", ("peak_to_mean", "0.5")),
        ('[demand]\nshape = "office"\npeak_to_mean = 2', ("peak_to_mean", "one of them")),
        ('[allocation]\nrule = "half"', ("half", "1:4")),
        ('[allocation]\nrule = "1:0"', ("1:0",)),
        ("[api]\nusd_per_mtok_output = 1.1", ("no date",)),
        ('[api]\nusd_per_mtok_output = 0.0\nas_of = "2026"', ("both 0",)),
        ("[spares]\nnodes_plus = -1", ("nodes_plus", "-1")),
        ('basis = "rent"', ("basis", "rental")),
        ("basis = ", ("not valid TOML",)),
    ],
)
def test_bad_terms_are_refused_with_their_value_and_a_remedy(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as refused:
        read_terms(path)
    message = str(refused.value)
    assert message.startswith(str(path)) and all(word in message for word in words), message


def test_terms_that_are_no_file_are_refused(tmp_path: Path) -> None:
    for text in ("owned", str(tmp_path / "missing.toml")):
        with pytest.raises(InputError, match=text.split("/")[-1]):
            load_terms(text)


def test_prices_per_node_and_rack() -> None:
    rack = StatedPrice("gb200-nvl72", "purchase", 3_600_000, "rack", "USD", "2026")
    assert rack.quote(system("gb200-nvl72")).usd == 50_000
    node = StatedPrice("h100-sxm", "rental", 24.0, "node_hour", "USD", "2026")
    assert node.quote(system("h100-sxm")).usd == 3.0
    with pytest.raises(InputError, match="no rack"):
        StatedPrice("h100-sxm", "purchase", 300_000, "rack", "USD", "2026").quote(system("h100-sxm"))
    with pytest.raises(InputError, match="per node or rack"):
        StatedPrice("gb200-nvl72", "purchase", 3_600_000, None, "USD", "2026").quote(system("gb200-nvl72"))


def test_utilisation_is_computed_from_the_hours_of_a_week() -> None:
    half_days = DemandProfile((1.0,) * 12 + (0.0,) * 12)
    assert half_days.mean_over_peak == pytest.approx(0.5)
    workdays = DemandProfile((2.0,) * 12 + (0.0,) * 12, weekend_factor=0.0)
    assert workdays.mean_over_peak == pytest.approx(0.5 * 5 / 7)
    assert workdays.utilisation(15.0, 20.0) == pytest.approx(0.75 * 0.5 * 5 / 7)
    assert DemandProfile("consumer").mean_over_peak == pytest.approx(226.75 / 278)
    assert DemandProfile("office").mean_over_peak == pytest.approx(10.69 / 24)
    assert DemandProfile().per_month(2.0) == 2.0 * 730 * 3600
    with pytest.raises(InputError, match="peak demand"):
        workdays.utilisation(21.0, 20.0)


def test_a_busier_weekend_makes_the_peak() -> None:
    weekend = DemandProfile(weekend_factor=2.0)
    assert max(weekend.hourly) == 1.0
    assert weekend.mean_over_peak == pytest.approx((5 * 0.5 + 2) / 7)


@given(st.floats(1.0, 8.0))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_a_peak_to_mean_gives_that_mean(ratio: float) -> None:
    profile = DemandProfile(peak_to_mean=ratio)
    assert profile.mean_over_peak == pytest.approx(1 / ratio, rel=1e-6)
    assert max(profile.hourly) == 1.0 and min(profile.hourly) >= 0


def test_a_fleet_follows_the_hours_in_whole_replicas() -> None:
    day = DemandProfile((1.0, 0.51, 0.5, *(0.0,) * 21))
    assert day.fleet(16, 8)[:4] == (16, 16, 8, 8)
    assert day.fleet_share(16, 16) == 1.0
    assert day.fleet_share(16, 8) == pytest.approx((2 * 16 + 22 * 8) / (24 * 16))


def test_ranges_hold_the_defaults_and_follow_the_buyer() -> None:
    assert all(r.low <= r.mode <= r.high and r.low < r.high and r.source for r in RANGES.values())
    assert ranges_around(DEFAULT_TERMS) == RANGES
    dear = DEFAULT_TERMS.varied({"site.usd_per_kwh": 0.30, "owning.residual_share": 0.4})
    moved = ranges_around(dear)
    assert (moved["site.usd_per_kwh"].low, moved["site.usd_per_kwh"].high) == pytest.approx((0.225, 0.45))
    assert moved["owning.residual_share"].mode == moved["owning.residual_share"].high == 0.4
    assert moved["owning.residual_share"].low == 0.0
    assert moved["site.pue"] == RANGES["site.pue"]


def test_every_range_moves_the_cost_it_belongs_to() -> None:
    used = DEFAULT_TERMS.varied({"site.power": "utilisation_scaled", "demand.peak_to_mean": 2.0})
    for name, known in RANGES.items():
        basis: Literal["rental", "owned"] = "rental" if name.startswith("renting") else "owned"
        ends = [bill(system("h100-sxm"), 8, used.varied({name: end}), basis) for end in (known.low, known.high)]
        assert ends[0].usd_per_month != ends[1].usd_per_month, name


def test_price_ranges_are_those_of_the_dated_quotes() -> None:
    h100 = price_range(system("h100-sxm"))
    assert h100 is not None and (h100.low, h100.mode, h100.high, h100.num_quotes) == (2.29, 3.2, 6.155, 6)
    assert h100.oldest < h100.newest
    assert price_range(system("h100-sxm"), Terms(renting=Renting(commit_discount=0.5))) == h100
    bought = price_range(system("h100-sxm"), basis="purchase")
    assert bought is not None and bought.mode == 35_625 and bought.low == pytest.approx(0.74 * 35_625)
    one = price_range(system("gb200-nvl72"))
    assert one is not None and one.num_quotes == 1 and one.low < one.mode < one.high and "widened" in one.source
    stated = price_range(system("gb200-nvl72"), DEFAULT_TERMS.with_price("gb200-nvl72", "rental", 9.0, "2026-11"))
    assert stated is not None and (stated.low, stated.mode, stated.high) == (9.0, 9.0, 9.0)
    assert price_range(system("gaudi-3")) is None


def test_the_typical_spread_is_that_of_the_profiles() -> None:
    for basis, fewest in (("rental", MANY_QUOTES), ("purchase", 2)):
        ratios = []
        for name in systems():
            known = system(name)
            used = known.rental_usd_per_gpu_hour() if basis == "rental" else known.purchase_usd_per_gpu()
            quotes = [p.usd for p in known.prices if p.basis == basis]
            if used and len(quotes) >= fewest:
                ratios.append((min(quotes) / used.usd, max(quotes) / used.usd))
        down, up = (math.exp(math.fsum(math.log(r[end]) for r in ratios) / len(ratios)) for end in (0, 1))
        low, high = TYPICAL_SPREAD[basis]
        assert low == pytest.approx(down, abs=0.02)
        assert high == pytest.approx(up if basis == "rental" else 1 / down, abs=0.03)


def test_values_and_variations_by_path() -> None:
    assert DEFAULT_TERMS.value("site.pue") == 1.2
    assert DEFAULT_TERMS.varied({"basis": "owned", "owning.years": 3.0}) == Terms(
        basis="owned", owning=Owning(years=3.0)
    )
    with pytest.raises(InputError, match="site.pue"):
        DEFAULT_TERMS.value("site.pui")
    with pytest.raises(InputError, match="years of life"):
        DEFAULT_TERMS.varied({"owning.years": -1.0})


def test_rules_are_named() -> None:
    assert Allocation("1:4").weights == (1.0, 4.0)
    names = [Allocation(rule).name for rule in ("output", "total", "1:4")]
    assert len(set(names)) == 3 and "1:4" in names[2]


def test_an_owned_price_names_its_terms() -> None:
    price = owned_gpu_hour(system("h100-sxm"), Terms(owning=Owning(years=3.0, discount_rate=0.08)))
    assert price is not None and "3 years at 0.08" in price.source


GUIDE = (Path(__file__).parents[1] / "docs" / "economics.md").read_text(encoding="utf-8")


def test_the_example_of_the_guide_states_every_term(tmp_path: Path) -> None:
    example = GUIDE.split("```toml\n")[1].split("```")[0]
    terms = read_terms(written(tmp_path, example))
    assert terms.price[0].per == "node"
    stated = {
        f"{table}.{key}" for table, keys in parse(example, "guide").items() if isinstance(keys, dict) for key in keys
    }
    assert set(SOURCES) - stated == {"basis", "demand.peak_to_mean", "demand.source"}


def test_the_guide_lists_the_defaults_and_its_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    listed = [[cell.strip(" `") for cell in line.split("|")] for line in GUIDE.splitlines() if line.startswith("| `")]
    shown, spread = ({cells[1]: cells[column] for cells in listed} for column in (2, 3))
    assert {name: text for name, text in spread.items() if text} == {
        name: f"{known.low:g} to {known.high:g}" for name, known in RANGES.items()
    }
    for row in terms_rows(DEFAULT_TERMS):
        value = row["value"]
        text = value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else f"{value:g}"
        assert shown.pop(row["name"]) == text
    assert not shown
    exec(GUIDE.split("```python\n")[1].split("```")[0], {})
    assert "crossing" not in capsys.readouterr().err


PLAN = ("plan", "mixtral-8x7b", "--cluster", "h100-sxm:1x2", "--workload", "fixed:512/64", "--rate", "2")


def test_plan_and_simulate_charge_what_the_terms_say(moeplan: Any, tmp_path: Path) -> None:
    path = written(tmp_path, OWN)
    out = tmp_path / "run"
    code, text, _ = moeplan(*PLAN, "--num-requests", "60", "--terms", str(path), "--out", str(out), "--json")
    facts = json.loads(text)
    assert code == 0
    terms = read_terms(path)
    gpus = facts["layout"]["num_gpus"]
    cost = bill(system("h100-sxm"), gpus, terms)
    assert cost.basis == "owned" and cost.billed_gpus == 16 and gpus <= 4
    made = terms.demand.per_month(facts["output_tok_per_s"])
    costs = token_costs(cost.usd_per_month, made * 512 / 64, made, Allocation("1:4"))
    for kind in ("input", "output", "total"):
        assert facts[f"usd_per_mtok_{kind}"] == pytest.approx(getattr(costs, f"usd_per_mtok_{kind}"))
    assert facts["allocation"] == costs.rule and costs.rule in facts["headline"]
    assert costs.rule in plan_text(facts) and "break-even" in plan_text(facts)
    at_demand = next(row for row in facts["cost_curve"] if row["demand_factor"] == 1)
    assert at_demand["usd_per_mtok_output"] == pytest.approx(costs.usd_per_mtok_output)
    assert facts["money"]["break_even"]["usd_per_month"] == pytest.approx(cost.usd_per_month)
    rows = {row["name"]: row for row in facts["assumptions"]}
    assert "quote 4711" in rows["h100-sxm cost of owning"]["source"] and rows["owning.years"]["value"] == "5.0"
    kept = json.loads((out / "inputs.json").read_text(encoding="utf-8"))["terms"]
    assert read_terms(written(tmp_path, to_toml(kept, {}))) == terms

    code, text, _ = moeplan(
        *("simulate", *PLAN[1:], "--layout", "tp=2,ep=2", "--num-requests", "60", "--terms", str(path), "--json")
    )
    facts = json.loads(text)
    made = terms.demand.per_month(facts["output_tok_per_s"])
    assert code == 0
    costs = token_costs(cost.usd_per_month, made * 512 / 64, made, Allocation("1:4"))
    assert facts["usd_per_mtok_output"] == pytest.approx(costs.usd_per_mtok_output)
    assert facts["allocation"] == costs.rule


def test_tomorrow_is_the_last_day_of_a_quote() -> None:
    today = date.today()
    assert StatedPrice("h100-sxm", "rental", 2.0, None, "USD", (today + timedelta(days=1)).isoformat())
    assert StatedPrice("h100-sxm", "rental", 2.0, None, "USD", f"{today:%Y-%m}")
    with pytest.raises(InputError, match="after today"):
        StatedPrice("h100-sxm", "rental", 2.0, None, "USD", (today + timedelta(days=3)).isoformat())


def test_a_faulty_terms_file_ends_a_plan_before_it_starts(moeplan: Any, tmp_path: Path) -> None:
    path = written(tmp_path, "[owning]\nyears = -1")
    code, out, err = moeplan(*PLAN, "--terms", str(path), "--out", str(tmp_path / "run"))
    assert (code, out) == (2, "") and "years of life" in err and not (tmp_path / "run").exists()
