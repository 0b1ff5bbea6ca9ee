"""What a report is made of: a page of sections, each with its finding, tables, figure and lists; not yet markup."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from planner import figures


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; columns in `text_columns` are words and stand left, numbers stand right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: frozenset[int] = frozenset({0})

    @property
    def has_header(self) -> bool:
        """Some column has a name."""
        return any(self.header)


@dataclass(frozen=True, slots=True)
class Section:
    """One piece of a report: the finding in a sentence, the numbers, and how to draw them.

    `items` are bullets, `shares` parts of a whole as (name, share, meaning), `code` commands to copy. `style` is a CSS
    class; sections of style `half` stand two in a row.
    """

    title: str
    finding: str
    tables: tuple[Table, ...] = ()
    draw: Callable[[], Figure] | None = None
    items: tuple[str, ...] = ()
    shares: tuple[tuple[str, float, str], ...] = ()
    code: tuple[str, ...] = ()
    style: str = ""

    def svg(self) -> str:
        """The figure as an `<svg>` element, empty without one; drawn only when asked, for it is slow."""
        return figures.svg(self.draw(), self.title, self.finding) if self.draw else ""


@dataclass(frozen=True, slots=True)
class Page:
    """A report: the answer, its summary on one printed page, the evidence behind it.

    `verdict` is a CSS class and what it says; `tiles` are (label, value, unit or note).
    """

    title: str
    verdict: tuple[str, str]
    headline: str
    tiles: tuple[tuple[str, str, str], ...]
    summary: tuple[Section, ...]
    evidence: tuple[Section, ...]
    command: str
    versions: str

    @property
    def rows(self) -> list[tuple[Section, ...]]:
        """Sections of the summary row by row: halves in pairs, the others alone."""
        rows: list[tuple[Section, ...]] = []
        for section in self.summary:
            is_half = "half" in section.style
            if is_half and rows and len(rows[-1]) == 1 and "half" in rows[-1][0].style:
                rows[-1] = (*rows[-1], section)
            else:
                rows.append((section,))
        return rows
