"""Hit rates of expert caches against real records, published tables and the routing process behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import InputError, ModelConfigError, WorkloadError
from planner.residency import (
    REUSES,
    LayerWork,
    Reuse,
    Tier,
    Tiers,
    calibrate,
    che_hits,
    hit_curve,
    hits_by_capacity,
    next_token_reuse,
    sample_ids,
    stack_distances,
    static_hits,
)
from planner.residency.hits import needed
from planner.residency.reuse import union
from planner.residency.timing import demand
from planner.residency.traces import step_hits
from planner.routing import inclusion_from_weights

RECORDS = Path("/work/shared/data/routing")
CAPACITIES = [6, 8, 12, 16, 24, 32, 48]
LRU_TABLE = {
    "law": [0.22, 0.29, 0.39, 0.47, 0.60, 0.71, 0.88],
    "translation": [0.20, 0.27, 0.42, 0.58, 0.74, 0.83, 0.93],
    "intent": [0.19, 0.26, 0.36, 0.46, 0.59, 0.69, 0.81],
}
"""Handbook routing section 5: LRU per layer, cold start with each sequence, 64 experts."""
needs_records = pytest.mark.skipif(not RECORDS.is_dir(), reason="the routing records are not here")


def record(task: str, layers: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    with np.load(RECORDS / f"deepseek_v2_lite_{task}.npz") as file:
        return file["expert_ids"][layers], file["sequence_lengths"]


def counts(ids: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(layer.ravel(), minlength=64) for layer in ids])


@needs_records
@pytest.mark.parametrize("task", LRU_TABLE)
def test_exact_lru_reproduces_the_table(task: str) -> None:
    ids, lengths = record(task)
    found = hits_by_capacity(stack_distances(ids, lengths, 64), 64)
    assert found[CAPACITIES] == pytest.approx(LRU_TABLE[task], abs=0.0055)
    assert found[0] == 0.0 and (np.diff(found) >= 0).all()
    assert found[64] < 1.0  # first uses miss in any cache


@needs_records
def test_lfu_beats_lru_only_where_sequences_repeat_themselves() -> None:
    for task, sign in (("law", -1), ("translation", 1)):
        ids, lengths = record(task, slice(0, 8))
        lru, lfu = (hits_by_capacity(stack_distances(ids, lengths, 64, order), 64) for order in ("lru", "lfu"))
        assert np.sign((lfu - lru)[[8, 12]].sum()) == sign


def test_uniform_routing_hits_in_proportion_to_capacity() -> None:
    """The handbook's last row, capacity / 64, by the formula and token by token."""
    uniform = np.full(64, 6 / 64)
    assert che_hits(uniform, np.array(CAPACITIES)) == pytest.approx(np.array(CAPACITIES) / 64, abs=1e-6)
    ids = sample_ids(np.ones((2, 64)), 6, Reuse(0.0), 1, 3000, np.random.default_rng(0))[:, 0]
    found = hits_by_capacity(stack_distances(ids, [3000], 64)[:, 100:], 64)
    assert found[CAPACITIES[1:]] == pytest.approx(np.array(CAPACITIES[1:]) / 64, abs=0.035)
    assert next_token_reuse(ids, [3000], 64) == pytest.approx(6 / 64, abs=0.005)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "exponent", "share", "lru", "che", "static"),
    [
        (128, 4, 0.6, 0.375, 0.515, 0.518, 0.634),
        (128, 4, 1.0, 0.375, 0.718, 0.722, 0.806),
        (128, 4, 1.4, 0.375, 0.873, 0.874, 0.917),
        (256, 8, 0.6, 0.25, 0.384, 0.390, 0.525),
        (256, 8, 1.0, 0.50, 0.811, 0.813, 0.869),
    ],
)
def test_zipf_table(
    num_experts: int, top_k: int, exponent: float, share: float, lru: float, che: float, static: float
) -> None:
    """Handbook serving 5B.3, acceptance O1."""
    weights = np.arange(1, num_experts + 1.0) ** -exponent
    q, slots = inclusion_from_weights(weights, top_k), int(share * num_experts)
    assert float(che_hits(q, slots)) == pytest.approx(che, abs=0.01)
    assert float(static_hits(q, slots)) == pytest.approx(static, abs=0.01)
    ids = sample_ids(weights[None], top_k, Reuse(0.0), 1, 4000, np.random.default_rng(0))[:, 0]
    simulated = hits_by_capacity(stack_distances(ids, [4000], num_experts)[:, 400:], num_experts)[slots]
    assert simulated == pytest.approx(lru, abs=0.015)
    # Picks of one token enter one after the other, which costs the simulation up to a point at eight picks.
    assert simulated == pytest.approx(float(che_hits(q, slots)), abs=0.012)


