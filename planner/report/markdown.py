"""A page as GitHub-flavoured Markdown: the same words and numbers, without the figures."""

from __future__ import annotations

import html as markup

from planner.report.blocks import Page, Section, Table


def markdown(page: Page) -> str:
    """`page` as Markdown; text from outside is escaped."""
    lines = [f"# {_plain(page.title)}", "", f"**{_plain(page.headline)}**", ""]
    if page.tiles:
        lines += _rows(Table(("", "Value", "Unit or note"), page.tiles, frozenset({0, 2})))
    for section in (*page.summary, *page.evidence):
        lines += _section(section)
    if page.command:
        lines += ["## Reproduce", "", *_code(page.command)]
    if page.versions:
        lines += [_plain(page.versions), ""]
    return "\n".join(lines)


def _section(section: Section) -> list[str]:
    lines = [f"## {_plain(section.title)}", ""]
    if section.shares:
        cells = tuple((name, f"{share:.0%}", meaning) for name, share, meaning in section.shares)
        lines += _rows(Table(("Predicted time", "Share", "Meaning"), cells, frozenset({0, 2})))
    lines += [_plain(section.finding), ""] if section.finding else []
    for table in section.tables:
        lines += _rows(table)
    lines += [*(f"- {_plain(item)}" for item in section.items), ""] if section.items else []
    for command in section.code:
        lines += _code(command)
    return lines


def _code(text: str) -> list[str]:
    return [*(f"    {line}" for line in text.splitlines()), ""]


def _rows(table: Table) -> list[str]:
    rule = [":--" if column in table.text_columns else "--:" for column in range(len(table.header))]
    rows = [table.header, tuple(rule), *table.rows]
    return [*("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows), ""]


def _plain(text: str) -> str:
    return " ".join(markup.escape(str(text), quote=False).replace("|", "\\|").split())
