"""A scenario as planner objects, or what is wrong with which field of the form."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from planner import options
from planner.choices import ExpertChoices
from planner.deployment import check_context, deploy
from planner.engine import Engine, engines, versions
from planner.errors import Infeasible, InputError, PlannerError, nearest
from planner.experts import ExpertSettings
from planner.fit import limits_for
from planner.hardware import Cluster, systems
from planner.layout import Layout, check_layout, parse_layout
from planner.model import ModelConfig, bundled, from_hf
from planner.placement import PLACEMENTS
from planner.search import MAX_OFFERED_GPUS
from planner.tactics import Tactics, parse_tactics
from planner.whatif.scenario import Scenario, from_query
from planner.workload import PRESETS, Slo, Workload, parse_slo

MAX_CONFIG_BYTES = 5_000_000
MAX_TRACE_ROWS = 100_000
"""Rows of an uploaded trace: enough for any percentile, few enough to be read in about a second."""
_FILE = re.compile(r"[\\/]|\.(csv|toml|json|npz|npy|pt|parquet)$", re.IGNORECASE)
_DRAFTS = re.compile(r"mtp:[0-9]{1,3}")
_BACKENDS = ("", "all_reduce", "allgather_reducescatter", "deepep")
_COUNTS = ("users", "ep", "redundant", "resident", "seqs", "tokens", "seed")
_BESIDE = {
    "workload": ("workload", "rate", "users"),
    "gpus": ("gpus", "oversubscription"),
    "layout": ("layout", "backend", "seqs", "tokens"),
    "config": ("config", "config_name"),
}
"""Fields that may be at fault where a problem names the first of them."""
_FEW = 16
"""Sequences with which a layout is checked: its rules do not depend on them."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with `field` of a scenario, with value and remedy."""

    field: str
    message: str


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A scenario that can be answered. `layout` is None where the planner chooses."""

    scenario: Scenario
    model: ModelConfig
    cluster: Cluster
    workload: Workload
    slo: Slo
    engine: Engine
    experts: ExpertSettings
    tactics: Tactics
    layout: Layout | None


USUAL_RIVALS = ("h100-sxm", "h200-sxm", "b200-sxm", "gb200-nvl72", "mi355x")
MOST_RIVALS = 8


class _Faults:
    """Runs the readers of the fields one by one and keeps what each of them complains about."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def read(self, field: str, reader: Callable[[], Any]) -> Any:
        """What `reader` returns, None where it fails."""
        try:
            return reader()
        except PlannerError as error:
            self.problems.append(Problem(field, str(error)))
        return None


@lru_cache(maxsize=256)
def ask(scenario: Scenario) -> Question | tuple[Problem, ...]:
    """The question of a scenario, or every fault of its fields. Nothing a link says is looked up as a file."""
    faults = _Faults()
    for field in _COUNTS:
        faults.read(field, partial(_not_negative, field, getattr(scenario, field)))
    model = faults.read("config" if scenario.config else "model", lambda: _model(scenario))
    cluster = faults.read("gpus", lambda: _cluster(scenario)) if _known_system(scenario, faults) else None
    slo = faults.read("slo", lambda: parse_slo(scenario.slo))
    workload = faults.read("trace" if scenario.trace else "workload", lambda: _workload(scenario, slo))
    engine = faults.read("engine", lambda: _engine(scenario.engine))
    layout = faults.read("layout", lambda: parse_layout(scenario.layout)) if scenario.layout else None
    if model is None or engine is None:
        return tuple(faults.problems)
    experts = _experts(scenario, model, faults)
    tactics = faults.read("speculative", lambda: _tactics(scenario, model, engine))
    if layout is not None:
        faults.read("layout", lambda: check_layout(model, layout))
    if workload is not None:
        faults.read("workload", lambda: check_context(model, workload))
    _check_knobs(scenario, model, engine, faults)
    if layout is not None and cluster is not None and not faults.problems:
        faults.read("layout", partial(_check_cut, scenario, model, cluster, layout, engine))
    if faults.problems or cluster is None or workload is None or slo is None or tactics is None:
        return tuple(faults.problems)
    return Question(scenario, model, cluster, workload, slo, engine, experts, tactics, layout)


def opened(parameters: Mapping[str, str]) -> tuple[Scenario, list[str]]:
    """The scenario of an address with only its faulty fields at their defaults, and what was wrong with each."""
    scenario, said = from_query(parameters)
    try:
        rival_names(scenario.rivals)
    except InputError as error:
        said.append(_defaulted("rivals", str(error), "the usual ones are"))
        scenario = replace(scenario, rivals="")
    for _ in fields(Scenario):
        if isinstance(found := ask(scenario), Question):
            break
        scenario, field, taken = _without(scenario, found[0])
        said.append(_defaulted(field, found[0].message, taken))
    return scenario, said


