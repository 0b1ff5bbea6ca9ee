import dataclasses
import math

import numpy as np
import pytest

from planner.enginespec import EngineSpec
from planner.errors import InputError
from planner.metrics import METRICS, Summary, latency_statistics, steady_range
from planner.simulation import simulate
from planner.workload import Arrivals, Lengths, Workload, parse_slo


class ConstantTimer:
    draw = 0
    link_s = 0.0

    def step_s(self, ranks):
        return 0.02


SPEC = EngineSpec(1, 1, 100_000, max_num_seqs=32)


def run(arrivals, num_requests=1000, output=50, spec=SPEC, **options):
    workload = Workload("m", Lengths.fixed(100), Lengths.fixed(output), arrivals, num_requests)
    return simulate(spec, ConstantTimer(), workload, **options)


def test_statistics_of_known_values():
    s = latency_statistics(np.append(np.arange(1.0, 1001.0), np.nan))
    assert (s.num, s.mean, s.p50) == (1000, 500.5, 500.5)
    assert (s.p90, s.p95, s.p99) == pytest.approx((900.1, 950.05, 990.01))
    assert s.value("p95") == s.p95
    with pytest.raises(InputError, match="unknown statistic"):
        s.value("num")


def test_too_few_values_have_no_interval():
    few = latency_statistics(np.arange(49.0))
    assert math.isnan(few.mean_interval[0])
    assert few.mean == 24.0
    none = latency_statistics(np.full(5, np.nan))
    assert none.num == 0
    assert math.isnan(none.p99)


@pytest.mark.parametrize(("count", "correlation"), [(60, 0.0), (250, 0.0), (2000, 0.0), (2000, 0.8)])
def test_intervals_cover_the_truth(count, correlation):
    """300 first-order autoregressive series with mean 10: about 95 % of the intervals of the mean hold it."""
    rng = np.random.default_rng(4)
    noise = rng.normal(size=(300, count)) * math.sqrt(1 - correlation**2)
    series = np.zeros_like(noise)
    series[:, 0] = rng.normal(size=300)
    for i in range(1, count):
        series[:, i] = correlation * series[:, i - 1] + noise[:, i]
    intervals = [latency_statistics(10 + row).mean_interval for row in series]
    assert 0.90 <= np.mean([low <= 10 <= high for low, high in intervals]) <= 0.985


def test_p95_interval_covers_the_truth():
    rng = np.random.default_rng(6)
    truth = -math.log(0.05)
    intervals = [latency_statistics(rng.exponential(size=4000)).p95_interval for _ in range(200)]
    assert 0.90 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.99


def test_summary_lists_every_metric():
    summary = run(Arrivals.poisson(10)).summary()
    values = summary.values()
    assert list(values) == list(METRICS)
    assert values["ttft_p95_s"] == summary.ttft_s.p95
    assert all(math.isfinite(v) for v in values.values())
    for name, metric in METRICS.items():
        assert metric.better in {"lower", "higher", "none"}
        assert metric.label
        assert name.endswith("_s") == (metric.unit in {"s", "tok/s", "1/s"})


def test_rates_by_hand():
    """10 requests/s of 100 in and 50 out; 50 steps of 20 ms each, so about 10 sequences decode at a time."""
    summary = run(Arrivals.poisson(10), 3000).summary()
    arrived = summary.num_measured / summary.window_s
    assert summary.requests_per_s == pytest.approx(arrived, rel=0.01)
    assert summary.output_tok_per_s == pytest.approx(50 * arrived, rel=0.01)
    assert summary.total_tok_per_s == pytest.approx(150 * arrived, rel=0.01)
    assert summary.mean_decode_seqs_per_rank * summary.busy_share == pytest.approx(0.98 * arrived, rel=0.02)
    assert summary.tpot_s.p99 == pytest.approx(0.02)
    assert 0 < summary.kv_utilisation < summary.kv_utilisation_peak < 1
    assert summary.saturation == "stable"


def test_goodput_and_objectives():
    simulation = run(Arrivals.poisson(25))
    kept = simulation.summary(parse_slo("ttft_p95=1s,tpot_p99=21ms,e2e_mean=10s"))
    assert kept.meets_slo
    assert kept.slo_attainment == 1.0
    assert kept.goodput_requests_per_s == kept.requests_per_s
    broken = simulation.summary(parse_slo("ttft_p95=30ms"))
    ttft_s = simulation.requests.ttft_s[broken.num_warmup : len(simulation.requests) - broken.num_cooldown]
    assert broken.slo_attainment == pytest.approx((ttft_s <= 0.03).mean())
    assert 0 < broken.goodput_requests_per_s < broken.requests_per_s
    assert not broken.meets_slo
    assert broken.objectives[0].value_s == broken.ttft_s.p95 > 0.03


