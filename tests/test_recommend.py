"""The main flow on small questions: what it must count, choose and admit."""

from __future__ import annotations

import pytest

from planner.deployment import Run, deploy, run, scaled, simulate_layout
from planner.engine import Engine, Limits, engine
from planner.enumeration import MAX_SEQS, layouts
from planner.errors import DoesNotFit, LayoutError, WorkloadError
from planner.facts.plan import plan_facts
from planner.hardware import Cluster, parse_cluster
from planner.layout import Layout, layout_problem
from planner.model import ModelConfig, load
from planner.recommend import Recommendation, recommend
from planner.search import Search
from planner.steady import steady_state
from planner.text import plan_text
from planner.workload import load_workload, parse_slo

SLO = parse_slo("ttft_p95=2s,tpot_p95=50ms")


@pytest.fixture(scope="module")
def answer(mixtral: ModelConfig, vllm: Engine) -> Recommendation:
    demand = load_workload("uniform:819-1024/100-128", rate=4, num_requests=200)
    return recommend(mixtral, [parse_cluster("h100-sxm:1x8")], demand, SLO, vllm)


def test_layouts_are_valid_distinct_and_within_the_cluster(deepseek: ModelConfig, h200: Cluster) -> None:
    for name in ("vllm", "trtllm"):
        found = list(layouts(deepseek, h200, engine(name)))
        assert len(found) == len(set(found))
        assert all(layout_problem(deepseek, x) is None and x.num_gpus <= 16 and x.tp <= 8 for x in found)
        assert {x.family for x in found} == {"TP", "TEP", "DEP", "DTP"}
    assert all(x.ep in (1, x.stage_gpus) for x in layouts(deepseek, h200, engine("vllm")))
    assert any(1 < x.ep < x.stage_gpus for x in layouts(deepseek, h200, engine("trtllm")))


def test_every_candidate_is_counted_once(answer: Recommendation) -> None:
    _, found = answer.searches[0]
    assert found.considered == sum(found.rejected.values()) + sum(r.meets_slo for r in answer.runs)
    assert found.considered > 1000
    assert set(found.nearest_miss) == set(found.rejected)


@pytest.mark.parametrize(
    ("cluster", "rate", "slo"),
    [
        ("a100-80-sxm:1x4", 2.0, "ttft_p95=1s,tpot_p95=12ms"),
        ("h100-sxm:1x2", 200.0, "tpot_p95=50ms"),
        ("l40s:1x2", 1.0, "tpot_p95=50ms"),
    ],
)
def test_counts_add_up_when_several_reasons_apply(
    cluster: str, rate: float, slo: str, mixtral: ModelConfig, vllm: Engine
) -> None:
    demand = load_workload("fixed:1024/128", rate=rate, num_requests=60)
    asked = recommend(mixtral, [parse_cluster(cluster)], demand, parse_slo(slo), vllm)
    _, found = asked.searches[0]
    assert found.considered == sum(found.rejected.values()) + sum(r.meets_slo for r in asked.runs)
    assert set(found.rejected) == set(found.nearest_miss)


def test_what_lacks_capacity_is_told_how_much(mixtral: ModelConfig, vllm: Engine) -> None:
    demand = load_workload("fixed:1024/128", rate=500, num_requests=60)
    asked = recommend(mixtral, [parse_cluster("h100-sxm:1x4")], demand, SLO, vllm)
    assert asked.feasible and not asked.meets_slo
    assert any("requests/s" in r for r in asked.remedies) and any("GPUs of h100-sxm" in r for r in asked.remedies)
    assert not any("hold it" in r for r in asked.remedies)


def test_one_token_answers_have_no_tpot_to_miss(mixtral: ModelConfig, vllm: Engine) -> None:
    demand = load_workload("fixed:512/1", rate=2, num_requests=60)
    assert recommend(mixtral, [parse_cluster("h100-sxm:1x4")], demand, SLO, vllm).meets_slo


