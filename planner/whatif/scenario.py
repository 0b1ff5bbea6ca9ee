"""Every input of the dashboard as one frozen value, and how it travels: in a link, and as a command."""

from __future__ import annotations

import base64
import binascii
import re
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

from planner.hardware import system

_MAX_CONFIG_CHARS = 6_000
"""Longest packed config.json a link carries; browsers and proxies cut addresses at about 8,000 characters."""
_MAX_UNPACKED = 1_000_000
_MOST = 1e9
_UPLOADS = ("config", "trace")
_UPLOADED = ("config", "config_name", "trace", "trace_name")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_MAX_NAME_CHARS = 100
LEFT_OUT = "left_out"
"""Parameter of an address that names the uploads it does not carry."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is asked. The defaults are the first screen; an empty text or 0 leaves a choice to the planner.

    `gpus` are whole nodes or a part of one; `users` in a closed loop replace `rate` [requests/s]. `layout` as on the
    command line; `rivals` are further clusters to compare with, separated by commas. `config` and `trace` are the texts
    of uploaded files. `resident` are experts per layer in HBM.
    """

    model: str = "deepseek-ai/DeepSeek-V3"
    system: str = "h200-sxm"
    gpus: int = 16
    workload: str = "chat"
    rate: float = 4.0
    slo: str = "ttft_p95=2s,tpot_p95=50ms"
    users: int = 0
    engine: str = "vllm"
    weights: str = ""
    kv: str = ""
    layout: str = ""
    backend: str = ""
    seqs: int = 0
    tokens: int = 0
    speculative: str = ""
    oversubscription: float = 1.0
    ep: int = 0
    skew: str = ""
    placement: str = "contiguous"
    redundant: int = 0
    capacity_factor: float = 0.0
    residency: str = ""
    resident: int = 0
    rivals: str = ""
    seed: int = 0
    config: str = ""
    config_name: str = ""
    trace: str = ""
    trace_name: str = ""

    @property
    def cluster(self) -> str:
        """The cluster as on the command line, `h200-sxm:2x8`."""
        return cluster_text(self.system, self.gpus)

    def query(self) -> dict[str, str]:
        """What differs from the defaults, for an address, and which uploads it leaves out."""
        found = {
            field.name: str(value)
            for field in fields(self)
            if field.name not in _UPLOADED and (value := getattr(self, field.name)) != field.default
        }
        left_out = self.left_out
        if self.config and "config" not in left_out:
            found |= {"config": _pack(self.config), "config_name": self.config_name}
        return found | ({LEFT_OUT: ",".join(left_out)} if left_out else {})

    @property
    def left_out(self) -> tuple[str, ...]:
        """Uploads that do not fit into an address: any trace, and a huge config."""
        huge = ("config",) if self.config and len(_pack(self.config)) > _MAX_CONFIG_CHARS else ()
        return (*huge, "trace") if self.trace else huge

    @property
    def uploads(self) -> dict[str, str]:
        """Texts of the uploaded files by name."""
        pairs = ((self.config_name, self.config), (self.trace_name, self.trace))
        return {name: text for name, text in pairs if text}

    @property
    def model_name(self) -> str:
        """The model as on the command line: its name, or the uploaded file."""
        return self.config_name if self.config else self.model

    @property
    def workload_name(self) -> str:
        """The workload as on the command line: its text, or the uploaded file."""
        return self.trace_name if self.trace else self.workload

    def command(self, *, layout: str = "", backend: str = "", limits: tuple[int, int] | None = None) -> str:
        """The command that answers the same: `simulate` of a `layout`, else `plan`.

        `limits` are sequences and tokens per step and rank.
        """
        words = ["moeplan", "simulate" if layout else "plan", self.model_name, "--cluster", self.cluster]
        words += ["--layout", layout] if layout else []
        words += self._demand()
        if layout and limits:
            words += ["--max-num-seqs", str(limits[0]), "--max-batched-tokens", str(limits[1])]
        words += ["--backend", backend] if backend == "deepep" else []
        words += [*self._options(), *self._expert_options()]
        return shlex.join(words)

    def compare_command(self, systems: Sequence[str]) -> str:
        """The command that compares `systems` for this demand."""
        offered = [word for name in systems for word in ("--cluster", name)]
        words = ["moeplan", "compare", self.model_name, *offered, *self._demand(), *self._options()]
        return shlex.join([*words, *self._expert_options(), "--jobs", "1"])

    def _demand(self) -> list[str]:
        words = ["--workload", self.workload_name]
        if self.users:
            words += ["--concurrency", str(self.users)]
        elif not self.trace:
            words += ["--rate", f"{self.rate:g}"]
        return [*words, "--slo", self.slo]

    def _options(self) -> list[str]:
        given = {
            "--engine": self.engine if self.engine != "vllm" else "",
            "--weights": self.weights,
            "--kv": self.kv,
            "--speculative": self.speculative,
            "--oversubscription": f"{self.oversubscription:g}" if self.oversubscription != 1.0 else "",
            "--seed": str(self.seed) if self.seed else "",
        }
        return [word for option, value in given.items() if value for word in (option, value)]

    def _expert_options(self) -> list[str]:
        given = {
            "--skew": self.skew,
            "--placement": self.placement if self.placement != "contiguous" else "",
            "--capacity-factor": f"{self.capacity_factor:g}" if self.capacity_factor else "",
            "--residency": self.residency,
            "--resident": str(self.resident) if self.residency and self.resident else "",
        }
        return [word for option, value in given.items() if value for word in (option, value)]

    def without_knobs(self) -> Scenario:
        """The same question without a wish about experts."""
        return replace(
            self, skew="", placement="contiguous", redundant=0, capacity_factor=0.0, residency="", resident=0
        )


