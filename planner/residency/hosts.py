"""The host beside the GPUs: memory bandwidth and cores that serve the experts HBM does not hold."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources

from planner.errors import InputError, nearest
from planner.hardware import System
from planner.units import format_bytes

DRAM_EFFICIENCY = 0.53
"""Share of nominal memory bandwidth at which CPUs stream expert weights.

From the difference of eight and six experts of DeepSeek-V3 Q4_K_M in KTransformers V0.2, which leaves the fixed part
out (doc/en/DeepseekR1_V3_tutorial.md): 2 x 58 experts of 24.8 MB take 17.5 ms of 307 GB/s on one socket and 8.9 ms
of 614 GB/s on two, 0.53 both times. The handbook's 0.23 divides all of the step time, GPU and hand-over included.
"""

HANDOVER_S = {"ktransformers": 0.5e-3, "llama.cpp": 0.15e-3}
"""Seconds per layer in which neither side works: the GPU waits for the CPU to wake and the CPU for the activations.

KTransformers V0.2: the other 45 ms of the same runs, less the GPU's part, over 58 layers; V0.5 seems to need less
than half (issue 1914). llama.cpp: between two runs on an RTX 2080 that ask for more (AlexsJones/llmfit pull requests
755 and 775, 2026-07) and one on an i9-14900K that asks for none; it misses them by 12, 21 and -22 %.
"""


@dataclass(frozen=True, slots=True)
class Host:
    """Nominal memory rate and largest memory, and what all cores together reach in large matmuls.

    All `num_sockets` are counted. A CPU reads the other socket's memory slowly, so the full rate needs a copy of the
    experts on each socket, as KTransformers keeps them.
    """

    name: str
    title: str
    dram_bytes_per_s: float
    dram_max_bytes: float
    matmul_flop_per_s: float
    num_sockets: int = 1
    sources: tuple[tuple[str, str], ...] = ()

    @property
    def expert_bytes_per_s(self) -> float:
        """Rate at which the CPU streams expert weights [bytes/s]."""
        return DRAM_EFFICIENCY * self.dram_bytes_per_s


@lru_cache
def hosts() -> tuple[Host, ...]:
    """The bundled hosts, smallest memory first."""
    text = resources.files("planner.residency").joinpath("hosts.toml").read_text("utf-8")
    found = []
    for name, table in tomllib.loads(text).items():
        number = {key: entry["value"] for key, entry in table.items() if key not in ("title", "sockets")}
        sources = tuple((key, entry["source"]) for key, entry in table.items() if key not in ("title", "sockets"))
        found.append(
            Host(
                name=name,
                title=table["title"],
                dram_bytes_per_s=number["dram_bytes_per_s"],
                dram_max_bytes=number["dram_max_bytes"],
                matmul_flop_per_s=number["matmul_flop_per_s"],
                num_sockets=table["sockets"],
                sources=sources,
            )
        )
    return tuple(sorted(found, key=lambda host: host.dram_max_bytes))


def host(name: str) -> Host:
    """The bundled host called `name`; InputError lists the known ones."""
    by_name = {known.name: known for known in hosts()}
    if name not in by_name:
        raise InputError(f"host {name!r} is unknown: {nearest(name, by_name)}")
    return by_name[name]


def host_for(system: System, dram_bytes: float) -> Host:
    """The smallest bundled host that takes `dram_bytes`, with the profile's own rates where they are known.

    Raises InputError when no bundled host takes that much and the profile does not know its host either.
    """
    own, flop = system.host_dram_bytes_per_s, system.cpu_flop_per_s
    able = [known for known in hosts() if known.dram_max_bytes >= dram_bytes]
    if own is None and not able:
        most = hosts()[-1]
        raise InputError(
            f"no host with {format_bytes(dram_bytes)} of memory is on record: {most.name} takes "
            f"{format_bytes(most.dram_max_bytes)}. Give a profile with node.host_dram_bytes_per_s."
        )
    found = able[0] if able else hosts()[-1]
    if own is None:
        return found
    keys = ("host_dram_bytes_per_s", "cpu_flop_per_s")
    known = tuple((key, source) for key in keys if (source := system.source(f"node.{key}")))
    return replace(
        found,
        name=system.name,
        title=f"host of {system.title}",
        dram_bytes_per_s=own,
        dram_max_bytes=max(dram_bytes, system.host_dram_bytes or 0.0),
        matmul_flop_per_s=flop or found.matmul_flop_per_s,
        sources=known,
    )
