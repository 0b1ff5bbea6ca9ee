"""Launch commands as terminal text."""

from __future__ import annotations

from typing import Any

Facts = dict[str, Any]


def launch_lines(facts: Facts) -> list[str]:
    """Launch commands as terminal text; long lists of nodes are cut after the second, which shows the pattern."""
    lines = []
    for pool in facts.get("launch") or ():
        role = f" ({pool['role']} pool)" if pool["role"] else ""
        lines.append(f"Launch{role}, unverified")
        shown = pool["commands"][:2]
        lines += [f"  {line}" for command in shown for line in command["text"].splitlines()]
        if len(pool["commands"]) > len(shown):
            lines.append(f"  (and node ranks {len(shown)} to {len(pool['commands']) - 1} likewise)")
        lines += [f"  {pool['note']}", ""]
    return lines
