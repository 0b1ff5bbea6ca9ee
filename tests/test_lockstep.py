"""Ranks of an attention-DP group: who drags whom, padding, dummy batches, TensorRT-LLM's balance, micro-batches."""

from dataclasses import replace

import numpy as np
import pytest

from planner.cost import StepCost
from planner.engine import BatchWait, Limits, PrefillBalance, engine
from planner.enginespec import EngineSpec
from planner.hardware import parse_cluster
from planner.layout import Layout
from planner.lockstep import PrefillHold, PromptHold
from planner.model import load
from planner.scheduler import Rank, RankWork, Request
from planner.simulation import simulate
from planner.timer import step_timer
from planner.ubatch import UbatchTimer, passes
from planner.workload import Arrivals, Lengths, Workload


class Watch:
    """20 ms per step; counts steps and ranks with prompts, and how even the tokens of steps with prompts were."""

    draw, link_s = 0, 0.0

    def __init__(self, prompt_token_s=0.0):
        self.steps = self.dragged = self.prefilling = self.num_ranks = 0
        self.prompt_token_s, self.even = prompt_token_s, []

    def step_s(self, ranks):
        prompts = [w.prefill_tokens for w in ranks]
        self.steps, self.num_ranks = self.steps + 1, len(ranks)
        self.dragged += any(prompts)
        self.prefilling += sum(p > 0 for p in prompts)
        if any(prompts):
            tokens = [w.prefill_tokens + w.decode_seqs for w in ranks]
            self.even.append(sum(tokens) / len(tokens) / max(tokens))
        return 0.02 + self.prompt_token_s * max(prompts)


@pytest.mark.parametrize(("num_ranks", "q", "dragged"), [(32, 0.01, 0.275), (8, 0.01, 0.077), (32, 0.05, 0.81)])
def test_one_rank_with_prompts_drags_the_group(num_ranks, q, dragged):
    """L5: P = 1 - (1 - q)^R; q is the share of steps in which one rank prefills."""
    rate = -num_ranks * np.log1p(-q) / 0.02
    workload = Workload("w", Lengths.fixed(100), Lengths.fixed(200), Arrivals.poisson(rate), 8000)
    timer = Watch()
    simulate(EngineSpec(1, num_ranks, 10**6, rank_router="round_robin"), timer, workload, seed=1, record_steps=False)
    assert timer.prefilling / timer.steps / num_ranks == pytest.approx(q, rel=0.1)
    assert timer.dragged / timer.steps == pytest.approx(dragged, rel=0.05)


def adp(balance):
    """Saturated decode on 8 ranks of 16 places, prompts of which cost as much as 10 steps of decode."""
    workload = Workload("w", Lengths.fixed(1000), Lengths.lognormal(200, 0.5), Arrivals.closed(160), 1600)
    timer = Watch(prompt_token_s=2e-4)
    spec = EngineSpec(1, 8, 10**6, max_num_seqs=16, max_batched_tokens=1000, prefill_balance=balance)
    run = simulate(spec, timer, workload, seed=2, record_steps=False)
    return run.requests.output_tokens.sum() / run.simulated_s, float(np.mean(timer.even)), run.requests


def test_holding_prompts_until_all_ranks_have_some_raises_throughput():
    """Direction of TensorRT-LLM blog 10: balance ratio 54.1 % to 84.3 %, 25,664 to 33,499 tokens per second."""
    free_tok_per_s, free_balance, _ = adp(None)
    held_tok_per_s, held_balance, requests = adp(PrefillBalance(True, 50, 10))
    assert held_balance > 1.2 * free_balance
    assert held_tok_per_s > 1.1 * free_tok_per_s
    assert (requests.produced_tokens == requests.output_tokens).all()
    disabled_tok_per_s, _, _ = adp(PrefillBalance(False, 50, 10))
    assert disabled_tok_per_s == free_tok_per_s


def group(num_decoding, num_waiting, **changes):
    spec = EngineSpec(1, len(num_decoding), 10**6, **changes)
    ranks = [Rank(spec) for _ in num_decoding]
    for rank, decoding, waiting in zip(ranks, num_decoding, num_waiting, strict=True):
        for _ in range(decoding):
            rank.enqueue(Request(0, 10, 1000, 0.0))
        rank.plan(0.0)
        rank.complete(0.0)
        for _ in range(waiting):
            rank.enqueue(Request(0, 10, 10, 0.0))
    return ranks


def holds(hold, ranks, count):
    seen = []
    for _ in range(count):
        hold.decide(ranks)
        seen.append(ranks[0].holds_prompts)
    return seen


