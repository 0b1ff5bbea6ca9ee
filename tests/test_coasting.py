"""Stretches of alike steps leave the same records as planning every step."""

from itertools import accumulate, repeat

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.balancer import RANK_ROUTERS
from planner.clock import Clock
from planner.engine import BatchWait, PrefillBalance, TokenRatio
from planner.enginespec import POLICIES, EngineSpec
from planner.errors import InputError
from planner.incidents import OutagePlan, Outages
from planner.simulation import simulate
from planner.workload import Arrivals, Lengths, SharedPrefix, Turns, Workload


class Timer:
    """Steps of no round length that depend on work and draw; it knows them beforehand."""

    link_s = 0.0

    def __init__(self, group=0, asked=None):
        self.draw = 7 * group
        self.asked = [] if asked is None else asked

    def step_s(self, ranks):
        self.draw = self._next(self.draw)
        return self._seconds([(w.decode_seqs, w.decode_context_tokens, w.prefill_tokens) for w in ranks], self.draw)

    def coming(self, batches, steps):
        self.asked.append(steps)
        draws, contexts = self._draws(steps), [np.fromiter(contexts, int, steps) for _, contexts in batches]
        works = [[(n, c[i], 0) for (n, _), c in zip(batches, contexts, strict=True)] for i in range(steps)]
        seconds = [self._seconds(work, draw) for work, draw in zip(works, draws, strict=True)]
        return (seconds, draws) if steps % 2 else (np.array(seconds), np.array(draws))

    def take(self, steps):
        self.draw = self._draws(steps)[-1]

    def of_group(self, group):
        return Timer(group, self.asked)

    def _draws(self, steps):
        return list(accumulate(repeat(self.draw, steps + 1), lambda draw, _: self._next(draw)))[1:]

    @staticmethod
    def _next(draw):
        return (draw * 5 + 3) % 64

    @staticmethod
    def _seconds(works, draw):
        seconds = max(1e-5 * n + 1.3e-8 * context + 2.1e-6 * prompt for n, context, prompt in works)
        return 0.0041 + seconds + 1.7e-5 * draw


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
    return columns(run) | {"steps": run.num_steps, "end": run.simulated_s}, len(timer.asked)


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
    assert 40 <= len(timer.asked) <= 200 < run.num_steps / 5


def test_a_hastened_event_happens_once_and_sooner():
    clock, seen = Clock(), []
    event = clock.at(3.0)
    event.callbacks.append(lambda _: seen.append(clock.now))
    clock.at(1.0).callbacks.append(lambda _: clock.hasten(event, 2.5))
    clock.run()
    assert seen == [2.5] and clock.now == 2.5


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
    timer.coming = lambda batches, steps: ([0.01, *[np.nan] * (steps - 1)], [0] * steps)
    timer.of_group = lambda group: timer
    workload = Workload("bad", Lengths.fixed(10), Lengths.fixed(50), Arrivals.poisson(1), 3)
    with pytest.raises(InputError, match="step timer returned nan"):
        simulate(EngineSpec(1, 1, 4_000), timer, workload)


class EvenTimer(Timer):
    """Groups of equal batches step together, so that their steps end at the same instants."""

    def of_group(self, group):
        return EvenTimer(0, self.asked)

    @staticmethod
    def _next(draw):
        return 0


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("groups", [2, 3, 4])
def test_groups_whose_steps_end_together_take_turns(groups, ranks):
    for users in (groups, groups + 1, 2 * groups):
        workload = Workload("even", Lengths.fixed(100), Lengths.empirical([20, 40, 70]), Arrivals.closed(users), 60)
        found = []
        for coasts in (False, True):
            run = simulate(EngineSpec(groups, ranks, 400_000), EvenTimer(), workload, seed=3, coasts=coasts)
            found.append(columns(run) | {"end": run.simulated_s})
        assert [name for name in found[0] if found[0][name] != found[1][name]] == []
