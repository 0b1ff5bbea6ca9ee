"""Why no layout of a question runs: memory, or a wish about experts that no layout can keep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.enumeration import backends, layouts
from planner.layout import Layout, layout_problem
from planner.whatif.question import Question


def reason(question: Question, misfits: tuple[tuple[float, str], ...]) -> str:
    """What keeps every layout of `question` from running, with the nearest values that work where one knob does it."""
    if misfits and np.isfinite(misfits[0][0]):
        return f"memory is short by {misfits[0][0] - 1:.0%}"
    return misfits[0][1].rstrip(".") if misfits else _no_layout(question)


def _no_layout(question: Question) -> str:
    scenario = question.scenario
    every = list(layouts(question.model, question.cluster, question.engine))
    degrees = sorted({each.ep for each in every})
    gpus = question.cluster.num_gpus
    if scenario.ep and scenario.ep not in degrees:
        copies = scenario.redundant
        near = _nearest(
            scenario.ep, sorted({each.ep for each in every if not copies or _takes(question, each, copies)})
        )
        return f"no replica on {gpus} GPUs spreads its experts over EP {scenario.ep}: EP {near} can"
    spread = [layout for layout in every if layout.ep > 1 and layout.ep == (scenario.ep or layout.ep)]
    if scenario.redundant and not any(_takes(question, layout, scenario.redundant) for layout in spread):
        return _copies(question, spread)
    if scenario.backend and not any(scenario.backend in backends(question.engine, each) for each in every):
        return f"{question.engine.name} has no layout on {gpus} GPUs with backend {scenario.backend}"
    return "no layout obeys all of these choices together"


def _copies(question: Question, spread: list[Layout]) -> str:
    """Which numbers of redundant experts divide, where the asked one does not."""
    wanted, moe = question.scenario.redundant, question.model.moe
    assert moe is not None
    if not spread:
        return f"{wanted} redundant experts need whole experts on several GPUs, and no layout here spreads them"
    counts = [n for n in range(2 * wanted + max(each.ep for each in spread) + 1) if _some(question, spread, n)]
    degrees = " or ".join(str(n) for n in sorted({layout.ep for layout in spread}))
    return (
        f"{moe.num_experts} + {wanted} experts do not divide over EP {degrees}: "
        f"{_nearest(wanted, counts)} redundant experts do"
    )


def _some(question: Question, spread: list[Layout], redundant: int) -> bool:
    return any(_takes(question, layout, redundant) for layout in spread)


def _takes(question: Question, layout: Layout, redundant: int) -> bool:
    return layout_problem(question.model, replace(layout, redundant_experts=redundant)) is None


def _nearest(wanted: int, known: list[int]) -> str:
    """The closest of `known` below and above.

    >>> _nearest(6, [1, 2, 4, 8, 16])
    '4 or 8'
    """
    below, above = [n for n in known if n < wanted], [n for n in known if n > wanted]
    return " or ".join(str(n) for n in [*below[-1:], *above[:1]]) or "none"
