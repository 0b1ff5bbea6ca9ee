"""An answer as one file: HTML to hand over, Markdown to paste, JSON to compute with.

Facts are the dictionary of `plan --json`, `simulate --json` or `compare --json`; every key may be missing. The HTML
needs nothing from outside the file, prints on paper, and is the same byte for byte when the facts are.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from planner.errors import InputError
from planner.report.blocks import Page
from planner.report.comparison import comparison_page
from planner.report.markdown import markdown as as_markdown
from planner.report.plan import plan_page
from planner.report.sections import Facts

__all__ = ["html", "markdown", "page", "write"]


def write(facts: Facts, path: Path | str) -> Path:
    """Write the report to `path` in the format of its suffix (.html, .md or .json), whole or not at all.

    Raises InputError on another suffix or a folder that cannot be written.
    """
    path = Path(path)
    formats = {".html": html, ".md": markdown, ".json": _json}
    if path.suffix not in formats:
        raise InputError(f"report {str(path)!r}: unknown suffix {path.suffix!r}. Use {', '.join(formats)}.")
    try:
        _replace(path, formats[path.suffix](facts))
    except OSError as error:
        raise InputError(
            f"report {str(path)!r} cannot be written ({error.strerror}). Name a file in an existing, writable folder."
        ) from error
    return path


def html(facts: Facts) -> str:
    """One self-contained page: the answer first, then the evidence. All text from `facts` is escaped."""
    environment = Environment(
        loader=PackageLoader("planner.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    return environment.get_template("report.html.j2").render(page=page(facts)).lstrip() + "\n"


def markdown(facts: Facts) -> str:
    """The same content without figures, as GitHub-flavoured Markdown."""
    return as_markdown(page(facts))


def page(facts: Facts) -> Page:
    """The page of a plan, a simulation or a comparison, whichever `facts` are of."""
    return comparison_page(facts) if facts.get("kind") == "comparison" else plan_page(facts)


def _json(facts: Facts) -> str:
    return json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it, so that readers see the old file or the new one."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False) as part:
        temporary = Path(part.name)
        try:
            part.write(text)
            part.flush()
            # Temporary files are private; a report is for others to read.
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _umask() -> int:
    # The only way to read the mask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
