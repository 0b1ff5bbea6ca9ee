"""Evidence behind a comparison of clusters: latencies, costs, bands, fabric, growth, uncertainty, sources."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from planner import decisionfigures
from planner.report.blocks import Section, Table
from planner.report.outlook import sensitivity_table
from planner.report.rows import table_of, without_empty
from planner.report.wording import described, duration, money, number, spread, title

Facts = Mapping[str, Any]
_BAND = 10
"""Width of an interactivity band [tok/s per user]."""


def comparison_evidence(facts: Facts) -> list[Section]:
    """Sections behind the answer, in reading order."""
    found = (build(facts) for build in _EVIDENCE)
    return [section for section in found if section is not None]


def _layouts(facts: Facts) -> Section | None:
    rows = facts.get("systems") or ()
    header = ("System", "Layout", "What limits it", "Measured", "Interpolated", "Extrapolated", "Roofline")
    cells = [
        (
            str(row.get("name")),
            str(row.get("layout") or "–"),
            str(row.get("problem") or row.get("binding") or "–"),
            *(_share(row, origin) for origin in ("measured", "interpolated", "extrapolated", "roofline")),
        )
        for row in rows
    ]
    if not cells:
        return None
    guessed = [
        str(row["name"])
        for row in rows
        if sum((row.get("origin_share") or {}).get(key, 0.0) for key in ("extrapolated", "roofline")) > 0.3
    ]
    finding = "Each system runs the layout that is best for it."
    if guessed:
        finding += f" More than 30 % of the predicted time of {', '.join(guessed)} is not measured on that GPU."
    return Section("Layouts and what limits them", finding, (without_empty(header, cells, {0, 1, 2}),))


def _share(row: Facts, origin: str) -> str:
    share = (row.get("origin_share") or {}).get(origin)
    return "–" if share is None else f"{share:.0%}"


def _latency(facts: Facts) -> Section | None:
    rows = [row for row in facts.get("systems") or () if row.get("ttft_s") or row.get("tpot_s")]
    if not rows:
        return None
    names = ("mean", "p50", "p90", "p99")
    header = ("System", *(f"{m} {name}" for m in ("TTFT", "TPOT") for name in names), "Output tok/s per GPU")
    cells = [
        (
            str(row["name"]),
            *(duration((row.get(m) or {}).get(name)) for m in ("ttft_s", "tpot_s") for name in names),
            number(row.get("output_tok_per_s_per_gpu")),
        )
        for row in rows
    ]
    fastest = min(rows, key=lambda row: (row.get("tpot_s") or {}).get("mean") or float("inf"))
    finding = f"{fastest['name']} answers fastest: {duration((fastest.get('tpot_s') or {}).get('mean'))} per token."
    return Section("What users see", finding, (without_empty(header, cells),))


def _money(facts: Facts) -> Section | None:
    rows = [row for row in facts.get("systems") or () if row.get("usd_per_month") is not None]
    if not rows:
        return None
    header = ["System", "GPUs, 80 % range", "Racks", "Purchase", "$ per Mtok input", "output", "total"]
    header += ["Months to next purchase", "$ per GPU-hour", "Basis", "As of", "Source"]
    cells = [
        (
            str(row["name"]),
            spread(row.get("num_gpus_interval"), lambda value: number(value, whole=True)),
            number(row.get("racks")),
            money(row.get("capex_usd")),
            *(number(row.get(f"usd_per_mtok_{kind}")) for kind in ("input", "output", "total")),
            number(row.get("months_until_next_purchase")),
            number((row.get("price") or {}).get("usd_per_gpu_hour")),
            *(str((row.get("price") or {}).get(key) or "–") for key in ("basis", "as_of", "source")),
        )
        for row in rows
    ]
    cheap = min(rows, key=lambda row: row["usd_per_month"])
    finding = f"{cheap['name']} costs least: {money(cheap['usd_per_month'])} a month."
    return Section("What it costs", finding, (without_empty(header, cells, {0, 9, 10, 11}),), style="small")


def _front(facts: Facts) -> Section | None:
    curves = {str(name): rows for name, rows in (facts.get("front") or {}).items() if rows}
    if not curves:
        return None
    peaks = {name: max(row["output_tok_per_s_per_gpu"] for row in rows) for name, rows in curves.items()}
    best = max(peaks, key=lambda name: peaks[name])
    finding = f"{best} reaches the highest throughput: {number(peaks[best])} output tok/s per GPU."
    rows = tuple(
        (name, number(row["tok_per_s_per_user"]), number(row["output_tok_per_s_per_gpu"]))
        for name, points in curves.items()
        for row in points
    )
    table = Table(("System", "Interactivity (tok/s per user)", "Output tok/s per GPU"), rows)
    draw = partial(decisionfigures.fronts, curves, _least_interactivity(facts))
    return Section("Throughput against interactivity", finding, (table,), draw)


def _least_interactivity(facts: Facts) -> float | None:
    """Tokens per second and user that the TPOT limit asks for, where the question has it as a number."""
    limits = [
        row["limit_s"]
        for demand in (facts.get("question") or {}).get("demands") or ()
        for row in (demand.get("slo") if isinstance(demand.get("slo"), list) else ())
        if row.get("metric") == "tpot"
    ]
    return 1 / min(limits) if limits else None


def _bands(facts: Facts) -> Section | None:
    bands = facts.get("bands") or {}
    rows = bands.get("rows") or ()
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row.get("values") or {}))
    metric = str(bands.get("metric") or "usd_per_mtok_output")
    header = ("From tok/s per user", "Best", *names, f"Best against {bands.get('baseline')}")
    cells = [
        (
            number(row.get("tok_per_s_per_user"), whole=True),
            str(row.get("best") or "none"),
            *(number((row.get("values") or {}).get(name)) for name in names),
            _percent(row.get("vs_baseline_pct"), row.get("best")),
        )
        for row in rows
    ]
    winners = list(dict.fromkeys(str(row["best"]) for row in rows if row.get("best")))
    finding = f"Best in at least one band of {_BAND} tok/s per user: {', '.join(winners) or 'none'}. "
    finding += f"Values are {title(metric)}."
    return Section("Best system by interactivity", finding, (without_empty(header, cells, {1}),))


def _percent(value: Any, best: Any) -> str:
    value = value.get(best) if isinstance(value, Mapping) else value
    return "–" if value is None else f"{value:+.0f} %"


def _sensitivity(facts: Facts) -> Section | None:
    rows = [
        {"input": row["input"], "low_label": row["low_label"], "high_label": row["high_label"]}
        | {"low": row.get("low_usd_per_month"), "high": row.get("high_usd_per_month")}
        for row in facts.get("sensitivity") or ()
        if None not in (row.get("low_usd_per_month"), row.get("high_usd_per_month"))
    ]
    if not rows:
        return None
    finding = f"Cost of {facts.get('winner')} per month at the ends of each input, the others as assumed."
    return Section("The numbers of the tornado", finding, (sensitivity_table(rows, money),))


def _listed(key: str, heading: str, finding: str) -> Any:
    """A section of rows that name their columns themselves, alone or with remarks in a dictionary."""

    def build(facts: Facts) -> Section | None:
        found = facts.get(key)
        if not found:
            return None
        rows = found.get("rows") or () if isinstance(found, Mapping) else found
        remarks = found.items() if isinstance(found, Mapping) else ()
        items = tuple(
            f"{title(str(k))}: {described(str(k), v)}" for k, v in remarks if k != "rows" and v not in (None, "", [])
        )
        table = table_of(rows)
        return Section(heading, finding, (table,) if table else (), items=items) if table or items else None

    return build


def _uncertainty(facts: Facts) -> Section | None:
    found = facts.get("uncertainty") or {}
    if not found:
        return None
    draws = found.get("draws")
    finding = f"{draws:,} draws with common random numbers. " if draws else ""
    items = tuple(str(item) for item in found.get("assumptions") or ())
    rows = [
        (str(r["name"]), *(money((r.get("regret_usd_per_month") or {}).get(key)) for key in ("mean", "p90")))
        for r in facts.get("systems") or ()
        if r.get("regret_usd_per_month")
    ]
    tables = (without_empty(("System", "Mean regret per month", "90th percentile"), rows),) if rows else ()
    return Section("How the uncertainty was drawn", f"{finding}{found.get('method') or ''}", tables, items=items)


def _cautions(facts: Facts) -> Section | None:
    items = tuple(str(item) for item in (*(facts.get("risks") or ()), *(facts.get("warnings") or ())))
    return Section("All risks and warnings", "", items=items, style="warnings") if len(items) > 5 else None


def _assumptions(facts: Facts) -> Section | None:
    rows = [
        (str(row.get("text") or row.get("name") or ""), str(row.get("source") or "–"), str(row.get("as_of") or "–"))
        for row in facts.get("assumptions") or ()
    ]
    if not rows:
        return None
    finding = f"Inputs taken as given: {len(rows)}. Change any of them and run the command again."
    table = without_empty(("Assumption", "Source", "As of"), rows, {0, 1, 2})
    return Section("Assumptions and their sources", finding, (table,))


_EVIDENCE = (
    _layouts,
    _latency,
    _money,
    _front,
    _bands,
    _sensitivity,
    _listed("inverse", "The question the other way round", "What a fixed budget, power or price ceiling buys."),
    _listed("fabric", "Another fabric", "GPUs that each change of the network would take."),
    _listed("growth", "Until the next purchase", "How far today's choice carries a growing demand."),
    _listed("doubles", "If the model doubles", "The same demand with a larger model."),
    _listed("rent_or_buy", "Rent or buy", "Cumulative cost of renting and of owning."),
    _uncertainty,
    _cautions,
    _assumptions,
)
