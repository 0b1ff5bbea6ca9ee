"""Which units a sweep has, as people write it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from planner.errors import InputError
from planner.tomlfile import checked, read

AUTO = "auto"
"""The layout that `moeplan plan` finds; any other is simulated as it is."""

_RESERVED = ("out", "json")


@dataclass(frozen=True, slots=True)
class Description:
    """The axes of a sweep, each a list of what one option of `plan` or `simulate` may be; units are their product.

    Loads are `rate` [requests/s] and `concurrency` [users] one after the other; without either a workload keeps its
    own. `options` are further options of the commands, the same for every unit.
    """

    model: tuple[str, ...]
    cluster: tuple[str, ...]
    workload: tuple[str, ...] = ("chat",)
    rate: tuple[float, ...] = ()
    concurrency: tuple[int, ...] = ()
    layout: tuple[str, ...] = (AUTO,)
    engine: tuple[str, ...] = ("vllm",)
    slo: tuple[str, ...] = ("ttft_p95=2s,tpot_p95=50ms",)
    seed: tuple[int, ...] = (0,)
    options: dict[str, str | int | float | bool | list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for axis in (f.name for f in fields(self) if f.name != "options"):
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                twice = next(value for value in values if values.count(value) > 1)
                raise ValueError(f"{axis} {twice} is given twice: give each once")
            if not values and axis not in ("rate", "concurrency"):
                raise ValueError(f"{axis}: the list is empty, give at least one")
        known = {f.name for f in fields(self)} | set(_RESERVED)
        wrong = next((name for name in self.options if name.replace("-", "_") in known), None)
        if wrong is not None:
            raise ValueError(f"options.{wrong}: is an axis of the sweep or its own; write it outside [options]")


def described(axes: dict[str, Any], where: str) -> Description:
    """A checked description; an axis may be one value. InputError with all faults, naming `where`."""
    lists = {name: value if name == "options" or isinstance(value, list) else [value] for name, value in axes.items()}
    return checked(Description, lists, where)


def read_description(path: Path) -> Description:
    """Description in a TOML file. InputError with every fault of it."""
    if path.suffix != ".toml":
        raise InputError(f"{path}: a sweep is described in a .toml file, or by --model, --cluster, ... instead")
    return described(read(path), str(path))
