"""The simulation against queueing theory (Kleinrock, Queueing Systems, volume 1), with timers of known cost."""

import numpy as np
import pytest

from planner.enginespec import EngineSpec
from planner.simulation import simulate
from planner.workload import Arrivals, Lengths, Workload

ONE_AT_A_TIME = EngineSpec(1, 1, 10_000, max_num_seqs=1)


class UnitStep:
    draw = 0
    link_s = 0.0

    def step_s(self, ranks):
        return 1.0


def run_single(arrivals, output, num_requests, seed=0):
    workload = Workload("theory", Lengths.fixed(1), output, arrivals, num_requests)
    return simulate(ONE_AT_A_TIME, UnitStep(), workload, seed=seed, record_steps=False)


def lindley_waits(gaps):
    """Waits of a single server with service 1 s and `gaps` [s] before each arrival: W' = max(0, W + 1 - gap)."""
    walk = np.concatenate([[0.0], np.cumsum(1.0 - gaps[1:])])
    return walk - np.minimum.accumulate(walk)


@pytest.mark.parametrize(("load", "wait"), [(0.5, 0.5), (0.8, 2.0), (0.9, 4.5)])
def test_md1_wait(load, wait):
    """M/D/1: W = rho s / (2 (1 - rho)), to 3 %.

    At rho 0.9 that needs millions of requests, so it is shown in two steps: the simulation follows Lindley's
    recursion request by request, and the recursion over the arrivals of a workload has the theoretical mean.
    """
    requests = run_single(Arrivals.poisson(load), Lengths.fixed(1), 10_000, seed=11).requests
    np.testing.assert_allclose(requests.queue_s, lindley_waits(np.diff(requests.arrival_s, prepend=0.0)), atol=1e-6)
    long_run_s = Arrivals.poisson(load).times(np.random.default_rng(11), 4_000_000)
    assert lindley_waits(np.diff(long_run_s, prepend=0.0)).mean() == pytest.approx(wait, rel=0.03)


def test_md1_wait_simulated():
    """The same at rho 0.5 from the simulation alone, where 60,000 requests have a standard error of 1 %."""
    requests = run_single(Arrivals.poisson(0.5), Lengths.fixed(1), 60_000, seed=11).requests
    assert requests.queue_s[3000:].mean() == pytest.approx(0.5, rel=0.03)


def test_mg1_wait_with_geometric_outputs():
    """Pollaczek-Khinchine: W = lambda E[S^2] / (2 (1 - rho)) with service = output tokens x 1 s, geometric, mean 8."""
    outputs = np.random.default_rng(5).geometric(1 / 8, 4000)
    rate = 0.7 / outputs.mean()
    requests = run_single(Arrivals.poisson(rate), Lengths.empirical(outputs.tolist()), 20_000, seed=3).requests
    expected_s = rate * (outputs.astype(float) ** 2).mean() / (2 * (1 - 0.7))
    assert requests.queue_s[1000:].mean() == pytest.approx(expected_s, rel=0.06)
    np.testing.assert_allclose(requests.e2e_s - requests.queue_s, requests.output_tokens, atol=1e-6)


def test_mdinf_batch_without_limit():
    """With unlimited batch a request waits half a step and then takes one step per token; the number in the system is
    Poisson with mean lambda x sojourn (M/G/infinity)."""
    workload = Workload("wide", Lengths.fixed(1), Lengths.fixed(50), Arrivals.poisson(2.0), 20_000)
    run = simulate(EngineSpec(1, 1, 10**6, max_num_seqs=1000), UnitStep(), workload)
    r = run.requests
    assert r.queue_s.mean() == pytest.approx(0.5, rel=0.02)
    np.testing.assert_allclose(r.tpot_s, 1.0)
    at_s = np.arange(200.0, 9000.0, 25.0)
    in_system = np.searchsorted(r.arrival_s, at_s) - np.searchsorted(np.sort(r.finish_s), at_s)
    assert in_system.mean() == pytest.approx(2.0 * r.e2e_s.mean(), rel=0.02)
    assert in_system.var() == pytest.approx(in_system.mean(), rel=0.2)


