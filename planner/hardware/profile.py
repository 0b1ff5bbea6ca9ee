"""The TOML of a system: its schema, its plausibility, and one message that lists every fault of a file."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner import tomlfile
from planner.errors import ProfileError
from planner.hardware.conversion import system_of
from planner.hardware.facts import System
from planner.hardware.plausibility import implausible

Text = Annotated[str, Field(strict=True, min_length=1, pattern=r"\S")]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Sourced(_Table):
    """A number and where it comes from."""

    value: Positive
    source: Text
    """Document, part of it, and date."""


class Whole(Sourced):
    """A count and where it comes from."""

    value: Annotated[int, Field(strict=True, ge=0)]


class Rates(_Table):
    """FLOP/s by number format, dense: never with 2:4 sparsity."""

    bf16: Sourced | None = None
    fp8: Sourced | None = None
    fp4: Sourced | None = None
    int8: Sourced | None = None
    fp32: Sourced | None = None


class GpuTable(_Table):
    """One accelerator."""

    name: Text
    vendor: Text
    arch: Text
    """Compute architecture as compilers spell it: sm90, gfx942, tpu-v5e."""
    num_sms: Whole | None = None
    """Streaming multiprocessors or compute units."""
    hbm_bytes: Sourced
    """Memory the runtime reports in total [bytes]."""
    hbm_bytes_per_s: Sourced
    """Memory bandwidth [bytes/s]."""
    hbm_efficiency: Sourced | None = None
    """Measured share of the bandwidth that streaming weights reaches in decode."""
    flop_per_s: Rates = Rates()
    """Dense peak [FLOP/s]."""
    matmul_flop_per_s: Rates = Rates()
    """Largest rate a matmul reached in measurement [FLOP/s]."""
    tdp_w: Sourced | None = None
    """Board power limit [W]."""


class NodeTable(_Table):
    """The server around the GPUs."""

    gpus: Whole
    """GPUs of one node."""
    power_w: Sourced | None = None
    """Largest power drawn by one node [W]."""
    host_dram_bytes: Sourced | None = None
    """Host memory of one node [bytes]."""
    host_dram_bytes_per_s: Sourced | None = None
    """Nominal host memory bandwidth of one node, all sockets [bytes/s]."""
    cpu_sockets: Whole | None = None
    """CPU sockets of one node; each reads its own part of the host memory fast."""
    cpu_flop_per_s: Sourced | None = None
    """What all cores of one node reach in large matmuls [FLOP/s]."""
    nvme_bytes_per_s: Sourced | None = None
    """Read rate of all local NVMe drives of one node [bytes/s]."""


class LinkTable(_Table):
    """A link of one GPU."""

    name: Text
    bytes_per_s: Sourced
    """Per GPU, in one direction, nominal unless the source says measured [bytes/s]."""
    latency_s: Sourced | None = None
    """Fixed part of one transfer [s]."""
    size: Whole | None = None
    """GPUs that share it; 0 = no bound. Only for scale_up; the others need none."""


class PriceTable(_Table):
    """A dated price."""

    basis: Literal["rental", "purchase"]
    usd: Positive
    """Per GPU-hour on demand (rental) or per GPU (purchase) [$]."""
    as_of: Annotated[str, Field(strict=True, pattern=r"^20\d\d(-(0[1-9]|1[0-2])(-[0-3]\d)?)?$")]
    """Year, year-month or day."""
    provider: Text
    source: Text


class Profile(_Table):
    """One system of hardware_profiles/."""

    name: Annotated[str, Field(pattern=r"^[\w.+-]{1,100}$")] | None = None
    """How users call it; the file's name when absent. Folders are named after it."""
    title: Text
    gpu: GpuTable
    node: NodeTable
    scale_up: LinkTable | None = None
    """GPU to GPU inside a domain; PCIe is used when absent."""
    scale_out: LinkTable | None = None
    """Network card of one GPU."""
    pcie: LinkTable | None = None
    """GPU to host."""
    price: tuple[PriceTable, ...] = ()
    notes: tuple[Text, ...] = ()


def json_schema() -> dict[str, Any]:
    """JSON schema of a profile."""
    return Profile.model_json_schema()


def read_profile(path: Path) -> System:
    """Read, check and convert one profile. Raises ProfileError listing all faults of the file."""
    raw = tomlfile.read(path, ProfileError)
    faults: list[str] = []
    try:
        Profile.model_validate(raw)
    except ValidationError as error:
        faults += [_sentence(fault) for fault in error.errors()[: tomlfile.MOST_FAULTS]]
    faults += implausible(raw)
    if faults:
        raise ProfileError("\n".join(f"{path.name}: {fault}" for fault in faults))
    return system_of(raw, path.stem)


def _sentence(fault: Any) -> str:
    """One pydantic fault as `dotted.key: message`, with the remedy a person needs."""
    keys = [str(part) for part in fault["loc"]]
    dotted = ".".join(keys)
    if fault["type"] == "extra_forbidden":
        known = _fields_at(keys[:-1])
        close = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else "known: " + ", ".join(known)
        return f"{dotted}: unknown key ({hint})"
    if fault["type"] in ("model_type", "dataclass_type", "model_attributes_type"):
        return f'{dotted}: {fault["input"]!r} has no source. Write {{ value = ..., source = "document, date" }}'
    if fault["type"] == "missing" and keys[-1] == "source":
        return f"{dotted}: missing. Say which document the number comes from, with its date"
    if fault["type"] == "missing":
        return f"{dotted}: missing"
    return f"{dotted}: {fault['msg']}, got {fault['input']!r}"


def _fields_at(keys: list[str]) -> list[str]:
    """Names a table of the profile may have, following `keys` from the root; array indices are skipped."""
    table: type[BaseModel] = Profile
    for key in keys:
        if not key.isdigit() and key in table.model_fields:
            table = next(_tables(table.model_fields[key].annotation), table)
    return list(table.model_fields)


def _tables(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for part in get_args(annotation):
        yield from _tables(part)