def test_prompts_beyond_the_context_are_refused(mixtral: ModelConfig, vllm: Engine) -> None:
    demand = load_workload("fixed:1000000/10", rate=1, num_requests=10)
    with pytest.raises(WorkloadError, match="exceed the 32,768 that"):
        recommend(mixtral, [parse_cluster("h100-sxm:1x8")], demand, SLO, vllm)


def test_winner_is_the_cheapest_that_meets_and_the_count_is_the_smallest(answer: Recommendation) -> None:
    assert answer.meets_slo and answer.winner
    meeting = [r for r in answer.runs if r.meets_slo]
    assert answer.winner.num_gpus == min(r.num_gpus for r in meeting)
    _, found = answer.searches[0]
    for count in {c.num_gpus for c in found.survivors if c.num_gpus < answer.winner.num_gpus}:
        tried = [r for r in answer.runs if r.num_gpus == count]
        assert tried and not any(r.meets_slo for r in tried)


def test_winner_meets_every_objective_it_is_said_to_meet(answer: Recommendation) -> None:
    assert answer.winner
    summary = answer.winner.summary
    assert summary.ttft_s.p95 <= 2.0 and summary.tpot_s.p95 <= 0.05
    assert answer.winner.worst_ratio == pytest.approx(max(summary.ttft_s.p95 / 2.0, summary.tpot_s.p95 / 0.05))
    assert answer.sustained_factor >= 1.0


def test_price_is_rent_over_tokens_served(answer: Recommendation) -> None:
    assert answer.winner and answer.winner.usd_per_mtok_output
    rent = answer.winner.deployment.usd_per_hour
    assert rent
    assert answer.winner.usd_per_mtok_output == pytest.approx(rent / 3600 / answer.winner.output_tok_per_s * 1e6)


def test_facts_and_text_agree(answer: Recommendation) -> None:
    facts = plan_facts(answer, "moeplan plan")
    assert sum(facts["origin_share"].values()) == pytest.approx(1.0)
    assert sum(facts["memory"]["terms"].values()) == pytest.approx(facts["memory"]["capacity_bytes"])
    assert facts["considered"] == answer.considered
    text = plan_text(facts)
    first = text.splitlines()[0]
    assert facts["layout"]["name"] in first and "meets the SLO" in first and "/Mtok" in first
    for word in ("Binding", "Best layouts", "Why the others lost", "Memory per GPU", "How sure", "Next"):
        assert word in text


def test_same_question_same_facts(answer: Recommendation, mixtral: ModelConfig, vllm: Engine) -> None:
    again = recommend(mixtral, list(answer.clusters), answer.workload, SLO, vllm)
    assert plan_facts(again, "x") == plan_facts(answer, "x")


def test_what_cannot_fit_lists_remedies_by_price(deepseek: ModelConfig, vllm: Engine) -> None:
    demand = load_workload("fixed:512/64", rate=20, num_requests=50)
    refused = recommend(deepseek, [parse_cluster("h100-sxm:1x8")], demand, SLO, vllm)
    assert not refused.feasible and not refused.meets_slo and refused.winner is None
    assert any("16 GPUs of h100-sxm" in r for r in refused.remedies)
    prices = [float(r.rsplit("$", 1)[1].removesuffix("/h").replace(",", "")) for r in refused.remedies if "$" in r]
    assert prices == sorted(prices) and prices
    facts = plan_facts(refused, "x")
    assert facts["layout"] is None and "does not fit" in facts["headline"] and facts["next"]


def test_an_impossible_slo_fits_but_misses(mixtral: ModelConfig, vllm: Engine) -> None:
    demand = load_workload("fixed:512/64", rate=1, num_requests=50)
    refused = recommend(mixtral, [parse_cluster("h100-sxm:1x2")], demand, parse_slo("tpot_p95=100us"), vllm)
    assert refused.feasible and not refused.meets_slo
    assert any("TPOT" in reason for _, s in refused.searches for reason in s.rejected)


