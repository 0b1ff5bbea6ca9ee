"""Fleets: the day of an aggregated fleet against what can be said without it, and against simulating all of it."""

from __future__ import annotations

import json
import math
import tracemalloc
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.economics import DemandProfile
from planner.fleet import Autoscaler, Behaviour, Day, Hour, Outage, Policy, live
from planner.fleet.answer import spare_replicas
from planner.fleet.behaviour import METRICS, QUANTILES
from planner.fleet.day import _poisson
from planner.fleettext import fleet_text
from planner.workload import parse_slo
from tests.conftest import Command

LOADS = np.linspace(1.0, 10.0, 10)


def behaviour(slo: str = "ttft_p95=2s,tpot_p95=50ms") -> Behaviour:
    """Latencies that grow in proportion to 1 + load / 10, uniform around 0.5 s, 20 ms and 5 s."""
    spread = 0.5 + QUANTILES
    scale = np.array([0.5, 0.02, 5.0])
    growth = 1 + LOADS / 10
    quantiles = growth[:, None, None] * scale[None, :, None] * spread[None, None, :]
    return Behaviour(parse_slo(slo), LOADS, quantiles, quantiles.mean(axis=2), 11.0, cast(Any, None), 0)


def policy(**changes: float) -> Policy:
    given: dict[str, Any] = {"per_replica_per_s": 8.0, "headroom": 1.0, "spare": 0, "most": 1000, "ready_s": 180.0}
    given |= {"drain_s": 60.0, "delay_s": 60.0}
    return Policy(**(given | changes))


FLAT = Day((1.0,) * 24, 800.0)
CONSUMER = Day(DemandProfile(shape="consumer").hourly[:24], 800.0)


def replica_hours(hours: tuple[Hour, ...]) -> float:
    return math.fsum(hour.replica_hours for hour in hours)


def test_behaviour_between_loads_is_exact_where_latencies_are_linear() -> None:
    found = behaviour()
    expected = (1 + 3.7 / 10) * 0.02 * (0.5 + QUANTILES)
    assert found.at(3.7)[METRICS.index("tpot")] == pytest.approx(expected, rel=1e-12)
    assert found.mean_s("e2e", 3.7) == pytest.approx(5.0 * 1.37)
    # 20 ms x 1.45 x (1 + load / 10) = 50 ms; the TTFT limit is never reached.
    assert found.most_per_s() == pytest.approx((50 / 29 - 1) * 10, rel=1e-9)
    assert found.most_per_s({"tpot": 2.0}) == 0.0
    assert behaviour("ttft_p95=9s").most_per_s(throughput=0.5) == 5.0
    share = (50 / (20 * 1.9)) - 0.5
    assert found.attained(found.at(9.0)) == pytest.approx(share, abs=1e-3)
    assert found.attained(found.waiting(100.0)) == 0.0


def test_a_flat_day_is_a_replica_at_one_load() -> None:
    found = behaviour()
    hours = live(found, FLAT, policy())
    for hour in hours:
        assert (hour.replicas, hour.most_replicas, hour.fewest_replicas) == (100, 100, 100)
        assert hour.requests == pytest.approx(800 * 3600)
        assert hour.load_share == pytest.approx(8 / 11)
        assert hour.attained == pytest.approx(found.attained(found.at(8.0)), abs=2e-3)
        assert hour.percentile_s("tpot", 0.95) == pytest.approx(1.8 * 0.02 * 1.45, rel=2e-3)
        assert hour.means_s[0] == pytest.approx(0.5 * 1.8, rel=2e-3)
        assert hour.failures == hour.hit == 0
    assert replica_hours(hours) == pytest.approx(2400)


def test_an_autoscaler_follows_the_day_and_saves_what_the_profile_says() -> None:
    hours = live(behaviour(), CONSUMER, policy())
    mean_over_peak = sum(CONSUMER.hourly) / 24
    # Held are also those that start and leave, and the most of the last five minutes.
    assert mean_over_peak * 2400 <= replica_hours(hours) <= 1.03 * mean_over_peak * 2400
    assert max(hour.most_replicas for hour in hours) <= 102
    busiest = max(hours, key=lambda hour: hour.rate_per_s)
    assert busiest.hour == 21
    fixed = live(behaviour(), CONSUMER, policy(), fixed=100)
    assert replica_hours(fixed) == pytest.approx(2400)
    assert all(f.attained >= s.attained - 1e-3 for f, s in zip(fixed, hours, strict=True))


def test_headroom_covers_what_the_load_grows_while_a_replica_starts() -> None:
    steep = Day((0.1,) * 12 + (1.0,) * 12, 800.0)
    lead_s = 180.0 + 2 * 60.0
    late = live(behaviour("tpot_p95=50ms"), steep, policy(per_replica_per_s=7.0))
    headroom = steep.steepest(lead_s, 60.0, 7.0)
    early = live(behaviour("tpot_p95=50ms"), steep, policy(per_replica_per_s=7.0, headroom=headroom))
    rising = 11
    assert headroom > 1.2
    assert late[rising].load_share > 7 / 11 > early[rising].load_share
    assert late[rising].attained < 0.9 < early[rising].attained
    assert Day((0.0,) * 23 + (1.0,), 7.0).steepest(lead_s, 60.0, 7.0) == 1.0


