"""What a buyer may set, in one TOML: life and interest, site, renting, demand, API to beat, prices of the day.

Defaults are those public calculations use; `planner.economics.sources` names where each comes from and
`planner.economics.ranges` how far published values spread.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import date, timedelta
from typing import Any, Literal

from planner.economics.demand import FLAT, DemandProfile
from planner.economics.refusal import RefusedTermError, not_negative, positive, refuse_unless, within
from planner.errors import InputError, nearest
from planner.hardware import Price, System
from planner.hardware.plausibility import PRICE_BOUNDS

Basis = Literal["auto", "rental", "owned"]
PriceBasis = Literal["rental", "purchase"]
Unit = Literal["gpu_hour", "node_hour", "gpu", "node", "rack"]

_DATE = re.compile(r"20\d\d(-\d\d(-\d\d)?)?")
_MAX_WEIGHT = 1e6
_WEIGHTS = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Owning:
    """Capital and running cost of own hardware."""

    years: float = 4.0
    """Life of the hardware."""
    discount_rate: float = 0.10
    """Cost of capital per year; 0 gives straight-line depreciation."""
    residual_share: float = 0.0
    """Share of the capital got back at the end of life."""
    fabric_share: float = 0.12
    """Network and optics on top of the purchase price."""
    storage_share: float = 0.0
    """Storage on top of the purchase price."""
    spares_share: float = 0.0
    """Spare parts on the shelf on top of the purchase price; spare nodes are `[spares]`."""
    opex_share_per_year: float = 0.05
    """Repair, support contracts and running staff per year as a share of the capital."""
    staff_usd_per_gpu_year: float = 0.0
    """Staff beyond `opex_share_per_year`: the yearly bill over the GPUs they look after."""

    def __post_init__(self) -> None:
        refuse_unless(0 < self.years <= 50, f"years of life must be positive and at most 50, got {self.years:g}")
        within("discount_rate", self.discount_rate, 0.0, 2.0)
        refuse_unless(0 <= self.residual_share < 1, f"residual_share must be in [0, 1), got {self.residual_share:g}")
        for name in ("fabric_share", "storage_share", "spares_share", "opex_share_per_year"):
            within(name, getattr(self, name), 0.0, 5.0)
        not_negative("staff_usd_per_gpu_year", self.staff_usd_per_gpu_year)

    @property
    def capital_factor(self) -> float:
        """Capital over purchase price: 1 + fabric + storage + spare parts."""
        return 1 + self.fabric_share + self.storage_share + self.spares_share


@dataclass(frozen=True, slots=True)
class Site:
    """Power and space of own hardware."""

    pue: float = 1.2
    """Facility power over IT power."""
    usd_per_kwh: float = 0.08
    """Electricity tariff."""
    colo_usd_per_kw_month: float = 200.0
    """Space, cooling and power distribution per kW of IT power; 0 in a building of one's own."""
    colo_includes_power: bool = False
    """The colocation price covers electricity: the tariff is not charged beside it."""
    power: Literal["provisioned", "utilisation_scaled"] = "provisioned"
    """Energy is paid for full power all the time, or for P_idle + (P_max - P_idle) x utilisation."""
    idle_share: float = 0.3
    """Idle power over full power of a node."""
    rack_kw: float = 40.8
    """IT power a rack takes; decides how many nodes share one."""

    def __post_init__(self) -> None:
        refuse_unless(1 <= self.pue <= 5, f"pue is facility over IT power, 1 to 5, got {self.pue:g}")
        within("usd_per_kwh", self.usd_per_kwh, 0.0, 5.0)
        not_negative("colo_usd_per_kw_month", self.colo_usd_per_kw_month)
        within("idle_share", self.idle_share, 0.0, 1.0)
        positive("rack_kw", self.rack_kw)


@dataclass(frozen=True, slots=True)
class Renting:
    """How rented GPUs are paid."""

    commit_discount: float = 0.0
    """Share taken off the on-demand list price for a commitment."""
    reserved: bool = True
    """True pays for the fleet of the busiest hour all the time, False for what each hour of `[demand]` needs."""
    sold_by: Literal["gpu", "node", "rack"] = "gpu"
    """Smallest unit that can be rented; a rack matters where the scale-up domain is one (NVL72)."""
    price_change_per_year: float = 0.0
    """How rental prices move, for renting against buying over years: -0.2 is a fifth cheaper after a year."""

    def __post_init__(self) -> None:
        refuse_unless(0 <= self.commit_discount < 1, f"commit_discount must be in [0, 1), got {self.commit_discount:g}")
        within("price_change_per_year", self.price_change_per_year, -0.9, 5.0)


