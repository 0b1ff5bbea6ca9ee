"""From the tables of a profile TOML, which has been checked, to a `System`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from planner.hardware.facts import Gpu, Link, Price, System
from planner.tomlfile import Tables

STREAMING_DEFAULTS = {"NVIDIA": 0.80, "AMD": 0.65}
"""Share of memory bandwidth reached in decode where nothing is measured (kernels.md section 10)."""
OTHER_STREAMING_DEFAULT = 0.65
RATES = ("bf16", "fp8", "fp4", "int8", "fp32")
"""Number formats that a profile states rates for."""


def system_of(raw: Tables, stem: str) -> System:
    """The system of the tables `raw`; it is called `stem`, the name of the file, unless they say otherwise."""
    sources = dict(_sources(raw, ""))
    gpu = _gpu(raw["gpu"], sources)
    node, gpus = raw["node"], int(raw["node"]["gpus"]["value"])
    pcie = _link(raw.get("pcie"), 1)
    scale_up = _link(raw.get("scale_up"), gpus)
    if scale_up is None:
        scale_up = _stand_in(gpu, pcie, gpus, sources)
    return System(
        name=raw.get("name") or stem,
        title=raw["title"],
        gpu=gpu,
        gpus_per_node=gpus,
        scale_up=scale_up,
        scale_out=_link(raw.get("scale_out"), 0),
        pcie=pcie,
        host_dram_bytes=_value(node, "host_dram_bytes"),
        nvme_bytes_per_s=_value(node, "nvme_bytes_per_s"),
        node_power_w=_value(node, "power_w"),
        prices=tuple(_price(price) for price in raw.get("price", ())),
        sources=tuple(sorted(sources.items())),
        notes=tuple(raw.get("notes", ())),
        host_dram_bytes_per_s=_value(node, "host_dram_bytes_per_s"),
        cpu_flop_per_s=_value(node, "cpu_flop_per_s"),
        cpu_sockets=_count(node, "cpu_sockets"),
    )


def _gpu(table: Tables, sources: dict[str, str]) -> Gpu:
    efficiency = _value(table, "hbm_efficiency")
    if efficiency is None:
        efficiency = STREAMING_DEFAULTS.get(table["vendor"], OTHER_STREAMING_DEFAULT)
        borrowed = (
            "" if table["vendor"] in STREAMING_DEFAULTS else f"; nothing known for {table['vendor']}, AMD's is used"
        )
        sources["gpu.hbm_efficiency"] = f"default, not measured: kernels.md section 10{borrowed}"
    return Gpu(
        name=table["name"],
        vendor=table["vendor"],
        arch=table["arch"],
        num_sms=_count(table, "num_sms"),
        hbm_bytes=float(table["hbm_bytes"]["value"]),
        hbm_bytes_per_s=float(table["hbm_bytes_per_s"]["value"]),
        flop_per_s=_rates(table.get("flop_per_s", {})),
        matmul_flop_per_s=_rates(table.get("matmul_flop_per_s", {})),
        hbm_efficiency=efficiency,
        tdp_w=_value(table, "tdp_w"),
    )


def _rates(table: Tables) -> tuple[tuple[str, float], ...]:
    return tuple((name, float(table[name]["value"])) for name in RATES if name in table)


def _price(table: Tables) -> Price:
    return Price(table["basis"], float(table["usd"]), table["as_of"], table["provider"], table["source"])


def _stand_in(gpu: Gpu, pcie: Link | None, gpus: int, sources: dict[str, str]) -> Link:
    """Scale-up link of a box without one: peers talk over PCIe; a single GPU only talks to its own memory."""
    if gpus > 1 and pcie is not None:
        sources["scale_up.bytes_per_s"] = f"peers go over {pcie.name}: " + sources.get("pcie.bytes_per_s", "")
        return Link(pcie.name, pcie.bytes_per_s, pcie.latency_s, gpus)
    sources["scale_up.bytes_per_s"] = "single GPU: its own memory"
    return Link("single GPU", gpu.hbm_bytes_per_s, None, 1)


def _link(table: Tables | None, size: int) -> Link | None:
    if table is None:
        return None
    asked = _count(table, "size")
    bytes_per_s = float(table["bytes_per_s"]["value"])
    return Link(table["name"], bytes_per_s, _value(table, "latency_s"), size if asked is None else asked)


def _value(table: Tables, key: str) -> float | None:
    return float(table[key]["value"]) if key in table else None


def _count(table: Tables, key: str) -> int | None:
    return int(table[key]["value"]) if key in table else None


def _sources(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, entry in table.items():
        if isinstance(entry, dict) and "source" in entry:
            yield prefix + key, entry["source"]
        elif isinstance(entry, dict):
            yield from _sources(entry, f"{prefix}{key}.")
