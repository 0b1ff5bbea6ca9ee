"""The page of a comparison of clusters: the buyer's answer on one printed page, then the evidence.

Facts are the dictionary of `compare --json`. Every key may be missing or None; its part of the page is left out then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from planner import decisionfigures
from planner.report.blocks import Page, Section, Table
from planner.report.comparisonsections import comparison_evidence, swings
from planner.report.rows import named, without_empty
from planner.report.wording import chance, headroom, money, number, short_money, spread

Facts = Mapping[str, Any]
_MOST_RISKS, _MOST_STEPS = 4, 2
"""Bullets on the first page; the rest is evidence."""
_MOST_BARS = 7
"""Inputs of the tornado on the first page."""


def comparison_page(facts: Facts) -> Page:
    """Page of the facts of `compare --json`."""
    winner = named(facts, facts.get("winner"))
    verdict = ("good", "Meets the SLO") if winner else ("bad", "No system meets the SLO")
    names = facts.get("systems") or ()
    models = [str(row.get("model")) for row in (facts.get("question") or {}).get("demands") or ()]
    return Page(
        f"{', '.join(models) or 'Model'}: {len(names)} systems compared",
        verdict,
        str(facts.get("headline") or verdict[1]),
        tuple(_tiles(winner)) if winner else (),
        tuple(section for build in _SUMMARY if (section := build(facts)) is not None),
        tuple(comparison_evidence(facts)),
        str(facts.get("command") or ""),
        ", ".join(f"{name} {value}" for name, value in (facts.get("versions") or {}).items()),
    )


def _tiles(winner: Facts) -> list[tuple[str, str, str]]:
    nodes, racks = winner.get("nodes"), winner.get("racks")
    whole = [_count(nodes, "node")] if nodes else []
    whole += [_count(racks, "rack")] if racks and racks >= 1 else []
    price = winner.get("price") or {}
    basis = " ".join(str(price[key]) for key in ("basis", "as_of") if price.get(key))
    return [
        ("Best", str(winner.get("name", "")), str(winner.get("layout") or "")),
        ("GPUs", number(winner.get("num_gpus"), whole=True), ", ".join(whole)),
        ("Cost", money(winner.get("usd_per_month")), f"a month{', ' + basis if basis else ''}"),
        ("Price", money(winner.get("usd_per_mtok_output")), "per million output tokens"),
        ("Cheapest in", chance(winner.get("probability_best")), "of all draws"),
        ("SLO holds in", chance(winner.get("chance_meets_slo")), "of cases like this"),
        ("Headroom", headroom(winner), "the asked demand"),
    ]


def _count(number_of: float, noun: str) -> str:
    return f"{number_of:,g} {noun}{'' if number_of == 1 else 's'}"


def _systems(facts: Facts) -> Section | None:
    rows = facts.get("systems") or ()
    if not rows:
        return None
    header = ["System", "GPUs", "SLO", "Sure", "$ per month", "80 % range", "To be 90 % sure"]
    header += ["$ per Mtok output", "Output tok/s per MW", "Best in"]
    cells = [
        (
            f"{row.get('name')}{' (best)' if row.get('name') == facts.get('winner') else ''}",
            _counted(row, "num_gpus"),
            _slo(row),
            chance(row.get("chance_meets_slo")),
            money(row.get("usd_per_month")),
            spread(row.get("usd_per_month_interval"), short_money),
            _sure(row),
            number(row.get("usd_per_mtok_output")),
            number(row.get("output_tok_per_s_per_mw")),
            chance(row.get("probability_best")),
        )
        for row in rows
    ]
    return Section(
        "The systems at the same SLO and demand", "", (without_empty(header, cells, {0, 2}),), style="systems"
    )


def _sure(row: Facts) -> str:
    """GPUs that suffice in 90 % of the draws, and their bill."""
    sure = row.get("sure") or {}
    if not sure.get("num_gpus"):
        return "–"
    bill = sure.get("usd_per_month")
    return f"{sure['num_gpus']:,} GPUs{', ' + short_money(bill) if bill else ''}"


def _counted(row: Facts, key: str) -> str:
    return number(row.get(key), whole=True) if row.get("feasible", True) else "–"


def _slo(row: Facts) -> str:
    if row.get("meets_slo"):
        return "meets"
    return "misses" if row.get("feasible", True) else "does not fit"


def _probability(facts: Facts) -> Section | None:
    chances = [(str(r["name"]), r["probability_best"]) for r in facts.get("systems") or () if _known(r)]
    if len(chances) < 2:
        return None
    chances.sort(key=lambda pair: -pair[1])
    name, best = chances[0]
    finding = f"{name} is the best choice in {chance(best)} of the draws, {chances[1][0]} in {chance(chances[1][1])}."
    regret = (named(facts, facts.get("winner")).get("regret_usd_per_month") or {}).get("mean")
    if regret is not None:
        finding += f" Choosing {facts['winner']} is regretted by {money(regret)} a month on average."
    draw = partial(decisionfigures.probability_bars, chances)
    return Section("Is the winner the winner?", finding, draw=draw, style="half")


def _known(row: Facts) -> bool:
    return row.get("probability_best") is not None


def _cost(facts: Facts) -> Section | None:
    curves = {str(name): rows for name, rows in (facts.get("cost_curve") or {}).items() if _priced(rows)}
    if not curves:
        return None
    cheapest: dict[float, str] = {}
    for factor in sorted({row["demand_factor"] for rows in curves.values() for row in rows}):
        costs = {
            name: row["usd_per_month"]
            for name, rows in curves.items()
            for row in _priced(rows)
            if row["demand_factor"] == factor
        }
        if costs:
            cheapest[factor] = min(costs, key=lambda name: costs[name])
    changes = [f for before, f in zip(cheapest, list(cheapest)[1:], strict=False) if cheapest[before] != cheapest[f]]
    first = next(iter(cheapest))
    finding = f"{cheapest[first]} is cheapest at {first:g} x the demand"
    finding += "".join(f", {cheapest[factor]} from {factor:g} x" for factor in changes)
    finding += "." if changes else " and at every other demand shown."
    draw = partial(decisionfigures.cost_against_demand, curves, True)
    return Section("Cost against demand", finding, draw=draw, style="half")


def _priced(rows: Sequence[Facts]) -> list[Facts]:
    return [row for row in rows if row.get("usd_per_month") is not None]


def _sensitivity(facts: Facts) -> Section | None:
    middle = named(facts, facts.get("winner")).get("usd_per_month")
    rows = swings(facts)
    if not rows or middle is None:
        return None
    turning = [
        str(row["input"])
        for row in facts["sensitivity"]
        if any(row.get(key) not in (None, facts["winner"]) for key in ("winner_low", "winner_high"))
    ]
    largest = max(rows, key=lambda row: decisionfigures.swing(row, middle))
    finding = f"The largest lever is {largest['input']}: {money(largest['low'])} to {money(largest['high'])} a month."
    turned = f" Another system wins at an end of {', '.join(turning)}."
    finding += turned if turning else " None alone turns the choice."
    label = f"Cost of {facts['winner']} per month"
    draw = partial(decisionfigures.tornado, rows[:_MOST_BARS], middle, label, is_money=True, is_half=True)
    return Section("What would change the answer", finding, draw=draw, style="half")


def _risks(facts: Facts) -> Section | None:
    risks = [str(item) for item in (*(facts.get("risks") or ()), *(facts.get("warnings") or ()))][:_MOST_RISKS]
    steps = [f"Next: {item}" for item in facts.get("next") or ()][:_MOST_STEPS]
    items = (*risks, *steps)
    return Section("Risks and next steps", "", items=items, style="warnings half") if items else None


def _question(facts: Facts) -> Section | None:
    question = facts.get("question") or {}
    rows = [(str(demand.get("model", "Demand")), _demand(demand)) for demand in question.get("demands") or ()]
    if question.get("text") and not rows:
        rows.append(("Asked", str(question["text"])))
    served = [str(question["engine"])] if question.get("engine") else []
    served += [f"seed {question['seed']}"] if question.get("seed") is not None else []
    served += [f"demand uncertain by {question['demand_error']}"] if question.get("demand_error") else []
    rows += [("Engine", ", ".join(served))] if served else []
    if not rows:
        return None
    return Section("The question", "", (Table(("", ""), tuple(rows), frozenset({0, 1})),), style="question")


def _demand(demand: Facts) -> str:
    workload = str(demand.get("workload") or "")
    parts = [workload] if workload else []
    if demand.get("rate_per_s") is not None and "requests/s" not in workload:
        parts.append(f"{number(demand['rate_per_s'])} requests/s")
    if demand.get("concurrency") and "users" not in workload:
        parts.append(f"{demand['concurrency']:,} users")
    if demand.get("slo"):
        parts.append(str(demand["slo"]))
    return ", ".join(parts)


_SUMMARY = (_question, _systems, _probability, _cost, _sensitivity, _risks)
"""Sections of the first printed page, in reading order."""
