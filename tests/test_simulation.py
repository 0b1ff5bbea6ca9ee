import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.enginespec import EngineSpec
from planner.errors import InputError
from planner.records import FINISHED, REJECTED, UNFINISHED
from planner.routers import ROUTERS
from planner.scheduler import SCHEDULERS
from planner.simulation import simulate
from planner.workload import Arrivals, Lengths, Workload, load_workload


class LinearTimer:
    """A step of the slowest rank: 5 ms plus what tokens, sequences and context cost; remembers what it saw."""

    def __init__(self):
        self.calls, self.ranks_seen, self.idle_ranks = 0, set(), 0

    draw = 0
    link_s = 0.0

    def step_s(self, ranks):
        self.calls += 1
        self.ranks_seen.add(len(ranks))
        self.idle_ranks += sum(1 for w in ranks if not w.prefill_tokens and not w.decode_seqs)
        return max(self.own_s(w) for w in ranks)

    @staticmethod
    def own_s(w):
        return (
            5e-3
            + 2e-6 * w.prefill_tokens
            + 1e-9 * w.prefill_pairs
            + 1e-5 * w.decode_seqs
            + 1e-8 * w.decode_context_tokens
        )


class ConstantTimer:
    def __init__(self, step_s=0.02):
        self.value = step_s

    draw = 0
    link_s = 0.0

    def step_s(self, ranks):
        return self.value


CHAT = Workload("chat", Lengths.lognormal(300, 0.8), Lengths.lognormal(60, 0.8), Arrivals.poisson(20), 300)


def columns(simulation):
    tables = simulation.requests, simulation.steps
    return {f"{type(t).__name__}.{name}": column for t in tables for name, column in t.columns().items()}


