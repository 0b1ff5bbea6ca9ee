"""Money and energy: what a GPU-hour costs, rented or owned, and what a million tokens cost.

Formulae: serving.md 10.1. A price that nobody published is None, and everything computed from it is None too:
`usd_text(None)` says "price unknown", never $0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from planner.errors import InputError
from planner.hardware import System
from planner.units import HOUR_S, format_usd

HOURS_PER_YEAR = 8760.0
HOURS_PER_MONTH = 730.0
TOKENS_PER_MTOK = 1e6

NODE_OVERHEAD = 10_200.0 / (8 * 700.0)
"""Node power over the sum of its GPUs' limits: the 10.2 kW node of 8 x 700 W H100 (serving.md 10.1)."""


@dataclass(frozen=True, slots=True)
class Ownership:
    """Terms of owning hardware. The defaults are those public calculations use (serving.md 10.1)."""

    years: float = 4.0
    discount_rate: float = 0.10
    """Cost of capital per year; 0 gives straight-line depreciation."""
    residual_share: float = 0.0
    """Share of the purchase price got back at the end; 0.25 to 0.35 is quoted after 36 months."""
    fabric_share: float = 0.12
    """Network and optics on top of the purchase price: 0.10 to 0.15."""
    opex_share_per_year: float = 0.05
    """Staff, spares and repair per year, as a share of the capital."""
    pue: float = 1.2
    """Facility power over IT power: 1.2 to 1.4."""
    usd_per_kwh: float = 0.08
    """0.06 to 0.12 quoted."""
    colo_usd_per_kw_month: float = 200.0
    """150 to 250 quoted. Many contracts include electricity: set `usd_per_kwh` to 0 then."""

    def __post_init__(self) -> None:
        _require(self.years > 0, f"ownership years must be positive, got {self.years:g}")
        _require(self.discount_rate >= 0, f"discount rate must not be negative, got {self.discount_rate:g}")
        _require(0 <= self.residual_share < 1, f"residual share must be in [0, 1), got {self.residual_share:g}")
        _require(self.pue >= 1, f"PUE is facility over IT power and at least 1, got {self.pue:g}")


@dataclass(frozen=True, slots=True)
class OwnedCost:
    """Cost of owning one GPU for one hour, by part [$]."""

    capital_usd: float
    opex_usd: float
    colo_usd: float
    energy_usd: float

    @property
    def usd_per_gpu_hour(self) -> float:
        """Sum of the parts."""
        return self.capital_usd + self.opex_usd + self.colo_usd + self.energy_usd


@dataclass(frozen=True, slots=True)
class GpuHour:
    """Price of one GPU-hour, what it rests on, and when that was quoted."""

    usd: float
    basis: Literal["rental", "owned"]
    as_of: str
    provider: str
    source: str


def capital_recovery_factor(rate: float, years: float) -> float:
    """Yearly payment per dollar of capital: i / (1 - (1 + i)^-n), and 1/n when i = 0.

    >>> round(capital_recovery_factor(0.10, 4), 4), capital_recovery_factor(0.0, 4)
    (0.3155, 0.25)
    """
    _require(years > 0, f"years must be positive, got {years:g}")
    return 1 / years if rate == 0 else rate / (1 - (1 + rate) ** -years)


def sinking_fund_factor(rate: float, years: float) -> float:
    """Yearly saving per dollar wanted after n years: i / ((1 + i)^n - 1), and 1/n when i = 0."""
    _require(years > 0, f"years must be positive, got {years:g}")
    return 1 / years if rate == 0 else rate / ((1 + rate) ** years - 1)


def owned_cost(purchase_usd_per_gpu: float, it_power_w_per_gpu: float, terms: Ownership | None = None) -> OwnedCost:
    """Hourly cost of an owned GPU.

    [capex CRF - residual SFF + opex capex] / 8760 + kW_it PUE $/kWh + colo (serving.md 10.1), where capex is the
    purchase price with its share of the fabric and the residual is a share of capex.

    >>> straight_line = owned_cost(325_000 / 8, 10_200 / 8, Ownership(discount_rate=0.0))
    >>> round(straight_line.usd_per_gpu_hour, 3)
    2.03
    """
    terms = terms or Ownership()
    capex = purchase_usd_per_gpu * (1 + terms.fabric_share)
    recovery = capital_recovery_factor(terms.discount_rate, terms.years)
    resale = terms.residual_share * sinking_fund_factor(terms.discount_rate, terms.years)
    it_kw = it_power_w_per_gpu / 1e3
    return OwnedCost(
        capital_usd=capex * (recovery - resale) / HOURS_PER_YEAR,
        opex_usd=capex * terms.opex_share_per_year / HOURS_PER_YEAR,
        colo_usd=it_kw * terms.colo_usd_per_kw_month / HOURS_PER_MONTH,
        energy_usd=it_kw * terms.pue * terms.usd_per_kwh,
    )


def it_power_w_per_gpu(system: System) -> float | None:
    """Provisioned power per GPU with its share of the node [W]; None when neither node nor GPU power is known.

    Without a published node power the GPU's limit is scaled by `NODE_OVERHEAD`.
    """
    if system.node_power_w is not None:
        return system.node_power_w / system.gpus_per_node
    return None if system.gpu.tdp_w is None else system.gpu.tdp_w * NODE_OVERHEAD


