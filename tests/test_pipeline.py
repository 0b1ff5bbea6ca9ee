"""Pipeline stages against flow-shop theory: pace of the longest stage, bubbles, convoys, the split of a model."""

from dataclasses import replace

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cost import StepCost
from planner.engine import engine
from planner.enginespec import EngineSpec
from planner.hardware import parse_cluster
from planner.incidents import OutagePlan, Outages
from planner.layout import Layout
from planner.model import load
from planner.pipeline import StageSplit, pipelines, stage_layers, stage_seconds, stage_split, unevenness
from planner.scheduler import Rank, RankWork
from planner.simulation import simulate
from planner.steady import steady_state
from planner.workload import Arrivals, Lengths, Workload, load_workload


class ConstantTimer:
    draw, link_s = 0, 0.0

    def __init__(self, step_s=1.2):
        self.value = step_s

    def step_s(self, ranks):
        return self.value


def split(*shares):
    return StageSplit((shares,) * 15, (shares,) * 15)


def busy_rank(seqs=1):
    rank = Rank(EngineSpec(1, 1, 1000))
    rank.work = RankWork(decode_seqs=seqs)
    return [rank]


def decode_pace_s(shares, users, output=300):
    """Mean gap between the tokens of one user when `users` slots decode one request each, steps of 1.2 s."""
    workload = Workload("users", Lengths.fixed(1), Lengths.fixed(output), Arrivals.closed(users), users)
    spec = EngineSpec(len(shares), 1, 4096)
    run = simulate(spec, ConstantTimer(), workload, router="round_robin", split=split(*shares))
    return run.requests.tpot_s


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_full_even_pipeline_makes_a_batch_per_stage_time(stages):
    # p batches in flight, each through p stages of T / p: a token of each every T, p tokens per T in all.
    np.testing.assert_allclose(decode_pace_s([1 / stages] * stages, stages), 1.2)


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.2, 0.3, 0.5), (0.1, 0.6, 0.3)])
def test_the_longest_stage_sets_the_pace_of_a_full_pipeline(shares):
    np.testing.assert_allclose(decode_pace_s(shares, 3), 3 * max(shares) * 1.2, rtol=0.01)


@pytest.mark.parametrize(("users", "pace"), [(1, 1.0), (2, 1.0), (3, 1.5)])
def test_fewer_batches_than_stages_leave_bubbles(users, pace):
    # Cycle of a batches: max(sum of the stages, a x longest stage), in units of the whole pass.
    np.testing.assert_allclose(decode_pace_s((0.5, 0.3, 0.2), users), pace * 1.2, rtol=0.01)


@pytest.mark.parametrize(("chunks", "stages"), [(1, 4), (4, 4), (9, 2), (16, 8)])
def test_prefill_bubble(chunks, stages):
    # m chunks of one prompt take m + p - 1 stage times: a bubble of (p - 1) / (m + p - 1), handbook serving 6.8.
    workload = Workload("one", Lengths.fixed(64 * chunks), Lengths.fixed(1), Arrivals.closed(1), 1)
    spec = EngineSpec(stages, 1, 4096, max_batched_tokens=64, max_num_seqs=8)
    run = simulate(spec, ConstantTimer(), workload, split=split(*[1 / stages] * stages))
    assert run.requests.ttft_s[0] == pytest.approx((chunks + stages - 1) * 1.2 / stages)


def test_a_long_batch_holds_up_the_short_one():
    # Two stages, batches of 2 and 1: both need the stage the long one is in, so each cycle takes 2.
    line = pipelines(split(0.5, 0.5), 2)[0]
    now = [0.0, 0.0]
    for _ in range(20):
        slot = int(np.argmin(now))
        now[slot] += line.pass_s(now[slot], (2.0, 1.0)[slot], busy_rank())
    start = list(now)
    for _ in range(20):
        slot = int(np.argmin(now))
        now[slot] += line.pass_s(now[slot], (2.0, 1.0)[slot], busy_rank())
    assert (max(now) - max(start)) / 10 == pytest.approx(2.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5),
    st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(0.1, 5.0)), min_size=1, max_size=20),
)
def test_stages_are_servers_in_a_row(weights, batches):
    """Same departures as SimPy resources of capacity 1 that batches pass one after the other."""
    shares = tuple(w / sum(weights) for w in weights)
    arrivals = np.cumsum([gap for gap, _ in batches])
    line = pipelines(split(*shares), len(shares))[0]
    found = [
        t + line.pass_s(t, seconds, busy_rank()) for t, (_, seconds) in zip(arrivals.tolist(), batches, strict=True)
    ]
    env, expected = simpy.Environment(), []
    servers = [simpy.Resource(env) for _ in shares]

    def batch(at_s, seconds):
        yield env.timeout(at_s)
        for server, share in zip(servers, shares, strict=True):
            with server.request() as turn:
                yield turn
                yield env.timeout(share * seconds)
        expected.append(env.now)

    for at_s, (_, seconds) in zip(arrivals.tolist(), batches, strict=True):
        env.process(batch(at_s, seconds))
    env.run()
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_replicas_have_pipelines_of_their_own():
    lines = pipelines(split(0.5, 0.5), 6)
    assert [lines.index(line) for line in lines] == [0, 0, 2, 2, 4, 4]
    assert pipelines(None, 6) == []


