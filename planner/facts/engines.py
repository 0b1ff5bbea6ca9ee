"""Facts of engine profiles for `moeplan engines`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from planner.engine import Engine, engine, versions

Facts = dict[str, Any]


def engine_rows() -> list[Facts]:
    """What `engines --json` prints: one row per bundled profile, the newest version of an engine last."""
    return [_row(engine(key)) for key in versions()]


def _row(profile: Engine) -> Facts:
    return {
        "name": profile.name,
        "version": profile.version,
        "as_of": profile.as_of,
        "policy": profile.policy,
        "capacity_policy": "one slot each" if profile.kv_slots else profile.capacity_policy,
        "rank_router": profile.rank_router if profile.moe_backends else None,
        "kernels": profile.kernels,
        "source": profile.source,
    }


def engine_facts(text: str) -> Facts:
    """What `engines show --json` prints: every fact of the profile, defaults and the facts of its base included."""
    return asdict(engine(text))
