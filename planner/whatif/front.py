"""Throughput per GPU against interactivity: every layout over its batch, the best of all, and the chosen one."""

from __future__ import annotations

import numpy as np

from planner.search import TAIL
from planner.whatif.analytic import Answer
from planner.whatif.catalogue import Curve, Kind, curve

CAPTION = (
    "Each dot is a layout at one batch size; up and to the right is better. Black: the best of all layouts. Orange: "
    "the chosen layout from idle (right) to full, with a diamond where your demand puts it. Click a dot for its layout."
)
_MOST_SHOWN, _CLOUD_POINTS = 24, 12
"""Layouts on the chart, and batches of each."""


def front(found: Answer) -> list[dict[str, object]]:
    """A row per layout: the most it carries within the SLO, or one request at a time where that misses it already."""
    rows = []
    for kind in _kinds(found):
        line = curve(found.question, kind)
        rows.append(_point(found, kind, line, line.within if line.within is not None else 0))
    return sorted(rows, key=lambda row: -float(str(row["output_tok_per_s_per_gpu"])))


def names(found: Answer) -> dict[str, str]:
    """Layouts by identity, those that carry most per GPU within the SLO first."""
    return {str(row["id"]): f"{row['layout']}, {row['kv']} KV, {row['gpus_per_replica']} GPUs" for row in front(found)}


def cloud(found: Answer) -> list[dict[str, object]]:
    """The layouts that carry most within the SLO, and the chosen one, each at several batches."""
    shown = {str(row["id"]) for row in front(found)[:_MOST_SHOWN]}
    points = []
    for kind in _kinds(found):
        line = curve(found.question, kind)
        picks = np.unique(np.linspace(0, len(line.batch) - 1, _CLOUD_POINTS).astype(int))
        each = [_point(found, kind, line, int(at)) for at in picks]
        points += [point for point in each if point["id"] in shown or point["verdict"] == "chosen layout"]
    return points


def envelope(found: Answer) -> list[dict[str, float]]:
    """The most throughput per GPU that any layout gives at an interactivity or a better one."""
    lines = [curve(found.question, kind) for kind in _kinds(found)]
    if not lines:
        return []
    x = np.concatenate([line.tok_per_s_per_user for line in lines])
    y = np.concatenate([line.output_tok_per_s_per_gpu for line in lines])
    order = np.argsort(-x, kind="stable")
    best_so_far = np.maximum.accumulate(y[order])
    rises = np.flatnonzero(np.diff(best_so_far, prepend=0.0) > 0)
    return [_place(float(x[order][at]), float(best_so_far[at])) for at in rises]


def _place(tok_per_s_per_user: float, output_tok_per_s_per_gpu: float) -> dict[str, float]:
    return {"tok_per_s_per_user": tok_per_s_per_user, "output_tok_per_s_per_gpu": output_tok_per_s_per_gpu}


def _kinds(found: Answer) -> list[Kind]:
    """Kinds of the estimates, each once."""
    return list({id(each.kind): each.kind for each in found.found}.values())


def _point(found: Answer, kind: Kind, line: Curve, at: int) -> dict[str, object]:
    deployment = kind.deployment
    is_chosen = found.chosen is not None and kind is found.chosen.kind
    within = line.within is not None and at <= line.within
    verdict = "chosen layout" if is_chosen else "meets the SLO" if within else "misses the SLO"
    backend = f", {deployment.backend}" if deployment.layout.attention_dp > 1 else ""
    return {
        "id": f"{kind.key}/{deployment.backend}/{deployment.model.kv_format}",
        "layout": f"{deployment.layout}{backend}",
        "kv": deployment.model.kv_format,
        "gpus_per_replica": deployment.layout.replica_gpus,
        "tok_per_s_per_user": float(line.tok_per_s_per_user[at]),
        "output_tok_per_s_per_gpu": float(line.output_tok_per_s_per_gpu[at]),
        "requests_per_s": float(line.requests_per_s[at]),
        "sequences_per_rank": float(line.batch[at]),
        "verdict": verdict,
    }


def chosen_curve(found: Answer) -> list[dict[str, float]]:
    """The chosen layout from an idle server to a full one."""
    if found.chosen is None:
        return []
    line = curve(found.question, found.chosen.kind)
    pairs = zip(line.tok_per_s_per_user, line.output_tok_per_s_per_gpu, strict=True)
    return [_place(float(x), float(y)) for x, y in pairs]


def at_demand(found: Answer) -> dict[str, float] | None:
    """Where the demand puts the chosen layout."""
    chosen = found.chosen
    return _place(1 / chosen.candidate.tpot_s, chosen.output_tok_per_s / chosen.num_gpus) if chosen else None


def least_tok_per_s_per_user(found: Answer) -> float | None:
    """Mean rate per user at which the TPOT objective is just met, by the ratio of its percentile to the mean."""
    limits = [o.limit_s / TAIL["tpot"][o.statistic] for o in found.question.slo.objectives if o.metric == "tpot"]
    return 1 / min(limits) if limits else None
