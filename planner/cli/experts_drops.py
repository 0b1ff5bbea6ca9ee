"""The command `experts drops`: how many tokens a capacity limit drops."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cli.terminal import show

if TYPE_CHECKING:
    from planner.facts.capacity import Floats, Step

Facts = dict[str, Any]
_WORST = 5
"""Layers shown in the text."""


def count_drops(
    *,
    experts: int,
    top_k: int,
    tokens: int,
    capacity_factor: float,
    rule: str,
    policy: str | None = None,
    counts: Path | None = None,
    select: str | None = None,
    skew: str = "uniform",
    sources: int = 1,
    pad: bool = False,
    min_capacity: int | None = None,
    reroute: bool = False,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Tokens a capacity limit drops in one step, simulated token by token.

    Parameters
    ----------
    experts
        Routed experts of a layer.
    top_k
        Experts per token.
    tokens
        Tokens of the step, all sources together.
    capacity_factor
        Slots over the even share, counted as the rule does: mesh-tf, flax and lingvo count tokens (2.0 for top-2), the
        others picks. Tutel takes 0 (as many as needed) and negative factors (as needed, up to the factor).
    rule
        mesh-tf, flax, lingvo, megatron, deepspeed, tutel, vmoe, nllb, or a budget per device: device-budget
        (DeepSeek-V2 training), rank-budget (Megatron HybridEP).
    policy
        Who keeps a place: position (first tokens), probs (highest gates), random, bpr (tokens of highest gate). The
        stack's own by default.
    counts
        Recorded traffic instead of a skew: a CSV (layer,expert,assignments) or any file `experts inspect` reads.
    select
        Record in a file of several.
    skew
        Expert popularity without counts. Models made for drops are trained to balance their experts, so uniform is the
        default and the floor: mixed, single-domain, aux-balanced-8-experts, lognormal:0.4-0.6, zipf:1, dirichlet:3.
    sources
        Blocks of tokens with slots of their own: source ranks, groups; or the devices of a budget.
    pad
        Experts compute all slots, used or not, also where the stack does not.
    min_capacity
        Least slots per expert instead of the stack's (DeepSpeed 4).
    reroute
        A dropped pick goes to the token's next-ranked expert with room.
    seed
        Seed of popularity and tokens.
    json
        Print the facts as JSON.
    """
    from planner.capacity import CapacityLimit
    from planner.facts.capacity import Step, drops_facts

    limit = CapacityLimit(
        rule,
        capacity_factor,
        policy,  # type: ignore[arg-type]
        padded=True if pad else None,
        minimum=min_capacity,
    )
    step = Step(experts, top_k, tokens, sources)
    record = None if counts is None else _recorded(counts, select, step)
    facts = drops_facts(step, limit, skew=skew, record=record, reroute=reroute, seed=seed)
    show(facts, json, drops_text)


def _recorded(path: Path, select: str | None, step: Step) -> tuple[str, list[int], Floats]:
    """Source, layers and counts of a record; InputError when it is of another model."""
    from planner.errors import InputError
    from planner.routing.formats import read_record

    record = read_record(path, select, step.num_experts)
    if record.num_experts != step.num_experts:
        raise InputError(
            f"{path} has {record.num_experts} experts, not {step.num_experts}: give --experts {record.num_experts} "
            "or the record of the model you mean"
        )
    if record.top_k is not None and record.top_k != step.top_k:
        raise InputError(f"{path} was recorded with top-{record.top_k}: give --top-k {record.top_k}")
    return record.source, record.layers.tolist(), record.counts


def drops_text(facts: Facts) -> str:
    """Text of `experts drops`: the answer, what it means, layers, notes."""
    from planner.tables import table

    low, high = facts["interval"]["drop_rate"]
    unit = "device" if facts["capacity_scope"].startswith("per device") else "expert"
    lines = [
        f"{_percent(facts['drop_rate'])} of assignments are dropped: {facts['capacity']:,} slots per {unit} "
        f"at factor {facts['capacity_factor']:g} ({facts['rule']}, {facts['policy']})",
        "",
        table(
            ["", "share"],
            [
                ("dropped assignments", _percent(facts["drop_rate"])),
                (f"  middle 90 % of {facts['interval']['batches']} batches", f"{_percent(low)} to {_percent(high)}"),
                ("tokens that lose every expert", _percent(facts["fully_dropped_rate"])),
                ("assignments rerouted", _percent(facts["rerouted_rate"])),
                ("slots used", _percent(facts["slot_utilisation"])),
            ],
        ),
        "",
        f"Slots       {facts['capacity_scope']}",
        f"Rows        {facts['processed_rows']:,.0f} computed for {facts['tokens'] * facts['top_k']:,} assignments"
        + (", padding included" if facts["padded"] else ""),
        f"Popularity  {facts['popularity']}, busiest expert {facts['max_over_mean']:.2f} x mean",
        f"Lost token  keeps {facts['dropped_token_keeps']}; {_GATES[facts['gates']]}",
    ]
    if facts["if_skewed"]:
        skewed = facts["if_skewed"]
        lines.append(f"Skewed      {_percent(skewed['drop_rate'])} dropped with {skewed['skew']} popularity")
    if facts["per_layer"]:
        lines += ["", *_layers(facts["per_layer"])]
    return "\n".join([*lines, "", *(f"Note   {note}" for note in facts["note"]), f"Source {facts['source']}"])


_GATES = {
    "unchanged": "kept gates stay as they are",
    "before": "gates are normalised before drops",
    "after": "kept gates are normalised to 1",
}


def _layers(rows: list[Facts]) -> list[str]:
    from planner.tables import table

    worst = sorted(rows, key=lambda row: -row["drop_rate"])[:_WORST]
    shown = [
        (
            str(row["layer"]),
            _percent(row["drop_rate"]),
            _percent(row["fully_dropped_rate"]),
            _percent(row["slot_utilisation"]),
            f"{row['max_over_mean']:.2f}",
        )
        for row in worst
    ]
    title = f"Layers that drop most (of {len(rows)})"
    return [title, table(["layer", "dropped", "fully dropped", "slots used", "max / mean"], shown)]


def _percent(share: float) -> str:
    if 0 < share < 5e-5:
        return "< 0.01 %"
    return f"{100 * share:.{1 if share >= 0.01 else 2}f} %" if share else "0 %"
