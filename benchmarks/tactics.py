"""Speculative decoding and two-batch overlap against what SGLang published; nothing is tuned to it.

Run: python benchmarks/tactics.py

Sources: lmsys.org blog 2025-07-17 (MTP, H200) and 2025-05-05 (two-batch overlap, H100). Both ran with EPLB.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.cost import StepCost
from planner.engine import engine
from planner.experts import AS_SERVED
from planner.hardware import parse_cluster
from planner.layout import Layout
from planner.model import load
from planner.tables import table
from planner.tacticcost import step_cost
from planner.tactics import parse_tactics

MODEL, ENGINE = load("deepseek-ai/DeepSeek-V3"), engine("sglang")
BALANCED = replace(AS_SERVED, placement="eplb")


def cost(cluster: str, ranks: int, copies: int, speculative: str | None = None, overlap: str | None = None) -> StepCost:
    """Step times of DeepSeek-V3 with data-parallel attention on `ranks` GPUs and experts on all of them."""
    tactics = parse_tactics(speculative, None, overlap, MODEL, ENGINE)
    layout = Layout(attention_dp=ranks, ep=ranks, redundant_experts=copies)
    return step_cost(MODEL, layout, parse_cluster(cluster), ENGINE, "deepep", BALANCED, None, tactics)


def decode_gain(plain: StepCost, chosen: StepCost, seqs: float, context: float) -> float:
    """Tokens per second over plain ones, less 1."""
    times = [float(one.decode(np.array(seqs), np.array(context)).total_s) for one in (plain, chosen)]
    return times[0] / times[1] * chosen.tokens_per_step / plain.tokens_per_step - 1


def prefill_gain(plain: StepCost, chosen: StepCost, tokens: float) -> float:
    """Tokens per second over plain ones, less 1."""
    return float(plain.prefill(np.array(tokens)).total_s / chosen.prefill(np.array(tokens)).total_s) - 1


def rows() -> list[tuple[str, str, str]]:
    """What was run, what was published, what is predicted."""
    found = []
    small = "h200-sxm:2x8", 16, 0
    for drafts, published in ((2, "+59.8 %"), (3, "+60.8 %")):
        gain = decode_gain(cost(*small), cost(*small, f"mtp:{drafts}"), 2.0, 65_536 + 2_048)
        found.append((f"MTP, {drafts} drafts, 16 x H200, 2 per rank, 67k context", published, f"{gain:+.1%}"))
    large = "h200-sxm:12x8", 96, 32
    plain, drafting = cost(*large), cost(*large, "mtp:1")
    for seqs, published in ((2, ""), (8, ""), (32, ""), (64, ""), (128, "+14.2 %")):
        gain = decode_gain(plain, drafting, seqs, 2_050.0)
        found.append((f"MTP, 1 draft, 96 x H200, {seqs} per rank, 2k context", published, f"{gain:+.1%}"))
    wide = "h100-sxm:9x8", 72, 32
    plain, halves = cost(*wide), cost(*wide, None, "tbo")
    for seqs, published in ((16, ""), (32, "-27 %"), (64, "break-even"), (128, "break-even"), (256, "+25.5 %")):
        gain = decode_gain(plain, halves, seqs, 2_000.0)
        found.append((f"TBO decode, 72 x H100, {seqs} per rank, 2k context", published, f"{gain:+.1%}"))
    gain = decode_gain(cost(*wide, "mtp:1"), cost(*wide, "mtp:1", "tbo"), 128.0, 4_000.0)
    found.append(("TBO decode with MTP, 72 x H100, 128 per rank, 4k context", "+35 %", f"{gain:+.1%}"))
    node = "h100-sxm:4x8", 32, 32
    plain, halves = cost(*node), cost(*node, None, "tbo")
    for tokens in (2_048, 4_096, 8_192, 16_384):
        gain = prefill_gain(plain, halves, tokens)
        found.append((f"TBO prefill, 32 x H100, {tokens:,} tokens per rank", "+27 to +35 %", f"{gain:+.1%}"))
    return found


if __name__ == "__main__":
    print(table(["case", "published", "predicted"], rows(), left=1))
