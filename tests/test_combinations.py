"""Features that meet in one run: engine policy, prefix cache, drafts, pipelines, failures, routers, two pools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.disaggregation.deployment import check_combination
from planner.engine import TokenRatio, engine
from planner.enginespec import POLICIES, EngineSpec
from planner.errors import InputError
from planner.frontend import FrontEnd
from planner.incidents import OutagePlan, Outages
from planner.overlap import parse_overlap
from planner.pipeline import StageSplit
from planner.records import FINISHED
from planner.retraction import RetractingRank
from planner.simulation import simulate
from planner.speculativerank import SpeculativeRank
from planner.tactics import Tactics
from planner.workload import Arrivals, Lengths, SharedPrefix, Turns, Workload, load_workload

SGLANG = TokenRatio(0.7, 0.14, 600, 4096, 20)
SPLIT = StageSplit(((0.4, 0.6),) * 15, ((0.5, 0.5),) * 15)


class BookTimer:
    """Steps of a constant time; at each of them the books of every rank of the run are looked at."""

    draw, link_s = 0, 0.0

    def __init__(self) -> None:
        self.run: Any = None
        self.most_cached = 0

    def __call__(self, run: Any) -> None:
        self.run = run

    def step_s(self, ranks: Any) -> float:
        for group in self.run.groups:
            for rank in group.ranks:
                assert 0 <= rank.free_blocks <= rank.total_blocks
                assert rank.final_blocks >= 0
                if rank.cache is not None:
                    self.most_cached = max(self.most_cached, rank.cache.cached)
        return 0.05


def sharing(prefix: bool, turns: bool, closed: bool, num: int = 60) -> Workload:
    return Workload(
        "mixed",
        Lengths.uniform(1, 60),
        Lengths.uniform(1, 40),
        Arrivals.closed(6) if closed else Arrivals.poisson(8),
        num,
        SharedPrefix(3, Lengths.uniform(5, 50), 1.0) if prefix else None,
        Turns(Lengths.uniform(1, 4), think_s=0.3) if turns else None,
    )


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    policy=st.sampled_from(POLICIES),
    rule=st.sampled_from([("reserve", 0.0), ("reserve", 0.5), ("reserve", 1.0), ("ratio", 0.7)]),
    acceptance=st.sampled_from([(), (0.8,), (0.9, 0.5, 0.1)]),
    cache=st.booleans(),
    prefix=st.booleans(),
    turns=st.booleans(),
    closed=st.booleans(),
    room=st.sampled_from([420, 700, 4000]),
    block=st.sampled_from([1, 4, 16]),
    shape=st.sampled_from([(1, 1, ""), (2, 2, "vllm_score"), (2, 1, "")]),
    router=st.sampled_from(["least_requests", "prefix_affinity"]),
    fails=st.booleans(),
    seed=st.integers(0, 5),
)
def test_kv_blocks_are_conserved_whatever_is_combined(
    policy: str,
    rule: tuple[str, float],
    acceptance: tuple[float, ...],
    cache: bool,
    prefix: bool,
    turns: bool,
    closed: bool,
    room: int,
    block: int,
    shape: tuple[int, int, str],
    router: str,
    fails: bool,
    seed: int,
) -> None:
    groups, per_group, rank_router = shape
    spec = EngineSpec(
        groups,
        per_group,
        room,
        block_tokens=block,
        max_num_seqs=8,
        max_batched_tokens=64,
        policy=policy,
        admission_reserve=rule[1] if rule[0] == "reserve" else 0.1,
        token_ratio=SGLANG if rule[0] == "ratio" else None,
        rank_router=rank_router,
        acceptance=acceptance,
        prefix_caching=cache,
        receive_interval=3 if policy == "prefill_first" else 1,
        frontend_s=0.01,
        frontend_s_per_token=1e-4,
    )
    workload, books = sharing(prefix, turns, closed), BookTimer()
    outages = Outages(OutagePlan(((0.6, 0), (1.5, groups - 1)), None, 1, 1, 0.2, 1.0), seed)

    def watch(run: Any) -> None:
        books(run)
        if fails:
            outages(run)

    result = simulate(spec, books, workload, seed=seed, router=router, disturb=watch, max_simulated_s=500.0)
    requests = result.requests
    done = requests.status == FINISHED
    assert done.sum() + result.num_rejected == len(requests)
    np.testing.assert_array_equal(requests.produced_tokens[done], requests.output_tokens[done])
    for group in books.run.groups:
        for rank in group.ranks:
            assert rank.free_blocks == rank.total_blocks
            assert rank.final_blocks == 0 == rank.num_decoding == rank.context_tokens
            kind = SpeculativeRank if acceptance else RetractingRank if rule[0] == "ratio" else object
            assert isinstance(rank, kind)
    if fails:
        assert outages.incidents and not outages.dropped
    if requests.cached_tokens is not None:
        assert (requests.cached_tokens < requests.prompt_tokens).all()
        if not cache:
            assert not requests.cached_tokens.any()


@pytest.mark.parametrize("changes", [{"token_ratio": SGLANG, "policy": "prefill_first"}, {"acceptance": (0.8, 0.6)}])
def test_sglang_and_drafts_find_what_a_plain_rank_finds(changes: dict[str, Any]) -> None:
    """With room for everything a cache finds the same whatever rule admits: one page of the last answer apart."""
    workload = sharing(True, True, False, 200)
    found = []
    for more in ({}, changes):
        spec = EngineSpec(1, 1, 200_000, block_tokens=1, max_batched_tokens=4096, prefix_caching=True, **more)
        timer = BookTimer()
        found.append(simulate(spec, timer, workload, disturb=timer).summary().prefix_hit_rate)
    assert found[0] > 0.3
    assert found[1] == pytest.approx(found[0], abs=0.05)


def test_a_retracted_request_finds_its_prompt_again() -> None:
    """Prompts of one group in a pool too small for all answers: what is sent back is computed from the cache."""
    workload = Workload(
        "tight", Lengths.fixed(10), Lengths.fixed(60), Arrivals.trace([0.0] * 8), 8, SharedPrefix(1, Lengths.fixed(90))
    )
    steps = {}
    for cache in (True, False):
        timer = BookTimer()
        tight = TokenRatio(0.0, 0.0, 600, 4096, 20)
        spec = EngineSpec(1, 1, 1100, block_tokens=1, policy="prefill_first", token_ratio=tight, prefix_caching=cache)
        result = simulate(spec, timer, workload, disturb=timer)
        steps[cache] = result.steps.prefill_tokens.sum()
        assert (result.requests.status == FINISHED).all()
        if not cache:
            assert result.requests.num_preemptions.sum() > 0
    assert steps[True] < 0.5 * steps[False]


def test_a_replica_that_died_finds_nothing_and_the_router_keeps_away() -> None:
    workload = sharing(True, True, True, 120)
    spec = EngineSpec(2, 1, 20_000, prefix_caching=True, block_tokens=1)
    timer = BookTimer()
    outages = Outages(OutagePlan(((2.0, 0),), None, 1, 1, 0.1, 2.0))

    def watch(run: Any) -> None:
        timer(run)
        outages(run)

    failed = simulate(spec, timer, workload, router="prefix_affinity", disturb=watch)
    healthy = simulate(spec, timer, workload, router="prefix_affinity", disturb=timer)
    assert (failed.requests.status == FINISHED).all()
    (incident,) = outages.incidents
    sent = failed.requests.admitted_s
    away = (sent > incident.detected_s) & (sent < incident.ready_s)
    assert away.any() and (failed.requests.rank[away] == 1).all()
    assert failed.summary(warmup=0.0).prefix_hit_rate < healthy.summary(warmup=0.0).prefix_hit_rate


def test_a_user_whose_turn_was_lost_begins_another_conversation() -> None:
    workload = sharing(False, True, True, 80)
    outages = Outages(OutagePlan(((1.0, 0),), None, 1, 1, 0.2, 1.0, on_failure="drop"))
    timer = BookTimer()

    def watch(run: Any) -> None:
        timer(run)
        outages(run)

    result = simulate(EngineSpec(1, 1, 20_000, prefix_caching=True), timer, workload, disturb=watch)
    assert outages.dropped
    assert len(result.requests) == 80
    for index in outages.dropped:
        later = result.requests.conversation[index + 1 :]
        assert result.requests.conversation[index] not in later


def test_drafts_and_caches_pass_through_the_stages_of_a_pipeline() -> None:
    workload = sharing(True, True, False, 80)
    spec = EngineSpec(4, 1, 2000, acceptance=(0.7,), prefix_caching=True, max_batched_tokens=64, max_num_seqs=8)
    timer = BookTimer()
    result = simulate(spec, timer, workload, split=SPLIT, disturb=timer)
    assert (result.requests.status == FINISHED).all()
    assert timer.most_cached > 0


def test_closed_ranks_of_a_group_get_nothing_from_the_engines_router() -> None:
    workload = load_workload("fixed:50/20", rate=20, num_requests=200)
    for rank_router in ("vllm_score", "round_robin", "least_requests"):
        timer = BookTimer()

        def watch(run: Any, timer: BookTimer = timer) -> None:
            timer(run)
            run.balancer.open = [1, 3, 6]

        spec = EngineSpec(2, 4, 4000, rank_router=rank_router)
        result = simulate(spec, timer, workload, disturb=watch)
        assert set(result.requests.rank.tolist()) == {1, 3, 6}


def test_a_front_end_tokenises_one_prompt_after_the_other() -> None:
    front = FrontEnd(EngineSpec(1, 1, 1000, frontend_s=0.5, frontend_s_per_token=0.01, num_frontends=2))
    assert [front.delay_s(i, 100, 0.0) for i in range(4)] == pytest.approx([1.5, 1.5, 2.5, 2.5])
    assert front.delay_s(4, 100, 10.0) == pytest.approx(1.5)


def test_two_pools_and_one_have_the_same_front_end(moeplan: Any, tmp_path: Path) -> None:
    """A burst of prompts at a slow tokeniser, which takes them one after the other in two pools as in one."""
    profile = tmp_path / "slow.toml"
    profile.write_text('base = "vllm"\nname = "slow"\nversion = "1"\n[overheads]\nfrontend_s_per_token = 1e-4\n')
    base = ["simulate", "mixtral-8x7b", "--cluster", "h100-sxm:1x8", "--workload", "fixed:1000/2"]
    base += ["--concurrency", "64", "--num-requests", "64", "--engine", str(profile), "--json"]
    for layout in (["--layout", "tp=4"], ["--prefill-layout", "tp=4", "--decode-layout", "tp=4"]):
        code, out, _ = moeplan(*base, *layout)
        assert code == 0
        assert json.loads(out)["ttft_s"]["mean"] == pytest.approx(0.1 * 65 / 2, rel=0.05)


POOLS = ("--prefill-layout", "tp=2", "--decode-layout", "tp=2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (*POOLS, "--speculative", "ngram:2", "--acceptance", "0.5"),
            "--speculative and --overlap are simulated in one",
        ),
        ((*POOLS, "--fail-at", "10s"), "failures (--fail-at, --mtbf-gpu) are simulated in one pool only"),
        ((*POOLS, "--router", "prefix_affinity"), "--router prefix_affinity is simulated in one pool only"),
        ((*POOLS, "--workload", "agents"), "--workload agents shares prefixes, and prefix caches are simulated in one"),
        ((*POOLS, "--engine", "llamacpp"), "how it hands KV from one pool to another is not known"),
        (("--layout", "tp=2", "--engine", "generic", "--fail-at", "10s"), "how it notices a failure"),
    ],
)
def test_what_is_not_simulated_together_is_refused(moeplan: Any, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = moeplan("simulate", "mixtral-8x7b", "--cluster", "h100-sxm:1x8", "--rate", "1", *arguments)
    assert code == 2 and message in err and "Traceback" not in err


def test_a_plan_of_two_pools_refuses_it_before_it_searches(moeplan: Any) -> None:
    question = ["plan", "mixtral-8x7b", "--cluster", "h100-sxm:1x8", "--rate", "1", "--disaggregate"]
    code, _, err = moeplan(*question, "--workload", "agents")
    assert code == 2 and "plan without --disaggregate" in err


def test_the_library_refuses_it_too() -> None:
    plain = load_workload("chat", rate=1.0)
    check_combination(plain)
    with pytest.raises(InputError, match="one pool only"):
        check_combination(plain, Tactics(overlap=parse_overlap("tbo", engine("vllm"))))
