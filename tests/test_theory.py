"""The simulation against queueing theory (Kleinrock, Queueing Systems, volume 1), with timers of known cost."""

import math

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


T_999 = 3.66
"""Half-width of a 99.9 % interval in standard errors, from 30 independent runs (Student, 29 degrees of freedom)."""


class Exponential(UnitStep):
    """Steps of exponential length with mean 1 s: with batches of one and answers of one token, service times."""

    def __init__(self, seed):
        self.rng = np.random.default_rng([seed, 77])

    def step_s(self, ranks):
        return self.rng.exponential()


class PerToken(UnitStep):
    """Every token of a step takes as long as it would alone: the ranks share their pace among the sequences."""

    def __init__(self, token_s):
        self.token_s = token_s

    def step_s(self, ranks):
        return self.token_s * sum(rank.decode_seqs + rank.prefill_tokens for rank in ranks)


def means_of_runs(run, value, skip):
    """Mean of `value` of the requests after the first `skip`, in 30 runs of different seeds."""
    return np.array([value(run(seed).requests)[skip:].mean() for seed in range(30)])


def assert_within_999(means, expected):
    error = means.std(ddof=1) / np.sqrt(len(means))
    assert abs(means.mean() - expected) <= T_999 * error, (means.mean(), expected, error)
    assert T_999 * error < 0.25 * expected, "the interval is too wide to say anything"


def served_exponentially(arrivals, num_requests):
    def run(seed):
        workload = Workload("exponential", Lengths.fixed(1), Lengths.fixed(1), arrivals, num_requests)
        return simulate(ONE_AT_A_TIME, Exponential(seed), workload, seed=seed, record_steps=False)

    return run


@pytest.mark.parametrize("load", [pytest.param(0.3, marks=pytest.mark.slow), 0.6])
def test_mm1_wait_is_within_its_interval(load):
    """M/M/1: W = rho / (mu - lambda), and the sojourn is exponential with rate mu - lambda."""
    run = served_exponentially(Arrivals.poisson(load), 1000)
    assert_within_999(means_of_runs(run, lambda r: r.queue_s, 200), load / (1 - load))
    assert_within_999(means_of_runs(run, lambda r: r.e2e_s > 1 / (1 - load), 200), np.exp(-1.0))


@pytest.mark.parametrize(("cv", "load"), [(0.5, 0.6), pytest.param(2.0, 0.5, marks=pytest.mark.slow)])
def test_renewal_input_wait_is_within_its_interval(cv, load):
    """GI/M/1 with gamma gaps: W = sigma / (mu (1 - sigma)), sigma the root of sigma = A*(mu - mu sigma)."""
    shape = cv**-2
    sigma = 0.5
    for _ in range(500):
        sigma = (1 + (1 - sigma) / (shape * load)) ** -shape
    run = served_exponentially(Arrivals.gamma(load, cv), 1200)
    assert_within_999(means_of_runs(run, lambda r: r.queue_s, 300), sigma / (1 - sigma))


