"""Placement of experts against DeepSeek's published example, brute force and real routing records."""

from __future__ import annotations

from itertools import combinations_with_replacement, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from planner.cost import StepCost
from planner.engine import engine
from planner.errors import InputError, LayoutError, WorkloadError
from planner.experts import ExpertSettings
from planner.hardware import parse_cluster
from planner.layout import Layout
from planner.model import load as load_model
from planner.placement import (
    PLACEMENTS,
    Placement,
    balance_bound,
    contiguous_max_over_mean,
    moved,
    place,
    rebalance_seconds,
    stale,
    stale_table,
    within,
)

RECORDS = Path("/work/shared/data/routing")
TASKS = ("intent", "law", "summary", "translation")
EXAMPLE = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
"""deepseek-ai/EPLB, README: two layers of 12 experts in 4 groups, 16 slots, 2 nodes, 8 GPUs."""
QUICK = sorted(set(PLACEMENTS) - {"exact"})
needs_records = pytest.mark.skipif(not RECORDS.is_dir(), reason="routing records are not here")


@pytest.fixture(scope="module")
def sequence_counts() -> list[NDArray[np.int64]]:
    """Counts [sequences, layers, experts] of each ESFT task."""
    tables = []
    for task in TASKS:
        with np.load(RECORDS / f"deepseek_v2_lite_{task}.npz") as record:
            ids, lengths = record["expert_ids"].astype(np.int64), record["sequence_lengths"]
        layers, sequences = len(ids), len(lengths)
        sequence = np.repeat(np.arange(sequences), lengths)[None, :, None]
        cell = (sequence * layers + np.arange(layers)[:, None, None]) * 64 + ids
        counts = np.bincount(cell.ravel(), minlength=sequences * layers * 64)
        tables.append(counts.reshape(sequences, layers, 64))
    return tables


def test_eplb_reproduces_the_published_example() -> None:
    found = place("eplb", EXAMPLE, 8, num_nodes=2, num_groups=4, redundant=4)
    assert found.physical_to_logical.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert found.max_over_mean(EXAMPLE) == pytest.approx([1.208, 1.242], abs=5e-4)
    unbound = place("eplb-global", EXAMPLE, 8, num_nodes=2, num_groups=4, redundant=4)
    assert unbound.max_over_mean(EXAMPLE) == pytest.approx([1.073, 1.190], abs=5e-4)
    without_groups = place("eplb", EXAMPLE, 8, num_nodes=2, redundant=4)
    assert (without_groups.physical_to_logical == unbound.physical_to_logical).all()


def test_start_placements_of_the_engines() -> None:
    load = np.ones((1, 6))
    slots = {p: place(p, load, 4, redundant=2).physical_to_logical[0].tolist() for p in ("contiguous", "round-robin")}
    assert slots == {"contiguous": [0, 1, 2, 3, 4, 5, 0, 1], "round-robin": [0, 4, 1, 5, 2, 0, 3, 1]}


def test_copies_share_the_load() -> None:
    placed = Placement("by hand", np.array([[0, 1, 0, 2]]), 3, 2)
    assert placed.copies.tolist() == [[2, 1, 1]]
    assert placed.slot_loads([[8, 1, 3]]).tolist() == [[4, 1, 4, 3]]
    assert placed.rank_loads([[8, 1, 3]]).tolist() == [[5, 7]]
    assert placed.max_over_mean([[8, 1, 3]]) == pytest.approx([7 / 6])
    assert placed.max_over_mean([[0, 0, 0]]) == pytest.approx([1.0])
    assert (placed.num_redundant, placed.slots_per_rank) == (1, 2)
    draws = np.random.default_rng(0).integers(0, 9, (4, 5, 7, 3))
    assert placed.rank_loads(draws).shape == (4, 5, 7, 2)
    assert placed.rank_loads(draws)[3, 4, 6] == pytest.approx(placed.rank_loads(draws[3, 4, 6:])[0])


@given(
    st.sampled_from(QUICK),
    st.sampled_from([(8, 2, 1, 1), (8, 4, 2, 4), (12, 4, 2, 2), (16, 8, 4, 8), (6, 1, 1, 1)]),
    st.integers(0, 2),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=150)
