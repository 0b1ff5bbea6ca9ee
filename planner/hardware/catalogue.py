"""Find profiles, list them, and read cluster strings such as `h200-sxm:2x8`.

Directories named in MOEPLAN_PROFILES are searched before the bundled `hardware_profiles`.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from planner import tomlfile
from planner.errors import ProfileError, nearest
from planner.hardware.conversion import system_of
from planner.hardware.facts import Cluster, System
from planner.textfile import is_file, read_json

PROFILES_VARIABLE = "MOEPLAN_PROFILES"
_BUNDLED = Path(str(resources.files("hardware_profiles")))
_COUNT = re.compile(r"(?:(?P<nodes>[0-9]{1,6})x)?(?P<gpus>[0-9]{1,6})")


def _directories() -> tuple[Path, ...]:
    """User directories first, then the bundled one. Raises ProfileError for a user directory that is not there."""
    listed = [Path(part) for part in os.environ.get(PROFILES_VARIABLE, "").split(os.pathsep) if part]
    for directory in listed:
        if not directory.is_dir():
            raise ProfileError(f"{PROFILES_VARIABLE}: {directory} is not a directory. Create it or unset the variable.")
    return (*listed, _BUNDLED)


def _files() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for directory in _directories():
        for path in sorted(directory.glob("*.toml")):
            found.setdefault(path.stem, path)
    return found


def systems() -> tuple[str, ...]:
    """Names of all profiles, bundled and the user's own, sorted."""
    return tuple(sorted(_files()))


def profile_path(name_or_path: str) -> Path:
    """File of a profile given by name or by path. Raises ProfileError with near names when there is none."""
    if name_or_path.endswith(".toml") or "/" in name_or_path or os.sep in name_or_path:
        path = Path(name_or_path)
        if not is_file(path):
            raise ProfileError(f"{name_or_path}: no such file. Give an existing .toml or a known name.")
        return path
    files = _files()
    wanted = name_or_path.strip().lower()
    if wanted not in files:
        raise ProfileError(f"system {name_or_path!r} is unknown: {nearest(wanted, files)}")
    return files[wanted]


def system(name_or_path: str) -> System:
    """The system of a bundled or user profile (`h200-sxm`) or of a TOML file (`./my.toml`).

    Raises ProfileError for an unknown name, and with every fault of the file when it is malformed or implausible.
    """
    path = profile_path(name_or_path)
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _read(path: Path, _modified_ns: int) -> System:
    if path.parent == _BUNDLED:  # the tests have checked these, and pydantic takes a while to load
        with suppress(KeyError, TypeError):  # somebody has changed them
            return system_of(tomlfile.read(path), path.stem)
    from planner.hardware.profile import read_profile

    return read_profile(path)


def schema() -> dict[str, Any]:
    """JSON schema of a profile TOML, for editors."""
    from planner.hardware.profile import json_schema

    return json_schema()


def parse_cluster(text: str) -> Cluster:
    """Cluster from `<system>:<nodes>x<gpus>`, `<system>:<gpus>` (one node) or `<system>` (one full node).

    A node may be used in part. `gb200-nvl72:72` is read as 18 nodes of 4, because all 72 share one NVLink domain.
    Raises ProfileError for nonsense, for more GPUs than a node has, and for nodes without a network between them.

    >>> parse_cluster("h200-sxm:2x8").num_gpus, parse_cluster("gb200-nvl72:72").name
    (16, 'gb200-nvl72:18x4')
    """
    name, colon, count = text.strip().rpartition(":") if ":" in text else (text.strip(), "", "")
    if not name:
        raise ProfileError(f"cluster {text!r} names no system. Write it like h200-sxm:2x8.")
    match = _COUNT.fullmatch(count) if colon else None
    if colon and not match:
        raise ProfileError(
            f"cluster {text!r}: {count!r} is not a size. Write <system>:<nodes>x<gpus>, for example h200-sxm:2x8."
        )
    found = system(name)
    nodes, gpus = (int(match["nodes"] or 1), int(match["gpus"])) if match else (1, found.gpus_per_node)
    if nodes < 1 or gpus < 1:
        raise ProfileError(f"cluster {text!r} has no GPUs. Use at least 1x1.")
    if match and match["nodes"] is None and gpus > found.gpus_per_node:
        nodes, gpus = _whole_nodes(text, found, gpus)
    return _checked(text, Cluster(found, nodes, gpus))


def _whole_nodes(text: str, found: System, gpus: int) -> tuple[int, int]:
    """Split one scale-up domain of `gpus` GPUs into its nodes, or explain why that cannot be done."""
    per_node = found.gpus_per_node
    nodes = -(-gpus // per_node)
    if gpus > found.scale_up.size or gpus % per_node:
        raise _too_many(text, found, gpus, nodes)
    return nodes, per_node


def _too_many(text: str, found: System, gpus: int, nodes: int) -> ProfileError:
    per_node, remedy = found.gpus_per_node, f"Write {found.name}:{nodes}x{found.gpus_per_node}."
    return ProfileError(f"cluster {text!r}: a node of {found.name} has {per_node} GPUs, not {gpus}. {remedy}")


def _checked(text: str, cluster: Cluster) -> Cluster:
    found = cluster.system
    if cluster.gpus_per_node > found.gpus_per_node:
        raise _too_many(text, found, cluster.gpus_per_node, -(-cluster.num_gpus // found.gpus_per_node))
    if cluster.num_gpus > cluster.scale_up_gpus and found.scale_out is None:
        raise ProfileError(
            f"cluster {text!r} needs a network between nodes, and {found.name} has none on record. "
            f"Use at most {found.scale_up.size} GPUs, or a copy of the profile with a [scale_out] table."
        )
    return cluster


def measured_engines(name: str) -> tuple[str, ...]:
    """Engines whose kernels were measured on system `name`, from `measured/<name>/meta.json`; empty when none."""
    for directory in _directories():
        for path in (directory / "measured" / name / "meta.json", directory / name / "meta.json"):
            if is_file(path):
                return _engines(path)
    return ()


def _engines(path: Path) -> tuple[str, ...]:
    try:
        engines = read_json(path, ProfileError)["engines"]
    except (KeyError, TypeError) as error:
        remedy = "Write it again with `moeplan profiles import`."
        raise ProfileError(f"{path}: no list of engines ({error!r}). {remedy}") from error
    return tuple(sorted(str(engine) for engine in engines))
