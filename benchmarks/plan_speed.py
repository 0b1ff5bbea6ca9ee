"""CPU time of plans and small questions, in seconds and in SimPy timeouts of the same run, and how a search grows.

python benchmarks/plan_speed.py [--json]

Every number is user and system time of a fresh process, so caches are cold and other work on the machine counts little.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np

Row = dict[str, Any]
_PLAN = "plan deepseek-ai/DeepSeek-V3 --cluster {} --workload chat --rate {} --slo ttft_p95=2s,tpot_p95=50ms --json"
QUESTIONS = {
    "plan DeepSeek-V3, 32 x H200": (_PLAN.format("h200-sxm:4x8", 12), 5.0),
    "plan DeepSeek-V3, 32 x B200": (_PLAN.format("b200-sxm:4x8", 20), 5.0),
    "fit DeepSeek-V3": ("fit deepseek-ai/DeepSeek-V3 --gpu h200-sxm --json", 0.7),
    "describe DeepSeek-V3": ("describe deepseek-ai/DeepSeek-V3 --json", 0.7),
    "--help": ("--help", 0.4),
}
"""Command line and the CPU seconds it may take."""
GROWTH = {
    "GPUs": (8, 16, 32, 64, 128),
    "layers": (16, 31, 61, 122, 244),
    "experts": (64, 128, 256, 512, 1024),
}
"""Sizes of the question, the other two being 32 H200, 61 layers and 256 experts."""
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
"""Lets the first run keep its byte code, as an installation does."""
_TIMEOUTS = 300_000
_REPEATS = 3


def rows() -> list[Row]:
    """All measurements: `kind` question (cpu_s, limit_s, ratio) or growth (sizes, layouts, cpu_s, slope).

    `ratio` is CPU time over that of a million SimPy timeouts in this run; `slope` the exponent of the last doublings.
    """
    timeouts_s = min(_timeouts_s() for _ in range(_REPEATS)) * 1e6 / _TIMEOUTS
    found: list[Row] = [{"kind": "baseline", "what": "1,000,000 SimPy timeouts", "cpu_s": timeouts_s}]
    for what, (arguments, limit_s) in QUESTIONS.items():
        out, cpu_s = _least([sys.executable, "-m", "planner", *arguments.split()])
        facts = json.loads(out) if arguments.startswith("plan") else {}
        count = {"considered": facts["considered"], "simulated": facts["simulated"]} if facts else {}
        measured = {"cpu_s": cpu_s, "limit_s": limit_s, "ratio": cpu_s / timeouts_s}
        found.append({"kind": "question", "what": what, **measured, **count})
    return found + [_growth(what, sizes) for what, sizes in GROWTH.items()]


def _growth(what: str, sizes: tuple[int, ...]) -> Row:
    points = [json.loads(_least([sys.executable, __file__, "--search", what, str(size)], 1)[0]) for size in sizes]
    cpu_s, layouts = ([point[key] for point in points] for key in ("cpu_s", "layouts"))
    row: Row = {"kind": "growth", "what": what, "sizes": list(sizes), "layouts": layouts, "cpu_s": cpu_s}
    row["slope"] = _slope(sizes, cpu_s)
    if len(set(layouts)) > 1:
        row["slope_in_layouts"] = _slope(layouts, cpu_s)
    return row


def _slope(sizes: Any, cpu_s: list[float]) -> float:
    """Exponent of growth over the larger half of the points, where what is fixed no longer hides it."""
    half = len(cpu_s) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(cpu_s[half:]), 1)[0])


def _least(command: list[str], repeats: int = _REPEATS) -> tuple[str, float]:
    """Output of `command` and the least CPU seconds of some runs."""
    best = np.inf
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
        if done.returncode not in (0, 3):
            raise RuntimeError(done.stderr)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return done.stdout, float(best)


def _timeouts_s() -> float:
    import simpy

    environment = simpy.Environment()

    def wait() -> Any:
        for _ in range(_TIMEOUTS):
            yield environment.timeout(1.0)

    environment.process(wait())
    start = time.process_time()
    environment.run()
    return time.process_time() - start


def _search(what: str, size: int) -> Row:
    """CPU seconds of a search whose question is `size` large in one direction, imports left out."""
    from planner import options
    from planner.enumeration import layouts
    from planner.model.config import Moe
    from planner.model.precision import override
    from planner.recommend import default_kv_formats
    from planner.search import Search
    from planner.workload import parse_slo

    slo = parse_slo("ttft_p95=2s,tpot_p95=50ms")
    demand, model = options.plan_demand("chat", 20, None, None, slo), options.precision("deepseek-v3", None, None)
    cluster = options.clusters([f"h200-sxm:{(size if what == 'GPUs' else 32) // 8}x8"])[0]
    if what == "layers":
        model = replace(model, layers=(model.layers[:3] + model.layers[3:] * 5)[:size])
    if what == "experts":
        experts = [
            replace(f, num_experts=size) if isinstance(f, Moe) else f for layer in model.layers[-1:] for f in layer.ffns
        ]
        model = replace(model, layers=(*model.layers[:3], *[replace(model.layers[-1], ffns=tuple(experts))] * 58))
    variants = [override(model, kv=kv) for kv in default_kv_formats(model, cluster)]
    start = time.process_time()
    Search(cluster, options.engine("vllm"), demand, slo).run(variants)
    cpu_s = time.process_time() - start
    return {"cpu_s": cpu_s, "layouts": len(list(layouts(model, cluster, options.engine("vllm"))))}


def main() -> None:
    """Print the rows, one search for the growth or everything."""
    if "--search" in sys.argv:
        print(json.dumps(_search(sys.argv[-2], int(sys.argv[-1]))))
        return
    found = rows()
    if "--json" in sys.argv:
        print(json.dumps(found, indent=2))
        return
    for row in found:
        if row["kind"] == "growth":
            points = ", ".join(f"{n:,}: {s:.2f} s" for n, s in zip(row["sizes"], row["cpu_s"], strict=True))
            print(f"search against {row['what']}: slope {row['slope']:.2f} ({points})")
        else:
            more = f", limit {row['limit_s']:g} s, {row['ratio']:.2f} x the baseline" if "ratio" in row else ""
            plan = f", {row['considered']:,} candidates, {row['simulated']} simulated" if "considered" in row else ""
            print(f"{row['what']}: {row['cpu_s']:.2f} CPU s{more}{plan}")


if __name__ == "__main__":
    main()
