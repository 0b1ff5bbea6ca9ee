"""Which points of each axis are measured, and in which refinement class.

Class 0 is a coarse grid of the first shapes of every operation, usable as a profile by itself; each further class
adds shapes and halves the distance between points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from microbench.cases import CHOICES, OPS, TEXT, Case, Value
from microbench.models import Shape

Levels = tuple[tuple[int, ...], ...]

_TOKENS: Levels = ((8, 128, 2048), (1, 32, 512, 8192), (2, 4, 16, 64, 256, 1024, 4096, 16384))
_EXPERT_TOKENS: Levels = ((8, 128, 2048), (1, 32, 512, 8192), (2, 4, 16, 64, 256, 1024, 4096, 16384, 32768))
_EXCHANGE_TOKENS: Levels = ((16, 128, 4096), (1, 64, 512, 2048), (2, 4, 8, 32, 256, 1024, 8192))
_MESSAGES: Levels = (
    (8 << 10, 1 << 20, 128 << 20),
    (64 << 10, 16 << 20, 1 << 30),
    (1 << 10, 256 << 10, 4 << 20, 512 << 20, 4 << 30),
)
_COPIES: Levels = ((1 << 20, 64 << 20, 1 << 30), (64 << 10, 16 << 20, 256 << 20), (4 << 20, 4 << 30))

AXES: dict[str, dict[str, Levels]] = {
    "gemm": {"tokens": _TOKENS},
    "expert_gemm": {"assignments": _EXPERT_TOKENS},
    "expert_parts": {"tokens": _TOKENS},
    "prefill_attention": {"batch": ((1, 4), (16,), (64,)), "length": ((512, 4096), (1024, 16384), (2048, 8192, 65536))},
    "decode_attention": {
        "batch": ((1, 16, 128), (64, 256), (4, 32, 512)),
        "length": ((1024, 8192), (4096, 32768), (256, 2048, 16384, 131072)),
    },
    "norm": {"tokens": _TOKENS},
    "head": {"tokens": ((8, 128), (1, 32, 512), (2, 4, 16, 64, 256))},
    "host": {"tokens": ((8,), (128,), (1,))},
    "memory": {"bytes": _COPIES},
    "collective": {"bytes": _MESSAGES},
    "exchange": {"tokens": _EXCHANGE_TOKENS},
}
AXES["mla_prefill"], AXES["mla_decode"] = AXES["prefill_attention"], AXES["decode_attention"]

MAX_PREFILL_TOKENS = 131_072
"""Largest batch x length of a prefill case: engines prefill no more in one step."""
MAX_DECODE_TOKENS = 8_388_608
"""Largest batch x length of a decode case: 32 GiB of KV cache at 2 bytes x 8 heads x 128 for keys and values."""
_FIRST_SHAPES, _NEXT_SHAPES = 3, 10
"""Shapes of one format, kind or part that enter at class 0 and 1; later ones enter at class 2."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the run fills in: engine labels, the group sizes (num_gpus, num_nodes) and whether NVMe is given."""

    engine: str = "torch"
    collective_engine: str = ""
    groups: tuple[tuple[int, int], ...] = ()
    has_nvme: bool = False


def cases(shapes: Sequence[tuple[str, Shape]], setting: Setting) -> list[Case]:
    """Every case of `shapes`, in the order of the shapes; `Case.level` is its class."""
    position: dict[tuple[Value, ...], int] = {}
    found: dict[Case, None] = {}
    for op, shape in shapes:
        if op == "memory" and shape["kind"] == "nvme_read" and not setting.has_nvme:
            continue
        for keys, penalty in _filled(op, shape, setting):
            group = (op, *(keys[name] for name in OPS[op].keys if name in TEXT or name in ("num_gpus", "num_nodes")))
            place = position.setdefault(group, 0)
            position[group] += 1
            entry = penalty + (place >= _FIRST_SHAPES) + (place >= _NEXT_SHAPES)
            for axes, level in _points(op, keys):
                found.setdefault(Case.of(op, {**keys, **axes}, entry + level, int(shape.get("width", 0))))
    return list(found)


def _filled(op: str, shape: Shape, setting: Setting) -> Iterator[tuple[Shape, int]]:
    """Key columns with what a shapes file leaves out, and the classes by which a variant is put off."""
    keys = {name: value for name, value in shape.items() if name in OPS[op].keys}
    keys["engine"] = setting.engine
    distributions = CHOICES.get(op, {}).get("distribution", ("",))
    if "distribution" in keys:
        distributions = (str(keys["distribution"]),)
    for late, distribution in enumerate(distributions):
        if "distribution" in OPS[op].keys:
            keys["distribution"] = distribution
        if OPS[op].collective:
            yield from _communication(op, keys, setting, min(late, 1))
        else:
            yield dict(keys), min(late, 1)


def _communication(op: str, keys: Shape, setting: Setting, late: int) -> Iterator[tuple[Shape, int]]:
    """Variants over group sizes, families and steps; chained periods only where the chain is what a model runs."""
    label = setting.collective_engine + (" baseline" if op == "exchange" else "")
    steps = (str(keys["step"]),) if "step" in keys else CHOICES[op].get("step", ("",))
    for smaller, (num_gpus, num_nodes) in enumerate(setting.groups):
        for step, family in product(steps, CHOICES[op]["family"]):
            if family == "chained" and step in ("dispatch", "combine"):
                continue
            filled: Shape = {**keys, "engine": label, "num_gpus": num_gpus, "num_nodes": num_nodes, "family": family}
            if "step" in OPS[op].keys:
                filled["step"] = step
            if op == "exchange" and int(keys["num_experts"]) % num_gpus:
                continue
            yield filled, late + min(smaller, 1)


def _points(op: str, keys: Shape) -> Iterator[tuple[Shape, int]]:
    """Axis values of a shape and their class."""
    axes = AXES[op]
    graded = [[(value, level) for level, values in enumerate(levels) for value in values] for levels in axes.values()]
    for point in product(*graded):
        values: Shape = {name: value for name, (value, _) in zip(axes, point, strict=True)}
        if op == "expert_gemm":
            values["assignments"] = int(values["assignments"]) * _assignments_per_row(keys)
        if "batch" in values and not _sensible(op, int(values["batch"]) * int(values["length"])):
            continue
        yield values, max(level for _, level in point)


def _assignments_per_row(keys: Shape) -> int:
    """A rank that holds all experts gets top_k assignments per token; under expert parallelism one per row sent."""
    return int(keys["top_k"]) if keys["local_experts"] == keys["num_experts"] else 1


def _sensible(op: str, tokens: int) -> bool:
    return tokens <= (MAX_PREFILL_TOKENS if op.endswith("prefill") or op.startswith("prefill") else MAX_DECODE_TOKENS)
