"""Facts as rows of text for the tables of the page, units included."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from planner.units import format_chance, format_seconds, format_usd, significant
from planner.whatif.analytic import Answer
from planner.whatif.details import Row
from planner.whatif.lab import Heat, Lab, Measures
from planner.whatif.pins import differences, inputs_changed
from planner.whatif.question import Problem
from planner.whatif.rivals import Rival
from planner.whatif.scenario import Scenario

Text = dict[str, str]
_MARKUP = re.compile(r"([\\`*_{}\[\]()#$~<>|:])")


def plain(text: str) -> str:
    """`text` so that a page in Markdown shows it as it is: names of files and models are the user's.

    >>> plain("$5 *x*")
    '\\\\$5 \\\\*x\\\\*'
    """
    return _MARKUP.sub(r"\\\1", text)


def as_text(rows: Sequence[Mapping[str, Any]]) -> list[Text]:
    """Any rows with numbers of three digits and words for names."""
    return [{name.replace("_", " "): _cell(value) for name, value in row.items()} for row in rows]


def parts(rows: Sequence[Row]) -> list[Text]:
    """Parts of memory or of a step with how they are computed."""
    return [{"part": r.name, "size": r.text, "share": f"{r.share:.0%}", "how computed": r.how} for r in rows]


def total(rows: Sequence[Row]) -> str:
    """Sum of the operations of a step."""
    return format_seconds(sum(row.value for row in rows)) if rows else ""


def knobs(found: Lab) -> list[Text]:
    """The knobs' effect, a measure per row."""
    shown = {"without the knobs": found.plain, "with the knobs": found.knobs}
    return [
        {"per decode step": label}
        | {column: _measure(measures, name) for column, measures in shown.items()}
        | {"change": _change(found.plain, found.knobs, name)}
        for label, name in _MEASURES.items()
    ]


def heat(found: Heat) -> list[Text]:
    """Busiest rank of every layer, before and after."""
    pairs = zip(found.before.max(axis=1), found.after.max(axis=1), strict=True)
    return [
        {"layer": str(i), f"before: {found.kept}": f"{b:.2f}", f"after: {found.policy}": f"{a:.2f}"}
        for i, (b, a) in enumerate(pairs)
    ]


def heat_caption(found: Heat | str) -> str:
    """Busiest rank over the even share, mean over layers; or why there is none."""
    if isinstance(found, str):
        return found
    before, after = (float(np.mean(load.max(axis=1))) for load in (found.before, found.after))
    return (
        f"Expected by popularity: busiest rank {before:.2f} x the even share if placed {found.kept}, {after:.2f} x "
        f"under {found.policy}, mean over the layers shown. Single steps are less even, see the table above."
    )


def systems(rows: Sequence[Rival]) -> list[Text]:
    """A system per row."""
    names = next((r.objectives for r in rows if r.objectives), ())
    return [
        {
            "system": r.gpu,
            "GPUs": f"{r.num_gpus} ({r.nodes} node{'s' * (r.nodes > 1)})" if r.num_gpus else "none found",
            "may do with": str(r.may_do_gpus or ""),
            "layout": r.layout or r.problem,
            **{
                n.replace("_", " ").upper(): format_seconds(dict(r.objectives)[n]) if r.objectives else ""
                for n, _ in names
            },
            "output tok/s/GPU": significant(r.output_tok_per_s_per_gpu) if r.num_gpus else "",
            "$ per hour": format_usd(r.usd_per_hour) if r.usd_per_hour else "",
            "$/Mtok output": format_usd(r.usd_per_mtok_output) if r.usd_per_mtok_output else "",
            "chance of the SLO": format_chance(r.chance) if r.chance is not None else "",
            "measured": f"{r.measured_share:.0%}" if r.num_gpus else "",
            "price of": r.price_as_of,
        }
        for r in rows
    ]


SYSTEMS_CAPTION = (
    "Same model, demand and SLO: the fewest GPUs found of each system, cheapest first. These are cautious estimates, "
    "for percentiles are taken from the mean by ratios: where a system may do with fewer GPUs, only the simulation "
    "behind the button (`moeplan compare`) tells."
)
"""What the sizes of `systems` are."""


