"""Loads of ranks: against token-by-token simulation, real records, and what cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.capacity import CapacityLimit
from planner.errors import LayoutError, WorkloadError
from planner.loads import KNOTS, Question, load_table, nearest_knot, rank_load, traffic
from planner.routing import (
    PROMPT_SPREAD,
    SKEWS,
    UNIFORM,
    LogNormal,
    Selection,
    exact_counts,
    fast_counts,
    named_skew,
    popularity,
)


def question(num_experts, top_k, ranks, skew="mixed", **more):
    law = skew if isinstance(skew, LogNormal) else named_skew(skew)
    return Question(num_experts, Selection(top_k), law, ranks, **more)


def ratio(num_experts, top_k, ranks, tokens, skew="mixed"):
    return load_table(question(num_experts, top_k, ranks, skew)).max_over_mean(tokens)


@pytest.mark.parametrize(("ep", "expected"), [(8, 1.27), (16, 1.54), (32, 1.96)])
def test_mixed_skew_matches_records(ep, expected):
    assert float(ratio(64, 6, ep, 33_000)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("ep", "expected"), [(8, (1.34, 1.29, 1.28, 1.27)), (16, (1.64, 1.57, 1.55, 1.54)), (32, (2.13, 2.01, 1.97, 1.96))]
)
def test_batch_noise_on_top_of_skew(ep, expected):
    assert ratio(64, 6, ep, [64, 256, 1024, 4096]) == pytest.approx(expected, rel=0.02)


def test_single_domain_and_eight_expert_classes_match_records():
    """Means of law, summary, intent, translation on DeepSeek-V2-Lite; Mixtral-8x7B over five domains."""
    assert float(ratio(64, 6, 8, 1e6, "single-domain")) == pytest.approx(1.48, rel=0.03)
    assert float(ratio(64, 6, 16, 1e6, "single-domain")) == pytest.approx(1.92, rel=0.03)
    assert float(ratio(64, 6, 32, 1e6, "single-domain")) == pytest.approx(2.76, rel=0.03)
    assert float(ratio(8, 2, 8, 1e6, "aux-balanced-8-experts")) == pytest.approx(1.18, rel=0.02)


def test_a_prompt_of_mixed_traffic_is_as_skewed_as_a_single_domain():
    for ranks in (8, 16, 32):
        prompts = load_table(question(64, 6, ranks, prompt_spread=PROMPT_SPREAD))
        assert float(prompts.max_over_mean(1e6)) == pytest.approx(
            float(ratio(64, 6, ranks, 1e6, "single-domain")), rel=0.06
        )
    assert traffic(64, "prefill", None) == (SKEWS["mixed"], PROMPT_SPREAD)
    assert traffic(8, "prefill", None) == (SKEWS["aux-balanced-8-experts"], None)
    assert traffic(64, "prefill", UNIFORM) == (UNIFORM, None)


@pytest.mark.parametrize(
    ("ranks", "per_rank", "expected"),
    # The handbook's 8 x 8 entry, 1.158, is 1.8 % low: 30,000 exact simulations give 1.1789 +- 0.0004.
    [(8, 8, 1.1789), (8, 128, 1.044), (32, 128, 1.070), (64, 128, 1.071), (128, 8, 1.316), (128, 128, 1.085)],
)
def test_uniform_maximum_matches_handbook(ranks, per_rank, expected):
    assert float(ratio(256, 8, ranks, ranks * per_rank, "uniform")) == pytest.approx(expected, rel=0.015)


def maxima(counts, ranks):
    """Busiest rank and most active experts [2, sizes, draws, layers] of counts [sizes, draws, layers, experts]."""
    parts = counts.reshape(*counts.shape[:-1], ranks, -1)
    return np.array([parts.sum(-1).max(-1), (parts > 0).sum(-1).max(-1)])


SHAPES = [(8, 1), (8, 2), (16, 1), (64, 6), (128, 8), (256, 32), (512, 10)]
LIMITED = [(256, 8, 8, 4), (256, 8, 8, 2), (160, 6, 8, 3)]


def compare(selection, num_experts, skew, sizes):
    """Ratios of fast to exact maxima by ranks, their noise, and both counts."""
    q = selection.top_k * popularity(num_experts, selection.top_k, skew, 4, seed=3)
    draws = min(max(20, 8192 // num_experts), 256)
    exact = exact_counts(q, selection, sizes, draws, np.random.default_rng(1))
    fast = fast_counts(q, selection, sizes, 4 * draws, np.random.default_rng(2))
    for counts in (exact, fast):
        assert (counts.sum(axis=-1) == np.array(sizes)[:, None, None] * selection.top_k).all()
        assert (counts == np.rint(counts)).all() and counts.min() >= 0 and (counts.max(axis=(1, 2, 3)) <= sizes).all()
    found = []
    for ranks in (2, 8, 32, 128):
        if num_experts % ranks == 0:
            wanted, ours = maxima(exact, ranks), maxima(fast, ranks).mean(axis=(2, 3))
            noise = 3.5 * wanted.std(axis=2).mean(axis=2) / np.sqrt(draws * 4)
            found.append(np.array([ours, noise]) / wanted.mean(axis=(2, 3)))
    return q, exact, found


@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
@pytest.mark.parametrize("skew", ["uniform", "single-domain", "zipf:1"])
def test_fast_sampler_follows_the_exact_one(num_experts, top_k, skew):
    """Beyond what the samples scatter, T 16 to 320: within 0.5 % for one pick, whose shares are exact, else 1.5 %.

    Pareto sampling of few skewed experts keeps their shares within 3.5 % (two of eight, Zipf).
    """
    q, exact, found = compare(Selection(top_k), num_experts, skew, [16, 64, 320])
    for ratios, noise in found:
        assert (abs(ratios - 1) <= (0.005 if top_k == 1 else 0.015) + noise).all(), (ratios, noise)
    drawn = exact[-1].mean(axis=0) / 320
    allowed = 4 * np.sqrt(q / 320 / exact.shape[1]) + (0.0 if top_k == 1 else 0.035) * q
    assert (abs(drawn - q) <= allowed).all()


@pytest.mark.parametrize(("num_experts", "top_k", "groups", "top_groups"), LIMITED)
@pytest.mark.parametrize("skew", ["uniform", "mixed"])
def test_fast_sampler_follows_the_exact_one_under_a_group_limit(num_experts, top_k, groups, top_groups, skew):
    """Both aim at the same shares: the exact one by the preferences of its router."""
    selection = Selection(top_k, groups, top_groups)
    q, exact, found = compare(selection, num_experts, skew, [16, 64, 256])
    for ratios, noise in found:
        assert (abs(ratios - 1) <= 0.02 + noise).all(), (ratios, noise)
    drawn, aimed = ((x.reshape(4, groups, -1).sum(axis=-1)) for x in (exact[-1].mean(axis=0) / 256, q))
    assert abs(drawn / aimed - 1).mean() < 0.025


def test_spread_of_experts_is_that_of_picks_without_replacement():
    """Variance q (1 - q) per token and expert, whatever the popularity, and no spread in their sum."""
    q = 2 * popularity(8, 2, "single-domain", 2, seed=1)
    counts = fast_counts(q, Selection(2), [4000], 4000, np.random.default_rng(0))[0]
    assert counts.var(axis=0) / 4000 == pytest.approx(q * (1 - q), rel=0.08)
    assert counts.mean(axis=0) / 4000 == pytest.approx(q, abs=0.001)


def test_fast_sampler_follows_the_exact_one_in_large_steps():
    q = 4 * popularity(32, 4, "mixed", 2, seed=5)
    exact, fast = (
        sample(q, Selection(4), [4096, 16384], 6, np.random.default_rng(1)) for sample in (exact_counts, fast_counts)
    )
    for ranks in (2, 8, 32):
        ours, wanted = (maxima(counts, ranks).mean(axis=(2, 3)) for counts in (fast, exact))
        assert ours == pytest.approx(wanted, rel=0.02)


def test_adaptive_top_k_keeps_the_mean_and_widens_the_total():
    q = 6 * popularity(64, 6, "uniform", 2)
    sizes = [8, 64]
    for sample in (exact_counts, fast_counts):
        plain = sample(q, Selection(6), sizes, 200, np.random.default_rng(0)).sum(axis=-1)
        varied = sample(q, Selection(6, spread=1.5), sizes, 200, np.random.default_rng(0)).sum(axis=-1)
        assert varied.mean(axis=(1, 2)) == pytest.approx([48, 384], rel=0.03)
        assert varied[1].std() > 1.15 * plain[1].std()


def test_the_same_whatever_else_is_asked():
    table = load_table(question(128, 8, 16))
    together, alone = rank_load(table, np.arange(1, 400)), rank_load(table, 77)
    assert float(alone.max_assignments) == together.max_assignments[76]
    assert float(alone.active_on_busiest) == together.active_on_busiest[76]


def test_one_rank_and_no_tokens():
    load = rank_load(load_table(question(64, 6, 1)), [0, 1, 100])
    assert load.max_assignments == pytest.approx([0, 6, 600], rel=0.02)
    assert load.active_on_busiest[:2] == pytest.approx([0, 6], abs=1e-6)
    everything = rank_load(load_table(question(4, 4, 2)), [3, 50])
    assert everything.max_assignments == pytest.approx([6, 100])
    assert everything.active_on_busiest == pytest.approx([2, 2])


def test_wrong_questions_are_refused():
    with pytest.raises(LayoutError, match="24"):
        load_table(question(64, 6, 24))
    with pytest.raises(WorkloadError, match="-1"):
        rank_load(load_table(question(64, 6, 8)), [4, -1])


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    ranks_log2=st.integers(0, 5),
    local=st.integers(1, 6),
    top_k=st.integers(1, 8),
    skew=st.sampled_from(sorted(SKEWS)),
    tokens=st.integers(1, 5000),
)
def test_rank_load_stays_within_physical_bounds(ranks_log2, local, top_k, skew, tokens):
    ranks = 2**ranks_log2
    top_k = min(top_k, ranks * local)
    sizes = np.array([tokens, 2 * tokens])
    load = rank_load(load_table(question(ranks * local, top_k, ranks, skew)), sizes)
    assert load.mean_assignments == pytest.approx(sizes * top_k / ranks)
    assert (load.max_assignments >= load.mean_assignments * (1 - 0.02)).all()
    assert (load.max_assignments <= sizes * min(top_k, local) * (1 + 0.02)).all()
    assert (load.active_on_busiest <= local + 1e-6).all()
    assert (np.diff(load.max_assignments) >= 0).all() and (np.diff(load.active_on_busiest) >= -1e-6).all()
    assert (np.diff(load.max_assignments / load.mean_assignments) <= 0.03).all()


def test_more_skew_is_never_better():
    ratios = [float(ratio(128, 8, 16, 512, LogNormal("s", s, s))) for s in (0.0, 0.2, 0.4, 0.8, 1.2)]
    assert ratios == sorted(ratios)


def test_balancing_and_copies_level_the_ranks_but_not_the_noise():
    """Held-out gains of routing.md section 4 at EP32 of 64: contiguous 1.96, greedy 1.52, one copy per rank 1.17."""
    plain, greedy, copies = (
        load_table(question(64, 6, 32, placement=policy, redundant=r))
        for policy, r in (("contiguous", 0), ("greedy", 0), ("greedy", 32))
    )
    many = [float(t.max_over_mean(1e6)) for t in (plain, greedy, copies)]
    assert many[:2] == pytest.approx([1.96, 1.52], rel=0.06)
    assert many[2] < 1.05  # no shift between halves here, which leaves 1.17 in the records
    # Sampling noise of 1024 and 64 tokens under the best placement: 1.21 and 1.54 (B of all ranks together).
    assert float(greedy.max_over_mean(64)) > 1.15 * many[1]
    assert float(copies.max_over_mean([64])[0]) == pytest.approx(1.54, rel=0.12)


def test_a_prompt_is_not_what_its_placement_was_learned_on():
    mixed = load_table(question(64, 6, 8, placement="greedy"))
    prompt = load_table(question(64, 6, 8, placement="greedy", prompt_spread=PROMPT_SPREAD))
    assert float(mixed.max_over_mean(4096)) < 1.05
    assert 1.25 < float(prompt.max_over_mean(4096)) < 1.6


def test_capacity_caps_the_busiest_rank_and_counts_what_falls():
    free = load_table(question(64, 1, 64, "single-domain"))
    capped = load_table(question(64, 1, 64, "single-domain", limit=CapacityLimit("mesh-tf", 1.0, padded=False)))
    knot = KNOTS.index(1024)
    assert capped.max_assigned[knot].max() <= 1024 // 64
    assert free.drop_rate[knot].max() == 0
    assert 0.15 < capped.drop_rate[knot].mean() < 0.45
    assert capped.fully_dropped_rate[knot] == pytest.approx(capped.drop_rate[knot])  # one choice per token
    padded = load_table(question(64, 1, 64, "single-domain", limit=CapacityLimit("mesh-tf", 4.0, padded=True)))
    assert (padded.max_assigned[knot] >= 64).all()


def test_knots_are_found_on_a_logarithmic_scale():
    assert [KNOTS[i] for i in nearest_knot([0, 1, 5, 20, 100, 10**9])] == [1, 1, 6, 16, 128, KNOTS[-1]]
