"""Stretches of alike steps leave the same records as planning every step."""

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.balancer import RANK_ROUTERS
from planner.clock import Clock, Tick
from planner.engine import BatchWait, PrefillBalance, TokenRatio
from planner.enginespec import POLICIES, EngineSpec
from planner.errors import InputError
from planner.incidents import OutagePlan, Outages
from planner.simulation import simulate
from planner.workload import Arrivals, Lengths, SharedPrefix, Turns, Workload


class Timer:
    """Steps of no round length that depend on work, draw and the order in which groups step; it coasts if allowed."""

    link_s = 0.0

    def __init__(self):
        self.draw, self.num_coasts = 0, 0

    def step_s(self, ranks):
        return self._next([(w.decode_seqs, w.decode_context_tokens, w.prefill_tokens) for w in ranks])

    def coast(self, batches):
        self.num_coasts += 1
        return self._times([seqs for seqs, _ in batches], zip(*(contexts for _, contexts in batches), strict=False))

    def _times(self, seqs, contexts):
        for tokens in contexts:
            yield self._next([(n, context, 0) for n, context in zip(seqs, tokens, strict=True)])

    def _next(self, works):
        self.draw = (self.draw * 5 + 3) % 64
        seconds = max(1e-5 * n + 1.3e-8 * context + 2.1e-6 * prompt for n, context, prompt in works)
        return 0.0041 + seconds + 1.7e-5 * self.draw


def columns(simulation):
    tables = simulation.requests, simulation.steps
    return {f"{type(t).__name__}.{n}": c.tobytes() for t in tables for n, c in t.columns().items()}


@st.composite
def specs(draw):
    ranks = draw(st.sampled_from([1, 1, 2, 4]))
    return EngineSpec(
        num_groups=draw(st.sampled_from([1, 1, 2, 5])),
        ranks_per_group=ranks,
        kv_tokens_per_rank=draw(st.sampled_from([1_600, 6_000, 400_000])),
        block_tokens=draw(st.sampled_from([1, 16, 100])),
        max_num_seqs=draw(st.sampled_from([4, 40, 256])),
        max_batched_tokens=draw(st.sampled_from([1024, 8192])),
        policy=draw(st.sampled_from(POLICIES)),
        admission_reserve=draw(st.sampled_from([0.0, 0.4, 1.0])),
        frontend_s=draw(st.sampled_from([0.0, 0.011])),
        frontend_s_per_token=draw(st.sampled_from([0.0, 1.3e-6])),
        num_frontends=draw(st.sampled_from([1, 3])),
        receive_interval=draw(st.sampled_from([1, 1, 7])),
        token_ratio=TokenRatio(0.7, 0.2, 60, 30, 20, 0.9) if draw(st.booleans()) else None,
        prefill_balance=PrefillBalance(True, 5, 2) if draw(st.booleans()) else None,
        batch_wait=BatchWait(4, 0.1) if draw(st.booleans()) and ranks == 1 else None,
        rank_router=draw(st.sampled_from(["", *RANK_ROUTERS])) if ranks > 1 else "",
        acceptance=draw(st.sampled_from([(), (), (0.8, 0.5)])),
        prefix_caching=draw(st.booleans()),
    )


@st.composite
def workloads(draw):
    arrivals = draw(
        st.sampled_from([Arrivals.poisson(3), Arrivals.poisson(30), Arrivals.closed(5), Arrivals.closed(60)])
    )
    outputs = [Lengths.lognormal(40, 0.9), Lengths.fixed(50), Lengths.fixed(1)]
    shared = {}
    if draw(st.booleans()):
        shared = draw(
            st.sampled_from([{"prefix": SharedPrefix(3, Lengths.fixed(120))}, {"turns": Turns(Lengths.fixed(3), 1.0)}])
        )
    return Workload("drawn", Lengths.lognormal(150, 0.9), draw(st.sampled_from(outputs)), arrivals, 90, **shared)


def records(spec, workload, coasts, cut_s, fails):
    timer = Timer()
    disturb = None
    if fails:
        disturb = Outages(OutagePlan(((0.7, 0), (2.1, 0)), None, spec.ranks_per_group, 1, 0.2, 0.9, fails))
    run = simulate(spec, timer, workload, seed=3, max_simulated_s=cut_s, disturb=disturb, coasts=coasts)
    return columns(run) | {"steps": run.num_steps, "end": run.simulated_s}, timer.num_coasts


@settings(max_examples=80, deadline=None, derandomize=True)
@given(specs(), workloads(), st.sampled_from([None, None, 1.31]), st.sampled_from(["", "", "retry", "resume", "drop"]))
def test_coasting_leaves_the_records_of_stepping(spec, workload, cut_s, fails):
    stepped, no_coasts = records(spec, workload, False, cut_s, fails)
    coasted, _ = records(spec, workload, True, cut_s, fails)
    assert not no_coasts
    assert [name for name in stepped if stepped[name] != coasted[name]] == []


@pytest.mark.parametrize(("ranks", "groups"), [(1, 1), (4, 1), (1, 3)])
def test_quiet_runs_coast(ranks, groups):
    """Few requests of many tokens: nearly all steps belong to stretches, and the timer is asked for few of them."""
    workload = Workload("quiet", Lengths.fixed(300), Lengths.fixed(200), Arrivals.poisson(2), 40)
    timer = Timer()
    run = simulate(EngineSpec(groups, ranks, 400_000), timer, workload)
    assert 40 <= timer.num_coasts <= 200 < run.num_steps / 5


def test_a_tick_is_due_again_until_it_happens():
    clock, seen = Clock(), []
    due = iter([2.0, 3.5, None])

    def again(now_s):
        seen.append(now_s)
        return next(due)

    def waits():
        yield clock.at(1.0, Tick(clock, again))
        seen.append(("resumed", clock.now))

    clock.process(waits())
    between = clock.at(3.5)
    between.callbacks.append(lambda _: seen.append("between"))
    clock.run()
    assert seen == [1.0, 2.0, "between", 3.5, ("resumed", 3.5)]


def test_time_passes_up_to_the_next_event_only():
    clock = Clock()
    clock.at(0.1 + 0.2)
    assert clock.peek() == 0.1 + 0.2
    clock.advance(0.25)
    assert clock.now == 0.25
    clock.run()
    assert clock.now == 0.1 + 0.2 and clock.peek() == simpy.core.Infinity


def test_a_coasting_timer_must_return_times():
    timer = Timer()
    timer.coast = lambda batches: iter([0.01, float("nan")])
    workload = Workload("bad", Lengths.fixed(10), Lengths.fixed(50), Arrivals.poisson(1), 3)
    with pytest.raises(InputError, match="step timer returned nan"):
        simulate(EngineSpec(1, 1, 4_000), timer, workload)
