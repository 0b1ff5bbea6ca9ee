"""The `profiles` commands: what hardware is known, where its numbers come from, and importing measured tables."""

from __future__ import annotations

import json
from pathlib import Path

from planner.cli.terminal import show


def list_profiles(*, json: bool = False) -> None:
    """Known systems, and for which of them kernels were measured.

    Parameters
    ----------
    json
        Print a JSON list.
    """
    from planner.facts import profile_rows
    from planner.text import profiles_text

    show(profile_rows(), json, profiles_text)


def show_profile(name: str, *, json: bool = False) -> None:
    """Every fact of one system with its source, and what is measured on it.

    Parameters
    ----------
    name
        System name or profile TOML.
    json
        Print the facts as JSON.
    """
    from planner.facts import profile_facts
    from planner.text import profile_text

    show(profile_facts(name), json, profile_text)


def print_schema() -> None:
    """JSON schema of a profile TOML, for editor completion."""
    from planner.hardware import schema as profile_schema

    print(json.dumps(profile_schema(), indent=2))


def import_profiles(tree: Path, *, system: str, name: str, out: Path) -> None:
    """Convert a tree of measured kernel tables (aiconfigurator-core layout) into a compact profile.

    Parameters
    ----------
    tree
        Folder laid out as <system>/<family>/<engine>/<version>/<op>_perf.parquet.
    system
        Folder name inside the tree, such as h200_sxm.
    name
        Name of the profile to write, such as h200-sxm.
    out
        Folder that receives <name>/.
    """
    from planner.measurements.importer import import_tables
    from planner.text import import_text

    print(import_text(import_tables(tree, system, out, name)))
