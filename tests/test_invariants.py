"""What must hold for any model, cluster, layout and workload: a few draws by default, thousands with `-m slow`.

Kept elsewhere, by the same means: blocks of the KV pool (test_combinations), tokens of answered requests
(test_simulation), assignments that are served or dropped, and drops that fall with the capacity factor (test_drops),
experts that are placed once and loads that are not lost (test_placement), bilinear tables (test_cost).
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner.calibration import OFF
from planner.cost import StepCost
from planner.deployment import deploy
from planner.economics import fleet_usd, usd_per_mtok
from planner.engine import Engine, Limits, engine
from planner.enginespec import POLICIES, EngineSpec
from planner.hardware import Cluster, System, system
from planner.layout import Layout, layout_problem, parse_layout
from planner.memory import TERMS, Ledger
from planner.model import ModelConfig, from_hf, load
from planner.options import parse_bytes
from planner.records import FINISHED, REJECTED
from planner.simulation import simulate
from planner.steady import steady_state
from planner.steptime import Floats
from planner.timer import CostTimer
from planner.units import format_bytes, format_seconds
from planner.workload import Arrivals, Lengths, Workload, load_workload, parse_slo

AG = "allgather_reducescatter"
_MANY = 1500
GPUS = ("h200-sxm", "h100-sxm", "b200-sxm", "mi300x", "a100-80-sxm", "l40s", "tpu-v5p", "mi355x")
BUNDLED = ("mixtral-8x7b", "deepseek-v3", "qwen3-235b-a22b", "gpt-oss-120b", "deepseek-v2-lite", "llama-4-maverick")


def draws(few: int, many: int = _MANY) -> pytest.MarkDecorator:
    """Runs a test with `few` examples, and as a slow test with `many`."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


def holds(check: Callable[..., None], examples: int, **strategies: st.SearchStrategy[Any]) -> None:
    """`check` for `examples` draws of `strategies`, the same ones every time; at least a quarter must be of use."""
    completed = 0

    @functools.wraps(check)
    def counted(**values: Any) -> None:
        nonlocal completed
        check(**values)
        completed += 1

    unhurried = settings(
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
    )
    unhurried(given(**strategies)(counted))()
    assert completed >= examples / 4, f"{completed} of {examples} draws were valid"


@st.composite
def small_models(draw: st.DrawFn) -> ModelConfig:
    """A mixture of experts of the Mixtral or Qwen3 family with any shape."""
    heads, head_dim = draw(st.sampled_from([8, 16, 32, 64])), draw(st.sampled_from([64, 128]))
    experts = draw(st.sampled_from([4, 8, 16, 64, 128]))
    width = draw(st.sampled_from([768, 1536, 4096, 14336]))
    config = {
        "hidden_size": draw(st.sampled_from([1024, 2048, 4096, 6144])),
        "num_hidden_layers": draw(st.integers(1, 64)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([k for k in (1, 2, 4, 8) if k <= heads])),
        "head_dim": head_dim,
        "vocab_size": draw(st.sampled_from([32000, 151936])),
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
        "num_experts_per_tok": draw(st.integers(1, min(8, experts))),
        "intermediate_size": width,
    }
    if draw(st.booleans()):
        named = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": experts}
    else:
        named = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": experts,
            "moe_intermediate_size": width,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
    return from_hf(config | named, "any")


MODELS = st.one_of(small_models(), st.sampled_from(BUNDLED).map(load))
SYSTEMS = st.sampled_from(GPUS).map(system)
DEGREES = st.builds(
    Layout,
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.sampled_from([1, 1, 2, 4]),
    ep=st.sampled_from([1, 2, 4, 8, 16]),
    attention_dp=st.sampled_from([1, 1, 2, 8]),
    moe_tp=st.sampled_from([1, 2, 4, 8]),
)
LIMITS = st.builds(Limits, st.sampled_from([1, 16, 256]), st.sampled_from([1024, 8192]))


