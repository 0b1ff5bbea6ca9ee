"""The inputs of the page as data: labels, choices and help, so that the page only draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from planner.engine import engines
from planner.hardware import systems
from planner.model import catalog
from planner.placement import PLACEMENTS
from planner.residency import POLICIES
from planner.workload import PRESETS

Value = str | int | float
STYLE = Path(__file__).parent / "style.css"


@dataclass(frozen=True, slots=True)
class Field:
    """An input: `name` is the field of the scenario, `words` what is shown instead of some values."""

    name: str
    label: str
    kind: Literal["select", "slider", "number", "text"]
    help: str | None = None
    choices: Sequence[Value] = ()
    words: Mapping[Value, str] = field(default_factory=dict)
    step: float = 1
    least: float = 0
    takes_others: bool = False
    upload: str = ""
    """Field of the scenario with the upload that replaces this input."""

    @property
    def width(self) -> int:
        """Share of its row."""
        return 3 if self.kind in ("slider", "text") or self.name in ("system", "workload") else 2

    def options(self, present: Value) -> list[Value]:
        """Choices, and the present value where it is another: a link may hold anything."""
        return [*self.choices] if present in self.choices else [*self.choices, present]

    def settings(self, present: Value | None) -> dict[str, Any]:
        """What its widget takes; a number of a link below the least is shown, and complained about elsewhere."""
        if self.kind == "number":
            least = type(self.step)(self.least)
            least = least if present is None or isinstance(present, str) else min(least, present)
            return {"step": self.step, "format": "%g" if isinstance(self.step, float) else "%d", "min_value": least}
        if self.kind == "text":
            return {}
        others = {"accept_new_options": True} if self.takes_others else {}
        return {"options": self.options("" if present is None else present), "format_func": self.shown} | others

    def shown(self, value: Value) -> str:
        """A value as words."""
        return self.words.get(value, f"{value:g}" if isinstance(value, float) else str(value))


@lru_cache
def main_fields() -> tuple[tuple[Field, ...], ...]:
    """The six inputs of the first screen, in rows."""
    return (
        (Field("model", "Model", "select", choices=catalog(), upload="config"),),
        (
            Field("system", "System", "select", choices=systems()),
            Field("gpus", "GPUs", "number", "GPUs offered; beyond one node they come as whole nodes.",
                  least=1),
        ),
        (
            Field("workload", "Workload", "select", "A preset, or a shape you type, such as fixed:1024/256 tokens in "
                  "and out.", tuple(PRESETS), takes_others=True, upload="trace"),
            Field("rate", "Requests/s", "number", "Requests per second of all users, Poisson arrivals.", step=1.0),
        ),
        (Field("slo", "SLO", "text", "Objectives with units, such as ttft_p95=2s,tpot_p95=50ms. Metrics: ttft, tpot, "
               "e2e; mean, p50, p90, p95, p99."),),
    )  # fmt: skip


@lru_cache
def advanced_fields() -> tuple[tuple[Field, ...], ...]:
    """Inputs behind *Advanced*, in rows."""
    return (
        (Field("engine", "Engine", "select", choices=engines()),),
        (Field("users", "Users in a closed loop", "number", "Instead of the rate; 0: the rate counts."),),
        (
            Field("weights", "Weights", "select", None, ("", "bf16", "fp8", "nvfp4", "int4_g128"), {"": "stored"}),
            Field("kv", "KV cache", "select", None, ("", "bf16", "fp8"), {"": "auto"}),
        ),
        (Field("layout", "Layout", "text", "Such as tp=8,ep=8,replicas=2; empty: the planner chooses."),),
        (Field("speculative", "Drafts", "text", "mtp:1 drafts with the model's own MTP layer; empty for none."),),
        (
            Field(
                "oversubscription",
                "Network oversubscription",
                "number",
                "Leaf to spine; 1 is full bisection.",
                step=0.5,
                least=1.0,
            ),
        ),
    )


@lru_cache
def knob_fields() -> tuple[tuple[Field, ...], ...]:
    """Inputs about the experts, in rows."""
    skews = (
        "uniform",
        "lognormal:0.2",
        "",
        "lognormal:0.6",
        "lognormal:0.8",
        "lognormal:1.0",
        "single-domain",
        "zipf:1",
    )
    factors = (0.0, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
    return (
        (
            Field("skew", "Popularity of experts", "slider", "From even to skewed; laws of docs/experts.md.", skews,
                  {"": "as records suggest"}),
            Field("placement", "Placement", "select", "Which rank holds which expert.", tuple(PLACEMENTS)),
            Field("redundant", "Redundant experts", "number", "Copies of hot experts per layer, over all ranks."),
            Field("ep", "Expert parallelism", "number", "Ranks that share the experts; 0: any."),
        ),
        (
            Field("capacity_factor", "Capacity factor", "slider", "Tokens beyond it are dropped; serving engines drop "
                  "none.", factors, {0.0: "none: no token is dropped"}),
            Field("residency", "Experts outside HBM", "select", "What happens to experts that are not resident.",
                  ("", *POLICIES), {"": "none, all resident"}),
            Field("resident", "Resident per layer", "number", "Experts kept in HBM; 0: as many as fit."),
        ),
    )  # fmt: skip


KNOBS = ("skew", "placement", "redundant", "ep", "capacity_factor", "residency", "resident")
