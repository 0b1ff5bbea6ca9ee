"""Predictions beside measurements: replay measured points, score them, say how far a prediction can be off."""

from planner.validation.harness import Validation, validate
from planner.validation.intervals import interval
from planner.validation.points import METRICS, PointsFile, read_points
from planner.validation.predictions import check_out, write_predictions

__all__ = [
    "METRICS",
    "PointsFile",
    "Validation",
    "check_out",
    "interval",
    "read_points",
    "validate",
    "write_predictions",
]
