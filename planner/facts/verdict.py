"""What a comparison says in words: the answer in one line, what may go wrong, what to do next."""

from __future__ import annotations

from math import inf

from planner.compare.comparison import Comparison
from planner.compare.standing import Standing
from planner.compare.uncertainty import DRAWS, Odds, Swing
from planner.economics import bill, price_range
from planner.units import format_chance, format_gpus, format_usd, significant

_CLOSE = 0.6
_SURE = 0.9
_UNMEASURED = 0.3


def risks(answer: Comparison) -> list[str]:
    """What may make the choice, its size or its cost wrong."""
    winner = answer.winner
    if winner is None:
        return []
    found = []
    odds = answer.odds.get(winner.name)
    if odds is not None and odds.best is not None and odds.best < _CLOSE and len(answer.odds) > 1:
        found.append(
            f"The order is not sure: {winner.name} is the cheapest in {format_chance(odds.best)} of the draws."
        )
    if odds is not None:
        found.append(_enough(winner, odds))
    found += _surer(answer, winner)
    for one in answer.standings:
        if one.bill is not None:
            found += _system_risks(one)
    unknown = [one.name for one in answer.standings if one.bill is not None and one.usd_per_month is None]
    if unknown:
        found.append(f"No price on record for {', '.join(unknown)}: left out of the odds; state one in --terms.")
    return found + [f"With {s.name} {end}, {who} is cheapest." for s, end, who in _flips(answer)]


def _enough(winner: Standing, odds: Odds) -> str:
    text = f"{format_gpus(winner.num_gpus)} will do in {format_chance(odds.enough)} of the draws"
    if odds.enough >= _SURE:
        return f"{text}."
    if odds.sure_gpus is None:
        return f"{text}; no number of them meets the SLO in {format_chance(odds.cannot)}. Calibrate, or relax the SLO."
    usd = bill(winner.system, odds.sure_gpus, winner.terms).usd_per_month
    return f"{text}; {odds.sure_gpus} will in 90 %" + (f", for {format_usd(usd)} a month." if usd else ".")


def _surer(answer: Comparison, winner: Standing) -> list[str]:
    """The offer that is cheapest when all are sized to be 90 % sure, where it is another."""
    bills = {}
    for one in answer.standings:
        sure = answer.odds[one.name].sure_gpus if one.name in answer.odds else None
        usd = None if sure is None else bill(one.system, sure, one.terms).usd_per_month
        if sure is not None and usd is not None:
            bills[one.name] = (usd, sure)
    best = min(bills, key=lambda name: bills[name], default=winner.name)
    if best == winner.name:
        return []
    usd, sure = bills[best]
    return [f"Sized to be 90 % sure, {best} is the cheapest: {format_gpus(sure)} for {format_usd(usd)} a month."]


def _system_risks(one: Standing) -> list[str]:
    found = []
    for demand, entrant in zip(one.demands, one.entrants, strict=True):
        share = entrant.plan.get("origin_share")
        guessed = share["extrapolated"] + share["roofline"] if share else 0.0
        if guessed > _UNMEASURED and entrant.time is not None:
            found.append(
                f"{one.name}: {guessed:.0%} of the predicted time of {demand.model.name} rests on data sheets and "
                f"scaled measurements, so step times are known to x{entrant.time.low:.2f} to x{entrant.time.high:.2f}."
            )
    is_rented = one.bill is not None and one.bill.basis == "rental"
    spread = price_range(one.system, one.terms, "rental" if is_rented else "purchase")
    if spread is not None and spread.num_quotes == 1 and spread.low < spread.high:
        found.append(f"{one.name}: one quote of {spread.newest} is all that is known of its price.")
    return found


def _flips(answer: Comparison) -> list[tuple[Swing, str, str]]:
    winner = answer.winner.name if answer.winner else ""
    found = []
    for swing in answer.swings:
        for end, who in ((swing.low, swing.winner_low), (swing.high, swing.winner_high)):
            if who not in (winner, "none"):
                found.append((swing, end, who))
    return found


def next_steps(answer: Comparison) -> list[str]:
    """What to do before money is spent, or what would make an offer meet the SLO."""
    winner = answer.winner
    if winner is None:
        best = answer.standings[0]
        if best.problem and best.bill is not None:
            name = best.system.name
            return [f"Offer at least {format_gpus(best.num_gpus)} of {name}, or {name} without a size."]
        return [text for entrant in best.entrants for text in entrant.plan.get("next", [])]
    steps = []
    share = winner.entrants[0].plan.get("origin_share") or {}
    if share.get("extrapolated", 0.0) + share.get("roofline", 0.0) > _UNMEASURED:
        steps.append(f"Measure {winner.name} before you buy: rent one node, `python -m microbench`, then import.")
    rented = winner.bill is not None and winner.bill.basis == "rental"
    steps.append(
        f"Run {winner.entrants[0].plan['headline'].split(':')[0]} on one replica for a day, feed the measured points "
        "to `moeplan calibrate --points`, and compare again."
    )
    stated = "rents" if rented else "purchase prices and terms of owning"
    steps.append(f"State your own quotes and terms with --terms: {stated} above are public list prices.")
    return steps


def headline(answer: Comparison) -> str:
    """The choice, its size and cost, how sure it is, and the next best, in one line."""
    winner = answer.winner
    if winner is None:
        best = answer.standings[0]
        return f"No offer meets the SLO. Nearest: {best.name}: {best.problem or best.entrants[0].plan['headline']}"
    odds = answer.odds.get(winner.name)
    usd = winner.usd_per_month
    text = f"{winner.name}: {format_gpus(winner.num_gpus)} ({_layouts(winner)}) "
    text += f"for {format_usd(usd)} a month" if usd is not None else "at an unknown price"
    text += " within the SLO"
    if odds is not None and odds.best is not None and len(answer.odds) > 1:
        text += f"; cheapest in {format_chance(odds.best)} of {DRAWS:,} draws"
    runner = next((one for one in answer.standings[1:] if one.meets_slo and one.usd_per_month is not None), None)
    if runner is not None and usd:
        more = (runner.usd_per_month or inf) / usd - 1
        text += f". Next: {runner.name}, {format_gpus(runner.num_gpus)}, {significant(100 * more, 2)} % more"
    return text + "."


def _layouts(one: Standing) -> str:
    return ", ".join(entrant.plan["layout"]["name"] for entrant in one.entrants)
