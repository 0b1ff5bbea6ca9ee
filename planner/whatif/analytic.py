"""The answer within a second: best layout, latency, throughput and price with intervals, and what else was near."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import exp, sqrt

import numpy as np

from planner.economics import gpu_hour
from planner.facts.certainty import chance, ratios_of
from planner.facts.experts import BINDING_DROPS
from planner.hardware import system, systems
from planner.steptime import StepTime
from planner.units import format_bytes, format_chance, format_seconds, format_usd, significant
from planner.validation.intervals import Z_80, Ratios
from planner.whatif.catalogue import LOAD, Estimate, best, estimates, layout_text, objectives
from planner.whatif.drops import dropped
from planner.whatif.misfit import reason
from planner.whatif.question import Problem, Question, ask
from planner.whatif.scenario import Scenario

_ESTIMATE_SPREAD = 0.329
"""Standard deviation of the logarithm of simulated over estimated objectives: the middle half was 0.77 to 1.2 on 140
random layouts (`python benchmarks/estimates.py`, docs/architecture.md, 2026-11-22); ln(1.2 / 0.77) / (2 x 0.6745)."""
BORDERLINE = 1.25
"""Estimates of up to this much over a limit may hold in the simulation."""
_METRIC_OF = {"ttft": "ttft", "tpot": "tpot", "e2e": "tpot"}
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "End to end"}


@dataclass(frozen=True, slots=True)
class Tile:
    """A number of the headline: what it counts, its 80 % interval and what it rests on, as text."""

    label: str
    value: str
    counts: str
    interval: str
    origin: str

    @property
    def note(self) -> str:
        """Interval and what is counted, below the number."""
        return f"80 %: {self.interval}  \n{self.counts}" if self.interval else self.counts

    @property
    def help(self) -> str:
        """What is counted and what it rests on, when hovered."""
        return f"{self.counts[:1].upper()}{self.counts[1:]}." + (f"  \nRests on: {self.origin}." if self.origin else "")


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What the page shows of a question. `chosen` is None where nothing fits; steps are at its operating point."""

    question: Question
    chosen: Estimate | None
    found: tuple[Estimate, ...]
    misfits: tuple[tuple[float, str], ...]
    decode: StepTime | None
    prefill: StepTime | None
    drop_rate: dict[str, float]
    offered_gpus: int

    @property
    def drops(self) -> bool:
        """A capacity limit drops so much routed work that latencies are those of another model."""
        return max(self.drop_rate.values(), default=0.0) > BINDING_DROPS

    @property
    def is_good(self) -> bool:
        """The SLO is expected to hold, and not by dropping work."""
        return self.meets_slo and not self.drops

    @property
    def meets_slo(self) -> bool:
        """The chosen layout is expected to meet the SLO."""
        return self.chosen is not None and self.chosen.meets_slo

    @property
    def origin_share(self) -> dict[str, float]:
        """Share of the decode step by origin of its times."""
        return self.decode.origin_share() if self.decode else {}


@lru_cache(maxsize=128)
def answer(scenario: Scenario) -> Answer | tuple[Problem, ...]:
    """The analytic answer, or what is wrong with the scenario."""
    question = ask(_pinned(_whole_nodes(scenario)))
    if not isinstance(question, Question):
        return question
    found, misfits = estimates(question)
    chosen = best(found)
    decode = prefill = None
    lost: dict[str, float] = {}
    if chosen is not None:
        decode, prefill = operating_point(question, chosen)
        lost = dropped(chosen)
    return Answer(question, chosen, tuple(found), tuple(misfits), decode, prefill, lost, scenario.gpus)


def _whole_nodes(scenario: Scenario) -> Scenario:
    """The offer without the GPUs of a broken node beyond the first: never more than were offered."""
    per_node = system(scenario.system).gpus_per_node if scenario.system in systems() else 1
    whole = scenario.gpus // per_node * per_node
    return replace(scenario, gpus=whole) if whole else scenario


def _pinned(scenario: Scenario) -> Scenario:
    """Under a capacity limit, whose draws are slow, the layout that is best without it."""
    if not scenario.capacity_factor or scenario.layout or not isinstance(ask(scenario), Question):
        return scenario
    free = answer(replace(scenario, capacity_factor=0.0))
    if not isinstance(free, Answer) or free.chosen is None:
        return scenario
    deployment = free.chosen.candidate.deployment
    return replace(scenario, layout=layout_text(deployment.layout), backend=deployment.backend)


def operating_point(question: Question, chosen: Estimate) -> tuple[StepTime, StepTime]:
    """Decode step at the running batch, and a prefill step of the mean prompt or the token budget."""
    deployment, workload = chosen.candidate.deployment, question.workload
    cost = deployment.cost()
    context = workload.mean_prompt_tokens + workload.mean_output_tokens / 2
    chunk = min(workload.mean_prompt_tokens, float(deployment.limits.max_batched_tokens))
    batch = max(1.0, round(chosen.candidate.batch))
    return cost.decode(np.array(batch), np.array(context)), cost.prefill(np.array(chunk), ranks=1.0)


