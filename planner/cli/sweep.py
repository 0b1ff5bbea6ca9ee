"""The command `sweep`: many plans and simulations as one resumable study."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cli.terminal import command_line, progress_bar, show

if TYPE_CHECKING:
    from planner.sweep import Description, Unit


def sweep(
    description: Path | None = None,
    /,
    *,
    out: Path,
    model: list[str] | None = None,
    cluster: list[str] | None = None,
    workload: list[str] | None = None,
    rate: list[float] | None = None,
    concurrency: list[int] | None = None,
    layout: list[str] | None = None,
    engine: list[str] | None = None,
    slo: list[str] | None = None,
    seed: list[int] | None = None,
    option: list[str] | None = None,
    executor: str = "processes",
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Answer `plan` or `simulate` for every combination of the given values; run again to go on after a stop.

    Parameters
    ----------
    description
        A TOML with the same names as the options below, each one value or a list, and a table [options].
    out
        Folder of the sweep: new, or that of the same sweep, which goes on where it stopped.
    model
        As in `plan`; repeat it, like all below, for more values.
    cluster
        As in `plan`, each a sweep value of its own.
    workload
        As in `plan`.
    rate
        Requests per second.
    concurrency
        Users in a closed loop; after the rates.
    layout
        A layout to simulate, or auto for the one that `plan` recommends (the default).
    engine
        As in `plan`.
    slo
        As in `plan`.
    seed
        Seeds of arrivals and lengths.
    option
        A further option of the commands as NAME=VALUE, such as weights=fp8, the same for all.
    executor
        Where it runs: processes, serial, ray (a cluster of this machine, or the one RAY_ADDRESS names) or
        ray://host:port (the head of a cluster this machine belongs to).
    workers
        Units answered at once; by default one per core, of the cluster with ray.
    json
        Print the table as JSON.
    """
    from planner import __version__
    from planner.cli.captured import answer
    from planner.cli.sweep_text import sweep_text
    from planner.sweep import SweepFolder, check_executor, run_sweep, seed_groups, units
    from planner.sweep import executor as chosen_executor

    check_executor(executor, workers)
    axes = {"model": model, "cluster": cluster, "workload": workload, "rate": rate, "concurrency": concurrency}
    axes |= {"layout": layout, "engine": engine, "slo": slo, "seed": seed}
    asked, folder = _described(description, {k: v for k, v in axes.items() if v is not None}, option)
    start = time.perf_counter()
    _check(asked, folder)
    todo = units(asked, folder)
    _check_options(todo)
    profiles = _own_profiles()
    with SweepFolder(out, _identity(asked, todo, __version__, profiles)) as held, progress_bar() as progress:
        rows = run_sweep(
            held,
            todo,
            lambda: chosen_executor(executor, answer, workers),
            lambda done, count: progress("sweep", done / count),
        )
    facts = {
        "folder": str(out),
        "units": len(rows),
        "groups": seed_groups(rows),
        "rows": rows,
        "command": command_line(),
        "versions": {"moeplan": __version__},
    }
    show(facts, json, sweep_text, wall_s=time.perf_counter() - start)
    statuses = {row["status"] for row in rows}
    if statuses <= {"refused", "failed"}:
        sys.exit(2)
    if statuses <= {"refused", "failed", "infeasible"}:
        sys.exit(3)


def _described(file: Path | None, axes: dict[str, Any], option: list[str] | None) -> tuple[Description, Path]:
    """The description in `file` or on the command line, and the folder that names in it refer to."""
    from planner.errors import InputError
    from planner.sweep.description import described, read_description

    if file is not None:
        if axes or option:
            given = next(iter(axes), "option")
            raise InputError(f"sweep {file}: the file describes the sweep, so write --{given} there")
        return read_description(file), file.parent
    missing = next((name for name in ("model", "cluster") if name not in axes), None)
    if missing:
        raise InputError(f"sweep: give --{missing}, once or more, or a TOML that describes the sweep")
    options: dict[str, Any] = {}
    for text in option or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--option {text}: write NAME=VALUE, such as weights=fp8 or no_rails=true")
        flags = {"true": True, "false": False}
        before, read = options.get(name), flags.get(value, value)
        options[name] = read if before is None else [*(before if isinstance(before, list) else [before]), read]
    return described(axes | {"options": options}, "sweep"), Path()


def _check(asked: Description, folder: Path) -> None:
    """Read every value once, so that a misspelling is said before anything runs."""
    from planner import options
    from planner.cli.captured import inside
    from planner.layout import parse_layout
    from planner.model import load
    from planner.sweep.description import AUTO
    from planner.workload import parse_slo

    with inside(folder):
        for name in asked.model:
            load(name)
        for name in asked.cluster:
            options.clusters([name])
        for name in asked.engine:
            options.engine(name)
        for name in asked.slo:
            parse_slo(name)
        for name in asked.layout:
            parse_layout(name) if name != AUTO else None
        loads: list[tuple[float | None, int | None]] = [(rate, None) for rate in asked.rate]
        loads += [(None, users) for users in asked.concurrency]
        for name in asked.workload:
            for load_of in loads or [(None, None)]:
                options.demand(name, *load_of, None).with_num_requests(1).requests(min(asked.seed))


def _check_options(todo: tuple[Unit, ...]) -> None:
    """Further options must be known to every command of the sweep. Raises what the command line raises."""
    from planner.cli import app

    for command in {unit.arguments[0]: unit for unit in todo}.values():
        app.parse_args(command.arguments, exit_on_error=False, print_error=False)


def _own_profiles() -> str | None:
    """Hash of all files in the user's profile directories, which workers find by their absolute paths from now on."""
    import hashlib

    from planner.hardware.catalogue import PROFILES_VARIABLE

    listed = [Path(part).absolute() for part in os.environ.get(PROFILES_VARIABLE, "").split(os.pathsep) if part]
    if not listed:
        return None
    os.environ[PROFILES_VARIABLE] = os.pathsep.join(map(str, listed))
    digest = hashlib.sha256()
    for folder in listed:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _identity(asked: Description, todo: tuple[Unit, ...], version: str, profiles: str | None) -> dict[str, Any]:
    """What makes it the same sweep: version, axes, and the content of every file."""
    from dataclasses import asdict

    files = sorted({name for unit in todo for name, _ in unit.files})
    return {"moeplan": version, "units": len(todo), "inputs": files, "profiles": profiles} | asdict(asked)
