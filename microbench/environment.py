"""meta.json: what was measured, with which software, in which state. The host is told by a hash, not by its name."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from microbench import __version__
from microbench.device import Device
from microbench.errors import InputError
from microbench.ranks import Ranks, host_hash

_SAME = ("device", "torch", "cuda_or_rocm", "driver")
"""What must not change between the runs of one folder."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
_PATIENCE_S = 20
_METHOD = {
    "cuda": "median of CUDA event times; L2 flushed before every repeat by writing twice its size; "
    "5 to 200 repeats until the 95 % interval of the median is within 2 %; spread is half that interval over the "
    "median; (graph) in library: replayed from a CUDA graph",
    "cpu": "median of wall times; caches not flushed; not representative of any GPU",
}


def describe(device: Device, ranks: Ranks) -> dict[str, Any]:
    """Facts of a run for meta.json."""
    return {
        "schema_version": 1,
        "device": device.name,
        "driver": _driver(),
        "cuda_or_rocm": _platform(device),
        "nccl": _nccl(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": sys.version.split()[0],
        "host": host_hash(),
        "topology": topology(),
        "source": f"moeplan microbench {__version__}",
        "licence": "not stated: measured by the owner of the machine",
        "engines": sorted({"torch", *([ranks.engine, f"{ranks.engine} baseline"] if ranks.engine else [])}),
        "world_size": ranks.size,
        "num_nodes": len(set(ranks.nodes)),
        "is_representative": device.is_cuda,
        "method": _METHOD["cuda" if device.is_cuda else "cpu"],
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("NCCL_")},
    }


class Meta:
    """meta.json of an output folder, over all its runs."""

    def __init__(self, directory: Path, device: Device, ranks: Ranks) -> None:
        """Start a run. Raises InputError when the folder was measured on another device or software."""
        self._path = directory / "meta.json"
        old = _read(self._path)
        self._facts = describe(device, ranks)
        changed = [name for name in _SAME if name in old and old[name] != self._facts[name]]
        if changed:
            told = ", ".join(f"{name} was {old[name]!r}, is {self._facts[name]!r}" for name in changed)
            raise InputError(f"--out {directory}: holds results of another machine ({told}). Use a new folder.")
        self._facts["engines"] = sorted({*self._facts["engines"], *old.get("engines", [])})
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self._run: dict[str, Any] = {"date": now, "command": shlex.join(["python", "-m", "microbench", *sys.argv[1:]])}
        self._run |= {"world_size": ranks.size, "clocks": {"before": clocks(), "after": None}}
        self._earlier = old.get("runs", [])

    def write(self) -> None:
        """Put the state on disk at once; clocks `after` are those of now."""
        self._run["clocks"]["after"] = clocks()
        latest = {"date": self._run["date"], "command": self._run["command"], "clocks": self._run["clocks"]}
        text = json.dumps({**self._facts, **latest, "runs": [*self._earlier, self._run]}, indent=1) + "\n"
        part = self._path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error}). Delete it or use a new --out.") from error
    return found if isinstance(found, dict) else {}


def _output(*command: str) -> str:
    """What a system tool prints; empty when it is absent, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def clocks() -> list[dict[str, str]]:
    """Clocks [MHz], power [W] and temperature [C] of every GPU, as nvidia-smi or rocm-smi tells them."""
    rows = _output("nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits")
    if rows:
        return [dict(zip(_CLOCKS, row.split(", "), strict=False)) for row in rows.splitlines()]
    rocm = _output("rocm-smi", "--showclocks", "--showpower", "--showtemp", "--json")
    try:
        return [{"card": card, **values} for card, values in json.loads(rocm).items()] if rocm else []
    except (ValueError, AttributeError, TypeError):
        return []


def topology() -> str:
    """How the GPUs are linked, as nvidia-smi or rocm-smi draws it; empty without them."""
    return _COLOURS.sub("", _output("nvidia-smi", "topo", "-m") or _output("rocm-smi", "--showtopo"))


def _driver() -> str:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    path = Path("/sys/module/amdgpu/version")
    return found.splitlines()[0] if found else path.read_text(encoding="ascii").strip() if path.exists() else ""


def _platform(device: Device) -> str:
    if not device.is_cuda:
        return ""
    return f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"


def _nccl(device: Device) -> str:
    if not device.is_cuda:
        return ""
    return ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]


def _version(package: str) -> str:
    try:
        return metadata.distribution(package).version
    except metadata.PackageNotFoundError:
        return ""