def test_prompts_are_held_for_the_timeout_at_most():
    assert holds(PrefillHold(PrefillBalance(True, 5, 0)), group([1, 1], [1, 0]), 10) == ([True] * 4 + [False]) * 2


def test_prompts_are_not_held_when_all_have_some_or_one_has_nothing_else_to_do():
    assert not any(holds(PrefillHold(PrefillBalance(True, 50, 0)), group([1, 1], [1, 1]), 5))
    assert not any(holds(PrefillHold(PrefillBalance(True, 50, 0)), group([1, 0], [1, 0]), 5))


def test_prompts_gather_for_the_batching_steps():
    assert holds(PrefillHold(PrefillBalance(True, 50, 3)), group([1, 1], [1, 1]), 8) == ([True] * 3 + [False]) * 2


WAIT = BatchWait(4, 0.5)
SMALL = {"max_num_seqs": 8, "max_batched_tokens": 64}


def test_prompts_wait_for_a_share_of_the_token_budget():
    """32 of 64 tokens: 2 decodes and 3 prompts of 10, or the timeout."""
    assert holds(PromptHold(WAIT), group([2], [3], **SMALL), 5) == [False] * 5
    assert holds(PromptHold(WAIT), group([2], [2], **SMALL), 10) == ([True] * 4 + [False]) * 2
    assert holds(PromptHold(WAIT), group([1], [3], **SMALL), 5) == [True] * 4 + [False]


def test_prompts_do_not_wait_without_decodes_or_room():
    assert not any(holds(PromptHold(WAIT), group([0], [1], **SMALL), 5))
    assert not any(holds(PromptHold(WAIT), group([2], [0], **SMALL), 5))
    assert not any(holds(PromptHold(WAIT), group([2], [1], max_num_seqs=2, max_batched_tokens=64), 5))


def test_a_cut_prompt_counts_whole():
    """A prompt of 100 in steps of 64: what is left of it does not wait."""
    (rank,) = group([2], [0], **SMALL)
    rank.enqueue(Request(0, 100, 10, 0.0))
    rank.plan(0.0)
    rank.complete(0.0)
    assert rank.partial is not None
    assert not any(holds(PromptHold(WAIT), [rank], 5))


def test_waiting_for_a_batch_costs_ttft_and_saves_steps_with_prompts():
    """Timeout of 20 steps of 20 ms: no prompt waits longer for a batch, and everyone is answered."""
    workload = Workload("w", Lengths.fixed(100), Lengths.uniform(50, 150), Arrivals.closed(32), 320)
    runs = []
    for rule in (None, BatchWait(20, 0.9)):
        timer = Watch(prompt_token_s=1e-5)
        spec = EngineSpec(1, 1, 10**6, max_num_seqs=64, max_batched_tokens=1000, batch_wait=rule)
        found = simulate(spec, timer, workload, seed=1).requests
        assert (found.produced_tokens == found.output_tokens).all()
        runs.append((timer.dragged, float(np.max(found.ttft_s)), float(np.mean(found.ttft_s))))
    (free, free_max_s, free_mean_s), (held, held_max_s, held_mean_s) = runs
    assert held < free
    assert free_mean_s < held_mean_s
    assert held_max_s <= free_max_s + 20 * 0.03


def test_ranks_of_a_group_do_not_wait_for_a_batch():
    workload = Workload("w", Lengths.fixed(100), Lengths.fixed(20), Arrivals.poisson(20), 100)
    first, second = (
        simulate(EngineSpec(1, 2, 10**6, batch_wait=rule), Watch(), workload, seed=1).requests.finish_s
        for rule in (None, BatchWait(20, 0.9))
    )
    assert (first == second).all()


def test_a_held_prompt_stays_out_of_the_step():
    ranks = group([2, 1], [1, 0])
    PrefillHold(PrefillBalance(True, 50, 0)).decide(ranks)
    ranks[0].plan(1.0)
    assert (ranks[0].work.prefill_tokens, ranks[0].work.decode_seqs) == (0, 2)


# --- step times of a group ---


def timer_of(name, backend="allgather_reducescatter", **changes):
    cost = StepCost(
        load("deepseek-v3"),
        Layout(tp=1, ep=8, attention_dp=8),
        parse_cluster("h200-sxm:1x8"),
        replace(engine(name), **changes),
        backend,
    )
    timer = step_timer(cost, Limits(128, 2048))
    timer.use_factors(None)
    return timer


def decode(seqs):
    return RankWork(decode_seqs=seqs, decode_context_tokens=seqs * 1000)