def valid(model: ModelConfig, layout: Layout) -> Layout:
    """`layout` if it is one, with the expert degrees that its GPUs leave; other draws are thrown away."""
    experts = model.moe.num_experts if model.moe else 1
    ep = max(e for e in range(1, layout.stage_gpus + 1) if layout.stage_gpus % e == 0 and experts % e == 0)
    ep = min(ep, layout.ep) if layout.stage_gpus % min(ep, layout.ep) == 0 else ep
    found = replace(layout, ep=ep, moe_tp=layout.stage_gpus // ep)
    assume(layout_problem(model, found) is None)
    return found


def scaled(profile: System, **factors: float) -> System:
    """A system without measured tables, whose quantities are multiples of those of `profile`."""
    gpu, ups = profile.gpu, profile.scale_up
    flop, hbm, links = (factors.get(name, 1.0) for name in ("flop", "hbm", "links"))
    faster = replace(
        gpu,
        hbm_bytes=gpu.hbm_bytes * factors.get("room", 1.0),
        hbm_bytes_per_s=gpu.hbm_bytes_per_s * hbm,
        flop_per_s=tuple((fmt, rate * flop) for fmt, rate in gpu.flop_per_s),
        matmul_flop_per_s=tuple((fmt, rate * flop) for fmt, rate in gpu.matmul_flop_per_s),
    )
    return replace(profile, name="unmeasured", gpu=faster, scale_up=replace(ups, bytes_per_s=ups.bytes_per_s * links))


def uncalibrated(name: str = "vllm") -> Engine:
    return replace(engine(name), calibrations=OFF)


def cluster_of(profile: System, layout: Layout) -> Cluster:
    per_node = min(profile.gpus_per_node, layout.replica_gpus)
    nodes = -(-layout.replica_gpus // per_node)
    assume(nodes == 1 or profile.scale_out is not None)
    return Cluster(profile, nodes, per_node)


# --- memory ---


@draws(25)
def test_ledger_terms_sum_to_the_device_for_any_model(examples: int) -> None:
    def check(model: ModelConfig, profile: System, degrees: Layout, limits: Limits, name: str, context: int) -> None:
        use = Ledger(model, profile, engine(name)).use(valid(model, degrees), limits, AG, context)
        assert tuple(use.terms) == tuple(term for term in TERMS if term in use.terms)
        assert min(use.terms.values()) >= 0
        if use.fits:
            assert sum(use.terms.values()) == pytest.approx(profile.gpu.hbm_bytes)
            assert use.kv_tokens > 0 and use.breaking_term is None
        else:
            assert use.kv_tokens == 0 and use.breaking_term in use.terms
        assert use.weight_bytes <= use.needed_bytes

    names = st.sampled_from(["vllm", "sglang", "trtllm"])
    contexts = st.sampled_from([256, 4096, 65536])
    holds(check, examples, model=MODELS, profile=SYSTEMS, degrees=DEGREES, limits=LIMITS, name=names, context=contexts)


@draws(15)
def test_what_fits_fits_a_larger_gpu_too(examples: int) -> None:
    """SGLang keeps 10 GiB back on devices above 60 GiB only, so its sizes are compared on one side of that."""

    def check(model: ModelConfig, degrees: Layout, name: str, sizes: tuple[float, float]) -> None:
        small, large = sorted(sizes)
        assume(name != "sglang" or (small > 60 * 2**30) == (large > 60 * 2**30))
        layout, profile = valid(model, degrees), system("h100-sxm")
        uses = []
        for size in (small, large):
            sized = replace(profile, gpu=replace(profile.gpu, hbm_bytes=size))
            uses.append(Ledger(model, sized, engine(name)).use(layout, Limits(64, 2048), AG, 4096))
        assert uses[1].fits or not uses[0].fits
        assert uses[1].kv_tokens >= uses[0].kv_tokens

    sizes = st.tuples(st.floats(16e9, 300e9), st.floats(16e9, 300e9))
    names = st.sampled_from(["vllm", "sglang", "trtllm"])
    holds(check, examples, model=MODELS, degrees=DEGREES, name=names, sizes=sizes)


@draws(15)
def test_weights_of_all_gpus_hold_the_model(examples: int) -> None:
    """Cut over any layout the parts hold the whole: all GPUs of a replica together hold at least one copy of it."""

    def check(model: ModelConfig, degrees: Layout) -> None:
        layout = valid(model, degrees)
        weights, _ = Ledger(model, system("h200-sxm"), engine("vllm"))._stage_weights(layout, 4096)
        held = float(np.sum(weights)) * layout.stage_gpus
        assert held >= 0.999 * model.weight_bytes
        if layout.replica_gpus == 1:
            assert held == pytest.approx(model.weight_bytes, rel=1e-6)

    holds(check, examples, model=MODELS, degrees=DEGREES)


# --- time of a step ---


def seconds_of(model: ModelConfig, layout: Layout, profile: System, name: str = "vllm") -> Floats:
    """A decode, a prompt and a mixed step."""
    cost = StepCost(model, layout, cluster_of(profile, layout), uncalibrated(name))
    seqs, context, tokens = np.array([1.0, 64, 256]), np.array([2048.0, 2048, 512]), np.array([64.0, 2048, 8192])
    one = np.ones(3)
    mixed = cost.mixed(tokens, 0 * one, one, seqs, context)
    return np.concatenate([cost.decode(seqs, context).total_s, cost.prefill(tokens).total_s, mixed.total_s])


@draws(3, 400)
@pytest.mark.parametrize("quantity", ["flop", "hbm", "links"])
def test_more_of_anything_is_never_slower(examples: int, quantity: str) -> None:
    """Fixed layout, no measured tables: step times fall, and what a rank carries rises, with every rate."""

    def check(model: ModelConfig, profile: System, degrees: Layout, factor: float) -> None:
        layout = valid(model, replace(degrees, pp=1))
        before, after = (seconds_of(model, layout, scaled(profile, **{quantity: f})) for f in (1.0, factor))
        assert (after <= before * (1 + 1e-9)).all(), after / before

    holds(check, examples, model=MODELS, profile=SYSTEMS, degrees=DEGREES, factor=st.floats(1.0, 8.0))


@draws(3, 300)
def test_more_memory_carries_more(examples: int) -> None:
    def check(model: ModelConfig, degrees: Layout, factor: float) -> None:
        layout, rates = valid(model, replace(degrees, pp=1)), []
        for room in (1.0, factor):
            profile = scaled(system("mi300x"), room=room)
            use = Ledger(model, profile, engine("vllm")).use(layout, Limits(256, 2048), AG, 1280)
            cost = StepCost(model, layout, cluster_of(profile, layout), uncalibrated())
            steady = steady_state(cost, 2048, "mixed", load_workload("fixed:1024/256"))
            rates.append(float(steady.capacity_per_s(np.array(min(256.0, use.kv_tokens / 1280)))))
        assert rates[1] >= rates[0]

    holds(check, examples, model=MODELS, degrees=DEGREES, factor=st.floats(1.0, 4.0))


@draws(4, 400)
def test_no_step_beats_the_roofline(examples: int) -> None:
    """Bytes that a decode step must read over bandwidth, FLOP that a prompt needs over peak; tables included.

    Tables may hold kernels that beat the data sheet by 5 % (clocks, rounding); nothing may beat it by more.
    """

    def check(model: ModelConfig, profile: System, degrees: Layout, seqs: int) -> None:
        layout = valid(model, replace(degrees, pp=1))
        cost = StepCost(model, layout, cluster_of(profile, layout), uncalibrated())
        weights, _ = Ledger(model, profile, uncalibrated())._stage_weights(layout, 4096)
        experts, rest = weights[0][0], weights[0][1] + weights[0][2]
        moe = model.moe
        assert moe is not None
        local = moe.num_experts / layout.ep
        least_active = min(1.0, moe.top_k / layout.ep) if seqs * layout.attention_dp else 0.0
        read_s = (rest + experts / local * least_active) / profile.gpu.hbm_bytes_per_s
        assert float(cost.decode(np.array(float(seqs)), np.array(1024.0)).total_s) >= 0.95 * read_s
        tokens = 8192.0
        peak = max(rate for _, rate in profile.gpu.flop_per_s)
        params = sum(w.params for layer in model.layers if layer.stack == "decoder" for w in layer.weights)
        routed = sum(w.params for layer in model.layers for w in layer.weights if w.part == "expert")
        active = params - routed * (1 - moe.top_k / moe.num_experts)
        flop_s = 2 * active * tokens * layout.attention_dp / (peak * layout.stage_gpus)
        assert float(cost.prefill(np.array(tokens)).total_s) >= flop_s / 1.05

    holds(check, examples, model=small_models(), profile=SYSTEMS, degrees=DEGREES, seqs=st.sampled_from([1, 8, 64]))


@draws(2, 200)
def test_step_cost_is_additive(examples: int) -> None:
    """Terms sum to the step, origins sum to the step, and the layers of a model cost what its parts cost."""

    def check(model: ModelConfig, profile: System, degrees: Layout) -> None:
        layout = valid(model, replace(degrees, pp=1))
        cost = StepCost(model, layout, cluster_of(profile, layout), uncalibrated())
        step = cost.decode(np.array([1.0, 30.0]), np.array([100.0, 5000.0]))
        np.testing.assert_allclose(np.sum(list(step.terms.values()), axis=0), step.total_s)
        np.testing.assert_allclose(np.sum(list(step.origin.values()), axis=0), step.total_s)
        assert sum(step.origin_share().values()) == pytest.approx(1.0)
        assert all((seconds >= 0).all() for seconds in step.terms.values())
        kinds = cost._kinds
        whole, parts = cost._token_sum(kinds), [cost._token_sum([kind]) for kind in kinds]
        for label, seconds in whole.terms.items():
            np.testing.assert_allclose(sum(part.terms.get(label, 0.0) for part in parts), seconds)

    holds(check, examples, model=MODELS, profile=SYSTEMS, degrees=DEGREES)


@dataclass
class Work:
    prefill_tokens: int = 0
    prefill_pairs: float = 0.0
    num_prefills: int = 0
    decode_seqs: int = 0
    decode_context_tokens: int = 0


WORK = st.builds(
    lambda seqs, context, prompt: Work(prompt, prompt * (prompt + 1) / 2, int(prompt > 0), seqs, seqs * context),
    st.integers(0, 200),
    st.integers(1, 8000),
    st.sampled_from([0, 0, 0, 16, 500, 4000]),
)


@draws(8, 3000)
def test_a_group_is_no_faster_than_any_member_alone(examples: int) -> None:
    """A lockstep group takes at least as long as its busiest member would with the others idle, in every draw."""
    cost = StepCost(
        load("deepseek-v3"), Layout(attention_dp=4, ep=4), Cluster(system("h200-sxm"), 1, 4), uncalibrated()
    )
    timer = CostTimer(cost, Limits(256, 8192))

    def check(ranks: list[Work]) -> None:
        assume(any(rank.prefill_tokens or rank.decode_seqs for rank in ranks))
        # Each call takes the next draw of the router, so every question is asked under the same one.
        timer._place = 7
        together = timer.step_s(ranks)
        for number, rank in enumerate(ranks):
            alone = [rank if n == number else Work() for n in range(len(ranks))]
            if rank.prefill_tokens or rank.decode_seqs:
                timer._place = 7
                assert together >= timer.step_s(alone) * (1 - 1e-9)

    holds(check, examples, ranks=st.lists(WORK, min_size=4, max_size=4))


# --- simulation ---


class Affine:
    """Steps of a known cost."""

    draw, link_s = 0, 0.0

    def step_s(self, ranks: Any) -> float:
        return 5e-3 + max(1e-4 * rank.decode_seqs + 1e-5 * rank.prefill_tokens for rank in ranks)


SPECS = st.builds(
    EngineSpec,
    num_groups=st.integers(1, 3),
    ranks_per_group=st.integers(1, 3),
    kv_tokens_per_rank=st.sampled_from([256, 600, 5000]),
    max_num_seqs=st.sampled_from([1, 4, 32]),
    max_batched_tokens=st.sampled_from([32, 100, 8192]),
    policy=st.sampled_from(POLICIES),
)


@draws(25, 4000)
def test_tokens_in_are_tokens_out_in_flight_or_dropped(examples: int) -> None:
    """A run cut off anywhere: every token that was asked for is answered, owed by a request in flight, or refused."""

    def check(spec: EngineSpec, stop_s: float, rate: float, seed: int) -> None:
        workload = Workload("cut", Lengths.uniform(1, 300), Lengths.uniform(1, 60), Arrivals.poisson(rate), 40)
        run = simulate(spec, Affine(), workload, seed=seed, max_simulated_s=stop_s)
        r, steps = run.requests, run.steps
        done, refused = r.status == FINISHED, r.status == REJECTED
        flying = ~done & ~refused
        owed = (r.output_tokens - r.produced_tokens)[flying]
        assert (owed >= 0).all()
        assert r.output_tokens.sum() == r.produced_tokens.sum() + owed.sum() + r.output_tokens[refused].sum()
        assert (r.produced_tokens[done] == r.output_tokens[done]).all() and not r.produced_tokens[refused].any()
        assert not refused.any() or run.rejection_reason
        ended = steps.start_s + steps.step_s <= run.simulated_s + 1e-12
        begun = np.isfinite(r.first_token_s)
        computed, made = steps.prefill_tokens[ended].sum(), steps.decode_seqs[ended].sum()
        if not r.num_preemptions.sum():
            assert r.produced_tokens.sum() == made + begun.sum()
            assert 0 <= computed - r.prompt_tokens[begun].sum() <= r.prompt_tokens[flying & ~begun].sum()

    stops, rates = st.floats(0.01, 4.0), st.sampled_from([2.0, 20.0, 200.0])
    holds(check, examples, spec=SPECS, stop_s=stops, rate=rates, seed=st.integers(0, 99))


@draws(2, 60)
def test_the_estimate_is_near_the_simulation_without_congestion(examples: int) -> None:
    """At a fifth of the capacity: TPOT within 15 %, TTFT within 30 % of the closed form (it waits for steps)."""

    def check(name: str, gpu: str, shape: tuple[int, int], seed: int) -> None:
        model, cluster = load(name), Cluster(system(gpu), 1, 8)
        layout = parse_layout("tp=8,ep=8")
        deployment = deploy(model, cluster, layout, engine("vllm"), Limits(256, 8192), AG, 4096)
        question = load_workload(f"fixed:{shape[0]}/{shape[1]}", num_requests=150)
        steady = steady_state(deployment.cost(), 8192, "mixed", question)
        rate = 0.2 * float(steady.capacity_per_s(np.array(256.0)))
        timer = CostTimer(deployment.cost(), deployment.limits)
        run = simulate(deployment.spec(1), timer, question.with_rate(rate), seed=seed, record_steps=False)
        batch = steady.batch_at(np.array(rate))
        found, expected = run.requests.tpot_s[20:].mean(), float(steady.tpot_at(batch))
        assert found == pytest.approx(expected, rel=0.15)
        assert run.requests.ttft_s[20:].mean() == pytest.approx(float(steady.ttft_at(batch, 0.0)), rel=0.3)

    names = st.sampled_from(["mixtral-8x7b", "qwen3-235b-a22b", "deepseek-v3"])
    gpus, shapes = st.sampled_from(["h200-sxm", "b200-sxm"]), st.sampled_from([(512, 128), (1024, 256), (2048, 512)])
    holds(check, examples, name=names, gpu=gpus, shape=shapes, seed=st.integers(0, 9))


# --- money and units ---


@draws(50, 5000)
def test_money_is_additive(examples: int) -> None:
    def check(usd: float, gpus: tuple[int, int], hours: tuple[float, float], rate: float) -> None:
        one, other = (fleet_usd(usd, n, hours[0]) for n in gpus)
        assert one is not None and other is not None
        assert fleet_usd(usd, sum(gpus), hours[0]) == pytest.approx(one + other)
        later = fleet_usd(usd, gpus[0], hours[1])
        assert later is not None
        assert fleet_usd(usd, gpus[0], sum(hours)) == pytest.approx(one + later)
        # Twice the fleet at twice the rate costs the same per token; an hour's output at that price is the hour's rent.
        per_mtok = usd_per_mtok(usd, gpus[0], rate)
        assert per_mtok == pytest.approx(usd_per_mtok(usd, 2 * gpus[0], 2 * rate))
        assert per_mtok is not None
        assert per_mtok * rate * 3600 / 1e6 == pytest.approx(fleet_usd(usd, gpus[0], 1.0))

    pairs, hours = st.tuples(st.integers(1, 512), st.integers(1, 512)), st.floats(0.1, 1e4)
    rates = st.floats(1, 1e6)
    holds(check, examples, usd=st.floats(0.1, 20), gpus=pairs, hours=st.tuples(hours, hours), rate=rates)


@draws(100, 5000)
def test_units_come_back(examples: int) -> None:
    """What is printed and typed again is the same to the three digits shown."""

    def check(size: float, seconds: float) -> None:
        shown = format_bytes(size).replace(",", "")
        if not shown.endswith((" kB", " B")):
            assert parse_bytes("--dram", shown) == pytest.approx(size, rel=6e-3)
        limit = format_seconds(seconds).replace(",", "").replace(" ", "")
        assert parse_slo(f"ttft_p95={limit}").objectives[0].limit_s == pytest.approx(seconds, rel=6e-3)

    holds(check, examples, size=st.floats(1e6, 9e14), seconds=st.floats(1e-6, 9e3))


@draws(100, 5000)
def test_layouts_come_back(examples: int) -> None:
    def check(tp: int, pp: int, ep: int, dp: int, replicas: int) -> None:
        typed = f"tp={tp},pp={pp},ep={ep},dp={dp},replicas={replicas}"
        try:
            layout = parse_layout(typed)
        except Exception as error:
            assert type(error).__name__ == "LayoutError"
            return
        assert layout.num_gpus == tp * pp * dp * replicas
        assert layout.ep * layout.moe_tp == layout.stage_gpus

    degree = st.sampled_from([1, 2, 3, 4, 8, 16])
    holds(check, examples, tp=degree, pp=degree, ep=degree, dp=degree, replicas=degree)


# --- determinism ---


SIMULATED = ("--workload", "chat", "--num-requests", "60", "--cluster", "h100-sxm:1x8", "--rate", "4")


@pytest.mark.parametrize(
    "command",
    [
        ("fit", "mixtral-8x7b", "--gpu", "h100-sxm"),
        pytest.param(("simulate", "mixtral-8x7b", "--layout", "tp=8,ep=8", *SIMULATED), marks=pytest.mark.slow),
        pytest.param(("plan", "mixtral-8x7b", "--slo", "tpot_p95=50ms", *SIMULATED), marks=pytest.mark.slow),
    ],
)
def test_processes_and_hash_seeds_change_no_byte(command: tuple[str, ...]) -> None:
    outputs = []
    for hash_seed in ("0", "12345"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        found = subprocess.run(
            [sys.executable, "-m", "planner", *command, "--json"], env=environment, capture_output=True, check=True
        )
        outputs.append(b"\n".join(line for line in found.stdout.splitlines() if b"wall_s" not in line))
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 500
