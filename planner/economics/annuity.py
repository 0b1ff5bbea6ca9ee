"""Capital as a yearly payment, and the hourly cost of an owned GPU by part."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from planner.economics.demand import HOURS_PER_MONTH
from planner.economics.power import scaled_power_w
from planner.economics.refusal import positive
from planner.economics.terms import DEFAULT_TERMS, Terms

HOURS_PER_YEAR = 8760.0
_NO_INTEREST = 1e-12
"""Below it the factors are 1/n to within rounding."""


@dataclass(frozen=True, slots=True)
class OwnedCost:
    """Cost of owning one GPU for one hour, by part [$]; the residual value is negative."""

    hardware_usd: float
    fabric_usd: float
    storage_usd: float
    spare_parts_usd: float
    residual_usd: float
    opex_usd: float
    staff_usd: float
    colo_usd: float
    energy_usd: float

    @property
    def capital_usd(self) -> float:
        """Annuity of all that was bought, less that of its residual value."""
        return self.hardware_usd + self.fabric_usd + self.storage_usd + self.spare_parts_usd + self.residual_usd

    @property
    def running_usd(self) -> float:
        """What is paid as time goes on: repair, staff, space and energy."""
        return self.opex_usd + self.staff_usd + self.colo_usd + self.energy_usd

    @property
    def usd_per_gpu_hour(self) -> float:
        """Sum of the parts."""
        return self.capital_usd + self.running_usd

    @property
    def parts(self) -> dict[str, float]:
        """$ per GPU-hour by part, without those that are 0."""
        named = {field.name.removesuffix("_usd"): getattr(self, field.name) for field in fields(self)}
        return {name: usd for name, usd in named.items() if usd}


def capital_recovery_factor(rate: float, years: float) -> float:
    """Yearly payment per dollar of capital: i / (1 - (1 + i)^-n), and 1/n when i = 0.

    >>> round(capital_recovery_factor(0.10, 4), 4), capital_recovery_factor(0.0, 4)
    (0.3155, 0.25)
    """
    positive("years", years)
    return 1 / years if rate < _NO_INTEREST else rate / -math.expm1(-years * math.log1p(rate))


def sinking_fund_factor(rate: float, years: float) -> float:
    """Yearly saving per dollar wanted after n years: i / ((1 + i)^n - 1), and 1/n when i = 0."""
    positive("years", years)
    return 1 / years if rate < _NO_INTEREST else rate / math.expm1(years * math.log1p(rate))


def capex_usd_per_gpu(purchase_usd_per_gpu: float, terms: Terms = DEFAULT_TERMS) -> float:
    """Capital of one GPU: its purchase price with its shares of fabric, storage and spare parts [$]."""
    return purchase_usd_per_gpu * terms.owning.capital_factor


def owned_cost(purchase_usd_per_gpu: float, it_power_w_per_gpu: float, terms: Terms = DEFAULT_TERMS) -> OwnedCost:
    """Hourly cost of an owned GPU.

    [capex CRF - residual SFF + opex capex + staff] / 8760 + kW_it PUE $/kWh + colo (serving.md 10.1), where capex is
    the purchase price with its shares of fabric, storage and spare parts, and the residual a share of capex. Energy is
    0 where the colocation price includes it, and follows the mean demand where it is paid as used.

    >>> from planner.economics.terms import Owning
    >>> straight_line = owned_cost(325_000 / 8, 10_200 / 8, Terms(owning=Owning(discount_rate=0.0)))
    >>> round(straight_line.usd_per_gpu_hour, 3)
    2.03
    """
    owning, site = terms.owning, terms.site
    capex = capex_usd_per_gpu(purchase_usd_per_gpu, terms)
    hourly = purchase_usd_per_gpu * capital_recovery_factor(owning.discount_rate, owning.years) / HOURS_PER_YEAR
    fund = sinking_fund_factor(owning.discount_rate, owning.years) / HOURS_PER_YEAR
    it_kw = used_kw = it_power_w_per_gpu / 1e3
    if site.power == "utilisation_scaled":
        used_kw = scaled_power_w(site.idle_share * it_kw, it_kw, terms.demand.mean_over_peak)
    return OwnedCost(
        hardware_usd=hourly,
        fabric_usd=hourly * owning.fabric_share,
        storage_usd=hourly * owning.storage_share,
        spare_parts_usd=hourly * owning.spares_share,
        residual_usd=-owning.residual_share * capex * fund,
        opex_usd=capex * owning.opex_share_per_year / HOURS_PER_YEAR,
        staff_usd=owning.staff_usd_per_gpu_year / HOURS_PER_YEAR,
        colo_usd=it_kw * site.colo_usd_per_kw_month / HOURS_PER_MONTH,
        energy_usd=0.0 if site.colo_includes_power else used_kw * site.pue * site.usd_per_kwh,
    )
