"""Text of the `profiles` commands that deal with measured tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.errors import InputError
from planner.tables import table
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.measurements.importer import ImportSummary

Facts = dict[str, Any]
_MOST_NEXT = 12
_ORIGINS = ("measured", "interpolated", "extrapolated", "roofline")


def write_json(path: Path, facts: Facts) -> None:
    """Write facts as a JSON file. Raises InputError when that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. Choose a file you may write to.") from error


def import_text(summary: ImportSummary) -> str:
    """Text of `profiles import`: what came in, what was left out, where it is."""
    lines = [f"{summary} -> {summary.directory}", ""]
    rows = [(op, f"{count:,}", format_bytes(summary.bytes[op])) for op, count in summary.rows.items()]
    lines.append(table(["table", "rows", "size"], rows))
    for op, reasons in summary.dropped.items():
        lines += [f"  {op}: {count:,} rows {reason}" for reason, count in reasons.items()]
    lines += [f"  skipped {what}: {why}" for what, why in summary.skipped.items()]
    lines += [f"  ! {note}" for note in summary.notes]
    return "\n".join([*lines, "", f"Next  moeplan profiles check {summary.directory}"])


def check_text(facts: Facts) -> str:
    """Text of `profiles check`: the verdict, counts, and the worst rows."""
    total = sum(facts["rows"].values())
    faults = sum(sum(kinds.values()) for kinds in facts["counts"].values()) + len(facts["unreadable"])
    verdict = "clean" if facts["clean"] else f"{faults:,} faults"
    lines = [f"{facts['profile']}: {verdict} in {total:,} rows of {len(facts['rows'])} operations"]
    lines.append(f"  checked against {facts['checked_against']}")
    lines += [f"  ! {fault}" for fault in facts["unreadable"]]
    for op, kinds in facts["counts"].items():
        lines += ["", f"{op}: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())]
        for finding in facts["findings"]:
            if finding["op"] == op:
                lines += [f"  {finding['kind']}: {finding['row']}", f"      {finding['why']}"]
    return "\n".join(lines)


def compare_text(facts: Facts) -> str:
    """Text of `profiles compare`: ratio table, then the rows that differ most."""
    rows = [
        (
            group["op"],
            group["label"],
            f"{group['rows']:,}",
            *(f"{group[name]:.2f}" for name in ("p10", "median", "p90")),
            f"{group['share_off_by_20_percent']:.0%}",
        )
        for group in facts["groups"]
    ]
    lines = [f"Ratio: {facts['ratio']}", "", table(["op", "of", "rows", "p10", "median", "p90", "over 20 %"], rows, 2)]
    lines += ["", "Rows that differ most"]
    for row in facts["worst"]:
        lines.append(f"  {row['ratio']:.2f} x  {row['row']} against {row['second_us']:.4g} us")
    for side in ("first", "second"):
        if facts[f"only_{side}"]:
            lines.append(f"Only in {facts[side]}: {', '.join(facts[f'only_{side}'])}")
    return "\n".join(lines)


def coverage_text(facts: Facts) -> str:
    """Text of `profiles coverage`: shares by origin, then what to measure next."""
    total = facts["total"]
    known = total["measured"] + total["interpolated"]
    lines = [
        f"{facts['model']} on {facts['system']} as {facts['layout']} ({facts['engine']}): "
        f"{known:.0%} of step time rests on measurements of this shape or between two",
        "",
        table(
            ["operation", "of step", *_ORIGINS],
            [_share_row(name, share) for name, share in [*facts["operations"].items(), ("all", total)]],
        ),
        "",
    ]
    if not facts["next"]:
        return "\n".join([*lines, "Nothing that is looked up is guessed."])
    lines.append("Measure next (share of step time that would no longer be guessed)")
    for item in facts["next"][:_MOST_NEXT]:
        shape = " ".join(f"{name}={value}" for name, value in item["shape"].items() if value is not None)
        lines.append(f"  {item['would_settle']:6.1%}  {item['op']} {shape}")
    if len(facts["next"]) > _MOST_NEXT:
        lines.append(f"          and {len(facts['next']) - _MOST_NEXT} more (--json)")
    lines += ["", f"Shapes file  moeplan profiles shapes {facts['model']} --out shapes.json"]
    return "\n".join(lines)


def _share_row(name: str, share: Facts) -> tuple[str, ...]:
    step = share["step"] or 1.0
    return (name, f"{share['step']:.1%}", *(f"{share[origin] / step:.0%}" for origin in _ORIGINS))


def shapes_text(facts: Facts, path: str) -> str:
    """Text of `profiles shapes`."""
    lines = [f"{path}: {len(facts['cases'])} shapes of {', '.join(facts['models'])}"]
    for model, reasons in facts["left_out"].items():
        lines += [f"  left out for {model}: {reason}" for reason in reasons]
    return "\n".join([*lines, f"Next  python -m microbench --out measured --model-shapes {path}"])