@needs_records
@pytest.mark.parametrize(("task", "worst"), [("law", 0.04), ("intent", 0.04), ("translation", 0.075)])
def test_calibrated_process_gives_the_lru_table(task: str, worst: float) -> None:
    """Only the next-token reuse is fitted; translation's reuse does not fade with age, which the process cannot do."""
    ids, lengths = record(task, slice(0, 26, 2))
    reuse = calibrate(ids, lengths, 64)
    tokens = int(np.median(lengths))
    drawn = sample_ids(counts(ids), 6, reuse, max(4, 1500 // tokens), tokens, np.random.default_rng(1))
    flat, equal = drawn.reshape(len(ids), -1, 6), np.full(drawn.shape[1], tokens)
    assert next_token_reuse(flat, equal, 64) == pytest.approx(next_token_reuse(ids, lengths, 64), abs=0.02)
    real, found = (
        hits_by_capacity(stack_distances(x, n, 64), 64)[CAPACITIES] for x, n in ((ids, lengths), (flat, equal))
    )
    assert np.abs(found - real).max() < worst
    assert np.abs(found - real).mean() < 0.6 * worst


@needs_records
def test_product_process_lies_among_the_records() -> None:
    """Log-normal popularity of a single domain with the mean reuse, against the mean of the tasks.

    A step knows all its experts, which matters for caches hardly larger than a token's picks: left out here.
    """
    found = np.array(hit_curve("lru", 64, 6))
    steps = []
    for task in ("law", "translation", "intent", "summary"):
        ids, lengths = record(task, slice(0, 26, 3))
        steps.append(hits_by_capacity(stack_distances(ids, lengths, 64), 64))
        assert 0.25 < next_token_reuse(ids, lengths, 64) < 0.31
    assert found[CAPACITIES[2:]] == pytest.approx(np.mean(steps, axis=0)[CAPACITIES[2:]], abs=0.05)


@needs_records
def test_hot_experts_learned_on_mixed_traffic() -> None:
    """Learned on every other sequence of four tasks, served on the rest: the law of mixed traffic within 2 points."""
    learned, served = np.zeros((26, 64)), np.zeros((26, 64))
    for task in ("law", "translation", "intent", "summary"):
        ids, lengths = record(task)
        odd = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
        learned, served = learned + counts(ids[:, ~odd]), served + counts(ids[:, odd])
    ordered = np.take_along_axis(served, np.argsort(-learned, axis=1), axis=1)
    real = (np.cumsum(ordered, axis=1) / served.sum(axis=1, keepdims=True)).mean(axis=0)
    predicted = np.array(hit_curve("static", 64, 6, skew="mixed"))
    assert predicted[CAPACITIES] == pytest.approx(real[[c - 1 for c in CAPACITIES]], abs=0.02)


def test_generation_repeats_more_than_prompts() -> None:
    """llama.cpp pull request 27861, 512 experts, ten per token: LRU hits 67 % with 64 slots and 81 % with 128."""
    found = np.array(hit_curve("lru", 512, 10, skew="mixed", reuse=REUSES["decode-reports"]))
    assert found[[64, 128]] == pytest.approx([0.67, 0.81], abs=0.04)
    assert (found >= np.array(hit_curve("lru", 512, 10, skew="mixed")) - 1e-9).all()


def test_compounding_misses() -> None:
    """Acceptance O2: a DeepSeek-V3 token needs 464 experts; 5 % misses of 42 MiB at 55 GB/s."""
    eight, one, none = np.full(1, 8.0), np.ones(1), np.zeros(1)
    work = LayerWork(eight, one, one, none, none, 42 * 2**20, 0.0, 0.0)
    tiers = Tiers(0.0, (Tier("dram", 55e9, 0.0, 1e15),), None)
    layer = demand(work, tiers, np.array([0.95, 0.05]))
    assert 58 * float(layer.total_s[0]) * 1e3 == pytest.approx(18.6, abs=0.05)
    assert 58 * float(layer.miss_bytes[0]) == pytest.approx(23.2 * 42 * 2**20)


def test_batches_lower_the_hit_rate() -> None:
    alone, four, many = (hit_curve("lru", 128, 8, tokens, "mixed")[64] for tokens in (1, 4, 32))
    assert alone > four > many > 0.4
    assert hit_curve("lru", 128, 8, 4096, "mixed")[64] == pytest.approx(0.5, abs=0.01)
    assert hit_curve("static", 128, 8, 4096, "mixed")[64] == pytest.approx(0.5, abs=0.01)


def test_union_of_a_batch_and_warm_start() -> None:
    ids = np.array([[[[0, 1]], [[1, 2]]]])
    assert union(ids, 4).tolist() == [[[True, True, True, False]]]
    hits = step_hits(union(ids, 4), np.array([[1.0, 2.0, 9.0, 3.0]]))
    assert hits.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3, 1])


