"""Evidence behind a comparison of clusters: latencies, costs, bands, fabric, growth, uncertainty, sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from planner import decisionfigures
from planner.report.blocks import Section, Table
from planner.report.outlook import launch, sensitivity_table
from planner.report.rows import named, table_of, without_empty
from planner.report.sections import run_evidence
from planner.report.wording import described, duration, headroom, money, number, spread, title

Facts = Mapping[str, Any]


def comparison_evidence(facts: Facts) -> list[Section]:
    """Sections behind the answer, in reading order."""
    found = (build(facts) for build in _EVIDENCE)
    behind = (build(facts) for build in _BEHIND)
    return [section for section in (*found, *_winner_run(facts), *behind) if section is not None]


def _winner_run(facts: Facts) -> list[Section]:
    """What a plan shows of its run, of the winner's."""
    winner = named(facts, facts.get("winner"))
    if not winner.get("evidence"):
        return []
    known = {metric: winner[metric] for metric in ("ttft_s", "tpot_s") if (winner.get(metric) or {}).get("p95")}
    parts = [winner["name"], *_shown(winner)]
    name = ", ".join(str(part) for part in parts if part)
    return [replace(section, title=f"{section.title}: {name}") for section in run_evidence(known | winner["evidence"])]


def _shown(winner: Facts) -> list[Any]:
    """Layout of the run behind the evidence of `winner`, in a fleet after its model: the one of the same latencies."""
    models = winner.get("models") or []
    if len(models) < 2:
        return [winner.get("layout")]
    same = [m for m in models if all(m.get(metric) == winner.get(metric) for metric in ("ttft_s", "tpot_s"))]
    return [same[0].get("model"), same[0].get("layout")] if len(same) == 1 else []


def _layouts(facts: Facts) -> Section | None:
    rows = facts.get("systems") or ()
    header = ("System", "Layout", "Headroom", "What limits it", "Measured", "Interpolated", "Extrapolated", "Roofline")
    cells = [
        (
            str(row.get("name")),
            str(row.get("layout") or "–"),
            headroom(row),
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
    return Section("Layouts and what limits them", finding, (without_empty(header, cells, {0, 1, 3}),))


def _share(row: Facts, origin: str) -> str:
    share = (row.get("origin_share") or {}).get(origin)
    return "–" if share is None else f"{share:.0%}"


def _latency(facts: Facts) -> Section | None:
    rows = [row for row in facts.get("systems") or () if row.get("ttft_s") or row.get("tpot_s")]
    if not rows:
        return None
    names = ("mean", "p50", "p90", "p95", "p99")
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
    header = [
        "System",
        "GPUs, 80 % range",
        "GPUs, 90 % sure",
        "Nodes",
        "Racks",
        "Purchase",
        "$ per Mtok input",
        "output",
        "total",
    ]
    header += ["Months to next purchase", "$ per GPU-hour", "Basis", "As of"]
    bounds = [row.get("name") for row in (facts.get("growth") or {}).get("rows") or () if row.get("room_at_least")]
    cells = [
        (
            str(row["name"]),
            spread(row.get("num_gpus_interval"), lambda value: number(value, whole=True)),
            number((row.get("sure") or {}).get("num_gpus"), whole=True),
            number(row.get("nodes"), whole=True),
            number(row.get("racks"), whole=True),
            money(row.get("capex_usd") or None),
            *(number(row.get(f"usd_per_mtok_{kind}")) for kind in ("input", "output", "total")),
            _until_next(row, bounds),
            number((row.get("price") or {}).get("usd_per_gpu_hour")),
            *(str((row.get("price") or {}).get(key) or "–") for key in ("basis", "as_of")),
        )
        for row in rows
    ]
    cheap = min(rows, key=lambda row: row["usd_per_month"])
    finding = f"{cheap['name']} costs least: {money(cheap['usd_per_month'])} a month."
    return Section("What it costs", finding, (without_empty(header, cells, {0, 11, 12}),), style="small")


def _until_next(row: Facts, bounds: Sequence[Any]) -> str:
    """Months until the next purchase, from below where the system is one of `bounds`."""
    months = row.get("months_until_next_purchase")
    return f"at least {number(months)}" if months is not None and row["name"] in bounds else number(months)


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
    # The table of bands has the same numbers side by side.
    tables = () if (facts.get("bands") or {}).get("rows") else (table,)
    draw = partial(decisionfigures.fronts, curves, _least_interactivity(facts))
    return Section("Throughput against interactivity", finding, tables, draw)


def _least_interactivity(facts: Facts) -> float | None:
    """Tokens per second and user that the TPOT limit asks for, where the question has it as a number."""
    limits = [
        row["limit_s"]
        for demand in (facts.get("question") or {}).get("demands") or ()
        for row in demand.get("objectives") or ()
        if row.get("metric") == "tpot"
    ]
    return 1 / min(limits) if limits else None


def _bands(facts: Facts) -> Section | None:
    bands = facts.get("bands") or {}
    rows = bands.get("rows") or ()
    if not rows:
        return None
    winners = list(dict.fromkeys(str(row["best"]) for row in rows if row.get("best")))
    leader = _leader(rows)
    finding = f"{leader} in at least one band of interactivity: {', '.join(winners) or 'none'}."
    basis = str(bands.get("basis") or "")
    finding += f" {basis[:1].upper()}{basis[1:]}." if basis else ""
    tables = [_band_table(rows, "values", "Output tok/s per GPU from tok/s per user", bands.get("baseline"))]
    if leader == "Cheapest":
        tables.append(_band_table(rows, "usd_per_mtok_output", "$ per Mtok output from tok/s per user", None))
    return Section("Best system by interactivity", finding, tuple(tables))


def _band_table(rows: Sequence[Facts], key: str, heading: str, baseline: str | None) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row.get(key) or {}))
    leader = _leader(rows)
    header = [heading, leader, *names, *([f"Its tok/s/GPU against {baseline}"] if baseline else [])]
    cells = [
        (
            number(row.get("tok_per_s_per_user"), whole=True),
            _led(row, is_priced=leader == "Cheapest"),
            *(number((row.get(key) or {}).get(name)) for name in names),
            *([_percent(row.get("vs_baseline_pct"))] if baseline else []),
        )
        for row in rows
    ]
    return without_empty(header, cells, {1})