def test_every_policy_places_every_expert_and_no_load_is_lost(
    policy: str, shape: tuple[int, int, int, int], copies_per_rank: int, seed: int
) -> None:
    experts, ranks, nodes, groups = shape
    redundant = 0 if ranks == 1 else copies_per_rank * ranks
    load = np.random.default_rng(seed).integers(0, 50, (3, experts)).astype(float)
    placed = place(policy, load, ranks, num_nodes=nodes, num_groups=groups, redundant=redundant, seed=seed)
    assert placed.copies.sum(axis=1).tolist() == [experts + redundant] * 3
    assert placed.copies.min() >= 1
    assert placed.rank_loads(load).sum(axis=1) == pytest.approx(load.sum(axis=1))
    reference = np.zeros((3, ranks))
    for layer, row in enumerate(placed.physical_to_logical):
        for slot, expert in enumerate(row):
            reference[layer, slot // placed.slots_per_rank] += load[layer, expert] / placed.copies[layer, expert]
    assert placed.rank_loads(load) == pytest.approx(reference)
    bound = balance_bound(load, ranks, redundant)
    assert (within(placed.max_over_mean(load), bound) >= 1 - 1e-12).all()


def optimum(load: list[int], ranks: int, redundant: int) -> float:
    """Least possible busiest rank over the mean, by trying everything."""
    best = np.inf
    for extra in combinations_with_replacement(range(len(load)), redundant):
        slots = [*range(len(load)), *extra]
        share = [load[e] / slots.count(e) for e in slots]
        for order in set(permutations(share[1:])):
            seats = np.array([share[0], *order]).reshape(ranks, -1).sum(axis=1)
            best = min(best, seats.max() / seats.mean())
    return float(best)


@given(st.lists(st.integers(1, 20), min_size=6, max_size=6), st.sampled_from([(2, 0), (3, 0), (2, 2)]))
@settings(deadline=None, max_examples=12)
def test_bound_optimum_and_heuristics_are_ordered(load: list[int], shape: tuple[int, int]) -> None:
    ranks, redundant = shape
    best = optimum(load[: 6 - redundant], ranks, redundant)
    table = [load[: 6 - redundant]]
    greedy, swaps = (
        float(place(p, table, ranks, redundant=redundant).max_over_mean(table)[0]) for p in ("greedy", "greedy-swaps")
    )
    assert float(balance_bound(table, ranks, redundant)[0]) <= best + 1e-9
    assert best - 1e-9 <= swaps <= greedy + 1e-9


def test_bounds_by_hand() -> None:
    assert balance_bound([[8, 1, 1, 2]], 2) == pytest.approx([9 / 6])
    # Three of 5, 5, 5 on two ranks: some rank holds two of them.
    assert balance_bound([[5, 5, 5, 1]], 2) == pytest.approx([10 / 8])
    assert balance_bound([[8, 1, 1, 2]], 2, 2) == pytest.approx([1.0])
    assert balance_bound([[90, 5, 5]], 3) == pytest.approx([2.7])
    assert balance_bound([[0, 0]], 2) == pytest.approx([1.0])


def test_exact_solver_proves_the_optimum() -> None:
    pytest.importorskip("ortools")
    from planner.placement.exact import solve

    for load, ranks, redundant in (([13, 11, 9, 8, 4, 3], 2, 0), ([19, 7, 5, 3], 2, 2), ([9, 9, 1, 1, 1, 3], 3, 0)):
        proof = solve([load], ranks, redundant)
        assert proof.proved
        assert proof.max_over_mean == pytest.approx([optimum(load, ranks, redundant)])
        assert place("exact", [load], ranks, redundant=redundant).max_over_mean([load]) <= proof.max_over_mean + 1e-9


def test_layers_without_a_limit_on_nodes_send_to_more() -> None:
    """DeepSeek-V3, 4 of 8 groups, on 4 nodes: 3.12 on average, 3.61 without the limit; a file says what it keeps."""
    model, where = load_model("deepseek-v3"), parse_cluster("h200-sxm:4x8")
    load = np.random.default_rng(1).lognormal(0, 0.8, (2, 256))
    given = {kept: place(kept, load, 32, num_nodes=4, num_groups=8) for kept in ("node-limited", "greedy")}
    found = {}
    for placement in ("contiguous", "greedy", *given.values()):
        settings = ExpertSettings(placement=placement)
        cost = StepCost(model, Layout(attention_dp=32, ep=32), where, engine("vllm"), "deepep", settings)
        found[str(placement)] = cost.routed._node_limit(model.moe)  # type: ignore[arg-type]
    assert found["contiguous"] == pytest.approx(3.12, abs=0.02)
    assert list(found.values())[1:] == [0, 4, 4]


def test_huge_loads_are_refused() -> None:
    with pytest.raises(WorkloadError, match="expert 1 is 1e\\+308: loads are numbers from 0 to 1e"):
        place("greedy", [[1.0, 1e308]], 2)


def test_exact_names_the_package_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ortools.sat.python.cp_model", None)
    with pytest.raises(InputError, match=r"pip install 'moeplan\[exact\]'"):
        place("exact", [[5, 4, 3, 3]], 2)


def test_node_limit_keeps_groups_whole() -> None:
    load = np.random.default_rng(1).lognormal(0, 0.8, (4, 64))
    limited = place("node-limited", load, 16, num_nodes=4, num_groups=8, redundant=16)
    assert limited.nodes_reached(8, 3).tolist() == [3] * 4
    assert limited.nodes_reached(8, 8).tolist() == [4] * 4
    assert place("greedy", load, 16, num_nodes=4).nodes_reached(8, 3).tolist() == [4] * 4
    free = place("greedy-swaps", load, 16, redundant=16)
    hierarchical = place("eplb", load, 16, num_nodes=4, num_groups=8, redundant=16)
    assert (free.max_over_mean(load) <= limited.max_over_mean(load) + 1e-9).all()
    assert (limited.max_over_mean(load) <= hierarchical.max_over_mean(load) + 1e-9).all()
    with pytest.raises(LayoutError, match=r"8 groups do not divide over 3 nodes. Use 2 or 4 nodes"):
        place("node-limited", load[:, :48], 12, num_nodes=3, num_groups=8)


def test_deepseek_v3_is_placed_well() -> None:
    """58 layers, 256 experts, 320 slots on 160 ranks (15 ms)."""
    load = np.random.default_rng(0).lognormal(0, 0.8, (58, 256))
    for policy in ("greedy", "greedy-swaps", "eplb"):
        placed = place(policy, load, 160, num_nodes=20, redundant=64)
        assert placed.max_over_mean(load).mean() < 1.06
        assert placed.rank_loads(np.ones((32, 58, 256))).shape == (32, 58, 160)


def test_moves_count_only_what_a_rank_did_not_hold() -> None:
    before = Placement("a", np.array([[0, 1, 2, 3, 4, 5, 6, 7]]), 8, 4, 2)
    after = Placement("b", np.array([[1, 0, 2, 0, 4, 5, 3, 7, 6, 0, 4, 3]]), 8, 4, 2)
    moves = moved(before, after)
    assert moves.inside_node.tolist() == [[1, 1, 2, 1]]
    assert moves.cross_node.tolist() == [[0, 2, 1, 2]]
    assert (moves.num_copies, moves.copies_per_rank.tolist(), moves.num_bytes(10)) == (10, [1, 3, 3, 3], 100)
    assert rebalance_seconds(moves, 10.0, 100.0, 50.0) == pytest.approx(0.4)
    assert moved(after, after).num_copies == 0
    assert moved(after, before).num_copies == 6
    with pytest.raises(LayoutError, match="4 ranks, 1 nodes"):
        moved(before, place("contiguous", np.ones((1, 8)), 4))
    with pytest.raises(InputError, match="cross_bytes_per_s=0"):
        rebalance_seconds(moves, 10.0, 100.0, 0.0)


def test_layer_by_layer_moves_wait_for_every_layers_slowest_rank() -> None:
    before = Placement("a", np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), 4, 2)
    after = Placement("b", np.array([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 2, 3]])[:, [0, 1, 4, 2, 3, 5]], 4, 2)
    moves = moved(before, after)
    assert moves.inside_node.tolist() == [[0, 1], [1, 0]]
    assert rebalance_seconds(moves, 1.0, 1.0, 1.0) == 1.0
    assert rebalance_seconds(moves, 1.0, 1.0, 1.0, layers_at_once=False) == 2.0


