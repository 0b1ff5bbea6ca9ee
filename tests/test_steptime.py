"""Look-ups of whole tables agree with numpy's own, and what layouts share is not changed by any of them."""

from __future__ import annotations

import numpy as np
import pytest

from planner.cost import StepCost
from planner.engine import Limits, engine
from planner.enumeration import backends, layouts
from planner.hardware import parse_cluster
from planner.layout import Layout
from planner.loads import _busiest
from planner.measurements import Origin
from planner.memory import Ledger
from planner.model import load
from planner.pipeline import unevenness
from planner.search import Search
from planner.steady import steady_state
from planner.steptime import LENGTHS, SEQS, TOKENS, Line, Plane, Sum, linear
from planner.workload import load_workload, parse_slo

NODE = parse_cluster("h100-sxm:1x8")
MIXTRAL = load("mixtral-8x7b")
rng = np.random.default_rng(3)


def test_linear_is_numpys_interpolation_of_every_row() -> None:
    values = rng.random((5, len(TOKENS)))
    x = np.concatenate([[0.0, 0.5, 1.0, TOKENS[7], TOKENS[-1], 1e9], np.exp(rng.uniform(0, 18, 400))])
    expected = np.stack([np.interp(x, TOKENS, row) for row in values])
    np.testing.assert_array_equal(linear(x, values), expected)
    np.testing.assert_array_equal(linear(np.array(300.5), values), [np.interp(300.5, TOKENS, row) for row in values])


def test_a_sum_books_every_second_to_an_origin() -> None:
    total = Sum(TOKENS.shape)
    total.add("a", TOKENS, np.where(TOKENS < 100, Origin.MEASURED, Origin.EXTRAPOLATED))
    total.add("b", 2.0 * TOKENS, Origin.ROOFLINE)
    more = total.copy()
    more.add_sum(total, 3.0, "c")
    more.scaled(lambda label: 2.0 if label == "b" else 1.0)
    np.testing.assert_allclose(total.origin.sum(axis=0), 3.0 * TOKENS)
    np.testing.assert_allclose(more.total, 14.0 * TOKENS)
    np.testing.assert_allclose(more.origin.sum(axis=0), more.total)
    assert list(total.terms) == ["a", "b"]
    line = Line(total, np.array([50.0, 5000.0]))
    np.testing.assert_allclose(line.origin()["measured"], [50.0, 0.0])
    np.testing.assert_allclose(line.terms()["b"], [100.0, 10_000.0])


def test_a_plane_reads_every_term_at_its_grid_points() -> None:
    total = Sum((len(SEQS), len(LENGTHS)))
    total.add("a", SEQS[:, None] * LENGTHS, Origin.MEASURED)
    total.add("b", SEQS[:, None] + LENGTHS, Origin.ROOFLINE)
    terms = Plane(total, SEQS[[3, 9]], LENGTHS[[4, 30]], 0.5).terms()
    np.testing.assert_allclose(terms["a"], 0.5 * SEQS[[3, 9]] * LENGTHS[[4, 30]])
    np.testing.assert_allclose(terms["b"], 0.5 * (SEQS[[3, 9]] + LENGTHS[[4, 30]]))


@pytest.mark.parametrize("width", [1, 6, 16])
def test_the_busiest_rank_is_the_same_in_any_order_of_adding(width: int) -> None:
    slots = rng.integers(0, 1000, (3, 4, width * 8)).astype(np.float32)
    expected = slots.reshape(3, 4, 8, width).sum(axis=-1).max(axis=-1)
    for halved in (True, False):
        np.testing.assert_array_equal(_busiest(slots, width, halved), expected)


def test_pipelines_share_routed_experts_and_keep_their_own_time() -> None:
    flat, deep = (
        StepCost(MIXTRAL, Layout(tp=2, pp=pp, ep=2), parse_cluster("h100-sxm:1x8"), engine("vllm")) for pp in (1, 4)
    )
    assert flat.routed is deep.routed
    batch, context = np.array([1.0, 64.0]), np.array([512.0, 4096.0])
    assert (deep.decode(batch, context).total_s > flat.decode(batch, context).total_s).all()
    assert "pipeline_hops" not in flat.decode(batch, context).terms
    assert "pipeline_hops" in deep.decode(batch, context).terms


def test_steady_states_of_two_budgets_share_the_decode_steps_of_a_layout() -> None:
    cost = StepCost(MIXTRAL, Layout(tp=2, ep=2), NODE, engine("vllm"))
    demand = load_workload("chat", rate=2.0)
    small, large = (steady_state(cost, budget, "mixed", demand) for budget in (2048, 16384))
    np.testing.assert_array_equal(small.decode_s, large.decode_s)
    other = load_workload("fixed:4096/64", rate=2.0)
    assert (steady_state(cost, 2048, "mixed", other).decode_s > small.decode_s).any()
    assert unevenness(cost, small.batch).max() == 1.0


def test_every_candidate_is_counted_once_although_the_hopeless_are_not_looked_at() -> None:
    demand, slo, profile = load_workload("chat", rate=2.0), parse_slo("ttft_p95=2s,tpot_p95=50ms"), engine("vllm")
    search = Search(NODE, profile, demand, slo)
    found = search.run([MIXTRAL])
    ledger = Ledger(MIXTRAL, NODE.system, profile)
    lost = total = 0
    for layout in layouts(MIXTRAL, NODE, profile):
        for backend in backends(profile, layout):
            for budget in search._budgets(layout):
                for seqs in search._sequence_limits(layout, backend, budget, ledger.tactics):
                    use = ledger.use(layout, Limits(seqs, budget), backend, search._context)
                    replicas = NODE.num_gpus // layout.replica_gpus
                    lost, total = lost + (0 if use.fits else replicas), total + replicas
    assert found.rejected["does not fit"] == lost > 0
    assert found.considered == total == sum(found.rejected.values()) + len(found.survivors)
