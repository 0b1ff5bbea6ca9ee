"""Power of nodes and what they take of a machine room: watts, racks, energy per token."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.economics.refusal import not_negative, within
from planner.economics.terms import Site
from planner.hardware import System
from planner.units import HOUR_S

NODE_OVERHEAD = 10_200.0 / (8 * 700.0)
"""Node power over the sum of its GPUs' limits: the 10.2 kW node of 8 x 700 W H100 (serving.md 10.1)."""
_TOKENS_PER_MTOK = 1e6
_W_PER_MW = 1e6
_ROUNDING = 1e-9
_LARGEST_RACK_GPUS = 144
"""A scale-up domain of more GPUs is a pod of many racks, of which slices are sold (TPU)."""


@dataclass(frozen=True, slots=True)
class Energy:
    """Power at the facility and energy of a token, twice: provisioned (the site reserves it, whatever is used) and
    scaled (P_idle + (P_max - P_idle) x utilisation). Rates are means over the same period as the utilisation."""

    provisioned_w: float
    scaled_w: float
    kwh_per_mtok_provisioned: float | None
    kwh_per_mtok_scaled: float | None
    tok_per_s_per_mw_provisioned: float
    tok_per_s_per_mw_scaled: float


def it_power_w_per_gpu(system: System) -> float | None:
    """Provisioned power per GPU with its share of the node [W]; None when neither node nor GPU power is known.

    Without a published node power the GPU's limit is scaled by `NODE_OVERHEAD`.
    """
    if system.node_power_w is not None:
        return system.node_power_w / system.gpus_per_node
    return None if system.gpu.tdp_w is None else system.gpu.tdp_w * NODE_OVERHEAD


def scaled_power_w(idle_w: float, max_w: float, utilisation: float) -> float:
    """Power at partial load: P_idle + (P_max - P_idle) u (serving.md 10.1)."""
    within("utilisation", utilisation, 0.0, 1.0)
    return idle_w + (max_w - idle_w) * utilisation


def kwh_per_mtok(it_power_w: float | None, tok_per_s: float, pue: float = 1.2) -> float | None:
    """Energy at the facility per million tokens: kW x PUE x 1e6 / (3600 x tok/s); both arguments per GPU or both total.

    >>> round(kwh_per_mtok(10_200 / 8, 1_850), 4)
    0.2297
    """
    not_negative("tokens per second", tok_per_s)
    if it_power_w is None or tok_per_s == 0:
        return None
    return it_power_w / 1e3 * pue * _TOKENS_PER_MTOK / (HOUR_S * tok_per_s)


def tok_per_s_per_mw(tok_per_s: float, power_w: float | None) -> float | None:
    """Tokens per second and megawatt; the power says whether that is a megawatt of IT or of the facility.

    >>> tok_per_s_per_mw(14_800, 10_200 * 1.25)
    1160784.3137254901
    """
    return None if not power_w else tok_per_s * _W_PER_MW / power_w


def energy(it_power_w: float, mean_tok_per_s: float, utilisation: float, site: Site) -> Energy:
    """Energy of a fleet of `it_power_w` that gives `mean_tok_per_s` while busy for the share `utilisation`."""
    provisioned = it_power_w * site.pue
    scaled = scaled_power_w(site.idle_share * provisioned, provisioned, utilisation)
    return Energy(
        provisioned,
        scaled,
        kwh_per_mtok(provisioned, mean_tok_per_s, 1.0),
        kwh_per_mtok(scaled, mean_tok_per_s, 1.0),
        tok_per_s_per_mw(mean_tok_per_s, provisioned) or 0.0,
        tok_per_s_per_mw(mean_tok_per_s, scaled) or 0.0,
    )


def is_rack_scale(system: System) -> bool:
    """Its scale-up domain is one rack of several nodes, bought whole (GB200 NVL72)."""
    return system.gpus_per_node < system.scale_up.size <= _LARGEST_RACK_GPUS


def gpus_per_rack(system: System, site: Site) -> int | None:
    """GPUs of a rack: the scale-up domain where it is a rack, else the nodes that `rack_kw` feeds, at least one.

    None where the power of a node is unknown.
    """
    if is_rack_scale(system):
        return system.scale_up.size
    power_w = it_power_w_per_gpu(system)
    if power_w is None:
        return None
    node_kw = power_w * system.gpus_per_node / 1e3
    return max(1, math.floor(site.rack_kw / node_kw + _ROUNDING)) * system.gpus_per_node