def prompt(tokens):
    return RankWork(tokens, tokens * (tokens + 1) // 2, 1)


@pytest.fixture(scope="module")
def sglang():
    return timer_of("sglang")


@pytest.fixture(scope="module")
def vllm():
    return timer_of("vllm")


IDLE = RankWork()


def test_an_idle_rank_runs_a_batch_of_one_token(vllm):
    assert vllm.step_s([decode(8)] * 7 + [IDLE]) == pytest.approx(vllm.step_s([decode(8)] * 7 + [decode(1)]))


def test_all_ranks_are_padded_to_the_fullest(sglang):
    """With graphs the all-gather carries R times the fullest rank's padded tokens; experts see real ones only."""
    uneven = [decode(64)] + [decode(8)] * 7
    bare = timer_of("sglang", graphs=replace(engine("sglang").graphs, ranges=()))
    assert sglang.step_s(uneven) > 1.005 * bare.step_s(uneven)
    assert sglang.step_s([decode(64)] * 8) == pytest.approx(bare.step_s([decode(64)] * 8))


def test_the_batch_is_padded_to_the_next_graph(sglang):
    assert sglang.step_s([decode(65)] * 8) > sglang.step_s([decode(64)] * 8)
    exact = timer_of("sglang", graphs=replace(engine("sglang").graphs, ranges=()))
    assert sglang.step_s([decode(65)] * 8) > exact.step_s([decode(65)] * 8)


def test_one_prompt_takes_sglang_to_the_eager_path_on_all_ranks(sglang):
    """is_extend = max, can_run_graph = min: with a prompt anywhere nobody is padded, in vLLM all are (piecewise)."""
    work = [prompt(33)] + [decode(8)] * 7
    bare = timer_of("sglang", graphs=replace(engine("sglang").graphs, ranges=()))
    assert sglang.step_s(work) == bare.step_s(work)
    vllm, unpadded = timer_of("vllm"), timer_of("vllm", graphs=replace(engine("vllm").graphs, ranges=()))
    assert vllm.step_s(work) > unpadded.step_s(work)
    large = [prompt(2000)] + [decode(8)] * 7  # beyond the largest graph
    assert vllm.step_s(large) == unpadded.step_s(large)


def test_steps_with_prompts_of_a_lone_rank_are_padded_too():
    layout, cluster, limits = Layout(tp=8, ep=8), parse_cluster("h200-sxm:1x8"), Limits(128, 2048)
    padded, bare = (
        step_timer(StepCost(load("deepseek-v3"), layout, cluster, profile), limits)
        for profile in (engine("vllm"), replace(engine("vllm"), graphs=replace(engine("vllm").graphs, ranges=())))
    )
    for timer in (padded, bare):
        timer.use_factors(None)
    assert padded.step_s([prompt(201)]) > bare.step_s([prompt(201)])
    assert padded.step_s([prompt(600)]) == bare.step_s([prompt(600)])


def test_deepep_changes_kernels_for_all_when_one_rank_has_prompts():
    """deepep_mode auto: normal kernels when any rank has prompts, low latency otherwise (handbook serving 2.1)."""
    timer = timer_of("sglang", "deepep")
    decodes, mixed = [decode(8)] * 8, [prompt(8)] + [decode(8)] * 7
    before = timer.step_s(decodes), timer.step_s(mixed)
    normal, low_latency = timer._moe["prefill"][8], timer._moe["decode"][8]
    assert normal != pytest.approx(low_latency, rel=0.01)
    timer._moe["decode"] = [0.0] * len(timer._moe["decode"])
    assert timer.step_s(decodes) == pytest.approx(before[0] - low_latency)
    assert timer.step_s(mixed) == before[1]


# --- micro-batches ---


def test_passes_keep_every_token():
    work = RankWork(1800, 1_620_900, 3, 100, 50_000)
    parts = list(passes(work, 512))
    assert [p.prefill_tokens + p.decode_seqs for p in parts] == [512, 512, 512, 364]
    assert parts[0].decode_seqs == 100
    assert sum(p.prefill_tokens for p in parts) == 1800
    assert sum(p.decode_context_tokens for p in parts) == 50_000
    assert sum(p.prefill_pairs for p in parts) == pytest.approx(1_620_900, rel=1e-5)
    assert next(passes(decode(7), 512)).decode_seqs == 7


def test_a_batch_of_llamacpp_reads_the_weights_once_per_ubatch():
    cost = StepCost(load("mixtral-8x7b"), Layout(tp=4, moe_tp=4), parse_cluster("h100-sxm:1x4"), engine("llamacpp"))
    whole = step_timer(cost, Limits(4, 2048))
    whole.use_factors(None)
    cut = UbatchTimer(whole, 512)
    work = [prompt(2048)]
    assert cut.step_s(work) > 1.1 * whole.step_s(work)
    assert cut.step_s([prompt(512)]) == whole.step_s([prompt(512)])
