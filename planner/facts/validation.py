"""Facts of `moeplan validate`: errors per metric and slice, coverage, the worst points, rows without a prediction."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from planner import __version__
from planner.validation import METRICS, Validation
from planner.validation.intervals import interval_table
from planner.validation.scores import Score, score, slices, worst

Facts = dict[str, Any]
_WORST = 5
"""Points shown per metric."""


def validation_facts(validation: Validation) -> Facts:
    """What `validate --json` prints; errors are None where no point has a measurement."""
    pairs = validation.pairs
    table = interval_table()
    return {
        "points": str(validation.source.path),
        "num_points": len(pairs),
        "num_predicted": sum(prediction.is_ok for _, prediction in pairs),
        "metrics": {metric: score_facts(score(pairs, metric)) for metric in METRICS},
        "slices": [
            {
                "slice": name,
                "value": value,
                "num_points": num,
                "metrics": {metric: score_facts(found) for metric, found in scores.items()},
            }
            for name, value, scores, num in slices(validation)
        ],
        "worst": {metric: _worst(validation, metric) for metric in METRICS},
        "not_predicted": [
            {"id": row.name, "status": prediction.status} for row, prediction in pairs if not prediction.is_ok
        ],
        "intervals": {"as_of": table.as_of, "source": table.source, "held_out": dict(table.held_out)},
        "versions": {"moeplan": __version__},
    }


def score_facts(found: Score) -> Facts:
    """`n, coverage, mape_pct, median_ape_pct, p90_ape_pct, bias_pct, interval_coverage_pct` of one metric."""
    facts = asdict(found)
    numbers = {"n": facts.pop("num")} | facts
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in numbers.items()}


def _worst(validation: Validation, metric: str) -> list[Facts]:
    column = METRICS.index(metric)
    rows = []
    for row, prediction, ratio in worst(validation, metric, _WORST):
        point = row.point
        assert point is not None
        rows.append(
            {
                "id": row.name,
                "point": f"{point.model} on {point.num_gpus} x {point.gpu}, {point.engine}, {prediction.family}, "
                f"{point.isl}/{point.osl}, {point.concurrency} users",
                "predicted": prediction.values[column],
                "measured": point.measured[column],
                "ratio": ratio,
            }
        )
    return rows
