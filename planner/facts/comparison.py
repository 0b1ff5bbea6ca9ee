"""A comparison as one plain dictionary: the same facts for JSON, the terminal text, the report and the dashboard."""

from __future__ import annotations

from math import isfinite, log

from planner import __version__
from planner.compare.comparison import MOST_GROWTH, Comparison
from planner.compare.entrant import MOST_TESTED, Entrant
from planner.compare.inverse import demand_text
from planner.compare.standing import Standing
from planner.compare.uncertainty import DRAWS, Odds
from planner.economics import TokenCosts, bill, terms_rows, token_costs
from planner.facts.basic import Facts, slo_facts
from planner.facts.money import money_facts
from planner.facts.verdict import headline, next_steps, risks
from planner.units import format_usd

_EVIDENCE = ("headline", "memory", "step", "heat", "cdf", "timeline", "experts", "balance", "slo", "objectives")
"""Facts of the winner's plan that a report shows."""
_GROWTHS = (0.25, 0.5, 1.0)
"""Growth per year looked at beside the stated one."""


def comparison_facts(answer: Comparison, command: str, plan_command: str = "") -> Facts:
    """Everything `compare --json` prints; wall time is added by the caller, being no property of the answer.

    `plan_command` with a cluster in the place of `{cluster}` plans the first model alone on one system.
    """
    systems = [_system(answer, one, plan_command) for one in answer.standings]
    return {
        "kind": "comparison",
        "headline": headline(answer),
        "winner": None if answer.winner is None else answer.winner.name,
        "baseline": answer.baseline,
        "feasible": any(one.feasible for one in answer.standings),
        "meets_slo": answer.winner is not None,
        "question": _question(answer),
        "slo": str(answer.question.demands[0].slo),
        "systems": systems,
        "bands": _bands(answer),
        "front": {
            name: [
                {
                    "tok_per_s_per_user": p.tok_per_s_per_user,
                    "output_tok_per_s_per_gpu": p.output_tok_per_s_per_gpu,
                    "layout": p.layout,
                }
                for p in points
            ]
            for name, points in answer.fronts.items()
        },
        "inverse": _inverse(answer),
        **_whatifs(answer),
        "growth": _growth(answer),
        "cost_curve": {
            name: [
                {"demand_factor": p.demand_factor, "num_gpus": p.num_gpus, "usd_per_month": p.usd_per_month}
                for p in points
            ]
            for name, points in answer.costs.items()
        },
        "sensitivity": _sensitivity(answer),
        "uncertainty": _uncertainty(answer),
        "rent_or_buy": _rent_or_buy(answer),
        "assumptions": _assumptions(answer),
        "risks": risks(answer),
        "warnings": sorted({text for s in systems for text in s["warnings"]}),
        "next": next_steps(answer),
        "command": command,
        "versions": {
            "moeplan": __version__,
            "engine": f"{answer.question.engine.name} {answer.question.engine.version}",
        },
    }


def _question(answer: Comparison) -> Facts:
    question = answer.question
    demands = [
        {
            "model": demand.model.name,
            "workload": str(demand.workload),
            "demand": demand_text(demand),
            "rate_per_s": demand.workload.arrivals.rate_per_s or None,
            "concurrency": demand.workload.arrivals.concurrency or None,
            "slo": str(demand.slo),
            "objectives": slo_facts(demand.slo),
            "prompt_tokens_mean": demand.workload.mean_prompt_tokens,
            "output_tokens_mean": demand.workload.mean_output_tokens,
        }
        for demand in question.demands
    ]
    text = "; ".join(f"{d['model']}, {d['workload']}, {d['slo']}" for d in demands)
    return {
        "text": text,
        "demands": demands,
        "offers": [one.name for one in answer.standings],
        "engine": f"{question.engine.name} {question.engine.version}",
        "seed": question.seed,
        "demand_error": str(question.demand_error),
    }


