"""Facts as Vega-Lite specifications: plain dictionaries, drawn in the browser without any request to the outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from planner.figures import ACCENT, INK, MUTED, PALETTE, SLO_AREA, WARN
from planner.whatif.details import Row
from planner.whatif.lab import Heat
from planner.whatif.tornado import Bar

Spec = dict[str, Any]
EVEN = "#d5dae0"
"""Middle of the scale of loads, darker than the page, so that even loads show."""
PICK = "pick"
_CONFIG: Spec = {
    "font": "Source Sans, Source Sans Pro, sans-serif",
    "axis": {
        "labelColor": MUTED,
        "titleColor": INK,
        "titleFontWeight": "normal",
        "gridColor": "#e8ebef",
        "domainColor": MUTED,
        "labelFontSize": 12,
        "titleFontSize": 13,
    },
    "legend": {"labelFontSize": 12, "titleFontSize": 12, "orient": "top", "labelLimit": 300},
    "view": {"stroke": None},
    "title": {"fontSize": 13, "anchor": "start", "color": INK},
}
_VERDICTS = {"chosen layout": WARN, "meets the SLO": ACCENT, "misses the SLO": "#a9b2bb"}


def pareto(
    points: Sequence[Mapping[str, object]],
    lines: Sequence[Sequence[Mapping[str, float]]],
    at: Mapping[str, float] | None,
    least: float | None,
) -> Spec:
    """Throughput per GPU against interactivity; `lines` are the best of all layouts and the chosen one.

    `at` is where the demand puts it; the region from `least` output tokens per second and user on is shaded.
    """
    x = _number_axis("tok_per_s_per_user", "Interactivity (output tok/s per user, mean)")
    y = _number_axis("output_tok_per_s_per_gpu", "Output tok/s per GPU (logarithmic)", is_log=True)
    right = 1.04 * max(float(str(p["tok_per_s_per_user"])) for p in points)
    layers = _slo_area(least, right) if least is not None and least < right else []
    for values, colour, width in zip(lines, (INK, WARN), (1.2, 2.2), strict=True):
        mark = {"type": "line", "color": colour, "strokeWidth": width, "interpolate": "linear"}
        layers.append({"data": {"values": list(values)}, "mark": mark, "encoding": {"x": x, "y": y}})
    layers.append(_layouts(points, x, y))
    if at is not None:
        star = {"type": "point", "shape": "diamond", "filled": True, "size": 260, "color": WARN, "stroke": "white"}
        tip = [
            _tip("tok_per_s_per_user", "at your demand, tok/s per user"),
            _tip("output_tok_per_s_per_gpu", "tok/s per GPU"),
        ]
        layers.append({"data": {"values": [dict(at)]}, "mark": star, "encoding": {"x": x, "y": y, "tooltip": tip}})
    return _spec({"height": 380, "layer": layers})


def _slo_area(least: float, right: float) -> list[Spec]:
    place = {"x": {"field": "from", "type": "quantitative"}}
    data = {"values": [{"from": least, "to": right}]}
    text = {
        "type": "text",
        "align": "left",
        "dx": 6,
        "dy": 10,
        "color": "#3f6b33",
        "fontSize": 12,
        "text": "meets the TPOT limit",
    }
    return [
        {"data": data, "mark": {"type": "rect", "color": SLO_AREA}, "encoding": place | {"x2": {"field": "to"}}},
        {"data": data, "mark": text, "encoding": place | {"y": {"value": 0}}},
    ]


def _layouts(points: Sequence[Mapping[str, object]], x: Spec, y: Spec) -> Spec:
    tips = [
        _tip("layout", "layout", ""),
        _tip("verdict", "verdict", ""),
        _tip("kv", "KV cache", ""),
        _tip("requests_per_s", "requests/s of a replica"),
        _tip("gpus_per_replica", "GPUs of a replica", "d"),
        _tip("sequences_per_rank", "sequences per rank", ".0f"),
        _tip("tok_per_s_per_user", "tok/s per user"),
        _tip("output_tok_per_s_per_gpu", "tok/s per GPU"),
    ]
    scale = {"domain": list(_VERDICTS), "range": list(_VERDICTS.values())}
    strong = {"condition": {"param": PICK, "empty": False, "value": 1}, "value": 0.55}
    return {
        "data": {"values": list(points)},
        "params": [{"name": PICK, "select": {"type": "point", "fields": ["id"]}}],
        "mark": {"type": "point", "filled": True, "size": 60, "cursor": "pointer"},
        "encoding": {
            "x": x,
            "y": y,
            "color": {"field": "verdict", "type": "nominal", "scale": scale, "title": None},
            "opacity": strong,
            "tooltip": tips,
        },
    }


def stacked(rows: Sequence[Row], unit: str, scale: float) -> Spec:
    """Parts of one whole side by side on one bar, each with how it is computed."""
    named = [{"part": r.name, "value": r.value / scale, "text": r.text, "share": r.share, "how": r.how} for r in rows]
    order = {r["part"]: i for i, r in enumerate(named)}
    values = [row | {"order": order[row["part"]]} for row in named]
    colours = {"domain": list(order), "range": [PALETTE[i % len(PALETTE)] for i in range(len(order))]}
    legend = {"title": None, "columns": 6, "symbolLimit": 20}
    return _spec(
        {
            "height": 150,
            "data": {"values": values},
            "mark": {"type": "bar", "stroke": "white", "strokeWidth": 1},
            "encoding": {
                "x": {"field": "value", "type": "quantitative", "stack": "zero", "title": unit},
                "order": {"field": "order"},
                "color": {"field": "part", "type": "nominal", "scale": colours, "sort": None, "legend": legend},
                "tooltip": [_tip("part", "part", ""), _tip("text", "size", ""), _tip("share", "share", ".0%"), _how()],
            },
        }
    )


def bars(rows: Sequence[Row], unit: str, scale: float, top: int = 8) -> Spec:
    """Parts below each other, longest first, labelled with their share."""
    kept = list(rows[:top])
    values: list[Spec] = [
        {"part": r.name, "value": r.value / scale, "label": f"{r.text} ({r.share:.0%})", "how": r.how} for r in kept
    ]
    rest = sum(r.value for r in rows[top:])
    if rest:
        share = sum(r.share for r in rows[top:])
        values.append({"part": "other", "value": rest / scale, "label": f"{share:.0%}", "how": "the rest together"})
    longest = max(v["value"] for v in values)
    y = {"field": "part", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 200}}
    x = {"field": "value", "type": "quantitative", "title": unit, "scale": {"domain": [0, 1.4 * longest]}}
    tips = [_tip("part", "operation", ""), _tip("label", "time", ""), _how()]
    text = {"type": "text", "align": "left", "dx": 4, "color": INK, "fontSize": 12}
    return _spec(
        {
            "height": 24 * len(values) + 20,
            "data": {"values": values},
            "encoding": {"y": y, "x": x, "tooltip": tips},
            "layer": [
                {"mark": {"type": "bar", "color": ACCENT, "height": {"band": 0.66}}},
                {"mark": text, "encoding": {"text": {"field": "label"}}},
            ],
        }
    )


def heat(found: Heat) -> Spec:
    """Load of every rank in every layer over the even share, before and after balancing, on one scale."""
    panels = {f"before: {found.kept}": found.before, f"after: {found.policy}": found.after}
    values = [
        {"when": when, "layer": layer, "rank": rank, "load": round(float(load[layer, rank]), 4)}
        for when, load in panels.items()
        for layer in range(load.shape[0])
        for rank in range(load.shape[1])
    ]
    spread = max(0.05, *(float(np.abs(load - 1).max()) for load in panels.values()))
    domain = [round(max(0.0, 1 - spread), 3), 1, round(1 + spread, 3)]
    colour = {"domain": domain, "interpolate": "rgb", "range": [PALETTE[1], EVEN, PALETTE[4]]}
    cell = {
        "mark": "rect",
        "width": "container",
        "encoding": {
            "x": {"field": "rank", "type": "ordinal", "title": "rank", "axis": {"labelAngle": 0, "labelOverlap": True}},
            "y": {"field": "layer", "type": "ordinal", "title": "MoE layer (of those drawn)"},
            "color": {"field": "load", "type": "quantitative", "scale": colour, "title": "load / even share"},
            "tooltip": [_tip("rank", "rank", ""), _tip("layer", "layer", ""), _tip("load", "load / even share", ".2f")],
        },
    }
    sides = [
        cell | {"title": when, "transform": [{"filter": f"datum.when === '{when}'"}], "width": 330, "height": 230}
        for when in panels
    ]
    return _spec({"data": {"values": values}, "hconcat": sides})


def drops(rows: Sequence[Mapping[str, float | str]], chosen: float) -> Spec:
    """Lost assignments against the capacity factor, a line per kind of step; the factor in use is marked."""
    x = {"field": "capacity_factor", "type": "quantitative", "title": "Capacity factor", "axis": {"tickCount": 8}}
    y = {"field": "drop_rate", "type": "quantitative", "title": "Dropped assignments", "axis": {"format": ".0%"}}
    colour = {"field": "step", "type": "nominal", "title": None, "scale": {"range": [ACCENT, WARN]}}
    tips = [
        _tip("step", "step", ""),
        _tip("capacity_factor", "factor", ".2f"),
        _tip("drop_rate", "dropped assignments", ".1%"),
        _tip("fully_dropped_rate", "tokens without any expert", ".1%"),
    ]
    mark = {"type": "line", "point": True}
    layers: list[Spec] = [{"mark": mark, "encoding": {"x": x, "y": y, "color": colour, "tooltip": tips}}]
    if chosen:
        rule = {"type": "rule", "color": MUTED, "strokeDash": [4, 3]}
        at = {"x": {"field": "capacity_factor", "type": "quantitative"}}
        layers.append({"data": {"values": [{"capacity_factor": chosen}]}, "mark": rule, "encoding": at})
    return _spec({"height": 230, "data": {"values": list(rows)}, "layer": layers})


def tornado(base: float, found: Sequence[Bar], within: bool = True) -> Spec:
    """Requests per second within the SLO, or with it aside, when each input is a tenth smaller or larger."""
    values = [
        {"input": bar.name, "end": label, "to": rate, "base": base}
        for bar in found
        for label, rate in ((bar.low_label, bar.low_requests_per_s), (bar.high_label, bar.high_requests_per_s))
    ]
    ends = list(dict.fromkeys(str(v["end"]) for v in values))
    title = f"requests/s carried {'within the SLO' if within else 'with the SLO aside'}"
    x = {"field": "to", "type": "quantitative", "title": title, "scale": {"zero": False}}
    colour = {
        "field": "end",
        "type": "nominal",
        "scale": {"domain": ends, "range": ["#8cc2a8", ACCENT]},
        "title": "input",
    }
    tips = [_tip("input", "input", ""), _tip("end", "change", ""), _tip("to", "requests/s", ".3g")]
    y = {"field": "input", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 240}}
    return _spec(
        {
            "height": 30 * len(found) + 80,
            "data": {"values": values},
            "mark": {"type": "bar", "height": {"band": 0.66}},
            "encoding": {"y": y, "x": x, "x2": {"field": "base"}, "color": colour, "tooltip": tips},
        }
    )


def cdf(quantiles: Sequence[float], metric: str, limit_s: float | None) -> Spec:
    """Share of requests served within a time."""
    share = np.linspace(0, 1, len(quantiles))
    scale, unit = (1.0, "s") if max(quantiles) >= 1.0 else (1e3, "ms")
    values = [{"t": q * scale, "share": float(s)} for q, s in zip(quantiles, share, strict=True)]
    x = {"field": "t", "type": "quantitative", "title": f"{metric} ({unit})", "axis": {"tickCount": 6}}
    y = {"field": "share", "type": "quantitative", "title": "Share of requests", "axis": {"format": ".0%"}}
    layers: list[Spec] = [{"mark": {"type": "line", "color": ACCENT}, "encoding": {"x": x, "y": y}}]
    if limit_s is not None:
        rule = {"type": "rule", "color": "#3f6b33", "strokeDash": [4, 3]}
        at = {"x": {"field": "t", "type": "quantitative"}}
        layers.append({"data": {"values": [{"t": limit_s * scale}]}, "mark": rule, "encoding": at})
    return _spec({"height": 220, "data": {"values": values}, "layer": layers})


def timeline(series: Mapping[str, Sequence[float]], name: str, title: str) -> Spec:
    """One quantity over simulated time."""
    values = [{"t": t, "value": v} for t, v in zip(series["time_s"], series[name], strict=True)]
    x = {"field": "t", "type": "quantitative", "title": "Simulated time (s)"}
    axis: Spec = {"tickCount": 3, "tickMinStep": 1} | (
        {"format": ".0%", "tickMinStep": 0.01} if name == "kv_share" else {}
    )
    top = max(*series[name], 0.01 if name == "kv_share" else 1)
    y = {"field": "value", "type": "quantitative", "title": title, "axis": axis, "scale": {"domain": [0, top]}}
    mark = {"type": "area", "color": ACCENT, "opacity": 0.25, "interpolate": "step-after", "line": {"color": ACCENT}}
    return _spec({"height": 150, "data": {"values": values}, "mark": mark, "encoding": {"x": x, "y": y}})


def _spec(spec: Spec) -> Spec:
    usermeta = {"embedOptions": {"renderer": "svg", "actions": False}}
    return {"config": _CONFIG, "usermeta": usermeta} | spec


def _number_axis(field: str, title: str, is_log: bool = False) -> Spec:
    scale = {"type": "log"} if is_log else {"zero": True}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale}


def _tip(field: str, title: str, form: str = ".3g") -> Spec:
    kind = "quantitative" if form else "nominal"
    return {"field": field, "type": kind, "title": title} | ({"format": form} if form else {})


def _how() -> Spec:
    return _tip("how", "how computed", "")
