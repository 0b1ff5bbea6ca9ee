"""The page of `benchmarks/study.py`: tables, figures and the judgements of study_reading.toml."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
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

HERE = Path(__file__).parent
ROOT = HERE.parent / "docs"
TITLES = {"h200-sxm": "H200", "gb200-nvl72": "GB200"}
LOADS = {
    ("decode", 32): "decode, 32 sequences",
    ("decode", 128): "decode, 128 sequences",
    ("prefill", 4096): "prefill, 4,096 tokens",
    ("prefill", 16384): "prefill, 16,384 tokens",
}
_OFF, _PLACED = 8.0, 16.0
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
        "- Of five common claims about MoE economics two hold in part and none as said (part d).",
        "",
        *placement_section(steps, read["placement"]),
        *stale_section(stale, records, read["staleness"]),
        *drop_section(drops, read["capacity"]),
        *residency_section(rates, read["residency"]),
        *claims_section(),
    ]
    ROOT.joinpath("study.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def placement_section(steps: pd.DataFrame, read: Mapping[str, str]) -> list[str]:
    problem = layout_problem(load("deepseek-v3"), Layout(attention_dp=72, ep=72))
    lines = ["## (a) Step time by expert parallelism, traffic and placement", "", f"**{read['finding']}**", ""]
    lines += [f"{read['setting']} EP72 and EP144 cannot run without copies: `{problem}`", ""]
    for phase in ("decode", "prefill"):
        lines += [figure(f"study_{phase}", placement_points(steps, phase), f"Experts and exchange, {phase}")]
        lines += [f"*{read[phase]}*", ""]
    for name in TITLES:
        lines += [f"**{TITLES[name]}, experts + exchange [ms]:** {read['cells']}", ""]
        lines += [*placement_table(steps[steps["system"] == name]), ""]
    lines += [f"**What placement buys.** {read['gains']}", "", *gain_table(steps), ""]
    return [*lines, f"**What copies cost.** {read['copies']}", "", *copy_table(steps), "", advice(read)]


def placement_points(steps: pd.DataFrame, phase: str) -> pd.DataFrame:
    """Points of a figure: a row per system and load."""
    shown = steps[steps["phase"] == phase]
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
    head = ["GPU", "EP", "traffic", *(f"{name}: step, greedy saves" for name in LOADS.values()), "measured"]
    rows = []
    for (name, ep, law), part in steps[steps["traffic"] != "uniform"].groupby(["system", "ep", "traffic"], sort=False):
        cells = []
        for phase, size in LOADS:
            at = part[(part["phase"] == phase) & (part["tokens_per_gpu"] == size)].set_index("placement")["step_s"]
            saved = at["contiguous"] - at["greedy"]
            cells.append(f"{significant(at['contiguous'] * 1e3)} ms, {significant(saved * 1e3, 2)} ({saved / at['contiguous']:.0%})")
        rows.append([TITLES[name], ep, law, *cells, f"{part['measured_share'].mean():.0%}"])
    return table(head, rows)


def copy_table(steps: pd.DataFrame) -> list[str]:
    """Cache per GPU and mixed steps without and with one more copy per rank."""
    head = ["GPU", "EP", "copies", "KV tokens per GPU", "KV lost", *(f"{name}" for name in LOADS.values())]
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
    head = ["EP", "placement", "learned on mixed", "on another task", "on the task itself", "rebalance pause", "pays after"]
    rows = []
    for (ep, key), part in stale.groupby(["ep", "placement"], sort=False):
        at = part.set_index("learned")
        cells = [f"{significant(at['routed_s'][s] * 1e3)} ms ({at['max_over_mean'][s]:.2f})" for s in ("mixed", "other", "itself")]
        gain, pause_s = at["routed_s"]["mixed"] - at["routed_s"]["itself"], at["pause_s"]["mixed"]
        after = [f"{pause_s:.1f} s", f"{pause_s / gain:,.0f} steps"] if gain > 0 else ["-", "-"]
        rows.append([ep, key, *cells, *after])
    lines = ["### Placements grow stale", "", f"**{read['finding']}**", "", read["setting"], "", *table(head, rows), ""]
    if len(records):
        lines += [read["records"], "", *record_table(records), ""]
    return [*lines, advice(read)]


def record_table(records: pd.DataFrame) -> list[str]:
    head = ["EP", "traffic", "contiguous: records", "law", "greedy: records", "law", "learned on the mix", "on another task"]
    columns = ("record", "law", "record_greedy", "law_greedy", "on_mix", "elsewhere")
    rows = [[row["ep"], row["traffic"], *("-" if np.isnan(row[c]) else f"{row[c]:.2f}" for c in columns)] for _, row in records.iterrows()]
    return table(head, rows)


def drop_section(drops: pd.DataFrame, read: Mapping[str, str]) -> list[str]:
    switch, v3 = load("google/switch-c-2048"), load("deepseek-v3")
    own, warned = default_limit(switch), caution(v3, CapacityLimit("megatron", 1.25))
    known = published(switch)
    assert own is not None and warned is not None and known is not None
    lines = ["## (b) Capacity factor, drops and step time", "", f"**{read['finding']}**", "", read["setting"], ""]
    lines += [figure("study_drops", drop_points(drops), "Drops and step time by capacity factor", DROP_TICKS, "Capacity factor")]
    lines += [f"*{read['figure']}*", "", read["cells"], ""]
    for (model, tokens), part in drops.groupby(["model", "tokens"], sort=False):
        if (model, tokens) != ("switch, groups of 1,024", 1024):
            lines += [f"**{DROP_TITLES[model].replace(chr(10), ' ')}, {tokens:,} tokens per step**", "", *drop_table(part), ""]
    lines += [f"Switch-C is served at factor {own.factor:g} unless told otherwise ({known.source}). {warned.text}.", ""]
    return [*lines, f"*Risk.* {QUALITY_NOTE}", "", advice(read)]


DROP_TITLES = {"switch": "Switch-C, one group", "switch, groups of 1,024": "Switch-C, groups of 1,024", "v3": "DeepSeek-V3"}
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
    return points.sort_values("x", kind="stable").sort_values("column", kind="stable", ascending=False)


def drop_table(part: pd.DataFrame) -> list[str]:
    head = ["factor", "slots", "dropped [%]", "tokens that lost all [%]", "busiest rank / even share", "experts [ms]", "step [ms]"]
    rows = []
    for (placement, factor), group in part.groupby(["placement", "factor"], sort=False):
        name = f"{factor:g}" if np.isfinite(factor) else "off" if placement == "contiguous" else "off, placed"
        slots = str(group["slots"].iloc[0]) if np.isfinite(factor) else "-"
        rates = [three(100 * group[key], percent) for key in ("drop_rate", "fully_dropped_rate")]
        times = [three(1e3 * group[key], significant) for key in ("experts_s", "step_s")]
        rows.append([name, slots, *rates, three(group["rows_over_assignments"], lambda v: f"{v:.2f}"), *times])
    return table(head, rows)


def residency_section(rates: pd.DataFrame, read: Mapping[str, str]) -> list[str]:
    lines = ["## (c) Resident share against tokens per second", "", f"**{read['finding']}**", "", read["setting"], ""]
    text = {0.0: "0", 0.25: "25", 0.5: "50", 0.75: "75", 1.0: "100"}
    points = residency_points(rates)
    lines += [figure("study_residency", points, "Decode rate by resident share", text, "Experts in HBM [%]", False, True)]
    lines += [f"*{read['figure']}*", "", read["cells"], ""]
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


def claims_section() -> list[str]:
    from claims import CLAIMS

    verdicts = tomllib.loads((HERE / "claims_reading.toml").read_text("utf-8"))
    return [
        "## (d) Five common claims",
        "",
        "Tables, figures, where each fails and what to do: [study_claims.md](study_claims.md), written by",
        "`python benchmarks/claims.py`.",
        "",
        *table(["claim", "verdict"], [[claim.saying, verdicts[claim.key]["verdict"]] for claim in CLAIMS], "||"),
    ]


def placement_facts(steps: pd.DataFrame, stale: pd.DataFrame) -> dict[str, str]:
    """Numbers the judgements of part (a) name."""
    at = steps.set_index(["system", "ep", "traffic", "placement", "phase", "tokens_per_gpu"]).sort_index()
    facts = {}
    for ep in (8, 16, 32, 72, 144):
        for short, law in (("mixed", "mixed"), ("single", "single-domain")):
            key = ("h200-sxm", ep, law)
            facts[f"mm_{short}_{ep}"] = f"{at.loc[(*key, 'contiguous', 'decode', 128), 'max_over_mean']:.2f}"
            for phase, size in LOADS:
                plain, greedy = (at.loc[(*key, name, phase, size), "step_s"] for name in ("contiguous", "greedy"))
                facts[f"gain_{short}_{ep}_{phase}{size}"] = f"{1 - greedy / plain:.0%}"
    learned = stale.set_index(["ep", "placement", "learned"])["routed_s"].unstack()
    for ep in (8, 32, 144):
        plain, greedy = learned.loc[(ep, "contiguous"), "mixed"], learned.loc[(ep, "greedy")]
        facts[f"kept_{ep}"] = f"{(plain - greedy['mixed']) / (plain - greedy['itself']):.0%}"
        facts[f"other_{ep}"] = f"{greedy['other'] / plain - 1:+.0%}"
    return facts


def drop_facts(drops: pd.DataFrame) -> dict[str, str]:
    """Numbers the judgements of part (b) name."""
    at = drops.set_index(["model", "tokens", "traffic", "placement", "factor"]).sort_index()
    facts = {}
    for model, tokens, law, factor in (
        ("v3", 16384, "mixed", 1.25),
        ("v3", 16384, "single-domain", 1.25),
        ("v3", 1024, "uniform", 1.0),
        ("v3", 1024, "mixed", 1.25),
        ("switch", 16384, "mixed", 1.25),
        ("switch", 16384, "mixed", 2.0),
        ("switch", 16384, "single-domain", 2.0),
        ("switch", 1024, "mixed", 1.25),
        ("switch, groups of 1,024", 16384, "mixed", 1.25),
    ):
        key = (model, tokens, law)
        limited, free = at.loc[(*key, "contiguous", factor)], at.loc[(*key, "contiguous", np.inf)]
        name = "_".join([model.replace(", groups of 1,024", "_grouped"), str(tokens), law[:6], f"{factor:g}".replace(".", "")])
        facts[f"drop_{name}"] = f"{percent(100 * limited['drop_rate'])} %"
        facts[f"step_{name}"] = f"{limited['step_s'] / free['step_s'] - 1:+.0%}"
        facts[f"placed_{name}"] = f"{at.loc[(*key, 'greedy', np.inf), 'step_s'] / free['step_s'] - 1:+.0%}"
    return facts


def residency_facts(rates: pd.DataFrame) -> dict[str, str]:
    """Numbers the judgements of part (c) name, by the first letters of the machine and the policy."""
    facts = {}
    for (machine, policy), part in rates.groupby(["machine", "policy"]):
        name = f"{machine[:4].lower()}_{policy.replace('-', '_')}".replace("-", "")
        whole = part["tok_per_s"].iloc[-1]
        for mark in (0.0, 0.5, 0.9):
            value = part.iloc[(part["share"] - mark).abs().argmin()]["tok_per_s"]
            facts[f"{name}_{mark * 100:.0f}"] = significant(value)
            facts[f"{name}_{mark * 100:.0f}_of_whole"] = f"{value / whole:.0%}"
        most = part[part["is_most"]].iloc[0]
        facts |= {f"{name}_most": significant(most["tok_per_s"]), f"{name}_share": f"{most['share']:.0%}"}
        facts[f"{name}_whole"] = significant(whole)
    return facts


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


def table(head: Sequence[str], rows: Iterable[Sequence[object]], align: str | None = None) -> list[str]:
    """Markdown lines; the first two columns are left-aligned."""
    rule = "|".join("---" if i < 2 else "--:" for i in range(len(head)))
    return [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def three(values: Iterable[float], text: object) -> str:
    return " / ".join(map(text, values))


def percent(value: float) -> str:
    return "0" if value < 0.005 else significant(value, 2) if value < 10 else f"{value:.0f}"


def advice(read: Mapping[str, str]) -> str:
    return f"*What to do.* {read['advice']}\n"