def _led(row: Facts, is_priced: bool) -> str:
    """The system that leads a band; where none that is so fast has a price, the fastest is named as such."""
    best = row.get("best")
    if is_priced and best and (row.get("usd_per_mtok_output") or {}).get(best) is None:
        return f"{best} (fastest, no price)"
    return str(best or "none")


def _leader(rows: Sequence[Facts]) -> str:
    """What the best system of a band is: the cheapest, or the fastest where no price is known."""
    is_priced = any(usd is not None for row in rows for usd in (row.get("usd_per_mtok_output") or {}).values())
    return "Cheapest" if is_priced else "Fastest"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.0f} %"


def swings(facts: Facts) -> list[dict[str, Any]]:
    """Rows of a tornado of the monthly cost, largest first; an end at which another system wins is starred.

    Inputs that move nothing are left out, and so are those with an end that cannot be served at all.
    """
    middle: Any = named(facts, facts.get("winner")).get("usd_per_month")
    rows = [
        {
            "input": str(row["input"]),
            "low": row["low_usd_per_month"],
            "high": row["high_usd_per_month"],
            "low_label": f"{row['low_label']}{_turned(row.get('winner_low'), facts)}",
            "high_label": f"{row['high_label']}{_turned(row.get('winner_high'), facts)}",
        }
        for row in facts.get("sensitivity") or ()
        if None not in (row.get("low_usd_per_month"), row.get("high_usd_per_month"), middle)
    ]
    moving = [row for row in rows if decisionfigures.swing(row, middle) > 0]
    return sorted(moving, key=lambda row: -decisionfigures.swing(row, middle))


def _turned(name: Any, facts: Facts) -> str:
    return " *" if name not in (None, facts.get("winner")) else ""


