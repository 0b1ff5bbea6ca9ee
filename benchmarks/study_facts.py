"""Numbers that the judgements of study_reading.toml name, from the tables of `benchmarks/study.py`."""

from __future__ import annotations

import numpy as np
import pandas as pd

from planner.units import significant

LOADS = {
    ("decode", 32): "decode, 32 sequences",
    ("decode", 128): "decode, 128 sequences",
    ("prefill", 4096): "prefill, 4,096 tokens",
    ("prefill", 16384): "prefill, 16,384 tokens",
}
"""Phase and size per GPU of the steps of part (a)."""


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
    learned = stale.pivot_table("routed_s", ["ep", "placement"], "learned")
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
        name = "_".join(
            [model.replace(", groups of 1,024", "_grouped"), str(tokens), law[:6], f"{factor:g}".replace(".", "")]
        )
        facts[f"drop_{name}"] = f"{limited['drop_rate']:.0%}"
        facts[f"step_{name}"] = f"{limited['step_s'] / free['step_s'] - 1:+.0%}"
        facts[f"placed_{name}"] = f"{at.loc[(*key, 'greedy', np.inf), 'step_s'] / free['step_s'] - 1:+.0%}"
    return facts


def residency_facts(rates: pd.DataFrame) -> dict[str, str]:
    """Numbers the judgements of part (c) name, by the first letters of the machine and the policy."""
    facts = {}
    for (machine, policy), part in rates.groupby(["machine", "policy"]):
        name = f"{machine[:4].lower().rstrip('-')}_{policy.replace('-', '_')}"
        whole = part["tok_per_s"].iloc[-1]
        for mark in (0.0, 0.5, 0.9):
            value = part.iloc[(part["share"] - mark).abs().argmin()]["tok_per_s"]
            facts[f"{name}_{mark * 100:.0f}"] = significant(value)
            facts[f"{name}_{mark * 100:.0f}_of_whole"] = f"{value / whole:.0%}"
        most = part[part["is_most"]].iloc[0]
        facts |= {f"{name}_most": significant(most["tok_per_s"]), f"{name}_share": f"{most['share']:.0%}"}
        facts[f"{name}_whole"] = significant(whole)
    return facts


def percent(value: float) -> str:
    return "0" if value < 0.005 else significant(value, 2) if value < 10 else f"{value:.0f}"
