"""Money and energy: what GPUs cost, rented or owned, what a million tokens cost, and how sure those numbers are.

    terms      what a buyer may set, one TOML (`sources` reads it and dates every default)
    demand     the hours of a week and growth: utilisation is computed here
    power      watts, racks, energy per token
    annuity    capital as a yearly payment, cost of an owned GPU-hour by part
    price      the price of a GPU-hour, rented or owned
    bills      the monthly bill in whole nodes and racks
    tokens     $ per million tokens, break-even with an API
    horizon    renting or buying over years
    ranges     low, mode and high of terms and prices

Formulae: serving.md 10.1 and docs/economics.md. A price that nobody published is None, and everything computed from it
is None too: `usd_text(None)` says "price unknown", never $0.
"""

from __future__ import annotations

from planner.economics.annuity import (
    HOURS_PER_YEAR,
    OwnedCost,
    capex_usd_per_gpu,
    capital_recovery_factor,
    owned_cost,
    sinking_fund_factor,
)
from planner.economics.bills import Bill, bill, billed_gpus, hourly_usd, monthly_usd
from planner.economics.demand import HOURS_PER_MONTH, SHAPES, DemandProfile
from planner.economics.horizon import RentOrBuy, rent_or_buy
from planner.economics.power import (
    Energy,
    energy,
    gpus_per_rack,
    is_rack_scale,
    it_power_w_per_gpu,
    kwh_per_mtok,
    scaled_power_w,
    tok_per_s_per_mw,
)
from planner.economics.price import GpuHour, gpu_hour, owned_gpu_hour, rental_usd_per_gpu_hour, usd_text
from planner.economics.ranges import RANGES, PriceRange, Range, price_range, ranges_around
from planner.economics.sources import SOURCES, load_terms, read_terms, terms_rows, terms_tables
from planner.economics.terms import (
    DEFAULT_TERMS,
    Allocation,
    Api,
    Owning,
    Renting,
    Site,
    Spares,
    StatedPrice,
    Terms,
)
from planner.economics.tokens import (
    BreakEven,
    TokenCosts,
    break_even,
    break_even_utilisation,
    fleet_usd,
    nodes_needed,
    profit_margin,
    revenue_usd,
    served_costs,
    token_costs,
    usd_per_mtok,
)

__all__ = [
    "DEFAULT_TERMS",
    "HOURS_PER_MONTH",
    "HOURS_PER_YEAR",
    "RANGES",
    "SHAPES",
    "SOURCES",
    "Allocation",
    "Api",
    "Bill",
    "BreakEven",
    "DemandProfile",
    "Energy",
    "GpuHour",
    "OwnedCost",
    "Owning",
    "PriceRange",
    "Range",
    "RentOrBuy",
    "Renting",
    "Site",
    "Spares",
    "StatedPrice",
    "Terms",
    "TokenCosts",
    "bill",
    "billed_gpus",
    "break_even",
    "break_even_utilisation",
    "capex_usd_per_gpu",
    "capital_recovery_factor",
    "energy",
    "fleet_usd",
    "gpu_hour",
    "gpus_per_rack",
    "hourly_usd",
    "is_rack_scale",
    "it_power_w_per_gpu",
    "kwh_per_mtok",
    "load_terms",
    "monthly_usd",
    "nodes_needed",
    "owned_cost",
    "owned_gpu_hour",
    "price_range",
    "profit_margin",
    "ranges_around",
    "read_terms",
    "rent_or_buy",
    "rental_usd_per_gpu_hour",
    "revenue_usd",
    "scaled_power_w",
    "served_costs",
    "sinking_fund_factor",
    "terms_rows",
    "terms_tables",
    "tok_per_s_per_mw",
    "token_costs",
    "usd_per_mtok",
    "usd_text",
]