def test_single_token_answers_keep_any_tpot_promise():
    summary = run(Arrivals.poisson(5), output=1).summary(parse_slo("tpot_p95=1us"))
    assert summary.meets_slo
    assert summary.slo_attainment == 1.0


@pytest.mark.parametrize(
    ("rate", "verdict"), [(5, "stable"), (20, "stable"), (31.0, "backlogged"), (36, "overloaded"), (100, "overloaded")]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_saturation_verdict(rate, verdict, seed):
    """32 places of 50 or 51 steps x 20 ms answer at most 32 requests per second."""
    assert run(Arrivals.poisson(rate), 4000, seed=seed).summary().saturation == verdict


def test_closed_loop_verdict():
    assert run(Arrivals.closed(16), 500).summary().saturation == "stable"
    assert run(Arrivals.closed(160), 2000).summary().saturation == "backlogged"


def test_overload_does_not_meet_even_a_lax_slo():
    summary = run(Arrivals.poisson(100), 2000).summary(parse_slo("e2e_p99=1000s"))
    assert summary.objectives[0].is_met
    assert not summary.meets_slo


def test_steady_range():
    open_loop = run(Arrivals.poisson(10)).requests
    assert steady_range(open_loop, None)[0] == 100
    cut = open_loop.arrival_s[-1] - open_loop.e2e_s.mean()
    assert steady_range(open_loop, None)[1] == (open_loop.arrival_s <= cut).sum()
    closed = run(Arrivals.closed(10), 100).requests
    assert steady_range(closed, 10) == (20, 90)
    assert steady_range(closed, 30) == (0, 100)
    assert steady_range(run(Arrivals.trace([0.0]), 100).requests, None) == (0, 100)
    assert steady_range(run(Arrivals.poisson(10), 19).requests, None) == (0, 19)
    assert steady_range(closed, 10, warmup=0) == (0, 100)
    assert steady_range(closed, 10, warmup=0.25) == (25, 100)
    with pytest.raises(InputError, match="share in"):
        steady_range(closed, 10, warmup=1.0)


def test_warmup_zero_measures_the_whole_run():
    simulation = run(Arrivals.closed(64), 640)
    summary = simulation.summary(warmup=0)
    assert summary.num_measured == 640
    assert summary.window_s == pytest.approx(simulation.simulated_s)
    assert summary.output_tok_per_s == pytest.approx(640 * 50 / simulation.simulated_s)
    assert summary.requests_per_s == pytest.approx(640 / simulation.simulated_s)
    assert summary.ttft_s.mean == pytest.approx(simulation.requests.ttft_s.mean())


def test_warmup_removal_removes_the_ramp():
    """An empty engine is fast at first: measuring everything flatters a slow fill."""
    workload = Workload("slow", Lengths.fixed(100), Lengths.fixed(500), Arrivals.poisson(10), 1500)

    class Growing:
        draw = 0
        link_s = 0.0

        def step_s(self, ranks):
            return 0.005 + 0.0002 * ranks[0].decode_seqs

    simulation = simulate(EngineSpec(1, 1, 10**6, max_num_seqs=512), Growing(), workload)
    steady, whole = simulation.summary(), simulation.summary(warmup=0)
    assert steady.num_warmup > 0
    assert steady.num_cooldown > 0
    assert steady.tpot_s.mean > whole.tpot_s.mean


def test_without_steps_engine_use_is_unknown():
    summary = run(Arrivals.poisson(10), record_steps=False).summary()
    assert math.isnan(summary.kv_utilisation)
    assert math.isfinite(summary.output_tok_per_s)


def test_preemptions_are_counted():
    summary = run(Arrivals.closed(32), 300, output=200, spec=EngineSpec(1, 1, 4000)).summary(warmup=0)
    assert summary.num_preemptions > 0
    assert summary.kv_utilisation_peak > 0.9


def test_everything_rejected_is_a_summary_too():
    summary = run(Arrivals.poisson(10), 50, spec=EngineSpec(1, 1, 64)).summary(parse_slo("ttft_p95=1s"))
    assert summary.num_rejected == 50
    assert summary.slo_attainment == 0.0
    assert not summary.meets_slo


def test_summary_is_frozen():
    summary = run(Arrivals.poisson(10), 50).summary()
    with pytest.raises(dataclasses.FrozenInstanceError):
        summary.window_s = 0.0
    assert isinstance(summary, Summary)
