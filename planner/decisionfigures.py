"""Figures of decisions: who is best, what it costs as demand grows, what would change it, how even ranks are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from planner.figures import ACCENT, INK, LINE, MUTED, PALETTE, SLO_AREA, WARN, axes_of, format_axis
from planner.units import format_usd_short

_HALF_IN = 3.75
_COLOURS = (PALETTE[0], PALETTE[4], PALETTE[2], PALETTE[6], PALETTE[5], PALETTE[8], PALETTE[1], PALETTE[3])
_MARKERS = "osD^vPX*"
_LABEL, _HALF_LABEL, _HALF_END = 46, 25, 9
"""Letters of a label of a wide and of a narrow figure, and of the end of a bar in a narrow one."""
_ROWS = 10
"""Bars of a tornado; the issue of this tool asks for the ten inputs that matter."""


def cost_against_demand(curves: Mapping[str, Sequence[Mapping[str, Any]]], is_half: bool = False) -> Figure:
    """Monthly cost [$] over multiples of the demand, a line per system; hollow points need more GPUs than are offered.

    Several systems are drawn on logarithmic axes. Rows need `demand_factor` and `usd_per_month`; None leaves a gap.
    """
    width = _HALF_IN if is_half else None
    legend_rows = -(-len(curves) // (3 if is_half else 5)) if len(curves) > 1 else 0
    with axes_of((1.75 if is_half else 2.6) + 0.15 * legend_rows, width_in=width) as (figure, (axes,)):
        for index, (name, rows) in enumerate(curves.items()):
            known = [row for row in rows if row.get("usd_per_month") is not None]
            x, y = [row["demand_factor"] for row in known], [row["usd_per_month"] for row in known]
            colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
            # GPUs come in whole replicas: a lone curve shows its stairs, several would hide one another.
            style = "steps-pre" if len(curves) == 1 else "default"
            axes.plot(x, y, color=colour, lw=1.3, label=name, drawstyle=style)
            for row, px, py in zip(known, x, y, strict=True):
                face = colour if row.get("is_offered", True) else "white"
                axes.plot(px, py, marker, ms=4.0, mfc=face, mec=colour, mew=1.0)
        axes.axvline(1.0, color=MUTED, lw=0.8, ls=(0, (2, 2)))
        if len(curves) > 1:
            _doublings(axes, curves)
            _legend(figure, is_half)
        else:
            axes.set_ylim(0)
            axes.set_xlim(0)
            format_axis(axes.yaxis, format_usd_short)
        axes.set_xlabel("Demand (1 = asked)")
        axes.set_ylabel("$ per month")
        axes.grid(True)
    return figure


def tornado(
    rows: Sequence[Mapping[str, Any]],
    middle: float,
    label: str,
    *,
    is_money: bool = False,
    limit: float | None = None,
    is_half: bool = False,
) -> Figure:
    """Bars from what a low input gives to what a high one gives, around `middle`; largest first, ten at most.

    Rows need `input`, `low`, `high`, `low_label`, `high_label`; `limit` is a line not to be crossed.
    """
    shown = sorted(rows, key=lambda row: -swing(row, middle))[:_ROWS]
    ends = [row[end] for row in shown for end in ("low", "high")] + [middle] + ([limit] if limit is not None else [])
    margin = (0.32 if is_half else 0.16) * (max(ends) - min(ends) or abs(middle) or 1.0)
    with axes_of(0.72 + (0.2 if is_half else 0.27) * len(shown), width_in=_HALF_IN if is_half else None) as (
        figure,
        (axes,),
    ):
        for position, row in enumerate(shown):
            for end, colour in (("low", PALETTE[1]), ("high", PALETTE[0])):
                axes.barh(position, row[end] - middle, left=middle, height=0.62, color=colour)
            _end_labels(axes, position, row, _HALF_END if is_half else _HALF_LABEL)
        axes.axvline(middle, color=INK, lw=0.9)
        if limit is not None:
            axes.axvline(limit, color=WARN, lw=1.0, ls=(0, (4, 3)))
            axes.annotate("limit", (limit, -0.6), (3, -1), textcoords="offset points", color=WARN, fontsize=8, va="top")
        longest = _HALF_LABEL if is_half else _LABEL
        axes.set_yticks(range(len(shown)), [shorten(row["input"], longest) for row in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(min(ends) - margin, max(ends) + margin)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.locator_params(axis="x", nbins=4 if is_half else 8)
        format_axis(axes.xaxis, format_usd_short if is_money else "{:.0%}".format)
        axes.set_xlabel(label)
        axes.grid(True, axis="x")
    return figure


def probability_bars(rows: Sequence[tuple[str, float]]) -> Figure:
    """Chance of each system to be the best, longest first."""
    with axes_of(max(1.6, 0.65 + 0.22 * len(rows)), width_in=_HALF_IN) as (figure, (axes,)):
        names, chances = [name for name, _ in rows], [chance for _, chance in rows]
        colours = [ACCENT if chance == max(chances) else PALETTE[1] for chance in chances]
        axes.barh(names, chances, color=colours, height=0.62)
        for position, chance in enumerate(chances):
            text = "<1%" if 0 < chance < 0.01 else ">99%" if 0.99 < chance < 1 else f"{chance:.0%}"
            axes.annotate(text, (chance, position), (4, 0), textcoords="offset points", va="center_baseline")
        axes.set_xlim(0, 1.14)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        format_axis(axes.xaxis, "{:.0%}".format)
        axes.set_xlabel("Share of the draws")
        axes.tick_params(axis="y", length=0, labelcolor=INK)
    return figure


def fronts(curves: Mapping[str, Sequence[Mapping[str, Any]]], min_tok_per_s_per_user: float | None = None) -> Figure:
    """Throughput per GPU against interactivity, a line per system, the region of the SLO shaded.

    Rows need `tok_per_s_per_user` and `output_tok_per_s_per_gpu`.
    """
    with axes_of(3.3) as (figure, (axes,)):
        right = 1.05 * max(row["tok_per_s_per_user"] for rows in curves.values() for row in rows)
        for index, (name, rows) in enumerate(curves.items()):
            points = sorted((row["tok_per_s_per_user"], row["output_tok_per_s_per_gpu"]) for row in rows)
            x, y = zip(*points, strict=True)
            marker, colour = _MARKERS[index % len(_MARKERS)], _COLOURS[index % len(_COLOURS)]
            axes.plot(x, y, label=name, color=colour, lw=1.3, marker=marker, ms=4)
        if min_tok_per_s_per_user is not None:
            axes.axvspan(min_tok_per_s_per_user, max(right, min_tok_per_s_per_user * 1.05), color=SLO_AREA, lw=0)
            axes.axvline(min_tok_per_s_per_user, color="#6a9a5b", lw=0.9, ls=(0, (4, 3)))
        axes.set_xlim(0, max(right, (min_tok_per_s_per_user or 0) * 1.05))
        axes.set_ylim(0)
        axes.set_xlabel("Interactivity (output tok/s per user); shaded: within the TPOT limit")
        axes.set_ylabel("Output tok/s per GPU")
        axes.grid(True)
        _legend(figure, False)
    return figure


def heat_map(panels: Sequence[Mapping[str, Any]], unit: str = "Rank") -> Figure:
    """Loads of the ranks (or another `unit`) over the even share, a panel per placement on one colour scale.

    Panels need `placement`, `layers` [layers] and `loads` [layers][ranks]; cells of small maps carry their number.
    """
    grids = [np.asarray(panel["loads"], dtype=float) for panel in panels]
    spread = max(0.05, *(float(np.abs(grid - 1).max()) for grid in grids))
    with axes_of(0.9 + 0.2 * len(grids[0]), columns=len(panels), sharey=True) as (figure, drawn):
        for axes, panel, grid in zip(drawn, panels, grids, strict=True):
            # A mesh is vectors; an image would be embedded as a bitmap.
            mesh = axes.pcolormesh(grid, cmap="RdBu_r", vmin=1 - spread, vmax=1 + spread, edgecolors="white", lw=0.4)
            axes.set_title(str(panel["placement"]))
            axes.set_ylim(len(grid), 0)
            axes.set_xlabel(unit)
            step = max(1, grid.shape[1] // 8)
            axes.set_xticks(np.arange(0, grid.shape[1], step) + 0.5, [str(i) for i in range(0, grid.shape[1], step)])
            axes.set_yticks(np.arange(len(grid)) + 0.5, [str(layer) for layer in panel["layers"]])
            axes.tick_params(length=0)
            for (row, column), load in np.ndenumerate(grid) if grid.shape[1] <= 8 else ():
                ink = "white" if abs(load - 1) > 0.7 * spread else INK
                axes.text(column + 0.5, row + 0.5, f"{load:.2f}", ha="center", va="center", fontsize=6.5, color=ink)
        drawn[0].set_ylabel("Layer (representative)")
        bar = figure.colorbar(mesh, ax=drawn, shrink=0.85, pad=0.015)
        if bar.solids is not None:
            bar.solids.set_rasterized(False)
        bar.outline.set_edgecolor(LINE)
        bar.set_label("x the even share", fontsize=8)
    return figure


def swing(row: Mapping[str, Any], middle: float) -> float:
    """How far an input of a tornado moves the answer from `middle`, both ends together."""
    ends = (row["low"], row["high"], middle)
    return float(max(ends) - min(ends))


def shorten(text: str, most: int) -> str:
    """`text` cut to `most` letters.

    >>> shorten("step time of mi300x (measured over predicted)", 22)
    'step time of mi300x…'
    """
    return text if len(text) <= most else f"{text[: most - 1].rsplit(' ', 1)[0].rstrip(' (,')}…"


def _end_labels(axes: Axes, position: int, row: Mapping[str, Any], most: int) -> None:
    """Write what the ends of a bar stand for, where that is short; the table beside the figure says all."""
    left, right = sorted(("low", "high"), key=lambda end: row[end])
    for end, shift, align in ((left, -3, "right"), (right, 3, "left")):
        if len(row[f"{end}_label"]) > most:
            continue
        note = axes.annotate(
            str(row[f"{end}_label"]),
            (row[end], position),
            (shift, 0),
            textcoords="offset points",
            va="center_baseline",
            ha=align,
            fontsize=7.5,
            color=MUTED,
            bbox={"fc": "white", "ec": "none", "pad": 0.4},
        )
        note.set_in_layout(False)


def _doublings(axes: Axes, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Logarithmic axes ticked by doublings, on which systems of very different cost can be told apart."""
    costs = [row["usd_per_month"] for rows in curves.values() for row in rows if row.get("usd_per_month")]
    factors = sorted({row["demand_factor"] for rows in curves.values() for row in rows if row["demand_factor"] > 0})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    ticks = [factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0) if factors[0] <= factor <= factors[-1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    tens = [10.0**power * digit for power in range(2, 12) for digit in (1, 3)]
    near = [value for value in tens if min(costs) / 1.3 <= value <= max(costs) * 1.3]
    axes.set_yticks(near, [format_usd_short(value) for value in near])
    axes.minorticks_off()


def _legend(figure: Figure, is_half: bool) -> None:
    columns = 3 if is_half else 5
    figure.legend(
        loc="outside upper left", ncols=columns, fontsize=7.5 if is_half else 8, handlelength=1.4, columnspacing=1.2
    )