def scaled_power_w(idle_w: float, max_w: float, utilisation: float) -> float:
    """Power at partial load: P_idle + (P_max - P_idle) u (serving.md 10.1)."""
    _share(utilisation)
    return idle_w + (max_w - idle_w) * utilisation


def gpu_hour(system: System, terms: Ownership | None = None, commit_discount: float = 0.0) -> GpuHour | None:
    """Price of one GPU-hour: the newest on-demand rental less `commit_discount`, else the cost of owning, else None.

    A rental price is preferred because it needs no assumption about life, power or interest.
    """
    rental = system.rental_usd_per_gpu_hour()
    if rental is not None:
        usd = rental_usd_per_gpu_hour(rental.usd, commit_discount)
        return GpuHour(usd, "rental", rental.as_of, rental.provider, rental.source)
    return owned_gpu_hour(system, terms)


def owned_gpu_hour(system: System, terms: Ownership | None = None) -> GpuHour | None:
    """Cost of owning for one hour from the newest purchase price; None without a price or a known power."""
    purchase, power_w = system.purchase_usd_per_gpu(), it_power_w_per_gpu(system)
    if purchase is None or power_w is None:
        return None
    usd = owned_cost(purchase.usd, power_w, terms).usd_per_gpu_hour
    source = f"{purchase.source}; ${purchase.usd:,.0f} per GPU, owning terms of serving.md 10.1"
    return GpuHour(usd, "owned", purchase.as_of, purchase.provider, source)


def rental_usd_per_gpu_hour(list_usd: float, commit_discount: float = 0.0) -> float:
    """list x (1 - commit_discount)."""
    _require(0 <= commit_discount < 1, f"commitment discount must be in [0, 1), got {commit_discount:g}")
    return list_usd * (1 - commit_discount)


def usd_per_mtok(
    usd_per_gpu_hour: float | None, num_gpus: float, tok_per_s: float, utilisation: float = 1.0
) -> float | None:
    """Dollars per million tokens: $/GPU-h x GPUs x 1e6 / (3600 x tok/s x U).

    `utilisation` is busy-token share of the billing period, not a GPU utilisation counter. An unknown price and
    a rate of zero give None.

    >>> round(usd_per_mtok(2.0, 8, 14_800), 4)
    0.3003
    """
    _share(utilisation)
    _require(tok_per_s >= 0, f"tokens per second must not be negative, got {tok_per_s:g}")
    tokens_per_hour = HOUR_S * tok_per_s * utilisation
    if usd_per_gpu_hour is None or tokens_per_hour == 0:
        return None
    return usd_per_gpu_hour * num_gpus * TOKENS_PER_MTOK / tokens_per_hour


def kwh_per_mtok(it_power_w: float | None, tok_per_s: float, pue: float = 1.2) -> float | None:
    """Energy at the facility per million tokens: kW x PUE x 1e6 / (3600 x tok/s); both arguments per GPU or both total.

    >>> round(kwh_per_mtok(10_200 / 8, 1_850), 4)
    0.2297
    """
    _require(tok_per_s >= 0, f"tokens per second must not be negative, got {tok_per_s:g}")
    if it_power_w is None or tok_per_s == 0:
        return None
    return it_power_w / 1e3 * pue * TOKENS_PER_MTOK / (HOUR_S * tok_per_s)


def break_even_utilisation(
    usd_per_gpu_hour: float | None, num_gpus: float, max_tok_per_s: float, api_usd_per_mtok: float
) -> float | None:
    """Share of the time own GPUs must be busy to beat an API price; above 1 they never do.

    U* = $/GPU-h x GPUs x 1e6 / (3600 x tok/s x API price) (serving.md 10.1).
    """
    _require(api_usd_per_mtok > 0, f"API price must be positive, got {api_usd_per_mtok:g}")
    full = usd_per_mtok(usd_per_gpu_hour, num_gpus, max_tok_per_s)
    return None if full is None else full / api_usd_per_mtok


def fleet_usd(usd_per_gpu_hour: float | None, num_gpus: float, hours: float) -> float | None:
    """Bill of a fleet over a period, idle hours included; `num_gpus` is its mean when billed on demand, its peak
    when reserved."""
    return None if usd_per_gpu_hour is None else usd_per_gpu_hour * num_gpus * hours


def revenue_usd(sales: Iterable[tuple[float, float]]) -> float:
    """Sum over (tokens, $ per million tokens)."""
    return sum(tokens / TOKENS_PER_MTOK * usd for tokens, usd in sales)


def profit_margin(revenue: float, cost: float | None) -> float | None:
    """Profit over cost: 5.45 means 545 %."""
    if cost is None:
        return None
    _require(cost > 0, f"cost must be positive, got {cost:g}")
    return (revenue - cost) / cost


def nodes_needed(tokens: float, seconds: float, tok_per_s_per_node: float) -> float:
    """Mean number of nodes that handle `tokens` within `seconds`; not rounded."""
    _require(seconds > 0 and tok_per_s_per_node > 0, "period and rate per node must be positive")
    return tokens / seconds / tok_per_s_per_node


def usd_text(usd: float | None) -> str:
    """Dollars for people.

    >>> usd_text(0.3003), usd_text(None)
    ('$0.300', 'price unknown')
    """
    return "price unknown" if usd is None else format_usd(usd)


def _share(utilisation: float) -> None:
    _require(0 < utilisation <= 1, f"utilisation must be in (0, 1], got {utilisation:g}")


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise InputError(sentence)
