"""`moeplan experts inspect`: what recorded routing says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.cli.terminal import show

Facts = dict[str, Any]


def inspect_records(
    trace: list[Path],
    *,
    select: str | None = None,
    model: str | None = None,
    ep: list[int] | None = None,
    json: bool = False,
) -> None:
    """Skew, load of the busiest rank, reuse and fitted law of recorded routing.

    Several traces are taken together, and each is also listed.

    Parameters
    ----------
    trace
        Counts as CSV (layer,expert,assignments), token ids as .npz (expert_ids), records of SGLang (.pt, .json,
        .npz with logical_count) or of vLLM (.npz, .npy, .jsonl with routed_experts).
    select
        Record inside a file of several, such as `Mixtral-8x7B/arxiv` or a part of it.
    model
        Model the records are of: checked, and asked for what the file does not tell.
    ep
        Expert-parallel sizes; repeat the option for several.
    json
        Print the facts as JSON.
    """
    from planner.facts.routing import inspect_facts
    from planner.model import load

    show(inspect_facts(trace, select, load(model) if model else None, ep), json, inspect_text)


def inspect_text(facts: Facts) -> str:
    """Text of `experts inspect`."""
    from planner.tables import table

    lines = [
        facts["headline"],
        "",
        _size(facts),
        "",
        "Busiest rank over mean: contiguous, any placement at best, and as each law predicts",
    ]
    lines += [table(["EP", "mean", "over layers", "at best", "log-normal", "Zipf", "Dirichlet"], _ep_rows(facts))]
    lines += ["", "Experts of a layer"]
    names = {
        "max_over_mean": "max / mean",
        "cv": "CV",
        "sigma_cv": "log-normal sigma",
        "gini": "Gini",
        "zipf_exponent": "Zipf exponent",
    }
    lines += [table(["", "mean", "over layers"], [(names[k], *_spread(facts["skew"][k])) for k in names])]
    if facts["active_experts"]:
        lines += ["", "Experts used by a batch of random tokens"]
        rows = [(f"{r['tokens']:,}", f"{r['active']:.1f}", f"{r['uniform']:.1f}") for r in facts["active_experts"]]
        lines += [table(["tokens", "used", "if uniform"], rows)]
    lines += ["", *_correlations(facts)] if _correlations(facts) else []
    lines += ["", *_traces(facts)] if facts["traces"] else []
    lines += ["", f"Use it   --skew {facts['law']['skew']}"]
    return "\n".join(lines + [f"Note     {note}" for note in facts["notes"]])


def _size(facts: Facts) -> str:
    size = f"{facts['source']}: {facts['num_layers']} layers of {facts['num_experts']} experts"
    size += f" top-{facts['top_k']}" if facts["top_k"] else ""
    size += f", {facts['num_tokens']:,} tokens" if facts["num_tokens"] else ""
    return size + (f" in {facts['num_sequences']:,} sequences" if facts["num_sequences"] else "")


def _spread(values: Facts) -> tuple[str, str]:
    return f"{values['mean']:.2f}", f"{values['low']:.2f}-{values['high']:.2f}"


def _ep_rows(facts: Facts) -> list[list[str]]:
    rows = []
    for row in facts["ep"]:
        guesses = [f"{row['predicted'][law]:.2f}" for law in ("lognormal", "zipf", "dirichlet")]
        rows.append([str(row["ep"]), *_spread(row["max_over_mean"]), f"{row['placement_bound']:.2f}", *guesses])
    errors = [f"{error:.0%}" for error in facts["law"]["mean_error"].values()]
    return [*rows, ["error", "", "", "", *errors]]


def _correlations(facts: Facts) -> list[str]:
    lines = []
    if (reuse := facts["reuse"]) is not None:
        lines.append(
            f"Reuse    {reuse['mean']:.2f} by the next token of the sequence, {reuse['uniform']:.2f} if uniform"
        )
    if (kappa := facts["request_concentration"]) is not None:
        lines.append(f"Requests differ like Dirichlet shares of concentration {kappa:,.0f} around the mean")
    if (lag := facts["window_correlation"]) is not None:
        lines.append(f"Time     correlation {lag:.2f} between the loads of successive windows")
    return lines


def _traces(facts: Facts) -> list[str]:
    from planner.tables import table

    eps = [str(row["ep"]) for row in facts["ep"]]
    rows = []
    for part, correlation in zip(facts["traces"], facts["load_correlation"], strict=True):
        loads = [f"{part['ep'][ep]:.2f}" for ep in eps]
        sigma = f"{part['sigma_low']:.2f}-{part['sigma_high']:.2f}"
        rows.append([_name(part["source"]), sigma, *loads, *(f"{c:.2f}" for c in correlation)])
    numbers = [f"~{i + 1}" for i in range(len(rows))]
    header = ["trace", "sigma", *(f"EP{ep}" for ep in eps), *numbers, "~mixture"]
    return [
        "Each trace; ~ is the correlation of its ln(load) with trace 1, 2, ... and with the mixture",
        table(header, rows),
    ]


def _name(source: str) -> str:
    """The group of a CSV or the file without its folder."""
    return source.partition(".csv:")[2] or Path(source).name
