"""Writes docs/performance.md: CPU time of simulations and plans, next to bare SimPy and numpy of the same run.

python benchmarks/performance.py
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plan_speed
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from simulate import bare_timeouts_per_s

from planner.figures import MUTED, PALETTE, axes_of, format_axis, svg

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
MEASURED = PAGE.parent.parent / "hardware_profiles" / "measured"
FIGURE = PAGE.parent / "figures" / "performance_growth.svg"
Row = dict[str, Any]

_LONE = ("mixtral-8x7b", "h100-sxm:1x8", "tp=8,ep=8", "vllm")
RUNS: dict[str, tuple[tuple[str, str, str, str], float, int]] = {
    "one replica, 1 request/s": (_LONE, 1.0, 2_000),
    "one replica, 5 requests/s": (_LONE, 5.0, 8_000),
    "one replica, 10 requests/s": (_LONE, 10.0, 10_000),
    "one replica, 20 requests/s": (_LONE, 20.0, 20_000),
    "one replica, 40 requests/s": (_LONE, 40.0, 20_000),
    "attention-DP 4 x EP 4, 10 requests/s": (
        ("mixtral-8x7b", "h100-sxm:1x8", "attention_dp=4,ep=4", "vllm"),
        10.0,
        8_000,
    ),
    "attention-DP 4 x EP 4, 20 requests/s": (
        ("mixtral-8x7b", "h100-sxm:1x8", "attention_dp=4,ep=4", "vllm"),
        20.0,
        8_000,
    ),
    "16 replicas, 80 requests/s": (("mixtral-8x7b", "h100-sxm:16x8", "tp=8,ep=8,replicas=16", "vllm"), 80.0, 16_000),
    "16 replicas, 320 requests/s": (("mixtral-8x7b", "h100-sxm:16x8", "tp=8,ep=8,replicas=16", "vllm"), 320.0, 16_000),
}
"""1,024 tokens in, 256 out, Poisson arrivals: deployment, requests per second, requests."""
PEERS = """| Vidur | 95 to 285 |
| BLIS (Go) | 650 to 950; 330 to 375 with attention-DP 4 and EP |
| AISimulate (Rust) | 3,100; 3,400 to 6,200 with attention-DP 4 and EP; 4,500 with 16 replicas |"""
_MILLION = (
    "simulate mixtral-8x7b --cluster h100-sxm:1x8 --layout tp=8,ep=8 --workload fixed:1024/256 --rate 20 "
    "--num-requests 1000000 --json"
)
_REPEATS = 3


def simulated(where: tuple[str, str, str, str], workload: Any, repeats: int = _REPEATS, **options: Any) -> Row:
    """Least CPU seconds of some simulations of `workload`, and the steps of one; tables are made before."""
    from planner import options as parse
    from planner.deployment import deploy
    from planner.fit import limits_for
    from planner.layout import parse_layout
    from planner.simulation import simulate
    from planner.tactictimer import tactic_timer

    model, cluster, layout, name = where
    engine, offered, cut = parse.engine(name), parse.clusters([cluster])[0], parse_layout(layout)
    limits = limits_for(engine, offered.system, options.pop("seqs", None), None, cut.attention_dp)
    backend = options.pop("backend", "allgather_reducescatter" if cut.attention_dp > 1 else "all_reduce")
    deployment = deploy(parse.precision(model, None, None), offered, cut, engine, limits, backend, 1152)
    timer, spec = tactic_timer(deployment.cost(), limits), deployment.spec(cut.replicas)
    best, run = np.inf, None
    for _ in range(repeats):
        start = time.process_time()
        run = simulate(spec, timer, workload, **options)
        best = min(best, time.process_time() - start)
    assert run is not None
    return {"cpu_s": best, "steps": run.num_steps, "requests": len(run.requests), "timeouts_per_s": _timeouts()}


def _timeouts() -> float:
    return max(bare_timeouts_per_s(100_000) for _ in range(_REPEATS))


def loads() -> list[Row]:
    """Simulated requests and steps per second by deployment and load."""
    from planner.workload import load_workload

    found = []
    for what, (where, rate, count) in RUNS.items():
        found.append({"what": what} | simulated(where, load_workload("fixed:1024/256", rate=rate, num_requests=count)))
    return found


def growth() -> dict[str, tuple[list[int], list[float]]]:
    """CPU seconds against requests, replicas and ranks, the last two with 1,000 requests for each."""
    from planner.workload import load_workload

    found: dict[str, tuple[list[int], list[float]]] = {}
    for what, sizes in {
        "requests": (4_000, 8_000, 16_000, 32_000),
        "replicas": (2, 4, 8, 16),
        "ranks": (2, 4, 8),
    }.items():
        seconds = []
        for size in sizes:
            layout = {"requests": "tp=8,ep=8", "replicas": f"tp=8,ep=8,replicas={size}"}.get(what)
            where = ("mixtral-8x7b", "h100-sxm:16x8", layout or f"attention_dp={size},ep={size}", "vllm")
            count, rate = (size, 10.0) if what == "requests" else (1_000 * size, 5.0 * size)
            asked = load_workload("fixed:1024/256", rate=rate, num_requests=count)
            seconds.append(simulated(where, asked, 2)["cpu_s"])
        found[what] = (list(sizes), seconds)
    return found


def lockstep() -> Row:
    """Ten simulated minutes of DeepSeek-V3 decoding on 144 lockstep ranks with 20,000 requests in flight."""
    from planner.workload import Arrivals, Lengths, Workload

    where = ("deepseek-ai/DeepSeek-V3", "h200-sxm:18x8", "attention_dp=144,ep=144,redundant_experts=32", "vllm")
    decode = Workload("decode", Lengths.fixed(1), Lengths.lognormal(1000, 0.5), Arrivals.closed(20_000), 1_000_000)
    return simulated(where, decode, 1, backend="deepep", max_simulated_s=600.0)


def million() -> Row:
    """A million requests through the command line: CPU seconds and peak memory of the process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "planner", *_MILLION.split()]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=plan_speed.ENVIRONMENT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": cpu_s, "peak_gb": after.ru_maxrss / 1e6, "steps": json.loads(out.stdout)["num_steps"]}