def deepseek(pp, tp=8):
    return StepCost(
        load("deepseek-v3"), Layout(tp=tp, ep=tp, pp=pp), parse_cluster("h200-sxm:4x8"), engine("vllm"), "all_reduce"
    )


def test_split_follows_dense_layers_and_head():
    cost = deepseek(4)
    model = cost.model
    assert [len(stage) for stage in stage_layers(model.layers, 4)] == [16, 15, 15, 15]
    seconds = stage_seconds(cost, "decode")
    # 3 of the first 16 layers are dense and cheap: the first stage is the shortest although it has a layer more.
    assert (seconds[3:9, 0] < seconds[3:9, 1]).all()
    np.testing.assert_allclose(seconds[:, 1], seconds[:, 2])
    assert (seconds[:, 3] > seconds[:, 2]).all()
    shares = stage_split(cost)
    for row in (*shares.decode, *shares.prefill):
        assert sum(row) == pytest.approx(1.0)
    assert shares.shares([RankWork(decode_seqs=64)]) == shares.decode[6]
    assert shares.shares([RankWork(prefill_tokens=300, num_prefills=1, decode_seqs=5)]) == shares.prefill[8]


def test_stages_add_up_to_the_step():
    cost = deepseek(2)
    sizes = 2.0 ** np.arange(15)
    step = cost.decode(sizes, np.full_like(sizes, 2048.0))
    whole = step.total_s - step.terms["pipeline_hops"]
    np.testing.assert_allclose(stage_seconds(cost, "decode").sum(axis=1), whole, rtol=0.02)


def test_alike_layers_in_equal_number_differ_by_the_head_only():
    cost = StepCost(
        load("mixtral-8x7b"), Layout(tp=2, pp=4, moe_tp=2), parse_cluster("h100-sxm:1x8"), engine("vllm"), "all_reduce"
    )
    seconds = stage_seconds(cost, "decode")
    np.testing.assert_allclose(seconds[:, 0], seconds[:, 1])
    np.testing.assert_allclose(seconds[:, 0], seconds[:, 2])
    batch = np.array([1.0, 64.0])
    assert (unevenness(cost, batch) > 1.0).all()
    assert (unevenness(replace_pp(cost), batch) == 1.0).all()


def replace_pp(cost):
    return StepCost(cost.model, replace(cost.layout, pp=1), cost.cluster, cost.engine, cost.backend)


def test_estimate_knows_the_longest_stage():
    workload = load_workload("fixed:64/1000", concurrency=64, num_requests=64)
    cost = deepseek(4)
    estimate = steady_state(cost, 8192, "mixed", workload)
    batch = np.array(16.0)
    decode_s = cost.decode(np.array([16.0]), np.array([64 + 500.0])).total_s
    assert float(estimate.tpot_at(batch)) > float(decode_s[0] * unevenness(cost, np.array([16.0]))[0])


def test_a_rebuilt_replica_starts_with_an_empty_pipeline():
    workload = Workload("two", Lengths.fixed(8), Lengths.fixed(1), Arrivals.trace([0.0, 0.0]), 2)
    plan = OutagePlan(
        fixed=((0.1, 0),), mtbf_gpu_s=None, gpus_per_replica=2, groups_per_replica=2, detect_s=0.1, rebuild_s=0.1
    )
    run = simulate(EngineSpec(2, 1, 4096), ConstantTimer(), workload, split=split(0.5, 0.5), disturb=Outages(plan))
    np.testing.assert_allclose(run.requests.finish_s, [0.3 + 1.2, 0.3 + 1.8])
