"""The facts of an answer as sections: each states a finding and carries the table that proves it.

Facts are the dictionary of `plan --json`. A section whose facts are missing is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from planner import figures
from planner.figures import readable
from planner.report.blocks import Section, Table
from planner.report.expertsections import experts, heat, residency
from planner.report.outlook import cost_against_demand, failures, launch, sensitivity
from planner.report.poolsections import pools
from planner.report.wording import described, duration, number, title
from planner.units import format_bytes, format_chance, format_count

Facts = Mapping[str, Any]

_NOTICEABLE = 1.01
"""Ratio of throughputs from which another layout is pointed out."""
_X, _Y = "interactivity_tok_per_s_per_user", "output_tok_per_s_per_gpu"


def evidence(facts: Facts) -> list[Section]:
    """Sections behind the answer, in reading order."""
    found = (build(facts) for build in _EVIDENCE)
    return [section for section in found if section is not None]


def run_evidence(facts: Facts) -> list[Section]:
    """Sections on one simulated run alone: latencies, queue and batch, a step, memory, loads by layer."""
    found = (build(facts) for build in _RUN_EVIDENCE)
    return [section for section in found if section is not None]


def candidates(facts: Facts) -> Table | None:
    """The best layouts side by side."""
    rows = facts.get("top") or ()
    if not rows:
        return None
    header = ["Layout", "Cluster", "GPUs", "SLO", "Sure", "TTFT p95 (s)", "TPOT p95 (ms)", "Output tok/s per GPU"]
    header += ["USD per Mtok output", "Decided by"]
    cells = [
        (
            figures.layout_name(row),
            str(row.get("cluster", "")),
            number(row.get("num_gpus"), whole=True),
            "meets" if row.get("meets_slo") else "misses",
            "" if row.get("chance") is None else format_chance(row["chance"]),
            number(row.get("ttft_p95_s")),
            number(row.get("tpot_p95_s"), 1e3),
            number(row.get("output_tok_per_s_per_gpu")),
            number(row.get("usd_per_mtok_output")),
            str(row.get("reason", "")),
        )
        for row in rows
    ]
    return _without_lone_cluster(Table(tuple(header), tuple(cells), frozenset({0, 1, 3, 9})))


def _without_lone_cluster(table: Table) -> Table:
    """`table` without its second column, the cluster, when every row has the same."""
    if len({row[1] for row in table.rows}) > 1:
        return table
    words = frozenset(i - (i > 1) for i in table.text_columns if i != 1)
    return Table((table.header[0], *table.header[2:]), tuple((row[0], *row[2:]) for row in table.rows), words)


def slo_limits_s(facts: Facts) -> dict[str, float]:
    """Tightest limit per metric, `{"ttft_s": 2.0, ...}`, from `slo`: rows of metric, statistic and limit_s."""
    limits: dict[str, float] = {}
    for row in facts.get("slo") or ():
        key = f"{row['metric']}_s"
        limits[key] = min(row["limit_s"], limits.get(key, math.inf))
    return limits


def _frontier(facts: Facts) -> Section | None:
    rows = [row for row in facts.get("front") or () if row.get(_X) is not None and row.get(_Y) is not None]
    if not rows:
        return None
    layout, cluster = (facts.get("layout") or {}).get("name"), facts.get("cluster")
    # Runs come best first, so the first of equal layouts (they may differ in KV format) is the chosen one.
    same = [row for row in rows if row.get("layout") == layout and row.get("cluster", cluster) == cluster]
    rows.sort(key=lambda row: (-row[_Y], -row[_X]))
    chosen = next((i for i, row in enumerate(rows) if same and row is same[0]), None)
    limit = slo_limits_s(facts).get("tpot_s")
    finding = _frontier_finding(rows, chosen)
    cells = [
        (
            f"{figures.layout_name(row)}{' (chosen)' if i == chosen else ''}",
            str(row.get("cluster", cluster or "")),
            number(row.get("num_gpus"), whole=True),
            number(row[_X]),
            number(row[_Y]),
            "meets" if row.get("meets_slo") else "misses",
        )
        for i, row in enumerate(rows)
    ]
    header = ("Layout", "Cluster", "GPUs", "Interactivity (tok/s per user)", "Output tok/s per GPU", "SLO")
    table = _without_lone_cluster(Table(header, tuple(cells), frozenset({0, 1, 5})))
    draw = partial(figures.frontier, rows, chosen, 1 / limit if limit else None)
    return Section("Throughput against interactivity", finding, (table,), draw)


def _frontier_finding(rows: Sequence[Facts], chosen: int | None) -> str:
    """How the chosen row stands among those that meet the SLO; `rows` by falling throughput."""
    meeting = [row for row in rows if row.get("meets_slo")]
    finding = (
        f"{len(meeting)} of {len(rows)} simulated layouts {'meets' if len(meeting) == 1 else 'meet'} the whole SLO."
    )
    if chosen is None:
        return finding
    row = rows[chosen]
    finding += (
        f" {figures.layout_name(row)} gives {number(row[_Y])} output tok/s per GPU at {number(row[_X])} tok/s per user."
    )
    if meeting and row[_Y] * _NOTICEABLE < meeting[0][_Y]:
        finding += f" {figures.layout_name(meeting[0])} gives {number(meeting[0][_Y])} per GPU and meets the SLO too."
    elif not rows[0].get("meets_slo") and rows[0][_Y] > row[_Y] * _NOTICEABLE:
        finding += f" {figures.layout_name(rows[0])} gives {number(rows[0][_Y])} per GPU but misses the SLO."
    return finding


def _latency(facts: Facts) -> Section | None:
    samples = {m: v for m, v in (facts.get("cdf") or {}).items() if len(v)}
    limits = slo_limits_s(facts)
    names = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "End to end"}
    known = {m: facts[m] for m in names if facts.get(m)}
    if not known and not samples:
        return None
    rows = []
    for metric, label in names.items():
        values = known.get(metric) or _statistics(samples.get(metric, ()))
        if values:
            times = [duration(values.get(name)) for name in ("mean", "p50", "p95", "p99")]
            between = [duration(values.get(name)) for name in ("mean_low", "mean_high")]
            limit = duration(limits[metric]) if metric in limits else "none"
            rows.append((label, times[0], " to ".join(between), *times[1:], limit))
    finding = " ".join(
        f"95% of requests see a {label} below {duration(known[metric].get('p95'))}"
        + (f" (tightest limit {duration(limits[metric])})." if metric in limits else ".")
        for metric, label in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"))
        if metric in known
    )
    header = ("Metric", "Mean", "95% interval of the mean", "p50", "p95", "p99", "Tightest limit")
    keep = [i for i in range(len(header)) if (i != 2 or any("–" not in row[2] for row in rows)) and (i != 6 or limits)]
    table = Table(tuple(header[i] for i in keep), tuple(tuple(row[i] for i in keep) for row in rows))
    draw = partial(figures.latency_cdf, samples, limits) if samples else None
    return Section("Latency of requests", finding or "Simulated latency distribution.", (table,), draw)


def _timeline(facts: Facts) -> Section | None:
    series = facts.get("timeline") or {}
    names = [n for n in ("queue", "batch", "kv_share") if len(series.get(n) or ())]
    if not names or not len(series.get("time_s") or ()):
        return None
    said, rows = [], []
    for name in names:
        values = np.asarray(series[name], dtype=float)
        peak = int(values.argmax())
        quarters = [_level(name, float(part.mean())) for part in np.array_split(values, 4) if len(part)]
        highest = _level(name, float(values[peak]))
        rows.append((title(_LEVELS[name]), highest, duration(float(series["time_s"][peak])), *quarters))
        said.append(f"{_LEVELS[name]} at most {highest}")
    finding = f"Over {duration(float(series['time_s'][-1]))} of simulated time: {', '.join(said)}."
    header = ("Quantity", "Peak", "Peak at", "Mean 1st quarter", "2nd", "3rd", "4th")
    table = Table(header[: len(rows[0])], tuple(rows))
    return Section("Queue and batch over time", finding, (table,), partial(figures.timeline, series))


def _step(facts: Facts) -> Section | None:
    steps = (facts.get("step") or {}).items()
    phases = {phase: {op: s for op, s in ops.items() if s > 0} for phase, ops in steps if any((ops or {}).values())}
    if not phases:
        return None
    said, tables = [], []
    for phase, ops in phases.items():
        total = sum(ops.values())
        rows = figures.largest_first(ops, len(ops))
        first, seconds = rows[0]
        said.append(
            f"A {readable(phase)} step takes {duration(total)}, {seconds / total:.0%} of it in {readable(first)}."
        )
        cells = [(readable(op), number(s, 1e3), f"{s / total:.1%}") for op, s in rows]
        cells.append(("total", number(total, 1e3), "100.0%"))
        tables.append(Table((f"{title(phase)} step", "ms", "Share"), tuple(cells)))
    finding = " ".join(said)
    return Section(
        "Where a step spends its time",
        finding,
        tuple(tables),
        partial(figures.step_breakdown, phases),
    )


def _memory(facts: Facts) -> Section | None:
    memory = facts.get("memory") or {}
    terms = {name: size for name, size in (memory.get("terms") or {}).items() if size > 0}
    if not terms:
        return None
    used, capacity = sum(terms.values()), memory.get("capacity_bytes")
    name, size = max(terms.items(), key=lambda item: item[1])
    basis = capacity or used
    finding = f"{title(name)} takes {format_bytes(size)}, {size / basis:.0%} of the GPU's memory."
    if capacity and used > capacity * (1 + 1e-6):
        finding += f" The terms exceed the {format_bytes(capacity)} of the GPU by {format_bytes(used - capacity)}."
    if memory.get("kv_tokens_per_rank"):
        finding += f" The KV pool holds {memory['kv_tokens_per_rank']:,.0f} tokens per scheduler rank."
    cells = [(readable(term), number(value, 1e-9), f"{value / basis:.1%}") for term, value in terms.items()]
    if capacity and capacity > used:
        cells.append(("free", number(capacity - used, 1e-9), f"{1 - used / capacity:.1%}"))
    cells.append(("capacity" if capacity else "total", number(basis, 1e-9), "100.0%"))
    table = Table(("Memory of one GPU", "GB", "Share"), tuple(cells))
    return Section("Memory of the fullest GPU", finding, (table,), partial(figures.memory_bar, terms, capacity))


def _losers(facts: Facts) -> Section | None:
    rejected = facts.get("rejected") or {}
    nearest = facts.get("nearest_miss") or {}
    if not rejected and not nearest:
        return None
    reasons = list(rejected) + [reason for reason in nearest if reason not in rejected]
    total = sum(rejected.values())
    finding = f"{total:,} layouts were ruled out before simulation."
    if facts.get("considered"):
        finding = f"Of {facts['considered']:,} layouts, {total:,} were ruled out before simulation."
    if rejected:
        reason, count = max(rejected.items(), key=lambda item: item[1])
        finding += f" Most frequent reason: {readable(reason)} ({count:,})."
    cells = [
        (readable(reason), number(rejected.get(reason), whole=True), str(nearest.get(reason, "–")))
        for reason in reasons
    ]
    return Section(
        "Why the others lost", finding, (Table(("Reason", "Layouts", "Nearest miss"), tuple(cells), frozenset({0, 2})),)
    )


def _prefix_cache(facts: Facts) -> Section | None:
    cache = facts.get("prefix_cache")
    if not cache:
        return None
    finding = f"Prefix caches found {cache['hit_rate']:.1%} of the prompt tokens, which were not computed again."
    rows = tuple((title(key), described(key, value)) for key, value in cache.items() if key != "hit_rate")
    return Section("Shared prefixes", finding, (Table(("Fact", "Value"), rows, frozenset({0, 1})),))


def _model(facts: Facts) -> Section | None:
    model = facts.get("model") or {}
    if isinstance(model, str):
        return None
    rows = tuple((title(key), described(key, value)) for key, value in model.items() if value)
    if len(rows) < 2:
        return None
    total = model.get("total_params")
    size = f"{format_count(total)} parameters" if total else "a model"
    finding = f"{model.get('name', 'The model')}: {size}, as derived from its configuration."
    return Section("The model", finding, (Table(("Fact", "Value"), rows, frozenset({0, 1})),))


def _assumptions(facts: Facts) -> Section | None:
    rows = facts.get("assumptions") or ()
    if not rows:
        return None
    cells = tuple((str(r.get("name", "")), described("", r.get("value")), str(r.get("source", ""))) for r in rows)
    finding = f"{len(cells)} inputs were taken as given; change any of them and run the command again."
    return Section(
        "Assumptions and their sources", finding, (Table(("Input", "Value", "Source"), cells, frozenset({0, 1, 2})),)
    )


_EVIDENCE: tuple[Callable[[Facts], Section | None], ...] = (
    _frontier,
    cost_against_demand,
    sensitivity,
    pools,
    _latency,
    _timeline,
    failures,
    _step,
    _memory,
    heat,
    experts,
    residency,
    _prefix_cache,
    _losers,
    launch,
    _model,
    _assumptions,
)
_RUN_EVIDENCE: tuple[Callable[[Facts], Section | None], ...] = (_latency, _timeline, _step, _memory, heat)


_LEVELS = {"queue": "requests waiting", "batch": "requests in the batch", "kv_share": "KV cache in use"}


def _level(name: str, value: float) -> str:
    return f"{value:.0%}" if name == "kv_share" else f"{value:,.0f}"


def _statistics(values: Sequence[float]) -> dict[str, float]:
    if not len(values):
        return {}
    array = np.asarray(values, dtype=float)
    return {"mean": float(array.mean())} | {f"p{q}": float(np.percentile(array, q)) for q in (50, 95, 99)}
