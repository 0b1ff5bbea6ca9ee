"""Facts of recorded routing: what `experts inspect` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from planner.errors import WorkloadError
from planner.routing import goodness
from planner.routing import statistics as stats
from planner.routing.experts import active_experts
from planner.routing.formats import read_records
from planner.routing.records import Record, check_model, mixture

if TYPE_CHECKING:
    from planner.model import ModelConfig

Facts = dict[str, Any]
_BATCHES = (1, 8, 16, 32, 64, 128, 256, 512)
_WORTH = 1.10
"""Busiest rank over mean from which balancing pays: a layout must win by 10 % to be worth its trouble (`recommend`)."""
_USUAL_EPS = (8, 16, 32)


def inspect_facts(
    traces: Sequence[Path],
    select: str | None = None,
    model: ModelConfig | None = None,
    eps: Sequence[int] | None = None,
) -> Facts:
    """Facts of the records in `traces`, all their tokens together and each alone.

    Parameters
    ----------
    traces
        Files that `routing.formats` reads.
    select
        Record inside a file of several.
    model
        Model they must be of; it also tells the experts and the picks per token where a file does not.
    eps
        EP sizes; chosen from the divisors of the experts otherwise.

    Raises
    ------
    WorkloadError, LayoutError
        A file cannot be read, the records or the model do not fit together, or an EP size divides no experts.
    """
    if model is not None and not model.num_experts:
        raise WorkloadError(f"{model.name} has no experts: routing records are of mixture-of-experts models")
    records = [r for path in traces for r in read_records(path, select, model.num_experts if model else None)]
    whole = mixture(records, f"{len(records)} records together")
    if model is not None:
        check_model(whole, model.num_experts, model.num_moe_layers, model.top_k, model.name)
        records = [dataclasses.replace(r, top_k=model.top_k) for r in records]
        whole = dataclasses.replace(whole, top_k=model.top_k)
    return record_facts(whole, records, tuple(eps) if eps else stats.ep_sizes(whole.num_experts))


def record_facts(whole: Record, parts: Sequence[Record], eps: Sequence[int]) -> Facts:
    """Facts of `whole`, the mixture of `parts`, with one row per part if there are several."""
    fit = goodness.fit(whole, eps)
    spread = stats.load_spread(whole.counts)
    ranks = [_ep_facts(whole, fit, i) for i in range(len(eps))]
    facts: Facts = {
        "source": whole.source,
        "num_layers": whole.num_layers,
        "num_experts": whole.num_experts,
        "top_k": whole.top_k,
        "num_tokens": round(whole.num_tokens) if whole.num_tokens else None,
        "num_sequences": None if whole.sequence_lengths is None else int(whole.sequence_lengths.size),
        "law": _law_facts(fit),
        "skew": {f.name: _range(getattr(spread, f.name)) for f in dataclasses.fields(spread)},
        "ep": ranks,
        "active_experts": _active_facts(whole),
        "reuse": _reuse_facts(whole),
        "request_concentration": _kappa(whole),
        "window_correlation": stats.window_correlation(whole),
        "sampling_cv": stats.sampling_cv(whole),
        "traces": [_part_facts(part, eps) for part in parts] if len(parts) > 1 else [],
        "load_correlation": stats.load_correlation(parts).tolist() if len(parts) > 1 else None,
        "per_layer": _layer_facts(whole, spread, eps),
    }
    return {"headline": _headline(facts, fit)} | facts | {"notes": _notes(whole, facts)}


def _range(values: NDArray[np.float64]) -> Facts:
    return {"mean": float(values.mean()), "low": float(values.min()), "high": float(values.max())}


def _law_facts(fit: goodness.Fit) -> Facts:
    skews = {
        "lognormal": f"lognormal:{fit.sigma_low:.2f}-{fit.sigma_high:.2f}",
        "zipf": f"zipf:{fit.zipf_exponent:.2f}",
        "dirichlet": f"dirichlet:{fit.dirichlet_concentration:.3g}",
    }
    return {
        "name": fit.law,
        "skew": skews[fit.law],
        "sigma_low": fit.sigma_low,
        "sigma_high": fit.sigma_high,
        "zipf_exponent": fit.zipf_exponent,
        "dirichlet_concentration": fit.dirichlet_concentration,
        "mean_error": {law: fit.error(law) for law in fit.predicted},
    }


def _ep_facts(record: Record, fit: goodness.Fit, row: int) -> Facts:
    seen = stats.rank_max_over_mean(record.counts, fit.eps[row])
    best = float(stats.best_max_over_mean(record.counts, fit.eps[row]).mean())
    if seen.mean() < _WORTH:
        verdict = "not needed"
    else:
        verdict = "worth it" if best < _WORTH else "worth it with redundant experts"
    return {
        "ep": fit.eps[row],
        "max_over_mean": _range(seen),
        "placement_bound": best,
        "eplb": verdict,
        "predicted": {law: float(values[row]) for law, values in fit.predicted.items()},
    }


def _active_facts(record: Record) -> list[Facts] | None:
    found = stats.expected_active(record, _BATCHES)
    if found is None or record.top_k is None:
        return None
    uniform = active_experts(np.array(_BATCHES), np.full(record.num_experts, record.top_k / record.num_experts))
    return [
        {"tokens": tokens, "active": float(active), "uniform": float(even)}
        for tokens, active, even in zip(_BATCHES, found, uniform, strict=True)
    ]


def _reuse_facts(record: Record) -> Facts | None:
    found = stats.reuse(record)
    if found is None or record.top_k is None:
        return None
    return _range(found) | {"uniform": record.top_k / record.num_experts}


def _kappa(record: Record) -> float | None:
    """One kappa for all layers, from their mean 1 / (kappa + 1); None where it is unknown or infinite."""
    kappa = stats.request_concentration(record)
    if kappa is None:
        return None
    mean = float((1.0 / (kappa + 1.0)).mean())
    return 1.0 / mean - 1.0 if mean > 0 else None


def _part_facts(record: Record, eps: Sequence[int]) -> Facts:
    spread = stats.load_spread(record.counts)
    found = stats.reuse(record)
    return {
        "source": record.source,
        "num_tokens": round(record.num_tokens) if record.num_tokens else None,
        "sigma_low": float(spread.sigma_cv.min()),
        "sigma_high": float(spread.sigma_cv.max()),
        "max_over_mean": float(spread.max_over_mean.mean()),
        "ep": {str(ep): float(stats.rank_max_over_mean(record.counts, ep).mean()) for ep in eps},
        "reuse": None if found is None else float(found.mean()),
    }


def _layer_facts(record: Record, spread: stats.LoadSpread, eps: Sequence[int]) -> list[Facts]:
    columns = {f.name: getattr(spread, f.name) for f in dataclasses.fields(spread)}
    columns |= {f"ep{ep}": stats.rank_max_over_mean(record.counts, ep) for ep in eps}
    found = stats.reuse(record)
    if found is not None:
        columns["reuse"] = found
    return [
        {"layer": int(layer)} | {name: float(values[row]) for name, values in columns.items()}
        for row, layer in enumerate(record.layers)
    ]


def _headline(facts: Facts, fit: goodness.Fit) -> str:
    """One sentence: the law, the busiest rank at the usual EP sizes, whether balancing pays."""
    shown = [row for row in facts["ep"] if row["ep"] in _USUAL_EPS] or facts["ep"][-3:]
    laws = {
        "lognormal": f"log-normal, sigma {fit.sigma_low:.2f}-{fit.sigma_high:.2f}",
        "zipf": f"Zipf, exponent {fit.zipf_exponent:.2f}",
        "dirichlet": f"Dirichlet, concentration {fit.dirichlet_concentration:.3g}",
    }
    worth = [row for row in facts["ep"] if row["eplb"] != "not needed"]
    scarce = [str(row["ep"]) for row in worth if row["eplb"] != "worth it"]
    verdict = f"EPLB worth it from EP{worth[0]['ep']} on" if worth else "EPLB not worth it"
    if scarce:
        verdict += ", with redundant experts" + (f" at EP{'/'.join(scarce)}" if len(scarce) < len(worth) else "")
    eps = "/".join(str(row["ep"]) for row in shown)
    loads = "/".join(f"{row['max_over_mean']['mean']:.2f}" for row in shown)
    return f"{laws[fit.law]}; EP{eps} busiest rank {loads} x mean; {verdict}"


def _notes(record: Record, facts: Facts) -> list[str]:
    notes = []
    noise = facts["sampling_cv"]
    if noise is not None and noise > 0.5 * facts["skew"]["cv"]["mean"]:
        notes.append(
            f"The record is short: {facts['num_tokens']:,} tokens of uniform routing would show a CV of {noise:.2f}, "
            f"seen is {facts['skew']['cv']['mean']:.2f}. The skew is overstated."
        )
    if record.top_k is None:
        notes.append("Counts alone do not tell the tokens; name the model to see active experts per batch.")
    if record.expert_ids is None:
        notes.append("Reuse and correlation within requests need token ids, which this record lacks.")
    elif facts["request_concentration"] is None:
        notes.append("Requests do not differ in their experts, or there are too few of two and more tokens to tell.")
    return notes