@dataclass(frozen=True, slots=True)
class Api:
    """Price of the same tokens from a provider, to break even with; none by default."""

    usd_per_mtok_input: float | None = None
    usd_per_mtok_output: float | None = None
    as_of: str = ""
    provider: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        prices = (self.usd_per_mtok_input, self.usd_per_mtok_output)
        for usd in prices:
            not_negative("API price", usd or 0.0)
        if self.is_known:
            refuse_unless(any(prices), "API prices are both 0: state what is paid, or leave [api] out")
            check_date(self.as_of, "API price")

    @property
    def is_known(self) -> bool:
        """A price was stated."""
        return self.usd_per_mtok_input is not None or self.usd_per_mtok_output is not None


@dataclass(frozen=True, slots=True)
class Allocation:
    """How the bill is divided between input and output tokens."""

    rule: str = "output"
    """`output` puts all on output tokens, `total` charges every token alike, `1:4` weighs an input token 1 and an
    output token 4."""

    def __post_init__(self) -> None:
        _ = self.weights

    @property
    def weights(self) -> tuple[float, float]:
        """Weight of an input and of an output token. InputError for a rule that nobody knows."""
        if self.rule in ("output", "total"):
            return (0.0 if self.rule == "output" else 1.0), 1.0
        match = _WEIGHTS.fullmatch(self.rule)
        refuse_unless(match is not None, f'rule {self.rule!r} is unknown: "output", "total" or weights such as "1:4"')
        assert match is not None
        weights = float(match[1]), float(match[2])
        refuse_unless(weights[1] > 0, f"rule {self.rule!r}: the weight of output tokens must be above 0")
        refuse_unless(max(weights) <= _MAX_WEIGHT, f"rule {self.rule!r}: weights are at most {_MAX_WEIGHT:,.0f}")
        return weights

    @property
    def name(self) -> str:
        """The rule in words, to be printed beside every price per token."""
        if self.rule == "output":
            return "all cost on output tokens"
        if self.rule == "total":
            return "input and output tokens alike"
        return f"input to output tokens weighted {self.rule}"


@dataclass(frozen=True, slots=True)
class Spares:
    """Nodes bought beyond need; rented fleets are replaced by their provider."""

    nodes_plus: int = 0
    """1 is N+1."""

    def __post_init__(self) -> None:
        refuse_unless(0 <= self.nodes_plus <= 1000, f"nodes_plus must lie in 0 to 1000, got {self.nodes_plus}")


@dataclass(frozen=True, slots=True)
class StatedPrice:
    """A price of one's own for a system; all prices of that basis in its profile are ignored."""

    system: str
    basis: PriceBasis
    usd: float
    per: Unit | None = None
    """What `usd` buys: gpu_hour or node_hour (rental), gpu, node or rack (purchase); per GPU unless stated."""
    currency: str = ""
    """USD."""
    as_of: str = ""
    """Year, year-month or day of the quote."""
    provider: str = "own quote"
    source: str = "terms file"

    def __post_init__(self) -> None:
        refuse_unless(bool(self.currency), f'{self._where}: no currency. Write currency = "USD"')
        refuse_unless(
            self.currency == "USD",
            f"{self._where}: {self.currency} cannot be added to dollars. Convert it, write the rate and its date into "
            'source, and state currency = "USD"',
        )
        check_date(self.as_of, self._where)
        positive(f"{self._where}: usd", self.usd)
        is_hourly = self.per in ("gpu_hour", "node_hour")
        units = "gpu_hour or node_hour" if self.basis == "rental" else "gpu, node or rack"
        refuse_unless(
            self.per is None or is_hourly == (self.basis == "rental"),
            f'{self._where}: a {self.basis} price is per {units}, not per "{self.per}"',
        )

    @property
    def _where(self) -> str:
        return f"{self.basis} price of {self.system}"

    def quote(self, system: System) -> Price:
        """This price per GPU-hour or per GPU of `system`. InputError when it cannot be one."""
        gpus = 1
        if self.per in ("node", "node_hour"):
            gpus = system.gpus_per_node
        elif self.per == "rack":
            gpus = system.scale_up.size
            refuse_unless(
                gpus > system.gpus_per_node,
                f"{self._where}: its scale-up domain is no rack. State the price per node",
            )
        usd = self.usd / gpus
        low, high = PRICE_BOUNDS[self.basis]
        unit = "per GPU-hour" if self.basis == "rental" else "per GPU"
        hint = "per node or rack" if usd > high else "per GPU already"
        refuse_unless(
            low <= usd <= high, f"{self._where}: ${usd:g} {unit} is outside {low:g} to {high:g}. Is it {hint}?"
        )
        return Price(self.basis, usd, self.as_of, self.provider, self.source)


