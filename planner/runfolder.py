"""A run as a folder: resolved inputs, layouts, requests, manifest, report. Written whole or not at all."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from planner import __version__
from planner.deployment import Run
from planner.disaggregation.deployment import PoolsRun
from planner.economics import terms_tables
from planner.errors import InputError
from planner.facts import model_facts
from planner.facts.experts import settings_facts
from planner.facts.tactics import tactic_facts
from planner.recommend import Recommendation
from planner.units import finite

FACTS = ("plan.json", "simulation.json", "comparison.json")
"""Facts of a run, one of them in every folder."""
_NEEDED = {
    "plan.json": ("question", "headline", "command"),
    "simulation.json": ("model", "workload", "saturation", "command"),
    "comparison.json": ("kind", "question", "headline", "systems", "command"),
}
"""Facts without which a report would be empty; all others may be missing."""
_NOT_IN_TABLE = frozenset({"evidence", "launch"})
"""Facts of a system that are texts and series, not columns; `comparison.json` has them."""


def check_folder(folder: Path) -> None:
    """Raise InputError unless `folder` is new or empty and can be created."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file. Give a new folder.")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"--out {folder}: is not empty, and an earlier run is never overwritten. Give a new folder.")
    parent = folder.resolve().parent
    if not parent.is_dir():
        found = "is a file" if parent.exists() else "does not exist"
        raise InputError(f"--out {folder}: {parent} {found}. Name a place in an existing folder.")
    _writable(parent)


def write_run(folder: Path, answer: Recommendation, facts: dict[str, Any]) -> None:
    """Write a plan: resolved inputs, facts, layouts, the winner's requests, the report as HTML and Markdown."""
    files = {"inputs.json": _json(_inputs(answer)), "layouts.csv": _layouts(answer)} | _answer("plan.json", facts)
    if answer.winner is not None:
        files["requests.csv"] = _table(answer.winner.simulation.requests)
    _write(folder, files, facts)


def _inputs(answer: Recommendation) -> dict[str, Any]:
    """Everything the answer rests on, resolved: the model as read, each system, engine, workload, SLO and seed."""
    return {
        "model": model_facts(answer.model),
        "clusters": [asdict(cluster) for cluster in answer.clusters],
        "engine": asdict(answer.engine),
        "workload": asdict(answer.workload),
        "slo": [asdict(objective) for objective in answer.slo.objectives],
        "experts": settings_facts(answer.experts),
        **tactic_facts(answer.tactics),
        "terms": terms_tables(answer.terms),
        "seed": answer.seed,
    }


def write_simulation(folder: Path, run: Run, facts: dict[str, Any]) -> None:
    """Write a simulation: `simulation.json`, `requests.csv`, `steps.csv`, the report as HTML and Markdown."""
    files = _answer("simulation.json", facts) | {
        "requests.csv": _table(run.simulation.requests),
        "steps.csv": _table(run.simulation.steps, run.expert_steps.columns() if run.expert_steps else {}),
    }
    _write(folder, files, facts)


def write_pools(folder: Path, run: PoolsRun, facts: dict[str, Any]) -> None:
    """Write a simulation of two pools as `write_simulation`, with the steps of each pool."""
    files = _answer("simulation.json", facts) | {
        "requests.csv": _table(run.simulation.requests, run.simulation.handovers.columns()),
        "prefill_steps.csv": _table(run.simulation.prefill_steps),
        "decode_steps.csv": _table(run.simulation.decode_steps),
    }
    _write(folder, files, facts)


def write_comparison(folder: Path, facts: dict[str, Any]) -> None:
    """Write a comparison: facts, one row per system, the report as HTML and Markdown."""
    files = {"systems.csv": _systems(facts)} | _answer("comparison.json", facts)
    _write(folder, files, facts)


def rewrite_report(folder: Path) -> list[Path]:
    """Make the HTML and Markdown of a run folder again from its JSON; the paths written.

    The manifest follows. Raises InputError on a folder without facts, and on facts that are no JSON, too few or wrong.
    """
    from planner.report import write

    facts = _facts_of(folder)
    try:
        written = [write(facts, folder / f"report.{suffix}") for suffix in ("html", "md")]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder}: its facts cannot be shown ({type(error).__name__}: {error}). They were edited, or written by "
            "another version: run the command in manifest.json again with --out."
        ) from error
    manifest = folder / "manifest.json"
    if manifest.is_file():
        said = _read(manifest)
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}
        manifest.write_text(_json(said | {"sha256": said.get("sha256", {}) | hashes}), encoding="utf-8")
    return written


