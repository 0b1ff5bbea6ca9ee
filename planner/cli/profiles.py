"""The `profiles` commands: known hardware, where its numbers come from, and measured tables: import, check, compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

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


def print_schema(*, tables: bool = False) -> None:
    """JSON schema of a profile TOML, or of measured tables, for editor completion.

    Parameters
    ----------
    tables
        Schema of the rows of every `OP.csv` and of meta.json.
    """
    from planner.hardware import schema as profile_schema
    from planner.profiles.ops import tables_schema

    print(json.dumps(tables_schema() if tables else profile_schema(), indent=2))


def import_profiles(source: Path, *, name: str, out: Path, system: str | None = None, merge: bool = False) -> None:
    """Compile measurements into a profile: our microbenchmark's output, nccl-tests logs, or published parquet tables.

    Parameters
    ----------
    source
        Folder of `OP.csv` and meta.json; a log or a folder of logs of nccl-tests or rccl-tests; or a tree laid out
        as SYSTEM/FAMILY/ENGINE/VERSION/OP_perf.parquet.
    name
        Name of the profile to write, best that of a hardware profile: its data sheet is what rows are checked against.
    out
        Folder that receives NAME/. With MOEPLAN_PROFILES=DIR, write to DIR and the planner finds it.
    system
        Folder name inside a parquet tree, such as h200_sxm.
    merge
        Keep the tables already in OUT/NAME; a case measured anew replaces the old row.
    """
    from planner.cli.profile_text import import_text
    from planner.profiles.importing import import_profile

    print(import_text(import_profile(source, name, out, system_dir=system, merge=merge)))


def check(profile: str, *, worst: int = 5, json: bool = False) -> None:
    """Judge measured tables: physics, monotone times, duplicates, outliers. Exit code 3 when there are faults.

    Parameters
    ----------
    profile
        Name of a measured system, a compiled profile folder, or a folder of CSV files.
    worst
        Rows to show per operation and kind of fault; all are counted.
    json
        Print the facts as JSON.
    """
    from planner.cli.profile_text import check_text
    from planner.options import check_positive
    from planner.profiles.inspect import check_facts

    check_positive(worst=worst)
    facts = check_facts(profile, worst)
    show(facts, json, check_text)
    if not facts["clean"]:
        sys.exit(3)


def compare(first: str, second: str, *, out: Path | None = None, worst: int = 10, json: bool = False) -> None:
    """Time ratios between two measured profiles, operation by operation.

    Parameters
    ----------
    first
        Name or folder of a profile.
    second
        Name or folder of the profile it is compared with.
    out
        Folder for ratios.csv and ratios.svg.
    worst
        Rows to show that differ most.
    json
        Print the facts as JSON.
    """
    from planner.cli.profile_text import compare_text
    from planner.options import check_positive
    from planner.profiles.comparison import compare as compare_profiles
    from planner.profiles.comparison import write_comparison

    check_positive(worst=worst)
    facts, pairs = compare_profiles(first, second, worst=worst)
    if out is not None:
        write_comparison(out, facts, pairs)
    show(facts, json, compare_text)


def coverage(
    model: str,
    *,
    gpu: str,
    engine: str = "vllm",
    layout: str | None = None,
    backend: Literal["allgather_reducescatter", "deepep"] = "allgather_reducescatter",
    json: bool = False,
) -> None:
    """Which operations of a model are measured on a GPU, and what to measure next.

    Parameters
    ----------
    model
        Hugging Face id, alias, config.json, directory or model TOML.
    gpu
        System or cluster, such as h200-sxm or h200-sxm:2x8.
    engine
        Serving engine whose kernels are asked for.
    layout
        Degrees of parallelism, such as tp=8,ep=8; the roomiest smallest one that fits otherwise.
    backend
        How attention-DP ranks exchange tokens with experts.
    json
        Print the facts as JSON.
    """
    from planner import fit as fitting
    from planner.cli.profile_text import coverage_text
    from planner.coverage import Case, coverage_facts
    from planner.engine import engine as load_engine
    from planner.hardware import parse_cluster
    from planner.layout import check_layout, parse_layout
    from planner.model import load

    chosen, cluster, profile = load(model), parse_cluster(gpu), load_engine(engine)
    parts = parse_layout(layout) if layout else fitting.fit(chosen, cluster.system, profile).layout
    check_layout(chosen, parts)
    case = Case(chosen, parts, cluster, profile, backend)
    show(coverage_facts(case.on_enough_nodes()), json, coverage_text)


def shapes(models: list[str], *, out: Path, tp: str = "1,4,8", ep: str = "1,8") -> None:
    """Write the shapes of real models for `python -m microbench --model-shapes FILE`.

    Parameters
    ----------
    models
        Hugging Face ids, aliases, config.json files, directories or model TOMLs.
    out
        JSON file to write.
    tp
        Tensor-parallel degrees, separated by commas.
    ep
        Expert-parallel degrees, separated by commas.
    """
    from planner.cli.profile_text import shapes_text, write_json
    from planner.coverage import shapes_facts
    from planner.engine import engine as load_engine
    from planner.model import load

    degrees = {option: _degrees(option, text) for option, text in (("--tp", tp), ("--ep", ep))}
    facts = shapes_facts([load(model) for model in models], degrees["--tp"], degrees["--ep"], load_engine("vllm"))
    write_json(out, facts)
    print(shapes_text(facts, str(out)))


def _degrees(option: str, text: str) -> list[int]:
    from planner.errors import InputError
    from planner.units import whole_number

    degrees = [whole_number(part.strip()) or 0 for part in text.split(",")]
    if not all(degrees):
        raise InputError(f"{option} {text}: write positive whole numbers separated by commas, such as 1,4,8")
    return degrees
