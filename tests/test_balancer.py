"""The engine's own balancer between attention-DP ranks: the score, its stale statistics, and herding."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from planner import balancer
from planner.balancer import RANK_ROUTERS, Balancer, VllmScore
from planner.enginespec import EngineSpec
from planner.errors import InputError
from planner.scheduler import Rank, Request
from planner.simulation import simulate
from planner.workload import Arrivals, Lengths, Workload


def ranks_with(loads):
    """Stand-ins with (waiting, running, KV usage)."""
    return [
        SimpleNamespace(waiting=[0] * w, running=[0] * r, free_blocks=round(100 * (1 - usage)), total_blocks=100)
        for w, r, usage in loads
    ]


def scores(loads, num_clients=1):
    return VllmScore(ranks_with(loads), np.random.default_rng(0), num_clients)


def test_the_least_loaded_rank_is_chosen():
    assert scores([(0, 5, 0.2), (0, 3, 0.2), (0, 4, 0.2)]).choose(0, 0.0) == 1


def test_queues_count_six_times_the_usage_above_a_half():
    # 2 waiting at 90 % usage: 2 + 4 + 2 x 6 x 0.4 = 10.8; the same queue at 50 % costs nothing.
    assert scores([(2, 4, 0.9), (0, 10, 0.9)]).choose(0, 0.0) == 1
    assert scores([(2, 4, 0.5), (0, 10, 0.5)]).choose(0, 0.0) == 0
    assert scores([(2, 4, 0.9), (0, 11, 0.9)]).choose(0, 0.0) == 0


def test_ties_go_round():
    score = scores([(0, 0, 0.0)] * 4)
    assert [score.choose(i, 0.0) for i in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_own_requests_count_at_once_and_statistics_after_100_ms():
    ranks = ranks_with([(0, 0, 0.0), (0, 0, 0.0)])
    score = VllmScore(ranks, np.random.default_rng(0), 1)
    assert score.choose(0, 0.0) == 0
    ranks[1].running = [0] * 5  # others loaded rank 1, which the statistics do not say yet
    assert score.choose(1, 0.05) == 1
    assert [score.choose(i, 0.1) for i in range(2, 6)] == [0, 0, 0, 0]


def test_answers_make_room():
    score = scores([(0, 0, 0.0)] * 2)
    assert [score.choose(i, 0.0) for i in range(2)] == [0, 1]
    score.finished(1)
    assert score._in_flight == [[1, 0]]


class FirstClient:
    """A generator that sends every request to the first front end."""

    def integers(self, high, size):
        return np.zeros(size, dtype=int)


def test_a_front_end_takes_what_it_sent_times_their_number():
    score = VllmScore(ranks_with([(0, 0, 0.0), (0, 1, 0.0)]), FirstClient(), 2)
    # Each request counts for two: 0 has 2 of load, then 1 has 3.
    assert [score.choose(i, 0.0) for i in range(3)] == [0, 1, 0]
    # New statistics do not know them yet, the front end does: 2 x 2 against 2 x 1.
    assert score.choose(3, 0.2) == 1


def test_answers_stay_in_the_load_until_the_next_statistics():
    score = VllmScore(ranks_with([(0, 0, 0.0), (0, 1, 0.0)]), FirstClient(), 2)
    assert score.choose(0, 0.0) == 0
    score.finished(0)
    assert score.choose(1, 0.05) == 1
    assert score.choose(2, 0.2) == 0


class Steps:
    """20 ms and the time of the fullest rank; keeps how uneven the ranks were."""

    draw, link_s = 0, 0.0

    def __init__(self):
        self.uneven = []

    def step_s(self, ranks):
        loads = [w.decode_seqs + w.prefill_tokens / 100 for w in ranks]
        if sum(loads) > 100:
            self.uneven.append(max(loads) / (sum(loads) / len(loads)))
        return 0.02 + 2e-4 * max(loads)


def unevenness(router):
    timer = Steps()
    workload = Workload("w", Lengths.lognormal(200, 0.5), Lengths.lognormal(200, 0.5), Arrivals.poisson(80), 3000)
    simulate(EngineSpec(1, 16, 10**6, rank_router=router), timer, workload, seed=3)
    return float(np.mean(timer.uneven))


def test_stale_statistics_of_many_front_ends_herd(monkeypatch):
    excess = {"none": unevenness("least_requests") - 1, "100 ms": unevenness("vllm_score") - 1}
    for name, clients, age_s in (("2 s", None, 2.0), ("2 s, one front end", 1, 2.0)):
        monkeypatch.setattr(balancer, "VllmScore", partial(VllmScore, num_clients=clients, statistics_s=age_s))
        excess[name] = unevenness("vllm_score") - 1
    assert excess["100 ms"] > 1.4 * excess["none"]
    assert excess["2 s"] > 1.4 * excess["100 ms"]  # the older, the more they herd
    assert excess["2 s, one front end"] < 0.9 * excess["2 s"]  # alone it knows at least what it sent


def test_replicas_are_balanced_by_requests_outside_and_by_the_engine_inside():
    spec = EngineSpec(2, 3, 1000, rank_router="round_robin")
    groups = [[Rank(spec) for _ in range(3)] for _ in range(2)]
    chooser, in_flight = Balancer(spec, "least_requests", groups, 0), [0] * 6
    chosen = []
    for index in range(8):
        chosen.append(chooser.choose(in_flight, index, 0.0))
        in_flight[chosen[-1]] += 1
        if index == 5:
            in_flight[3] = in_flight[4] = 0
    assert chosen == [0, 3, 1, 4, 2, 5, 3, 4]


@pytest.mark.parametrize("router", RANK_ROUTERS)
def test_every_router_serves_all_and_repeats_itself(router):
    workload = Workload("w", Lengths.lognormal(100, 0.5), Lengths.lognormal(30, 0.5), Arrivals.closed(30), 300)
    spec = EngineSpec(2, 4, 4096, rank_router=router)
    runs = [simulate(spec, Steps(), workload, seed=5) for _ in range(2)]
    assert (runs[0].requests.status == 1).all()
    assert len(np.unique(runs[0].requests.rank)) == 8
    assert runs[0].requests.finish_s.tobytes() == runs[1].requests.finish_s.tobytes()


def test_an_unknown_router_is_refused():
    spec = EngineSpec(1, 2, 1000, rank_router="vlm_score")
    with pytest.raises(InputError, match="did you mean vllm_score"):
        Balancer(spec, "least_requests", [[Rank(spec)] * 2], 0)


def test_a_request_larger_than_a_slot_is_refused():
    rank = Rank(EngineSpec(1, 1, 4000, block_tokens=1000, max_num_seqs=4, max_request_tokens=1000))
    assert rank.can_ever_hold(Request(0, 900, 101, 0.0))
    assert not rank.can_ever_hold(Request(0, 900, 102, 0.0))