def comparison(facts: Mapping[str, Any]) -> list[Text]:
    """Systems of `moeplan compare`: simulated sizes, cost and how likely each is the cheapest."""
    return [
        {
            "system": str(row["name"]),
            "GPUs": str(row.get("num_gpus") or row.get("problem") or "none found"),
            "layout": str(row.get("layout") or ""),
            "$ per month": _or_blank(row.get("usd_per_month"), format_usd),
            "$/Mtok output": _or_blank(row.get("usd_per_mtok_output"), format_usd),
            "output tok/s/GPU": _or_blank(row.get("output_tok_per_s_per_gpu"), significant),
            "cheapest in": _or_blank(row.get("probability_best"), format_chance),
            "80 % of $ per month": " to ".join(format_usd(v) for v in row.get("usd_per_month_interval") or ()),
            "chance of the SLO": _or_blank(row.get("chance_meets_slo"), format_chance),
        }
        for row in facts.get("systems", ())
    ]


def _or_blank(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)


def pinned(before: Answer | tuple[Problem, ...], now: Answer) -> list[Text]:
    """Inputs and numbers in which a pinned answer and the present one differ; problems of a pin that has no answer."""
    if not isinstance(before, Answer):
        return [{"field": problem.field, "problem": problem.message} for problem in before]
    inputs = inputs_changed(before.question.scenario, now.question.scenario)
    sides = before.question.scenario, now.question.scenario
    changed = [
        {
            "": name,
            "pinned": _given(sides[0], name, old),
            "now": _given(sides[1], name, new),
            "change": "",
            "percent": "",
        }
        for name, old, new in inputs
    ]
    numbers = [
        {
            "": d.name,
            "pinned": d.pinned,
            "now": d.now,
            "change": d.absolute,
            "percent": f"{d.change:+.0%}" if d.change is not None else "",
        }
        for d in differences(before, now)
    ]
    return changed + _dropped(before, now) + numbers


def _given(scenario: Scenario, name: str, shown: str) -> str:
    """The value behind a default, where it says more than that the planner chooses."""
    value = getattr(scenario, name, "") if shown == "default" else shown
    return str(value or shown)


def _dropped(before: Answer, now: Answer) -> list[Text]:
    """What a capacity limit loses in both answers; nothing where neither has one."""
    old, new = (max(found.drop_rate.values(), default=0.0) for found in (before, now))
    row = {"": "Dropped assignments", "pinned": f"{old:.1%}", "now": f"{new:.1%}", "percent": ""}
    return [row | {"change": f"{100 * (new - old):+.1f} points"}] if old or new else []


def tornado_caption(rate: float, usd: float | None, within: bool = True) -> str:
    """What the bars start from."""
    price = f" at {format_usd(usd)} per million output tokens" if usd is not None else ""
    said = f"The layout stays and carries {significant(rate)} requests/s"
    if within:
        return f"{said} within the SLO{price}. A bar is one input."
    return (
        f"This layout misses the SLO even with one request at a time. {said} with the SLO aside{price}; so do the bars."
    )


def quantiles(values: Sequence[float]) -> list[Text]:
    """A few quantiles of 101."""
    return [{"share of requests": f"{at}%", "within": format_seconds(values[at])} for at in (5, 25, 50, 75, 90, 95, 99)]


def over_time(series: Mapping[str, Sequence[float]], name: str) -> list[Text]:
    """Eleven moments of a series."""
    picks = np.unique(np.linspace(0, len(series["time_s"]) - 1, 11).astype(int))
    shown = "{:.0%}" if name == "kv_share" else "{:,.0f}"
    return [{"simulated time": format_seconds(series["time_s"][i]), name: shown.format(series[name][i])} for i in picks]


_MEASURES = {
    "layout": "layout",
    "busiest rank over the even share": "max_over_mean",
    "active experts of the busiest rank": "active_experts",
    "experts per rank": "experts_per_rank",
    "dropped assignments": "drop_rate",
    "hit rate in HBM": "hit_rate",
    "decode step": "decode_s",
    "KV tokens per rank": "kv_tokens",
    "requests/s within the SLO": "requests_per_s",
    "$/Mtok output at that load": "usd_per_mtok_output",
}
_SHARES = ("drop_rate", "hit_rate")


def _measure(found: Measures | None, name: str) -> str:
    if found is None:
        return "does not fit"
    value = getattr(found, name)
    if value is None:
        return "none within the SLO"
    if isinstance(value, (str, int)):
        return value if isinstance(value, str) else f"{value:,}"
    if name in _SHARES:
        return f"{value:.1%}"
    if name == "decode_s":
        return format_seconds(value)
    return format_usd(value) if name == "usd_per_mtok_output" else significant(value)


def _change(plain: Measures | None, changed: Measures | None, name: str) -> str:
    if plain is None or changed is None or name in _SHARES:
        return ""
    old, new = getattr(plain, name), getattr(changed, name)
    if isinstance(old, str) or not old or new is None:
        return ""
    return f"{new / old - 1:+.1%}" if new != old else "same"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return significant(value) if isinstance(value, float) else str(value)