@pytest.mark.parametrize("arrivals", [Arrivals.poisson(3.0), Arrivals.gamma(3.0, 0.4), Arrivals.gamma(3.0, 2.5)])
def test_arrivals_are_renewals_within_their_interval(arrivals):
    """Gaps have their mean and variation, and no memory: rate, cv and the count in an interval, each to 99.9 %."""
    cv, runs = arrivals.cv if arrivals.kind == "gamma" else 1.0, 30
    gaps = [np.diff(arrivals.times(np.random.default_rng(seed), 4000)) for seed in range(runs)]
    assert_within_999(np.array([g.mean() for g in gaps]), 1 / 3)
    # The sample variance is unbiased, the sample deviation is not.
    assert_within_999(np.array([g.var(ddof=1) for g in gaps]), (cv / 3) ** 2)
    lag = np.array([np.corrcoef(g[1:], g[:-1])[0, 1] for g in gaps])
    assert abs(lag.mean()) <= T_999 * lag.std(ddof=1) / np.sqrt(runs)
    # Renewal theorem: variance of the count in a long window is cv^2 times its mean.
    counts = np.array([np.bincount((np.cumsum(g) // 40).astype(int))[:-1] for g in gaps], dtype=object)
    assert_within_999(np.array([c.var(ddof=1) for c in counts]), 120 * cv**2)


@pytest.mark.slow
@pytest.mark.parametrize(("servers", "load"), [(2, 0.6), (4, 0.75)])
def test_mmc_wait_is_within_its_interval(servers, load):
    """M/M/c: Erlang C. Slots of a batch are servers with one queue; answers of geometric length, 1/40 s a token.

    In discrete time a request also waits half a step, and squared variation of the service is 1 - 1/40.
    """
    mean, step_s = 40, 1 / 40
    outputs = np.random.default_rng(9).geometric(1 / mean, 4000)
    service_s = outputs.mean() * step_s
    offered = servers * load

    class Fixed(UnitStep):
        def step_s(self, ranks):
            return step_s

    def run(seed):
        arrivals = Arrivals.poisson(offered / service_s)
        workload = Workload("mmc", Lengths.fixed(1), Lengths.empirical(outputs.tolist()), arrivals, 700)
        spec = EngineSpec(1, 1, 10**6, max_num_seqs=servers)
        return simulate(spec, Fixed(), workload, seed=seed, record_steps=False)

    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) / (1 - load)
    erlang_c = last / (sum(terms) + last)
    variation = (outputs.astype(float) ** 2).mean() / outputs.mean() ** 2 - 1
    expected_s = erlang_c * service_s / (servers * (1 - load)) * (1 + variation) / 2 + step_s / 2
    assert_within_999(means_of_runs(run, lambda r: r.queue_s, 150), expected_s)


SIZES = (20, 20, 20, 20, 20, 20, 20, 20, 20, 220)
"""Answers of 20 or 220 tokens, 40 on average, squared variation 2.25."""


def shared_pace(max_num_seqs, load, num_requests=700):
    token_s = 1 / 40

    def run(seed):
        arrivals = Arrivals.poisson(load)
        workload = Workload("ps", Lengths.fixed(1), Lengths.empirical(list(SIZES)), arrivals, num_requests)
        spec = EngineSpec(1, 1, 10**6, max_num_seqs=max_num_seqs)
        return simulate(spec, PerToken(token_s), workload, seed=seed, record_steps=False)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("size", [20, 220])
def test_processor_sharing_is_fair_and_insensitive(size):
    """M/G/1-PS: a request of size x stays x / (1 - rho) whatever the sizes of the others (Kleinrock vol. 2, 4.4)."""
    load, runs = 0.5, shared_pace(512, 0.5)
    means = []
    for seed in range(30):
        r = runs(seed).requests
        chosen = (r.output_tokens == size) & (np.arange(len(r)) >= 100)
        means.append(r.e2e_s[chosen].mean())
    # Joining takes the rest of the step under way: half a token of everybody present, rho / (1 - rho) of them.
    joining_s = 0.5 / 40 * load / (1 - load)
    assert_within_999(np.array(means), size / 40 / (1 - load) + joining_s)


@pytest.mark.slow
def test_limited_sharing_lies_between_one_at_a_time_and_all_at_once():
    """With variable sizes (squared variation above 1) every slot more lowers the mean sojourn, down to PS."""
    stay = {
        slots: means_of_runs(shared_pace(slots, 0.6, 500), lambda r: r.e2e_s, 100).mean() for slots in (1, 2, 8, 512)
    }
    assert stay[1] > stay[2] > stay[8] > 0.98 * stay[512]
    assert stay[1] > 1.2 * stay[512]


@pytest.mark.parametrize("slots", [1, 4])
def test_utilisation_law(slots):
    """Share of the time that the engine is busy = answers per second x seconds of work per answer, exactly."""
    outputs = Lengths.empirical([1, 2, 3, 10])
    workload = Workload("u", Lengths.fixed(1), outputs, Arrivals.poisson(0.15), 500)
    run = simulate(EngineSpec(1, 1, 10_000, max_num_seqs=slots), PerToken(1.0), workload, seed=4)
    busy_s = run.steps.step_s.sum()
    assert busy_s == pytest.approx(run.requests.output_tokens.sum(), rel=1e-12)
    answers_per_s = len(run.requests) / run.simulated_s
    assert busy_s / run.simulated_s == pytest.approx(answers_per_s * run.requests.output_tokens.mean(), rel=1e-12)
    assert run.summary(warmup=0.0).busy_share == pytest.approx(busy_s / run.simulated_s, rel=0.02)
