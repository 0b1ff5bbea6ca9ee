"""Two pools: bytes on the wire, the way of a request, conservation, queues on the links, limits of fast links."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.disaggregation.deployment import pools, run_pools
from planner.disaggregation.handover import Handover, handover
from planner.disaggregation.pool import Pool
from planner.disaggregation.ranks import DecodeRank, PrefillRank
from planner.disaggregation.simulation import _PoolsRun, simulate_pools
from planner.disaggregation.transfer import KvRoute, KvShape, Nic, arrival_s, kv_route, kv_shape, send
from planner.engine import Limits, engine
from planner.enginespec import EngineSpec
from planner.errors import InputError, LayoutError
from planner.hardware import parse_cluster
from planner.layout import Layout, parse_layout
from planner.model import load
from planner.records import FINISHED, REJECTED
from planner.routers import least_requests
from planner.simulation import simulate
from planner.workload import Arrivals, Lengths, Workload, load_workload

H200 = parse_cluster("h200-sxm:4x8")
VLLM, SGLANG, TRTLLM = handover(engine("vllm")), handover(engine("sglang")), handover(engine("trtllm"))


class Timer:
    """Every step takes a base time and something per token."""

    draw, link_s = 0, 0.0

    def __init__(self, step_s: float = 0.01, token_s: float = 0.0):
        self.base_s, self.token_s = step_s, token_s

    def step_s(self, ranks):
        return self.base_s + self.token_s * max(w.prefill_tokens + w.decode_seqs for w in ranks)


def wire(bytes_per_s: float = 1e9, *, token_bytes: float = 1e3, latency_s: float = 0.0, layers: int = 10) -> KvRoute:
    """One GPU on each side; a token has `token_bytes`."""
    return KvRoute("wire", KvShape(((token_bytes, 0),), 0.0), 1, 1, 1, bytes_per_s, bytes_per_s, latency_s, layers)


def pools_of(prompt: str, rate: float = 5.0, num: int = 200) -> Workload:
    return load_workload(prompt, rate=rate, num_requests=num)


# --- bytes ---------------------------------------------------------------------------------------------------------


def nominal(route: KvRoute) -> KvRoute:
    return replace(route, sender_bytes_per_s=50e9, receiver_bytes_per_s=50e9, latency_s=0.0)


def test_a_prompt_of_4k_of_deepseek_v3_takes_5_8_ms_at_50_gb_per_s(deepseek):
    for layout in (Layout(attention_dp=8, ep=8), Layout(tp=8, ep=8)):
        route = nominal(kv_route(deepseek, layout, layout, H200, H200, False))
        assert route.shape.bytes(4096) == 70_272 * 4096 == 287_834_112
        assert route.transfer_s(4096) == pytest.approx(5.757e-3, rel=1e-3)


def test_mla_moves_once_per_gpu_that_stores_it(deepseek):
    dep, tep = Layout(attention_dp=8, ep=8), Layout(tp=8, ep=8)
    spread = kv_route(deepseek, tep, dep, H200, H200, False)
    copied = kv_route(deepseek, dep, tep, H200, H200, False)
    assert spread.moved_bytes(1) == 70_272
    assert copied.moved_bytes(1) == 8 * 70_272
    assert nominal(spread).sender_s(4096) == pytest.approx(nominal(spread).receiver_s(4096) / 8)
    assert nominal(copied).sender_s(4096) == pytest.approx(8 * nominal(copied).receiver_s(4096))


def test_heads_are_cut_and_copied_beyond_their_number():
    qwen = load("Qwen/Qwen3-235B-A22B")
    assert [kv_shape(qwen, tp).bytes(1) for tp in (1, 4, 8)] == [192_512, 48_128, 48_128]
    route = kv_route(qwen, Layout(tp=4, moe_tp=4), Layout(tp=8, moe_tp=8), H200, H200, False)
    assert route.moved_bytes(1) == 2 * 192_512


def test_windows_and_states_bound_what_moves():
    model = load("openai/gpt-oss-120b")
    whole, grows = model.kv_bytes_per_token, model.kv_growing_bytes_per_token
    assert kv_shape(model, 1).bytes(10) == 10 * whole
    long = kv_shape(model, 1).bytes(100_000) - kv_shape(model, 1).bytes(50_000)
    assert long == 50_000 * grows < 50_000 * whole
    hybrid = load("Qwen/Qwen3-Next-80B-A3B-Instruct")
    assert kv_shape(hybrid, 1).bytes(0) == hybrid.state_bytes_per_sequence > 0


def test_pools_in_one_scale_up_domain_use_it_and_others_the_network_card():
    model, small = load("mixtral-8x7b"), Layout(tp=2, moe_tp=2)
    inside = kv_route(model, small, small, H200, H200, True)
    outside = kv_route(model, replace(small, replicas=4), small, H200, H200, True)
    assert inside.sender_bytes_per_s == pytest.approx(0.7 * 450e9)
    assert outside.sender_bytes_per_s == pytest.approx(0.9 * 50e9)
    slower = kv_route(model, small, small, H200, parse_cluster("a100-80-sxm:1x8"), False)
    assert slower.receiver_bytes_per_s < slower.sender_bytes_per_s


def test_without_a_network_card_pools_must_share_a_domain():
    desk, model = parse_cluster("rtx-5090:1x8"), load("mixtral-8x7b")
    with pytest.raises(InputError, match=r"no network between nodes.*scale_out"):
        kv_route(model, Layout(tp=2, moe_tp=2), Layout(tp=2, moe_tp=2), desk, desk, False)


# --- the way of one request ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "ttft_s", "e2e_s"),
    [
        # prefill 0.5 s, transfer 1 s, decode steps of 0.1 s, three tokens
        (TRTLLM, 0.5, 0.5 + 1.0 + 2 * 0.1),
        (SGLANG, 0.5 + 1.0, 0.5 + 1.0 + 2 * 0.1),
        (VLLM, 0.5 + 1.0 + 0.1, 0.5 + 1.0 + 3 * 0.1),
    ],
)
def test_one_request_by_hand(rules: Handover, ttft_s: float, e2e_s: float) -> None:
    spec = EngineSpec(1, 1, 8192)
    workload = load_workload("fixed:1000/3", concurrency=1, num_requests=1)
    timers = Timer(0.5), Timer(0.1)
    run = simulate_pools(spec, spec, timers, wire(1e6), replace(rules, send="whole"), workload)
    np.testing.assert_allclose(run.requests.ttft_s, [ttft_s])
    np.testing.assert_allclose(run.requests.e2e_s, [e2e_s])
    np.testing.assert_allclose(run.handovers.transfer_s, [1.0])
    assert run.requests.produced_tokens.tolist() == [3]
    assert run.decode_steps.context_tokens[0] == 1000 + (rules is not VLLM)


@pytest.mark.parametrize(("rules", "e2e_s"), [(TRTLLM, 0.5), (SGLANG, 1.5), (VLLM, 1.6)])
def test_answers_of_one_token(rules: Handover, e2e_s: float) -> None:
    spec = EngineSpec(1, 1, 8192)
    workload = load_workload("fixed:1000/1", concurrency=1, num_requests=2)
    run = simulate_pools(spec, spec, (Timer(0.5), Timer(0.1)), wire(1e6), replace(rules, send="whole"), workload)
    np.testing.assert_allclose(run.requests.e2e_s, [e2e_s] * 2)
    assert run.requests.produced_tokens.tolist() == [1, 1]


def test_pieces_travel_while_the_prompt_is_computed() -> None:
    spec = EngineSpec(1, 1, 8192, max_batched_tokens=250, max_num_seqs=8)
    workload = load_workload("fixed:1000/2", concurrency=1, num_requests=1)
    exposed = {}
    for kind in ("whole", "chunks", "layers"):
        rules = replace(SGLANG, send=kind)
        run = simulate_pools(spec, spec, (Timer(0.5), Timer(0.1)), wire(1e6, layers=20), rules, workload)
        exposed[kind] = float(run.handovers.exposed_s[0])
    # 2 s of prompt in four chunks hide all of the 1 s transfer but its last piece
    assert exposed == pytest.approx({"whole": 1.0, "chunks": 0.25, "layers": 0.05})


def test_a_slow_link_is_not_hidden_by_pieces() -> None:
    route, nic = wire(1e6), Nic()
    start_s = send(route, nic, Nic(), 4000, 0.0, 1.0, 10)
    assert start_s == pytest.approx(0.1) and nic.free_s == pytest.approx(4.1)
    assert arrival_s(route, 4000, start_s, 1.0, 10) == pytest.approx(4.1)


# --- conservation --------------------------------------------------------------------------------------------------


def ended(run: _PoolsRun) -> None:
    for rank in (*run.prefill.ranks, *run.decode.ranks):
        assert rank.free_blocks == rank.total_blocks and rank.final_blocks == 0
        assert not rank.running and not rank.waiting
    assert not any(run.prefill.in_flight) and not any(run.decode.in_flight)


@settings(max_examples=150, deadline=None)
@given(
    rules=st.sampled_from([VLLM, SGLANG, TRTLLM]),
    send_as=st.sampled_from(["whole", "chunks", "layers"]),
    policy=st.sampled_from(["mixed", "prefill_first"]),
    reserve=st.sampled_from([0.0, 0.098, 1.0]),
    room=st.integers(120, 900),
    ranks=st.integers(1, 3),
    block=st.sampled_from([1, 16]),
    rate=st.sampled_from([2.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_tokens_and_blocks_are_conserved(rules, send_as, policy, reserve, room, ranks, block, rate, seed):
    if rules.reserve == "arrival":
        rules = replace(rules, send=send_as, reserved_decode_tokens=20)
    common: dict[str, Any] = {"block_tokens": block, "policy": policy, "admission_reserve": reserve}
    prefill = EngineSpec(2, ranks, room, max_num_seqs=4, max_batched_tokens=64, **common)
    decode = EngineSpec(1, ranks, room, max_num_seqs=3, max_batched_tokens=64, **common)
    workload = Workload("w", Lengths.uniform(1, 120), Lengths.uniform(1, 40), Arrivals.poisson(rate), 60)
    rngs = [least_requests(np.random.default_rng(0)) for _ in range(2)]
    both = (
        Pool(prefill, Timer(0.01, 1e-4), None, lambda: PrefillRank(prefill), rngs[0]),
        Pool(decode, Timer(0.02, 1e-4), None, lambda: DecodeRank(decode, rules), rngs[1]),
    )
    run = _PoolsRun(both, wire(2e5, latency_s=1e-3), rules, workload, seed)
    run.env.run()
    ended(run)
    requests, hand = run.request_table(), run.handover_table()
    done = requests.status == FINISHED
    assert (done | (requests.status == REJECTED)).all()
    np.testing.assert_array_equal(requests.produced_tokens[done], requests.output_tokens[done])
    prefilled = both[0].step_table().prefill_tokens.sum()
    assert prefilled == requests.prompt_tokens[done].sum()
    made = both[1].step_table()
    if not requests.num_preemptions.sum():
        own = requests.output_tokens[done] - (rules.first_token != "decoded")
        assert made.decode_seqs.sum() == own.sum() and not made.prefill_tokens.sum()
    for table, spec in ((both[0].step_table(), prefill), (made, decode)):
        assert (table.kv_tokens_used <= ranks * spec.kv_blocks_per_rank * block).all()
        assert (table.kv_tokens_used >= 0).all()
    moved = done & np.isfinite(hand.sent_s)
    order = [requests.arrival_s, hand.queued_s, requests.admitted_s, hand.prefilled_s, hand.arrived_s, hand.joined_s]
    for before, after in pairwise(order):
        assert (before[moved] <= after[moved] + 1e-12).all()
    assert (hand.reserved_s[moved] <= hand.arrived_s[moved]).all()
    assert (requests.first_token_s[done] <= requests.finish_s[done] + 1e-12).all()


def test_the_same_seed_gives_the_same_bytes():
    def once() -> bytes:
        spec = EngineSpec(2, 2, 4000)
        workload = Workload("w", Lengths.lognormal(300, 0.8), Lengths.lognormal(50, 0.8), Arrivals.poisson(20), 300)
        run = simulate_pools(spec, spec, (Timer(0.02, 1e-5), Timer()), wire(1e7), SGLANG, workload, seed=3)
        tables = (run.requests, run.handovers, run.prefill_steps, run.decode_steps)
        columns = [getattr(table, name) for table in tables for name in table.__slots__]
        return b"".join(column.tobytes() for column in columns if column is not None)

    assert once() == once()


# --- memory on both sides ------------------------------------------------------------------------------------------


def test_a_stuck_transfer_holds_memory_on_both_sides():
    prefill, decode = EngineSpec(1, 1, 400, block_tokens=1), EngineSpec(1, 1, 4000, block_tokens=1)
    workload = pools_of("fixed:100/20", rate=1000.0, num=12)
    run = simulate_pools(prefill, decode, (Timer(1e-3), Timer()), wire(1e5), TRTLLM, workload)
    assert (run.requests.status == FINISHED).all()
    # four prompts fill the prefill pool; a fifth is computed when a transfer of 1 s has ended
    np.testing.assert_allclose(np.sort(run.handovers.prefilled_s)[3:6], [0.004, 1.002, 2.002], atol=0.02)
    assert run.prefill_steps.kv_tokens_used.max() == 400
    # room on the decode side is taken before the bytes come
    assert (run.handovers.reserved_s <= run.handovers.sent_s).all()


def test_without_decode_room_the_kv_waits_on_the_prefill_side():
    prefill, decode = EngineSpec(1, 1, 4000, block_tokens=1), EngineSpec(1, 1, 150, block_tokens=1)
    workload = pools_of("fixed:100/20", rate=1000.0, num=5)
    run = simulate_pools(prefill, decode, (Timer(1e-3), Timer()), wire(1e9), TRTLLM, workload)
    gaps = np.diff(np.sort(run.handovers.reserved_s))
    assert (gaps > 0.18).all()  # one request at a time: 19 decode steps of 10 ms
    assert run.requests.ttft_s.max() < 0.05 and run.requests.tpot_s.max() > 0.03  # its first gap holds the wait
    early = simulate_pools(
        prefill,
        decode,
        (Timer(1e-3), Timer()),
        wire(1e9),
        replace(SGLANG, send="whole", reserved_decode_tokens=20),
        workload,
    )
    assert (early.handovers.queued_s == early.handovers.reserved_s).all()
    assert early.requests.ttft_s.max() > 0.5  # prompts are not computed before there is room


def test_reserved_decode_tokens_keep_room_for_running_requests():
    spec = EngineSpec(1, 1, 1000, block_tokens=1)
    workload = load_workload("fixed:100/100", concurrency=20, num_requests=60)
    plain, kept = (
        simulate_pools(
            spec, spec, (Timer(1e-3), Timer()), wire(1e9), replace(SGLANG, reserved_decode_tokens=n), workload
        )
        for n in (1, 100)
    )
    assert plain.requests.num_preemptions.sum() > 0 == kept.requests.num_preemptions.sum()
    assert kept.decode_steps.decode_seqs.max() == 5  # (100 + 100) x 5 = 1,000


def test_too_large_requests_are_rejected_with_the_reserve_counted():
    small, large = EngineSpec(1, 1, 400, block_tokens=1), EngineSpec(1, 1, 4000, block_tokens=1)
    workload = load_workload("fixed:300/50", concurrency=1, num_requests=3)
    for prefill, decode, rules, rejected in (
        (large, small, VLLM, 0),
        (large, small, SGLANG, 3),
        (replace(small, kv_tokens_per_rank=299), large, VLLM, 3),
    ):
        run = simulate_pools(prefill, decode, (Timer(), Timer()), wire(), rules, workload)
        assert run.num_rejected == rejected


# --- limits and queues ---------------------------------------------------------------------------------------------


def test_fast_links_give_the_prefill_only_and_the_decode_only_pool():
    spec = EngineSpec(2, 2, 100_000, max_batched_tokens=1024, max_num_seqs=64)
    workload = Workload("w", Lengths.uniform(200, 900), Lengths.fixed(40), Arrivals.poisson(30), 500)
    prompts_only = replace(workload, output=Lengths.fixed(1))
    timer = Timer(0.01, 2e-5)
    both = simulate_pools(spec, spec, (timer, Timer(0.02)), wire(1e15), TRTLLM, workload, seed=5)
    alone = simulate(spec, timer, prompts_only, seed=5)
    np.testing.assert_array_equal(both.requests.ttft_s, alone.requests.ttft_s)
    # 39 decode steps of 20 ms and the rest of the step that runs when the KV arrives
    assert both.requests.tpot_s.min() >= 0.02 - 1e-12
    assert both.requests.tpot_s.max() <= 0.02 * 40 / 39 + 1e-12


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_transfers_queue_like_m_d_1(load: float) -> None:
    spec = EngineSpec(1, 1, 10**7, max_num_seqs=4096)
    service_s = 0.1  # 100 tokens x 1 kB at 1 MB/s
    workload = load_workload("fixed:100/1", rate=load / service_s, num_requests=20_000)
    run = simulate_pools(
        spec, spec, (Timer(1e-7), Timer(1e-7)), wire(1e6), TRTLLM, replace(workload, output=Lengths.fixed(2)), seed=1
    )
    wait_s = run.handovers.link_wait_s[2000:].mean()
    assert wait_s == pytest.approx(load / (2 * (1 - load)) * service_s, rel=0.05)
    assert run.sender_busy_share == pytest.approx(load, rel=0.02)


def test_more_bandwidth_is_never_slower(deepseek):
    spec = EngineSpec(1, 2, 50_000)
    workload = pools_of("fixed:500/50", rate=20.0)
    means = []
    for rate in (1e7, 1e8, 1e9, 1e12):
        run = simulate_pools(spec, spec, (Timer(), Timer()), wire(rate), VLLM, workload)
        means.append(float(run.requests.ttft_s.mean()))
    assert means == sorted(means, reverse=True)


# --- deployments ---------------------------------------------------------------------------------------------------


def built(**changes: Any):
    model, profile = load("mixtral-8x7b"), engine("vllm")
    question: dict[str, Any] = {
        "model": model,
        "clusters": (H200, H200),
        "layouts": (parse_layout("tp=2,replicas=2"), parse_layout("tp=4")),
        "limits": (Limits(256, 8192), Limits(256, 8192)),
        "backends": ("allgather_reducescatter",) * 2,
        "engine": profile,
        "handover": VLLM,
        "workload": load_workload("chat", rate=4.0, num_requests=300),
        "shared": True,
    }
    return pools(**question | changes)


def test_a_pair_is_simulated_with_the_cost_model_and_priced():
    deployment = built()
    run = run_pools(deployment, load_workload("chat", rate=4.0, num_requests=300), whole=True)
    assert run.num_gpus == 8 and run.simulation.prefill.num_groups == 2
    assert run.usd_per_mtok_output == pytest.approx(
        deployment.usd_per_hour * 1e6 / 3600 / run.output_tok_per_s, rel=1e-9
    )


def test_multiples_of_a_pair_are_simulated_in_part_with_the_same_answer():
    dep = (parse_layout("attention_dp=8,ep=8,replicas=2"), parse_layout("attention_dp=8,ep=8,replicas=2"))
    deployment = built(layouts=dep)
    workload = load_workload("chat", rate=40.0, num_requests=3000)
    part, whole = run_pools(deployment, workload), run_pools(deployment, workload, whole=True)
    assert part.simulated_share == 1.0  # 32 ranks are not cut
    larger = deployment.with_replicas(4, 4)
    cut = run_pools(larger, load_workload("chat", rate=80.0, num_requests=3000))
    assert cut.simulated_share == 0.5
    assert cut.output_tok_per_s / 2 == pytest.approx(whole.output_tok_per_s, rel=0.05)


def test_pools_beyond_their_cluster_are_refused():
    with pytest.raises(LayoutError, match=r"32 GPUs and decode tp4 takes 4: 36 of the 32 of h200-sxm:4x8.*--decode-cl"):
        built(layouts=(parse_layout("tp=8,replicas=4"), parse_layout("tp=4")))
    with pytest.raises(LayoutError, match="decode pool: .*needs 64 GPUs"):
        built(layouts=(parse_layout("tp=2"), parse_layout("tp=8,replicas=8")))
    apart = built(
        layouts=(parse_layout("tp=8,replicas=4"), parse_layout("tp=4")),
        clusters=(H200, parse_cluster("h20:1x8")),
        shared=False,
    )
    assert apart.num_gpus == 36


def test_encoder_decoder_models_have_one_pool():
    with pytest.raises(InputError, match="encoder-decoder"):
        built(model=load("google/switch-base-8"))


def test_pieces_need_room_before_the_prompt():
    with pytest.raises(InputError, match="--kv-reserve arrival"):
        replace(VLLM, send="layers")