def with_layout(found: Answer, identity: str) -> Scenario:
    """The question with the layout of a point of `front`, in as few replicas as the demand takes, else in all."""
    layout, backend, kv = identity.split("/")
    alike = [e for e in found.found if (e.kind.key, e.kind.deployment.backend) == (layout, backend)]
    chosen = best([e for e in alike if e.kind.deployment.model.kv_format == kv])
    text = layout_text(chosen.candidate.deployment.layout) if chosen else layout
    bare = replace(found.question.scenario, kv=kv, backend="" if backend == "all_reduce" else backend)
    return replace(bare, layout=text)


def command(found: Answer) -> str:
    """The command that simulates the chosen layout, or plans where there is none."""
    if found.chosen is None:
        return found.question.scenario.command()
    deployment = found.chosen.candidate.deployment
    limits = deployment.limits.max_num_seqs, deployment.limits.max_batched_tokens
    scenario = replace(found.question.scenario, kv=deployment.model.kv_format)
    return scenario.command(layout=layout_text(deployment.layout), backend=deployment.backend, limits=limits)


def plan_command(found: Answer) -> str:
    """The command that searches every layout."""
    return replace(found.question.scenario, layout="", backend="", seqs=0, tokens=0).command()


def headline(found: Answer) -> str:
    """Verdict in one line."""
    question, chosen = found.question, found.chosen
    where = f"{question.cluster.num_gpus} x {question.cluster.system.gpu.name}"
    if found.offered_gpus > question.cluster.num_gpus:
        where += f" ({found.offered_gpus} offered, whole nodes of {question.cluster.gpus_per_node} are used)"
    if chosen is None:
        fits = "does not fit" if found.misfits and np.isfinite(found.misfits[0][0]) else "cannot be run as asked on"
        return f"{question.model.name} {fits} {where}: {reason(question, found.misfits)}"
    layout, ratio = chosen.candidate.deployment.layout, chosen.worst[1]
    gpus = f"{chosen.num_gpus} of {where}" if chosen.num_gpus < question.cluster.num_gpus else where
    if chosen.meets_slo:
        usd = chosen.usd_per_mtok_output
        price = f", {format_usd(usd)}/Mtok output" if usd is not None else ""
        tightest = "load" if chosen.worst[0] == LOAD else limit_name(chosen)
        limit = "capacity" if chosen.worst[0] == LOAD else "its limit"
        verdict = (
            f"would keep the limits only by dropping work ({_lost(found)})"
            if found.drops
            else "expected to meet the SLO"
        )
        return f"{layout} on {gpus}: {verdict}, {tightest} at {ratio:.0%} of {limit}{price}"
    also = f"; the capacity limit drops work ({_lost(found)})" if found.drops else ""
    if chosen.worst[0] == LOAD:
        return f"{layout} on {gpus}: cannot carry the load, {ratio:.2f} x what it sustains{also}"
    return f"{layout} on {gpus}: expected to miss the SLO, {limit_name(chosen)} at {ratio:.2f} x its limit{also}"


def _lost(found: Answer) -> str:
    shares = ", ".join(f"{share:.1%} in {phase}" for phase, share in found.drop_rate.items())
    return f"{shares} of all routed assignments"


def limit_name(chosen: Estimate) -> str:
    """The tightest objective as people say it: `TPOT p95`."""
    name = chosen.worst[0]
    metric, _, statistic = name.partition("_")
    return f"{_NAMES[metric]} {statistic}"


def tiles(found: Answer) -> list[Tile]:
    """Headline numbers of the chosen layout."""
    question, chosen = found.question, found.chosen
    if chosen is None:
        return []
    origin, candidate = _origin(found), chosen.candidate
    tiles = [*(_latency(found, name, *pair) for name, pair in _objectives(found).items()), _per_user(found)]
    per_gpu = chosen.output_tok_per_s / chosen.num_gpus
    rate = chosen.output_tok_per_s / question.workload.mean_output_tokens
    load = f"output tokens at {significant(rate)} requests/s, {chosen.ratios[LOAD]:.0%} of capacity"
    slow, fast = _carried(found)
    spread = f"{_spread(significant(per_gpu * slow), significant(per_gpu * fast))} tok/s/GPU"
    tiles.append(Tile("Throughput", f"{significant(per_gpu)} tok/s/GPU", load, spread, origin))
    price = gpu_hour(question.cluster.system)
    source = f"{price.basis} {format_usd(price.usd)} per GPU-hour, {price.provider} {price.as_of}" if price else ""
    usd = "unknown" if chosen.usd_per_mtok_output is None else format_usd(chosen.usd_per_mtok_output)
    hourly = f", {format_usd(price.usd * chosen.num_gpus)}/h" if price else ""
    paid = chosen.usd_per_mtok_output
    spread = "" if paid is None else _spread(format_usd(paid / fast), format_usd(paid / slow))
    counts = f"output tokens at this load{hourly}"
    tiles.append(Tile("Price per Mtok", usd, counts, spread, source or "no price on record"))
    low, high = _bounds(found, "output_tok_s_per_gpu", candidate.capacity_per_s)
    capacity = Tile(
        "Carries at most",
        f"{significant(candidate.capacity_per_s)} req/s",
        "all replicas, SLO aside",
        f"{significant(low)} to {significant(high)} req/s",
        origin,
    )
    return [*tiles, capacity]


