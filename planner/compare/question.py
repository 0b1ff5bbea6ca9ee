"""What is compared: models with their demand and SLO, and the clusters that are offered for them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from planner.economics import DEFAULT_TERMS, Terms
from planner.engine import Engine
from planner.errors import InputError
from planner.experts import AS_SERVED, ExpertSettings
from planner.hardware import Cluster, System, parse_cluster
from planner.model import ModelConfig
from planner.workload import Slo, Workload

Basis = Literal["rental", "owned"]

MAX_ERROR = 1.0
_BASIS_OF: dict[str, Basis] = {"rent": "rental", "own": "owned"}
_TEXT_OF = {basis: text for text, basis in _BASIS_OF.items()}
_ITEM = re.compile(r"(?P<name>[a-z]+)=(?P<percent>[0-9]+(?:\.[0-9]+)?)%")


@dataclass(frozen=True, slots=True)
class Demand:
    """A model, what its users send, and the SLO they are promised."""

    model: ModelConfig
    workload: Workload
    slo: Slo


@dataclass(frozen=True, slots=True)
class DemandError:
    """Half widths of 80 % intervals of what users will really send, as shares. Assumed unless the user states them."""

    rate: float = 0.20
    prompt: float = 0.10
    output: float = 0.10

    def __str__(self) -> str:
        return f"request rate +-{self.rate:.0%}, prompts +-{self.prompt:.0%}, outputs +-{self.output:.0%}"


@dataclass(frozen=True, slots=True)
class Offer:
    """A cluster that competes. `is_open` says that only the system was named: as many nodes as the demand takes.

    `basis` is how it is paid, None for what the terms say.
    """

    cluster: Cluster
    is_open: bool
    basis: Basis | None = None

    @property
    def name(self) -> str:
        """As the user named it."""
        name = self.cluster.system.name if self.is_open else self.cluster.name
        return name if self.basis is None else f"{name}@{_TEXT_OF[self.basis]}"

    @property
    def hardware(self) -> tuple[Cluster, bool]:
        """What is offered, whoever pays for it how."""
        return self.cluster, self.is_open

    @property
    def billed_system(self) -> System:
        """The node that is billed: a fixed cluster that is `@own` has nodes of the GPUs it is written with."""
        system, size = self.cluster.system, self.cluster.gpus_per_node
        if self.is_open or self.basis != "owned" or size >= system.gpus_per_node:
            return system
        power_w = None if system.node_power_w is None else system.node_power_w * size / system.gpus_per_node
        link = replace(system.scale_up, size=min(system.scale_up.size, size))
        return replace(system, gpus_per_node=size, node_power_w=power_w, scale_up=link)


@dataclass(frozen=True, slots=True)
class Question:
    """Everything that all offers share."""

    demands: tuple[Demand, ...]
    engine: Engine
    experts: tuple[ExpertSettings, ...] = (AS_SERVED,)
    kv_formats: tuple[str, ...] | None = None
    router: str = "least_requests"
    seed: int = 0
    terms: Terms = DEFAULT_TERMS
    demand_error: DemandError = field(default_factory=DemandError)


def parse_offers(texts: list[str], oversubscription: float = 1.0, rail_optimised: bool = True) -> tuple[Offer, ...]:
    """Offers from `h200-sxm` (open), `h200-sxm:4x8`, and `@rent` or `@own` behind either.

    InputError on fewer than one, on equal names, and on another word behind the @.
    """
    if not texts:
        raise InputError("no cluster is offered: give --cluster, such as --cluster h100-sxm --cluster b200-sxm:4x8")
    offers = [_offer(text, oversubscription, rail_optimised) for text in texts]
    names = [offer.name for offer in offers]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"--cluster {twice} is given twice: offer each cluster once")
    return tuple(offers)


def _offer(text: str, oversubscription: float, rail_optimised: bool) -> Offer:
    hardware, at, paid = text.partition("@")
    if at and paid not in _BASIS_OF:
        raise InputError(f"--cluster {text}: write @rent or @own behind it, or nothing")
    cluster = replace(parse_cluster(hardware), oversubscription=oversubscription, rail_optimised=rail_optimised)
    return Offer(cluster, ":" not in hardware, _BASIS_OF.get(paid))


def parse_demand_error(text: str | None) -> DemandError:
    """Error of the demand from `rate=20%,prompt=10%,output=10%`; InputError on an unknown name or number."""
    error = DemandError()
    for item in (text or "").split(",") if text else ():
        match = _ITEM.fullmatch(item.strip())
        if match is None or match["name"] not in DemandError.__slots__:
            raise InputError(f"--uncertain {item.strip()!r}: write rate=20%, prompt=10% or output=10%, with commas")
        share = float(match["percent"]) / 100
        if share >= MAX_ERROR:
            raise InputError(f"--uncertain {item.strip()}: an 80 % interval of +-{share:.0%} says nothing; use < 100%")
        error = replace(error, **{match["name"]: share})
    return error