def _without(scenario: Scenario, problem: Problem) -> tuple[Scenario, str, str]:
    """`scenario` without the one field, or the few, behind `problem`; which, and what is taken instead, in words."""
    names = _BESIDE.get(problem.field, (problem.field,))
    plain = Scenario()
    single = [(name,) for name in names if problem.field != "config"]
    for changed in (*single, names):
        tried = replace(scenario, **{name: getattr(plain, name) for name in changed})
        left = ask(tried)
        if isinstance(left, Question) or problem not in left:
            value = getattr(plain, changed[0])
            return tried, changed[0], f"{'the default' if value == '' else value} is"
    return plain, problem.field, "the first screen is"


def _defaulted(field: str, message: str, taken: str) -> str:
    return f"The {field} of the link is not used. {message} Instead, {taken} taken; the rest of the link is kept."


def rival_names(text: str) -> tuple[str, ...]:
    """Systems of a comma-separated list; InputError on an unknown one, one given twice, or too many."""
    listed = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in listed:
        if name not in systems():
            raise InputError(f"system {name[:80]!r} is unknown: {nearest(name[:80], systems())}")
        if listed.count(name) > 1:
            raise InputError(f"{name} is given twice: compare each system once.")
    if len(listed) > MOST_RIVALS:
        raise InputError(f"{len(listed)} systems: compare up to {MOST_RIVALS} at once.")
    return listed or USUAL_RIVALS


def config_problem(text: str, name: str) -> str | None:
    """Why the upload is no config.json of a model that can be planned; None when it is one."""
    try:
        _uploaded(text, name)
    except PlannerError as error:
        return str(error)
    return None


def trace_problem(text: str, name: str) -> str | None:
    """Why the upload is no trace; None when it is one."""
    try:
        _trace(text, name)
    except PlannerError as error:
        return str(error)
    return None


def _model(scenario: Scenario) -> ModelConfig:
    model = _uploaded(scenario.config, scenario.config_name) if scenario.config else bundled(scenario.model)
    return options.precision(model, scenario.weights or None, scenario.kv or None)