def test_an_overloaded_fleet_works_its_backlog_off() -> None:
    """One hour at 1.2 times capacity leaves 0.2 hours of work, done at half load in 0.4 hours."""
    day = Day((0.5,) * 10 + (1.2,) + (0.5,) * 13, 1100.0)
    hours = live(behaviour(), day, policy(most=100), fixed=100, step_s=10.0)
    assert hours[8].attained == pytest.approx(behaviour().attained(behaviour().at(5.5)), abs=3e-3)
    assert hours[10].attained < 0.35
    # Between middles of hours the load goes in straight lines: 1.0 is passed 0.714 of the way up and down.
    longest_s = 0.5 * 2 * (1 - 5 / 7) * 0.2 * 3600
    assert 0.8 * longest_s < hours[10].percentile_s("ttft", 0.95) < 1.2 * longest_s + 2
    assert hours[13].attained == pytest.approx(hours[8].attained, abs=1e-6)
    assert hours[13].percentile_s("ttft", 0.99) < 2.0


def test_failures_hit_what_is_in_flight_and_take_capacity() -> None:
    outage = Outage(mttf_s=500 * 3600.0, mttr_s=600.0, detect_s=300.0, blind=False)
    hours, without = (live(behaviour(), FLAT, policy(), fixed=100, outage=o) for o in (outage, None))
    failures = sum(hour.failures for hour in hours)
    assert failures == pytest.approx(24 * 100 / 500, rel=1e-3)
    in_flight = 800 / 99 * 5.0 * (1 + 800 / 99 / 10)
    assert sum(hour.hit for hour in hours) / failures == pytest.approx(in_flight, rel=1e-3)
    assert sum(hour.down_hours for hour in hours) == pytest.approx(failures * 600 / 3600, rel=1e-3)
    assert hours[0].attained < without[0].attained
    blind = live(behaviour(), FLAT, policy(), fixed=100, outage=Outage(500 * 3600.0, 600.0, 300.0, True))
    assert sum(hour.hit for hour in blind) / failures == pytest.approx(8 * (5.0 * 1.8 + 300.0), rel=1e-2)


def test_spares_and_the_number_away_are_poisson() -> None:
    for mean in (0.01, 0.7, 30.0):
        chances = _poisson(mean, 1000)
        assert sum(c for _, c in chances) == pytest.approx(1.0)
        assert sum(n * c for n, c in chances) == pytest.approx(mean, rel=1e-6)
        spares = spare_replicas(mean, 0.999)
        assert sum(c for n, c in chances if n <= spares) >= 0.999 > sum(c for n, c in chances if n < spares)
    assert _poisson(0.0, 5) == ((0, 1.0),)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.floats(0, 500), min_size=1, max_size=60),
    st.integers(0, 3),
    st.sampled_from([0.0, 60.0, 200.0]),
    st.integers(1, 30),
)
def test_an_autoscaler_never_leaves_its_bounds(rates: list[float], spare: int, ready_s: float, most: int) -> None:
    rules = policy(spare=spare, ready_s=ready_s, most=most)
    scaler = Autoscaler(rules, 60.0, rates[0])
    ordered = scaler.serving
    for number, rate in enumerate(rates):
        scaler.follow(rate)
        assert 1 <= scaler.serving <= most
        assert scaler.serving <= scaler.held
        known = rates[max(0, number - 1)]
        ordered = max(ordered, rules.wanted(known))
        assert scaler.serving <= ordered
    for _ in range(12):
        scaler.follow(rates[-1])
    assert scaler.serving == scaler.held == rules.wanted(rates[-1])


def test_memory_and_answer_do_not_depend_on_the_days() -> None:
    found, peaks, answers = behaviour(), [], []
    for days in (1, 6):
        tracemalloc.start()
        answers.append(live(found, CONSUMER, policy(), num_days=days, step_s=900.0))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0]
    for one, six in zip(*answers, strict=True):
        assert one.replica_hours == pytest.approx(six.replica_hours, rel=1e-9)
        assert one.requests == pytest.approx(six.requests, rel=1e-9)
        assert one.attained == pytest.approx(six.attained, rel=1e-9)


ASKED = ("fleet", "mixtral-8x7b", "--cluster", "h100-sxm:100x8")
SHORT = ("--layout", "tp=2", "--workload", "fixed:128/8", "--max-num-seqs", "32")


