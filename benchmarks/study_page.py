"""The page of `benchmarks/study.py`: tables, figures and the judgements of study_reading.toml."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd

from planner.capacity import QUALITY_NOTE, CapacityLimit, caution, default_limit, published
from planner.engine import engine
from planner.figures import line_grid, svg
from planner.layout import Layout, layout_problem
from planner.model import load
from planner.small import PAST_ERROR
from planner.units import significant

sys.path.insert(0, str(Path(__file__).parent))
from study_facts import LOADS, drop_facts, percent, placement_facts, residency_facts

HERE = Path(__file__).parent
ROOT = HERE.parent / "docs"
TITLES = {"h200-sxm": "H200", "gb200-nvl72": "GB200"}
_OFF, _PLACED = 9.0, 28.0
"""Where the figure of drops puts serving every token, and doing so with experts placed."""


def write(
    steps: pd.DataFrame, stale: pd.DataFrame, drops: pd.DataFrame, rates: pd.DataFrame, records: pd.DataFrame
) -> None:
    """docs/study.md and its figures from the tables of `study.py`."""
    readings = tomllib.loads((HERE / "study_reading.toml").read_text("utf-8"))
    facts = placement_facts(steps, stale) | drop_facts(drops) | residency_facts(rates)
    read = {part: {key: text.format(**facts) for key, text in texts.items()} for part, texts in readings.items()}
    lines = [
        "# What routing, placement, capacity and residency of experts do",
        "",
        f"Written by `python {' '.join(sys.argv)}` on {date.today()} with {engine('vllm').name} "
        f"{engine('vllm').version} rules; all numbers are moeplan's own. {read['page']['intro']}",
        "",
        *(f"- {read[part]['finding']}" for part in ("placement", "staleness", "capacity", "residency")),
        f"- {read['claims']['finding']}",
        "",
        *placement_section(steps, read["placement"]),
        *stale_section(stale, records, read["staleness"]),
        *drop_section(drops, read["capacity"]),
        *residency_section(rates, read["residency"]),
        *claims_section(read["claims"]),
    ]
    ROOT.joinpath("study.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def placement_section(steps: pd.DataFrame, read: Mapping[str, str]) -> list[str]:
    problem = layout_problem(load("deepseek-v3"), Layout(attention_dp=72, ep=72))
    lines = ["## (a) Step time by expert parallelism, traffic and placement", "", f"**{read['finding']}**", ""]
    lines += [f"{read['setting']} EP72 and EP144 cannot run without copies: `{problem}`", ""]
    for phase in ("decode", "prefill"):
        lines += [figure(f"study_{phase}", placement_points(steps, phase), f"Experts and exchange, {phase}")]
        lines += [read[phase], ""]
    for name in TITLES:
        lines += [f"**{TITLES[name]}, experts + exchange [ms]:** {read['cells']}", ""]
        lines += [*placement_table(steps[steps["system"] == name]), ""]
    lines += [f"**What placement buys.** {read['gains']}", "", *gain_table(steps), ""]
    return [*lines, f"**What copies cost.** {read['copies']}", "", *copy_table(steps), "", advice(read)]


def placement_points(steps: pd.DataFrame, phase: str) -> pd.DataFrame:
    """Points of a figure: a row per system and load; long prompts stand for all, whose curves have the same shape."""
    shown = steps[(steps["phase"] == phase) & (steps["tokens_per_gpu"] != 4096)]
    unit = "seqs" if phase == "decode" else "tokens"
    row = [f"{TITLES[s]}, {n:,} {unit} [ms]" for s, n in zip(shown["system"], shown["tokens_per_gpu"], strict=True)]
    y = 1e3 * (shown["experts_s"] + shown["exchange_s"])
    return pd.DataFrame(
        {"row": row, "column": shown["traffic"], "series": shown["placement"], "x": shown["ep"], "y": y}
        | {"is_dashed": ~shown["fits"]}
    ).sort_values(["row", "x"], kind="stable", ascending=[False, True])


def placement_table(steps: pd.DataFrame) -> list[str]:
    """Contiguous / greedy / greedy with a copy more per rank, per EP and traffic."""
    head = ["EP", "traffic", "busiest rank / mean", *LOADS.values()]
    rows = []
    for (ep, law), part in steps.groupby(["ep", "traffic"], sort=False):
        loads = [part[(part["phase"] == phase) & (part["tokens_per_gpu"] == size)] for phase, size in LOADS]
        cells = [" / ".join(f"{v:.2f}" for v in loads[1]["max_over_mean"])]
        for load_ in loads:
            mark = "" if load_["fits"].all() else " *"
            cells.append(" / ".join(significant(v * 1e3) for v in load_["experts_s"] + load_["exchange_s"]) + mark)
        rows.append([ep, law, *cells])
    return table(head, rows)


def gain_table(steps: pd.DataFrame) -> list[str]:
    """Whole step under contiguous placement and what greedy saves of it."""
    head = ["GPU", "EP", "traffic", *LOADS.values(), "measured"]
    rows = []
    for (name, ep, law), part in steps[steps["traffic"] != "uniform"].groupby(["system", "ep", "traffic"], sort=False):
        cells = []
        for phase, size in LOADS:
            at = part[(part["phase"] == phase) & (part["tokens_per_gpu"] == size)].set_index("placement")["step_s"]
            saved = at["contiguous"] - at["greedy"]
            gain = f"{significant(saved * 1e3, 2)} ({saved / at['contiguous']:.0%})"
            cells.append(f"{significant(at['contiguous'] * 1e3)} ms, {gain}")
        rows.append([TITLES[name], ep, law, *cells, f"{part['measured_share'].mean():.0%}"])
    return table(head, rows)


def copy_table(steps: pd.DataFrame) -> list[str]:
    """Cache per GPU and mixed steps without and with one more copy per rank."""
    head = ["GPU", "EP", "copies", "KV tokens per GPU", "KV lost", *LOADS.values()]
    rows = []
    for (name, ep), part in steps[steps["traffic"] == "mixed"].groupby(["system", "ep"], sort=False):
        few, more = (part[part["placement"] == key] for key in ("greedy", "greedy + 1"))
        kv = [int(side["kv_tokens_per_gpu"].iloc[0]) for side in (few, more)]
        copies = [int(side["copies"].iloc[0]) for side in (few, more)]
        change = 1e3 * (more["step_s"].to_numpy() - few["step_s"].to_numpy())
        rows.append(
            [TITLES[name], ep, f"{copies[0]} -> {copies[1]}", f"{kv[0]:,} -> {kv[1]:,}", f"{1 - kv[1] / kv[0]:.1%}"]
            + [f"{'+' if ms > 0 else '-'}{significant(abs(ms), 2)} ms" for ms in change]
        )
    return table(head, rows)


def stale_section(stale: pd.DataFrame, records: pd.DataFrame, read: Mapping[str, str]) -> list[str]:
    head = [
        "EP",
        "placement",
        "learned on mixed",
        "on another task",
        "on the task itself",
        "rebalance pause",
        "pays after",
    ]
    rows = []
    for (ep, key), part in stale.groupby(["ep", "placement"], sort=False):
        at = part.set_index("learned")
        cells = [
            f"{significant(at['routed_s'][s] * 1e3)} ms ({at['max_over_mean'][s]:.2f})"
            for s in ("mixed", "other", "itself")
        ]
        gain, pause_s = at["routed_s"]["mixed"] - at["routed_s"]["itself"], at["pause_s"]["mixed"]
        after = [f"{pause_s:.1f} s", f"{pause_s / gain:,.0f} steps"] if gain > 0 else ["-", "-"]
        rows.append([ep, key, *cells, *after])
    lines = ["### Placements grow stale", "", f"**{read['finding']}**", "", read["setting"], "", *table(head, rows), ""]
    if len(records):
        lines += [read["records"], "", *record_table(records), ""]
    return [*lines, advice(read)]


def record_table(records: pd.DataFrame) -> list[str]:
    head = [
        "EP",
        "traffic",
        "contiguous: records",
        "law",
        "greedy: records",
        "law",
        "learned on the mix",
        "on another task",
    ]
    columns = ("record", "law", "record_greedy", "law_greedy", "on_mix", "elsewhere")
    rows = [
        [row["ep"], row["traffic"], *("-" if np.isnan(row[c]) else f"{row[c]:.2f}" for c in columns)]
        for _, row in records.iterrows()
    ]
    return table(head, rows)


def drop_section(drops: pd.DataFrame, read: Mapping[str, str]) -> list[str]:
    switch, v3 = load("google/switch-c-2048"), load("deepseek-v3")
    own, warned = default_limit(switch), caution(v3, CapacityLimit("megatron", 1.25))
    known = published(switch)
    assert own is not None and warned is not None and known is not None
    lines = ["## (b) Capacity factor, drops and step time", "", f"**{read['finding']}**", "", read["setting"], ""]
    lines += [
        figure(
            "study_drops", drop_points(drops), "Drops and step time by capacity factor", DROP_TICKS, "Capacity factor"
        )
    ]
    lines += [read["figure"], "", read["cells"], ""]
    for (model, tokens), part in drops.groupby(["model", "tokens"], sort=False):
        if (model, tokens) != ("switch, groups of 1,024", 1024):
            lines += [
                f"**{DROP_TITLES[model].replace(chr(10), ' ')}, {tokens:,} tokens per step**",
                "",
                *drop_table(part),
                "",
            ]
    lines += [f"Switch-C is served at factor {own.factor:g} unless told otherwise ({known.source}). {warned.text}.", ""]
    return [*lines, f"*Risk.* {QUALITY_NOTE}", "", advice(read)]


DROP_TITLES = {
    "switch": "Switch-C, one group",
    "switch, groups of 1,024": "Switch-C, groups of 1,024",
    "v3": "DeepSeek-V3",
}
DROP_TICKS = {0.5: "0.5", 1.0: "1", 2.0: "2", 4.0: "4", _OFF: "off", _PLACED: "placed"}


def drop_points(drops: pd.DataFrame) -> pd.DataFrame:
    """Points of the figure: drop rates and steps over those of serving every token under contiguous placement."""
    shown = drops[drops["model"] != "switch, groups of 1,024"].copy()
    free = shown[np.isinf(shown["factor"]) & (shown["placement"] == "contiguous")]
    keys = ["model", "tokens", "traffic"]
    base = shown[keys].merge(free[[*keys, "step_s"]], on=keys)["step_s"].to_numpy()
    x = np.where(np.isfinite(shown["factor"]), shown["factor"], np.where(shown["placement"] == "greedy", _PLACED, _OFF))
    column = [f"{DROP_TITLES[m].split(',')[0]}, {t:,}" for m, t in zip(shown["model"], shown["tokens"], strict=True)]
    each = {"column": column, "series": shown["traffic"], "x": x, "is_dashed": x >= _OFF}
    parts = {"Dropped assignments [%]": 100 * shown["drop_rate"], "Step / step without drops": shown["step_s"] / base}
    points = pd.concat([pd.DataFrame({"row": row, **each, "y": y}) for row, y in parts.items()])
    return points.sort_values(["row", "column", "x"], kind="stable")


def drop_table(part: pd.DataFrame) -> list[str]:
    """Factors with the same slots share a row."""
    head = [
        "factor",
        "slots",
        "dropped [%]",
        "tokens that lost all [%]",
        "busiest rank / even share",
        "experts [ms]",
        "step [ms]",
    ]
    rows = []
    for (placement, slots), group in part.groupby(["placement", "slots"], sort=False):
        factors = sorted({f"{factor:g}" for factor in group["factor"]}, key=float)
        name = " to ".join(dict.fromkeys([factors[0], factors[-1]]))
        name = name.replace("inf", "off" if placement == "contiguous" else "off, placed")
        one = group[group["factor"] == group["factor"].iloc[0]]
        rates = [three(100 * one[key], percent) for key in ("drop_rate", "fully_dropped_rate")]
        times = [three(1e3 * one[key], significant) for key in ("experts_s", "step_s")]
        busiest = three(one["rows_over_assignments"], lambda value: f"{value:.2f}")
        rows.append([name, "-" if slots < 0 else slots, *rates, busiest, *times])
    return table(head, rows)


def residency_section(rates: pd.DataFrame, read: Mapping[str, str]) -> list[str]:
    lines = ["## (c) Resident share against tokens per second", "", f"**{read['finding']}**", "", read["setting"], ""]
    text = {0.0: "0", 0.25: "25", 0.5: "50", 0.75: "75", 1.0: "100"}
    points = residency_points(rates)
    lines += [
        figure("study_residency", points, "Decode rate by resident share", text, "Experts in HBM [%]", False, True)
    ]
    lines += [read["figure"], "", read["cells"], ""]
    lines += [*residency_table(rates), "", f"*Past error.* {PAST_ERROR}.", ""]
    return [*lines, advice(read)]


def residency_points(rates: pd.DataFrame) -> pd.DataFrame:
    column = rates["machine"].str.replace(", ", "\n", n=1)
    each = {"column": column, "series": rates["policy"], "x": rates["share"], "y": rates["tok_per_s"]}
    order = {name: i for i, name in enumerate(("prefetch", "lru", "static-hot", "cpu", "cpu-layers", "stream"))}
    points = pd.DataFrame({"row": "Decode tok/s", **each, "is_dashed": ~rates["fits"]})
    return points.sort_values("series", key=lambda names: names.map(order), kind="stable")


def residency_table(rates: pd.DataFrame) -> list[str]:
    marks = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
    head = ["machine", "policy", *(f"{m:.0%}" for m in marks), "most that fits", "tok/s there", "hits", "bound by"]
    rows = []
    for (machine, policy), part in rates.groupby(["machine", "policy"], sort=False):
        at = [part.iloc[(part["share"] - mark).abs().argmin()] for mark in marks]
        cells = [significant(p["tok_per_s"]) + ("" if p["fits"] else " *") for p in at]
        most = part[part["is_most"]].iloc[0]
        held = [f"{most['share']:.0%} ({most['resident']} experts)", significant(most["tok_per_s"])]
        rows.append([machine, policy, *cells, *held, f"{most['hit_rate']:.0%}", most["bound"]])
    return table(head, rows)


def claims_section(read: Mapping[str, str]) -> list[str]:
    from claims import CLAIMS

    verdicts = tomllib.loads((HERE / "claims_reading.toml").read_text("utf-8"))
    return [
        "## (d) Five common claims",
        "",
        f"**{read['finding']}**",
        "",
        "Tables, figures, where each fails and what to do: [study_claims.md](study_claims.md), written by",
        "`python benchmarks/claims.py`.",
        "",
        *table(["claim", "verdict"], [[claim.saying, verdicts[claim.key]["verdict"]] for claim in CLAIMS]),
    ]


def figure(
    name: str,
    points: pd.DataFrame,
    label: str,
    ticks: Mapping[float, str] | None = None,
    x_label: str = "GPUs that share the experts (EP)",
    is_log_x: bool = True,
    is_log_y: bool = False,
) -> str:
    """Write the figure and return the line that shows it."""
    places = ticks or {float(x): str(x) for x in sorted(set(points["x"]))}
    text = svg(line_grid(points, x_label, places, is_log_x=is_log_x, is_log_y=is_log_y), name, label)
    (ROOT / "figures").mkdir(exist_ok=True)
    ROOT.joinpath("figures", f"{name}.svg").write_text(text, encoding="utf-8")
    return f"![{label}](figures/{name}.svg)\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Markdown lines; the first two columns are left-aligned."""
    rule = "|".join("---" if i < 2 else "--:" for i in range(len(head)))
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def three(values: Iterable[float], text: Callable[[float], str]) -> str:
    return " / ".join(map(text, values))


def advice(read: Mapping[str, str]) -> str:
    return f"*What to do.* {read['advice']}\n"