def test_closed_loop_plans_serve_all_users(mixtral: ModelConfig, vllm: Engine) -> None:
    demand = load_workload("fixed:512/128", concurrency=64, num_requests=200)
    chosen = recommend(mixtral, [parse_cluster("h200-sxm:1x4")], demand, SLO, vllm)
    assert chosen.meets_slo and chosen.winner
    assert chosen.winner.summary.mean_decode_seqs_per_rank * chosen.winner.deployment.layout.attention_dp <= 64


def test_two_clusters_compete_on_price(mixtral: ModelConfig, vllm: Engine) -> None:
    demand = load_workload("fixed:512/64", rate=2, num_requests=100)
    offered = [parse_cluster("h100-sxm:1x4"), parse_cluster("b200-sxm:1x2")]
    chosen = recommend(mixtral, offered, demand, SLO, vllm)
    assert chosen.winner
    costs = [r.deployment.usd_per_hour for r in chosen.runs if r.meets_slo]
    assert chosen.winner.deployment.usd_per_hour == min(c for c in costs if c is not None)
    assert {r.deployment.cluster.system.name for r in chosen.runs} == {"h100-sxm", "b200-sxm"}


def test_deploy_refuses_what_cannot_run(deepseek: ModelConfig, mixtral: ModelConfig, vllm: Engine) -> None:
    args = (vllm, Limits(256, 8192), "allgather_reducescatter", 1024)
    with pytest.raises(
        DoesNotFit, match="does not fit h100-sxm:1x8: .* may use 78.1 GB of 84.9 GB per GPU; experts breaks it"
    ):
        deploy(deepseek, parse_cluster("h100-sxm:1x8"), Layout(tp=8, ep=8), *args)
    with pytest.raises(LayoutError, match="needs 16 GPUs, h100-sxm:1x8 has 8"):
        deploy(mixtral, parse_cluster("h100-sxm:1x8"), Layout(tp=8, ep=8, replicas=2), *args)
    with pytest.raises(LayoutError, match="scale-up domain of 8"):
        deploy(load("llama-2-70b"), parse_cluster("h100-sxm:2x8"), Layout(tp=16, moe_tp=16), *args)


def test_analytic_and_simulated_agree_without_queueing(mixtral: ModelConfig, h200: Cluster, vllm: Engine) -> None:
    demand = load_workload("fixed:1024/256", concurrency=16, num_requests=200)
    result: Run = simulate_layout(
        mixtral, h200, Layout(tp=4, moe_tp=4), demand, vllm, limits=Limits(256, 8192), backend="allgather_reducescatter"
    )
    steady = steady_state(result.deployment.cost(), 8192, vllm.policy, demand)
    assert result.summary.tpot_s.mean == pytest.approx(float(steady.tpot_at(16.0)), rel=0.1)


def test_replicas_share_the_load_evenly(mixtral: ModelConfig, h200: Cluster, vllm: Engine) -> None:
    demand = load_workload("fixed:512/128", rate=8, num_requests=300)
    deployment = deploy(
        mixtral, h200, Layout(tp=2, moe_tp=2, replicas=4), vllm, Limits(256, 8192), "allgather_reducescatter", 600
    )
    all_four, two = run(deployment, demand, max_replicas=4), run(deployment, demand, max_replicas=2)
    assert two.output_tok_per_s == pytest.approx(all_four.output_tok_per_s, rel=0.1)
    assert two.summary.tpot_s.mean == pytest.approx(all_four.summary.tpot_s.mean, rel=0.1)
    assert scaled(demand, 0.5).arrivals.rate_per_s == 4


def test_search_space_has_every_limit(mixtral: ModelConfig, vllm: Engine) -> None:
    search = Search(parse_cluster("h100-sxm:1x8"), vllm, load_workload("fixed:128/16", rate=1, num_requests=10), SLO)
    found = search.run([mixtral])
    assert {c.deployment.limits.max_num_seqs for c in found.survivors} == set(MAX_SEQS)
