"""Step cost term by term on tables of known numbers, each computed here a second time from its formula."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import planner.cost
from planner.calibration import OFF, Calibration
from planner.capacity import BufferLimit
from planner.cost import StepCost
from planner.engine import Engine, engine
from planner.experts import AS_SERVED, ExpertSettings
from planner.hardware import parse_cluster
from planner.inventory import head_gemm, layer_gemms, reduced_rows
from planner.layout import Layout
from planner.loads import load_table, rank_load
from planner.measurements import Origin
from planner.model import ModelConfig, load
from planner.model.config import Recurrent
from planner.routedcost import RoutedCost
from planner.routing import distinct_ranks, named_skew
from planner.steptime import LENGTHS, SEQS, TOKENS, Fixed, Known, Line, Plane, StepTime, Sum, bilinear

ORIGINS = tuple(origin.name.lower() for origin in Origin)
MIXTRAL_BYTES = 2.0 * 3 * 4096 * 14336


@dataclass(frozen=True)
class Straight:
    """`start` + `slope` x size [s], all of one origin."""

    start: float
    slope: float
    code: Origin = Origin.MEASURED
    includes_projections: bool = False

    def seconds(self, x: Any, y: Any = 1.0) -> Any:
        return self.start + self.slope * np.asarray(x, float) * y

    def origin(self, x: Any, y: Any = 1.0) -> Any:
        return np.full(np.broadcast(x, y).shape, int(self.code), np.int8)


class Stepped(Straight):
    """Measured below a size of 1,000 in its second argument."""

    def origin(self, x: Any, y: Any = 1.0) -> Any:
        return np.where(np.broadcast_to(y, np.broadcast(x, y).shape) < 1000, 0, 3).astype(np.int8)


class Answers:
    """Tables that answer with lines and remember what they were asked."""

    is_measured = True

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def gemm(self, fmt: str, rows: int, cols: int) -> Straight:
        return Straight(0.0, 1e-13 * rows * cols)

    def all_reduce(self, gpus: int) -> Straight:
        return Straight(1e-6 * gpus, 1e-12)

    def all_gather(self, gpus: int) -> Straight:
        return Straight(2e-6 * gpus, 2e-12)

    def reduce_scatter(self, gpus: int) -> Straight:
        return Straight(3e-6 * gpus, 3e-12)

    def expert_gemm(self, *shape: Any, dispatched: bool) -> Straight:
        self.asked.append((*shape, dispatched))
        return Straight(1e-3, 1e-5)

    def dispatch(self, *shape: Any, node_limit: float) -> Straight:
        self.asked.append(("dispatch", *shape, node_limit))
        return Straight(4e-6, 1e-7)

    def combine(self, *shape: Any, node_limit: float) -> Straight:
        self.asked.append(("combine", *shape, node_limit))
        return Straight(5e-6, 2e-7)

    def mla_decode(self, heads: int, kv_format: str, gemm_format: str) -> Straight:
        self.asked.append(("mla_decode", heads, kv_format, gemm_format))
        return Straight(1e-6 * heads, 1e-10, includes_projections=True)

    def mla_prefill(self, heads: int, kv_format: str, gemm_format: str) -> Straight:
        self.asked.append(("mla_prefill", heads, kv_format, gemm_format))
        return Straight(3e-6 * heads, 4e-10, includes_projections=True)

    def decode_attention(self, heads: int, kv_heads: int, dim: int, fmt: str, window: int) -> Straight:
        self.asked.append(("decode", heads, kv_heads, dim, fmt, window))
        return Straight(1e-6 * heads, 1e-10)

    def prefill_attention(self, heads: int, kv_heads: int, dim: int, fmt: str, window: int) -> Straight:
        self.asked.append(("prefill", heads, kv_heads, dim, fmt, window))
        return Straight(2e-6 * heads, 3e-10)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Answers:
    tables = Answers()
    monkeypatch.setattr(planner.cost, "open_tables", lambda *_: tables)
    return tables


def plain(name: str = "vllm") -> Engine:
    return replace(engine(name), calibrations=OFF)


def cost_of(model: ModelConfig, layout: Layout, cluster: str = "h200-sxm:1x8", **more: Any) -> StepCost:
    return StepCost(model, layout, parse_cluster(cluster), more.pop("engine", plain()), **more)


# --- sums ---


def test_sums_add_by_label_and_by_origin() -> None:
    total = Sum((3,))
    total.add("a", np.array([1.0, 2.0, 3.0]), Origin.MEASURED)
    total.add("a", np.array([1.0, 1.0, 1.0]), np.array([0, 1, 3], np.int8))
    assert total.origin.tolist() == [[2, 2, 3], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    total.curve("b", Straight(1.0, 2.0, Origin.INTERPOLATED), np.array([0.0, 1.0, 2.0]), 3.0)
    terms = {label: seconds.tolist() for label, seconds in total.terms.items()}
    assert terms == {"a": [2, 3, 4], "b": [3, 9, 15]}
    assert total.origin.tolist() == [[2, 2, 3], [3, 10, 15], [0, 0, 0], [0, 0, 1]]
    assert total.stacked.tolist() == [[2, 3, 4], [3, 9, 15]]
    assert total.total.tolist() == [5, 12, 19]
    more = Sum((3,))
    more.add_sum(total)
    more.add_sum(total)
    more.add_sum(total, 3.0, "both")
    more.add_sum(Sum((3,)), 1.0, "nothing")
    assert {label: seconds.tolist() for label, seconds in more.terms.items()} == {
        "a": [4, 6, 8],
        "b": [6, 18, 30],
        "both": [15, 36, 57],
    }
    np.testing.assert_array_equal(more.origin, 5 * total.origin)


def test_sums_on_the_grids() -> None:
    tokens = Sum(TOKENS.shape)
    tokens.on_tokens("a", Straight(1.0, 2.0, Origin.INTERPOLATED), 3.0, 5.0)
    np.testing.assert_allclose(tokens.terms["a"], 3 * (1 + 2 * 5 * TOKENS))
    np.testing.assert_allclose(tokens.origin[1], tokens.terms["a"])
    plane = Sum((len(SEQS), len(LENGTHS)))
    plane.on_plane("c", Straight(0.5, 1.0), 2.0, 4.0, Origin.EXTRAPOLATED)
    plane.on_plane("d", Straight(0.0, 1.0, Origin.ROOFLINE), 1.0, 1.0, Origin.EXTRAPOLATED)
    np.testing.assert_allclose(plane.terms["c"], 2 * (0.5 + SEQS[:, None] * LENGTHS / 4))
    np.testing.assert_allclose(plane.origin[2], plane.terms["c"])
    np.testing.assert_allclose(plane.origin[3], plane.terms["d"])
    assert not plane.origin[:2].any()
    once = Sum((len(SEQS), len(LENGTHS)))
    once.on_plane("e", Stepped(0.0, 1.0))
    np.testing.assert_allclose(once.terms["e"], SEQS[:, None] * LENGTHS)
    far = Sum((len(SEQS), len(LENGTHS)))
    far.on_plane("e", Stepped(0.0, 1.0), 1.0, 4.0)
    np.testing.assert_array_equal((far.origin[3] > 0).all(axis=0), LENGTHS / 4 >= 1000)
    np.testing.assert_array_equal((far.origin[0] > 0).all(axis=0), LENGTHS / 4 < 1000)


def test_scaling_keeps_the_shares_of_origins() -> None:
    total = Sum((2,))
    total.add("a", np.array([1.0, 0.0]), Origin.MEASURED)
    total.add("b", np.array([3.0, 0.0]), Origin.ROOFLINE)
    _ = total.stacked, total.origin
    assert total.scaled(lambda label: {"a": 2.0, "b": 4.0}[label]) is total
    assert total.terms["a"].tolist() == [2, 0] and total.terms["b"].tolist() == [12, 0]
    assert total.total.tolist() == [14, 0]
    assert total.origin[0].tolist() == [3.5, 0] and total.origin[3].tolist() == [10.5, 0]
    assert total.scaled(lambda _: 1.0).origin[0].tolist() == [3.5, 0]
    assert Sum((2,)).scaled(lambda _: 2.0).terms == {}


def test_copies_and_sums_of_parts_are_their_own() -> None:
    total = Sum((2,))
    total.add("a", np.array([1.0, 2.0]), Origin.MEASURED)
    again, part = total.copy(), Sum.of(Fixed("a", np.array([1.0, 2.0]), Origin.EXTRAPOLATED))
    again.add("a", np.array([1.0, 1.0]), Origin.ROOFLINE)
    assert total.terms["a"].tolist() == [1, 2] and again.terms["a"].tolist() == [2, 3]
    assert again.origin.tolist() == [[1, 2], [0, 0], [0, 0], [1, 1]]
    both = Known({"a": np.array([1.0]), "b": np.array([2.0])}, lambda: {n: np.array([0.75]) for n in ORIGINS})
    assert Sum.of(both).total.tolist() == [3.0] and Sum.of(both).origin.tolist() == [[0.75]] * 4
    assert part.terms["a"].tolist() == [1, 2]


def test_steps_add_their_parts_and_state_their_origins() -> None:
    one = Fixed("a", np.array(1.0), Origin.MEASURED)
    other = Known({"a": np.array(2.0), "b": np.array(3.0)}, lambda: {"roofline": np.array(5.0)})
    step = StepTime([one, other])
    assert step.terms == {"a": 3, "b": 3} and step.total_s == 6
    assert step.origin_share() == {"measured": 1 / 6, "interpolated": 0, "extrapolated": 0, "roofline": 5 / 6}
    assert set(StepTime([Fixed("a", np.zeros(2), Origin.MEASURED)]).origin_share().values()) == {0.0}


def test_lines_and_planes_read_tables_between_and_beyond_their_points() -> None:
    table = Sum(TOKENS.shape)
    table.add("a", 3 * TOKENS + 1, Origin.MEASURED)
    x = np.array([0.2, 1.0, 5000.5, 2.0**26])
    np.testing.assert_allclose(Line(table, x).terms()["a"], 3 * np.clip(x, 1, 2**25) + 1)
    np.testing.assert_allclose(Line(table, x).origin()["measured"], 3 * np.clip(x, 1, 2**25) + 1)
    plane = Sum((len(SEQS), len(LENGTHS)))
    plane.add("a", SEQS[:, None] + 10 * LENGTHS, Origin.ROOFLINE)
    read = Plane(plane, np.array(7.0), np.array(100.0), 0.25)
    assert read.terms()["a"] == pytest.approx(0.25 * 1007)
    assert read.origin()["roofline"] == pytest.approx(0.25 * 1007)


def test_grids_of_the_tables() -> None:
    assert (TOKENS[0], TOKENS[-1], SEQS[0], SEQS[-1], LENGTHS[0], LENGTHS[-1]) == (1, 2**25, 1, 4096, 16, 2**20)
    assert (
        (len(TOKENS), len(SEQS), len(LENGTHS)) == (183, 34, 49)
        and (np.diff(TOKENS) > 0).all()
        and (np.diff(SEQS) > 0).all()
    )
    assert np.max(TOKENS[60:] / TOKENS[59:-1]) < 1.1 and len(SEQS) > 25


def test_bilinear_stops_at_the_edges() -> None:
    values = SEQS[:, None] + 10 * LENGTHS[None, :]
    points = [(0.5, 100.0, 1 + 1000), (5000.0, 16.0, 4096 + 160), (3.0, 1.0, 3 + 160), (7.0, 2.0**21, 7 + 10 * 2**20)]
    for x, y, expected in points:
        assert bilinear(np.array(x), np.array(y), values) == pytest.approx(expected)


# --- terms by tokens ---


def test_token_terms_by_hand(known: Answers, mixtral: ModelConfig) -> None:
    cost = cost_of(mixtral, Layout(tp=2, moe_tp=2))
    gpu, layer, layers = cost.cluster.system.gpu, mixtral.layers[0], 32
    terms = cost.token_table.terms
    stream = gpu.hbm_bytes_per_s * gpu.hbm_efficiency
    np.testing.assert_allclose(terms["norms"], layers * 8 * TOKENS * 4096 * 2 / stream)
    for label in ("attention_projections", "router"):
        gemms = [g for g in layer_gemms(mixtral, layer, cost.layout) if g.label == label]
        expected = sum(1e-13 * g.rows * g.cols * g.count for g in gemms) * TOKENS * layers
        np.testing.assert_allclose(terms[label], expected)
    reduced = sum(1e-6 * 2 + 1e-12 * TOKENS * rows * 2 for rows in reduced_rows(layer, cost.layout))
    np.testing.assert_allclose(terms["all_reduce"], reduced * layers)
    assert set(terms) == {"norms", "attention_projections", "router", "all_reduce"}
    assert cost.prompt_token_table.terms.keys() == terms.keys()
    alone = cost_of(mixtral, Layout()).token_table.terms
    assert "all_reduce" not in alone and "pipeline_hops" not in alone


def test_head_by_hand(known: Answers, mixtral: ModelConfig) -> None:
    cost = cost_of(mixtral, Layout(tp=2, moe_tp=2))
    gemm, gpu = head_gemm(mixtral, cost.layout), cost.cluster.system.gpu
    assert gemm.rows == 16000
    np.testing.assert_allclose(cost.head_table.terms["lm_head"], 1e-13 * gemm.rows * gemm.cols * TOKENS)
    stream = gpu.hbm_bytes_per_s * gpu.hbm_efficiency
    np.testing.assert_allclose(cost.head_table.terms["sampling"], 4 * TOKENS * 32000 * 4 / stream)
    assert set(cost.head_table.terms) == {"lm_head", "sampling"}


@pytest.mark.parametrize("pp", [2, 4])
def test_pipeline_hops_by_hand(known: Answers, mixtral: ModelConfig, pp: int) -> None:
    for cluster, inside in (("h200-sxm:1x8", True), ("h200-sxm:2x8", pp == 2)):
        layout = Layout(tp=4 if cluster.endswith("2x8") else 1, moe_tp=4 if cluster.endswith("2x8") else 1, pp=pp)
        cost = cost_of(mixtral, layout, cluster)
        system = cost.cluster.system
        link = system.scale_up if inside else system.scale_out
        assert link is not None
        expected = (pp - 1) * ((link.latency_s or 0) + TOKENS * 4096 * 2 / link.bytes_per_s)
        np.testing.assert_allclose(cost.token_table.terms["pipeline_hops"], expected)


def test_calibrated_times_by_hand(known: Answers, mixtral: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    values = Calibration(
        gemm=1.5, exchange=2.0, attention=3.0, experts=4.0, prompts=5.0, layer_s=1e-5, prompt_layer_s=1e-4,
        step_s=1e-3, sequence_s=1e-6,
    )  # fmt: skip
    bare = cost_of(mixtral, Layout(tp=2, moe_tp=2))
    monkeypatch.setattr(Engine, "calibration", lambda *_: values)
    cost = cost_of(mixtral, Layout(tp=2, moe_tp=2))
    for label, factor in (("attention_projections", 1.5), ("router", 1.5), ("all_reduce", 2.0), ("norms", 1.0)):
        np.testing.assert_allclose(cost.token_table.terms[label], factor * bare.token_table.terms[label])
        np.testing.assert_allclose(cost.prompt_token_table.terms[label], 5 * factor * bare.token_table.terms[label])
    np.testing.assert_allclose(cost.token_table.terms["small_kernels"], 32e-5)
    np.testing.assert_allclose(cost.prompt_token_table.terms["small_kernels"], 5 * 32e-5)
    np.testing.assert_allclose(cost.prompt_token_table.terms["prompt_launches"], 32e-4)
    np.testing.assert_allclose(cost.head_table.terms["host"], TOKENS * 1e-6)
    np.testing.assert_allclose(cost.head_table.terms["lm_head"], 1.5 * bare.head_table.terms["lm_head"])
    np.testing.assert_allclose(cost.decode_table.terms["attention"], 3 * bare.decode_table.terms["attention"])
    np.testing.assert_allclose(cost.prefill_table.terms["attention"], 15 * bare.prefill_table.terms["attention"])
    for phase, factor in (("decode", 4.0), ("prefill", 20.0)):
        np.testing.assert_allclose(
            cost.moe_table(phase).terms["experts"], factor * bare.moe_table(phase).terms["experts"]
        )
    assert cost.host_s == pytest.approx(bare.host_s + 1e-3)
    assert bare.host_s == engine("vllm").overheads.host_s_per_step


# --- attention ---


def test_attention_by_hand(known: Answers, mixtral: ModelConfig) -> None:
    cost = cost_of(mixtral, Layout(tp=4, moe_tp=4))
    np.testing.assert_allclose(
        cost.decode_table.terms["attention"], 32 * (8e-6 + 1e-10 * SEQS[:, None] * LENGTHS[None, :])
    )
    np.testing.assert_allclose(
        cost.prefill_table.terms["attention"], 32 * (16e-6 + 3e-10 * SEQS[:, None] * LENGTHS[None, :])
    )
    assert set(known.asked) == {("decode", 8, 2, 128, "bf16", None), ("prefill", 8, 2, 128, "bf16", None)} or {
        row[:5] for row in known.asked
    } == {("decode", 8, 2, 128, "bf16"), ("prefill", 8, 2, 128, "bf16")}
    known.asked.clear()
    _ = cost_of(replace(mixtral, kv_format="fp8"), Layout(tp=16, moe_tp=16), "h200-sxm:2x8").decode_table
    assert {row[:5] for row in known.asked} == {("decode", 2, 1, 128, "fp8")}


def test_latent_attention_by_hand(known: Answers, deepseek: ModelConfig) -> None:
    """One module with its projections, 128 heads over TP; the same kernel on every layer, dense ones included."""
    cost = cost_of(deepseek, Layout(tp=8, ep=8))
    plane = SEQS[:, None] * LENGTHS[None, :]
    np.testing.assert_allclose(cost.decode_table.terms["attention_module"], 61 * (16e-6 + 1e-10 * plane))
    np.testing.assert_allclose(cost.prefill_table.terms["attention_module"], 61 * (48e-6 + 4e-10 * plane))
    assert "attention_projections" not in cost.token_table.terms
    assert {row[1:] for row in known.asked if row[0].startswith("mla")} == {(16, "bf16", "fp8_block")}


def test_sparse_and_linear_attention_take_their_own_tables(known: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, linear = load("deepseek-v3.2"), load("qwen3-next-80b-a3b-instruct")
    monkeypatch.setattr(Answers, "sparse_mla_decode", lambda *_: Straight(7e-3, 0.0), raising=False)
    monkeypatch.setattr(Answers, "sparse_mla_prefill", lambda *_: None, raising=False)
    cost = cost_of(sparse, Layout(tp=8, ep=8))
    assert (sum(cost.decode_table.terms.values()) >= sparse.num_layers * 7e-3).all()
    assert cost.prefill_table.total[0, 0] < 7e-3 * sparse.num_layers
    asked = []
    answer = lambda self, *shape: asked.append(shape) or Straight(5e-6, 1e-11)  # noqa: E731
    monkeypatch.setattr(Answers, "linear_attention", answer, raising=False)
    cost = cost_of(linear, Layout(tp=2, moe_tp=2))
    mixers = [(m, n) for layer, n in linear.layer_kinds for m in layer.mixers if isinstance(m, Recurrent)]
    plane = 5e-6 + 1e-11 * SEQS[:, None] * LENGTHS
    np.testing.assert_allclose(cost.decode_table.terms["recurrence"], sum(n for _, n in mixers) * plane)
    mixer = mixers[0][0]
    heads = (mixer.num_k_heads // 2, mixer.num_v_heads // 2)
    assert asked[0] == ("decode", *heads, mixer.k_head_dim, mixer.v_head_dim)


def test_drafted_tokens_count_in_every_term(known: Answers, mixtral: ModelConfig) -> None:
    cost, plain_cost = cost_of(mixtral, Layout(attention_dp=2, ep=2)), cost_of(mixtral, Layout(attention_dp=2, ep=2))
    cost.query_tokens = 3
    seqs, context = np.array([32.0]), np.array([700.0])
    drafted, wide = cost.decode(seqs, context).terms, plain_cost.decode(3 * seqs, context).terms
    for label in ("router", "experts", "dispatch", "lm_head"):
        np.testing.assert_allclose(drafted[label], wide[label])
    one = np.ones(1)
    drafted = cost.mixed(500 * one, 0 * one, one, seqs, context).terms
    wide = plain_cost.mixed(500 * one, 0 * one, one, 3 * seqs, context).terms
    for label in ("router", "experts", "dispatch", "lm_head"):
        np.testing.assert_allclose(drafted[label], wide[label])


def test_recurrence_by_hand() -> None:
    """State read and written in fp32 against 6 FLOP per value and token at the bf16 ceiling, cut over TP."""
    model = load("qwen3-next-80b-a3b-instruct")
    cost = cost_of(model, Layout(tp=2, moe_tp=2), "mi300x:1x8")
    kinds = [(m, n) for layer, n in model.layer_kinds for m in layer.mixers if isinstance(m, Recurrent)]
    mixer = replace(kinds[0][0], kind="mamba2")
    gpu = cost.cluster.system.gpu
    total = Sum((len(SEQS), len(LENGTHS)))
    cost._add_recurrent(total, mixer, "prefill", 3)
    ceiling, _ = gpu.matmul_ceiling_flop_per_s("bf16")
    state_s = 2 * SEQS[:, None] * mixer.state_values * 4 / 2 / (gpu.hbm_bytes_per_s * gpu.hbm_efficiency)
    flop_s = 6 * SEQS[:, None] * LENGTHS[None, :] * mixer.state_values / 2 / ceiling
    np.testing.assert_allclose(total.terms["recurrence"], 3 * np.maximum(state_s, flop_s))
    one = Sum((len(SEQS), len(LENGTHS)))
    cost._add_recurrent(one, mixer, "decode", 1)
    flop_s = 6 * SEQS[:, None] * mixer.state_values / 2 / ceiling
    np.testing.assert_allclose(one.terms["recurrence"], np.maximum(state_s, flop_s) * np.ones(len(LENGTHS)))


def test_pairs_are_twice_the_quadratic_part(
    known: Answers, mixtral: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quadratic(Straight):
        def seconds(self, x: Any, y: Any = 1.0) -> Any:
            return x * (1e-5 + 1e-8 * y + 2e-12 * y**2)

    monkeypatch.setattr(Answers, "prefill_attention", lambda self, *_: Quadratic(0, 0))
    assert cost_of(mixtral, Layout()).pair_s == pytest.approx(2 * 32 * 2e-12)
    monkeypatch.setattr(Answers, "prefill_attention", lambda self, *_: Straight(1e-5, 1e-8))
    assert cost_of(mixtral, Layout()).pair_s == pytest.approx(0.0, abs=1e-15)


# --- whole steps ---


def test_steps_are_put_together_from_their_tables(known: Answers, mixtral: ModelConfig) -> None:
    cost = cost_of(mixtral, Layout(attention_dp=2, ep=2))

    def at(table: Sum, x: float) -> float:
        return float(sum(np.interp(x, TOKENS, values) for values in table.terms.values()))

    def on(table: Sum, x: float, y: float) -> float:
        return float(sum(bilinear(np.array(x), np.array(y), values) for values in table.terms.values()))

    assert set(cost.moe_table("decode").terms) == {"experts", "dispatch", "combine"}
    padded = cost.engine.padded_batch(30, "sm90")
    assert padded > 30
    decode = cost.decode(np.array([30.0]), np.array([700.0]))
    expected = at(cost.token_table, padded) + at(cost.moe_table("decode"), 60) + at(cost.head_table, 30)
    assert decode.total_s == pytest.approx([expected + on(cost.decode_table, 30, 700) + cost.host_s])
    pairs_s = cost.pair_s * 500 * 300
    prompt = at(cost.prompt_token_table, 500) + at(cost.head_table, 1) + on(cost.prefill_table, 1, 500) + pairs_s
    chunk = cost.prefill(np.array([500.0]), 300.0)
    assert chunk.total_s == pytest.approx([prompt + at(cost.moe_table("prefill"), 1000) + cost.host_s])
    lone = cost.prefill(np.array([500.0]), 300.0, 1.0)
    assert lone.total_s == pytest.approx([prompt + at(cost.moe_table("prefill"), 500) + cost.host_s])
    mixed = cost.mixed(*(np.array([value]) for value in (500.0, 300.0, 1.0, 30.0, 700.0)))
    expected = at(cost.prompt_token_table, 530) + at(cost.moe_table("prefill"), 560) + at(cost.head_table, 31)
    expected += on(cost.prefill_table, 1, 500) + on(cost.decode_table, 30, 700) + pairs_s
    assert mixed.total_s == pytest.approx([expected + cost.host_s])
    for step in (decode, chunk, mixed):
        assert float(np.sum(list(step.origin.values()))) == pytest.approx(float(step.total_s[0]))


def test_work_beside_experts_is_an_average_layer(known: Answers, mixtral: ModelConfig) -> None:
    cost = cost_of(mixtral, Layout())
    tokens = np.array([1.0, 100.0])
    for phase, table in (("decode", cost.token_table), ("prefill", cost.prompt_token_table)):
        total = np.sum(list(table.terms.values()), axis=0) / 32
        np.testing.assert_allclose(cost._rest_s(tokens, phase), np.interp(tokens, TOKENS, total))


# --- experts ---


def routed(model: ModelConfig, layout: Layout, tables: Answers, **more: Any) -> RoutedCost:
    cluster = parse_cluster(more.pop("cluster", "h200-sxm:1x8"))
    settings = more.pop("settings", AS_SERVED)
    backend = more.pop("backend", "allgather_reducescatter")
    return RoutedCost(model, layout, cluster, tables, backend, settings, **more)  # type: ignore[arg-type]


def test_experts_read_what_is_active_and_compute_what_is_assigned(known: Answers, mixtral: ModelConfig) -> None:
    """Straight a + b A: b per active expert up to the assignments that cover all, b per assignment beyond."""
    cost = routed(mixtral, Layout(), known)
    assert mixtral.moe is not None
    read = MIXTRAL_BYTES / (4.8e12)
    seconds, origin = cost._seconds(
        mixtral.moe, "decode", np.array([0.0, 2.0, 8.0, 1000.0]), np.array([1.0, 2.0, 5.0, 8.0])
    )
    plain_s = np.array([1e-3 + 1e-5, 1e-3 + 2e-5, 1e-3 + 5e-5, 1e-3 + 8e-5 + 1e-5 * (1000 - 8)])
    active = np.array([1.0, 2.0, 5.0, 8.0])
    streamed = active * read / cost.cluster.system.gpu.hbm_efficiency
    expected = np.where(plain_s < active * read, streamed, plain_s)
    np.testing.assert_allclose(seconds, expected)
    assert origin.tolist() == [int(Origin.ROOFLINE if slow else Origin.MEASURED) for slow in plain_s < active * read]
    assert cost._expert_bytes(mixtral.moe) == MIXTRAL_BYTES
    assert routed(mixtral, Layout(tp=2, moe_tp=2), known)._expert_bytes(mixtral.moe) == MIXTRAL_BYTES / 2


def test_no_more_experts_are_read_than_a_rank_has(known: Answers, mixtral: ModelConfig) -> None:
    cost = routed(mixtral, Layout(tp=4, ep=4), known)
    assert mixtral.moe is not None
    two, nine = (cost._seconds(mixtral.moe, "decode", np.array(50.0), np.array(n))[0] for n in (2.0, 9.0))
    assert two == nine
    assert known.asked[-1][:7] == ("bf16", 4096, 14336, 2, 8, 2, 3)


def test_moe_table_is_experts_of_the_busiest_rank_times_layers(known: Answers, mixtral: ModelConfig) -> None:
    cost = cost_of(mixtral, Layout(tp=4, ep=4))
    assert mixtral.moe is not None
    question = cost.routed.question(mixtral.moe, "decode")
    expected = rank_load(load_table(question), TOKENS)
    seconds, _ = cost.routed._seconds(mixtral.moe, "decode", expected.max_assignments, expected.active_on_busiest)
    np.testing.assert_allclose(cost.moe_table("decode").terms["experts"], 32 * seconds)
    assert set(cost.moe_table("decode").terms) == {"experts"}
    factors = cost.draw_factors("decode")
    np.testing.assert_allclose(factors.mean(axis=1), 1.0)


def test_all_gather_and_reduce_scatter_move_every_token(known: Answers, mixtral: ModelConfig) -> None:
    terms = cost_of(mixtral, Layout(attention_dp=8, ep=8)).moe_table("decode").terms
    np.testing.assert_allclose(terms["dispatch"], 32 * (2e-6 * 8 + 2e-12 * TOKENS * 4096 * 2))
    np.testing.assert_allclose(terms["combine"], 32 * (3e-6 * 8 + 3e-12 * TOKENS * 4096 * 2))


def test_deepep_sends_to_the_hottest_receiver(known: Answers, deepseek: ModelConfig) -> None:
    layout = Layout(attention_dp=16, ep=16)
    cost = routed(deepseek, layout, known, cluster="h200-sxm:2x8", backend="deepep")
    moe = deepseek.moe
    assert moe is not None
    kinds = [kind for kind in deepseek.layer_kinds if kind[0].moe]
    for phase, mode in (("decode", "low_latency"), ("prefill", "normal")):
        known.asked.clear()
        terms = cost.table(phase, kinds).terms
        loads = rank_load(load_table(cost.question(moe, phase)), TOKENS)
        hottest = loads.max_assignments / loads.mean_assignments
        if mode == "normal":
            share, even = np.minimum(hottest / 16, 1.0), 1 / 16
            hottest = (1 - (1 - share) ** 8) / (1 - (1 - even) ** 8)
        np.testing.assert_allclose(terms["dispatch"], 58 * (4e-6 + 1e-7 * TOKENS / 16 * hottest))
        np.testing.assert_allclose(terms["combine"], 58 * (5e-6 + 2e-7 * TOKENS / 16 * hottest))
        asked = [row for row in known.asked if row[0] in ("dispatch", "combine")]
        limit = distinct_ranks(256, 8, 2, 8, 4)
        assert ("dispatch", mode, 16, 2, 7168, 8, 256, "fp8", limit) in asked
        assert ("combine", mode, 16, 2, 7168, 8, 256, "bf16", limit) in asked


def buffer(beyond: Any, tokens: int) -> BufferLimit:
    return BufferLimit("vllm", tokens, beyond, "setting", None, "test")


def test_tokens_beyond_the_buffer_go_in_passes_or_by_another_way(known: Answers, deepseek: ModelConfig) -> None:
    layout, moe = Layout(attention_dp=8, ep=8), deepseek.moe
    assert moe is not None
    kinds = [kind for kind in deepseek.layer_kinds if kind[0].moe]
    whole, parts, other = (
        routed(deepseek, layout, known, backend="deepep", buffer=rule)
        for rule in (None, buffer("chunks", 64), buffer("fallback", 64))
    )
    passes = np.maximum(np.ceil(TOKENS / 8 / 64), 1)
    np.testing.assert_array_equal(parts._passes("decode", TOKENS), passes)
    assert (parts._passes("prefill", TOKENS) == 1).all() and (whole._passes("decode", TOKENS) == 1).all()
    gathered = routed(deepseek, layout, known, buffer=buffer("chunks", 64))
    assert (gathered._passes("decode", TOKENS) == 1).all()
    np.testing.assert_array_equal(other._inside("decode", TOKENS), TOKENS / 8 <= 64)
    assert other._inside("prefill", TOKENS).all() and not gathered._inside("decode", TOKENS).any()
    lone = routed(deepseek, Layout(attention_dp=8, moe_tp=8), known, backend="deepep")
    assert not lone._inside("decode", TOKENS).any()
    load_ = rank_load(load_table(parts.question(moe, "decode")), TOKENS)
    hottest = load_.max_assignments / load_.mean_assignments
    terms = parts.table("decode", kinds).terms
    np.testing.assert_allclose(terms["dispatch"], 58 * passes * (4e-6 + 1e-7 * TOKENS / 8 / passes * hottest))
    seconds, _ = parts._seconds(moe, "decode", load_.max_assignments / passes, load_.active_on_busiest)
    np.testing.assert_allclose(terms["experts"], 58 * passes * seconds)
    found = other.table("decode", kinds).terms["dispatch"]
    far = TOKENS / 8 > 64
    np.testing.assert_allclose(found[far], (58 * (2e-6 * 8 + 2e-12 * TOKENS * 7168 * 2))[far])
    np.testing.assert_allclose(found[~far], whole.table("decode", kinds).terms["dispatch"][~far])


def test_draws_add_up_to_the_table_on_average(known: Answers, deepseek: ModelConfig) -> None:
    """Mean over draws and layers of the drawn seconds, against the experts and exchange of the drawn loads."""
    for backend in ("deepep", "allgather_reducescatter"):
        cost = routed(deepseek, Layout(attention_dp=8, ep=8), known, backend=backend, buffer=buffer("chunks", 64))
        moe, kinds = deepseek.moe, [kind for kind in deepseek.layer_kinds if kind[0].moe]
        assert moe is not None
        loads = load_table(cost.question(moe, "decode"))
        tokens = np.array(loads.question.knots, float)[:, None, None]
        passes = np.maximum(np.ceil(tokens / 8 / 64), 1) if backend == "deepep" else np.ones_like(tokens)
        seconds, _ = cost._seconds(moe, "decode", loads.max_assigned / passes, loads.max_active)
        hottest = loads.max_assigned / (tokens * 8 / 8)
        if backend == "deepep":
            exchange = passes * (9e-6 + 3e-7 * tokens / 8 / passes * hottest)
        else:
            exchange = 5e-6 * 8 + 5e-12 * tokens * 7168 * 2 * np.ones_like(hottest)
        expected = 58 * (seconds * passes + exchange).mean(axis=-1)
        np.testing.assert_allclose(cost.drawn_seconds("decode", kinds), expected, rtol=1e-6)
    assert cost.drawn_seconds("decode", [kind for kind in deepseek.layer_kinds if not kind[0].moe]).shape == ()


def test_node_limits_hold_for_whole_groups_only(known: Answers, deepseek: ModelConfig) -> None:
    moe, layout = deepseek.moe, Layout(attention_dp=16, ep=16)
    assert moe is not None and (moe.num_groups, moe.top_groups) == (8, 4)
    limited = distinct_ranks(256, 8, 2, 8, 4)

    def limit(placement: str, cluster: str = "h200-sxm:2x8", size: Layout = layout) -> float:
        settings = ExpertSettings(placement=placement)
        return routed(deepseek, size, known, cluster=cluster, settings=settings)._node_limit(moe)

    assert limit("contiguous") == limit("node-limited") == limit("eplb") == limited > 1
    assert limit("greedy") == 0
    three = Layout(attention_dp=24, ep=8, moe_tp=3)
    assert limit("contiguous", "h200-sxm:3x8", three) == 0
    mixtral = load("mixtral-8x7b")
    assert mixtral.moe is not None
    assert routed(mixtral, Layout(attention_dp=8, ep=8), known)._node_limit(mixtral.moe) == 0


@pytest.mark.parametrize(
    ("name", "fmt"), [("deepseek-v3", "fp8"), ("mixtral-8x7b", "bf16"), ("deepseek-v4-flash-nvfp4", "nvfp4")]
)
def test_tokens_are_dispatched_in_the_format_of_the_experts(known: Answers, name: str, fmt: str) -> None:
    assert routed(load(name), Layout(attention_dp=8, ep=8), known)._dispatch_format() == fmt


def test_routed_experts_are_those_of_one_stage_of_one_replica(known: Answers, mixtral: ModelConfig) -> None:
    cost = cost_of(mixtral, Layout(tp=2, moe_tp=2, pp=2, replicas=2))
    assert (cost.routed.layout.pp, cost.routed.layout.replicas, cost.routed.layout.tp) == (1, 1, 2)
    assert cost.routed._buffer is not None
    assert cost_of(mixtral, Layout(), engine=plain("generic")).routed._buffer is None
    gpt, profile = load("gpt-oss-120b"), replace(plain(), mxfp4_by_fp8=("sm100",))
    assert cost_of(gpt, Layout(), "b200-sxm:1x8", engine=profile).routed._format == "mxfp4_fp8"
    assert cost_of(gpt, Layout(), "h200-sxm:1x8", engine=profile).routed._format == "mxfp4"


def test_mxfp4_experts_may_multiply_fp8_activations(known: Answers) -> None:
    model = load("gpt-oss-120b")
    assert routed(model, Layout(), known)._format == "mxfp4"
    assert routed(model, Layout(), known, mxfp4_by_fp8=True)._format == "mxfp4_fp8"
    assert routed(load("mixtral-8x7b"), Layout(), known, mxfp4_by_fp8=True)._format == "bf16"


def test_the_faster_of_two_8_bit_kernels_is_taken(known: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-tensor FP8 may be served by the block-scaled kernel, which then counts as extrapolated; not the reverse."""
    mixtral = load("mixtral-8x7b")
    assert mixtral.moe is not None

    def faster(fmt: str) -> Any:
        return lambda self, asked, *shape, dispatched: Straight(0.5 if asked == fmt else 1.0, 1e-5)

    for stored, fast, substituted, seconds in (
        ("fp8", "fp8_block", True, 0.5),
        ("fp8", "fp8", False, 0.5),
        ("fp8_block", "fp8", False, 1.0),
        ("int8", "fp8_block", True, 0.5),
    ):
        cost = routed(mixtral, Layout(), known)
        cost._format = stored
        monkeypatch.setattr(Answers, "expert_gemm", faster(fast))
        curve, other = cost._curve(mixtral.moe, 8)
        assert other == substituted
        assert float(curve.seconds(0)) == seconds
        origin = cost._seconds(mixtral.moe, "decode", np.array(4.0), np.array(4.0))[1]
        assert int(origin) == int(Origin.EXTRAPOLATED if substituted else Origin.MEASURED)


