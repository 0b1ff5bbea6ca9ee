"""The flow: behaviour of a replica, replicas wanted, the day with and without autoscaler and failures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from planner.deployment import Deployment
from planner.economics import GpuHour, Terms, billed_gpus, gpu_hour
from planner.errors import InputError, MissesSlo
from planner.failures.readiness import Readiness
from planner.failures.recovery import Sourced, recovery
from planner.failures.risk import group_mttf_s
from planner.failures.settings import RecoverySettings
from planner.fleet.behaviour import Behaviour, measure
from planner.fleet.day import Day, Hour, Outage, live
from planner.fleet.scaling import Policy
from planner.reliability import ready_by_source
from planner.units import HOUR_S, format_seconds
from planner.workload import Slo, Workload

STEP_S = 60.0
"""Step of the day, and how late an autoscaler knows the load."""
_MOST_DAYS = 366
_SEES_IN_FLIGHT = ("least_requests", "power_of_two")


@dataclass(frozen=True, slots=True)
class FleetQuestion:
    """A replica (`deployment`, one of them), its `workload`, the promise, the day, failures, terms of payment.

    `availability` is the share of the time in which enough replicas work; `num_days` are simulated.
    """

    deployment: Deployment
    workload: Workload
    slo: Slo
    day: Day
    mtbf_gpu: Sourced
    recovery: RecoverySettings
    terms: Terms
    availability: float = 0.999
    num_days: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Fleet:
    """The answer. `scaled` and `fixed` are the hours with an autoscaler and of a fleet that fits the peak all day;
    `unfailing` is `scaled` where nothing ever fails, and needs no spare replicas.

    `wanted` replicas meet the peak, `available` is what the cluster holds; `price` is None when nobody published one.
    """

    question: FleetQuestion
    behaviour: Behaviour
    readiness: Readiness
    policy: Policy
    outage: Outage
    wanted: int
    available: int
    scaled: tuple[Hour, ...]
    fixed: tuple[Hour, ...]
    unfailing: tuple[Hour, ...]
    price: GpuHour | None

    @property
    def replica_gpus(self) -> int:
        """GPUs of a replica."""
        return self.question.deployment.layout.replica_gpus

    @property
    def num_fixed(self) -> int:
        """Replicas of the fleet that does not scale."""
        return min(self.wanted, self.available)

    @property
    def meets_slo(self) -> bool:
        """Every objective holds in every hour of the fleet with an autoscaler."""
        return all(self.meets(hour) for hour in self.scaled)

    def meets(self, hour: Hour) -> bool:
        """Every objective holds over the requests of `hour`."""
        return all(self.value_s(hour, o.metric, o.statistic) <= o.limit_s for o in self.question.slo.objectives)

    def value_s(self, hour: Hour, metric: str, statistic: str) -> float:
        """A statistic of a latency over the requests of `hour` [s]."""
        if statistic == "mean":
            return hour.means_s[("ttft", "tpot", "e2e").index(metric)]
        return hour.percentile_s(metric, float(statistic.removeprefix("p")) / 100)

    def gpu_hours(self, hours: tuple[Hour, ...]) -> float:
        """GPU-hours of a day."""
        return math.fsum(hour.replica_hours for hour in hours) * self.replica_gpus

    def usd_per_day(self, hours: tuple[Hour, ...]) -> float | None:
        """$ of a day: GPUs rented by the hour cost what the hours hold, at the list price; reserved and own ones cost
        their peak all day, at the price of the terms."""
        if self.price is None:
            return None
        system, terms = self.question.deployment.cluster.system, self.question.terms
        if hours is not self.fixed and self.price.basis == "rental":
            listed = gpu_hour(system, replace(terms, renting=replace(terms.renting, commit_discount=0.0)))
            return self.gpu_hours(hours) * (listed or self.price).usd
        most = max(hour.most_replicas for hour in hours) * self.replica_gpus
        return billed_gpus(system, most, terms, self.price.basis) * 24 * self.price.usd


def plan_fleet(question: FleetQuestion, progress: Callable[[float], None] | None = None) -> Fleet:
    """How many GPUs `question` takes by hour, what users see, what autoscaling saves and what failures cost.

    Raises MissesSlo when no load of a replica keeps the promise, and InputError on impossible numbers.
    """
    _check(question)
    deployment = question.deployment
    behaviour = measure(deployment, question.workload, question.slo, seed=question.seed, progress=progress)
    most_per_s = _most_per_s(question, behaviour)
    ready = ready_by_source(deployment, question.recovery)[question.recovery.load_from]
    mttf_s = group_mttf_s(question.mtbf_gpu.value, deployment.layout.replica_gpus)
    detect_s = question.recovery.detect.value
    outage = Outage(mttf_s, detect_s + ready.total_s, detect_s, deployment.router not in _SEES_IN_FLIGHT)
    policy = policy_of(question, behaviour, ready.total_s, outage)
    peak = Policy(most_per_s, 1.0, policy.spare, policy.most * 1000, 0.0, 0.0, 0.0).wanted(question.day.peak_per_s)
    fixed = min(peak, policy.most)
    day, days = question.day, question.num_days

    def lived(policy: Policy, fixed: int | None, outage: Outage | None) -> tuple[Hour, ...]:
        return live(behaviour, day, policy, fixed=fixed, outage=outage, num_days=days, step_s=STEP_S)

    return Fleet(
        question,
        behaviour,
        ready,
        policy,
        outage,
        peak,
        policy.most,
        lived(policy, None, outage),
        lived(policy, fixed, outage),
        lived(replace(policy, spare=0), None, None),
        gpu_hour(deployment.cluster.system, question.terms),
    )


def _most_per_s(question: FleetQuestion, behaviour: Behaviour) -> float:
    """Load of a replica that keeps the promise [requests/s]; MissesSlo when there is none."""
    most_per_s = behaviour.most_per_s()
    if most_per_s:
        return most_per_s
    values = {o: float(behaviour.statistic(o)[0]) for o in question.slo.objectives}
    worst = max(values, key=lambda o: values[o] / o.limit_s)
    raise MissesSlo(
        f"{question.deployment.layout}: {worst.name} is {format_seconds(values[worst])} at "
        f"{behaviour.loads_per_s[0]:.3g} requests/s per replica already, the limit is {format_seconds(worst.limit_s)}",
        ["a layout with more GPUs per replica (`moeplan plan` finds one)", "a looser --slo"],
    )


def policy_of(question: FleetQuestion, behaviour: Behaviour, ready_s: float, outage: Outage) -> Policy:
    """Replicas at the highest load that keeps the promise, with headroom for what the load grows while one starts.

    Spare replicas make up for those that are away, with the wanted probability, at the busiest hour.
    """
    most_per_s = behaviour.most_per_s()
    available = question.deployment.cluster.num_gpus // question.deployment.layout.replica_gpus
    headroom = question.day.steepest(ready_s + 2 * STEP_S, STEP_S, most_per_s)
    busy = min(available, math.ceil(question.day.peak_per_s / most_per_s))
    drain = recovery(question.deployment.engine).drain
    e2e_p99_s = float(behaviour.quantiles_s[-1, 2, -2])
    drain_s = min(e2e_p99_s, drain.value) if drain else e2e_p99_s
    spare = spare_replicas(busy * outage.mttr_s / outage.mttf_s, question.availability)
    return Policy(most_per_s, headroom, spare, available, ready_s, drain_s, STEP_S)


def spare_replicas(mean_away: float, availability: float) -> int:
    """Fewest replicas that make up for a Poisson number of absent ones with probability `availability`.

    >>> spare_replicas(0.5, 0.999), spare_replicas(0.0, 0.999)
    (4, 0)
    """
    term = total = math.exp(-mean_away)
    spares = 0
    while total < availability:
        spares += 1
        term *= mean_away / spares
        total += term
    return spares


def _check(question: FleetQuestion) -> None:
    layout, cluster = question.deployment.layout, question.deployment.cluster
    if layout.replicas > 1:
        raise InputError(
            f"--layout {layout}: the load decides how many replicas there are. Leave out replicas={layout.replicas}."
        )
    if not 1 <= question.num_days <= _MOST_DAYS:
        raise InputError(f"--days {question.num_days}: from 1 to {_MOST_DAYS}")
    if not 0 < question.day.peak_per_s < math.inf:
        raise InputError(f"--rate {question.day.peak_per_s:g}: requests per second above 0 in the busiest hour")
    if cluster.num_gpus // layout.replica_gpus / question.mtbf_gpu.value * HOUR_S > 500:
        raise InputError(
            f"a GPU that fails every {question.mtbf_gpu.value:g} s: no such fleet works. Raise --mtbf-gpu."
        )
