"""Ranks that die during a simulation: exact small cases, conservation, renewal theory, the command line."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost import StepCost
from planner.deployment import simulate_layout
from planner.engine import Limits, engine
from planner.enginespec import EngineSpec
from planner.errors import InputError, LayoutError
from planner.failures.choices import FailureChoices, RecoveryChoices
from planner.failures.settings import failure_settings, recovery_settings
from planner.hardware import parse_cluster
from planner.incidents import ElasticPlan, OutagePlan, Outages
from planner.layout import Layout
from planner.memory import Ledger
from planner.model import load
from planner.outages import elastic_plan, report
from planner.records import FINISHED, LOST
from planner.routers import ROUTERS
from planner.simulation import simulate
from planner.workload import Arrivals, Lengths, Workload


class ConstantTimer:
    draw, link_s = 0, 0.0

    def __init__(self, step_s=0.5):
        self.value = step_s

    def step_s(self, ranks):
        return self.value


def plan(*fixed, detect_s=2.0, rebuild_s=10.0, **more):
    known = {"mtbf_gpu_s": None, "gpus_per_replica": 4, "groups_per_replica": 1}
    return OutagePlan(fixed=fixed, detect_s=detect_s, rebuild_s=rebuild_s, **(known | more))


def burst(times, prompt=10, output=5):
    return Workload("burst", Lengths.fixed(prompt), Lengths.fixed(output), Arrivals.trace(times), len(times))


SPEC = EngineSpec(2, 1, 4096, max_batched_tokens=512)
CHAT = Workload("chat", Lengths.lognormal(200, 0.8), Lengths.lognormal(40, 0.8), Arrivals.poisson(6), 200)


def run(spec, workload, outages, timer=None, **more):
    return simulate(spec, timer or ConstantTimer(), workload, disturb=outages, **more)


def test_one_failure_by_hand():
    # Steps of 0.5 s: both requests are prefilled at 0.5 s; replica 0 dies at 1.2 s with two tokens out and is noticed
    # at 3.2 s, where replica 1 (free since 2.5 s) takes the request and needs 2.5 s for its five tokens.
    outages = Outages(plan((1.2, 0)))
    table = run(SPEC, burst([0.0, 0.0]), outages).requests
    np.testing.assert_allclose(table.finish_s, [5.7, 2.5])
    np.testing.assert_allclose(table.ttft_s, [3.7, 0.5])
    assert table.rank.tolist() == [1, 1]
    (incident,) = outages.incidents
    assert (incident.failed_s, incident.detected_s, incident.ready_s) == (1.2, 3.2, 13.2)
    assert (incident.num_requests, incident.lost_output_tokens, incident.recomputed_tokens) == (1, 2, 12)


def test_resume_keeps_the_tokens_that_were_sent():
    outages = Outages(plan((1.2, 0), on_failure="resume"))
    table = run(SPEC, burst([0.0, 0.0]), outages).requests
    # Two of five tokens are out: the prefill of prompt and tokens makes the third, two decode steps the rest.
    np.testing.assert_allclose(table.finish_s, [3.2 + 3 * 0.5, 2.5])
    np.testing.assert_allclose(table.first_token_s, [0.5, 0.5])
    assert outages.incidents[0].lost_output_tokens == 0
    assert outages.incidents[0].recomputed_tokens == 12


def test_drop_counts_a_request_as_lost_and_its_user_sends_the_next():
    workload = Workload("users", Lengths.fixed(10), Lengths.fixed(5), Arrivals.closed(2), 6)
    outages = Outages(plan((1.2, 0), on_failure="drop"))
    table = run(SPEC, workload, outages).requests
    assert (table.status == LOST).sum() == 1 == len(outages.dropped)
    assert (table.status == FINISHED).sum() == 5
    assert np.isnan(table.finish_s[table.status == LOST]).all()
    assert table.produced_tokens[table.status == LOST] == [2]


def test_the_only_replica_makes_requests_wait_for_the_rebuild():
    outages = Outages(plan((1.2, 0)))
    result = run(EngineSpec(1, 1, 4096), burst([0.0, 4.0]), outages)
    np.testing.assert_allclose(result.requests.finish_s, [13.2 + 2.5] * 2)
    told = report_of(outages, result)
    assert told.availability == pytest.approx(1 - 12 / result.simulated_s)
    assert told.downtime_s == pytest.approx(12.0)


def test_a_run_in_which_every_request_is_lost_is_told():
    outages = Outages(plan((0.1, 0), on_failure="drop"))
    told = report_of(outages, run(EngineSpec(1, 1, 4096), burst([0.0, 0.0]), outages))
    assert told.num_dropped == 2
    assert told.downtime_s == pytest.approx(2.0)
    assert told.availability == pytest.approx(0.1 / 2.1)
    assert np.isnan(told.during.ttft_mean_s)


def report_of(outages, result):
    return report(outages, None, result)


def test_router_keeps_sending_until_the_failure_is_noticed():
    outages = Outages(plan((0.1, 0)))
    table = run(SPEC, burst([0.2, 0.4, 3.0, 3.1]), outages, router="round_robin").requests
    # The first goes to the dead replica and is found there at 2.1 s; afterwards only replica 1 is asked.
    assert outages.incidents[0].num_requests == 1
    assert table.rank.tolist() == [1, 1, 1, 1]
    assert table.ttft_s[0] > 1.9


def test_every_stage_of_a_pipeline_stops():
    outages = Outages(plan((0.7, 0), groups_per_replica=2, on_failure="drop"))
    table = run(EngineSpec(4, 1, 4096), burst([0.0] * 4), outages).requests
    assert (table.status == LOST).tolist() == [True, True, False, False]


@pytest.mark.parametrize("router", sorted(ROUTERS))
@pytest.mark.parametrize("policy", ["mixed", "prefill_first"])
def test_outages_without_failures_change_no_byte(router, policy):
    spec = EngineSpec(2, 2, 4096, policy=policy)
    plain = simulate(spec, ConstantTimer(0.02), CHAT, router=router)
    watched = run(spec, CHAT, Outages(plan()), ConstantTimer(0.02), router=router)
    for table in ("requests", "steps"):
        one, other = getattr(plain, table), getattr(watched, table)
        assert all(
            getattr(one, n).tobytes() == getattr(other, n).tobytes()
            for n in one.__slots__
            if getattr(one, n) is not None
        )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.0, 40.0), st.integers(0, 2)), max_size=4),
    st.sampled_from(["retry", "resume", "drop"]),
    st.sampled_from(sorted(ROUTERS)),
    st.sampled_from([Arrivals.poisson(4), Arrivals.closed(9)]),
    st.sampled_from([1, 4]),
    st.floats(0.0, 5.0),
)
def test_every_request_is_served_once_or_counted_lost(fixed, fate, router, arrivals, interval, detect_s):
    workload = Workload("any", Lengths.lognormal(100, 0.8), Lengths.lognormal(20, 0.7), arrivals, 80)
    spec = EngineSpec(3, 2, 2000, max_batched_tokens=64, max_num_seqs=16, receive_interval=interval)
    outages = Outages(plan(*sorted(fixed), detect_s=detect_s, rebuild_s=7.0, on_failure=fate))
    table = run(spec, workload, outages, ConstantTimer(0.1), router=router).requests
    assert len(table) == 80
    lost = table.status == LOST
    assert ((table.status == FINISHED) | lost).all()
    assert set(np.flatnonzero(lost)) == outages.dropped
    np.testing.assert_array_equal(table.produced_tokens[~lost], table.output_tokens[~lost])
    assert (table.first_token_s[~lost] >= table.arrival_s[~lost]).all()
    assert (table.finish_s[~lost] >= table.first_token_s[~lost]).all()
    assert outages.run.in_flight == [0] * 6
    assert not outages._parked


def test_same_seed_same_bytes():
    outages = [Outages(plan(mtbf_gpu_s=100.0), seed=3) for _ in range(2)]
    runs = [run(SPEC, CHAT, o, ConstantTimer(0.05), seed=3) for o in outages]
    assert runs[0].requests.finish_s.tobytes() == runs[1].requests.finish_s.tobytes()
    assert [i.failed_s for i in outages[0].incidents] == [i.failed_s for i in outages[1].incidents]


def test_random_failures_reach_the_availability_of_renewal_theory():
    # One request every 100 s keeps the run going; 4 GPUs of 800 s each fail every 200 s and are away 12 s.
    workload = burst([100.0 * i for i in range(4000)], output=1)
    outages = Outages(plan(mtbf_gpu_s=800.0), seed=1)
    result = run(SPEC, workload, outages, ConstantTimer(0.1), record_steps=False)
    told = report_of(outages, result)
    cycles = len(outages.incidents)
    assert told.capacity_share == pytest.approx(200 / 212, abs=4 * 12 / 212 / np.sqrt(cycles))
    # Failures of a renewal process: T / (MTTF + MTTR) of them, with the variance of the exponential part.
    expected = 2 * result.simulated_s / 212
    assert cycles == pytest.approx(expected, abs=4 * np.sqrt(expected) * 200 / 212)
    # Replicas fail independently: both are away at the same time for the product of their shares.
    assert 1 - told.availability == pytest.approx((12 / 212) ** 2, rel=0.25)


ELASTIC = ElasticPlan(detect_s=1.0, pause_s=2.0, join_s=3.0, slowdown=(1.0, 1.5), reload_s=(0.0, 0.5))


def test_an_elastic_group_pauses_and_goes_on_with_fewer_ranks():
    spec = EngineSpec(1, 4, 4096)
    outages = Outages(plan((1.2, 0), rebuild_s=100.0, elastic=ELASTIC))
    result = run(spec, burst([0.0] * 4, output=5), outages)
    table = result.requests
    # Cut in the step that ends at 1.5 s; back at 1.2 + 1 + 2 + 0.5 s, where that step ends too and steps take 0.75 s.
    np.testing.assert_allclose(table.finish_s[1:], 4.7 + 2 * 0.75)
    # The dead rank's request starts anew on a survivor: five steps.
    np.testing.assert_allclose(table.finish_s[0], 4.7 + 5 * 0.75)
    (incident,) = outages.incidents
    assert incident.is_elastic
    assert (incident.num_requests, incident.lost_output_tokens) == (1, 2)
    assert incident.ready_s == pytest.approx(4.7)


def test_an_elastic_group_takes_the_rank_in_again():
    spec = EngineSpec(1, 4, 4096)
    outages = Outages(plan((1.2, 0), rebuild_s=10.0, elastic=ELASTIC))
    workload = burst([0.0, 30.0, 30.0, 30.0, 30.0])
    result = run(spec, workload, outages)
    assert sorted(result.requests.rank[1:].tolist()) == [0, 1, 2, 3]
    assert result.requests.ttft_s[-1] == pytest.approx(0.5)
    log = [(round(t, 6), share) for t, _, share in outages.capacity]
    assert log == [(1.2, 0.0), (4.7, 0.75), (14.7, 0.0), (17.7, 1.0)]


def test_more_dead_ranks_than_an_elastic_group_tolerates_stop_it():
    outages = Outages(plan((1.2, 0), (20.0, 0), rebuild_s=100.0, elastic=ELASTIC))
    run(EngineSpec(1, 4, 4096), burst([0.0, 19.0, 21.0]), outages)
    assert [incident.is_elastic for incident in outages.incidents] == [True, False]
    # The rebuilt group is whole: the rank that waited to join has nothing to do.
    assert outages.capacity[-1][2] == 1.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.0, 40.0), max_size=4), st.sampled_from(["retry", "resume", "drop"]), st.floats(0.5, 30.0))
def test_elastic_groups_lose_no_request_either(times, fate, rebuild_s):
    spec = EngineSpec(2, 4, 2000, max_batched_tokens=64, max_num_seqs=16)
    fixed = tuple((time_s, i % 2) for i, time_s in enumerate(sorted(times)))
    outages = Outages(plan(*fixed, rebuild_s=rebuild_s, on_failure=fate, elastic=ELASTIC))
    table = run(spec, CHAT.with_num_requests(60), outages, ConstantTimer(0.1)).requests
    lost = table.status == LOST
    assert set(np.flatnonzero(lost)) == outages.dropped
    np.testing.assert_array_equal(table.produced_tokens[~lost], table.output_tokens[~lost])
    assert outages.run.in_flight == [0] * 8


def test_failure_after_the_last_answer_is_counted_as_ignored():
    outages = Outages(plan((1e6, 0)))
    result = run(SPEC, burst([0.0]), outages)
    assert (outages.num_ignored, outages.incidents) == (1, [])
    assert result.simulated_s == 2.5


# --- deployments and the command line ---


def deepseek_run(layout, chosen, name="sglang"):
    model, cluster = load("deepseek-ai/DeepSeek-V3"), parse_cluster("h200-sxm:2x8")
    profile = engine(name)
    workload = Workload("chat", Lengths.fixed(500), Lengths.fixed(50), Arrivals.poisson(8), 200)
    return simulate_layout(
        model,
        cluster,
        layout,
        workload,
        profile,
        limits=Limits(64, 2048),
        backend="allgather_reducescatter",
        failures=failure_settings(profile, chosen),
    )


def test_elastic_deployment_slows_down_and_loses_little():
    layout = Layout(attention_dp=16, ep=16, redundant_experts=64)
    told = deepseek_run(layout, FailureChoices(fail_at=("5s",), elastic=True)).failures
    elastic = told.plan.elastic
    assert elastic.tolerated == 16 * 64 // (256 + 64)
    assert elastic.slowdown[0] == 1.0
    # The experts of a survivor grow by R / (R - f), and they are part of the step only.
    assert all(1 < s < 16 / (16 - f) for f, s in enumerate(elastic.slowdown) if f)
    assert elastic.reload_s[0] == 0.0 < elastic.reload_s[1] < elastic.reload_s[2]
    assert told.incidents[0].ready_s == pytest.approx(5 + 2 + 6.8 + elastic.reload_s[1])
    whole = deepseek_run(layout, FailureChoices(fail_at=("5s",), detect="2s")).failures
    assert told.downtime_s < whole.downtime_s
    assert told.recomputed_tokens < whole.recomputed_tokens


@pytest.mark.parametrize(
    ("layout", "name", "error", "words"),
    [
        (Layout(tp=16, ep=16), "sglang", LayoutError, "not one rank per GPU"),
        (Layout(attention_dp=16, ep=16), "sglang", LayoutError, "redundant_experts=32"),
        (Layout(attention_dp=16, ep=16, redundant_experts=64), "trtllm", InputError, "cannot go on"),
    ],
)
def test_elastic_says_what_it_needs(layout, name, error, words):
    if name == "sglang" and layout.tp == 16:
        layout = Layout(tp=8, ep=8)
    with pytest.raises(error, match=words):
        deepseek_run(layout, FailureChoices(fail_at=("5s",), elastic=True), name)


def test_throughput_of_the_survivors_is_within_the_published_range():
    """LMSYS blog 2026-03-25: DeepSeek-V3.2 on 32 GPUs with 256 redundant experts after 1, 2, 4, 8 and 16 dead ranks.

    The load is not stated: it must lie between the model's answers for 512 and 4,096 sequences in all.
    """
    published = np.array([5552.41, 5431.50, 5265.12, 4479.84, 2825.44])
    model, cluster, profile = load("deepseek-ai/DeepSeek-V3"), parse_cluster("h100-sxm:4x8"), engine("sglang")
    layout = Layout(attention_dp=32, ep=32, redundant_experts=256)
    cost = StepCost(model, layout, cluster, profile, "deepep")
    memory = Ledger(model, cluster.system, profile).use(layout, Limits(64, 2048), "deepep", 2048)
    elastic = elastic_plan(cost, memory, recovery_settings(profile, RecoveryChoices()))
    dead = np.array([1, 2, 4, 8, 16])
    slow = np.array(elastic.slowdown)[dead]

    def relative(sequences):
        per_rank = sequences / (32 - dead)
        rate = 1 / (cost.decode(per_rank, np.full(5, 2048.0)).total_s * slow)
        return rate / rate[0]

    few, many = relative(512), relative(4096)
    assert (published / published[0] <= few + 0.02).all()
    assert (published / published[0] >= many - 0.02).all()
    assert (few - many)[-1] < 0.2


MIXTRAL = ("simulate", "mixtral-8x7b-v0.1", "--cluster", "h100-sxm:1x8", "--num-requests", "60", "--rate", "4")
TWO = ("--layout", "tp=4,replicas=2")


def test_command_shows_incidents(moeplan):
    code, out, _ = moeplan(*MIXTRAL, *TWO, "--fail-at", "5s,1", "--detect", "2s", "--load-from", "20GB/s")
    assert code == 0
    assert "1, each stops 4 GPUs" in out
    assert "Rebuild of a replica" in out
    code, out, _ = moeplan(*MIXTRAL, *TWO, "--fail-at", "5s,1", "--detect", "2s", "--json")
    facts = json.loads(out)["failures"]
    assert facts["incidents"][0]["detected_s"] == 7.0
    assert sum(t["seconds"] for t in facts["rebuild"]["terms"]) == pytest.approx(facts["rebuild"]["total_s"])
    assert all(t["source"] for t in facts["rebuild"]["terms"])
    assert facts["num_retried"] == facts["incidents"][0]["num_requests"] > 0


def test_lost_requests_break_the_slo(moeplan):
    drop = ("--fail-at", "5s", "--detect", "1s", "--on-failure", "drop", "--slo", "tpot_p95=10s", "--json")
    facts = json.loads(moeplan(*MIXTRAL, *TWO, *drop)[1])
    assert facts["failures"]["num_dropped"] > 0
    assert (facts["meets_slo"], facts["worst_objective"]) == (False, "requests lost with a replica")
    assert facts["num_measured"] == 60


def test_command_without_failures_says_nothing_about_them(moeplan):
    _, out, _ = moeplan(*MIXTRAL, *TWO, "--json")
    assert "failures" not in json.loads(out)


def test_command_warns_about_one_replica_and_short_runs(moeplan):
    _, out, _ = moeplan(*MIXTRAL, "--layout", "tp=4", "--fail-at", "5s", "--detect", "1s")
    assert "there is one replica" in out
    _, out, _ = moeplan(*MIXTRAL, *TWO, "--mtbf-gpu", "50000h")
    assert "the run is short" in out
    assert "none happened" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--fail-at", "60"), "give a time with its unit"),
        (("--fail-at=-5s",), "give a time with its unit"),
        (("--fail-at", "5s,2"), "replicas 0 to 1"),
        (("--fail-at", "5s,x"), "'x' is no replica"),
        (("--mtbf-gpu", "0h"), "above 0"),
        (("--detect", "2s"), "--detect is used only when ranks fail"),
        (("--elastic",), "--elastic is used only when ranks fail"),
        (("--fail-at", "5s", "--load-from", "floppy"), "use nvme, dram, network, peer"),
        (("--fail-at", "5s", "--load-from", "0GB/s"), "rate above 0"),
        (("--fail-at", "5s", "--elastic"), "not one rank per GPU"),
        (("--fail-at", "5s", "--placement", "eplb", "--rebalance-steps", "50"), "not simulated together"),
    ],
)
def test_bad_input(moeplan, options, words):
    code, _, err = moeplan(*MIXTRAL, *TWO, *options)
    assert code == 2
    assert words in err
