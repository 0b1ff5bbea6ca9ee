"""A comparison as terminal text: the answer, the table, how sure, then what would change it."""

from __future__ import annotations

from typing import Any

from planner.tables import table
from planner.units import format_chance, format_gpus, format_seconds, format_usd, significant

Facts = dict[str, Any]
_BAR = 20
_MOST_BANDS = 12


def compare_text(facts: Facts) -> str:
    """Text of `compare`."""
    blocks = [[facts["headline"]], _question(facts), _systems(facts), _models(facts)]
    blocks += [_odds(facts), _swings(facts), _growth(facts), _fabric(facts), _doubles(facts)]
    blocks += [_inverse(facts), _ceilings(facts), _bands(facts), _rent_or_buy(facts)]
    for title, key in (("Risks", "risks"), ("Warnings", "warnings"), ("Next", "next")):
        blocks.append([title, *(f"  - {text}" for text in facts[key])] if facts[key] else [])
    blocks.append([f"Reproduce  {facts['command']}"])
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _question(facts: Facts) -> list[str]:
    lines = [f"{d['model']}, {d['workload']}, {d['slo']}" for d in facts["question"]["demands"]]
    return [f"Asked     {lines[0]}", *(f"          {line}" for line in lines[1:])]


def _systems(facts: Facts) -> list[str]:
    rows = [_system_row(s, facts["winner"]) for s in facts["systems"]]
    header = ["system", "layout", "GPUs", "$/month", "$/Mtok out", "tok/s/MW", "TTFT p95", "TPOT p95", "carries", "SLO"]
    lines = [
        "Every system at the same demand and SLO, its own best layout (> is the choice)",
        table(header, rows, left=2),
    ]
    lines += [f"    {s['name']}: {s['problem']}" for s in facts["systems"] if s["problem"]]
    return lines + _money(facts)


def _system_row(one: Facts, winner: str | None) -> tuple[str, ...]:
    mark = "> " if one["name"] == winner else "  "
    layout = one["layout"] or "-"
    if len(one["models"]) > 1:
        layout = f"{len(one['models'])} models"
    return (
        mark + one["name"],
        layout,
        _count(one["num_gpus"]),
        _usd(one["usd_per_month"]),
        _usd(one["usd_per_mtok_output"]),
        "-" if one["output_tok_per_s_per_mw"] is None else significant(one["output_tok_per_s_per_mw"]),
        _seconds((one["ttft_s"] or {}).get("p95")),
        _seconds((one["tpot_s"] or {}).get("p95")),
        _times(one["headroom"], one["headroom_at_least"]) if one["headroom"] else "-",
        "met" if one["meets_slo"] else "missed" if one["feasible"] else "no fit",
    )


def _money(facts: Facts) -> list[str]:
    rows = []
    for one in facts["systems"]:
        price = one["price"]
        if one["num_gpus"] is None:
            continue
        terms = "no price on record" if price is None else f"{price['basis']}, {price['provider']} {price['as_of']}"
        capex = "-" if not one["capex_usd"] else format_usd(one["capex_usd"])
        hour = "-" if price is None else f"{format_usd(price['usd_per_gpu_hour'])}"
        money = one["money"] or {}
        busy = "-" if money.get("utilisation") is None else f"{money['utilisation']:.0%}"
        kwh = "-" if money.get("kwh_per_mtok_provisioned") is None else significant(money["kwh_per_mtok_provisioned"])
        counts = (_count(one["billed_gpus"]), _count(one["nodes"]), _count(one["racks"]))
        rows.append((one["name"], hour, *counts, capex, busy, kwh, terms))
    if not rows:
        return []
    header = ["system", "$/GPU-h", "billed GPUs", "nodes", "racks", "capital", "busy", "kWh/Mtok", "price"]
    widths = max(len(row[-1]) for row in rows)
    padded = [(*row[:-1], row[-1].ljust(widths)) for row in rows]
    return ["", "What is billed", table(header, padded), *_break_even(facts)]