def refresh() -> Row:
    """CPU seconds of the dashboard's answer after a change of load, and after one of GPUs."""
    from planner.whatif.analytic import answer
    from planner.whatif.scenario import Scenario

    asked = Scenario()
    answer(asked)
    found = {}
    for what, changes in {"load_s": [{"rate": r} for r in (3.0, 5.0, 2.0)], "gpus_s": [{"gpus": 32}]}.items():
        seconds = []
        for change in changes:
            start = time.process_time()
            answer(replace(asked, **change))
            seconds.append(time.process_time() - start)
        found[what] = max(seconds)
    return found


def tables_s() -> float:
    """CPU seconds to read the measured tables of the GPU with the most of them."""
    from planner.measurements.store import read_table

    folders = [folder for folder in MEASURED.iterdir() if folder.is_dir()]
    files = sorted(max(folders, key=lambda folder: len(list(folder.glob("*.npz")))).glob("*.npz"))
    best = np.inf
    for _ in range(_REPEATS):
        start = time.process_time()
        for path in files:
            read_table(path)
        best = min(best, time.process_time() - start)
    return best


def _numpy_s() -> float:
    values, best = np.random.default_rng(0).standard_normal(2_000_000), np.inf
    for _ in range(_REPEATS):
        start = time.process_time()
        np.sort(values)
        best = min(best, time.process_time() - start)
    return best