@needs_records
def test_stale_placement_can_be_worse_than_none(sequence_counts: list[NDArray[np.int64]]) -> None:
    """Handbook routing.md section 4: layer 13, EP8, placed on the row, served on the column; all 16 digits."""
    loads = np.stack([counts.sum(axis=0) for counts in sequence_counts])
    assert stale_table(loads, 8)[:, :, 12].round(2).tolist() == [
        [1.01, 1.49, 1.29, 1.73],
        [1.85, 1.01, 1.37, 1.90],
        [1.69, 1.70, 1.01, 1.54],
        [1.96, 1.24, 1.29, 1.01],
    ]
    answer = stale(loads[3], loads[1], 8)
    assert answer.contiguous.mean() == pytest.approx(1.39, abs=0.005)
    assert answer.fresh.mean() < answer.stale.mean()
    assert answer.worse_than_contiguous == int((answer.stale > answer.contiguous).sum()) > 0


@needs_records
def test_held_out_gain_of_placement_and_copies(sequence_counts: list[NDArray[np.int64]]) -> None:
    """Handbook routing.md section 4: learned on half of the sequences, judged on the other; its halves are unknown.

    Mean over eight random halves; the entries are within 0.025.
    """
    published = {
        8: (1.27, 1.06, 1.08, 1.07),
        16: (1.56, 1.14, 1.12, 1.09),
        32: (1.96, 1.52, 1.17, 1.15),
    }
    mixed = np.concatenate(sequence_counts)
    for ranks, expected in published.items():
        found = []
        for seed in range(8):
            order = np.random.default_rng(seed).permutation(len(mixed))
            learned, judged = (mixed[half].sum(axis=0) for half in np.array_split(order, 2))
            row = [contiguous_max_over_mean(judged, ranks).mean()]
            for copies in range(3):
                placed = place("greedy", learned, ranks, redundant=copies * ranks)
                row.append(placed.max_over_mean(judged).mean())
            found.append(row)
        assert np.mean(found, axis=0) == pytest.approx(expected, abs=0.025)


