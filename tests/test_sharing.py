"""Workloads that share prefixes or are conversations: drawing, reading, simulating, expecting their hits."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from planner.deployment import deploy, run
from planner.engine import Limits, engine
from planner.enginespec import EngineSpec
from planner.errors import WorkloadError
from planner.hardware import parse_cluster
from planner.layout import Layout
from planner.model import load
from planner.prefixhits import HitModel, caches_prefixes
from planner.records import FINISHED, REJECTED
from planner.simulation import simulate
from planner.steady import SteadyState, steady_state, steady_with_hits
from planner.workload import Arrivals, Lengths, SharedPrefix, Turns, Workload, load_workload

FIXED = Lengths.fixed
GROUPS = Workload("groups", FIXED(200), FIXED(20), Arrivals.poisson(10), 4000, SharedPrefix(100, FIXED(1000), 1.0))
TALKS = Workload(
    "talks",
    Lengths.lognormal(200, 0.6),
    Lengths.lognormal(40, 0.6),
    Arrivals.poisson(10),
    5000,
    turns=Turns(Lengths.uniform(1, 9), think_s=20.0),
)


class LinearTimer:
    draw = 0
    link_s = 0.0

    def step_s(self, ranks):
        return max(0.03 + 2e-6 * w.prefill_tokens + 1e-5 * w.decode_seqs for w in ranks)


def simulated(workload, kv_tokens, ranks=1, router="least_requests", seed=0, **changes):
    spec = EngineSpec(1, ranks, kv_tokens, prefix_caching=True, **changes)
    return simulate(spec, LinearTimer(), workload, seed=seed, router=router)


def hit_rate(workload, kv_tokens, ranks=1, router="least_requests"):
    return simulated(workload, kv_tokens, ranks, router).summary().prefix_hit_rate


def same(one, other):
    ours, theirs = ({**t.requests.columns(), **t.steps.columns()} for t in (one, other))
    assert ours.keys() == theirs.keys()
    for name, column in ours.items():
        np.testing.assert_array_equal(column, theirs[name], err_msg=name)


# --- drawing -------------------------------------------------------------------------------------------------


def test_prompt_has_its_prefix_and_groups_their_popularity():
    workload = replace(GROUPS, num_requests=50_000)
    sent = workload.requests(3)
    assert set(sent.prompt_tokens) == {1200}
    assert workload.mean_prompt_tokens == workload.max_prompt_tokens == 1200
    share = np.bincount(sent.sharing.group, minlength=100) / 50_000
    np.testing.assert_allclose(share, workload.prefix.popularity, atol=0.006)
    assert workload.prefix.popularity[0] == pytest.approx(2 * workload.prefix.popularity[1])


def test_prefix_length_is_the_same_for_all_of_a_group():
    workload = replace(GROUPS, prefix=SharedPrefix(5, Lengths.uniform(10, 1000)))
    sharing = workload.requests(0).sharing
    for group in range(5):
        assert len(set(sharing.shared_tokens[sharing.group == group])) == 1


def test_turns_send_the_whole_history():
    run = simulated(replace(TALKS, num_requests=800, prefix=SharedPrefix(3, FIXED(64))), 10**7)
    requests = run.requests
    assert (requests.status == FINISHED).all()
    for talk in np.unique(requests.conversation):
        rows = np.flatnonzero(requests.conversation == talk)
        prompts, outputs = requests.prompt_tokens[rows], requests.output_tokens[rows]
        grown = prompts[1:] - prompts[:-1] - outputs[:-1]
        assert (grown >= 1).all()
        assert prompts[0] > 64
        gaps_s = requests.arrival_s[rows][1:] - requests.finish_s[rows][:-1]
        assert (gaps_s > 0).all()
        history = prompts[:-1] + outputs[:-1] - 1
        np.testing.assert_array_equal(requests.cached_tokens[rows][1:], history // 16 * 16)


def test_history_is_prompts_and_answers_to_the_token():
    turns = Turns(FIXED(4), think_s=0.0)
    sent = Workload("t", FIXED(10), FIXED(7), Arrivals.closed(1), 8, turns=turns).requests(0)
    np.testing.assert_array_equal(sent.prompt_tokens[:8], [10, 27, 44, 61] * 2)


def test_rate_counts_requests_and_conversations_are_over_in_order():
    run = simulated(TALKS, 10**7)
    assert len(run.requests) == TALKS.num_requests
    assert np.all(np.diff(run.requests.arrival_s) >= 0)
    summary = run.summary()
    assert summary.requests_per_s == pytest.approx(10, rel=0.1)
    assert summary.num_warmup >= 10 * 0.5 * TALKS.conversation_think_s


def test_conversations_end_before_the_context_is_full():
    workload = replace(TALKS, turns=replace(TALKS.turns, max_context_tokens=1500))
    sent = workload.requests(0)
    first = np.isnan(sent.sharing.think_s)
    assert ((sent.prompt_tokens + sent.output_tokens)[~first] <= 1500).all()
    assert workload.mean_turns < TALKS.mean_turns == pytest.approx(5, abs=0.1)


def test_closed_loop_users_talk_think_and_begin_anew():
    workload = replace(TALKS.with_concurrency(8), turns=Turns(FIXED(3), 2.0, 0.0), num_requests=240)
    requests = simulated(workload, 10**6).requests
    talking = [
        int(((requests.arrival_s <= t) & (requests.finish_s > t)).sum()) for t in requests.arrival_s[:200].tolist()
    ]
    assert max(talking) <= 8
    assert np.bincount(requests.conversation).max() == 3
    rows = np.flatnonzero(requests.conversation == 5)
    np.testing.assert_allclose(requests.arrival_s[rows][1:] - requests.finish_s[rows][:-1], 2.0)


def test_a_turn_that_is_too_large_ends_its_conversation():
    workload = replace(TALKS.with_concurrency(4), turns=Turns(FIXED(9), 0.0), num_requests=200)
    requests = simulated(workload, 1600).requests
    assert len(requests) == 200
    assert (requests.status != REJECTED).any()
    rejected = np.flatnonzero(requests.status == REJECTED)
    assert len(rejected)
    for row in rejected:
        assert not (requests.conversation[row + 1 :] == requests.conversation[row]).any()


# --- the same as without, where there is nothing to find --------------------------------------------------------


@pytest.mark.parametrize("router", ["least_requests", "prefix_affinity"])
def test_without_sharing_a_cache_changes_no_byte(router):
    plain = load_workload("chat", rate=5, num_requests=300)
    cached, bare = (
        simulate(EngineSpec(2, 2, 20_000, prefix_caching=on), LinearTimer(), plain, router=router)
        for on in (True, False)
    )
    same(cached, bare)
    assert "cached_tokens" not in cached.requests.columns()
    assert cached.summary().prefix_hit_rate == 0.0
    same(bare, simulate(EngineSpec(2, 2, 20_000), LinearTimer(), plain))


def test_groups_of_one_request_change_only_the_columns_of_sharing(tmp_path):
    rows = [(round(i * 0.05, 3), 50 + 61 * i % 900, 1 + 17 * i % 80) for i in range(400)]
    plain, alone = tmp_path / "plain.csv", tmp_path / "alone.csv"
    plain.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{a},{p},{o}\n" for a, p, o in rows))
    alone.write_text(
        "arrival_s,prompt_tokens,output_tokens,prefix_group,shared_tokens\n"
        + "".join(f"{a},{p},{o},g{i},{p}\n" for i, (a, p, o) in enumerate(rows))
    )
    bare = simulated(load_workload(str(plain)), 60_000)
    cached = simulated(load_workload(str(alone)), 60_000)
    assert not cached.requests.cached_tokens.any()
    for name, column in bare.requests.columns().items():
        np.testing.assert_array_equal(column, cached.requests.columns()[name], err_msg=name)
    for name, column in bare.steps.columns().items():
        np.testing.assert_array_equal(column, cached.steps.columns()[name], err_msg=name)


def test_switched_off_computes_every_token_and_keeps_the_requests():
    workload = replace(GROUPS, num_requests=300)
    on, off = (
        simulate(EngineSpec(1, 1, 10**6, prefix_caching=caching), LinearTimer(), workload) for caching in (True, False)
    )
    np.testing.assert_array_equal(on.requests.prompt_tokens, off.requests.prompt_tokens)
    assert not off.requests.cached_tokens.any()
    assert off.steps.prefill_tokens.sum() == 300 * 1200
    assert on.steps.prefill_tokens.sum() == 300 * 1200 - on.requests.cached_tokens.sum()
    assert on.steps.cached_tokens.sum() == on.requests.cached_tokens.sum()


@pytest.mark.parametrize("workload", [GROUPS, TALKS])
def test_same_seed_same_bytes(workload):
    short = replace(workload, num_requests=400)
    runs = [simulated(short, 30_000, 2, "prefix_affinity", seed=5) for _ in range(2)]
    same(*runs)
    other = simulated(short, 30_000, 2, "prefix_affinity", seed=6)
    assert not np.array_equal(runs[0].requests.arrival_s, other.requests.arrival_s)


# --- routing and load --------------------------------------------------------------------------------------------


def test_spread_conversations_find_their_history_on_one_of_dp_ranks():
    """With enough room only the rank of the last turn has all of it: hits fall towards 1 / dp, less older turns."""
    two_turns = replace(TALKS, turns=Turns(FIXED(2), 10.0), num_requests=3000)
    alone = hit_rate(two_turns, 10**7)
    assert hit_rate(two_turns, 10**7, 8, "round_robin") == pytest.approx(alone / 8, rel=0.25)
    assert hit_rate(two_turns, 10**7, 8, "prefix_affinity") == pytest.approx(alone, rel=0.05)


def test_affinity_gives_small_groups_one_rank_each():
    """Eight caches of a tenth of all prefixes hold nearly all of them together, but each a tenth when all see all."""
    even = replace(GROUPS, prefix=SharedPrefix(100, FIXED(1000)), num_requests=3000)
    spread = hit_rate(even, 14_000, 8, "round_robin")
    sticky = hit_rate(even, 14_000, 8, "prefix_affinity")
    assert spread < 0.12
    assert sticky > 4 * spread


def test_affinity_lets_a_popular_group_overflow():
    one = replace(GROUPS, prefix=SharedPrefix(1, FIXED(1000)), arrivals=Arrivals.poisson(1000), output=FIXED(100))
    requests = simulated(one, 10**6, 4, "prefix_affinity").requests
    share = np.bincount(requests.rank, minlength=4) / len(requests)
    assert share.min() > 0.1


def test_hits_fall_as_load_rises():
    rates = [hit_rate(TALKS.with_rate(rate).with_num_requests(2500), 60_000) for rate in (4, 10, 25)]
    assert rates[0] > 1.2 * rates[1] > 1.5 * rates[2]


# --- closed form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workload", "kv_tokens", "ranks", "router"),
    [
        (GROUPS, 20_000, 1, "round_robin"),
        (GROUPS, 50_000, 1, "round_robin"),
        (GROUPS, 300_000, 1, "round_robin"),
        (GROUPS, 50_000, 4, "round_robin"),
        (GROUPS, 50_000, 4, "prefix_affinity"),
        (TALKS, 50_000, 1, "round_robin"),
        (TALKS, 150_000, 1, "round_robin"),
        (TALKS, 50_000, 4, "round_robin"),
        (TALKS, 600_000, 4, "least_requests"),
        (TALKS, 50_000, 4, "prefix_affinity"),
        (replace(TALKS, prefix=SharedPrefix(20, FIXED(800), 1.0)), 100_000, 1, "round_robin"),
    ],
)
def test_expected_hits_are_within_three_points_of_the_simulation(workload, kv_tokens, ranks, router):
    found = simulated(workload, kv_tokens, ranks, router)
    stay_s = float((found.requests.finish_s - found.requests.admitted_s).mean())
    rate = workload.arrivals.rate_per_s / ranks
    model = HitModel(workload, 16, ranks, router == "prefix_affinity")
    expected = model.hits(kv_tokens, np.array([rate * stay_s]), np.array([rate])).share[0]
    assert expected == pytest.approx(found.summary().prefix_hit_rate, abs=0.03)
    assert expected <= model.most + 1e-12


def test_expected_hits_know_their_limits():
    model = HitModel(GROUPS, 16, 1, False)
    batch, rate = np.array([1.0, 10.0, 100.0]), np.array([10.0, 10.0, 10.0])
    everything = model.hits(1e12, batch, rate)
    np.testing.assert_allclose(everything.share, 992 / 1200, rtol=1e-6)
    sizes = [model.hits(kv, batch, rate).share for kv in (5e3, 2e4, 5e4, 2e5)]
    assert all((small <= large + 1e-12).all() for small, large in pairwise(sizes))
    running = everything.running_tokens
    assert (running < batch * 1210).all()
    assert (np.diff(running) > 0).all()


# --- deployments and the command line ---------------------------------------------------------------------------


def test_engines_cache_by_default_and_models_with_state_do_not(vllm):
    assert all(engine(name).prefix_caching for name in ("vllm", "sglang", "trtllm"))
    assert caches_prefixes(load("mixtral-8x7b"), vllm)
    assert not caches_prefixes(load("qwen3-next-80b-a3b"), vllm)
    assert not caches_prefixes(load("mixtral-8x7b"), replace(vllm, prefix_caching=False))


def test_more_replicas_are_simulated_when_hits_depend_on_them(vllm):
    model, cluster = load("mixtral-8x7b"), parse_cluster("h100-sxm:1x8")
    layout, limits = Layout(tp=2, moe_tp=2, replicas=4), Limits(256, 8192)
    talks = replace(TALKS, num_requests=300)
    deployment = deploy(model, cluster, layout, vllm, limits, "all_reduce", 1000)
    assert run(deployment, talks).simulation.spec.num_groups == 4
    assert run(deployment, replace(GROUPS, num_requests=300)).simulation.spec.num_groups == 2


ARGUMENTS = ("mixtral-8x7b", "--cluster", "h100-sxm:1x2", "--layout", "tp=2", "--num-requests", "200")


def test_simulate_prints_and_writes_what_was_found(moeplan, tmp_path):
    folder = tmp_path / "run"
    code, out, err = moeplan("simulate", *ARGUMENTS, "--workload", "multi-turn", "--rate", "4", "--out", str(folder))
    assert code == 0, err
    assert "Prefix cache: " in out
    assert "of the prompt tokens found, blocks of 16\n" in out
    header = (folder / "requests.csv").read_text().splitlines()[0].split(",")
    assert header[-3:] == ["prefix_group", "conversation", "cached_tokens"]
    assert "cached_tokens" in (folder / "steps.csv").read_text().splitlines()[0].split(",")
    assert json.loads((folder / "simulation.json").read_text())["prefix_cache"]["hit_rate"] > 0.4


def test_simulate_without_the_cache_says_so(moeplan):
    flags = ("--workload", "agents", "--rate", "4", "--json")
    with_cache, without = (
        json.loads(moeplan("simulate", *ARGUMENTS, *flags, *off)[1]) for off in ((), ("--no-prefix-cache",))
    )
    assert without["prefix_cache"]["enabled"] is False
    assert without["prefix_cache"]["hit_rate"] == 0.0
    assert with_cache["ttft_s"]["mean"] < without["ttft_s"]["mean"]
    _, out, _ = moeplan("simulate", *ARGUMENTS, *flags[:-1], "--no-prefix-cache")
    assert "Prefix cache: none, it is switched off" in out


def test_plan_meets_with_the_cache_what_it_misses_without(moeplan, tmp_path):
    question = ("plan", "mixtral-8x7b", "--cluster", "h100-sxm:1x4", "--workload", "agents", "--rate", "6")
    slo = ("--slo", "ttft_p95=1s,tpot_p95=40ms", "--num-requests", "300", "--calibration", "off")
    folder = tmp_path / "plan"
    _, out, err = moeplan(*question, *slo, "--json", "--out", str(folder))
    cached = json.loads(out)
    bare = json.loads(moeplan(*question, *slo, "--json", "--no-prefix-cache")[1])
    assert cached["meets_slo"], err
    assert not bare["meets_slo"]
    assert cached["prefix_cache"]["hit_rate"] > 0.3
    lines = (folder / "layouts.csv").read_text().splitlines()
    column = lines[0].split(",").index("estimated_prefix_hit_rate")
    assert {float(line.split(",")[column]) > 0.2 for line in lines[1:]} == {True}


TOML = "[prompt]\nkind='fixed'\ntokens=100\n[output]\nkind='fixed'\ntokens=10\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[prefix]\ngroups=4\n", "prefix.tokens: Field required"),
        ("[prefix]\ngroups=0\ntokens={kind='fixed',tokens=5}\n", "prefix: 0 groups: use 1 to"),
        ("[prefix]\ngroups=4\ntokens={kind='fixed',tokens=0}\n", "0 tokens"),
        ("[prefix]\ngroups=4\ntokens={kind='fixed',tokens=5}\nzipf=nan\n", "prefix: zipf nan must lie in [0, 10]"),
        ("[prefix]\ngroups=4\ntokens={kind='fixed',tokens=5}\nzipff=1\n", "unknown key (did you mean zipf?"),
        ("[turns]\ncount={kind='fixed',tokens=3}\nthink_s=-1.0\n", "turns: think_s -1 must lie in [0, 86400] s"),
        ("[turns]\ncount={kind='fixed',tokens=3}\nthink_s=nan\n", "turns: think_s nan must lie in"),
        ("[turns]\ncount={kind='fixed',tokens=3}\n", "turns.think_s: Field required"),
        ("[turns]\ncount={kind='fixed',tokens=3}\nthink_s=1\nthink_cv=inf\n", "turns: think_cv inf must lie in"),
        ("[turns]\ncount={kind='fixed',tokens=5000}\nthink_s=1\n", "up to 5,000 turns: use at most 1,000"),
        ("[turns]\ncount={kind='fixed',tokens=3}\nthink_s=1\nmax_context_tokens=1\n", "leaves no room for a turn"),
    ],
)
def test_bad_tables_of_a_workload_file(moeplan, tmp_path, text, message):
    path = tmp_path / "w.toml"
    path.write_text(TOML + text)
    code, _, err = moeplan("simulate", *ARGUMENTS, "--workload", str(path))
    assert code == 2
    assert message in err


def test_workload_file_with_both_tables(tmp_path):
    path = tmp_path / "w.toml"
    path.write_text(
        TOML + "[prefix]\ngroups=4\ntokens={kind='fixed',tokens=500}\nzipf=1\n"
        "[turns]\ncount={kind='uniform',minimum=1,maximum=3}\nthink_s=5\nthink_cv=0\nmax_context_tokens=4096\n"
    )
    workload = load_workload(str(path), rate=2.0)
    assert workload.prefix == SharedPrefix(4, FIXED(500), 1.0)
    assert workload.turns == Turns(Lengths.uniform(1, 3), 5.0, 0.0, 4096)
    assert "4 shared prefixes of 500 tokens, zipf 1, conversations of 1-3 turns, 5 s between them" in str(workload)


HEADER = "arrival_s,prompt_tokens,output_tokens,prefix_group,shared_tokens,conversation\n"


def test_trace_with_groups_and_conversations(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + "0,100,10,a,64,\n1,200,10,a,64,\n2,120,30,,,x\n9,400,10,,,x\n9.5,100,10,b,64,\n")
    workload = load_workload(str(path), num_requests=10)
    sharing = workload.requests(0).sharing
    np.testing.assert_array_equal(sharing.group, [0, 0, -1, -1, 1] * 2)
    np.testing.assert_array_equal(sharing.conversation, [-1, -1, 0, 0, -1, -1, -1, 1, 1, -1])
    found = simulated(workload.with_num_requests(5), 10**5).requests
    np.testing.assert_array_equal(found.cached_tokens, [0, 64, 0, 144, 0])
    assert math.isfinite(HitModel(workload, 16, 2, False).most)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0,100,10,a,200,\n", "line 2: shared_tokens 200 exceed prompt_tokens 100"),
        ("0,100,10,a,,\n", "line 2: shared_tokens '' of prefix_group 'a' is not a whole number"),
        ("0,100,10,a,nan,\n", "line 2: shared_tokens 'nan' of prefix_group 'a'"),
        ("0,100,10,a,-5,\n", "line 2: shared_tokens '-5' of prefix_group 'a'"),
        ("0,100,10,,50,\n", "line 2: shared_tokens '50' without a prefix_group"),
        ("0,100,10,,,x\n1,105,10,,,x\n", "line 3: prompt_tokens 105 of conversation 'x' do not exceed the 110"),
        ("0,100,10,a,50,x\n1,300,10,b,50,x\n", "line 3: conversation 'x' changes its prefix_group"),
    ],
)
def test_bad_sharing_in_a_trace(tmp_path, rows, message):
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + rows)
    with pytest.raises(WorkloadError) as fault:
        load_workload(str(path))
    assert message in str(fault.value)


def test_a_run_shorter_than_its_conversations_says_so(moeplan):
    flags = ("--workload", "multi-turn", "--rate", "20", "--calibration", "off")
    _, out, _ = moeplan("simulate", *ARGUMENTS, *flags)
    assert re.search(r"a conversation takes [67]\d s: later turns are too few", out)
    assert "Use --num-requests 4" in out
    assert load_workload("multi-turn", rate=20.0).num_requests >= 5 * 20 * 59


def test_lru_of_even_groups_finds_the_share_that_fits():
    """Without popularity and private blocks an LRU cache of C of N equal prefixes finds C / N."""
    one = Workload("even", FIXED(1), FIXED(1), Arrivals.poisson(1), 6000, SharedPrefix(100, FIXED(160)))
    for held in (25, 60):
        assert hit_rate(one, 160 * held + 16) == pytest.approx(held / 100 * 160 / 161, abs=0.03)


def test_unknown_router_is_refused(moeplan):
    code, _, err = moeplan("simulate", *ARGUMENTS, "--router", "sticky")
    assert code == 2
    assert "prefix_affinity" in err


def test_plan_of_a_recorded_trace_expects_its_hits(moeplan, tmp_path):
    path, folder = tmp_path / "trace.csv", tmp_path / "plan"
    rows = [f"{i * 0.2:.1f},{1000 + i % 7 * 50},{40 + i % 5},g{i % 3},900,\n" for i in range(300)]
    path.write_text(HEADER + "".join(rows))
    question = ("plan", "mixtral-8x7b", "--cluster", "h100-sxm:1x2", "--workload", str(path), "--out", str(folder))
    code, out, err = moeplan(*question)
    assert code == 0, err
    assert "Prefix cache: 77.9% of the prompt tokens found" in out
    header, *lines = (folder / "layouts.csv").read_text().splitlines()
    column = header.split(",").index("estimated_prefix_hit_rate")
    assert all(float(line.split(",")[column]) == pytest.approx(896 / 1150, abs=0.01) for line in lines)
    assert "## Shared prefixes" in (folder / "report.md").read_text()


def test_thinking_users_fill_fewer_places():
    batch = np.array([1.0, 10.0, 100.0])
    rate = np.array([0.5, 2.0, 4.0])
    nothing = np.zeros(3)
    steady = SteadyState(
        batch, nothing, rate, nothing, nothing, nothing, 0.0, 1.0, nothing, np.array([100.0, 900.0, 8000.0])
    )
    np.testing.assert_array_equal(steady.batch_of(np.array([50.0]), 0.0), [50.0])
    np.testing.assert_allclose(steady.batch_of(np.array([6.0, 30.0]), 10.0), [1.0, 10.0])
    assert steady.batch_within(900.0, 1.0) == 10.0
    assert steady.batch_within(50.0, 1.0) == 0.5


def test_layouts_are_ranked_with_what_the_cache_can_hold(mixtral, vllm):
    cluster, limits = parse_cluster("h100-sxm:1x2"), Limits(256, 8192)
    deployment = deploy(mixtral, cluster, Layout(tp=2, moe_tp=2), vllm, limits, "all_reduce", 1000)
    model = HitModel(TALKS, 16, 1, False)
    small, large, never = (
        steady_with_hits(deployment.cost(), 8192, "mixed", TALKS, model, kv_tokens)
        for kv_tokens in (30_000, 10**6, 100)
    )
    assert (small.hit_rate <= large.hit_rate + 1e-9).all()
    assert small.hit_rate[3] < 0.8 * large.hit_rate[3]
    assert (large.requests_per_s >= never.requests_per_s).all()
    plain = steady_state(deployment.cost(), 8192, "mixed", TALKS)
    np.testing.assert_allclose(never.tpot_s, plain.tpot_s)
