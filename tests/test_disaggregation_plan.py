"""Matching two pools: rates against the simulation, the ratio curve, verdicts, and what a user can get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.disaggregation.deployment import pools, run_pools
from planner.disaggregation.handover import handover
from planner.disaggregation.plan import check_question, plan_pools
from planner.disaggregation.rates import (
    Demand,
    decode_curve,
    decode_rate,
    matched_tok_per_s_per_gpu,
    matched_units,
    prefill_rate,
)
from planner.disaggregation.search import candidates, search_pools, splits
from planner.engine import Limits, engine
from planner.errors import InputError
from planner.experts import AS_SERVED
from planner.hardware import parse_cluster
from planner.layout import parse_layout
from planner.model import load
from planner.recommend import recommend
from planner.workload import load_workload, parse_slo

SIMULATE = (
    "simulate",
    "mixtral-8x7b",
    "--cluster",
    "h100-sxm:1x8",
    "--workload",
    "fixed:512/64",
    "--num-requests",
    "100",
)
POOLS = ("--prefill-layout", "tp=2", "--decode-layout", "tp=2,replicas=2")


def test_deepseek_day_takes_95_prefill_and_131_decode_nodes():
    nodes = matched_units(608e9 / 86400, 168e9 / 86400, 73.7e3, 14.8e3)
    assert nodes == pytest.approx((95.48, 131.38), abs=0.005)
    assert sum(nodes) == pytest.approx(226.75, rel=1e-3)


def test_blog05_throughput_is_that_of_matched_whole_numbers():
    # 3 prefill replicas of 2 GPUs at 4 requests/s feed 2 decode replicas of 8 GPUs at 6: 12 requests/s on 22 GPUs
    assert matched_tok_per_s_per_gpu(500, 4.0, 2, 6.0, 8) == pytest.approx(12 * 500 / 22)


@pytest.mark.parametrize(
    ("name", "cluster", "prefill", "decode", "workload", "users", "profile"),
    [
        ("mixtral-8x7b", "h100-sxm:2x8", "tp=2", "tp=2,replicas=4", "fixed:2000/100", 400, "vllm"),
        ("mixtral-8x7b", "h100-sxm:2x8", "tp=2,replicas=4", "tp=2", "fixed:1000/400", 400, "vllm"),
        ("deepseek-v3", "h200-sxm:4x8", "attention_dp=8,ep=8", "tp=8,ep=8", "lognormal:4096~0.5/50~0.5", 400, "sglang"),
    ],
)
def test_saturated_pools_reach_the_matched_rate_within_5_percent(
    name: str, cluster: str, prefill: str, decode: str, workload: str, users: int, profile: str
) -> None:
    offered, chosen, rules = parse_cluster(cluster), engine(profile), handover(engine(profile))
    asked = load_workload(workload, concurrency=users, num_requests=3000)
    deployment = pools(
        load(name),
        (offered, offered),
        (parse_layout(prefill), parse_layout(decode)),
        (Limits(256, 8192), Limits(64, 2048)),
        ("allgather_reducescatter",) * 2,
        chosen,
        rules,
        asked,
        shared=True,
    )
    demand = Demand.of(load_workload(workload, rate=1.0))
    prompts = prefill_rate(deployment.prefill.cost(), deployment.prefill, demand)
    curve = decode_curve(deployment.decode.cost(), demand, rules)
    tokens = decode_rate(curve, deployment.decode, demand, rules)
    expected = min(
        prompts.requests_per_s * deployment.prefill.layout.replicas,
        tokens.capacity_per_s * deployment.decode.layout.replicas,
    )
    run = run_pools(deployment, asked, whole=True)
    assert run.summary.requests_per_s == pytest.approx(expected, rel=0.05)


def test_lockstep_ranks_wait_for_long_prompts_only_if_lengths_differ():
    same, mixed = (Demand.of(load_workload(w, rate=1.0)) for w in ("fixed:4096/10", "lognormal:4096~0.5/10~0.5"))
    assert same.excess_pairs(4096, 8) == 0.0 == mixed.excess_pairs(8192, 1)
    assert 0 < mixed.excess_pairs(8192, 2) < mixed.excess_pairs(8192, 16)


# --- search --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    cluster = parse_cluster("h100-sxm:1x8")
    workload = load_workload("fixed:2000/200", rate=4.0, num_requests=500)
    return search_pools(load("mixtral-8x7b"), cluster, engine("vllm"), workload, handover(engine("vllm"))), cluster


def test_candidates_stay_on_the_cluster_and_hold_the_longest_request(found):
    search, cluster = found
    slo = parse_slo("ttft_p95=2s,tpot_p95=50ms")
    pairs = candidates(search, (cluster, cluster), handover(engine("vllm")), slo)
    assert pairs and all(pair.num_gpus <= 8 for pair in pairs)
    assert [p.num_gpus for p in pairs] == sorted(p.num_gpus for p in pairs)
    assert all(rate.deployment.memory.kv_tokens >= 2200 for rate in search.decode)
    assert all(rate.deployment.memory.kv_tokens >= 2000 for rate in search.prefill)


def test_the_ratio_curve_rises_for_one_pool_and_falls_for_the_other(found):
    search, _ = found
    curve = splits(search, parse_slo("ttft_p95=2s,tpot_p95=50ms"), 8)
    assert len(curve) > 2 and all(s.prefill_gpus + s.decode_gpus == 8 for s in curve)
    assert (np.diff([s.prefill_per_s for s in curve]) > 0).all()
    assert (np.diff([s.decode_per_s for s in curve]) <= 0).all()
    tight = splits(search, parse_slo("ttft_p95=2s,tpot_p95=12ms"), 8)
    assert max(s.requests_per_s for s in tight) <= max(s.requests_per_s for s in curve)


def test_an_impossible_slo_leaves_no_pair(found):
    search, cluster = found
    slo = parse_slo("ttft_p95=2s,tpot_p95=1ms")
    assert candidates(search, (cluster, cluster), handover(engine("vllm")), slo) == []
    assert splits(search, slo, 8) == []


def _planned(model: str, cluster: str, workload: str, rate: float, slo: str, profile: str = "vllm") -> Any:
    asked = load_workload(workload, rate=rate, num_requests=500)
    answer = recommend(load(model), [parse_cluster(cluster)], asked, parse_slo(slo), engine(profile))
    return answer, plan_pools(answer)


def test_long_prompts_under_a_tight_token_limit_part():
    answer, plan = _planned("mixtral-8x7b", "h100-sxm:1x8", "fixed:8000/200", 3.0, "ttft_p95=3s,tpot_p95=15ms")
    assert plan.meets_slo and plan.verdict == "two pools"
    assert not answer.meets_slo or answer.winner.num_gpus >= plan.winner.num_gpus


def test_pools_are_planned_for_a_rate(mixtral):
    with pytest.raises(InputError, match="--concurrency states none"):
        check_question(mixtral, load_workload("chat", concurrency=4), AS_SERVED)


# --- commands ------------------------------------------------------------------------------------------------------


def test_simulate_prints_pools_handover_and_latencies(moeplan: Any) -> None:
    code, out, _ = moeplan(*SIMULATE, *POOLS, "--rate", "4", "--slo", "ttft_p95=2s,tpot_p95=50ms")
    assert code == 0
    for text in (
        "prefill tp2 + decode tp2 x2 on 6 GPUs",
        "meets the SLO",
        "wait for KV room",
        "TTFT ends with the first",
    ):
        assert text in out
    code, out, _ = moeplan(*SIMULATE, *POOLS, "--rate", "4", "--json")
    facts = json.loads(out)
    assert facts["num_gpus"] == 6 and facts["num_rejected"] == 0
    assert facts["handover"]["route"]["moved_bytes"] == 512 * 131_072
    assert {"prefill", "decode", "ttft_s", "tpot_s", "output_tok_per_s_per_gpu"} <= set(facts)


def test_simulate_writes_a_row_per_request_with_its_handover(moeplan: Any, tmp_path: Path) -> None:
    code, _, _ = moeplan(*SIMULATE, *POOLS, "--rate", "4", "--out", str(tmp_path / "run"))
    header, *rows = (tmp_path / "run" / "requests.csv").read_text().splitlines()
    assert code == 0 and len(rows) == 100
    assert {"prefilled_s", "reserve_wait_s", "link_wait_s", "transfer_s", "kv_bytes"} <= set(header.split(","))
    assert {f.name for f in (tmp_path / "run").iterdir()} >= {"prefill_steps.csv", "decode_steps.csv", "manifest.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layout", "tp=2", *POOLS), "--layout tp=2 is one pool, --prefill-layout belongs to two"),
        (("--layout", "tp=2", "--kv-send", "whole"), "--kv-send belongs to two"),
        ((), "no layout is given. Give --layout, such as tp=8,ep=8, or --prefill-layout"),
        (POOLS[:2], "--decode-layout is missing"),
        (POOLS[2:], "--prefill-layout is missing"),
        (("--prefill-layout", "tp=8", "--decode-layout", "tp=2"), "10 of the 8 of h100-sxm:1x8"),
        (("--prefill-layout", "tp=3", "--decode-layout", "tp=2"), "prefill pool: "),
        ((*POOLS, "--kv-reserve", "prefilled", "--kv-send", "layers"), "add --kv-reserve arrival"),
        ((*POOLS, "--reserved-decode-tokens", "-1"), "must be 0 or more"),
        ((*POOLS, "--decode-max-num-seqs", "0"), "--decode-max-num-seqs 0"),
        ((*POOLS, "--residency", "lru"), "simulate it with --layout"),
        ((*POOLS, "--decode-cluster", "h100-sxm:9x9"), "9"),
    ],
)
def test_bad_input_has_one_message(moeplan: Any, options: tuple[str, ...], message: str) -> None:
    code, out, err = moeplan(*SIMULATE, "--rate", "4", *options)
    assert code == 2 and not out and message in err and err.count("\n") == 1


def test_a_pool_that_does_not_fit_is_named(moeplan: Any) -> None:
    code, _, err = moeplan(*SIMULATE, "--prefill-layout", "tp=2", "--decode-layout", "tp=1", "--rate", "1")
    assert code == 3 and "decode pool: " in err and "does not fit" in err


@pytest.mark.parametrize(
    ("workload", "limits", "reason"),
    [
        ("fixed:8000/8", (), "give the prefill pool more GPUs"),
        ("fixed:500/400", ("--decode-max-num-seqs", "4"), "give the decode pool more GPUs"),
    ],
)
def test_an_overloaded_run_names_the_pool(moeplan: Any, workload: str, limits: tuple[str, ...], reason: str) -> None:
    question = ("simulate", "mixtral-8x7b", "--cluster", "h100-sxm:1x8", "--workload", workload, "--rate", "10")
    code, out, _ = moeplan(*question, *POOLS, *limits, "--num-requests", "1500")
    assert code == 0 and "overloaded" in out.splitlines()[0] and reason in out


def test_decode_pool_on_another_system(moeplan: Any) -> None:
    code, out, _ = moeplan(*SIMULATE, *POOLS, "--rate", "4", "--decode-cluster", "h20:1x8", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["decode"]["cluster"] == "h20:1x8" and facts["prefill"]["cluster"] == "h100-sxm:1x8"


def test_plan_disaggregate_answers_the_question_first(moeplan: Any) -> None:
    question = ("plan", "mixtral-8x7b", "--cluster", "h100-sxm:1x4", "--workload", "fixed:512/64", "--rate", "2")
    code, out, _ = moeplan(*question, "--num-requests", "200", "--disaggregate")
    assert code == 0
    assert out.startswith("Prefill and decode apart? No: it serves the demand for less")
    assert "In two pools: " in out and "How to split 4 GPUs" in out and "Matched exactly: " in out
    code, out, _ = moeplan(*question, "--num-requests", "200", "--disaggregate", "--json")
    plain = json.loads(out)
    facts = plain["disaggregation"]
    assert facts["verdict"] == "one pool" and facts["curve"] and "in one" in facts["reason"]
    assert facts["winner"]["num_gpus"] == 4 > plain["layout"]["num_gpus"]
    assert sum(row["meets_slo"] for row in facts["runs"]) > 0


def test_two_pools_need_the_model_twice(moeplan: Any) -> None:
    for cluster, reason in (
        ("h100-sxm:1x1", "two pools need two GPUs"),
        ("h100-sxm:1x2", "2 GPUs do not hold it twice"),
    ):
        model = "qwen3-8b" if cluster.endswith("1x1") else "mixtral-8x7b"
        code, out, _ = moeplan(
            "plan", model, "--cluster", cluster, "--rate", "1", "--num-requests", "100", "--disaggregate"
        )
        assert code == 0 and out.startswith("Prefill and decode apart? No: ") and reason in out.splitlines()[0]
        assert "In two pools: no pair" in out


def test_plan_disaggregate_refuses_encoders_before_it_searches(moeplan: Any) -> None:
    code, _, err = moeplan(
        "plan",
        "google/switch-base-8",
        "--cluster",
        "h100-sxm:1x4",
        "--rate",
        "1",
        "--disaggregate",
        "--workload",
        "fixed:128/32",
    )
    assert code == 2 and "encoder-decoder" in err
