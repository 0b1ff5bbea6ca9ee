"""Facts of launch commands: how to start a recommended layout, for text, JSON and report."""

from __future__ import annotations

from planner.deployment import Deployment
from planner.facts.basic import Facts
from planner.launch import Role, launch


def launch_facts(deployment: Deployment, role: Role = "") -> Facts:
    """Commands of one replica with the GPUs each takes, the number of replicas, and what no flag can say."""
    found = launch(deployment, role)
    return {
        "engine": found.engine,
        "role": found.role,
        "commands": [{"text": command.text, "num_gpus": command.num_gpus} for command in found.commands],
        "replicas": found.replicas,
        "num_gpus": found.num_gpus,
        "is_verified": False,
        "note": found.note,
    }


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
