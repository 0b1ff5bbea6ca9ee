"""Remedies of a question that cannot be met, as changes of the scenario, each checked by the same estimate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from planner.economics import gpu_hour
from planner.hardware import system, systems
from planner.search import MAX_OFFERED_GPUS
from planner.units import format_usd, significant
from planner.whatif.analytic import Answer, answer, limit_name
from planner.whatif.catalogue import LOAD, Estimate, curve, layout_text, objectives
from planner.whatif.misfit import reason
from planner.whatif.question import Question, ask
from planner.whatif.scenario import Scenario

_WEIGHTS = ("fp8", "int4_g128")
_SMALLER = 0.9
"""Weights count as smaller from here; other scales alone save less."""
_MOST = 5
_RIVALS = ("h200-sxm", "b200-sxm", "mi355x", "gb200-nvl72")
"""Systems that are tried where the asked one does not do: the measured ones with most memory, by price."""
_STEPS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Edit:
    """A change that makes the answer yes. `usd_per_hour` is None where no price is known."""

    text: str
    scenario: Scenario
    usd_per_hour: float | None


def edits(found: Answer) -> list[Edit]:
    """The first five changes that are found to make the answer good, cheapest first; empty where it is good already."""
    kept: dict[str, Edit] = {}
    for kind, text, changed in () if found.is_good else _tried(found):
        edit = None if kind in kept else _checked(text, changed)
        if edit is not None:
            kept[kind] = edit
        if len(kept) == _MOST:  # further systems, tried in the order of their price, cost half a second each
            break
    return sorted(kept.values(), key=lambda e: (e.usd_per_hour is None, e.usd_per_hour or 0.0))


def shortfall(found: Answer) -> str:
    """What breaks, and by how much."""
    if found.is_good:
        return ""
    if found.meets_slo:
        return "Dropped assignments change what the model answers: no latency here is that of the published model."
    if found.chosen is None:
        why = found.misfits[0][1] if found.misfits else reason(found.question, found.misfits)
        return f"Nearest: {why}." if found.misfits else f"{why[0].upper()}{why[1:]}."
    name, ratio = found.chosen.worst
    if name == LOAD:
        return f"The nearest layout carries {1 / ratio:.0%} of the demand."
    return f"Nearest: {found.chosen.candidate.name}, {limit_name(found.chosen)} at {ratio:.2f} x its limit."


def _checked(text: str, changed: Scenario) -> Edit | None:
    result = answer(changed)
    if not isinstance(result, Answer) or not result.is_good or result.chosen is None:
        return None
    price = gpu_hour(result.question.cluster.system)
    usd = price.usd * result.chosen.num_gpus if price else None
    rent = f", {format_usd(usd)}/h" if usd is not None else ""
    return Edit(
        f"{text}: {result.chosen.candidate.deployment.layout} on {result.chosen.num_gpus} GPUs{rent}", changed, usd
    )


def _tried(found: Answer) -> Iterator[tuple[str, str, Scenario]]:
    """Kind, words and scenario of each remedy; of a kind the first that helps is taken."""
    scenario = found.question.scenario
    free = replace(scenario, layout="", backend="")
    if scenario.layout:
        yield "layout", "Let the planner choose the layout", free
    if scenario.ep:
        yield "ep", "Let the planner choose EP", replace(free, ep=0, redundant=0)
    if scenario.without_knobs() != scenario:
        yield "knobs", "Leave the experts as the engine does", free.without_knobs()
    if found.chosen is not None:
        yield from _less(found, free)
        yield from _more(found, free)
    else:
        yield from _sizes(found, free)
    # Neither cures drops, and drawing what a capacity limit drops on every other system would take seconds.
    for kind, text, changed in () if found.drops else _others(found, free):
        yield kind, text, changed
        other = answer(changed)
        if isinstance(other, Answer) and other.chosen is not None and not other.meets_slo:
            for _, more, larger in _more(other, changed):
                yield kind, f"{text}, {more}", larger


def _others(found: Answer, free: Scenario) -> Iterator[tuple[str, str, Scenario]]:
    """Smaller weights and other systems."""
    for fmt in _WEIGHTS:
        smaller = ask(changed := replace(free, weights=fmt))
        if isinstance(smaller, Question) and smaller.model.weight_bytes < _SMALLER * found.question.model.weight_bytes:
            yield fmt, f"{fmt} weights (check answer quality)", changed
    for name in _RIVALS:
        if name != free.system and name in systems():
            yield name, f"{system(name).gpu.name} instead", replace(free, system=name)


def _sizes(found: Answer, free: Scenario) -> Iterator[tuple[str, str, Scenario]]:
    """Larger offers, for a model that does not fit."""
    sizes = sorted({found.question.cluster.num_gpus * step for step in _STEPS})
    reaches = found.question.cluster.system.scale_out is not None
    for gpus in sizes:
        if gpus <= MAX_OFFERED_GPUS and (reaches or gpus <= found.question.cluster.system.gpus_per_node):
            yield "gpus", f"{gpus} GPUs", replace(free, gpus=gpus)


def _less(found: Answer, free: Scenario) -> Iterator[tuple[str, str, Scenario]]:
    """A lower load, or the objectives in reach."""
    assert found.chosen is not None
    workload = found.question.workload
    served = max((line_rate(found, e) for e in found.found), default=0.0)
    if not workload.arrivals.concurrency and not free.trace and served > 0:
        for share in (0.98, 0.9, 0.75):
            rate = float(f"{served * share:.2g}")
            yield "load", f"Lower the load to {rate:g} requests/s", replace(free, rate=rate)
    pairs = objectives(found.chosen.candidate, found.question.slo, workload.mean_output_tokens)
    if found.chosen.ratios[LOAD] <= 1:
        limits = ",".join(f"{n}={_rounded_ms(max(value * 1.02, limit))}ms" for n, (value, limit) in pairs.items())
        yield "slo", f"Accept {limits.replace(',', ', ')}", replace(free, slo=limits)


def _more(found: Answer, free: Scenario) -> Iterator[tuple[str, str, Scenario]]:
    """As many replicas of the layout that carries most per GPU within the SLO as the demand takes."""
    workload, cluster = found.question.workload, found.question.cluster
    per_gpu = [(line_rate(found, e) / e.num_gpus, e) for e in found.found if e.kind.deployment.layout.pp == 1]
    rate, each = max(per_gpu, key=lambda pair: pair[0], default=(0.0, None))
    if each is None or rate <= 0 or workload.arrivals.concurrency or cluster.system.scale_out is None:
        return
    layout = each.kind.deployment.layout
    one = line_rate(found, each) / each.candidate.deployment.layout.replicas
    for reserve in (1.0, 1.1):
        count = int(np.ceil(workload.arrivals.rate_per_s / one * reserve))
        gpus = -(-count * layout.replica_gpus // cluster.system.gpus_per_node) * cluster.system.gpus_per_node
        if gpus <= MAX_OFFERED_GPUS:
            text = layout_text(replace(layout, replicas=count))
            backend = each.kind.deployment.backend if layout.attention_dp > 1 else ""
            yield "gpus", f"{gpus} GPUs", replace(free, gpus=gpus, layout=text, backend=backend)


def line_rate(found: Answer, each: Estimate) -> float:
    """Requests per second that all replicas of `each` carry within the SLO, 0 where one request misses it."""
    line = curve(found.question, each.kind)
    return (
        float(line.requests_per_s[line.within]) * each.candidate.deployment.layout.replicas
        if line.within is not None
        else 0.0
    )


def _rounded_ms(seconds: float) -> str:
    return significant(seconds * 1000, 3).replace(",", "")
