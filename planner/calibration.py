"""What measured servers take beyond the tables: a few factors and host times per engine and GPU generation.

A step of a calibrated engine is the sum of its operations, each class times its factor, plus small kernels that no
table times (`layer_s` per layer) and host time (`step_s`, `sequence_s` per running sequence, however many tokens it
drafts). Steps with prompts are launched kernel by kernel: their layers take `prompts` times that plus `prompt_layer_s`
each, but not host, lm_head, sampling, the attention of sequences that generate, and fetches of offloaded experts. A
request waits for its front end before it reaches a queue (handbook serving 1.2, 2.9).

`calibrations.toml` was fitted by `moeplan calibrate` to public serving results; it says to which and how well. Users
make their own with the same command.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib import resources
from json import dumps
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Le

from planner import tomlfile
from planner.errors import InputError
from planner.textfile import read_text

Factor = Annotated[float, Gt(0), Le(10)]
Seconds = Annotated[float, Ge(0), Le(10)]

ANY = "any"
GENERATIONS = {"sm90": "hopper", "sm100": "blackwell", "sm103": "blackwell"}
"""Generation of an architecture; others are ANY."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Factors on classes of operations and on steps with prompts, and times [s]; the defaults change nothing.

    `gemm` is for projections, dense and shared expert layers, router and lm_head, `attention` for attention and
    recurrence, `exchange` for collectives, dispatch and combine. Where the front end has no worker processes of its own
    (`Engine.frontend_workers`) a request waits `unassisted_frontend_s` more.
    """

    experts: Factor = 1.0
    gemm: Factor = 1.0
    attention: Factor = 1.0
    exchange: Factor = 1.0
    prompts: Factor = 1.0
    layer_s: Seconds = 0.0
    prompt_layer_s: Seconds = 0.0
    step_s: Seconds = 0.0
    sequence_s: Seconds = 0.0
    frontend_s: Seconds = 0.0
    frontend_s_per_token: Seconds = 0.0
    unassisted_frontend_s: Seconds = 0.0

    def factor(self, label: str) -> float:
        """Factor of the operation `label` of a step; 1 for what is not calibrated."""
        name = CLASS_OF.get(label)
        return 1.0 if name is None else float(getattr(self, name))

    def slower(self, factor: float) -> Calibration:
        """Every class of operations `factor` times as long; host times and launches as they are."""
        classes = {name: factor * getattr(self, name) for name in set(CLASS_OF.values())}
        return replace(self, **classes)


CLASS_OF = {
    **dict.fromkeys(("attention_projections", "dense_ffn", "shared_experts", "router", "lm_head"), "gemm"),
    **dict.fromkeys(("attention", "attention_module", "recurrence"), "attention"),
    **dict.fromkeys(("all_reduce", "dispatch", "combine"), "exchange"),
    "experts": "experts",
}
"""Class of each operation of `planner.cost`."""
PARAMETERS = tuple(field.name for field in fields(Calibration))
NEUTRAL = Calibration()


@dataclass(frozen=True, slots=True)
class Entry:
    """A calibration and the runs behind it: points, and combinations of model, GPU and engine."""

    engine: str
    generation: str
    values: Calibration
    num_points: Annotated[int, Ge(0)] = 0
    num_combinations: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True, slots=True)
class Errors:
    """|predicted / measured - 1| [%] of a metric, median and mean: without calibration, with it, of left-out runs.

    `models` is `moe` or `dense`.
    """

    metric: str
    models: str
    num_points: int
    uncalibrated: tuple[float, float]
    calibrated: tuple[float, float]
    left_out: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Calibrations:
    """Entries by engine and generation, with their source, the day and the command of the fit, and its residuals.

    `data_sheets` is what the operations of a GPU without any measured kernel take over their rooflines.
    """

    source: str
    as_of: str
    command: str
    entry: tuple[Entry, ...] = ()
    errors: tuple[Errors, ...] = ()
    data_sheets: Factor = 1.0

    def error(self, metric: str, models: str) -> Errors | None:
        """Errors of `metric` over `moe` or `dense` models, None where the fit had none."""
        return next((e for e in self.errors if (e.metric, e.models) == (metric, models)), None)

    def of(self, engine: str, arch: str, is_measured: bool = True) -> Calibration:
        """Calibration of the kernels of `engine` on `arch`: of its generation, else of any; neutral for others.

        `is_measured` says that kernels of this GPU were measured; else `data_sheets` comes on top, which was fitted to
        the same engines.
        """
        generation = GENERATIONS.get(arch, ANY)
        by_generation = {entry.generation: entry.values for entry in self.entry if entry.engine == engine}
        found = by_generation.get(generation) or by_generation.get(ANY)
        if found is None:
            return NEUTRAL
        return found if is_measured or self.data_sheets == 1.0 else found.slower(self.data_sheets)


OFF = Calibrations("none: tables as measured", "", "")


@lru_cache(maxsize=1)
def shipped() -> Calibrations:
    """The calibrations of this version."""
    text = resources.files("planner").joinpath("calibrations.toml").read_text("utf-8")
    return tomlfile.bundled(Calibrations, tomlfile.parse(text, "calibrations.toml"))


def calibrations(text: str | None, option: str = "--calibration") -> Calibrations:
    """The shipped ones for None, none for `off`, else those of a file of `moeplan calibrate --out`.

    InputError, which names `option`, when the file cannot be read or has a fault.
    """
    if text is None:
        return shipped()
    if text == "off":
        return OFF
    if not text.endswith(".toml"):
        raise InputError(f"{option} {text}: off, or a .toml of `moeplan calibrate --out`")
    return _read(read_text(Path(text), most_bytes=tomlfile.MOST_BYTES), text)


def _read(text: str, where: str) -> Calibrations:
    found = tomlfile.checked(Calibrations, tomlfile.parse(text, where), where)
    keys = [(entry.engine, entry.generation) for entry in found.entry]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise InputError(f"{where}: two entries for {' on '.join(twice)}. Keep one.")
    return found


def to_toml(found: Calibrations) -> str:
    """Text of `found`; `calibrations` reads it back."""
    lines = [
        "# Factors and host times of measured servers; planner/calibration.py says what they mean.",
        *(f"{name} = {dumps(getattr(found, name), ensure_ascii=False)}" for name in ("source", "as_of", "command")),
        *([f"data_sheets = {found.data_sheets:.4g}"] if found.data_sheets != 1.0 else []),
    ]
    for errors in found.errors:
        pairs = {name: getattr(errors, name) for name in ("uncalibrated", "calibrated", "left_out")}
        lines += ["", "[[errors]]", f'metric = "{errors.metric}"', f'models = "{errors.models}"']
        lines += [f"num_points = {errors.num_points}"]
        lines += [f"{name} = [{pair[0]:.1f}, {pair[1]:.1f}]" for name, pair in pairs.items() if pair is not None]
    for entry in found.entry:
        lines += ["", "[[entry]]", f'engine = "{entry.engine}"', f'generation = "{entry.generation}"']
        lines += [f"num_points = {entry.num_points}", f"num_combinations = {entry.num_combinations}", "[entry.values]"]
        lines += [f"{name} = {getattr(entry.values, name):.6g}" for name in PARAMETERS]
    return "\n".join(lines) + "\n"