def test_one_request_by_hand():
    workload = load_workload("fixed:1000/3", concurrency=1, num_requests=1)
    spec = EngineSpec(1, 1, 4096, max_batched_tokens=400)
    run = simulate(spec, ConstantTimer(0.5), workload)
    assert run.num_steps == 5
    np.testing.assert_allclose(run.requests.ttft_s, [1.5])
    np.testing.assert_allclose(run.requests.tpot_s, [0.5])
    np.testing.assert_allclose(run.requests.e2e_s, [2.5])
    np.testing.assert_array_equal(run.steps.prefill_tokens, [400, 400, 200, 0, 0])
    np.testing.assert_array_equal(run.steps.decode_seqs, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(run.steps.context_tokens, [0, 0, 0, 1001, 1002])
    np.testing.assert_array_equal(run.steps.kv_tokens_used, [1008] * 5)
    assert run.simulated_s == 2.5


def test_single_output_token_has_no_tpot():
    run = simulate(EngineSpec(1, 1, 4096), ConstantTimer(), load_workload("fixed:10/1", concurrency=1, num_requests=5))
    assert np.isnan(run.requests.tpot_s).all()
    assert run.summary().tpot_s.num == 0


def test_empty_engine_sleeps_between_requests():
    workload = Workload("sparse", Lengths.fixed(10), Lengths.fixed(2), Arrivals.trace([0.0, 5.0, 9.0]), 3)
    run = simulate(EngineSpec(1, 1, 4096), ConstantTimer(0.25), workload)
    np.testing.assert_allclose(run.steps.start_s, [0, 0.25, 5, 5.25, 9, 9.25])
    np.testing.assert_allclose(run.requests.finish_s, [0.5, 5.5, 9.5])


@pytest.mark.parametrize("policy", sorted(SCHEDULERS))
@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_same_seed_same_bytes_and_observers_change_nothing(policy, router):
    spec = EngineSpec(2, 3, 4096, policy=policy)
    runs = [simulate(spec, LinearTimer(), CHAT, seed=7, router=router) for _ in range(2)]
    for name, column in columns(runs[0]).items():
        assert column.tobytes() == columns(runs[1])[name].tobytes(), name
    watched = simulate(spec, LinearTimer(), CHAT, seed=7, router=router, record_steps=False, progress=lambda _: None)
    assert watched.requests.finish_s.tobytes() == runs[0].requests.finish_s.tobytes()
    assert (len(watched.steps), watched.num_steps) == (0, len(runs[0].steps))
    other = simulate(spec, LinearTimer(), CHAT, seed=8, router=router)
    assert other.requests.finish_s.tobytes() != runs[0].requests.finish_s.tobytes()


WORKLOADS = st.builds(
    Workload,
    st.just("any"),
    st.sampled_from([Lengths.fixed(17), Lengths.uniform(1, 200), Lengths.lognormal(80, 1.0)]),
    st.sampled_from([Lengths.fixed(1), Lengths.uniform(1, 60), Lengths.lognormal(30, 0.7)]),
    st.sampled_from([Arrivals.poisson(50), Arrivals.gamma(20, 3), Arrivals.closed(7), Arrivals.trace([0, 0, 0, 1])]),
    st.integers(1, 60),
)
SPECS = st.builds(
    EngineSpec,
    num_groups=st.integers(1, 3),
    ranks_per_group=st.integers(1, 4),
    kv_tokens_per_rank=st.sampled_from([300, 600, 5000]),
    max_num_seqs=st.sampled_from([1, 4, 32]),
    max_batched_tokens=st.sampled_from([32, 100, 8192]),
    policy=st.sampled_from(sorted(SCHEDULERS)),
)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(spec=SPECS, workload=WORKLOADS, seed=st.integers(0, 99), router=st.sampled_from(sorted(ROUTERS)))
def test_tokens_and_time_are_conserved(spec, workload, seed, router):
    timer = LinearTimer()
    run = simulate(spec, timer, workload, seed=seed, router=router)
    r, steps = run.requests, run.steps
    kept = r.status == FINISHED
    assert len(r) == workload.num_requests
    assert (kept | (r.status == REJECTED)).all()
    np.testing.assert_array_equal(r.produced_tokens[kept], r.output_tokens[kept])
    assert not r.produced_tokens[~kept].any()
    assert timer.calls == run.num_steps == len(steps)
    assert timer.ranks_seen <= {spec.ranks_per_group}
    preempted = r.num_preemptions.sum()
    decoded = (r.output_tokens - 1)[kept].sum() - steps.decode_seqs.sum()
    assert 0 <= decoded <= preempted
    assert steps.prefill_tokens.sum() >= r.prompt_tokens[kept].sum()
    if not preempted:
        assert steps.prefill_tokens.sum() == r.prompt_tokens[kept].sum()
    assert (steps.kv_tokens_used <= spec.kv_blocks_per_rank * spec.block_tokens * spec.ranks_per_group).all()
    assert (np.diff(r.arrival_s) >= 0).all()
    assert (r.arrival_s <= r.admitted_s)[kept].all()
    assert (r.admitted_s < r.first_token_s)[kept].all()
    assert (r.first_token_s <= r.finish_s)[kept].all()
    assert (steps.step_s >= 5e-3).all()
    for group in range(spec.num_groups):
        own = steps.group == group
        assert (np.diff(steps.start_s[own]) >= steps.step_s[own][:-1] - 1e-12).all()
    used = np.unique(r.rank[kept])
    assert set(used) <= set(range(spec.num_groups * spec.ranks_per_group))


@pytest.mark.parametrize("spec", [EngineSpec(1, 1, 10_000), EngineSpec(2, 2, 10_000, policy="prefill_first")])
def test_closed_loop_keeps_exactly_n_in_flight(spec):
    run = simulate(spec, LinearTimer(), CHAT.with_concurrency(13))
    r = run.requests
    for time_s in r.arrival_s[13:]:
        assert ((r.arrival_s <= time_s) & (r.finish_s > time_s)).sum() == 13
    assert (r.arrival_s[:13] == 0).all()


def test_more_users_than_requests_is_a_burst():
    run = simulate(EngineSpec(1, 1, 10_000), LinearTimer(), CHAT.with_concurrency(10_000))
    assert (run.requests.arrival_s == 0).all()
    assert (run.requests.status == FINISHED).all()


def test_lockstep_costs_time():
    """Equal routing: four ranks that wait for each other answer later than four that do not."""
    together = simulate(EngineSpec(1, 4, 8192), LinearTimer(), CHAT, router="round_robin")
    apart = simulate(EngineSpec(4, 1, 8192), LinearTimer(), CHAT, router="round_robin")
    np.testing.assert_array_equal(together.requests.rank, apart.requests.rank)
    assert together.requests.e2e_s.mean() > apart.requests.e2e_s.mean()
    assert together.requests.ttft_s.mean() > apart.requests.ttft_s.mean()


def test_idle_ranks_step_along():
    timer = LinearTimer()
    workload = load_workload("fixed:100/10", concurrency=1, num_requests=4)
    run = simulate(EngineSpec(1, 4, 8192), timer, workload)
    assert timer.idle_ranks == 3 * run.num_steps
    assert sorted(run.requests.rank) == [0, 1, 2, 3]


def test_oversized_requests_are_rejected_with_a_reason():
    workload = Workload("w", Lengths.replay([10, 1000, 10]), Lengths.fixed(10), Arrivals.closed(1), 6)
    run = simulate(EngineSpec(1, 1, 512), LinearTimer(), workload)
    assert run.requests.status.tolist() == [FINISHED, REJECTED, FINISHED] * 2
    assert run.num_rejected == 2
    assert "2 of 6 requests need up to 1,009 KV tokens; the pool of a rank holds 512" in run.rejection_reason
    assert run.summary().num_rejected == 2
    assert not run.summary().meets_slo
    fits = simulate(EngineSpec(1, 1, 2048), LinearTimer(), workload)
    assert fits.rejection_reason is None


def test_a_cut_run_keeps_what_it_has():
    run = simulate(EngineSpec(1, 1, 4096), ConstantTimer(0.1), CHAT, max_simulated_s=3.05)
    whole = simulate(EngineSpec(1, 1, 4096), ConstantTimer(0.1), CHAT)
    r = run.requests
    assert 2.9 < run.simulated_s <= 3.05
    assert {FINISHED, UNFINISHED} == set(r.status)
    assert len(r) == (whole.requests.arrival_s <= 3.05).sum()
    done = r.status == FINISHED
    np.testing.assert_array_equal(r.finish_s[done], whole.requests.finish_s[: len(r)][done])
    begun = ~done & ~np.isnan(r.first_token_s)
    assert begun.any()
    steps_since = np.rint((run.simulated_s - r.first_token_s[begun]) / 0.1)
    untouched = r.num_preemptions[begun] == 0
    np.testing.assert_array_equal(r.produced_tokens[begun][untouched], 1 + steps_since[untouched])
    assert run.summary().num_unfinished == (~done).sum()


def test_more_kv_never_lowers_throughput():
    loads = [
        simulate(EngineSpec(1, 1, kv), LinearTimer(), CHAT.with_concurrency(64)) for kv in (2000, 4000, 8000, 64000)
    ]
    times = [run.simulated_s for run in loads]
    assert all(later <= 1.01 * earlier for earlier, later in pairwise(times))
    assert times[-1] < 0.8 * times[0]
    assert loads[0].requests.num_preemptions.sum() > loads[-1].requests.num_preemptions.sum() == 0


def test_reserving_kv_avoids_preemption():
    spec = EngineSpec(1, 1, 3000, admission_reserve=1.0)
    run = simulate(spec, LinearTimer(), CHAT.with_concurrency(64))
    assert run.requests.num_preemptions.sum() == 0
    assert (run.requests.status != UNFINISHED).all()


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_routers_spread_requests(router):
    run = simulate(EngineSpec(4, 2, 10_000), LinearTimer(), CHAT, router=router)
    counts = np.bincount(run.requests.rank, minlength=8)
    assert counts.min() >= 20
    if router == "round_robin":
        assert counts.max() - counts.min() <= 1


def test_least_requests_prefers_the_emptiest_and_turns_on_ties():
    choose = ROUTERS["least_requests"](np.random.default_rng(0))
    assert [choose([0, 0, 0]) for _ in range(4)] == [0, 1, 2, 0]
    assert choose([5, 1, 2]) == 1
    assert choose([1, 1, 5]) == 0


@pytest.mark.parametrize(("num_requests", "calls"), [(300, 100), (199, 100), (7, 7)])
def test_progress_reaches_one(num_requests, calls):
    seen = []
    simulate(EngineSpec(1, 1, 10_000), LinearTimer(), CHAT.with_num_requests(num_requests), progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) == calls


def test_frames_carry_latencies_and_words():
    run = simulate(EngineSpec(1, 1, 10_000), LinearTimer(), CHAT)
    requests, steps = run.requests_frame(), run.steps_frame()
    assert len(requests) == 300
    assert (
        requests["ttft_s"] + requests["tpot_s"] * (requests["output_tokens"] - 1)
    ).dropna().to_numpy() == pytest.approx(requests["e2e_s"][requests["output_tokens"] > 1].to_numpy())
    assert set(requests["status"]) == {"finished"}
    assert len(steps) == run.num_steps


@pytest.mark.parametrize("step_s", [0.0, -1.0, math.nan, math.inf])
def test_timers_must_return_times(step_s):
    with pytest.raises(InputError, match="step timer returned"):
        simulate(EngineSpec(1, 1, 10_000), ConstantTimer(step_s), CHAT)


def test_bad_arguments():
    with pytest.raises(InputError, match="did you mean least_requests"):
        simulate(EngineSpec(1, 1, 10_000), LinearTimer(), CHAT, router="least_request")
    with pytest.raises(InputError, match="must be positive"):
        simulate(EngineSpec(1, 1, 10_000), LinearTimer(), CHAT, max_simulated_s=0)
    with pytest.raises(InputError, match="before its first request"):
        simulate(EngineSpec(1, 1, 10_000), LinearTimer(), CHAT, max_simulated_s=1e-6).summary()


def test_the_front_end_delays_a_request_and_nothing_else():
    """HTTP and tokenising cost the same time before every queue; the engine's own steps do not change."""
    workload = load_workload("fixed:1000/3", concurrency=1, num_requests=4)
    plain = simulate(EngineSpec(1, 1, 4096), ConstantTimer(0.5), workload)
    late = simulate(EngineSpec(1, 1, 4096, frontend_s=0.2, frontend_s_per_token=1e-4), ConstantTimer(0.5), workload)
    np.testing.assert_allclose(late.requests.ttft_s, plain.requests.ttft_s + 0.3)
    np.testing.assert_allclose(late.requests.tpot_s, plain.requests.tpot_s)
    assert late.num_steps == plain.num_steps
    assert late.simulated_s == pytest.approx(plain.simulated_s + 4 * 0.3)


def test_a_scheduler_that_looks_seldom_makes_requests_wait():
    """While sequences decode, a request waits half the interval on average; an idle scheduler takes it at once."""
    alone = load_workload("fixed:10/2", concurrency=1, num_requests=5)
    spec = EngineSpec(1, 1, 100_000, receive_interval=20)
    run = simulate(spec, ConstantTimer(0.1), alone)
    np.testing.assert_allclose(run.requests.ttft_s, 0.1)
    busy = load_workload("fixed:10/400", rate=0.4, num_requests=400)
    seldom, often = (simulate(EngineSpec(1, 1, 10**6, receive_interval=n), ConstantTimer(0.1), busy) for n in (20, 1))
    waited = seldom.requests.ttft_s.mean() - often.requests.ttft_s.mean()
    assert 0.5 < waited < 1.2  # ten steps of 0.1 s, less where a prompt has just made it look
    with pytest.raises(InputError, match="receive_interval"):
        EngineSpec(1, 1, 100, receive_interval=0)
