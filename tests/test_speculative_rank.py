"""The rank whose requests advance by several tokens per step: blocks, tokens and steps against plain accounting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.enginespec import EngineSpec
from planner.errors import InputError
from planner.ranks import rank_of
from planner.records import FINISHED, UNFINISHED
from planner.scheduler import SCHEDULERS, Rank, RankWork, Request
from planner.simulation import simulate
from planner.speculation import AcceptanceWalk, expected_tokens
from planner.speculativerank import SpeculativeRank
from planner.workload import load_workload

SHARES = st.lists(st.sampled_from([0.0, 0.3, 0.85, 1.0]), min_size=1, max_size=4).map(tuple)


class ConstantTimer:
    """Every step takes as long."""

    draw, link_s = 0, 0.0

    def step_s(self, ranks: Any) -> float:
        return 0.01


def drive(spec: EngineSpec, wanted: list[tuple[int, int, int]]) -> tuple[SpeculativeRank, list[Request], int]:
    """Step a rank until all of `wanted` [(step, prompt, output)] are answered, checking its books at every step."""
    rank = rank_of(spec)
    assert isinstance(rank, SpeculativeRank)
    pending = [(at, Request(i, p, o, 0.0)) for i, (at, p, o) in enumerate(sorted(wanted))]
    pending = [(at, request) for at, request in pending if rank.can_ever_hold(request)]
    requests = [request for _, request in pending]
    done: list[Request] = []
    step = decoded = 0
    while len(done) < len(requests):
        assert step < 20_000, "the scheduler makes no progress"
        while pending and pending[0][0] <= step:
            rank.enqueue(pending.pop(0)[1])
        rank.plan(float(step))
        work = rank.work
        assert 0 <= rank.free_blocks <= rank.total_blocks
        assert rank.num_decoding == work.decode_seqs or not work.decode_seqs
        tokens = work.decode_seqs * (1 + len(spec.acceptance)) + work.prefill_tokens
        assert tokens <= spec.max_batched_tokens and len(rank.running) <= spec.max_num_seqs
        held = sum(rank.blocks(request.target) for request in rank.running)
        assert rank.total_blocks - rank.free_blocks == held + rank._growth_blocks
        if work.decode_seqs:
            assert rank._growth_blocks * spec.block_tokens << 20 >= rank._growth + rank._rate
            assert work.decode_context_tokens >= work.decode_seqs
        decoded += work.decode_seqs
        for request in rank.complete(float(step) + 0.5):
            assert request.produced == request.output_tokens
            done.append(request)
        step += 1
    assert rank.free_blocks == rank.total_blocks and rank.final_blocks == 0
    assert (rank._growth, rank._rate, rank._growth_blocks, rank.context_tokens, rank.num_decoding) == (0, 0, 0, 0, 0)
    return rank, requests, decoded


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=25),
    SHARES,
    st.sampled_from(sorted(SCHEDULERS)),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([160, 400, 4000]),
    st.sampled_from([0.0, 0.098, 1.0]),
)
def test_the_books_balance(
    wanted: list[tuple[int, int, int]],
    acceptance: tuple[float, ...],
    policy: str,
    block: int,
    pool: int,
    reserve: float,
) -> None:
    spec = EngineSpec(
        1,
        1,
        pool,
        block,
        max_num_seqs=8,
        max_batched_tokens=64,
        policy=policy,
        admission_reserve=reserve,
        acceptance=acceptance,
    )
    rank, _, _ = drive(spec, wanted)
    if reserve == 1.0:
        assert rank.num_preemptions == 0


@pytest.mark.parametrize("acceptance", [(0.0,), (0.0, 0.9)])
def test_drafts_that_always_fail_leave_one_token_per_step(acceptance: tuple[float, ...]) -> None:
    wanted = [(i, 20, 10 + i) for i in range(12)]
    _, requests, decoded = drive(EngineSpec(1, 1, 4000, acceptance=acceptance), wanted)
    assert decoded == sum(request.output_tokens - 1 for request in requests)


@pytest.mark.parametrize("policy", sorted(SCHEDULERS))
def test_with_drafts_that_always_fail_requests_finish_when_they_would_without(policy: str) -> None:
    workload = load_workload("lognormal:200~0.8/60~0.8", rate=20.0, num_requests=300)
    plain, failing = (
        simulate(EngineSpec(1, 2, 10**6, policy=policy, acceptance=a), ConstantTimer(), workload) for a in ((), (0.0,))
    )
    assert np.array_equal(plain.requests.finish_s, failing.requests.finish_s)
    assert np.array_equal(plain.steps.decode_seqs, failing.steps.decode_seqs)


def test_drafts_that_never_fail_divide_the_steps() -> None:
    _, _, decoded = drive(EngineSpec(1, 1, 4000, acceptance=(1.0, 1.0, 1.0)), [(0, 20, 41)] * 5)
    assert decoded == 5 * 10


def test_preempted_requests_lose_no_token() -> None:
    spec = EngineSpec(1, 1, 320, max_num_seqs=8, max_batched_tokens=512, acceptance=(0.85,))
    rank, requests, _ = drive(spec, [(0, 30, 60)] * 8)
    assert rank.num_preemptions > 0
    assert all(request.produced == request.output_tokens for request in requests)


@pytest.mark.parametrize("acceptance", [(0.85,), (0.8, 0.8, 0.8)])
def test_simulated_tokens_per_step_are_the_expected_ones(acceptance: tuple[float, ...]) -> None:
    workload = load_workload("fixed:64/400", rate=20.0, num_requests=800)
    run = simulate(EngineSpec(1, 1, 10**6, acceptance=acceptance), ConstantTimer(), workload, seed=4)
    requests, expected = run.requests, expected_tokens(acceptance)
    assert np.all(requests.status == FINISHED) and np.all(requests.produced_tokens == 400)
    per_step = 399 * len(requests) / run.steps.decode_seqs.sum()
    # The last step of a request makes more tokens than it needs: below A by less than the drafts over the tokens.
    assert expected * (1 - len(acceptance) / 399) - 0.01 < per_step < expected + 0.01
    steps_each = run.steps.decode_seqs.sum() / len(requests)
    assert float(np.mean(requests.tpot_s)) == pytest.approx(0.01 * steps_each / 399, rel=1e-6)


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    workload = load_workload("fixed:64/100", rate=20.0, num_requests=200)
    spec = EngineSpec(2, 2, 10**5, acceptance=(0.85,))
    runs = [simulate(spec, ConstantTimer(), workload, seed=seed) for seed in (1, 1, 2)]
    assert runs[0].requests.finish_s.tobytes() == runs[1].requests.finish_s.tobytes()
    assert runs[0].num_steps != runs[2].num_steps or not np.array_equal(
        runs[0].steps.decode_seqs, runs[2].steps.decode_seqs
    )


def test_a_run_that_is_cut_credits_what_was_made() -> None:
    workload = load_workload("fixed:64/1001", concurrency=4, num_requests=4)
    spec = EngineSpec(1, 1, 10**5, acceptance=(1.0,))
    run = simulate(spec, ConstantTimer(), workload, max_simulated_s=1.015)
    assert np.all(run.requests.status == UNFINISHED)
    # One step of prompts and 100 of two tokens.
    assert run.requests.produced_tokens.tolist() == [201] * 4


def test_plain_ranks_stay_plain() -> None:
    assert type(rank_of(EngineSpec(1, 1, 1000))) is Rank


def test_a_step_must_hold_the_drafts_of_every_sequence() -> None:
    EngineSpec(1, 1, 1000, max_num_seqs=32, max_batched_tokens=64, acceptance=(0.5,))
    with pytest.raises(InputError, match="every running sequence needs 3 tokens per step"):
        EngineSpec(1, 1, 1000, max_num_seqs=32, max_batched_tokens=64, acceptance=(0.5, 0.5))


def test_the_slots_of_drafts_are_taken_from_the_pool() -> None:
    spec = EngineSpec(1, 1, 1000, block_tokens=1, acceptance=(0.5,) * 3)
    rank = rank_of(spec)
    rank.enqueue(Request(0, 100, 50, 0.0))
    rank.plan(0.0)
    assert rank.total_blocks - rank.free_blocks == 100
    rank.complete(0.1)
    rank.plan(0.2)
    mean = rank.work.decode_context_tokens - 103
    assert 1 <= mean <= 4 and 104 <= rank.total_blocks - rank.free_blocks <= 107


def test_the_walk_is_shared_by_the_ranks_of_a_run() -> None:
    """Requests take successive stretches, so that equal requests do not all take equally many steps."""
    walk = AcceptanceWalk((0.5,), 0)
    assert len({walk.steps(100) for _ in range(50)}) > 5


def test_work_counts_sequences() -> None:
    rank = rank_of(EngineSpec(1, 1, 1000, acceptance=(0.5,)))
    rank.enqueue(Request(0, 10, 5, 0.0))
    rank.plan(0.0)
    rank.complete(0.1)
    rank.plan(0.2)
    assert isinstance(rank.work, RankWork) and rank.work.decode_seqs == 1