@dataclass(frozen=True, slots=True)
class Terms:
    """All commercial terms. `basis` "auto" rents where a rental price is known and buys otherwise."""

    basis: Basis = "auto"
    owning: Owning = Owning()
    site: Site = Site()
    renting: Renting = Renting()
    demand: DemandProfile = FLAT
    api: Api = Api()
    allocation: Allocation = Allocation()
    spares: Spares = Spares()
    price: tuple[StatedPrice, ...] = ()

    def prices(self, system: System) -> System:
        """`system` with the stated prices instead of those of its profile, basis by basis."""
        stated = [p for p in self.price if p.system == system.name]
        if not stated:
            return system
        replaced = {p.basis for p in stated}
        kept = [p for p in system.prices if p.basis not in replaced]
        return replace(system, prices=(*(p.quote(system) for p in stated), *kept))

    def states_price(self, system: System, basis: PriceBasis) -> bool:
        """The buyer stated a price of that basis for `system`."""
        return any((p.system, p.basis) == (system.name, basis) for p in self.price)

    def with_price(self, system: str, basis: PriceBasis, usd: float, as_of: str) -> Terms:
        """These terms with `usd` per GPU-hour or per GPU as the only price of `basis` of `system`."""
        others = tuple(p for p in self.price if (p.system, p.basis) != (system, basis))
        return replace(self, price=(*others, StatedPrice(system, basis, usd, None, "USD", as_of)))

    def value(self, path: str) -> Any:
        """The term at a dotted path such as `site.usd_per_kwh`. InputError for an unknown one."""
        table, _, name = path.partition(".")
        if path not in PATHS:
            raise InputError(f"term {path!r} is unknown: {nearest(path, PATHS)}")
        return getattr(getattr(self, table), name) if name else getattr(self, table)

    def varied(self, changes: dict[str, Any]) -> Terms:
        """These terms with the values at the dotted paths of `changes`."""
        varied = self
        for path, value in changes.items():
            varied.value(path)
            table, _, name = path.partition(".")
            changed = replace(getattr(varied, table), **{name: value}) if name else value
            varied = replace(varied, **{table: changed})
        return varied


DEFAULT_TERMS = Terms()


def _paths() -> tuple[str, ...]:
    found = []
    for table in fields(Terms):
        default = getattr(DEFAULT_TERMS, table.name)
        if is_dataclass(default):
            found += [f"{table.name}.{field.name}" for field in fields(default)]
        elif table.name != "price":
            found.append(table.name)
    return tuple(found)


PATHS = _paths()
"""Dotted paths of all terms but the stated prices."""


def check_date(as_of: str, where: str) -> None:
    """Refuse what is no year, month or day from 2000 to tomorrow; a year or a month counts from its first day."""
    refuse_unless(bool(as_of), f'{where}: no date. Write when it was quoted, such as as_of = "2026-11-22"')
    sentence = f"{where}: as_of {as_of!r} is no date. Write 2026, 2026-11 or 2026-11-22"
    refuse_unless(bool(_DATE.fullmatch(as_of)), sentence)
    year, month, day = (*as_of.split("-"), "01", "01")[:3]
    try:
        stated = date(int(year), int(month), int(day))
    except ValueError:
        raise RefusedTermError(sentence) from None
    # A day of grace: it may be tomorrow already where the quote was written.
    today = date.today()
    refuse_unless(
        stated <= today + timedelta(days=1),
        f"{where}: as_of {as_of} lies after today, {today.isoformat()}. State the day of the quote",
    )
