"""SGLang's admission by new_token_ratio and its retraction, against rules that walk every request."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.engine import TokenRatio, engine
from planner.enginespec import EngineSpec
from planner.retraction import RetractingRank
from planner.scheduler import Rank, Request
from planner.simulation import simulate
from planner.workload import Arrivals, Lengths, Workload

SGLANG = engine("sglang").token_ratio


def spec(kv_tokens=400, rule=SGLANG, **changes):
    settings = {"block_tokens": 1, "max_num_seqs": 64, "max_batched_tokens": 256, "policy": "prefill_first"}
    return EngineSpec(1, 1, kv_tokens, token_ratio=rule, **(settings | changes))


def rank_of(requests, kv_tokens=400, rule=SGLANG, **changes):
    rank = RetractingRank(spec(kv_tokens, rule, **changes))
    for index, (prompt, output) in enumerate(requests):
        rank.enqueue(Request(index, prompt, output, 0.0))
    return rank


def step(rank, count=1):
    for _ in range(count):
        rank.plan(0.0)
        rank.complete(1.0)


def produced(rank, request):
    return request.produced + rank.decode_steps - request.joined_decode_step


def walked_tokens(rank, clip):
    """Expected tokens by walking the decoding requests."""
    decoding = [r for r in rank.running if r is not rank.partial and r.produced]
    return sum(min(r.output_tokens - produced(rank, r), clip) for r in decoding)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    kv_tokens=st.integers(40, 500),
    block_tokens=st.sampled_from([1, 4, 16]),
    policy=st.sampled_from(["prefill_first", "mixed"]),
    clip=st.sampled_from([1, 5, 20, 4096]),
    start=st.sampled_from([0.0, 0.3, 1.0]),
    requests=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=20),
)
def test_sums_equal_walking_and_every_answer_is_whole(kv_tokens, block_tokens, policy, clip, start, requests):
    rule = TokenRatio(start, 0.14, 30, clip, 3)
    rank = RetractingRank(
        spec(kv_tokens, rule, block_tokens=block_tokens, policy=policy, max_num_seqs=10, max_batched_tokens=64)
    )
    sent = [(at, Request(i, p, o, 0.0)) for i, (at, p, o) in enumerate(requests)]
    sent = [(at, r) for at, r in sent if rank.can_ever_hold(r)]
    waiting, done = sorted(sent, key=lambda item: item[0]), []
    for now in range(20_000):
        while waiting and waiting[0][0] <= now:
            rank.enqueue(waiting.pop(0)[1])
        if len(done) == len(sent):
            break
        retracted = rank.num_preemptions
        rank.plan(float(now))
        assert 0 <= rank.free_blocks <= rank.total_blocks
        assert rank.work.prefill_tokens + rank.work.decode_seqs or not (rank.running or rank.waiting)
        if rank.num_preemptions > retracted:
            assert rank.work.decode_seqs and not rank.work.prefill_tokens
        done += rank.complete(now + 0.5)
        assert rank.expected_tokens == walked_tokens(rank, clip)
        assert 0 <= rank.ratio <= 1
    assert len(done) == len(sent)
    assert all(r.produced == r.output_tokens for r in done)
    assert rank.free_blocks == rank.total_blocks
    assert (rank.expected_tokens, rank.num_decoding, rank.final_blocks) == (0, 0, 0)
    assert rank.ratio == rank.start_ratio


def test_the_shortest_answer_then_the_longest_prompt_goes_back_to_the_end_of_the_queue():
    rank = rank_of([(10, 90), (20, 90), (30, 90)], kv_tokens=200, rule=TokenRatio(0.0, 0.0, 600, 4096, 20))
    step(rank, 21)  # one step of prompts, 20 decodes: each has 21 tokens and all hold 60 + 60 tokens
    rank.enqueue(Request(3, 5, 30, 0.0))
    step(rank, 10)
    assert [r.index for r in rank.running] == [0, 1, 2, 3]
    while not rank.num_preemptions:
        step(rank)
    # 3 came last and has the shortest answer; 2 is not touched although it was admitted before and has more to go.
    assert [r.index for r in rank.running] == [0, 1, 2]
    assert [r.index for r in rank.waiting] == [3]
    rank = rank_of([(10, 90), (30, 90), (20, 90)], kv_tokens=200, rule=TokenRatio(0.0, 0.0, 600, 4096, 20))
    rank.enqueue(Request(3, 150, 9, 0.0))
    while not rank.num_preemptions:
        step(rank)
    assert [r.index for r in rank.running] == [0, 2]
    assert [r.index for r in rank.waiting] == [3, 1]  # behind what waited before


def test_vllm_would_preempt_the_last_admitted_instead():
    vllm = Rank(EngineSpec(1, 1, 200, block_tokens=1, max_num_seqs=64, max_batched_tokens=256))
    for index, (prompt, output) in enumerate([(10, 90), (30, 90), (20, 90)]):
        vllm.enqueue(Request(index, prompt, output, 0.0))
    while not vllm.num_preemptions:
        step(vllm)
    assert [r.index for r in vllm.waiting] == [2]


def test_the_ratio_after_retraction_is_what_the_others_show():
    rank = rank_of([(10, 90), (20, 90), (30, 90)], kv_tokens=200, rule=TokenRatio(0.0, 0.0, 600, 4096, 20))
    while not rank.num_preemptions:
        rank.plan(0.0)
        if not rank.num_preemptions:
            rank.complete(1.0)
    kept = list(rank.running)
    assert len(kept) == 2
    assert rank.ratio == pytest.approx((sum(produced(rank, r) for r in kept) + 20 * 2) / (90 * 2 + 1))


def test_the_ratio_falls_over_600_decode_steps_and_starts_again_when_idle():
    rank = rank_of([(1, 700)], kv_tokens=2000)
    assert rank.ratio == 0.7
    step(rank)
    assert rank.ratio == 0.7  # a step of prompts does not count
    step(rank, 300)
    assert rank.ratio == pytest.approx((0.7 + 0.098) / 2)
    step(rank, 350)
    assert rank.ratio == pytest.approx(0.098)
    step(rank, 100)
    assert not rank.running
    assert rank.ratio == 0.7


def test_attention_dp_makes_admission_bolder():
    assert RetractingRank(EngineSpec(1, 8, 400, token_ratio=SGLANG)).ratio == pytest.approx(0.7 * 0.3)


def running_when(ratio, waiting_output=50):
    """How many of twelve requests run together after two steps of prompts."""
    rank = rank_of([(10, 50)] * 6, kv_tokens=480, rule=TokenRatio(ratio, 1.0, 600, 4096, 20))
    step(rank)
    for index in range(6):
        rank.enqueue(Request(6 + index, 10, waiting_output, 0.0))
    step(rank)
    return len(rank.running)


def test_a_lower_ratio_admits_more():
    # 6 run and hold 60 tokens; of the 420 free ones each newcomer needs 10 + 50 + 1 and 6 x 49 x ratio is kept back.
    assert running_when(0.0) == 6 + 6
    assert running_when(0.7) == 6 + (420 - round(6 * 49 * 0.7)) // 61
    assert running_when(1.0) == 6 + (420 - 6 * 49) // 61


@pytest.mark.parametrize("clip", [10, 4096])
def test_long_answers_count_up_to_the_clip(clip):
    rank = rank_of([(10, 300), (10, 20)], kv_tokens=2000, rule=TokenRatio(1.0, 1.0, 600, clip, 20))
    step(rank, 5)
    assert rank.expected_tokens == min(300 - 5, clip) + min(20 - 5, clip)


def test_chunks_mixed_with_decodes_are_an_option_of_the_profile():
    rank = rank_of([(4, 10)], policy="mixed", max_batched_tokens=64, max_num_seqs=8)
    step(rank)
    rank.enqueue(Request(1, 12, 2, 1.0))
    rank.plan(1.0)
    assert (rank.work.decode_seqs, rank.work.prefill_tokens) == (1, 12)


class Constant:
    draw, link_s = 0, 0.0

    def step_s(self, ranks):
        return 0.02


def summary(**changes):
    workload = Workload("w", Lengths.fixed(200), Lengths.lognormal(400, 0.6), Arrivals.closed(40), 400)
    spec = EngineSpec(1, 1, 8000, max_batched_tokens=2048, max_num_seqs=128, **changes)
    run = simulate(spec, Constant(), workload, seed=1)
    steps = run.steps
    return run.requests.num_preemptions.sum(), steps.decode_seqs[steps.decode_seqs > 0].mean(), run.requests


def test_capacity_policies_trade_places_for_preemptions():
    """GUARANTEED_NO_EVICT never preempts; MAX_UTILIZATION runs more at once and pauses some; SGLang lies between."""
    (none, few, _), (many, most, requests), (some, middle, _) = (
        summary(admission_reserve=1.0),
        summary(),
        summary(token_ratio=SGLANG, block_tokens=1),
    )
    assert none == 0 < some < many
    assert few < middle
    assert few < most
    assert math.isfinite(requests.finish_s.sum())


def test_profiles_name_their_capacity_policy():
    trtllm = engine("trtllm")
    assert (trtllm.capacity_policy, trtllm.admission_reserve) == ("guaranteed_no_evict", 1.0)
    assert (engine("vllm").capacity_policy, engine("vllm").admission_reserve) == ("max_utilization", 0.0)