def _break_even(facts: Facts) -> list[str]:
    lines = []
    for one in facts["systems"]:
        found = (one["money"] or {}).get("break_even")
        if found:
            verdict = "cheaper" if found["is_cheaper_than_api"] else "dearer"
            lines.append(
                f"  {one['name']}: {verdict} than {found['provider'] or 'the API'} at this demand "
                f"({format_usd(found['api_usd_per_month'])} a month); breaks even at "
                f"{significant(found['requests_per_s'])} requests/s in the mean, {found['utilisation']:.0%} busy"
            )
    return lines


def _models(facts: Facts) -> list[str]:
    lines = []
    for one in facts["systems"]:
        if len(one["models"]) > 1:
            lines += [f"  {one['name']}", *(f"    {m['model']}: {m['headline']}" for m in one["models"])]
    return ["Models that share the cluster, GPUs of their own each", *lines] if lines else []


def _odds(facts: Facts) -> list[str]:
    rows = []
    for one in facts["systems"]:
        if one["probability_enough"] is None:
            continue
        interval, regret = one["usd_per_month_interval"], one["regret_usd_per_month"]
        sure = one["sure"]
        best = one["probability_best"]
        rows.append(
            (
                one["name"],
                "-" if best is None else format_chance(best),
                "-" if best is None else ("#" * round(_BAR * best)).ljust(_BAR),
                "-" if interval is None else f"{format_usd(interval[0])} to {format_usd(interval[1])}",
                format_chance(one["probability_enough"]),
                "none" if sure is None else format_gpus(sure["num_gpus"]),
                "-" if sure is None else _usd(sure["usd_per_month"]),
                "-" if regret is None else format_usd(regret["mean"]),
                _interval(one["intervals"]),
            )
        )
    if not rows:
        return []
    header = [
        "system",
        "cheapest",
        "",
        "80 % of $/month",
        "plan enough",
        "90 % sure",
        "for $/month",
        "regret/month",
        "step time",
    ]
    return [
        f"Is the winner the winner? {facts['uncertainty']['draws']:,} draws of prices, demand and prediction errors",
        table(header, rows),
        f'  Demand {facts["question"]["demand_error"]}. "plan enough": share of draws in which the GPUs above suffice.',
        '  "regret": mean cost beyond the cheapest of each draw. "step time": 80 % of measured over predicted.',
    ]


def _interval(intervals: Facts | None) -> str:
    return "-" if intervals is None else f"x{intervals['tpot'][0]:.2f} to x{intervals['tpot'][1]:.2f}"


def _swings(facts: Facts) -> list[str]:
    rows = []
    for s in facts["sensitivity"]:
        flips = {who for who in (s["winner_low"], s["winner_high"]) if who != facts["winner"]}
        rows.append(
            (
                s["input"],
                f"{s['low_label']}: {_usd_or(s['low_usd_per_month'], 'cannot')}",
                f"{s['high_label']}: {_usd_or(s['high_usd_per_month'], 'cannot')}",
                "" if not flips else "then " + ", ".join(sorted(flips)),
            )
        )
    if not rows:
        return []
    header = ["input", "at its low end", "at its high end", "cheapest"]
    return [f"What moves the bill of {facts['winner']} a month (80 % ends, one at a time)", table(header, rows)]


def _growth(facts: Facts) -> list[str]:
    rows = facts["growth"]["rows"]
    if not rows:
        return []
    rates = list(rows[0]["months"])
    cells = [(row["name"], _times(row["room"], row["room_at_least"]), *_waits(row)) for row in rows]
    header = ["system", "carries", *(f"{rate} a year" for rate in rates)]
    return ["Until the next purchase, by growth of the demand", table(header, cells)]


def _waits(row: Facts) -> list[str]:
    more = "> " if row["room_at_least"] else ""
    return ["-" if months is None else f"{more}{months:.0f} mo" for months in row["months"].values()]


def _times(factor: float, at_least: bool) -> str:
    return f"{'> ' if at_least else ''}x{factor:.2f}"


def _fabric(facts: Facts) -> list[str]:
    return _whatif("Another fabric (GPUs for the same demand, estimates)", facts["fabric"], facts)