@pytest.mark.parametrize("arrivals", [Arrivals.poisson(4.0), Arrivals.gamma(4.0, 2.0), Arrivals.closed(40)])
def test_littles_law_between_the_two_tables(arrivals):
    """Decoding sequences seen by the steps = answered requests per second x mean time spent decoding, to 1 %."""

    class Timer:
        draw = 0
        link_s = 0.0

        def step_s(self, ranks):
            return 0.01 + 0.0005 * ranks[0].decode_seqs + 1e-5 * ranks[0].prefill_tokens

    workload = Workload("little", Lengths.lognormal(500, 0.7), Lengths.lognormal(200, 0.7), arrivals, 4000)
    summary = (run := simulate(EngineSpec(1, 1, 10**6), Timer(), workload, seed=2)).summary()
    kept = slice(summary.num_warmup, len(run.requests) - summary.num_cooldown)
    decoding_s = (run.requests.finish_s - run.requests.first_token_s)[kept].mean()
    in_decode = summary.mean_decode_seqs_per_rank * summary.busy_share
    arrival_rate = summary.num_measured / summary.window_s
    assert in_decode == pytest.approx(arrival_rate * decoding_s, rel=0.01)
    assert summary.requests_per_s == pytest.approx(arrival_rate, rel=0.01)
    assert summary.output_tok_per_s == pytest.approx(arrival_rate * run.requests.output_tokens[kept].mean(), rel=0.01)


def test_burstier_arrivals_wait_longer():
    """Kingman: the wait grows with (ca^2 + cs^2) / 2; cv 1 is Poisson."""
    waits = []
    for arrivals in (Arrivals.gamma(0.7, 0.3), Arrivals.gamma(0.7, 1.0), Arrivals.gamma(0.7, 2.0)):
        waits.append(run_single(arrivals, Lengths.fixed(1), 6000).requests.queue_s.mean())
    assert waits[0] < 0.5 * waits[1]
    assert waits[2] > 2.5 * waits[1]
    assert waits[1] == pytest.approx(0.7 / 0.6, rel=0.1)


def test_closed_loop_throughput_has_its_bounds():
    """N users of one server with service s: exactly 1 / s answers per second, each after N s (asymptotic bounds)."""
    requests = run_single(Arrivals.closed(5), Lengths.fixed(4), 100).requests
    np.testing.assert_allclose(np.diff(requests.finish_s), 4.0)
    np.testing.assert_allclose(requests.e2e_s[5:], 20.0)


def test_two_servers_share_a_queue_no_worse_than_apart():
    """Power of two choices and least requests wait less than blind round robin with random service times."""
    outputs = Lengths.empirical(np.random.default_rng(1).geometric(1 / 8, 1000).tolist())
    workload = Workload("w", Lengths.fixed(1), outputs, Arrivals.poisson(4 * 0.8 / outputs.mean), 3000)
    spec = EngineSpec(4, 1, 10_000, max_num_seqs=1)
    wait = {
        router: simulate(spec, UnitStep(), workload, router=router, record_steps=False).requests.queue_s.mean()
        for router in ("least_requests", "power_of_two", "round_robin")
    }
    assert wait["least_requests"] < wait["power_of_two"] < wait["round_robin"]


def test_single_server_confidence_interval_covers_the_md1_wait():
    """Intervals of 30 runs at rho 0.5 hold the true sojourn 1.5 s about 95 % of the time (28.5 of 30)."""
    covered = 0
    for seed in range(30):
        interval = run_single(Arrivals.poisson(0.5), Lengths.fixed(1), 1500, seed).summary().e2e_s.mean_interval
        covered += interval[0] <= 1.5 <= interval[1]
    assert covered >= 25
