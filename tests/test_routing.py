"""Expert routing against exact simulation, real records and the published arithmetic."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import InputError, LayoutError, ModelConfigError, WorkloadError
from planner.routing import (
    LogNormal,
    active_experts,
    assignment_variance,
    combine_bytes,
    dispatch_bytes,
    distinct_ranks,
    inclusion_from_load,
    inclusion_from_weights,
    named_skew,
    popularity,
    skew_for,
)


@pytest.mark.parametrize(("ranks", "expected"), [(8, 5.295), (16, 6.523), (32, 7.267), (64, 7.676), (128, 7.890)])
def test_distinct_ranks_is_hypergeometric(ranks: int, expected: float) -> None:
    assert distinct_ranks(256, 8, ranks) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("ranks", "expected"), [(8, 3.954), (16, 5.731), (32, 6.853), (64, 7.494)])
def test_group_limit_keeps_tokens_in_few_groups(ranks: int, expected: float) -> None:
    found = distinct_ranks(256, 8, ranks, num_groups=8, top_groups=4)
    assert found == pytest.approx(expected, abs=0.02)
    assert found <= distinct_ranks(256, 8, ranks)
    if ranks == 8:
        assert found <= 4


def test_node_limit_saves_a_quarter_of_the_node_links() -> None:
    limited, free = distinct_ranks(256, 8, 8, 8, 4) * 7 / 8, distinct_ranks(256, 8, 8) * 7 / 8
    assert free == pytest.approx(4.63, abs=0.01)
    assert 1 - limited / free == pytest.approx(0.25, abs=0.01)


def test_message_sizes_and_published_latencies() -> None:
    assert (dispatch_bytes(7168), combine_bytes(7168)) == (7392, 14336)
    assert (8 * dispatch_bytes(7168), 8 * combine_bytes(7168)) == (59136, 114688)
    assert dispatch_bytes(7168, "nvfp4") == 4032
    assert dispatch_bytes(7168, "mxfp8") == 7392
    assert dispatch_bytes(7168, "bf16") == combine_bytes(7168)
    # ISCA 2025 (arXiv 2505.09343) section 2.3.2: 1 byte out and 2 back per element, 9 copies, 61 layers, two batches.
    for hidden, bytes_per_s, round_trip_us, tok_per_s in ((7000, 50e9, 120.96, 67.76), (7168, 50e9, 123.86, 66.18)):
        seconds = (hidden + combine_bytes(hidden)) * 32 * 9 / bytes_per_s
        assert seconds * 1e6 == pytest.approx(round_trip_us, abs=5e-3)
        assert 1 / (seconds * 2 * 61) == pytest.approx(tok_per_s, abs=0.01)
    fast = (7000 + combine_bytes(7000)) * 32 * 9 / 900e9
    assert (fast * 1e6, 1 / (fast * 2 * 61)) == pytest.approx((6.72, 1219.8), rel=1e-4)
    # DeepEP low-latency mode, EP64, 128 tokens (docs/legacy.md): 173 and 314 us.
    assert 128 * 8 * dispatch_bytes(7168) / 173e-6 / 1e9 == pytest.approx(43.8, abs=0.05)
    assert 128 * 8 * combine_bytes(7168) / 314e-6 / 1e9 == pytest.approx(46.8, abs=0.06)


def test_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'fp9'.*fp8"):
        dispatch_bytes(7168, "fp9")


def test_variance_counts_picks_without_replacement() -> None:
    assert assignment_variance(8, 2, 8, tokens=64) == pytest.approx(12.0)
    assert assignment_variance(4, 4, 2, tokens=9) == 0.0


def test_active_experts_uniform_formula() -> None:
    uniform = np.full(256, 8 / 256)
    assert float(active_experts(64, uniform)) == pytest.approx(222.4, abs=0.05)
    assert active_experts([0, 1], uniform) == pytest.approx([0.0, 8.0])
    assert active_experts([8, 16, 32], np.full(64, 6 / 64)) == pytest.approx([34.9, 50.8, 61.3], abs=0.05)
    assert float(active_experts(1, np.ones(4))) == pytest.approx(4.0)


def test_active_experts_of_mixed_traffic_match_records() -> None:
    """DeepSeek-V2-Lite, four ESFT tasks mixed, mean over 26 layers: 6, 11.3, 20.1, 32.7, 47.0, 57.6, 62.6, 63.8."""
    q = 6 * popularity(64, 6, "mixed", layers=26, seed=1)
    found = active_experts([1, 2, 4, 8, 16, 32, 64, 128], q)
    assert found.shape == (26, 8)
    assert found.mean(axis=0) == pytest.approx([6, 11.3, 20.1, 32.7, 47.0, 57.6, 62.6, 63.8], rel=0.015)


def test_wrong_questions_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"ep=24 does not divide 64 experts\. Use 16 or 32"):
        distinct_ranks(64, 6, 24)
    with pytest.raises(WorkloadError, match=r"'mixd'.*mixed"):
        named_skew("mixd")
    for wrong in ("zipf:x", "zipf:-1", "dirichlet:0", "lognormal:9", "powerlaw:1@0", "hash:nan"):
        with pytest.raises(WorkloadError, match="is not a number"):
            named_skew(wrong)
    with pytest.raises(WorkloadError, match=r"sigma 0\.9 to 0\.1"):
        LogNormal("odd", 0.9, 0.1)
    with pytest.raises(ModelConfigError, match="top_k=9 of 8"):
        popularity(8, 9, "mixed")
    with pytest.raises(ModelConfigError, match="1 of 8 groups"):
        distinct_ranks(64, 10, 8, num_groups=8, top_groups=1)
    with pytest.raises(WorkloadError, match="positive"):
        inclusion_from_load([1.0, 0.0, 2.0], 1)


def test_traffic_class_follows_phase_and_model() -> None:
    assert skew_for(256, "decode").name == "mixed"
    assert skew_for(256, "prefill").name == "single-domain"
    assert skew_for(8, "prefill").name == "aux-balanced-8-experts"


def test_popularity_is_lognormal_with_the_asked_spread() -> None:
    share = popularity(4096, 1, LogNormal("fixed", 0.5, 0.5), layers=8, seed=3)
    spread = share.std(axis=1) / share.mean(axis=1)
    assert np.sqrt(np.log1p(spread**2)) == pytest.approx(np.full(8, 0.5), rel=0.08)
    assert popularity(32, 4, "uniform") == pytest.approx(np.full((1, 32), 1 / 32))
    assert (popularity(32, 4, "mixed", 3, seed=5) == popularity(32, 4, "mixed", 3, seed=5)).all()
    assert (popularity(32, 4, "mixed", 3, seed=5) != popularity(32, 4, "mixed", 3, seed=6)).any()


def test_draws_without_replacement_match_enumeration_and_sampling() -> None:
    weights = np.array([5.0, 4.0, 3.0, 2.0, 1.0]) / 15
    exact = np.zeros(5)
    for i, j in permutations(range(5), 2):
        exact[[i, j]] += weights[i] * weights[j] / (1 - weights[i])
    assert inclusion_from_weights(weights, 2) == pytest.approx(exact, abs=0.02)
    many = np.exp(0.5 * np.random.default_rng(0).standard_normal(64))
    keys = np.log(many) + np.random.default_rng(1).gumbel(size=(20_000, 64))
    sampled = np.bincount(np.argpartition(-keys, 5, axis=1)[:, :6].ravel(), minlength=64) / 20_000
    assert inclusion_from_weights(many, 6) == pytest.approx(sampled, abs=0.01)
    assert (inclusion_from_weights(weights, 5) == 1.0).all()


loads = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=24)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(load=loads, data=st.data())
def test_inclusion_conserves_picks(load: list[float], data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, len(load)))
    order = np.argsort(load)
    for q in (inclusion_from_load(load, top_k), inclusion_from_weights(load, top_k)):
        assert float(q.sum()) == pytest.approx(top_k, rel=1e-9)
        assert q.min() >= 0 and q.max() <= 1
        assert (np.diff(q[order]) >= -1e-12).all()


@pytest.mark.parametrize(
    ("shape", "tokens", "cv", "ep"),
    [
        ((256, 8, 1.01), 128, 1.17, (1.30, 1.55, 1.98)),
        ((256, 8, 1.01), 8192, 1.88, (1.51, 1.97, 2.70)),
        ((256, 8, 1.2), 8192, 2.73, (1.78, 2.52, 3.77)),
        ((128, 8, 1.2), 1024, 2.02, (1.80, 2.50, 3.78)),
        ((64, 6, 1.01), 1024, 1.55, (1.86, 2.70, 4.10)),
    ],
)
def test_power_law_reproduces_what_aiconfigurator_generates(
    shape: tuple[int, int, float], tokens: int, cv: float, ep: tuple[float, ...]
) -> None:
    num_experts, top_k, alpha = shape
    share = popularity(num_experts, top_k, f"powerlaw:{alpha}@{tokens}", layers=400, seed=1)
    assert (share.std(axis=1) / share.mean(axis=1)).mean() == pytest.approx(cv, rel=0.02)
    for ranks, expected in zip((8, 16, 32), ep, strict=True):
        rank = share.reshape(400, ranks, -1).sum(axis=-1)
        assert (rank.max(axis=1) / rank.mean(axis=1)).mean() == pytest.approx(expected, rel=0.04)


def test_other_laws_have_their_published_shape() -> None:
    zipf = np.sort(popularity(64, 1, "zipf:1", seed=1)[0])[::-1]
    assert zipf[0] / zipf[9] == pytest.approx(10)
    # Dirichlet share: Var p = (1/E)(1 - 1/E)/(alpha E + 1) (handbook serving 7.6).
    share = popularity(64, 1, "dirichlet:3", layers=400, seed=2)
    assert share.var() == pytest.approx((1 / 64) * (1 - 1 / 64) / (3 * 64 + 1), rel=0.05)
    hashed = popularity(64, 1, "hash", layers=4, seed=3)
    assert hashed.max() > 3 / 64 and hashed.min() > 0
    assert popularity(64, 4, "lognormal:0.5", layers=2).shape == (2, 64)
