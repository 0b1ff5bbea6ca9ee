"""From what a user types to a `Workload`."""

from __future__ import annotations

import math
from pathlib import Path

from planner.errors import WorkloadError, nearest
from planner.workload.arrivals import Arrivals
from planner.workload.demand import Workload
from planner.workload.lengths import Lengths
from planner.workload.presets import DEFAULT_RATE_PER_S, PRESETS

DEFAULT_NUM_REQUESTS = 2000
"""Requests of one simulation when nothing else is said."""

CLOSED_LOOP_ROUNDS = 12
"""Requests per user of a closed loop by default: two rounds of ramp-up and ten measured, as InferenceX does."""

CONVERSATIONS_PER_RUN = 5
"""How many conversations, one after the other, the default number of requests lasts."""

_SHAPES = ("fixed:1024/256", "uniform:819-1024/819-1024", "lognormal:1024~0.6/256~0.8")


def load_workload(
    text: str, *, rate: float | None = None, concurrency: int | None = None, num_requests: int | None = None
) -> Workload:
    """Workload named, shaped or filed under `text`, with the options laid over it.

    Parameters
    ----------
    text
        A preset (`chat`), a shape (`fixed:1024/256`, `uniform:819-1024/819-1024`, `lognormal:1024~0.6/256~0.8` with
        mean~sigma), the path of a workload TOML, or the path of a trace CSV.
    rate
        Requests per second, Poisson; a trace is stretched to it.
    concurrency
        Users of a closed loop, instead of a rate.
    num_requests
        Requests of one run; by default what the file says, 2,000, or 12 per user of a closed loop; more where 2,000
        would end before conversations do.

    Raises
    ------
    WorkloadError
        Unknown name, malformed shape or file, value out of range, or both `rate` and `concurrency`.
    """
    if rate is not None and concurrency is not None:
        raise WorkloadError(f"rate {rate:g} and concurrency {concurrency} exclude each other. Keep one of them.")
    workload = _read(text.strip())
    if rate is not None:
        workload = workload.with_rate(rate)
    if concurrency is not None:
        workload = workload.with_concurrency(concurrency)
    closed = workload.arrivals.kind == "closed"
    if num_requests is None and closed and (concurrency is not None or text.strip() in PRESETS):
        rounds = CLOSED_LOOP_ROUNDS * math.ceil(workload.mean_turns)
        num_requests = max(DEFAULT_NUM_REQUESTS, rounds * workload.arrivals.concurrency)
    if num_requests is None and workload.turns is not None and not closed and text.strip() in PRESETS:
        talking = workload.arrivals.rate_per_s * workload.conversation_think_s
        num_requests = max(DEFAULT_NUM_REQUESTS, math.ceil(CONVERSATIONS_PER_RUN * talking))
    return workload if num_requests is None else workload.with_num_requests(num_requests)


def _read(text: str) -> Workload:
    if text in PRESETS:
        preset = PRESETS[text]
        sharing = preset.prefix, preset.turns
        return Workload(text, preset.prompt, preset.output, preset.arrivals, DEFAULT_NUM_REQUESTS, *sharing)
    suffix = Path(text).suffix.lower()
    if suffix == ".toml":
        from planner.workload.schema import read_workload_toml

        return read_workload_toml(Path(text))
    if suffix == ".csv":
        from planner.workload.trace import read_trace

        return read_trace(Path(text))
    kind, colon, shape = text.partition(":")
    if not colon:
        raise WorkloadError(
            f"unknown workload {text!r}: {nearest(text, PRESETS)} A shape ({_SHAPES[0]}), a .toml or a .csv works too."
        )
    return _shaped(text, kind, shape)


def _shaped(text: str, kind: str, shape: str) -> Workload:
    readers = {"fixed": _fixed, "uniform": _uniform, "lognormal": _lognormal}
    if kind not in readers:
        raise WorkloadError(f"workload {text!r}: unknown kind {kind!r} ({nearest(kind, readers)})")
    sides = shape.split("/")
    if len(sides) != 2:
        raise WorkloadError(f"workload {text!r}: expected prompt/output. Write for example {', '.join(_SHAPES)}.")
    try:
        prompt, output = (readers[kind](side) for side in sides)
    except ValueError as error:
        examples = ", ".join(_SHAPES)
        raise WorkloadError(f"workload {text!r}: numbers expected in {shape!r}. Write like {examples}.") from error
    except WorkloadError as error:
        raise WorkloadError(f"workload {text!r}: {error}") from error
    return Workload(text, prompt, output, Arrivals.poisson(DEFAULT_RATE_PER_S), DEFAULT_NUM_REQUESTS)


def _fixed(side: str) -> Lengths:
    return Lengths.fixed(int(side))


def _uniform(side: str) -> Lengths:
    low, high = side.split("-")
    return Lengths.uniform(int(low), int(high))


def _lognormal(side: str) -> Lengths:
    mean, sigma = side.split("~")
    return Lengths.lognormal(float(mean), float(sigma))