def test_uneven_contiguous_start_gives_the_first_ranks_one_more() -> None:
    assert contiguous_max_over_mean([[1, 1, 1, 1, 1]], 2) == pytest.approx([1.2])
    assert contiguous_max_over_mean([[3, 1]], 4) == pytest.approx([3.0])


@pytest.mark.parametrize(
    ("ranks", "more", "message"),
    [
        (
            8,
            {"redundant": 3},
            r"12 experts \+ 3 redundant do not divide over 8 ranks. Use 4 redundant experts, or 5 or 15 ranks",
        ),
        (8, {"redundant": 10}, r"Use 4 or 12 redundant experts, or 2 or 11 ranks"),
        (8, {"redundant": -4}, "-4 redundant experts.*Use 4"),
        (2, {"redundant": 14}, "14 redundant experts: 12 experts on 2 ranks allow 0 to 12. Use 12"),
        (0, {}, "at least one rank"),
        (4, {"num_nodes": 3}, "4 ranks do not divide over 3 nodes. Use 2 or 4 nodes"),
        (4, {"num_groups": 5}, "12 experts do not divide into 5 groups. Use 4 or 6 groups"),
        (10**6, {"redundant": 10**6 - 12}, "slots in a layer"),
    ],
)
def test_what_does_not_divide_is_named_with_the_nearest_that_does(
    ranks: int, more: dict[str, int], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        place("greedy", np.ones((1, 12)), ranks, **more)


def test_bad_loads_and_names_are_one_message() -> None:
    with pytest.raises(WorkloadError, match="layer 1, expert 2 is -1"):
        place("greedy", [[1, 1, 1, 1], [1, 1, -1, 1]], 2)
    with pytest.raises(WorkloadError, match="expert 0 is nan"):
        balance_bound([[np.nan, 1]], 2)
    with pytest.raises(WorkloadError, match="shape"):
        place("greedy", np.ones((0, 4)), 2)
    with pytest.raises(InputError, match=r"'gredy' is unknown: did you mean greedy"):
        place("gredy", [[1, 1]], 2)
    with pytest.raises(LayoutError, match="shape"):
        stale(np.ones((1, 4)), np.ones((2, 4)), 2)
    placed = place("greedy", np.ones((2, 4)), 2)
    with pytest.raises(LayoutError, match="4 experts"):
        placed.rank_loads(np.ones((2, 5)))
    with pytest.raises(LayoutError, match="3 layers, the placement 2"):
        placed.rank_loads(np.ones((3, 4)))


def test_a_placement_checks_itself() -> None:
    with pytest.raises(LayoutError, match=r"layer 1: expert 2 has no slot \(1 missing"):
        Placement("x", np.array([[0, 1, 2, 3], [0, 1, 1, 3]]), 4, 2)
    with pytest.raises(LayoutError, match="slot 3: expert 4 is not one of the 4"):
        Placement("x", np.array([[0, 1, 2, 4]]), 4, 2)
    with pytest.raises(LayoutError, match="6 slots do not divide over 4 ranks. Use 3 or 6 ranks"):
        Placement("x", np.arange(6)[None], 6, 4)
    assert str(place("greedy", np.ones((1, 4)), 2, redundant=2)) == "greedy: 4 experts + 2 copies on 2 ranks"
