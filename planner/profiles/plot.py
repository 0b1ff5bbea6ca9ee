"""The picture of `profiles compare`: time ratio of every paired row over its time, one panel per operation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from planner.profiles.comparison import Pairs

_COLUMNS = 3
_MOST_POINTS = 300
"""Points per panel; more make the file large and the picture no clearer."""


def ratio_figure(path: Path, facts: dict[str, Any], pairs: list[Pairs]) -> None:
    """Draw `pairs` as SVG, the same bytes for the same input."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-len(pairs) // _COLUMNS)
    with matplotlib.rc_context({"svg.hashsalt": "moeplan", "font.size": 8}):
        figure = Figure(figsize=(3.4 * _COLUMNS, 2.6 * rows), layout="constrained")
        for panel, paired in enumerate(pairs):
            axes = figure.add_subplot(rows, _COLUMNS, panel + 1)
            step = max(1, len(paired.ratio) // _MOST_POINTS)
            for engine in np.unique(paired.rows.columns["engine"]):
                mine = np.flatnonzero(paired.rows.columns["engine"] == engine)[::step]
                axes.scatter(paired.rows.seconds[mine] * 1e6, paired.ratio[mine], s=3, label=str(engine), alpha=0.6)
            axes.axhline(1.0, color="0.4", linewidth=0.8)
            axes.set(xscale="log", yscale="log", title=paired.rows.op.name, xlabel="time [us]")
            axes.legend(loc="best", fontsize=6, markerscale=2)
        figure.suptitle(facts["ratio"])
        figure.savefig(path, format="svg", metadata={"Date": None})
