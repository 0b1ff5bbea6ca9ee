"""Put the common claims about MoE economics to the test and write docs/study_claims.md with its figures.

    python benchmarks/claims.py

Both sides of a claim get the same GPUs and the layout that suits them; the judgements stand in claims_reading.toml.
"""

from __future__ import annotations

import sys
import tomllib
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np

from planner.cost import StepCost
from planner.economics import gpu_hour, usd_per_mtok
from planner.engine import engine
from planner.enumeration import BATCHED_TOKENS, layouts
from planner.facts.variants import smallest_gpus
from planner.fit import limits_for
from planner.hardware import Cluster, parse_cluster, system
from planner.memory import Ledger
from planner.model import ModelConfig, load, override
from planner.model.custom import from_toml
from planner.steady import steady_state
from planner.variants import (
    Variant,
    decode_points,
    dense_of_active,
    most_seqs,
    placed,
)
from planner.workload import load_workload

sys.path.insert(0, str(Path(__file__).parent))
from claims_page import BATCHES, ROOT, Answer, Capacity, Claim, Fewest, header, section

ENGINE = engine("vllm")
CONTEXT = 4096
WORKLOAD, TPOT_LIMIT_S = "fixed:3584/512", 0.05
CLUSTERS = (
    "h100-sxm:1x8",
    "h200-sxm:1x8",
    "b200-sxm:1x8",
    "l40s:1x8",
    "h100-sxm:2x8",
    "h100-sxm:4x8",
    "h200-sxm:4x8",
    "l40s:4x8",
)
SYSTEMS = ("h100-sxm", "h200-sxm", "b200-sxm", "l40s")


def solved(total: float, active: float, weights: str, experts: tuple[int, int] | None = None) -> ModelConfig:
    raw: dict[str, object] = {"source": "claims.py", "total_params": total, "active_params": active}
    raw |= {"experts": {"num": experts[0], "top_k": experts[1]}} if experts else {}
    kind = f"{total / 1e9:.0f}B" + (f" of which {active / 1e9:.0f}B active" if experts else " dense")
    return from_toml(raw | {"formats": {"weights": weights}}, "claims.py", kind)


def llama_405b() -> ModelConfig:
    return override(load("meta-llama/Meta-Llama-3.1-405B"), attention="fp8_block", dense="fp8_block")


CLAIMS = (
    Claim(
        "60b",
        "A 60B model with 8B active costs about as much to run as a dense 8B",
        1.25,
        lambda: load("moe-60b-a8b"),
        lambda: dense_of_active(load("moe-60b-a8b")),
    ),
    Claim(
        "200b",
        "200B/20B needs ten times less hardware per request than dense 200B",
        0.125,
        lambda: solved(200e9, 20e9, "fp8_block", (128, 8)),
        lambda: solved(200e9, 200e9, "fp8_block"),
    ),
    Claim(
        "400b",
        "400B/40B runs ten times faster than dense 400B",
        0.125,
        lambda: solved(400e9, 40e9, "fp8_block", (128, 8)),
        llama_405b,
    ),
    Claim(
        "mixtral",
        "Mixtral serves like a dense 13B",
        1.25,
        lambda: load("mixtral-8x7b"),
        lambda: dense_of_active(load("mixtral-8x7b")),
    ),
    Claim(
        "deepseek",
        "DeepSeek-V3 computes like a 37B",
        1.25,
        lambda: load("deepseek-v3"),
        lambda: dense_of_active(load("deepseek-v3")),
    ),
)
BY_KEY = {claim.key: claim for claim in CLAIMS}


def step_seconds(model: ModelConfig, cluster: Cluster) -> list[float]:
    """Decode step at BATCHES sequences over all GPUs; NaN without room."""
    limits = limits_for(ENGINE, cluster.system)
    choices = list(layouts(model, cluster, ENGINE))
    points = decode_points(Variant("", model), cluster, ENGINE, limits, choices, BATCHES, CONTEXT)
    return [point.step_s if point else float("nan") for point in points]


