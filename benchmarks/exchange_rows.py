"""Published dispatch and combine times between nodes against the laws, each row also predicted from the others."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from planner.hardware import system
from planner.measurements.exchange import LAWS, Exchange, Law, exchange
from planner.measurements.roofline import Ceilings

ROWS = Path(__file__).parent.parent / "tests" / "data" / "published_exchange.csv"
_SYSTEMS = {"H800": "h800-sxm", "H100": "h100-sxm", "B200": "b200-sxm", "MI300X": "mi300x", "MI355X": "mi355x"}
_NIC_BYTES_PER_S = 50e9
"""Every row of the file was taken on one 400 Gbit/s NIC per GPU."""
_SHARES = np.arange(0.20, 1.21, 0.02)
_FLOORS = np.arange(0.0, 201e-6, 5e-6)


@dataclass(frozen=True, slots=True)
class Row:
    """One published time."""

    id: str
    library: str
    gpu: str
    what: Exchange
    tokens: float
    seconds: float
    used: str
    source: str

    @property
    def law(self) -> tuple[str, str, str]:
        """Key of the law that answers."""
        return self.library, self.what.mode, self.what.step

    def predicted(self, law: Law) -> float:
        """Seconds by `law`."""
        ceilings = replace(Ceilings.of(system(_SYSTEMS[self.gpu])), scale_out_bytes_per_s=_NIC_BYTES_PER_S)
        return float(exchange(ceilings, self.what, law)(np.array(self.tokens)))

    def error(self, law: Law) -> float:
        """Predicted / measured - 1."""
        return self.predicted(law) / self.seconds - 1.0


def published() -> list[Row]:
    """Rows of tests/data/published_exchange.csv."""
    with ROWS.open(encoding="utf-8", newline="") as file:
        return [_row(line) for line in csv.DictReader(file)]


def _row(line: dict[str, str]) -> Row:
    numbers = (int(line[name]) for name in ("num_gpus", "nodes", "hidden", "top_k", "num_experts"))
    what = Exchange(line["step"], line["mode"], *numbers, line["fmt"], int(line["node_limit"]))
    seconds = float(line["microseconds"]) * 1e-6
    return Row(
        line["id"], line["library"], line["gpu"], what, float(line["tokens"]), seconds, line["used"], line["source"]
    )


def fitted(rows: Sequence[Row], start: Law) -> Law:
    """Law with the floor and NIC share that fit `rows` best in squares of ln(predicted / measured)."""
    measured = np.array([row.seconds for row in rows])
    best = (np.inf, start)
    for share in _SHARES:
        law = replace(start, floor_s=0.0, nic_share=float(share))
        moving = np.array([row.predicted(law) for row in rows])
        wrong = (np.log((moving[None, :] + _FLOORS[:, None]) / measured) ** 2).sum(axis=1)
        if wrong.min() < best[0]:
            best = (float(wrong.min()), replace(law, floor_s=float(_FLOORS[wrong.argmin()])))
    return best[1]


def errors() -> list[tuple[Row, float, float]]:
    """(row, error of the law in use, error of the law fitted to the other rows) of every row that is used."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in published():
        if row.used == "yes":
            groups[row.law].append(row)
    out = []
    for key, rows in groups.items():
        for row in rows:
            others = [other for other in rows if other is not row]
            out.append((row, row.error(LAWS[key]), row.error(fitted(others, LAWS[key]))))
    return out
