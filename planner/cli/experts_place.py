"""The command `experts place`: where experts should live, and how even the ranks are then."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planner.cli.terminal import show

if TYPE_CHECKING:
    from planner.placement import Placement
    from planner.placement.mapping import Floats

Facts = dict[str, Any]
_WORST = 5
"""Layers shown in the text."""


def place_experts(
    counts: Path,
    *,
    ranks: int,
    nodes: int = 1,
    groups: int = 1,
    top_groups: int | None = None,
    redundant: int = 0,
    policy: str = "eplb",
    select: str | None = None,
    serve: Path | None = None,
    serve_select: str | None = None,
    out: Path | None = None,
    format: Literal["sglang", "vllm", "vllm-ascend", "csv", "npz"] = "sglang",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Place experts on ranks so that the busiest has little more than the mean.

    Parameters
    ----------
    counts
        Recorded traffic: a CSV (layer,expert,assignments) or any file `experts inspect` reads.
    ranks
        Ranks that share the experts (EP).
    nodes
        Nodes of the ranks.
    groups
        Groups of a group-limited router (DeepSeek-V3: 8); eplb and node-limited keep them whole on nodes.
    top_groups
        Groups that a token may pick from (DeepSeek-V3: 4): says how many nodes it then reaches at most.
    redundant
        Copies of hot experts per layer, on all ranks together; they take memory from the KV cache.
    policy
        contiguous, round-robin, greedy, greedy-swaps, eplb, eplb-global, node-limited, random, exact (OR-tools,
        about 10 s per layer), SGLang's trivial, or a placement file to judge (.json of SGLang or vLLM, .csv, .npz).
    select
        Record in a file of several.
    serve
        Other traffic of the same model: how even the ranks are when it arrives instead.
    serve_select
        Record in that file.
    out
        File for the placement.
    format
        Format of that file: SGLang's --init-expert-location, vLLM's physical-to-logical map, vLLM Ascend's
        expert_map_path, CSV (layer,slot,expert) or npz.
    seed
        Seed of the policy random.
    json
        Print the facts as JSON.
    """
    from planner.facts.placement import placement_facts
    from planner.placement import PLACEMENTS, write_placement
    from planner.placement.stale import check_same_model
    from planner.routing.formats import read_record

    _check_groups(groups, top_groups)
    record = read_record(counts, select)
    layers = record.layers.tolist()
    shape = {"num_nodes": nodes, "num_groups": groups, "redundant": redundant, "seed": seed}
    placement = _placed(policy, record.counts, ranks, layers, shape)
    served, fresh = None, None
    if serve is not None:
        other = read_record(serve, serve_select)
        check_same_model(record, other)
        served = other.counts
        fresh = _placed(policy, served, ranks, layers, shape) if placement.policy in PLACEMENTS else None
    facts = placement_facts(record.counts, layers, placement, num_groups=groups, served=served, fresh=fresh)
    if out is not None:
        write_placement(placement, out, format, layers=layers)
    reached = None if top_groups is None else int(placement.nodes_reached(groups, top_groups).max())
    show(facts | {"source": record.source, "out": out and str(out), "nodes_reached": reached}, json, place_text)


def _check_groups(groups: int, top_groups: int | None) -> None:
    from planner.errors import InputError

    if top_groups is not None and not 1 <= top_groups <= groups:
        raise InputError(f"--top-groups {top_groups}: a token picks from 1 to {groups} of --groups {groups}")


def _placed(policy: str, load: Floats, ranks: int, layers: list[int], shape: dict[str, int]) -> Placement:
    """The placement of a policy, of SGLang's word `trivial`, or in a file."""
    from planner.placement import PLACEMENTS, place, read_placement

    named = "contiguous" if policy == "trivial" else policy
    path = Path(named)
    if named not in PLACEMENTS and path.suffix:
        return read_placement(path, load.shape[1], ranks, num_nodes=shape["num_nodes"], layers=layers)
    return place(named, load, ranks, **shape)


def place_text(facts: Facts) -> str:
    """Text of `experts place`: how even, against what is possible, the worst layers, other traffic, what next."""
    from planner.tables import table

    copies = f" with {facts['redundant']} redundant" if facts["redundant"] else ""
    worst = sorted(facts["per_layer"], key=lambda row: -row["after"])[:_WORST]
    moved = facts["moved"]
    lines = [
        f"{facts['policy']}: {facts['num_experts']} experts{copies} on {facts['num_ranks']} ranks are within "
        f"{facts['within_of_perfect_pct']:.1f} % of perfect balance",
        f"  busiest rank {facts['max_over_mean_after']:.3f}x the mean; contiguous without copies "
        f"{facts['max_over_mean_before']:.3f}x; no placement of these slots is below {facts['bound']:.3f}x",
        "",
        f"Most uneven of {facts['num_layers']} layers (busiest rank / mean)",
        table(
            ["layer", "before", "after", "bound"],
            [(str(r["layer"]), f"{r['before']:.3f}", f"{r['after']:.3f}", f"{r['bound']:.3f}") for r in worst],
        ),
        "",
        f"Moves     {moved['copies']:,} expert copies from a contiguous start, at most "
        f"{moved['copies_of_busiest_rank']:,} to one rank"
        + (f", {moved['copies_cross_node']:,} between nodes" if facts["num_nodes"] > 1 else ""),
    ]
    if facts["nodes_reached"] is not None:
        lines.append(f"Reach     a token goes to at most {facts['nodes_reached']} of {facts['num_nodes']} nodes")
    if facts["served"]:
        lines.append(_served_line(facts))
    if facts["out"]:
        lines.append(f"Written   {facts['out']}")
    return "\n".join(lines + [f"Next      {step}" for step in facts["next"]])


def _served_line(facts: Facts) -> str:
    served = facts["served"]
    verdict = "worse" if served["max_over_mean"] > served["max_over_mean_contiguous"] else "better"
    fresh = served["max_over_mean_fresh"]
    itself = "" if fresh is None else f"placed on itself {fresh:.3f}x; "
    return (
        f"Served    the other traffic: {served['max_over_mean']:.3f}x, {verdict} than contiguous "
        f"({served['max_over_mean_contiguous']:.3f}x); {itself}worse than contiguous in "
        f"{served['num_layers_worse_than_contiguous']} of {facts['num_layers']} layers"
    )