def _facts_of(folder: Path) -> dict[str, Any]:
    found = [folder / name for name in FACTS if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder}: no {', '.join(FACTS)} in it. Name a folder that --out wrote.")
    facts = _read(found[0])
    lacking = [key for key in _NEEDED[found[0].name] if not facts.get(key)]
    systems = facts.get("systems") or []
    if not isinstance(systems, list) or any(not (isinstance(row, Mapping) and row.get("name")) for row in systems):
        lacking.append("names of its systems")
    if lacking:
        raise InputError(
            f"{found[0]}: cannot be shown, for it lacks {', '.join(lacking)}. It was edited, or written by another "
            "version: run the command again with --out."
        )
    return facts


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}). Run the command again with --out.") from error
    if not isinstance(facts, dict):
        raise InputError(f"{path}: holds no facts but a {type(facts).__name__}. Run the command again with --out.")
    return facts


def _answer(name: str, facts: dict[str, Any]) -> dict[str, str]:
    """The facts under `name` and their report, made from what the file says so that it can be made again."""
    # Drawing takes half a second to import, which only a run with --out should wait for.
    from planner.report import html, markdown

    text = _json(facts)
    told = json.loads(text)
    return {name: text, "report.html": html(told), "report.md": markdown(told)}


def _systems(facts: dict[str, Any]) -> str:
    """One row per system of a comparison; percentiles, intervals and models in columns of their own."""
    told = [{k: v for k, v in system.items() if k not in _NOT_IN_TABLE} for system in facts.get("systems") or ()]
    rows = [dict(_flat(system)) for system in told]
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}_")
        elif isinstance(item, list | tuple):
            yield from _flat({f"{key}_{index}": part for index, part in enumerate(item)}, prefix)
        else:
            yield f"{prefix}{key}", item


def _write(folder: Path, files: dict[str, str], facts: dict[str, Any]) -> None:
    """Fill a sibling temporary folder and rename it, so `folder` never holds half a run."""
    manifest = {
        "moeplan": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "command": facts["command"],
        "sha256": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()},
    }
    target = folder.resolve()
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=_writable(target.parent)))
    try:
        for name, text in (files | {"manifest.json": _json(manifest)}).items():
            (staging / name).write_text(text, encoding="utf-8")
        staging.chmod(0o755)
        if target.exists():
            target.rmdir()
        staging.rename(target)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror}). Choose another place.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _writable(parent: Path) -> Path:
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise InputError(f"--out: {parent} cannot be written ({error.strerror}). Choose another place.") from error
    return parent


def _json(value: Any) -> str:
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def _layouts(answer: Recommendation) -> str:
    """Every simulated layout and every analytic survivor, one row each."""
    simulated = {id(run.deployment): run for run in answer.runs}
    columns: dict[str, Callable[[Any], Any]] = {
        "cluster": lambda c: c.deployment.cluster.name,
        "layout": lambda c: str(c.deployment.layout),
        "num_gpus": lambda c: c.num_gpus,
        "max_num_seqs": lambda c: c.deployment.limits.max_num_seqs,
        "max_batched_tokens": lambda c: c.deployment.limits.max_batched_tokens,
        "moe_backend": lambda c: c.deployment.backend,
        "kv_format": lambda c: c.deployment.model.kv_format,
        "kv_tokens_per_rank": lambda c: c.deployment.memory.kv_tokens,
        "estimated_ttft_s": lambda c: f"{c.ttft_s:.6g}",
        "estimated_tpot_s": lambda c: f"{c.tpot_s:.6g}",
        "estimated_capacity_requests_per_s": lambda c: f"{c.capacity_per_s:.6g}",
        "simulated_worst_ratio": lambda c: _ratio(simulated.get(id(c.deployment))),
    }
    if answer.workload.shares:
        columns["estimated_prefix_hit_rate"] = lambda c: f"{c.hit_rate or 0.0:.4f}"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for _, search in answer.searches:
        writer.writerows([column(c) for column in columns.values()] for c in search.survivors)
    return text.getvalue()


def _ratio(run: Run | None) -> str:
    return "" if run is None else f"{run.worst_ratio:.4f}"


def _table(table: Any, more: Mapping[str, Any] = MappingProxyType({})) -> str:
    """A request or step table as CSV with `more` columns, times with microsecond resolution."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    named = table.columns() | dict(more)
    writer.writerow(named)
    formatted = [
        [f"{v:.6f}" for v in c.tolist()] if c.dtype.kind == "f" else c.tolist() for c in map(np.asarray, named.values())
    ]
    writer.writerows(zip(*formatted, strict=True))
    return text.getvalue()
