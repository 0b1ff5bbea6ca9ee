"""The monthly bill of a number of GPUs: what is billed, for how much, by part, and the power behind it.

Rented GPUs are billed one by one unless the terms say otherwise. Own hardware comes in whole nodes, in whole racks
where the scale-up domain is one, and with spare nodes when asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from planner.economics.annuity import capex_usd_per_gpu, owned_cost
from planner.economics.demand import HOURS_PER_MONTH, DemandProfile
from planner.economics.power import gpus_per_rack, is_rack_scale, it_power_w_per_gpu
from planner.economics.price import GpuHour, gpu_hour
from planner.economics.refusal import not_negative, refuse_unless
from planner.economics.terms import DEFAULT_TERMS, Terms
from planner.hardware import System

Basis = Literal["rental", "owned"]
_Count = TypeVar("_Count", int, NDArray[Any])


@dataclass(frozen=True, slots=True)
class Bill:
    """What `num_gpus` cost a month. Every money field is None, and `parts` empty, when no price is known.

    `billed_gpus`, `nodes`, `racks` and the powers count idle GPUs of whole nodes and racks and spare nodes too;
    `racks` is None where the power of a node is unknown. `capex_usd` is 0 for rented GPUs. `parts` are $ per month and
    add up to `usd_per_month`; the residual value of own hardware is negative. `usd_per_gpu_hour` is the price of a
    billed GPU-hour.
    """

    basis: Literal["rental", "owned", "unknown"]
    num_gpus: int
    billed_gpus: int
    nodes: int
    racks: int | None
    spare_nodes: int
    capex_usd: float | None
    usd_per_month: float | None
    usd_per_gpu_hour: float | None
    parts: dict[str, float]
    it_power_w: float | None
    facility_power_w: float | None
    price: GpuHour | None


def bill(
    system: System,
    num_gpus: int,
    terms: Terms = DEFAULT_TERMS,
    basis: Basis | None = None,
    usd_per_gpu_hour: float | None = None,
    *,
    replica_gpus: int | None = None,
) -> Bill:
    """Monthly bill (730 h) of `num_gpus` of `system`.

    Without a `basis` that of the terms decides, by default renting where a rental price is known, else owning.
    `usd_per_gpu_hour` replaces the price of a billed GPU-hour. GPUs that are not reserved are paid by the hour of
    `terms.demand` in steps of `replica_gpus`, by default a node.
    """
    refuse_unless(num_gpus >= 1, f"a bill needs at least 1 GPU, got {num_gpus}")
    price = gpu_hour(system, terms, basis)
    known: Basis | None = price.basis if price else (basis or "rental") if usd_per_gpu_hour is not None else None
    billed = billed_gpus(system, num_gpus, terms, known)
    per_rack, power_w = gpus_per_rack(system, terms.site), it_power_w_per_gpu(system)
    parts = _hourly_parts(system, terms, price, known, usd_per_gpu_hour)
    hours = billed * HOURS_PER_MONTH * _hours_share(terms, known, billed, replica_gpus or system.gpus_per_node)
    monthly = {name: usd * hours for name, usd in parts.items()}
    return Bill(
        known or "unknown",
        num_gpus,
        billed,
        math.ceil(billed / system.gpus_per_node),
        None if per_rack is None else math.ceil(billed / per_rack),
        terms.spares.nodes_plus if known == "owned" else 0,
        _capex_usd(system, terms, known, billed),
        math.fsum(monthly.values()) if parts else None,
        price.usd if price and usd_per_gpu_hour is None else usd_per_gpu_hour,
        monthly,
        None if power_w is None else power_w * billed,
        None if power_w is None else power_w * billed * terms.site.pue,
        price,
    )


def hourly_usd(
    system: System, num_gpus: int, terms: Terms = DEFAULT_TERMS, *, replica_gpus: int | None = None
) -> float | None:
    """The bill per hour: price of a GPU-hour x billed GPUs, less what is not paid for at quiet hours; None unpriced."""
    price = gpu_hour(system, terms)
    if price is None:
        return None
    billed = billed_gpus(system, num_gpus, terms, price.basis)
    return price.usd * billed * _hours_share(terms, price.basis, billed, replica_gpus or system.gpus_per_node)


def billed_gpus(system: System, num_gpus: _Count, terms: Terms = DEFAULT_TERMS, basis: Basis | None = None) -> _Count:
    """GPUs that are paid for when `num_gpus` (a count or an array of counts) are used.

    Owned: whole nodes plus spare nodes, then whole racks where the scale-up domain is one. Rented, or of unknown
    price: by `renting.sold_by`.

    >>> from planner.hardware import system
    >>> billed_gpus(system("h100-sxm"), 12, basis="owned"), billed_gpus(system("gb200-nvl72"), 8, basis="owned")
    (16, 72)
    """
    per_node, per_rack = system.gpus_per_node, system.scale_up.size if is_rack_scale(system) else system.gpus_per_node
    if basis == "owned":
        return _rounded(_rounded(num_gpus, per_node) + terms.spares.nodes_plus * per_node, per_rack)
    return _rounded(num_gpus, {"gpu": 1, "node": per_node, "rack": per_rack}[terms.renting.sold_by])


def monthly_usd(
    system: System,
    num_gpus: Any,
    terms: Terms = DEFAULT_TERMS,
    basis: Basis | None = None,
    quote_usd: Any = None,
    *,
    replica_gpus: int | None = None,
) -> Any:
    """`bill(...).usd_per_month` for arrays of GPU counts and of quotes, which broadcast `[...]`; None without a price.

    `quote_usd` replaces the quote of `system`: $ per GPU-hour where GPUs are rented, the discount of a commitment
    included, $ per GPU where they are bought. `replica_gpus` as in `bill`.
    """
    price = gpu_hour(system, terms, basis)
    known = price.basis if price else basis
    if known is None or (price is None and quote_usd is None):
        return None
    gpus = np.asarray(num_gpus)
    refuse_unless(bool((gpus >= 1).all()), "a bill needs at least 1 GPU")
    billed = billed_gpus(system, gpus, terms, known)
    hourly: Any = price.usd if price else 0.0
    if quote_usd is not None:
        hourly = np.asarray(quote_usd, dtype=float)
        if known == "owned":
            power_w = it_power_w_per_gpu(system)
            if power_w is None:
                return None
            free = owned_cost(0.0, power_w, terms).usd_per_gpu_hour
            hourly = free + hourly * (owned_cost(1.0, power_w, terms).usd_per_gpu_hour - free)
    step = replica_gpus or system.gpus_per_node
    return hourly * billed * HOURS_PER_MONTH * _each(lambda n: _hours_share(terms, known, n, step), billed)


def _each(function: Callable[[int], float], counts: Any) -> Any:
    """`function` of every count, evaluated once per distinct one."""
    distinct, where = np.unique(counts, return_inverse=True)
    return np.array([function(int(count)) for count in distinct])[where].reshape(np.shape(counts))


def _rounded(count: _Count, unit: int) -> _Count:
    return -(-count // unit) * unit


def _hours_share(terms: Terms, basis: str | None, billed: int, step_gpus: int) -> float:
    """Share of the month that billed GPUs are paid for."""
    if terms.renting.reserved or basis == "owned":
        return 1.0
    return _fleet_share(terms.demand, billed, min(step_gpus, billed))


@lru_cache(maxsize=4096)
def _fleet_share(demand: DemandProfile, num_gpus: int, step_gpus: int) -> float:
    return demand.fleet_share(num_gpus, step_gpus)


def _hourly_parts(
    system: System, terms: Terms, price: GpuHour | None, basis: Basis | None, usd_per_gpu_hour: float | None
) -> dict[str, float]:
    """$ per billed GPU-hour by part; empty when no price is known."""
    if usd_per_gpu_hour is not None:
        not_negative("price of a GPU-hour", usd_per_gpu_hour)
        return {basis or "rental": usd_per_gpu_hour}
    purchase, power_w = terms.prices(system).purchase_usd_per_gpu(), it_power_w_per_gpu(system)
    if basis == "owned" and purchase is not None and power_w is not None:
        return owned_cost(purchase.usd, power_w, terms).parts
    return {} if price is None else {price.basis: price.usd}


def _capex_usd(system: System, terms: Terms, basis: Basis | None, billed: int) -> float | None:
    """Capital of the billed GPUs: none where they are rented, None where nobody knows."""
    purchase = terms.prices(system).purchase_usd_per_gpu()
    if basis != "owned":
        return 0.0 if basis else None
    return None if purchase is None else capex_usd_per_gpu(purchase.usd, terms) * billed
