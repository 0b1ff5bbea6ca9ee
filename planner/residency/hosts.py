"""The host beside the GPUs: memory bandwidth and cores that serve the experts HBM does not hold."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from planner.errors import InputError, nearest
from planner.hardware import System
from planner.units import format_bytes

KTRANSFORMERS_SHARE = 0.53
"""Share of nominal memory bandwidth at which the kernels of KTransformers stream expert weights.

From the difference of eight and six experts of DeepSeek-V3 Q4_K_M in KTransformers V0.2, which leaves the fixed part
out (doc/en/DeepseekR1_V3_tutorial.md): 2 x 58 experts of 24.8 MB take 17.5 ms of 307 GB/s on one socket and 8.9 ms
of 614 GB/s on two, 0.53 both times. The handbook's 0.23 divides all of the step time, GPU and hand-over included.
"""

LLAMA_SHARE = 0.44
"""The same of llama.cpp on hosts without a run of their own: geometric mean of four machines that do not agree.

0.34 on an i9-10900X (both RTX 2080 runs of AlexsJones/llmfit pull requests 755 and 775), 0.62 on an i9-14900K, 0.59
on an EPYC 9374F (ggml-org/llama.cpp pull request 23346: 10.91 tok/s of DeepSeek-V3.2 Q8_0, experts in memory) and 0.30
on two Xeons without a GPU. The two RTX 2080 runs together leave 0.02 ms per layer for a hand-over: none is charged.
"""

HANDOVER_S = 0.5e-3
"""Seconds per layer in which neither side works: the GPU waits for the CPU to wake and the CPU for the activations.

KTransformers V0.2: the other 45 ms of the same runs, less the GPU's part, over 58 layers. V0.5 seems to need less than
half (issue 1914, one run): its decode rates are underestimated. Nothing better is known for other engines.
"""

_DESKTOP, _SERVER = "desktop-ddr5", "xeon-ddr5-1s"
"""Hosts of systems whose profile names none: the server from the memory on that a desktop cannot take."""


@dataclass(frozen=True, slots=True)
class Host:
    """Nominal memory rate and largest memory, and what all cores together reach in large matmuls.

    All `num_sockets` are counted. A CPU reads the other socket's memory slowly, so the full rate needs a copy of the
    experts on each socket, as KTransformers keeps them. `llama_share` of the memory rate is what llama.cpp reaches.
    """

    name: str
    title: str
    dram_bytes_per_s: float
    dram_max_bytes: float
    matmul_flop_per_s: float
    num_sockets: int = 1
    sources: tuple[tuple[str, str], ...] = ()
    llama_share: float = LLAMA_SHARE


@lru_cache
def hosts() -> tuple[Host, ...]:
    """The bundled hosts, smallest memory first."""
    text = resources.files("planner.residency").joinpath("hosts.toml").read_text("utf-8")
    found = []
    for name, table in tomllib.loads(text).items():
        number = {key: entry["value"] for key, entry in table.items() if key not in ("title", "sockets")}
        sources = tuple((key, entry["source"]) for key, entry in table.items() if key not in ("title", "sockets"))
        found.append(Host(name=name, title=table["title"], num_sockets=table["sockets"], sources=sources, **number))
    return tuple(sorted(found, key=lambda host: host.dram_max_bytes))


def host(name: str) -> Host:
    """The bundled host called `name`; InputError lists the known ones."""
    by_name = {known.name: known for known in hosts()}
    if name not in by_name:
        raise InputError(f"host {name!r} is unknown: {nearest(name, by_name)}")
    return by_name[name]


def host_for(system: System, dram_bytes: float) -> Host:
    """The host of the profile where its memory rate is known, else a desktop or, with more memory, a server.

    More memory never brings another number of sockets or a slower host. Raises InputError beyond the largest memory
    on record, unless the profile knows its host.
    """
    if system.host_dram_bytes_per_s is not None:
        return _own(system, system.host_dram_bytes_per_s)
    most = hosts()[-1]
    if dram_bytes > most.dram_max_bytes:
        raise InputError(
            f"no host with {format_bytes(dram_bytes)} of memory is on record: {most.name} takes "
            f"{format_bytes(most.dram_max_bytes)}. Give a profile with node.host_dram_bytes_per_s."
        )
    desktop = host(_DESKTOP)
    return desktop if dram_bytes <= desktop.dram_max_bytes else host(_SERVER)


def _own(system: System, dram_bytes_per_s: float) -> Host:
    """The host in the profile of `system`; cores nobody timed are taken as those of the bundled server."""
    sockets = system.cpu_sockets or 1
    keys = ("host_dram_bytes_per_s", "cpu_flop_per_s", "cpu_sockets")
    return Host(
        name=system.name,
        title=f"host of {system.title}",
        dram_bytes_per_s=dram_bytes_per_s,
        dram_max_bytes=system.host_dram_bytes or float("inf"),
        matmul_flop_per_s=system.cpu_flop_per_s or sockets * host(_SERVER).matmul_flop_per_s,
        num_sockets=sockets,
        sources=tuple((key, source) for key in keys if (source := system.source(f"node.{key}"))),
    )
