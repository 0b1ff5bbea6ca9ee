"""The same demand and SLO on several systems: how many GPUs of each, at what price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from planner.economics import gpu_hour
from planner.hardware import system
from planner.search import MAX_OFFERED_GPUS
from planner.whatif.analytic import Answer, answer, borderline, chance_of_slo
from planner.whatif.catalogue import objectives
from planner.whatif.edits import edits, shortfall
from planner.whatif.scenario import Scenario

_NODES = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Rival:
    """One system: GPUs are the fewest found that meet the SLO; `problem` says why there is no answer.

    `may_do_gpus` are fewer GPUs too close to a limit for an estimate, 0 where there are none.
    """

    name: str
    gpu: str
    problem: str
    layout: str = ""
    num_gpus: int = 0
    nodes: int = 0
    objectives: tuple[tuple[str, float], ...] = ()
    output_tok_per_s_per_gpu: float = 0.0
    usd_per_mtok_output: float | None = None
    usd_per_hour: float | None = None
    chance: float | None = None
    measured_share: float = 0.0
    price_as_of: str = ""
    scenario: Scenario | None = None
    may_do_gpus: int = 0


def rivals(scenario: Scenario, listed: Sequence[str]) -> list[Rival]:
    """An answer per system, cheapest per hour first, those without one last."""
    bare = replace(scenario, layout="", backend="", rivals="")
    found = [_rival(replace(bare, system=name)) for name in listed]
    return sorted(found, key=lambda r: (bool(r.problem), r.usd_per_hour is None, r.usd_per_hour or 0.0, r.name))


@lru_cache(maxsize=64)
def _rival(scenario: Scenario) -> Rival:
    """The fewest nodes that meet the SLO, or as many replicas of the best layout as the demand takes."""
    profile = system(scenario.system)
    problem, best = "", None
    for nodes in _NODES:
        gpus = nodes * profile.gpus_per_node
        if nodes > 1 and profile.scale_out is None and gpus > profile.scale_up.size:
            break
        found = answer(replace(scenario, gpus=gpus))
        if not isinstance(found, Answer):
            # More nodes may cure it: an expert parallelism larger than one node.
            problem = problem or " ".join(p.message for p in found)
            continue
        if found.is_good:
            return _row(found)
        problem, best = shortfall(found), found
    larger_edits = edits(best) if best else []
    more = [edit for edit in larger_edits if edit.scenario.gpus > gpus and edit.scenario.system == scenario.system]
    if more and more[0].scenario.gpus <= MAX_OFFERED_GPUS:
        larger = answer(more[0].scenario)
        if isinstance(larger, Answer) and larger.is_good:
            return _row(larger)
    return Rival(scenario.system, profile.gpu.name, problem)


def _row(found: Answer) -> Rival:
    chosen, profile = found.chosen, found.question.cluster.system
    assert chosen is not None
    price, share = gpu_hour(profile), found.origin_share
    near = borderline(found)
    values = objectives(chosen.candidate, found.question.slo, found.question.workload.mean_output_tokens)
    return Rival(
        profile.name,
        profile.gpu.name,
        "",
        str(chosen.candidate.deployment.layout),
        chosen.num_gpus,
        -(-chosen.num_gpus // profile.gpus_per_node),
        tuple((name, value) for name, (value, _) in values.items()),
        chosen.output_tok_per_s / chosen.num_gpus,
        chosen.usd_per_mtok_output,
        price.usd * chosen.num_gpus if price else None,
        chance_of_slo(found),
        share.get("measured", 0.0) + share.get("interpolated", 0.0),
        price.as_of if price else "",
        found.question.scenario,
        near[0].num_gpus if near else 0,
    )