def _sensitivity(facts: Facts) -> Section | None:
    rows = swings(facts)
    if not rows:
        return None
    middle = named(facts, facts["winner"])["usd_per_month"]
    finding = f"Cost of {facts['winner']} per month at the ends of each input, the others as assumed."
    impossible = [
        f"{row['input']} at {row[f'{end}_label']}"
        for row in facts["sensitivity"]
        for end in ("low", "high")
        if row.get(f"{end}_usd_per_month") is None
    ]
    items = [f"{facts['winner']} cannot serve {', '.join(impossible)}."] if impossible else []
    turned = {
        f"{row['input']} at {row[f'{end}_label']}: {row[f'winner_{end}']}"
        for row in facts["sensitivity"]
        for end in ("low", "high")
        if _turned(row.get(f"winner_{end}"), facts)
    }
    items += [f"* {', '.join(sorted(turned))} is the choice then."] if turned else []
    return Section("The numbers of the tornado", finding, (sensitivity_table(rows, middle, money),), items=tuple(items))


def _ceilings(facts: Facts) -> Section | None:
    rows = (facts.get("inverse") or {}).get("ceilings") or ()
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row.get("tok_per_s_per_user") or {}))
    cells = [
        (
            money(row.get("usd_per_mtok_output")),
            *(_reached((row.get("tok_per_s_per_user") or {}).get(name)) for name in names),
            str(row.get("best") or "none"),
        )
        for row in rows
    ]
    table = Table(("Ceiling per Mtok output", *names, "Fastest"), tuple(cells), frozenset({0, len(names) + 1}))
    return Section("How fast under a cost ceiling", "Highest tok/s per user at full load under each ceiling.", (table,))


def _reached(value: float | None) -> str:
    return "not reachable" if value is None else number(value)


def _models(facts: Facts) -> Section | None:
    # Where the least headroom of a fleet is a bound, that of each model is one.
    rows = [
        (system["name"], model, system.get("headroom_at_least", False))
        for system in facts.get("systems") or ()
        for model in system.get("models") or ()
    ]
    if len({model.get("model") for _, model, _ in rows}) < 2:
        return None
    header = ("System", "Model", "Layout", "GPUs", "TTFT p95", "TPOT p95", "Headroom")
    cells = [
        (
            str(name),
            str(model.get("model")),
            str(model.get("layout") or "–"),
            number(model.get("num_gpus"), whole=True),
            *(duration((model.get(metric) or {}).get("p95")) for metric in ("ttft_s", "tpot_s")),
            headroom({"headroom_at_least": at_least} | model),
        )
        for name, model, at_least in rows
    ]
    finding = "Every model has GPUs of its own in the cluster."
    return Section("The models of the fleet", finding, (without_empty(header, cells, {0, 1, 2}),))


def _launch(facts: Facts) -> Section | None:
    return launch(named(facts, facts.get("winner")))


def _listed(key: str, heading: str, finding: str) -> Any:
    """A section of rows that name their columns themselves, alone or with remarks in a dictionary."""

    def build(facts: Facts) -> Section | None:
        found = facts.get(key)
        if not found:
            return None
        rows = found.get("rows") or () if isinstance(found, Mapping) else found
        remarks = found.items() if isinstance(found, Mapping) else ()
        items = tuple(
            f"{title(str(k))}: {described(str(k), v)}"
            for k, v in remarks
            if isinstance(v, str | int | float) and v != ""
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
    _models,
    _latency,
    _money,
    _front,
    _bands,
    _sensitivity,
    _ceilings,
    _listed("inverse", "The question the other way round", "What a fixed budget, power or number of racks buys."),
    _listed("fabric", "Another fabric", "GPUs that each change of the network would take."),
    _listed("growth", "Until the next purchase", "How far today's choice carries a growing demand."),
    _listed("doubles", "If the model doubles", "The same demand with a larger model and with longer prompts."),
    _listed("rent_or_buy", "Rent or buy", "Cumulative cost of renting and of owning."),
)
_BEHIND = (_uncertainty, _launch, _cautions, _assumptions)