def _slope(sizes: list[int], seconds: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def page(facts: dict[str, Any]) -> str:
    """The page as Markdown."""
    lines = [
        "# Speed",
        "",
        f"Written by `python benchmarks/performance.py` on {facts['date']}: {facts['machine']}.",
        "",
    ]
    lines += [f"The machine was shared (load {facts['load']:.1f}), so times are CPU seconds of one core, the least of"]
    lines += ["some runs, and the last column compares with bare SimPy timeouts measured right after each run.", ""]
    lines += [f"Sorting two million floats with numpy took {facts['numpy_s'] * 1e3:.0f} ms CPU.", ""]
    lines += [
        "## Simulations",
        "",
        "1,024 tokens in, 256 out, Poisson, chunked prefill, routing drawn; Mixtral-8x7B on H100.",
        "",
    ]
    lines += ["| run | requests/s | steps/request | us/step | steps/s over timeouts/s |", "|---|---|---|---|---|"]
    for row in facts["loads"]:
        per_s = row["steps"] / row["cpu_s"]
        lines += [
            f"| {row['what']} | {row['requests'] / row['cpu_s']:,.0f} | {row['steps'] / row['requests']:.2f} "
            f"| {1e6 / per_s:.1f} | {per_s / row['timeouts_per_s']:.2f} |"
        ]
    big, pace = facts["million"], facts["lockstep"]
    lines += [
        "",
        f"A million requests at 20 requests/s through the command line: {big['cpu_s']:.0f} CPU s (wanted: 60),",
    ]
    lines += [f"{big['peak_gb']:.2f} GB peak (wanted: 1.5), {big['steps']:,} steps.", ""]
    lines += ["Ten simulated minutes of DeepSeek-V3 decode on 144 lockstep ranks, 20,000 requests in flight:"]
    lines += [f"{pace['cpu_s']:.1f} CPU s (wanted: 30), {pace['steps']:,} steps.", ""]
    lines += [
        "Wanted: 20,000 requests/s on one replica, 6,200 with attention-DP 4 and with 16 replicas, 0.3 x timeouts."
    ]
    lines += [
        f"Missed: {missed(facts['loads'])}.",
        "A request is work of its own (arrival, prompt, finish: about 25 us here), and so is a step that something",
        "interrupts; only stretches in which nothing happens pass at once. Between many busy replicas they are short.",
        "",
    ]
    lines += [
        "Peers on such a machine, requests/s (measured for issue 8 of this project, 2026-11):",
        "",
        "| peer | requests/s |",
    ]
    lines += [
        "|---|---|",
        *PEERS.splitlines(),
        "",
        "## Plans and small questions",
        "",
        "| what | CPU s | wanted |",
        "|---|---|---|",
    ]
    lines += [
        f"| {r['what']} | {r['cpu_s']:.2f} | {r['limit_s']:g} |" for r in facts["plans"] if r["kind"] == "question"
    ]
    quick = facts["refresh"]
    lines += [f"| measured tables of one GPU, read | {facts['tables_s']:.2f} | 0.15 |"]
    lines += [f"| dashboard: answer after another load | {quick['load_s']:.2f} | 0.3 |"]
    lines += [f"| dashboard: answer after another number of GPUs | {quick['gpus_s']:.2f} | 0.3 |", ""]
    lines += ["Commands are whole processes of an installed program, whose byte code is there. Drawing the dashboard's"]
    lines += ["page takes the server a little more ([dashboard.md](dashboard.md))."]
    lines += ["", "## How time grows", "", "| with | sizes | CPU s | slope on log-log axes |", "|---|---|---|---|"]
    grown = [(what, *points, _slope(*points)) for what, points in facts["growth"].items()]
    grown += [
        (f"{r['what']} (search)", r["sizes"], r["cpu_s"], r["slope"]) for r in facts["plans"] if r["kind"] == "growth"
    ]
    FIGURE.write_text(svg(growth_figure(grown), "performance-growth", "CPU time against size, log-log"), "utf-8")
    for what, sizes, seconds, slope in grown:
        times = ", ".join(f"{s:.2f}" for s in seconds)
        lines += [f"| {what} | {', '.join(f'{n:,}' for n in sizes)} | {times} | {slope:.2f} |"]
    for row in facts["plans"]:
        if "slope_in_layouts" in row:
            sizes = ", ".join(map(str, row["layouts"]))
            lines += [f"| layouts ({row['what']}) | {sizes} | as above | {row['slope_in_layouts']:.2f} |"]
    lines += ["", "Wanted: linear or better. A model of more layers is searched faster because fewer layouts hold it."]
    lines += ["", "![CPU time against size](figures/performance_growth.svg)"]
    return "\n".join(lines) + "\n"


def missed(rows: list[Row]) -> str:
    """The runs that are slower than wanted."""
    wanted = {"one replica": 20_000, "attention-DP": 6_200, "16 replicas": 6_200}
    found = []
    for row in rows:
        per_s = row["requests"] / row["cpu_s"]
        if per_s < next(limit for name, limit in wanted.items() if row["what"].startswith(name)):
            found.append(f"{row['what']} ({per_s:,.0f} a second)")
    return "; ".join(found) + "; 0.3 x timeouts wherever steps per request are few"


def growth_figure(grown: list[tuple[str, list[int], list[float], float]]) -> Figure:
    """CPU time over that of the smallest size against size over the smallest, on logarithmic axes."""
    with axes_of(4.2) as (figure, (axes,)):
        for (what, sizes, seconds, slope), colour in zip(grown, PALETTE, strict=False):
            scaled = np.array(sizes) / sizes[0], np.array(seconds) / seconds[0]
            axes.loglog(*scaled, marker="o", ms=4, lw=1.4, color=colour, label=f"{what}: slope {slope:.2f}")
        axes.loglog([1, 16], [1, 16], color=MUTED, ls=(0, (3, 2)), lw=0.9, label="linear")
        axes.set(xlabel="size over the smallest", ylabel="CPU time over that of the smallest")
        for axis, ticks in ((axes.xaxis, (1, 2, 4, 8, 16)), (axes.yaxis, (0.5, 1, 2, 4, 8, 16))):
            axis.set_major_locator(FixedLocator(ticks))
            axis.set_minor_locator(NullLocator())
            format_axis(axis, lambda value: f"{value:g}x")
        axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Measure everything and write the page."""
    facts: dict[str, Any] = {"date": datetime.date.today().isoformat(), "load": os.getloadavg()[0]}
    facts["machine"] = (
        f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, Python {platform.python_version()}"
    )
    facts["numpy_s"], facts["loads"], facts["growth"] = _numpy_s(), loads(), growth()
    facts["lockstep"], facts["plans"], facts["million"] = lockstep(), plan_speed.rows(), million()
    facts["refresh"], facts["tables_s"] = refresh(), tables_s()
    PAGE.write_text(page(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