def test_dispatched_kernels_are_asked_for_behind_deepep_only(known: Answers, deepseek: ModelConfig) -> None:
    for layout, backend, expected in (
        (Layout(attention_dp=8, ep=8), "deepep", True),
        (Layout(attention_dp=8, ep=8), "allgather_reducescatter", False),
        (Layout(tp=8, ep=8), "deepep", False),
    ):
        known.asked.clear()
        assert deepseek.moe is not None
        routed(deepseek, layout, known, backend=backend)._curve(deepseek.moe, 32)
        assert {row[-1] for row in known.asked} == {expected}
        assert known.asked[0][1:7] == (7168, 2048, 32, 256, 8, 3)


def test_skew_is_that_of_the_settings(known: Answers, deepseek: ModelConfig) -> None:
    flat, hot = (
        routed(deepseek, Layout(attention_dp=8, ep=8), known, settings=ExpertSettings(skew=named_skew(name)))
        for name in ("uniform", "single-domain")
    )
    assert deepseek.moe is not None
    loads = [rank_load(load_table(c.question(deepseek.moe, "decode")), np.array([4096.0])) for c in (flat, hot)]
    assert loads[1].max_assignments > loads[0].max_assignments
    assert {phase: table.question for phase, table in flat.loads().items()} == {
        phase: flat.question(deepseek.moe, phase) for phase in ("prefill", "decode")
    }
