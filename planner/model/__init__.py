"""Models: what a checkpoint holds, read from config.json, a bundled copy, or a short TOML.

`load("deepseek-v3")` gives a `ModelConfig`; everything else derives from its list of weights.
"""

from __future__ import annotations

from planner.model.catalog import bundled, catalog, load
from planner.model.config import Attention, DenseFfn, Layer, ModelConfig, Moe, Recurrent, Weight
from planner.model.families import FAMILIES
from planner.model.huggingface import from_hf
from planner.model.precision import compute_format, override
from planner.model.summary import describe, describe_layers

__all__ = [
    "FAMILIES",
    "Attention",
    "DenseFfn",
    "Layer",
    "ModelConfig",
    "Moe",
    "Recurrent",
    "Weight",
    "bundled",
    "catalog",
    "compute_format",
    "describe",
    "describe_layers",
    "from_hf",
    "load",
    "override",
]