def _system(answer: Comparison, one: Standing, plan_command: str) -> Facts:
    odds, cost = answer.odds.get(one.name), one.bill
    first, price = _least_sure(one), None if one.bill is None else one.bill.price
    plan, tokens = first.plan, _tokens(one)
    several = len(one.entrants) > 1
    output_tok_per_s = _rates(one)[2] or None
    power_w = None if cost is None else cost.facility_power_w
    return {
        "name": one.name,
        "title": one.system.title,
        "cluster": first.cluster.name,
        # A plan is of one model, and how it is paid is said by --terms alone.
        "plan_command": "" if several or one.offer.basis else plan_command.replace("{cluster}", first.cluster.name),
        "feasible": one.feasible,
        "meets_slo": one.meets_slo,
        "problem": one.problem or ("" if one.meets_slo else str(plan["headline"])),
        "num_gpus": one.num_gpus or None,
        "billed_gpus": None if cost is None else cost.billed_gpus,
        "nodes": None if cost is None else cost.nodes,
        "racks": None if cost is None else cost.racks,
        "capex_usd": None if cost is None else cost.capex_usd,
        "usd_per_month": one.usd_per_month,
        "usd_per_month_parts": {} if cost is None else cost.parts,
        "price": None
        if price is None
        else {
            "basis": price.basis,
            "usd_per_gpu_hour": price.usd,
            "as_of": price.as_of,
            "provider": price.provider,
            "source": price.source,
        },
        "usd_per_mtok_input": tokens.usd_per_mtok_input,
        "usd_per_mtok_output": tokens.usd_per_mtok_output,
        "usd_per_mtok_total": tokens.usd_per_mtok_total,
        "allocation": tokens.rule,
        "output_tok_per_s": output_tok_per_s,
        "output_tok_per_s_per_gpu": output_tok_per_s / one.num_gpus if output_tok_per_s and one.num_gpus else None,
        "output_tok_per_s_per_mw": output_tok_per_s / power_w * 1e6 if output_tok_per_s and power_w else None,
        "ttft_s": plan["ttft_s"],
        "tpot_s": plan["tpot_s"],
        "layout": None
        if plan["layout"] is None
        else f"{len(one.entrants)} models"
        if several
        else plan["layout"]["name"],
        "models": [_model(one, index) for index in range(len(one.entrants))],
        "headroom": min(entrant.carries for entrant in one.entrants),
        "headroom_at_least": min(entrant.carries for entrant in one.entrants) >= MOST_TESTED,
        "binding": plan.get("binding_constraint", ""),
        "origin_share": plan.get("origin_share"),
        "intervals": _intervals(one),
        "chance_meets_slo": plan.get("certainty", {}).get("meets_slo"),
        "probability_best": None if odds is None else odds.best,
        "probability_enough": None if odds is None else odds.enough,
        "probability_cannot": None if odds is None else odds.cannot,
        "regret_usd_per_month": None
        if odds is None or odds.regret_usd_per_month is None
        else {"mean": odds.regret_usd_per_month[0], "p90": odds.regret_usd_per_month[1]},
        "usd_per_month_interval": None if odds is None else odds.usd_per_month,
        "num_gpus_interval": None if odds is None else odds.num_gpus,
        "sure": _sure(one, odds),
        "money": _money(one, answer.room.get(one.name, 0.0)),
        "evidence": {key: plan[key] for key in _EVIDENCE if key in plan} if one is answer.winner else None,
        "months_until_next_purchase": _months(
            answer.room.get(one.name, 0.0), answer.question.terms.demand.growth_per_year
        ),
        "launch": [row for entrant in one.entrants for row in entrant.plan.get("launch", [])],
        "warnings": [text for entrant in one.entrants for text in entrant.plan.get("warnings", [])],
        "next": [text for entrant in one.entrants for text in entrant.plan.get("next", [])],
    }


def _least_sure(one: Standing) -> Entrant:
    """The model whose SLO is least sure to hold: its latencies stand for the offer."""
    return min(one.entrants, key=lambda e: (e.meets_slo, (e.plan.get("certainty") or {}).get("meets_slo") or 0.0))


def _sure(one: Standing, odds: Odds | None) -> Facts | None:
    """GPUs that suffice in 90 % of the draws, and their bill."""
    if odds is None or odds.sure_gpus is None:
        return None
    cost = bill(one.system, odds.sure_gpus, one.terms)
    return {"num_gpus": odds.sure_gpus, "usd_per_month": cost.usd_per_month}