def _uploaded(text: str, name: str) -> ModelConfig:
    if len(text) > MAX_CONFIG_BYTES:
        raise InputError(
            f"{name}: {len(text):,} characters, a config.json has at most {MAX_CONFIG_BYTES:,}. Choose the config.json."
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not valid JSON ({str(error)[:80]}). Choose the config.json of the model.") from None
    if not isinstance(value, dict):
        raise InputError(f"{name}: holds a JSON {type(value).__name__}, not an object. Choose the config.json.")
    stem = Path(name).stem or "uploaded model"
    try:
        return replace(from_hf(value, stem), source=f"{name} (uploaded)")
    except PlannerError as error:
        raise InputError(f"{name}: {str(error).removeprefix(f'{stem}: ')}") from None


def _known_system(scenario: Scenario, faults: _Faults) -> bool:
    if scenario.system in systems():
        return True
    message = f"system {scenario.system[:80]!r} is unknown: {nearest(scenario.system[:80], systems())}"
    faults.problems.append(Problem("system", message))
    return False


def _cluster(scenario: Scenario) -> Cluster:
    if not 1 <= scenario.gpus <= MAX_OFFERED_GPUS:
        raise InputError(f"{scenario.gpus:,} GPUs: use 1 to {MAX_OFFERED_GPUS:,}.")
    return options.clusters([scenario.cluster], scenario.oversubscription)[0]


def _workload(scenario: Scenario, slo: Slo | None) -> Workload:
    if not scenario.trace and scenario.users == 0 and not 0 < scenario.rate <= 1e6:
        raise InputError(f"{scenario.rate:g} requests/s: use a rate above 0, at most a million.")
    rate, users = (None, scenario.users) if scenario.users > 0 else (scenario.rate or None, None)
    if scenario.trace:
        traced = _trace(scenario.trace, scenario.trace_name)
        return traced.with_concurrency(users) if users else traced
    if scenario.workload not in PRESETS and not scenario.workload.startswith(("fixed:", "uniform:", "lognormal:")):
        shapes = [*PRESETS, "fixed:1024/256", "uniform:800-1000/200-300", "lognormal:1024~0.6/256~0.8"]
        raise InputError(f"workload {scenario.workload[:80]!r} is unknown: {nearest(scenario.workload[:80], shapes)}")
    return options.plan_demand(scenario.workload, rate, users, None, slo)


@lru_cache(maxsize=16)
def _trace(text: str, name: str) -> Workload:
    from planner.workload.trace import read_trace

    if text.count("\n") > MAX_TRACE_ROWS + 1:
        raise InputError(
            f"{name}: {text.count(chr(10)):,} rows; {MAX_TRACE_ROWS:,} at most are read here. Upload the busiest "
            "hours, or give the whole file to `moeplan plan --workload`."
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, re.sub(r"[^A-Za-z0-9._-]", "_", Path(name).name) or "trace.csv").with_suffix(".csv")
        path.write_text(text, encoding="utf-8")
        try:
            return read_trace(path)
        except PlannerError as error:
            raise InputError(str(error).replace(f"{folder}/", "")) from None


def _not_negative(field: str, value: int) -> None:
    if value < 0:
        raise InputError(f"{field} {value}: use 0 or more.")


def _check_cut(scenario: Scenario, model: ModelConfig, cluster: Cluster, layout: Layout, engine: Engine) -> None:
    """Raise what keeps `layout` from being run on `cluster`, short of memory."""
    if scenario.backend not in _BACKENDS:
        raise InputError(f"backend {scenario.backend[:80]!r}: {nearest(scenario.backend[:80], _BACKENDS[1:])}")
    given = limits_for(engine, cluster.system, _FEW, None, layout.attention_dp)
    backend = scenario.backend or (engine.moe_backends[0] if engine.moe_backends else "")
    backend = backend if layout.attention_dp > 1 else "all_reduce"
    with suppress(Infeasible):
        deploy(model, cluster, layout, engine, given, backend, 1)


def _engine(name: str) -> Engine:
    known = (*engines(), *versions())
    if name not in known:
        raise InputError(f"engine {name[:80]!r} is unknown: {nearest(name[:80], known)}")
    return options.engine(name)


def _tactics(scenario: Scenario, model: ModelConfig, engine: Engine) -> Tactics:
    if scenario.speculative and not _DRAFTS.fullmatch(scenario.speculative):
        raise InputError(
            f"drafts {scenario.speculative[:80]!r}: write mtp:1 or leave it empty; other drafts need an acceptance, "
            "which only the command line takes."
        )
    return parse_tactics(scenario.speculative or None, None, None, model, engine)


def _experts(scenario: Scenario, model: ModelConfig, faults: _Faults) -> ExpertSettings:
    """Settings one knob at a time, so that each fault is named beside its own knob."""
    chosen: dict[str, Any] = {}
    if _FILE.search(scenario.skew):
        faults.problems.append(
            Problem("skew", f"skew {scenario.skew[:80]!r}: write zipf:1 or lognormal:0.5; no files.")
        )
    elif scenario.skew:
        chosen["skew"] = scenario.skew
    if scenario.placement in PLACEMENTS:
        chosen["placement"] = scenario.placement
    else:
        message = f"placement {scenario.placement[:80]!r}: {nearest(scenario.placement[:80], PLACEMENTS)}"
        faults.problems.append(Problem("placement", message))
    if scenario.capacity_factor:
        chosen["capacity_factor"] = f"{scenario.capacity_factor:g}"
    if scenario.residency:
        chosen |= {"residency": scenario.residency, "resident": scenario.resident or None}
    good: dict[str, Any] = {}
    for field, value in chosen.items():
        tried = good | {field: value}
        if field == "resident" and "residency" not in good:
            continue
        if faults.read(field, partial(options.experts, model, ExpertChoices(**tried))) is not None:
            good = tried
    return options.experts(model, ExpertChoices(**good))


def _check_knobs(scenario: Scenario, model: ModelConfig, engine: Engine, faults: _Faults) -> None:
    """Degrees and copies that no layout can have."""
    if min(scenario.ep, scenario.redundant) < 0:
        return  # said already
    if scenario.ep > 1 and engine.expert_parallel == "none":
        faults.problems.append(
            Problem("ep", f"{engine.name} never spreads whole experts over GPUs: use EP 0 (any) or 1.")
        )
    elif scenario.ep > 1 and model.moe is not None:
        cut = Layout(tp=scenario.ep, ep=scenario.ep, redundant_experts=scenario.redundant)
        with_heads = replace(cut, tp=1, attention_dp=scenario.ep)
        field = "redundant" if scenario.redundant else "ep"
        faults.read(field, lambda: check_layout(model, with_heads if engine.moe_backends else cut))
    elif scenario.ep > 1:
        faults.problems.append(Problem("ep", f"EP {scenario.ep} needs experts, and {model.name} is dense: use 0."))
    if scenario.ep > max(scenario.gpus, 0) and scenario.ep > 0:
        faults.problems.append(
            Problem("ep", f"EP {scenario.ep} needs {scenario.ep} GPUs, {scenario.gpus} are offered.")
        )
    if scenario.redundant and model.moe is None:
        faults.problems.append(Problem("redundant", f"{model.name} is dense and has no experts to copy: use 0."))