def test_the_command_says_gpus_cost_and_slo_by_hour(moeplan: Command) -> None:
    asked = [*ASKED, *SHORT, "--rate", "20000"]
    code, out, _ = moeplan(*asked, "--json")
    assert code == 0
    facts = json.loads(out)
    peak, scaled, fixed, failed = (facts[name] for name in ("peak", "scaled", "fixed", "failures"))
    planned = facts["replica"]["planned_requests_per_s"]
    assert peak["gpus"] == 2 * (math.ceil(20000 / planned) + peak["spare_replicas"])
    assert peak["gpus_low"] <= peak["gpus"] <= peak["gpus_high"]
    assert fixed["gpu_hours_per_day"] == pytest.approx(24 * peak["gpus"])
    assert 0.75 < scaled["gpu_hours_per_day"] / fixed["gpu_hours_per_day"] < 0.9
    price = facts["price"]["usd_per_gpu_hour"]
    assert scaled["usd_per_day"] == pytest.approx(price * scaled["gpu_hours_per_day"])
    assert fixed["usd_per_day"] == pytest.approx(price * 24 * peak["gpus"])
    assert len(facts["hours"]) == 24
    assert facts["meets_slo"] is all(hour["meets_slo"] for hour in facts["hours"])
    assert failed["gpu_hours_more_per_day"] >= 0
    assert failed["slo_attainment_without"] >= 0.95
    text = fleet_text(facts)
    assert f"{peak['gpus']:,} GPUs at the peak of 20,000 requests/s" in text
    assert "Autoscaling takes" in text


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--rate", "0"], 2, "--rate 0"),
        (["--rate", "nan"], 2, "--rate nan"),
        (["--rate", "9", "--days", "0"], 2, "--days 0"),
        (["--rate", "9", "--day", "1,2"], 2, "write 24"),
        (["--rate", "9", "--day", "1,x"], 2, "24 numbers"),
        (["--rate", "9", "--day", "offce"], 2, "office"),
        (["--rate", "9", "--layout", "tp=2,replicas=4"], 2, "Leave out replicas=4"),
        (["--rate", "9", "--workload", "multi-turn"], 2, "independent requests"),
        (["--rate", "9", "--router", "prefix_affinity"], 2, "prefix_affinity"),
        (["--rate", "9", "--mtbf-gpu", "1s"], 2, "--mtbf-gpu"),
        (["--rate", "9", "--availability", "2"], 2, "--availability 2"),
    ],
)
def test_bad_input_is_refused(more: list[str], code: int, said: str, moeplan: Command) -> None:
    layout = [] if "--layout" in more else SHORT[:2]
    found, out, err = moeplan(*ASKED, *layout, *more)
    assert (found, out) == (code, "")
    assert said in err


@pytest.mark.slow
def test_impossible_promises_and_short_clusters_exit_3(moeplan: Command) -> None:
    code, _, err = moeplan(*ASKED, *SHORT, "--rate", "100", "--slo", "tpot_p95=1ms")
    assert code == 3
    assert "tpot_p95" in err
    code, out, _ = moeplan(*ASKED, *SHORT, "--rate", "1000000", "--json")
    assert code == 3
    facts = json.loads(out)
    assert "the cluster holds 800" in facts["warnings"][0]
    assert not facts["hours"][21]["meets_slo"]


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.4, 0.9])
def test_a_flat_day_agrees_with_simulating_all_replicas(load: float) -> None:
    from dataclasses import replace

    from planner import options
    from planner.deployment import deploy, run, with_replicas
    from planner.fit import limits_for
    from planner.fleet import measure
    from planner.layout import parse_layout

    num, slo = 12, parse_slo("ttft_p95=300ms,tpot_p95=50ms")
    demand, engine = options.demand("lognormal:512~0.7/96~0.7", 1.0, None, None), options.engine("vllm")
    cluster, cut = options.clusters(["h100-sxm:8x8"])[0], parse_layout("tp=2")
    limits = limits_for(engine, cluster.system, None, None, 1)
    one = deploy(options.precision("mixtral-8x7b", None, None), cluster, cut, engine, limits, "all_reduce", 600)
    found = measure(one, demand, slo)
    each = load * found.most_per_s()
    (hour, *_) = live(found, Day((1.0,) * 24, num * each), policy(per_replica_per_s=each), fixed=num, step_s=600.0)
    fleet = replace(one, layout=with_replicas(cut, num))
    whole = run(fleet, demand.with_rate(num * each).with_num_requests(30_000), slo, seed=5, max_replicas=num).summary
    assert hour.percentile_s("tpot", 0.95) == pytest.approx(whole.tpot_s.p95, rel=0.05)
    assert hour.means_s[METRICS.index("tpot")] == pytest.approx(whole.tpot_s.mean, rel=0.05)
    assert hour.percentile_s("ttft", 0.95) == pytest.approx(whole.ttft_s.p95, rel=0.1)
    assert hour.attained == pytest.approx(whole.slo_attainment, abs=0.03)