def _model(one: Standing, index: int) -> Facts:
    entrant, plan = one.entrants[index], one.entrants[index].plan
    return {
        "model": one.demands[index].model.name,
        "headline": plan["headline"],
        "num_gpus": entrant.num_gpus or None,
        "layout": None if plan["layout"] is None else plan["layout"]["name"],
        "settings": plan.get("settings"),
        "meets_slo": entrant.meets_slo,
        "ttft_s": plan["ttft_s"],
        "tpot_s": plan["tpot_s"],
        "output_tok_per_s": plan["output_tok_per_s"],
        "headroom": entrant.carries,
        "sure": plan.get("certainty", {}).get("sentence", ""),
    }


def _rates(one: Standing) -> tuple[float, float, float]:
    """Requests, input and output tokens per second of all models in the busiest hour."""
    output = [float(entrant.plan.get("output_tok_per_s") or 0.0) for entrant in one.entrants]
    requests = [rate / d.workload.mean_output_tokens for rate, d in zip(output, one.demands, strict=True)]
    prompts = [rate * d.workload.mean_prompt_tokens for rate, d in zip(requests, one.demands, strict=True)]
    return sum(requests), sum(prompts), sum(output)


def _tokens(one: Standing) -> TokenCosts:
    """Costs of tokens: the rates are those of the busiest hour, the month follows the demand profile."""
    per_month, (_, prompts, output) = one.terms.demand.per_month, _rates(one)
    return token_costs(one.usd_per_month, per_month(prompts), per_month(output), one.terms.allocation)


def _money(one: Standing, room: float) -> Facts | None:
    """How busy the GPUs billed are, energy per token, and the API to beat; None where nothing runs."""
    requests, prompts, output = _rates(one)
    if one.bill is None or not requests:
        return None
    carried = requests * max(room, 1.0)
    return money_facts(one.system, one.num_gpus, one.terms, output, prompts, requests, carried)


def _intervals(one: Standing) -> Facts | None:
    """80 % bounds of measured over predicted, and the kind of measurements they come from."""
    entrant = _least_sure(one)
    if entrant.time is None or entrant.ttft is None:
        return None
    return {
        "tpot": [entrant.time.low, entrant.time.high],
        "ttft": [entrant.ttft.low, entrant.ttft.high],
        "basis": entrant.plan["certainty"]["basis"],
        "num_points": entrant.time.num_points,
    }


def _bands(answer: Comparison) -> Facts:
    rows = [
        {
            "tok_per_s_per_user": band.tok_per_s_per_user,
            "best": band.leader,
            "vs_baseline_pct": None if band.over_baseline is None else 100 * band.over_baseline,
            "values": band.output_tok_per_s_per_gpu,
            "usd_per_mtok_output": band.usd_per_mtok_output,
        }
        for band in answer.bands
    ]
    return {
        "model": answer.question.demands[0].model.name,
        "baseline": answer.baseline,
        "basis": "steady states in closed form, prompts and decode mixed, before any SLO on tails",
        "rows": rows,
    }


def _inverse(answer: Comparison) -> Facts:
    facts: Facts = {
        "ceilings": [
            {"usd_per_mtok_output": c.usd_per_mtok_output, "tok_per_s_per_user": c.tok_per_s_per_user, "best": c.leader}
            for c in answer.ceilings
        ]
    }
    if answer.limit is not None:
        facts["limit"] = str(answer.limit)
        facts["rows"] = [
            {
                "name": row.name,
                "num_gpus": row.num_gpus or None,
                "nodes": row.nodes or None,
                "requests_per_s": row.requests_per_s,
                "users": row.users,
                "output_tok_per_day": row.output_tok_per_day,
                "usd_per_month": row.usd_per_month,
                "layout": row.layout,
                "note": row.note,
            }
            for row in answer.bought
        ]
    return facts


