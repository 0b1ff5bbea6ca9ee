"""What a timer foretells of a stretch of decode steps is what it says step after step, to the last bit."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.coasting import FEW, MOST_STEPS
from planner.decodeattention import DecodeAttention
from planner.engine import Limits, engine
from planner.hardware import parse_cluster
from planner.layout import Layout
from planner.model import load
from planner.scheduler import RankWork
from planner.steptime import LENGTHS, SEQS, bilinear
from planner.tacticcost import step_cost
from planner.tactics import parse_tactics
from planner.tactictimer import tactic_timer
from planner.ubatch import UbatchTimer

TABLE = np.sqrt(SEQS)[:, None] * 1e-6 + np.log(SEQS)[:, None] * LENGTHS[None, :] ** 0.9 * 1e-9
LENGTH = st.integers(1, 3_000) | st.integers(1, 200_000)


@given(st.integers(1, 300), LENGTH, st.integers(0, 299), st.integers(1, 2_500))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_attention_of_a_stretch_is_that_of_its_steps(seqs, length, more, steps):
    attention, first = DecodeAttention(TABLE), seqs * length + more % seqs
    contexts = range(first, first + seqs * steps, seqs)
    each = [attention.step_s(seqs, tokens) for tokens in contexts]
    assert list(attention.few_s(seqs, contexts)) == each == attention.many_s(seqs, contexts).tolist()
    drafted = [first + 3 * seqs * step // 2 for step in range(steps)]
    each = [attention.step_s(seqs, tokens) for tokens in drafted]
    assert list(attention.few_s(seqs, drafted)) == each == attention.many_s(seqs, drafted).tolist()


@given(st.integers(1, 4096), LENGTH)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_attention_is_that_of_the_table(seqs, length):
    expected = bilinear(np.array(float(seqs)), np.array(float(length)), TABLE)
    assert DecodeAttention(TABLE).step_s(seqs, seqs * length) == pytest.approx(float(expected), rel=1e-9)


def test_a_long_run_does_not_fill_the_memory():
    attention = DecodeAttention(TABLE)
    tracemalloc.start()
    for seqs in range(1, 1025):
        for length in range(500, 20_500, 1000):
            attention.step_s(seqs, seqs * length)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 20e6 < used < 60e6


@pytest.fixture(scope="module", params=["alone", "drafts", "passes", "ranks"])
def timer(request):
    model, layout = load("mixtral-8x7b"), Layout(attention_dp=4, ep=4) if request.param == "ranks" else Layout(8, ep=8)
    backend = "allgather_reducescatter" if request.param == "ranks" else "all_reduce"
    vllm, cluster = engine("vllm"), parse_cluster("h100-sxm:1x8")
    drafts = ("ngram:2", "0.7") if request.param == "drafts" else (None, None)
    tactics = parse_tactics(*drafts, None, model, vllm)
    limits = Limits(256, 8192)
    timer = tactic_timer(step_cost(model, layout, cluster, vllm, backend, tactics=tactics), limits)
    return UbatchTimer(timer, 64) if request.param == "passes" else timer


@pytest.mark.parametrize("steps", [1, FEW - 1, FEW, 200, MOST_STEPS])
@pytest.mark.parametrize("seqs", [(1, 1, 1, 1), (60, 3, 0, 17)])
def test_a_stretch_is_foretold(timer, steps, seqs):
    ranks = getattr(timer, "_stride", 1)
    batches = [(n, range(n * 901, n * 901 + n * steps, n) if n else (0,) * steps) for n in seqs[:ranks]]
    foretelling, asked = timer.of_group(3), timer.of_group(3)
    for _ in range(4):
        foretold, draws = foretelling.coming(batches, steps)
        foretelling.take(steps)
        each = []
        for step in range(steps):
            works = [RankWork(decode_seqs=n, decode_context_tokens=contexts[step]) for n, contexts in batches]
            each.append((asked.step_s(works), asked.draw))
        assert list(zip(foretold, draws, strict=True)) == each
        assert foretelling.draw == asked.draw


def test_groups_draw_apart_and_leave_the_timer_alone(timer):
    first, again, second = timer.of_group(0), timer.of_group(0), timer.of_group(1)
    work = [RankWork(decode_seqs=4, decode_context_tokens=4_000)] * getattr(timer, "_stride", 1)
    drawn = {name: [(t.step_s(work), t.draw)[1] for _ in range(40)] for name, t in {"a": first, "b": second}.items()}
    assert drawn["a"] == [(again.step_s(work), again.draw)[1] for _ in range(40)] != drawn["b"]


def test_a_batch_of_several_passes_is_not_foretold(timer):
    if isinstance(timer, UbatchTimer):
        assert timer.coming([(65, range(65_000, 65_650, 65))], 10) is None