def from_query(parameters: Mapping[str, str]) -> tuple[Scenario, list[str]]:
    """The scenario of an address, and what could not be read of it; such values keep their default."""
    values: dict[str, object] = {}
    problems = []
    for field in fields(Scenario):
        text = parameters.get(field.name)
        if text is None or (field.name in _UPLOADED and field.name != "config"):
            continue
        try:
            values[field.name] = _unpack(text) if field.name == "config" else _read(type(field.default), text)
        except (ValueError, binascii.Error, zlib.error):
            shown = text if len(text) <= 40 else text[:40] + "..."
            problems.append(f"The link says {field.name}={shown!r}, which cannot be read: {field.default!r} is taken.")
    if values.get("config"):
        values["config_name"] = safe_name(parameters.get("config_name", "config.json"))
    problems += [_MISSING[name] for name in missed(parameters).get(LEFT_OUT, "").split(",") if name]
    return Scenario(**values), problems  # type: ignore[arg-type]


def missed(parameters: Mapping[str, str]) -> dict[str, str]:
    """The parameter of an address that names uploads which it does not carry, as long as they are not given."""
    names = [name for name in parameters.get(LEFT_OUT, "").split(",") if name in _UPLOADS]
    return {LEFT_OUT: ",".join(names)} if names else {}


_MISSING = {
    "config": "The uploaded model is not in the link, it is too large: upload its config.json again. Until then "
    "the answer is for the model named below.",
    "trace": "The uploaded trace is not in the link: upload it again. Until then the answer is for the workload named "
    "below.",
}


def safe_name(name: str) -> str:
    """Name of an uploaded file without anything a shell or a path could mean.

    >>> safe_name("../my model;.json")
    'my_model_.json'
    """
    return _UNSAFE.sub("_", Path(name).name)[-_MAX_NAME_CHARS:].lstrip(".-") or "upload"


def _read(kind: type, text: str) -> object:
    """`text` as text or as a number that an input can show."""
    value = kind(text)
    if isinstance(value, (int, float)) and not abs(value) <= _MOST:
        raise ValueError("no number of this page")
    return value


def cluster_text(name: str, gpus: int) -> str:
    """`gpus` GPUs of system `name` as a cluster: a part of a node, or as many nodes as come closest from above."""
    per_node = system(name).gpus_per_node
    return f"{name}:1x{gpus}" if gpus <= per_node else f"{name}:{-(-gpus // per_node)}x{per_node}"


@lru_cache(maxsize=8)
def _pack(text: str) -> str:
    return base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode()


def _unpack(text: str) -> str:
    inflate = zlib.decompressobj()
    data = inflate.decompress(base64.b64decode(text.encode(), altchars=b"-_", validate=True), _MAX_UNPACKED)
    if inflate.unconsumed_tail:
        raise ValueError("too large")
    return data.decode()
