"""What a little more or less of each input does to the load carried within the SLO and to its price."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from planner.economics import usd_per_mtok
from planner.search import Search
from planner.steady import SteadyState
from planner.whatif.analytic import Answer
from planner.whatif.catalogue import Kind, curve, price_per_gpu_hour
from planner.whatif.question import Question
from planner.workload import Lengths, Slo, Workload

CHANGE = 0.1


@dataclass(frozen=True, slots=True)
class Bar:
    """Requests per second within the SLO and dollars per million output tokens then, at both ends of `name`."""

    name: str
    low_label: str
    high_label: str
    low_requests_per_s: float
    high_requests_per_s: float
    low_usd_per_mtok: float | None
    high_usd_per_mtok: float | None


@dataclass(frozen=True, slots=True)
class _End:
    """One changed input of a question: everything else stays, the layout too."""

    question: Question
    kind: Kind
    price: float | None


def tornado(found: Answer) -> tuple[float, float | None, list[Bar]]:
    """Requests per second and price as asked, and a bar per input, the widest in requests first; layout kept.

    Within the SLO where the layout can keep it (`keeps_slo`), else what it carries with the SLO aside.
    """
    if found.chosen is None:
        return 0.0, None, []
    value = _value if keeps_slo(found) else _capacity
    base = _End(found.question, found.chosen.kind, price_per_gpu_hour(found.question))
    replicas = found.chosen.candidate.deployment.layout.replicas
    rate, usd = value(base, replicas)
    bars = []
    for name, labels, change in _changes(found):
        low, high = (value(change(base, factor), replicas) for factor in (1 - CHANGE, 1 + CHANGE))
        bars.append(Bar(name, *labels, low[0], high[0], low[1], high[1]))
    bars.sort(key=lambda bar: (-abs(bar.high_requests_per_s - bar.low_requests_per_s), bar.name))
    return rate, usd, bars


def keeps_slo(found: Answer) -> bool:
    """The chosen layout keeps every objective under some load, if only of one request at a time."""
    return found.chosen is not None and curve(found.question, found.chosen.kind).within is not None


def _changes(found: Answer) -> Iterator[tuple[str, tuple[str, str], Callable[[_End, float], _End]]]:
    percent = (f"-{CHANGE:.0%}", f"+{CHANGE:.0%}")
    yield "Prompt length", percent, lambda end, f: _lengths(end, f, 1.0)
    yield "Answer length", percent, lambda end, f: _lengths(end, 1.0, f)
    yield "Step time (error of the model)", percent, lambda end, f: replace(end, kind=_slower(end.kind, f))
    yield "GPU memory", percent, _memory
    yield "GPU price", percent, lambda end, f: replace(end, price=end.price * f if end.price else None)
    for objective in found.question.slo.objectives if keeps_slo(found) else ():
        yield f"Limit of {objective.name.replace('_', ' ').upper()}", percent, _limit(objective.name)


def _value(end: _End, replicas: int) -> tuple[float, float | None]:
    """Requests per second within the SLO and dollars per million output tokens then; 0 if one request misses it."""
    line = curve(end.question, end.kind)
    rate = float(line.requests_per_s[line.within]) * replicas if line.within is not None else 0.0
    return _priced(end, replicas, rate)


def _capacity(end: _End, replicas: int) -> tuple[float, float | None]:
    """Requests per second with the SLO aside, and dollars per million output tokens then."""
    return _priced(end, replicas, float(curve(end.question, end.kind).requests_per_s[-1]) * replicas)


def _priced(end: _End, replicas: int, rate: float) -> tuple[float, float | None]:
    tok_per_s = rate * end.question.workload.mean_output_tokens
    usd = usd_per_mtok(end.price, end.kind.deployment.layout.replica_gpus * replicas, tok_per_s) if rate else None
    return rate, usd


def _lengths(end: _End, prompt: float, output: float) -> _End:
    workload = end.question.workload
    changed = replace(workload, prompt=_scaled(workload.prompt, prompt), output=_scaled(workload.output, output))
    return _again(end, changed, end.kind)


def _memory(end: _End, factor: float) -> _End:
    """More or less room for the cache: the other terms stay."""
    deployment = end.kind.deployment
    use = deployment.memory
    more = use.capacity_bytes * (factor - 1) / max(use.kv_bytes_per_token, 1e-9)
    use = replace(use, kv_tokens=max(1, int(use.kv_tokens + more)))
    kind = replace(end.kind, deployment=replace(deployment, memory=use))
    return _again(end, end.question.workload, kind)


def _again(end: _End, workload: Workload, kind: Kind) -> _End:
    question = replace(end.question, workload=workload)
    q = question
    search = Search(q.cluster, q.engine, q.workload, q.slo, q.experts, q.tactics)
    steady = search.state(kind.deployment)
    limits, use = kind.deployment.limits, kind.deployment.memory
    most = search.running(kind.deployment.layout, limits.max_num_seqs, use, steady)
    return replace(end, question=question, kind=Kind(kind.deployment, steady, most))


def _slower(kind: Kind, factor: float) -> Kind:
    steady: SteadyState = kind.steady
    slowed = replace(
        steady,
        tpot_s=steady.tpot_s * factor,
        decode_s=steady.decode_s * factor,
        prefill_s=steady.prefill_s * factor,
        requests_per_s=steady.requests_per_s / factor,
    )
    return replace(kind, steady=slowed)


def _limit(name: str) -> Callable[[_End, float], _End]:
    def changed(end: _End, factor: float) -> _End:
        slo = Slo(
            tuple(replace(o, limit_s=o.limit_s * factor) if o.name == name else o for o in end.question.slo.objectives)
        )
        return replace(end, question=replace(end.question, slo=slo))

    return changed


def _scaled(lengths: Lengths, factor: float) -> Lengths:
    """`lengths` times `factor`, whole tokens, one at least."""
    if factor == 1.0:
        return lengths
    log_mean = lengths.log_mean + float(np.log(factor)) if lengths.kind == "lognormal" else lengths.log_mean
    return replace(
        lengths,
        mean=lengths.mean * factor,
        minimum=max(1, round(lengths.minimum * factor)),
        maximum=max(1, round(lengths.maximum * factor)),
        log_mean=log_mean,
        values=tuple(max(1, round(v * factor)) for v in lengths.values),
    )
