"""The page of `benchmarks/claims.py`: tables, figures and the judgements of claims_reading.toml."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from planner.economics import gpu_hour
from planner.engine import Engine
from planner.figures import INK, MUTED, PALETTE, SLO_AREA, axes_of, svg
from planner.hardware import system
from planner.model import ModelConfig
from planner.units import significant

BATCHES, SHOWN = tuple(2**i for i in range(10)), (1, 4, 16, 64, 256, 512)
ROOT = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class Claim:
    """`saying` is true where MoE over dense, in step time or price, is at most `limit`."""

    key: str
    saying: str
    limit: float
    moe: Callable[[], ModelConfig]
    dense: Callable[[], ModelConfig]


@dataclass(frozen=True)
class Capacity:
    """Most requests per second and GPU within the TPOT limit, what a million output tokens then cost, and how."""

    requests_per_s_per_gpu: float
    usd: float | None
    layout: str


Fewest = list[tuple[int, list[float]] | None]
"""For the MoE and the dense side: fewest GPUs that hold it and its decode steps [s] there; None when none do."""


@dataclass(frozen=True)
class Answer:
    """Both sides on the same GPUs, MoE first: decode steps [s] at BATCHES, capacity, prompt tokens per second."""

    steps: list[list[float]]
    capacity: list[Capacity | None]
    prompt_tok_per_s: list[float]


def ratio_cell(ratio: float, limit: float) -> str:
    if not np.isfinite(ratio):
        return "-"
    return f"**{significant(ratio, 2)}**" if ratio <= limit else significant(ratio, 2)


def step_cell(moe_s: float, dense_s: float, limit: float) -> str:
    if np.isnan(moe_s) != np.isnan(dense_s):
        return ("MoE" if np.isnan(moe_s) else "dense") + ": no room"
    return ratio_cell(moe_s / dense_s, limit)


def describe(sides: Sequence[ModelConfig]) -> list[str]:
    lines = ["| side | parameters | active | weights | KV per token |", "|---|--:|--:|--:|--:|"]
    for model in sides:
        numbers = f"{model.total_params / 1e9:.1f}B | {model.active_params_with_embeddings / 1e9:.1f}B"
        lines.append(
            f"| {model.name} | {numbers} | {model.weight_bytes / 1e9:.0f} GB, experts and FFN in "
            f"{model.format_of('expert' if model.moe else 'dense_ffn')} | {model.kv_bytes_per_token / 1e3:.0f} kB |"
        )
    return lines


def step_table(claim: Claim, answers: dict[str, Answer]) -> list[str]:
    lines = ["| GPUs | " + " | ".join(f"{b} running" for b in SHOWN) + " |", "|---|" + "--:|" * len(SHOWN)]
    for cluster, answer in answers.items():
        moe, dense = answer.steps
        cells = [step_cell(moe[i], dense[i], claim.limit) for i in map(BATCHES.index, SHOWN)]
        lines.append(f"| {cluster} | " + " | ".join(cells) + " |")
    return lines


def alone_table(claim: Claim, answers: dict[str, Fewest]) -> list[str]:
    shown = SHOWN[:4]
    lines = ["| system | GPUs, MoE | GPUs, dense | " + " | ".join(f"$ ratio at {b}" for b in shown) + " |"]
    lines.append("|---|--:|--:|" + "--:|" * len(shown))
    for name, (moe, dense) in answers.items():
        counts = [str(side[0]) if side else "does not fit" for side in (moe, dense)]
        ratios = [float("nan")] * len(shown)
        if moe and dense:
            ratios = [moe[0] * moe[1][i] / (dense[0] * dense[1][i]) for i in map(BATCHES.index, shown)]
        cells = [ratio_cell(ratio, claim.limit) for ratio in ratios]
        lines.append(f"| {name} | " + " | ".join([*counts, *cells]) + " |")
    return lines


def capacity_table(claim: Claim, answers: dict[str, Answer]) -> list[str]:
    lines = [
        "| GPUs | MoE req/s per GPU | dense | MoE $/Mtok out | dense | GPUs per request | prompts alone | layouts |"
    ]
    lines.append("|---|--:|--:|--:|--:|--:|--:|---|")
    for cluster, answer in answers.items():
        moe, dense = answer.capacity
        rates = [significant(side.requests_per_s_per_gpu, 2) if side else "-" for side in answer.capacity]
        prices = [f"{side.usd:.2f}" if side and side.usd else "-" for side in answer.capacity]
        ratio = dense.requests_per_s_per_gpu / moe.requests_per_s_per_gpu if moe and dense else float("nan")
        fast, slow = answer.prompt_tok_per_s
        prompts = slow / fast if fast and slow else float("nan")
        ratios = [ratio_cell(value, claim.limit) for value in (ratio, prompts)]
        how = ", ".join(side.layout if side else "none" for side in answer.capacity)
        cells = [rates[0], rates[1], prices[0], prices[1], *ratios, how]
        lines.append(f"| {cluster} | " + " | ".join(cells) + " |")
    return lines


def draw(claim: Claim, answers: dict[str, Answer]) -> Figure:
    """MoE over dense decode step against the batch, one line per cluster; shaded where the claim holds."""
    with axes_of(3.3) as (figure, (axes,)):
        low, high = claim.limit / 1.6, claim.limit * 1.6
        for (cluster, answer), colour in zip(answers.items(), PALETTE, strict=False):
            ratios = np.array(answer.steps[0]) / np.array(answer.steps[1])
            ratios = np.where(np.isfinite(ratios), ratios, np.nan)
            if np.isfinite(ratios).any():
                style = "--" if ":1x" not in cluster else "-"
                axes.plot(BATCHES, ratios, style, color=colour, lw=1.4, marker="o", ms=3, label=cluster)
                low, high = min(low, np.nanmin(ratios) / 1.1), max(high, np.nanmax(ratios) * 1.1)
        axes.axhspan(low, claim.limit, color=SLO_AREA, lw=0)
        axes.axhline(1.0, color=MUTED, lw=0.7)
        axes.text(0.01, 0.03, "claim holds", transform=axes.transAxes, fontsize=8, color=INK)
        axes.set(
            xscale="log", yscale="log", ylim=(low, high), xlabel="Running sequences on all GPUs (4,096 tokens each)"
        )
        axes.set_xticks(BATCHES, [str(b) for b in BATCHES])
        ticks = [t for t in (0.1, 0.125, 0.2, 0.3, 0.5, 0.7, 1, 1.25, 1.5, 2, 3, 4, 6, 8) if low <= t <= high]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set_ylabel("Decode step, MoE over dense")
        axes.grid(True)
        figure.legend(loc="outside right upper", fontsize=8)
    return figure


def section(
    claim: Claim, answers: dict[str, Answer], fewest: dict[str, Fewest], reading: dict[str, str], tpot_limit_s: float
) -> list[str]:
    name = f"claims_{claim.key}"
    bound = f"at most {claim.limit:g} times the dense one"
    (ROOT / "figures").mkdir(exist_ok=True)
    text = svg(draw(claim, answers), name, f"Decode step of MoE over dense: {claim.saying}")
    ROOT.joinpath("figures", f"{name}.svg").write_text(text, encoding="utf-8")
    return [
        f"## {claim.saying}",
        "",
        f"**{reading['verdict']}**",
        "",
        *describe((claim.moe(), claim.dense())),
        "",
        f"Decode step, MoE over dense, on the same GPUs (also the ratio of $/Mtok); bold where the MoE's is {bound}.",
        "",
        *step_table(claim, answers),
        "",
        f"![Decode step of MoE over dense](figures/{name}.svg)",
        "",
        "Each side on the fewest GPUs that hold it: $/Mtok of decoding, MoE over dense, at the same running sequences.",
        "",
        *alone_table(claim, fewest),
        "",
        f"Prompts of 3,584, answers of 512 tokens at the highest rate with a mean TPOT of {tpot_limit_s * 1e3:g} ms;",
        "GPUs per request and the time of prompts alone are MoE over dense.",
        "",
        *capacity_table(claim, answers),
        "",
        f"*Where it fails.* {reading['fails']}",
        "",
        f"*What to do.* {reading['advice']}",
        "",
    ]


def header(engine: Engine, systems: Sequence[str]) -> list[str]:
    prices = "; ".join(
        f"{name} ${price.usd:.2f} ({price.as_of}, {price.provider})"
        for name in systems
        if (price := gpu_hour(system(name)))
    )
    return [
        "# Claims about MoE economics, put to the test",
        "",
        f"Written by `python {' '.join(sys.argv)}` on {date.today()} with {engine.name} {engine.version} rules. Step",
        "times are those of `planner.cost` (measured tables where there are any, rooflines elsewhere), memory that of",
        "the ledger, rates those of `planner.steady`; host time and queueing are not counted. Both sides get the same",
        "GPUs and, for each number of running sequences, the layout with the shortest step; expert popularity is the",
        "log-normal law of mixed traffic. The dense side of the first, fourth and fifth claim has the attention, depth",
        "and KV cache of the MoE, so only the experts differ; 200B shapes are solved (`planner.model.hypothetical`);",
        "the dense 400B is Llama-3.1-405B.",
        "",
        f"Rent per GPU-hour: {prices}.",
        "",
    ]
