"""GPUs, links, nodes and clusters: facts read from `hardware_profiles/*.toml`.

facts      Gpu, Link, Price, System, Cluster: what other modules receive
catalogue  system("h200-sxm"), systems(), parse_cluster("h200-sxm:2x8"), measured_engines("h200-sxm")
conversion from the tables of a TOML to a System
profile    the TOML schema, its plausibility checks and their messages (imports pydantic, hence loaded late)
"""

from __future__ import annotations

from planner.hardware.catalogue import measured_engines, parse_cluster, profile_path, schema, system, systems
from planner.hardware.facts import Cluster, Gpu, Link, Price, System

__all__ = [
    "Cluster",
    "Gpu",
    "Link",
    "Price",
    "System",
    "measured_engines",
    "parse_cluster",
    "profile_path",
    "schema",
    "system",
    "systems",
]
