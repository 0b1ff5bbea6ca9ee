"""Experts in the event loop: draws, drops, drift, rebalancing, copies and residency, through whole simulations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import simpy

from planner.balance import balance_options, staleness, uneven_s
from planner.capacity import CapacityLimit
from planner.deployment import deploy, run
from planner.engine import Limits, engine
from planner.errors import DoesNotFit, Infeasible, InputError, LayoutError
from planner.experts import ExpertSettings
from planner.facts.experts import expert_facts, expert_warnings
from planner.hardware import parse_cluster
from planner.hostlink import HostLink
from planner.layout import parse_layout
from planner.loads import NUM_DRAWS
from planner.model import load
from planner.residency import Residency
from planner.routing import UNIFORM
from planner.routing.drift import Drift
from planner.workload import load_workload

WIDE = ("deepseek-v3", "h200-sxm:2x8", "attention_dp=16,ep=16", Limits(256, 8192))
SMALL = ("openai/gpt-oss-120b", "rtx-5090:1x4", "tp=1,replicas=2", Limits(4, 2048))


def deployed(where, settings=None, layout=None, backend="deepep"):
    model, cluster, text, limits = where
    cut = parse_layout(layout or text)
    backend = backend if cut.attention_dp > 1 else "all_reduce"
    chosen = (load(model), parse_cluster(cluster), cut, engine("vllm"), limits, backend, 1200)
    return deploy(*chosen, settings or ExpertSettings())


def simulated(where, settings=None, *, requests=1500, users=1024, layout=None):
    workload = load_workload("fixed:1000/100", concurrency=users, num_requests=requests)
    return run(deployed(where, settings, layout), workload)


def test_every_step_uses_a_draw_and_says_what_it_did():
    result = simulated(WIDE)
    steps, drawn = result.simulation.steps, result.expert_steps
    assert set(np.unique(steps.draw)) == set(range(NUM_DRAWS))
    assert drawn is not None and all(len(column) == len(steps) for column in drawn.columns().values())
    decoding = steps.prefill_tokens == 0
    full = decoding & (steps.decode_seqs > 900)
    assert 1.15 < drawn.max_over_mean[full].mean() < 1.4  # sixteen experts a rank level out more than four, 1.54
    assert drawn.max_over_mean[~decoding].mean() > drawn.max_over_mean[full].mean()
    assert (drawn.active_experts <= 16).all() and (drawn.drop_rate == 0).all() and (drawn.hit_rate == 1).all()
    # Steps of the same tokens take other times in other draws; the mean over 58 layers leaves little of it.
    same = decoding & (steps.decode_seqs == 1024)
    seconds = steps.step_s[same]
    assert 0.0005 < seconds.std() / seconds.mean() < 0.05


def test_uniform_balanced_and_skewed_traffic_come_in_that_order():
    rate = {
        name: simulated(WIDE, settings).output_tok_per_s
        for name, settings in {
            "uniform": ExpertSettings(skew=UNIFORM),
            "balanced": ExpertSettings(placement="eplb"),
            "skewed": ExpertSettings(),
        }.items()
    }
    assert rate["uniform"] > rate["balanced"] > rate["skewed"]


def test_equal_seeds_give_equal_steps():
    settings = ExpertSettings(placement="eplb", drift=Drift(200), rebalance_steps=100)
    first, second = (simulated(WIDE, settings).simulation.steps for _ in range(2))
    assert np.array_equal(first.step_s, second.step_s) and np.array_equal(first.draw, second.draw)


def test_drops_depend_on_the_step_and_cap_its_time():
    free = simulated(WIDE)
    capped = simulated(WIDE, ExpertSettings(limit=CapacityLimit("megatron", 1.0)))
    drawn, facts = capped.expert_steps, expert_facts(capped)
    assert drawn.drop_rate.std() > 0.01 and 0.02 < facts["drop_rate"] < 0.4
    assert 0 < facts["fully_dropped_rate"] < facts["drop_rate"] < facts["drop_rate_worst_step"]
    assert drawn.max_over_mean.mean() < free.expert_steps.max_over_mean.mean()
    assert capped.output_tok_per_s > free.output_tok_per_s
    assert expert_warnings(capped)[0].startswith("RED") and not expert_warnings(free)
    loose = simulated(WIDE, ExpertSettings(limit=CapacityLimit("megatron", 16.0)))
    assert loose.expert_steps.drop_rate.mean() < 1e-3


def test_a_stale_placement_loses_what_a_rebalance_wins_back():
    """Task switches every 60 steps; learning anew every 30 steps costs time, which asynchronous moves do not stall."""
    moving = ExpertSettings(placement="eplb", drift=Drift(switch_steps=60))
    still, stale = simulated(WIDE, replace(moving, drift=None)), simulated(WIDE, moving)
    fresh = simulated(WIDE, replace(moving, rebalance_steps=30, rebalance_async=True))
    stalled = simulated(WIDE, replace(moving, rebalance_steps=30))
    seen = [r.expert_steps.max_over_mean.mean() for r in (still, fresh, stale)]
    assert seen == sorted(seen) and seen[2] > 1.03 * seen[1]
    assert stale.num_rebalances == 0 and fresh.num_rebalances > 3
    assert fresh.rebalance_stall_s == 0 and stalled.rebalance_stall_s > stalled.num_rebalances * 1.0
    assert fresh.output_tok_per_s > stale.output_tok_per_s > stalled.output_tok_per_s


def test_copies_take_the_cache_and_level_the_ranks():
    plain = deployed(WIDE)
    copies = deployed(WIDE, ExpertSettings(placement="eplb"), "attention_dp=16,ep=16,redundant_experts=32")
    extra = copies.memory.terms["experts"] - plain.memory.terms["experts"]
    assert extra / plain.memory.terms["experts"] == pytest.approx(32 / 256, rel=1e-6)
    assert copies.memory.kv_tokens < plain.memory.kv_tokens
    with pytest.raises(LayoutError, match=r"redundant_experts=30: 256 \+ 30 .* Use 16 or 32"):
        deployed(WIDE, None, "attention_dp=16,ep=16,redundant_experts=30")
    with pytest.raises(LayoutError, match="or redundant_experts=32"):
        deployed(("deepseek-v3", "gb200-nvl72:18x4", "", Limits(64, 2048)), None, "attention_dp=72,ep=72")


def test_copies_make_odd_group_sizes_possible():
    """DeepSeek serves decode on EP144 with 32 redundant experts, two per GPU (handbook P1)."""
    wide = deployed(("deepseek-v3", "h200-sxm:18x8", "attention_dp=144,ep=144,redundant_experts=32", Limits(64, 2048)))
    assert wide.memory.terms["experts"] * 144 / 288 == pytest.approx(58 * 44_040_192, rel=0.01)


def test_balance_options_weigh_levelling_against_cache():
    result = simulated(WIDE)
    options = balance_options(result)
    own, balanced = options[0], options[1]
    assert (own.deployment.layout.redundant_experts, own.deployment.experts.placement) == (0, "contiguous")
    assert balanced.max_over_mean < own.max_over_mean and balanced.capacity_per_s > own.capacity_per_s
    caches = [option.kv_tokens for option in options[1:]]
    assert caches == sorted(caches, reverse=True) and len(set(caches)) == len(caches)
    stale = staleness(result)
    assert stale.stale_max_over_mean > 1.1 * stale.fresh_max_over_mean
    assert 1.0 < stale.rebalance_s < 3.0 and stale.break_even_steps > 10
    assert balance_options(simulated(WIDE, layout="tp=8", users=64, requests=100)) == ()


def test_uneven_experts_cost_what_they_add_to_a_decode_step():
    """Nothing where they are even; else the step less that of even experts, drawn at the tokens of the run."""
    assert uneven_s(simulated(WIDE, ExpertSettings(skew=UNIFORM))) == 0
    result = simulated(WIDE)
    level = replace(result.deployment, experts=ExpertSettings(skew=UNIFORM))
    decoding = result.simulation.steps.decode_seqs
    batch = round(decoding[decoding > 0].mean() / result.deployment.layout.attention_dp)
    at = np.array(float(batch)), np.array(1.0)
    expected = float(result.deployment.cost().decode(*at).total_s - level.cost().decode(*at).total_s)
    assert uneven_s(result) == pytest.approx(expected, rel=0.1)


def test_fetches_slow_steps_and_are_counted():
    result = simulated(SMALL, ExpertSettings(residency=Residency("lru"), dram_bytes=256e9), requests=40, users=4)
    drawn, facts = result.expert_steps, expert_facts(result)["residency"]
    decoding = result.simulation.steps.prefill_tokens == 0
    assert 0.5 < facts["hit_rate_decode"] < 0.8
    assert (drawn.miss_bytes[decoding] > 1e8).all()
    assert facts["resident_experts_per_layer"] < 128
    assert facts["miss_bytes_per_output_token"] > 1e8
    mean_s = result.simulation.steps.step_s[decoding].mean()
    assert mean_s > drawn.miss_bytes[decoding].mean() / 64e9  # no faster than the link


def test_replicas_behind_one_root_wait_for_each_other():
    settings = ExpertSettings(residency=Residency("lru"), dram_bytes=256e9)
    own = simulated(SMALL, settings, requests=40, users=4)
    shared = simulated(SMALL, replace(settings, gpus_per_root=2), requests=40, users=4)
    assert shared.output_tok_per_s < 0.8 * own.output_tok_per_s


def test_host_link_waits_as_a_simpy_resource_does():
    jobs = [(0.0, 2.0), (0.5, 1.0), (0.6, 0.5), (10.0, 1.0), (10.2, 1.0)]
    env = simpy.Environment()
    resource = simpy.Resource(env, capacity=1)
    waits = []

    def job(at_s, busy_s):
        yield env.timeout(at_s)
        with resource.request() as turn:
            yield turn
            waits.append(env.now - at_s)
            yield env.timeout(busy_s)

    for at_s, busy_s in jobs:
        env.process(job(at_s, busy_s))
    env.run()
    link = HostLink()
    assert [link.wait_s(*j) for j in jobs] == pytest.approx(waits)


def test_what_cannot_live_outside_hbm_is_refused():
    with pytest.raises(LayoutError, match="Use tp=16 alone"):
        deployed(WIDE, ExpertSettings(residency=Residency("lru")))
    with pytest.raises(DoesNotFit, match=r"39\.\d GB|must lie behind") as error:
        deployed(SMALL, ExpertSettings(residency=Residency("cpu"), dram_bytes=32e9))
    assert any("--dram" in remedy for remedy in error.value.remedies)


def test_settings_that_contradict_themselves_are_refused():
    with pytest.raises(InputError, match="ignores load"):
        ExpertSettings(rebalance_steps=100)
    with pytest.raises(InputError, match="0 steps"):
        ExpertSettings(placement="eplb", rebalance_steps=0)
    with pytest.raises(InputError, match="half-life of 0"):
        Drift(0)


def test_dispatch_buffers_chunk_or_stop_but_never_drop():
    """vLLM runs the layer again for what exceeds its chunk of 256 tokens, SGLang's assertion stops the server."""
    wide = replace(deployed(WIDE), limits=Limits(1024, 8192)).cost()
    whole, twice = (
        {k: float(v) for k, v in wide.decode(np.array(float(n)), np.array(1000.0)).terms.items()} for n in (240, 320)
    )
    assert 1.4 < twice["dispatch"] / whole["dispatch"] < 2.1
    with pytest.raises(Infeasible, match=r"300 tokens per rank exceed the dispatch buffer of sglang"):
        deploy(
            load("deepseek-v3"),
            parse_cluster("h200-sxm:2x8"),
            parse_layout("attention_dp=16,ep=16"),
            engine("sglang"),
            Limits(300, 4096),
            "deepep",
            1200,
        )
