"""An answer as one file: HTML to hand over, Markdown to paste, JSON to compute with.

Facts are the dictionary of `plan --json`; every key may be missing. The HTML needs nothing from outside the
file, prints on paper, and is the same byte for byte when the facts are.
"""

from __future__ import annotations

import html as markup
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from planner.errors import InputError
from planner.report.sections import Facts, Section, Table, candidates, evidence
from planner.report.wording import duration, money, number, title

__all__ = ["html", "markdown", "write"]

_ORIGINS = {
    "measured": "read from a measured point",
    "interpolated": "between measured points",
    "extrapolated": "beyond measured points",
    "roofline": "data-sheet rates, not measured",
}


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
    template = environment.get_template("report.html.j2")
    return template.render(**_answer(facts), sections=evidence(facts)).lstrip() + "\n"


def markdown(facts: Facts) -> str:
    """The same content without figures, as GitHub-flavoured Markdown."""
    answer = _answer(facts)
    lines = [f"# {_plain(answer['title'])}", "", f"**{_plain(answer['headline'])}**", ""]
    if answer["tiles"]:
        lines += _rows(Table(("", "Value", "Unit or note"), tuple(answer["tiles"]), frozenset({0, 2})))
    for heading, items in (
        ("Why", answer["reasons"]),
        ("What to try next", answer["next"]),
        ("Warnings", answer["warnings"]),
    ):
        if items:
            lines += [f"## {heading}", "", *(f"- {_plain(item)}" for item in items), ""]
    if answer["question"]:
        lines += ["## The question", "", *_rows(Table(("", ""), tuple(answer["question"]), frozenset({0, 1})))]
    if answer["candidates"]:
        lines += ["## Best layouts", "", *_rows(answer["candidates"])]
    if answer["origins"]:
        shares = tuple((name, f"{share:.0%}", meaning) for name, share, meaning in answer["origins"])
        lines += ["## How sure", "", *_rows(Table(("Predicted time", "Share", "Meaning"), shares, frozenset({0, 2})))]
        lines += [answer["past_error"], ""] if answer["past_error"] else []
    for section in evidence(facts):
        lines += _section(section)
    if answer["command"]:
        lines += ["## Reproduce", "", f"    {answer['command']}", ""]
    if answer["versions"]:
        lines += [_plain(answer["versions"]), ""]
    return "\n".join(lines)


def _answer(facts: Facts) -> dict[str, Any]:
    """What the first page says, as text."""
    layout = facts.get("layout") or {}
    model = (facts.get("model") or {}).get("name") or (facts.get("question") or {}).get("model") or "model"
    cluster = facts.get("cluster")
    shares = facts.get("origin_share") or {}
    return {
        "title": f"{model} on {cluster}" if cluster else str(model),
        "verdict": _verdict(facts),
        "headline": str(facts.get("headline") or _verdict(facts)[1]),
        "tiles": _tiles(facts, layout) if layout else [],
        "reasons": [str(facts["binding_constraint"])] if facts.get("binding_constraint") else [],
        "next": [str(item) for item in facts.get("next") or ()],
        "past_error": " ".join(
            str(text) for text in ((facts.get("certainty") or {}).get("sentence"), facts.get("past_error")) if text
        ),
        "warnings": [str(item) for item in facts.get("warnings") or ()],
        "question": [(title(str(k)), str(v)) for k, v in (facts.get("question") or {}).items()],
        "candidates": candidates(facts),
        "origins": [(name, shares[name], meaning) for name, meaning in _ORIGINS.items() if shares.get(name)],
        "command": str(facts.get("command") or ""),
        "versions": ", ".join(f"{name} {value}" for name, value in (facts.get("versions") or {}).items()),
    }


def _verdict(facts: Facts) -> tuple[str, str]:
    if facts.get("meets_slo"):
        return "good", "Meets the SLO"
    if facts.get("feasible", True):
        return "short", "Misses the SLO"
    return "bad", "Does not fit"


def _tiles(facts: Facts, layout: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    def p95(metric: str) -> str:
        return duration((facts.get(metric) or {}).get("p95"))

    degrees = " · ".join(
        f"{key.replace('_', '-')} {layout[key]}"
        for key in ("tp", "attention_dp", "ep", "moe_tp", "pp", "replicas")
        if layout.get(key, 1) != 1
    )
    return [
        ("Layout", str(layout.get("name", "")), degrees or "one GPU"),
        ("GPUs", number(layout.get("num_gpus"), whole=True), str(facts.get("cluster") or "")),
        ("Price", money(facts.get("usd_per_mtok_output")), "per million output tokens"),
        ("TTFT", p95("ttft_s"), "p95"),
        ("TPOT", p95("tpot_s"), "p95"),
        ("Throughput", number(facts.get("output_tok_per_s")), "output tok/s, all GPUs"),
        ("Per GPU", number(facts.get("output_tok_per_s_per_gpu")), "output tok/s"),
    ]


def _section(section: Section) -> list[str]:
    lines = [f"## {_plain(section.title)}", "", _plain(section.finding), ""]
    for table in section.tables:
        lines += _rows(table)
    return lines


def _rows(table: Table) -> list[str]:
    rule = [":--" if column in table.text_columns else "--:" for column in range(len(table.header))]
    rows = [table.header, tuple(rule), *table.rows]
    return [*("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows), ""]


def _plain(text: str) -> str:
    return " ".join(markup.escape(str(text), quote=False).replace("|", "\\|").split())


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