def _whatifs(answer: Comparison) -> Facts:
    fabric: list[Facts] = []
    doubles: list[Facts] = []
    by_hardware = {one.offer.hardware: one for one in reversed(answer.standings)}
    for one in reversed(by_hardware.values()):
        for demand, entrant in zip(one.demands, one.entrants, strict=True):
            for found in entrant.whatifs:
                row = {
                    "topic": found.topic,
                    "change": found.change,
                    "system": one.name.partition("@")[0],
                    "model": demand.model.name,
                    "num_gpus_before": found.num_gpus_before,
                    "num_gpus_after": found.num_gpus,
                    "layout": found.layout,
                    "note": found.note,
                }
                (fabric if found.topic == "fabric" else doubles).append(row)
    return {"fabric": fabric, "doubles": doubles}


def _growth(answer: Comparison) -> Facts:
    stated = answer.question.terms.demand.growth_per_year
    rates = sorted({*_GROWTHS, stated} - {0.0})
    return {
        "growth_per_year": stated,
        "rows": [
            {
                "name": name,
                "room": room,
                "room_at_least": room >= MOST_GROWTH,
                "months": {f"{rate:.0%}": _months(room, rate) for rate in rates},
            }
            for name, room in answer.room.items()
        ],
    }


def _months(room: float, growth_per_year: float) -> float | None:
    """Months until demand has grown by the factor `room`; None without growth or without room to begin with."""
    if growth_per_year <= 0 or room <= 0:
        return None
    return max(0.0, 12 * log(room) / log(1 + growth_per_year))


def _sensitivity(answer: Comparison) -> list[Facts]:
    return [
        {
            "input": swing.name,
            "low_label": swing.low,
            "high_label": swing.high,
            "low_usd_per_month": swing.usd_low if isfinite(swing.usd_low) else None,
            "high_usd_per_month": swing.usd_high if isfinite(swing.usd_high) else None,
            "winner_low": swing.winner_low,
            "winner_high": swing.winner_high,
        }
        for swing in answer.swings
    ]


def _uncertainty(answer: Comparison) -> Facts:
    return {
        "draws": DRAWS,
        "method": "Monte Carlo with common random numbers; layouts and GPU counts are chosen anew in every draw",
        "assumptions": [
            f"demand: 80 % within {answer.question.demand_error} (--uncertain), alike for all offers",
            "step times and TTFT: log-normal with the 80 % intervals of servers no calibration had seen; errors on two "
            "kinds of GPU correlate 0.2, those of step time and TTFT 0.33 (docs/accuracy.md)",
            "prices: triangular over the dated quotes of each system, fewer than four widened to the usual spread; "
            "prices stated in --terms are firm",
            "terms of owning: triangular over published ranges, alike for all offers",
        ],
    }


def _rent_or_buy(answer: Comparison) -> Facts | None:
    found, winner = answer.rent_or_buy, answer.winner
    if found is None or winner is None:
        return None
    yearly = [month for month in found.months if month % 12 == 0 or month == found.months[-1]]
    return {
        "name": winner.name,
        "num_gpus": winner.num_gpus,
        "crossing_month": found.crossing_month,
        "verdict": found.verdict,
        "rows": [
            {"month": month, "rent_usd": found.rent_usd[month], "buy_usd": found.buy_usd[month]} for month in yearly
        ],
        "basis": "dollars of today at the cost of capital of the terms; hardware of today's prices",
    }


def _assumptions(answer: Comparison) -> list[Facts]:
    rows = [
        {"text": f"{row['name']} = {row['value']}", "source": row["source"], "as_of": None}
        for row in terms_rows(answer.question.terms)
    ]
    for one in answer.standings:
        price = None if one.bill is None else one.bill.price
        if price is not None:
            text = f"{one.name}: {format_usd(price.usd)} per GPU-hour, {price.basis}, {price.provider}"
            rows.append({"text": text, "source": price.source, "as_of": price.as_of})
        for row in one.entrants[0].plan["assumptions"]:
            if "price" not in row["name"]:
                rows.append({"text": f"{row['name']} = {row['value']}", "source": row["source"], "as_of": None})
    seen: dict[str, Facts] = {}
    for row in rows:
        seen.setdefault(row["text"], row)
    return list(seen.values())