def _doubles(facts: Facts) -> list[str]:
    return _whatif("The model or its prompts double (GPUs for the same demand, estimates)", facts["doubles"], facts)


def _whatif(title: str, rows: list[Facts], facts: Facts) -> list[str]:
    several = len(facts["question"]["demands"]) > 1
    moved = [row for row in rows if row["num_gpus_after"] != row["num_gpus_before"]]
    cells = [
        (
            f"{row['system']}{', ' + row['model'] if several else ''}",
            row["change"] + (f" ({row['note']})" if row["note"] else ""),
            _count(row["num_gpus_before"]),
            _count(row["num_gpus_after"], "cannot"),
            row["layout"],
        )
        for row in moved
    ]
    lines = [title] if rows else []
    if cells:
        lines.append(table(["system", "change", "GPUs now", "then", "layout then"], cells, left=2))
    same: dict[str, list[str]] = {}
    for row in rows:
        if row not in moved:
            same.setdefault(row["system"], []).append(row["change"])
    return lines + [f"  No change of GPUs on {name}: {', '.join(changes)}." for name, changes in same.items()]


def _inverse(facts: Facts) -> list[str]:
    inverse = facts["inverse"]
    if "rows" not in inverse:
        return []
    cells = [
        (
            row["name"],
            _count(row["num_gpus"]),
            _count(row["nodes"]),
            significant(row["requests_per_s"]),
            f"{row['users']:,.0f}",
            f"{row['output_tok_per_day'] / 1e9:,.2f} G",
            _usd(row["usd_per_month"]),
            row["layout"] or row["note"],
        )
        for row in inverse["rows"]
    ]
    header = ["system", "GPUs", "nodes", "requests/s", "in flight", "output tok/day", "$/month", "layout"]
    return [f"What {inverse['limit']} buys at the SLO and full load", table(header, cells)]


def _ceilings(facts: Facts) -> list[str]:
    rows = facts["inverse"]["ceilings"]
    if not rows:
        return []
    names = list(rows[0]["tok_per_s_per_user"])
    cells = [
        (
            f"{format_usd(row['usd_per_mtok_output'])}/Mtok",
            *(_count(row["tok_per_s_per_user"][name]) for name in names),
            row["best"] or "none",
        )
        for row in rows
    ]
    title = "The fastest for its users at full load, by cost ceiling [output tok/s per user]"
    return [title, table(["at most", *names, "best"], cells)]


def _bands(facts: Facts) -> list[str]:
    rows = facts["bands"]["rows"]
    if not rows:
        return []
    step = -(-len(rows) // _MOST_BANDS)
    names, baseline = list(rows[0]["values"]), facts["bands"]["baseline"]
    cells = [
        (
            f"{row['tok_per_s_per_user']:.0f} tok/s/user",
            *("-" if row["values"][name] is None else significant(row["values"][name]) for name in names),
            row["best"],
            "-" if row["vs_baseline_pct"] is None else f"{row['vs_baseline_pct']:+.0f} %",
        )
        for row in rows[::step]
    ]
    title = f"Best output tok/s per GPU by interactivity of {facts['bands']['model']} ({facts['bands']['basis']})"
    return [title, table(["band", *names, "cheapest", f"its tok/s/GPU against {baseline}"], cells)]


def _rent_or_buy(facts: Facts) -> list[str]:
    found = facts["rent_or_buy"]
    if found is None:
        return []
    cells = [(f"{row['month']} mo", _usd(row["rent_usd"]), _usd(row["buy_usd"])) for row in found["rows"]]
    title = f"Rent or buy {format_gpus(found['num_gpus'])} of {found['name']}: {found['verdict']} ({found['basis']})"
    return [title, table(["after", "rent", "buy"], cells)]


def _usd(value: float | None) -> str:
    return "unknown" if value is None else format_usd(value)


def _usd_or(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else format_usd(value)


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)


def _count(value: float | None, otherwise: str = "-") -> str:
    return otherwise if value is None else f"{value:,.0f}"
