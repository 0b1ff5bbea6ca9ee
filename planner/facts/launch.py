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
