"""Put routing, placement, capacity and residency of experts to the test and write docs/study.md with its figures.

    python benchmarks/study.py

The judgements stand in study_reading.toml; the numbers in them are filled in from the tables of the same run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from planner.capacity import CapacityLimit
from planner.cost import StepCost
from planner.engine import engine
from planner.epochs import rebalance
from planner.experts import ExpertSettings
from planner.fit import limits_for
from planner.hardware import parse_cluster, system
from planner.layout import Layout
from planner.loads import Question, load_table, placement_of, weights_of
from planner.memory import Ledger
from planner.model import load, override
from planner.placement import contiguous_max_over_mean, place
from planner.residency import Residency
from planner.routing import PROMPT_SPREAD, SKEWS, Law, Measured
from planner.routing.formats import read_record
from planner.routing.records import mixture
from planner.small import Machine, compare, estimate

sys.path.insert(0, str(Path(__file__).parent))
import study_page

ENGINE = engine("vllm")
MODEL = "deepseek-v3"
TRAFFIC = ("uniform", "mixed", "single-domain")
EPS = {"h200-sxm": (8, 16, 32, 72, 144), "gb200-nvl72": (8, 16, 32, 72)}
DECODE, CONTEXT = (32, 128), 4096
PREFILL = (4096, 16384)
FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
STEP_TOKENS = (1024, 16384)
SHARES = tuple(i / 20 for i in range(20))
KEPT = ("prefetch", "lru", "static-hot", "cpu", "cpu-layers", "stream")
INT4 = {"experts": "int4_g32", "attention": "int4_g32", "dense": "int4_g32"}
MACHINES = {
    "gpt-oss-120b, RTX 5090, 128 GB": ("gpt-oss-120b", "rtx-5090", 128e9, {}),
    "Qwen3-30B-A3B bf16, RTX 4090, 128 GB": ("qwen3-30b-a3b", "rtx-4090", 128e9, {}),
    "DeepSeek-V3 int4, RTX 4090, 512 GB": (MODEL, "rtx-4090", 512e9, INT4),
}
PLENTY_BYTES = 2e12
"""Memory of a card that holds every share of every model here."""
RECORDS = Path(__file__).parents[2] / "shared" / "data" / "routing"
TASKS = ("intent", "law", "summary", "translation")
_SEED = 7
_LAW_LAYERS = 512


def cost(name: str, ep: int, copies: int, settings: ExpertSettings) -> StepCost:
    """DeepSeek-V3 with data-parallel attention and experts over `ep` GPUs, exchanged by DeepEP."""
    per_node = system(name).gpus_per_node
    layout = Layout(attention_dp=ep, ep=ep, redundant_experts=copies)
    return StepCost(
        load(MODEL), layout, parse_cluster(f"{name}:{ep // per_node}x{per_node}"), ENGINE, "deepep", settings
    )


def placements(ep: int) -> dict[str, tuple[str, int]]:
    """Placement -> its policy and copies: the fewest that divide over the ranks, then one more on every rank."""
    fewest = -_num_experts() % ep
    return {"contiguous": ("contiguous", fewest), "greedy": ("greedy", fewest), "greedy + 1": ("greedy", fewest + ep)}


def placement_rows(name: str, ep: int, traffic: Sequence[str] = TRAFFIC) -> pd.DataFrame:
    """A row per traffic, placement and load of the GPUs (part a)."""
    return pd.DataFrame([row for law in traffic for key in placements(ep) for row in _steps(name, ep, law, key)])


def _steps(name: str, ep: int, law: str, key: str) -> Iterator[dict[str, object]]:
    policy, copies = placements(ep)[key]
    found = cost(name, ep, copies, ExpertSettings(skew=SKEWS[law], placement=policy))
    use = Ledger(found.model, found.cluster.system, ENGINE).use(
        found.layout, limits_for(ENGINE, found.cluster.system), "deepep", CONTEXT
    )
    decode = found.decode(np.array(DECODE, float), np.full(len(DECODE), float(CONTEXT)))
    for phase, sizes, step in (
        ("decode", DECODE, decode),
        ("prefill", PREFILL, found.prefill(np.array(PREFILL, float))),
    ):
        table = load_table(_question(found, phase))
        exchange_s = step.terms["dispatch"] + step.terms["combine"]
        rest = step.origin["extrapolated"] + step.origin["roofline"]
        for i, size in enumerate(sizes):
            yield {
                "system": name,
                "ep": ep,
                "traffic": law,
                "placement": key,
                "copies": copies,
                "phase": phase,
                "tokens_per_gpu": size,
                "experts_s": float(step.terms["experts"][i]),
                "exchange_s": float(exchange_s[i]),
                "step_s": float(step.total_s[i]),
                "max_over_mean": float(table.max_over_mean(size * ep)),
                "kv_tokens_per_gpu": use.kv_tokens,
                "fits": use.kv_tokens >= size * (CONTEXT if phase == "decode" else 1),
                "measured_share": 1 - float(rest[i] / step.total_s[i]),
            }


def stale_rows(name: str, ep: int, seqs: int = DECODE[-1]) -> pd.DataFrame:
    """One task is served under placements learned on other traffic, decode with `seqs` sequences per GPU."""
    return pd.DataFrame([row for key in placements(ep) for row in _stale(name, ep, key, seqs)])


def _stale(name: str, ep: int, key: str, seqs: int) -> Iterator[dict[str, object]]:
    policy, copies = placements(ep)[key]
    found = cost(name, ep, copies, ExpertSettings(skew=SKEWS["mixed"], placement=policy))
    kinds = [(layer, count) for layer, count in found.model.layer_kinds if layer.stack == "decoder"]
    asked = replace(_question(found, "decode"), knots=(seqs * ep,))
    served = replace(asked, law=_task(asked, 0))
    for source, learned in {"mixed": SKEWS["mixed"], "other": _task(asked, 1), "itself": served.law}.items():
        now = replace(served, learned=learned)
        yield {
            "ep": ep,
            "placement": key,
            "learned": source,
            "routed_s": float(found.routed.drawn_seconds("decode", kinds, lambda _, now=now: now).mean()),
            "max_over_mean": float(load_table(now).mean_over_draws[0]),
            "pause_s": rebalance(found, placement_of(now), placement_of(served))[0],
        }


def _task(asked: Question, number: int) -> Law:
    """A single task: mixed traffic, strayed from as far as a prompt strays."""
    mixed = weights_of(SKEWS["mixed"], asked.num_experts, asked.num_layers)
    rng = np.random.default_rng([_SEED, number])
    return Measured(f"task {number}", mixed * PROMPT_SPREAD.weights(mixed.shape[1], len(mixed), rng))


def record_rows() -> pd.DataFrame:
    """Busiest rank over the mean in recorded routing of DeepSeek-V2-Lite and under the laws; empty without records."""
    files = [RECORDS / f"deepseek_v2_lite_{task}.npz" for task in TASKS]
    if not all(path.exists() for path in files):
        return pd.DataFrame()
    tasks = [read_record(path) for path in files]
    pooled = mixture(tasks).counts
    rows = []
    for ep in (8, 16, 32):
        for law, counts in (("mixed", [pooled]), ("single-domain", [task.counts for task in tasks])):
            rows.append({"ep": ep, "traffic": law} | _seen(law, counts, pooled, ep))
    return pd.DataFrame(rows)


def _seen(law: str, counts: Sequence[np.ndarray], pooled: np.ndarray, ep: int) -> dict[str, float]:
    drawn = SKEWS[law].weights(pooled.shape[1], _LAW_LAYERS, np.random.default_rng(_SEED))
    elsewhere = [place("greedy", a, ep).max_over_mean(b) for a in counts for b in counts if a is not b]
    return {
        "record": float(np.mean([contiguous_max_over_mean(c, ep) for c in counts])),
        "law": float(contiguous_max_over_mean(drawn, ep).mean()),
        "record_greedy": float(np.mean([place("greedy", c, ep).max_over_mean(c) for c in counts])),
        "law_greedy": float(place("greedy", drawn, ep).max_over_mean(drawn).mean()),
        "on_mix": float(np.mean([place("greedy", pooled, ep).max_over_mean(c) for c in counts])),
        "elsewhere": float(np.mean(elsewhere)) if elsewhere else float("nan"),
    }


def drop_rows(
    model: str, tokens: int, factors: Sequence[float] = FACTORS, traffic: Sequence[str] = TRAFFIC
) -> pd.DataFrame:
    """A row per traffic and factor (none: every token is served), then the same without drops but placed (part b)."""
    rule, group = {"switch": ("mesh-tf", None), "switch, groups of 1,024": ("mesh-tf", 1024), "v3": ("megatron", None)}[
        model
    ]
    limits = [None, *(CapacityLimit(rule, factor, group_tokens=group) for factor in factors)]
    rows = [_dropped(model, tokens, law, limit) for law in traffic for limit in limits]
    return pd.DataFrame(rows + [_dropped(model, tokens, law, None, "greedy") for law in traffic])


def _dropped(
    model: str, tokens: int, law: str, limit: CapacityLimit | None, policy: str = "contiguous"
) -> dict[str, object]:
    settings = ExpertSettings(skew=SKEWS[law], placement=policy, limit=limit)
    if model == "v3":
        found = cost("h200-sxm", 32, 0, settings)
    else:
        cluster = parse_cluster("h200-sxm:4x8")
        found = StepCost(
            load("google/switch-c-2048"), Layout(tp=8, ep=8, pp=4), cluster, ENGINE, "all_reduce", settings
        )
    phase, sources = ("decode" if tokens == STEP_TOKENS[0] else "prefill"), found.layout.attention_dp
    question = replace(_question(found, phase), knots=(tokens,))
    table, each = load_table(question), np.array([tokens / sources])
    step = (
        found.decode(each, np.array([512.0 if sources == 1 else CONTEXT])) if phase == "decode" else found.prefill(each)
    )
    top_k = question.selection.top_k
    return {
        "model": model,
        "tokens": tokens,
        "traffic": law,
        "placement": policy,
        "factor": limit.factor if limit else np.inf,
        "slots": int(limit.capacity(tokens, question.num_experts, top_k, sources)) if limit else -1,
        "drop_rate": float(table.drop_rate.mean()),
        "fully_dropped_rate": float(table.fully_dropped_rate.mean()),
        "rows_over_assignments": float(table.mean_over_draws[0]),
        "experts_s": float(step.terms["experts"][0]),
        "step_s": float(step.total_s[0]),
    }


def residency_rows(name: str, shares: Sequence[float] = SHARES) -> pd.DataFrame:
    """Decode rate per policy and share of experts in HBM; `fits` tells whether the real card holds it (part c)."""
    alias, gpu, dram_bytes, formats = MACHINES[name]
    model, real = override(load(alias), **formats), system(gpu)
    experts = model.num_experts
    large = Machine(replace(real, gpu=replace(real.gpu, hbm_bytes=PLENTY_BYTES)), 1, dram_bytes)
    budget = ENGINE.budget(real.gpu.hbm_bytes, real.gpu.arch).max_batched_tokens
    most = {e.residency.policy: e for e in compare(model, Machine(real, 1, dram_bytes)).estimates}
    kept = {(policy, round(share * experts)) for policy in KEPT for share in shares}
    kept |= {(policy, most[policy].held.resident) for policy in KEPT}
    asked = [Residency(policy, resident_experts=number) for policy, number in sorted(kept)]
    rows = [
        _rate(name, e.residency.policy, e, experts, most) for e in compare(model, large, asked, chunk=budget).estimates
    ]
    whole = estimate(model, large, Residency("all-resident"), chunk=budget)
    rows += [_rate(name, policy, whole, experts, most) for policy in KEPT]
    return pd.DataFrame(rows).sort_values(["policy", "resident"], ignore_index=True)


def _rate(name: str, policy: str, answer: object, experts: int, most: dict[str, object]) -> dict[str, object]:
    return {
        "machine": name,
        "policy": policy,
        "resident": answer.held.resident,
        "share": answer.held.resident / experts,
        "tok_per_s": answer.decode_tok_per_s,
        "hit_rate": answer.hit_rate,
        "bound": answer.bound,
        "fits": answer.held.resident <= most[policy].held.resident,
        "is_most": answer.held.resident == most[policy].held.resident,
    }


def _question(found: StepCost, phase: str) -> Question:
    return found.routed.question(found.experts.router(found.model.moe), phase)


def _num_experts() -> int:
    return load(MODEL).num_experts


def main() -> None:
    with ProcessPoolExecutor(4) as pool:
        steps = pool.map(placement_rows, *zip(*[(n, ep) for n, eps in EPS.items() for ep in eps], strict=True))
        stale = pool.map(stale_rows, ["h200-sxm"] * 5, EPS["h200-sxm"])
        kinds = ("switch", "switch, groups of 1,024", "v3")
        drops = pool.map(drop_rows, *zip(*[(kind, tokens) for kind in kinds for tokens in STEP_TOKENS], strict=True))
        rates, records = pool.map(residency_rows, MACHINES), pool.submit(record_rows)
        tables = [pd.concat(list(part), ignore_index=True) for part in (steps, stale, drops, rates)]
        study_page.write(*tables, records.result())


if __name__ == "__main__":
    main()
