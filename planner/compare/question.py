"""What is compared: models with their demand and SLO, and the clusters that are offered for them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from planner.engine import Engine
from planner.errors import InputError
from planner.experts import AS_SERVED, ExpertSettings
from planner.hardware import Cluster, parse_cluster
from planner.model import ModelConfig
from planner.workload import Slo, Workload

MAX_ERROR = 1.0
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
    """A cluster that competes. `is_open` says that only the system was named: as many nodes as the demand takes."""

    cluster: Cluster
    is_open: bool

    @property
    def name(self) -> str:
        """As the user named it."""
        return self.cluster.system.name if self.is_open else self.cluster.name


@dataclass(frozen=True, slots=True)
class Question:
    """Everything that all offers share."""

    demands: tuple[Demand, ...]
    engine: Engine
    experts: tuple[ExpertSettings, ...] = (AS_SERVED,)
    kv_formats: tuple[str, ...] | None = None
    router: str = "least_requests"
    seed: int = 0
    demand_error: DemandError = field(default_factory=DemandError)


def parse_offers(texts: list[str], oversubscription: float = 1.0, rail_optimised: bool = True) -> tuple[Offer, ...]:
    """Offers from `h200-sxm` (open) or `h200-sxm:4x8`; InputError on fewer than one or on equal names."""
    if not texts:
        raise InputError("no cluster is offered: give --cluster, such as --cluster h100-sxm --cluster b200-sxm:4x8")
    offers = []
    for text in texts:
        cluster = replace(parse_cluster(text), oversubscription=oversubscription, rail_optimised=rail_optimised)
        offers.append(Offer(cluster, is_open=":" not in text))
    names = [offer.name for offer in offers]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"--cluster {twice} is given twice: offer each cluster once")
    return tuple(offers)


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