def test_every_pick_is_new_even_when_nearly_all_are_taken() -> None:
    weights = np.array([[1000.0, 1.0, 1.0, 1.0]])
    ids = sample_ids(weights, 3, Reuse(0.9), 5, 40, np.random.default_rng(3))
    assert (np.sort(ids, axis=-1)[..., 1:] != np.sort(ids, axis=-1)[..., :-1]).all()
    assert (sample_ids(weights, 4, Reuse(0.5), 1, 3, np.random.default_rng(0)).sum(axis=-1) == 6).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 48), st.data())
def test_hit_rates_are_ordered(num_experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    tokens = data.draw(st.sampled_from([1, 3, 20]))
    weights = np.exp(np.random.default_rng(num_experts).normal(size=num_experts))
    q, slots = inclusion_from_weights(weights, top_k), np.arange(num_experts + 1)
    static, che = static_hits(q, slots, tokens), che_hits(q, slots, tokens)
    for rates in (static, che):
        assert rates[0] == 0.0 and rates[-1] == pytest.approx(1.0)
        assert (np.diff(rates) >= -1e-9).all()
    assert (static >= che - 1e-6).all()
    assert (che >= slots / num_experts - 1e-6).all()
    assert (needed(q, tokens) <= 1.0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["lru", "lfu"]))
def test_stack_distances_equal_a_plain_cache(seed: int, order: str) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, 4)
    ids = np.stack([[rng.permutation(6)[:2] for _ in range(lengths.sum())]])
    found = hits_by_capacity(stack_distances(ids, lengths, 6, order), 6)  # type: ignore[arg-type]
    for capacity in (1, 3, 5):
        hits, at = 0, 0
        for length in lengths:
            rank: dict[int, tuple[int, int]] = {}
            for clock, expert in enumerate(ids[0, at : at + length].ravel().tolist()):
                kept = sorted(rank, key=lambda e: rank[e], reverse=True)[:capacity]
                hits += expert in kept
                uses = rank[expert][0] + 1 if expert in rank and order == "lfu" else 0
                rank[expert] = (uses, clock)
            at += length
        assert found[capacity] == pytest.approx(hits / ids.size)


@pytest.mark.parametrize(
    ("ids", "lengths", "experts", "message"),
    [
        (np.zeros((1, 4, 2), int), [3], 8, "sum to 3"),
        (np.zeros((1, 4, 2), int), [4, 0], 8, "positive"),
        (np.full((1, 4, 2), 9), [4], 8, "another model"),
        (np.full((1, 4, 2), -1), [4], 8, "-1 is outside"),
        (np.full((1, 4, 2), np.nan), [4], 8, "integers"),
        (np.zeros((1, 0, 2), int), [], 8, "integers"),
        (np.zeros((4, 2), int), [4], 8, "integers"),
    ],
)
def test_bad_ids_are_named(ids: np.ndarray, lengths: list[int], experts: int, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        stack_distances(ids, lengths, experts)


def test_bad_questions() -> None:
    with pytest.raises(WorkloadError, match="no probability"):
        Reuse(1.0)
    with pytest.raises(WorkloadError, match="window 0"):
        Reuse(0.5, window_tokens=0)
    with pytest.raises(InputError, match="0 to 8"):
        static_hits(np.full(8, 0.25), 9)
    with pytest.raises(InputError, match="0 to 8"):
        che_hits(np.full(8, 0.25), 2.5)
    with pytest.raises(InputError, match="at least 1"):
        hit_curve("lru", 8, 2, 0)
    with pytest.raises(WorkloadError, match="unknown"):
        hit_curve("lru", 8, 2, 1, "sngle-domain")
    with pytest.raises(ModelConfigError, match="top_k=9"):
        hit_curve("static", 8, 9)
    with pytest.raises(InputError, match="num_experts 0"):
        stack_distances(np.zeros((1, 1, 1), int), [1], 0)
