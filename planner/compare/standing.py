"""Where one offer stands: all models together, their GPUs, their bill, and both in worlds that differ from the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from planner.compare.entrant import LONGER, Entrant
from planner.compare.question import Demand, Offer
from planner.economics import Bill, Terms, bill, monthly_usd
from planner.hardware import System
from planner.sizing import Replica, Shift, capacity, demand_of, fewest, gpus_needed
from planner.workload import Slo

Floats = NDArray[np.float64]
_LENGTHS = ("prompt", "output")


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """How things may really be: factors, scalars or arrays `[draws]`, by offer name where they differ between offers.

    `time` and `ttft` are measured over predicted; `price` is on the price of a GPU-hour; `limits` is on the limits of
    the SLO by metric; `changes` names entries of `Curves.changed` that hold; `terms` replace those asked about.
    """

    rate: Floats | float = 1.0
    prompt: Floats | float = 1.0
    output: Floats | float = 1.0
    time: Mapping[str, Floats | float] = field(default_factory=dict)
    ttft: Mapping[str, Floats | float] = field(default_factory=dict)
    price: Mapping[str, Floats | float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    changes: tuple[str, ...] = ()
    terms: Terms | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """One offer with an entrant per model. `bill` is None where some model does not run."""

    offer: Offer
    demands: tuple[Demand, ...]
    entrants: tuple[Entrant, ...]
    terms: Terms
    bill: Bill | None
    problem: str

    @property
    def name(self) -> str:
        """As the user named the offer."""
        return self.offer.name

    @property
    def system(self) -> System:
        """What is bought or rented."""
        return self.offer.billed_system

    @property
    def num_gpus(self) -> int:
        """GPUs of the recommended layouts of all models."""
        return sum(entrant.num_gpus for entrant in self.entrants)

    @property
    def feasible(self) -> bool:
        """Every model fits, all together."""
        return not self.problem and all(entrant.feasible for entrant in self.entrants)

    @property
    def meets_slo(self) -> bool:
        """Every model meets its SLO, all together."""
        return not self.problem and all(entrant.meets_slo for entrant in self.entrants)

    @property
    def usd_per_month(self) -> float | None:
        """The bill; None where it is unknown."""
        return None if self.bill is None else self.bill.usd_per_month

    @property
    def order(self) -> tuple[bool, bool, float, int]:
        """Meeting the SLO first, then known prices, then the cheaper bill, then fewer GPUs."""
        usd = self.usd_per_month
        return (not self.meets_slo, usd is None, usd or 0.0, self.num_gpus)

    def gpus_in(self, world: World) -> NDArray[np.int64]:
        """GPUs that all models take in `world`, `[draws]`; -1 where the offer cannot serve it (estimate)."""
        total: NDArray[np.int64] = np.zeros((), dtype=np.int64)
        for demand, entrant in zip(self.demands, self.entrants, strict=True):
            one = _gpus(demand, entrant, world, self.name)
            total = np.where((total < 0) | (one < 0), -1, total + one)
        if not self.offer.is_open:
            total = np.where(total > self.offer.cluster.num_gpus, -1, total)
        return total

    @property
    def step_gpus(self) -> int:
        """GPUs by which a fleet that follows the demand grows: the largest replica of its models."""
        return _step_gpus(self.entrants)

    def usd_in(self, world: World, gpus: NDArray[np.int64] | None = None) -> Floats | None:
        """Dollars a month in `world`, `[draws]`; infinite where the offer cannot serve it; None without a price.

        `gpus` are `gpus_in(world)` where they are known already.
        """
        gpus = self.gpus_in(world) if gpus is None else gpus
        terms = self.terms if world.terms is None else replace(world.terms, basis=self.terms.basis)
        usd = monthly_usd(self.system, np.maximum(gpus, 1), terms, replica_gpus=self.step_gpus)
        if usd is None:
            return None
        return np.where(gpus < 0, np.inf, np.asarray(usd) * np.asarray(world.price.get(self.name, 1.0)))


def standing(offer: Offer, demands: tuple[Demand, ...], entrants: tuple[Entrant, ...], terms: Terms) -> Standing:
    """`offer` with its bill; a fixed cluster must hold all models side by side."""
    gpus = [entrant.num_gpus for entrant in entrants]
    terms, system = terms if offer.basis is None else replace(terms, basis=offer.basis), offer.billed_system
    problem = next((str(e.plan["headline"]) for e in entrants if not e.num_gpus), "")
    if not problem and not offer.is_open and sum(gpus) > offer.cluster.num_gpus:
        needs = " + ".join(f"{n} for {demand.model.name}" for n, demand in zip(gpus, demands, strict=True))
        problem = f"{offer.name} has {offer.cluster.num_gpus} GPUs; the models take {needs}"
    cost = None if any(n == 0 for n in gpus) else bill(system, sum(gpus), terms, replica_gpus=_step_gpus(entrants))
    return Standing(offer, demands, entrants, terms, cost, problem)


def _step_gpus(entrants: tuple[Entrant, ...]) -> int:
    layouts = [entrant.plan["layout"] for entrant in entrants if entrant.plan["layout"]]
    return max((layout["num_gpus"] // layout["replicas"] for layout in layouts), default=1)


def _gpus(demand: Demand, entrant: Entrant, world: World, name: str) -> NDArray[np.int64]:
    kinds = entrant.curves.every
    if not kinds:
        # Experts outside HBM have no curves: the plan stands as it is, for this demand only.
        meets = np.asarray(world.rate) <= entrant.carries
        return np.where(meets, entrant.num_gpus, -1)
    time, ttft = np.asarray(world.time.get(name, 1.0)), np.asarray(world.ttft.get(name, 1.0))
    rate = np.asarray(world.rate)
    shape = np.broadcast_shapes(time.shape, ttft.shape, rate.shape, np.shape(world.prompt), np.shape(world.output))
    load = np.broadcast_to(rate, (len(kinds), *shape)) / _relative_capacity(demand, entrant, world, len(shape))
    shift = Shift(np.broadcast_to(time, shape), np.broadcast_to(ttft, shape), load)
    slo, workload = _slo(demand.slo, world.limits), demand.workload
    gpus, _ = gpus_needed(kinds, demand_of(workload), slo, workload.mean_output_tokens, entrant.anchor, shift)
    return fewest(gpus)


def _relative_capacity(demand: Demand, entrant: Entrant, world: World, num_axes: int) -> Floats:
    """Capacity over that of the plan under other lengths and the changes of `world`, `[kinds, ...draws]`.

    Lengths act by the elasticity that a change of `LONGER` showed.
    """
    factor: Floats = np.ones((len(entrant.curves.every), *[1] * num_axes))
    for change, replicas in entrant.curves.changed:
        if change not in (*_LENGTHS, *world.changes):
            continue
        effect = _effect(demand, entrant, replicas).reshape(-1, *[1] * num_axes)
        if change in _LENGTHS:
            length = np.asarray(world.prompt if change == "prompt" else world.output)
            factor = factor * length ** (np.log(effect) / np.log(LONGER))
        else:
            factor = factor * effect
    return factor


def _effect(demand: Demand, entrant: Entrant, changed: tuple[Replica | None, ...]) -> Floats:
    """Capacity after a change over that before, of every kind; the median of the known for kinds not computed."""
    slo, output = demand.slo, demand.workload.mean_output_tokens
    known = {}
    for before, after in zip(entrant.curves.kept, changed, strict=True):
        nominal = float(capacity(before, slo, output))
        new = 0.0 if after is None else float(capacity(after, slo, output))
        if nominal > 0 and new > 0:
            known[before.key] = new / nominal
    usual = float(np.median(list(known.values()))) if known else 1.0
    return np.array([known.get(replica.key, usual) for replica in entrant.curves.every])


def _slo(slo: Slo, limits: Mapping[str, float]) -> Slo:
    if not limits:
        return slo
    return replace(
        slo,
        objectives=tuple(replace(o, limit_s=o.limit_s * limits.get(o.metric, 1.0)) for o in slo.objectives),
    )
