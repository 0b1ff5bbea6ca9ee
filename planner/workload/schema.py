"""The workload TOML, as people write it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from planner import tomlfile
from planner.errors import WorkloadError, nearest
from planner.workload.arrivals import Arrivals
from planner.workload.demand import Workload
from planner.workload.lengths import Lengths
from planner.workload.sharing import SharedPrefix, Turns
from planner.workload.trace import read_lengths


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class FixedLengths(_Table):
    """`kind = "fixed"`: every request has the same length."""

    kind: Literal["fixed"]
    tokens: int
    """Length [tokens]."""

    def build(self, folder: Path) -> Lengths:
        """The distribution; `folder` is where the TOML lies."""
        return Lengths.fixed(self.tokens)


class UniformLengths(_Table):
    """`kind = "uniform"`: every integer of a range is equally likely."""

    kind: Literal["uniform"]
    minimum: int
    """Smallest length [tokens]."""
    maximum: int
    """Largest length [tokens]."""

    def build(self, folder: Path) -> Lengths:
        """The distribution; `folder` is where the TOML lies."""
        return Lengths.uniform(self.minimum, self.maximum)


class LognormalLengths(_Table):
    """`kind = "lognormal"`: long right tail, as recorded traffic has."""

    kind: Literal["lognormal"]
    mean: float
    """Mean before clipping [tokens]."""
    sigma: float
    """Standard deviation of the logarithm."""
    minimum: int = 1
    """Shorter draws become this [tokens]."""
    maximum: int | None = None
    """Longer draws become this [tokens]; the 99.9th percentile when absent."""

    def build(self, folder: Path) -> Lengths:
        """The distribution; `folder` is where the TOML lies."""
        return Lengths.lognormal(self.mean, self.sigma, minimum=self.minimum, maximum=self.maximum)


class EmpiricalLengths(_Table):
    """`kind = "empirical"`: drawn from a column of a CSV."""

    kind: Literal["empirical"]
    csv: str
    """Path of the CSV, relative to the TOML."""
    column: str
    """Column with token counts."""

    def build(self, folder: Path) -> Lengths:
        """The distribution; `folder` is where the TOML lies."""
        return Lengths.empirical(read_lengths(folder / self.csv, self.column))


class PoissonArrivals(_Table):
    """`kind = "poisson"`: independent users."""

    kind: Literal["poisson"]
    rate_per_s: float
    """Requests per second."""

    def build(self) -> Arrivals:
        """The arrival process."""
        return Arrivals.poisson(self.rate_per_s)


class GammaArrivals(_Table):
    """`kind = "gamma"`: burstier or smoother than Poisson."""

    kind: Literal["gamma"]
    rate_per_s: float
    """Requests per second."""
    cv: float
    """Coefficient of variation of the gaps; 1 is Poisson."""

    def build(self) -> Arrivals:
        """The arrival process."""
        return Arrivals.gamma(self.rate_per_s, self.cv)


class ClosedArrivals(_Table):
    """`kind = "closed"`: a fixed number of users who wait for their answers."""

    kind: Literal["closed"]
    concurrency: int
    """Users."""

    def build(self) -> Arrivals:
        """The arrival process."""
        return Arrivals.closed(self.concurrency)


AnyLengths = Annotated[FixedLengths | UniformLengths | LognormalLengths | EmpiricalLengths, Field(discriminator="kind")]
AnyArrivals = Annotated[PoissonArrivals | GammaArrivals | ClosedArrivals, Field(discriminator="kind")]


class PrefixTable(_Table):
    """`[prefix]`: what comes in front of `[prompt]` and is the same for all requests of a group."""

    groups: int
    """Number of different prefixes."""
    tokens: AnyLengths
    """Length of a prefix [tokens], drawn once per group."""
    zipf: float = 0.0
    """Exponent of the popularity of groups; 0 makes all alike."""


class TurnsTable(_Table):
    """`[turns]`: conversations, whose turns send the whole history in front of `[prompt]`."""

    count: AnyLengths
    """Turns of a conversation."""
    think_s: float
    """Mean time from an answer to the next turn [s]."""
    think_cv: float = 1.0
    """Coefficient of variation of the think time; 0 is fixed, 1 exponential."""
    max_context_tokens: int | None = None
    """A conversation ends before a turn whose prompt and answer exceed this [tokens]."""


class WorkloadFile(_Table):
    """A workload TOML: tables `[prompt]`, `[output]`, `[arrivals]` unless given on the command line, `[prefix]` and
    `[turns]` where requests share prefixes or are turns of conversations."""

    name: str | None = None
    """Shown in reports; the file name when absent."""
    num_requests: int = 2000
    """Requests one simulation sends."""
    prompt: AnyLengths
    """Lengths of the prompts: what is new in each, after a shared prefix and the history."""
    output: AnyLengths
    """Lengths of the answers."""
    arrivals: AnyArrivals = PoissonArrivals(kind="poisson", rate_per_s=1.0)
    """When requests come."""
    prefix: PrefixTable | None = None
    """Prefixes shared by groups of requests."""
    turns: TurnsTable | None = None
    """Conversations of several turns."""


def read_workload_toml(path: Path) -> Workload:
    """Workload described by a TOML file; raises WorkloadError that lists every fault of the file."""
    tables = tomlfile.read(path, WorkloadError)
    try:
        file = WorkloadFile.model_validate(tables)
    except ValidationError as error:
        raise WorkloadError(f"{path}:\n  " + "\n  ".join(_faults(error))) from error
    try:
        prompt, output = file.prompt.build(path.parent), file.output.build(path.parent)
        sharing = _prefix(file.prefix, path.parent), _turns(file.turns, path.parent)
        return Workload(file.name or path.stem, prompt, output, file.arrivals.build(), file.num_requests, *sharing)
    except WorkloadError as error:
        raise WorkloadError(f"{path}: {error}") from error


def _prefix(table: PrefixTable | None, folder: Path) -> SharedPrefix | None:
    return None if table is None else SharedPrefix(table.groups, table.tokens.build(folder), table.zipf)


def _turns(table: TurnsTable | None, folder: Path) -> Turns | None:
    if table is None:
        return None
    return Turns(table.count.build(folder), table.think_s, table.think_cv, table.max_context_tokens)


def _faults(error: ValidationError) -> list[str]:
    lines = []
    for fault in error.errors(include_url=False)[: tomlfile.MOST_FAULTS]:
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key ({nearest(str(fault['loc'][-1]), _keys())})")
        else:
            shown = "" if isinstance(fault["input"], dict) else f" (is {fault['input']!r})"
            lines.append(f"{where}: {fault['msg']}{shown}")
    return lines


def _keys() -> set[str]:
    tables: list[type[_Table]] = [WorkloadFile, *_Table.__subclasses__()]
    return {key for table in tables for key in table.model_fields}