def chance_of_slo(found: Answer) -> float | None:
    """Chance that the least sure objective holds, errors of estimate and calibration together."""
    if found.chosen is None or found.chosen.ratios[LOAD] > 1:
        return None if found.chosen is None else 0.0
    pairs = _objectives(found).items()
    return min((chance(value, limit, _widened(found, _METRIC_OF[n.split("_")[0]])) for n, (value, limit) in pairs))


def sure_sentence(found: Answer) -> str:
    """Chance and origin of the estimate in words."""
    sure, share = chance_of_slo(found), found.origin_share
    parts = ", ".join(f"{value:.0%} {name}" for name, value in share.items() if value >= 0.005)
    if sure is None:
        return ""
    return (
        f"Chance that a real server keeps every limit: {format_chance(sure)}. This is a closed-form estimate; "
        f"simulate it to narrow the interval. The predicted decode time is {parts}."
    )


def borderline(found: Answer) -> list[Estimate]:
    """Layouts on fewer GPUs than the chosen one that miss by so little that only a simulation can tell."""
    if not found.meets_slo or found.chosen is None:
        return []
    near: dict[int, Estimate] = {}
    for each in sorted(found.found, key=lambda e: e.worst[1]):
        if each.num_gpus < found.chosen.num_gpus and 1.0 < each.worst[1] <= BORDERLINE:
            near.setdefault(each.num_gpus, each)
    return sorted(near.values(), key=lambda e: e.num_gpus)


def borderline_sentence(near: Estimate) -> str:
    """What to do about a layout that is too close to its limit for an estimate."""
    return (
        f"**{near.num_gpus} GPUs may do:** {near.candidate.name} is estimated at {near.worst[1]:.2f} x its tightest "
        "limit, too close to call without a simulation."
    )


def memory_line(found: Answer) -> str:
    """How many tokens the caches of the chosen layout hold."""
    if found.chosen is None:
        return ""
    use = found.chosen.candidate.deployment.memory
    return f"{use.kv_tokens:,} cached tokens per rank at {format_bytes(use.kv_bytes_per_token)} each"


def _objectives(found: Answer) -> dict[str, tuple[float, float]]:
    assert found.chosen is not None
    return objectives(found.chosen.candidate, found.question.slo, found.question.workload.mean_output_tokens)


def _latency(found: Answer, name: str, value: float, limit: float) -> Tile:
    metric, _, statistic = name.partition("_")
    ratios = _widened(found, _METRIC_OF[metric])
    bounds = f"{format_seconds(value * ratios.low)} to {format_seconds(value * ratios.high)}"
    counts = f"all requests, limit {format_seconds(limit)}"
    return Tile(f"{_NAMES[metric]} {statistic}", format_seconds(value), counts, bounds, _origin(found))


def _spread(low: str, high: str) -> str:
    """Two bounds as text; one where an open load that is carried anyway sets the number."""
    return f"{low} to {high}" if low != high else f"set by the load, {low}"


def _per_user(found: Answer) -> Tile:
    """Rate at which one user reads, from the mean time per output token."""
    assert found.chosen is not None
    rate, ratios = 1 / found.chosen.candidate.tpot_s, _widened(found, "tpot")
    bounds = f"{significant(rate / ratios.high)} to {significant(rate / ratios.low)} tok/s"
    counts = "output tokens per user, from the mean TPOT"
    return Tile("Per user", f"{significant(rate)} tok/s", counts, bounds, _origin(found))


def _carried(found: Answer) -> tuple[float, float]:
    """80 % bounds of throughput over its estimate: an open load is never exceeded, and reached while it is carried."""
    assert found.chosen is not None
    ratios, used = _widened(found, "output_tok_s_per_gpu"), found.chosen.ratios[LOAD]
    if found.question.workload.arrivals.concurrency:
        return ratios.low, ratios.high
    most = max(1.0, used)
    return min(most, ratios.low * most / used), min(most, ratios.high * most / used)


def _origin(found: Answer) -> str:
    share = found.origin_share
    most = max(share, key=lambda name: share[name]) if share else "unknown"
    return f"{share.get(most, 0.0):.0%} {most}"


def _bounds(found: Answer, metric: str, value: float) -> tuple[float, float]:
    ratios = _widened(found, metric)
    return value * ratios.low, value * ratios.high


def _widened(found: Answer, metric: str) -> Ratios:
    """80 % interval of measured over estimated: errors of the calibrated model and of the closed form, independent."""
    assert found.chosen is not None
    known = ratios_of(found.chosen.candidate.deployment, metric, found.origin_share)
    middle = known.log_middle
    spread = sqrt(known.log_spread**2 + _ESTIMATE_SPREAD**2)
    return Ratios(exp(middle - Z_80 * spread), exp(middle + Z_80 * spread), known.num_points, known.num_combinations)
