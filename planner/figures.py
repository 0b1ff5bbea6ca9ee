"""One function per figure: plain numbers in, matplotlib `Figure` out, and `svg` to put it in a page.

Never pyplot: figures hold no global state, need no display, and the same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from planner.units import format_bytes, format_seconds, significant

if TYPE_CHECKING:
    import pandas as pd

INK, MUTED, LINE, ACCENT, WARN, SLO_AREA = "#1b1f24", "#5b6570", "#d5dae0", "#0b5cad", "#b4530a", "#e9f3e6"
_Box = tuple[float, float, float, float]
PALETTE = ("#0b5cad", "#5b9bd5", "#2f7d6b", "#8cc2a8", "#b4530a", "#e3a857", "#7a5195", "#b9a3c9", "#5b6570", "#a9b2bb")
"""Segments of a bar in order: hues in dark and light pairs, so that neighbours differ in print too."""

_LINES = (PALETTE[0], PALETTE[4], PALETTE[2], PALETTE[6], PALETTE[5], PALETTE[8])
_FEW_POINTS = 12
"""Points of a line up to which each is marked."""

_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9.0,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_ACRONYM = re.compile(r"\b(cuda|ep|ffn|gemm|gpu|hbm|kv|lm|mla|moe|mtp|mw|nccl|pp|qkv|slo|tp|tpot|ttft)\b")
_WIDTH_IN = 7.6
_AXES_PT = (490.0, 195.0)
"""Paper of the axes of `frontier` [points]."""
_CHAR_PT = 4.9
"""Mean width of a letter of a label [points]."""
_MAX_POINTS = 300
"""Points kept of a long series; a page stays small and still looks the same."""


def svg(figure: Figure, name: str, label: str) -> str:
    """`figure` as an `<svg>` element for a page, byte-identical on every run.

    `name` keeps ids of several figures on a page apart, `label` is read out by screen readers.
    """
    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # matplotlib numbers its groups per figure; on a page with several figures those ids would repeat.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


def frontier(
    front: Sequence[Mapping[str, Any]], chosen: int | None = None, min_tok_per_s_per_user: float | None = None
) -> Figure:
    """Throughput per GPU against interactivity, one dot per layout, the SLO region shaded.

    Rows need `interactivity_tok_per_s_per_user` and `output_tok_per_s_per_gpu`; `meets_slo` fills the dot,
    row number `chosen` is ringed; it and the two ends are named.
    """
    with axes_of(3.4) as (figure, (axes,)):
        x = [row["interactivity_tok_per_s_per_user"] for row in front]
        y = [row["output_tok_per_s_per_gpu"] for row in front]
        right, top = 1.12 * max(x) or 1.0, 1.15 * max(y) or 1.0
        if min_tok_per_s_per_user is not None and min_tok_per_s_per_user < right:
            axes.axvspan(min_tok_per_s_per_user, right, color=SLO_AREA, lw=0)
            axes.axvline(min_tok_per_s_per_user, color="#6a9a5b", lw=0.9, ls=(0, (4, 3)))
            axes.annotate(
                "meets the TPOT limit",
                (min_tok_per_s_per_user, top),
                (5, -3),
                textcoords="offset points",
                color="#3f6b33",
                va="top",
                fontsize=8,
            )
        axes.plot(*_upper_hull(x, y), color=ACCENT, lw=1.0, alpha=0.55)
        for row, px, py in zip(front, x, y, strict=True):
            face = ACCENT if row.get("meets_slo") else "white"
            axes.plot(px, py, "o", ms=6, mfc=face, mec=ACCENT if row.get("meets_slo") else MUTED, mew=1.1)
        _name_points(axes, front, chosen, right, top)
        axes.set(xlim=(0, right), ylim=(0, top), xlabel="Interactivity (output tok/s per user)")
        axes.set_ylabel("Output tok/s per GPU")
        axes.grid(True)
    return figure


def memory_bar(terms: Mapping[str, float], capacity_bytes: float | None = None) -> Figure:
    """What fills the memory of the fullest GPU, in bytes, against its capacity."""
    with axes_of(1.75) as (figure, (axes,)):
        used = sum(terms.values())
        right = max(used, capacity_bytes or 0.0)
        left = 0.0
        for index, (name, size) in enumerate(terms.items()):
            colour = PALETTE[index % len(PALETTE)]
            axes.barh(0, size, left=left, height=0.62, color=colour, label=readable(name))
            if size > 0.09 * right:
                ink = "white" if index % 2 == 0 else INK
                axes.text(left + size / 2, 0, format_bytes(size), ha="center", va="center", color=ink, fontsize=8)
            left += size
        if capacity_bytes is not None:
            if capacity_bytes > used:
                axes.barh(0, capacity_bytes - used, left=used, height=0.62, fc="white", ec=LINE, hatch="////", lw=0.6)
            axes.axvline(capacity_bytes, color=INK, lw=1.1)
            label = f"capacity {format_bytes(capacity_bytes)}"
            axes.annotate(label, (capacity_bytes, 0.44), (-4, 0), textcoords="offset points", ha="right", fontsize=8)
        axes.set(xlim=(0, right * 1.005), ylim=(-0.34, 0.62), yticks=[])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e9:g}")
        axes.set_xlabel("GB per GPU")
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside lower center", ncols=4, fontsize=8, handlelength=1.0, columnspacing=1.4)
    return figure


def step_breakdown(phases: Mapping[str, Mapping[str, float]], top: int = 9) -> Figure:
    """Seconds per operation of one step, a panel per phase, longest first; beyond `top` they are summed as other."""
    most = max(min(len(ops), top + 1) for ops in phases.values())
    height = 0.75 + 0.24 * most
    with axes_of(height, columns=len(phases)) as (figure, panels):
        for axes, (phase, ops) in zip(panels, phases.items(), strict=True):
            rows = largest_first(ops, top)
            total = sum(ops.values())
            scale, unit = (1.0, "s") if total >= 1.0 else (1e3, "ms")
            names, seconds = [readable(name) for name, _ in rows], [value * scale for _, value in rows]
            axes.barh(names, seconds, color=ACCENT, height=0.66)
            for position, value in enumerate(seconds):
                share = value / (total * scale) if total else 0.0
                label = f"{significant(value)} ({share:.0%})"
                axes.annotate(
                    label, (value, position), (3, 0), textcoords="offset points", va="center_baseline", fontsize=8
                )
            axes.set_title(f"{readable(phase).capitalize()} step: {format_seconds(total)}")
            axes.set_xlim(0, max([*seconds, 1e-12]) * 1.42)
            axes.set_xlabel(unit)
            axes.set_ylim(most - 0.4, -0.6)
            axes.tick_params(axis="y", length=0, labelcolor=INK)
    return figure


def latency_cdf(samples: Mapping[str, Sequence[float]], limits: Mapping[str, float] | None = None) -> Figure:
    """Share of requests served within a time, a panel per metric (`ttft_s`, `tpot_s`), with its SLO limit.

    A dotted line marks 95 % of the requests.
    """
    with axes_of(2.5, columns=len(samples)) as (figure, panels):
        for axes, (metric, values) in zip(panels, samples.items(), strict=True):
            share = np.linspace(0, 1, min(_MAX_POINTS, max(len(values), 2)))
            times = np.quantile(np.asarray(values, dtype=float), share)
            limit = (limits or {}).get(metric)
            scale, unit = (1.0, "s") if max(times[-1], limit or 0.0) >= 1.0 else (1e3, "ms")
            axes.plot(times * scale, share, color=ACCENT, lw=1.6)
            axes.axhline(0.95, color=MUTED, lw=0.7, ls=(0, (1, 2)))
            if limit is not None:
                axes.axvspan(0, limit * scale, color=SLO_AREA, lw=0)
                axes.axvline(limit * scale, color="#6a9a5b", lw=0.9, ls=(0, (4, 3)))
            axes.set(xlim=(0, 1.04 * max(times[-1], limit or 0.0) * scale or 1.0), ylim=(0, 1.02))
            axes.set_title(metric.removesuffix("_s").upper())
            axes.set_xlabel(f"{unit} (shaded: within the limit)" if limit is not None else unit)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 0.95], ["0%", "25%", "50%", "75%", "95%"])
            axes.grid(True, axis="x")
        panels[0].set_ylabel("Share of requests")
    return figure


def timeline(series: Mapping[str, Sequence[float]]) -> Figure:
    """Waiting requests, running batch and KV use over time; a panel for each of `queue`, `batch`, `kv_share` given.

    Long series show the largest value of each interval, so that short peaks stay visible.
    """
    names = [name for name in ("queue", "batch", "kv_share") if name in series]
    titles = {"queue": "Waiting requests", "batch": "Requests in the batch", "kv_share": "KV cache in use"}
    with axes_of(0.6 + 1.05 * len(names), rows=len(names), sharex=True) as (figure, panels):
        for axes, name in zip(panels, names, strict=True):
            time_s, values = _thinned(series["time_s"], series[name])
            axes.fill_between(time_s, values, step="post", color=ACCENT, alpha=0.18, lw=0)
            axes.step(time_s, values, where="post", color=ACCENT, lw=1.1)
            axes.set_title(titles[name], fontsize=8.5)
            axes.set_ylim(0, 1.02 if name == "kv_share" else max(1.0, 1.12 * max(values)))
            axes.set_xlim(time_s[0], max(time_s[-1], time_s[0] + 1e-9))
            if name == "kv_share":
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.grid(True, axis="y")
        panels[-1].set_xlabel("Time (s)")
    return figure


def line_grid(
    points: pd.DataFrame, x_label: str, ticks: Mapping[float, str], *, is_log_x: bool = True, is_log_y: bool = False
) -> Figure:
    """Lines of a table in a panel per `row` and `column`, which name its y axis and its title; rows share their scale.

    `points` has row, column, series, x, y and is_dashed, which tells what is shown but cannot be had: a line is dashed
    to there and from there, and a dot marks where a long one turns. `ticks` are positions and names on the x axis.
    """
    rows, columns = (list(dict.fromkeys(points[name])) for name in ("row", "column"))
    colours = dict(zip(dict.fromkeys(points["series"]), _LINES, strict=False))
    height = 0.85 + max(1.75 * len(rows), 2.7)
    with axes_of(height, len(rows), len(columns), sharex=True, sharey="row") as (figure, panels):
        for number, axes in enumerate(panels):
            row, column = divmod(number, len(columns))
            in_row = points[points["row"] == rows[row]]
            for series, line in in_row[in_row["column"] == columns[column]].groupby("series", sort=False):
                _line(axes, line, str(series), colours[series])
            axes.set_xscale("log" if is_log_x else "linear")
            axes.set_yscale("log" if is_log_y else "linear")
            if not is_log_y:
                axes.set_ylim(0, 1.08 * in_row["y"].max())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axes.set_xticks(list(ticks), list(ticks.values()))
            axes.set_xticks([], minor=True)
            axes.set_title(columns[column] if row == 0 else "", fontsize=8.5)
            axes.set_ylabel(rows[row] if column == 0 else "", fontsize=8.5)
            axes.grid(True)
        figure.supxlabel(x_label, fontsize=9)
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=min(6, len(colours)), fontsize=8, handlelength=1.6)
    return figure


def layout_name(row: Mapping[str, Any]) -> str:
    """What a row of layouts is called: its `name` where layouts alone would repeat, else its `layout`."""
    return str(row.get("name") or row.get("layout") or "")


def readable(name: str) -> str:
    """Identifier as words: `kv_share` becomes `KV share`.

    >>> readable("expert_gemm"), readable("lm_head"), readable("kv_cache")
    ('expert GEMM', 'LM head', 'KV cache')
    """
    return _ACRONYM.sub(lambda found: found[0].upper(), name.replace("_", " "))


def largest_first(parts: Mapping[str, float], top: int) -> list[tuple[str, float]]:
    """The `top` largest parts, then the sum of the others (absent when nothing is left)."""
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    rest = sum(value for _, value in ordered[top:])
    return ordered[:top] + ([("other", rest)] if rest > 0 else [])


@contextmanager
def axes_of(
    height_in: float,
    rows: int = 1,
    columns: int = 1,
    sharex: bool = False,
    sharey: Literal["row"] | bool = False,
    width_in: float | None = None,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of the house style with its panels, row by row; as wide as a page of text unless `width_in` is given."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width_in or _WIDTH_IN, height_in), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)
        yield figure, list(grid.ravel())


def format_axis(axis: Any, text: Callable[[float], str]) -> None:
    """Write the ticks of `axis` as `text` says."""
    axis.set_major_formatter(lambda value, _: text(value))


def _line(axes: Axes, line: pd.DataFrame, name: str, colour: str) -> None:
    x, y, dashed = (line[column].to_numpy() for column in ("x", "y", "is_dashed"))
    marker = "o" if len(line) <= _FEW_POINTS else None
    if dashed.any():
        axes.plot(x, y, color=colour, lw=1.0, ls=(0, (3, 2)), marker=marker, ms=3, mfc="white", mew=0.8)
    axes.plot(x, np.where(dashed, np.nan, y), color=colour, lw=1.4, marker=marker, ms=3, label=name)
    if marker is None:
        turns = np.flatnonzero(~dashed[:-1] & dashed[1:])
        axes.plot(x[turns], y[turns], "o", color=colour, ms=4)


def _name_points(axes: Axes, rows: Sequence[Mapping[str, Any]], chosen: int | None, right: float, top: float) -> None:
    """Ring and name the chosen point, then name the two ends where there is room."""
    points = [(row["interactivity_tok_per_s_per_user"], row["output_tok_per_s_per_gpu"]) for row in rows]
    x, y = ([point[axis] for point in points] for axis in (0, 1))
    ends = [index for index in (y.index(max(y)), x.index(max(x))) if index != chosen]
    named = list(dict.fromkeys([*([chosen] if chosen is not None else []), *ends]))
    repeated = len({row.get("layout") for row in rows if row.get("layout")}) < len(rows)
    # Offsets are points on paper, so data are scaled to the paper of the axes.
    paper = [(px / right * _AXES_PT[0], py / top * _AXES_PT[1]) for px, py in points]
    taken = [(px - 4, py - 4, px + 4, py + 4) for px, py in paper]
    for index in named:
        is_chosen = index == chosen
        if is_chosen:
            axes.plot(*points[index], "o", ms=12, mfc="none", mec=WARN, mew=1.6)
        name = layout_name(rows[index]) if repeated else str(rows[index].get("layout") or layout_name(rows[index]))
        text = f"{name} (chosen)" if is_chosen else name
        place = _free_place(paper[index], _CHAR_PT * len(text), taken)
        if place is None and not is_chosen:
            continue
        box, offset, align = place or ((0, 0, 0, 0), (10, 8), "left")
        taken.append(box)
        axes.annotate(
            text,
            points[index],
            offset,
            textcoords="offset points",
            ha=align,
            color=WARN if is_chosen else MUTED,
            weight="bold" if is_chosen else "normal",
            fontsize=8.5,
        )


def _free_place(
    point: tuple[float, float], width: float, taken: Sequence[_Box]
) -> tuple[_Box, tuple[float, float], Literal["left", "right"]] | None:
    """Box, offset and alignment of a label of `width` beside `point` that covers nothing `taken` [points]."""
    for dy in (7, -15, 19, -27, 31, -39):
        for align, dx in (("left", 10.0), ("right", -10.0)):
            left = point[0] + dx - (width if align == "right" else 0.0)
            box = (left, point[1] + dy - 2, left + width, point[1] + dy + 9)
            inside = box[0] >= 0 and box[2] <= _AXES_PT[0] and box[1] >= 0 and box[3] <= _AXES_PT[1]
            free = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken)
            if inside and free:
                return box, (dx, float(dy)), "left" if align == "left" else "right"
    return None


def _upper_hull(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Points no other point beats in both coordinates, by rising x."""
    kept: list[tuple[float, float]] = []
    for px, py in sorted(zip(x, y, strict=True), reverse=True):
        if not kept or py > kept[-1][1]:
            kept.append((px, py))
    kept.reverse()
    return [px for px, _ in kept], [py for _, py in kept]


def _thinned(time_s: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    size = -(-len(values) // _MAX_POINTS)
    starts = range(0, len(values), size)
    return [float(time_s[i]) for i in starts], [float(max(values[i : i + size])) for i in starts]
