"""The `report` command: the report of a run folder made again from its facts."""

from __future__ import annotations

from pathlib import Path

from planner.cli.terminal import show


def report(folder: Path, *, pdf: bool = False, json: bool = False) -> None:
    """Make report.html and report.md of a run folder again from its JSON, and a PDF when asked.

    Parameters
    ----------
    folder
        What `--out` of plan, simulate or compare wrote.
    pdf
        Print report.pdf too, with WeasyPrint or a Chromium on the PATH.
    json
        Print the paths as JSON.
    """
    from planner.report.pdf import print_pdf
    from planner.runfolder import rewrite_report

    written = rewrite_report(folder)
    if pdf:
        written.append(print_pdf(folder / "report.html", folder / "report.pdf"))
    facts = {"folder": str(folder), "files": [path.name for path in written]}
    show(facts, json, lambda said: "\n".join(f"{said['folder']}/{name}" for name in said["files"]))