def prompt_tok_per_s(model: ModelConfig, cluster: Cluster) -> float:
    """Most prompt tokens per second of all GPUs in steps of one whole prompt per rank; 0 when nothing fits."""
    ledger, limits, best = Ledger(model, cluster.system, ENGINE), limits_for(ENGINE, cluster.system), 0.0
    prompt = load_workload(WORKLOAD).mean_prompt_tokens
    for layout, backend in placed(layouts(model, cluster, ENGINE), cluster, ENGINE):
        if ledger.use(layout, limits, backend, CONTEXT).fits:
            step_s = float(StepCost(model, layout, cluster, ENGINE, backend).prefill(np.array([prompt])).total_s[0])
            best = max(best, layout.replicas * layout.pp * layout.attention_dp * prompt / step_s)
    return best


def capacity(model: ModelConfig, cluster: Cluster) -> Capacity | None:
    """The best layout for prompts and answers together; None when nothing fits within the limit."""
    workload, price = load_workload(WORKLOAD), gpu_hour(cluster.system)
    context = workload.mean_prompt_tokens + workload.mean_output_tokens / 2
    ledger, best = Ledger(model, cluster.system, ENGINE), (0.0, "")
    for layout, backend in placed(layouts(model, cluster, ENGINE), cluster, ENGINE):
        cost = StepCost(model, layout, cluster, ENGINE, backend)
        for budget in BATCHED_TOKENS:
            limits = limits_for(ENGINE, cluster.system, max_batched_tokens=budget)
            use = ledger.use(layout, limits, backend, int(context))
            room = min(use.kv_tokens / layout.pp / context, most_seqs(layout, backend, ENGINE, limits))
            if room < 1:
                continue
            steady = steady_state(cost, budget, ENGINE.policy, workload)
            batch = np.append(steady.batch[steady.batch <= room], room)
            rate = np.interp(batch, steady.batch, steady.requests_per_s)
            rate = np.where(steady.tpot_at(batch) <= TPOT_LIMIT_S, rate, 0.0).max()
            ranks = layout.replicas * layout.pp * layout.attention_dp
            best = max(best, (float(rate) * ranks / cluster.num_gpus, str(layout)))
    if best[0] == 0:
        return None
    usd = usd_per_mtok(price.usd, 1, best[0] * workload.mean_output_tokens) if price else None
    return Capacity(best[0], usd, best[1])


def question(case: tuple[str, str]) -> Answer:
    claim, cluster = BY_KEY[case[0]], parse_cluster(case[1])
    sides = [claim.moe(), claim.dense()]
    return Answer(
        [step_seconds(model, cluster) for model in sides],
        [capacity(model, cluster) for model in sides],
        [prompt_tok_per_s(model, cluster) for model in sides],
    )


def alone(case: tuple[str, str]) -> Fewest:
    """Each side on the fewest GPUs that hold it: their number and the decode steps there."""
    claim, kind = BY_KEY[case[0]], system(case[1])
    found: Fewest = []
    for model in (claim.moe(), claim.dense()):
        size = smallest_gpus(Variant("", model), kind, ENGINE, limits_for(ENGINE, kind), CONTEXT)
        if size is None:
            found.append(None)
            continue
        cluster = Cluster(kind, max(1, size // kind.gpus_per_node), min(size, kind.gpus_per_node))
        found.append((size, step_seconds(model, cluster)))
    return found


def main() -> None:
    with ProcessPoolExecutor(2) as pool:
        same = [(claim.key, cluster) for claim in CLAIMS for cluster in CLUSTERS]
        small = [(claim.key, name) for claim in CLAIMS for name in SYSTEMS]
        found = dict(zip(same, pool.map(question, same), strict=True))
        fewest = dict(zip(small, pool.map(alone, small), strict=True))
    readings = tomllib.loads(Path(__file__).with_name("claims_reading.toml").read_text("utf-8"))
    lines = header(ENGINE, SYSTEMS)
    for claim in CLAIMS:
        answers = {cluster: found[claim.key, cluster] for cluster in CLUSTERS}
        least = {name: fewest[claim.key, name] for name in SYSTEMS}
        lines += section(claim, answers, least, readings[claim.key], TPOT_LIMIT_S)
    ROOT.joinpath("study_claims.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"python {' '.join(sys.argv)}, {date.today()}: {len(same)} comparisons, {len(CLAIMS)} figures")


if __name__ == "__main__":
    main()
