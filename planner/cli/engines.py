"""The `engines` commands: which engine versions are known, and what is known of them."""

from __future__ import annotations

from typing import Any

from planner.cli.terminal import show

Facts = dict[str, Any]


def list_engines(*, json: bool = False) -> None:
    """Bundled engine profiles: version, date, scheduler, source. `--engine NAME` means the newest version of NAME.

    Parameters
    ----------
    json
        Print a JSON list.
    """
    from planner.facts.engines import engine_rows

    show(engine_rows(), json, _rows_text)


def show_engine(name: str, *, json: bool = False) -> None:
    """A profile as TOML, with its sources: what to copy for a profile of your own.

    Parameters
    ----------
    name
        Engine (vllm), version (vllm-0.33.0) or a profile TOML; of a TOML with a `base` the whole is shown.
    json
        Print the facts as JSON.
    """
    from planner.engine import engine_text
    from planner.facts.engines import engine_facts

    facts = engine_facts(name)
    show(facts, json, lambda _: engine_text(name))


def _rows_text(rows: list[Facts]) -> str:
    from planner.tables import table

    header = ["engine", "version", "as of", "steps", "admits", "between attention-DP ranks"]
    shown = [[row["name"], row["version"], row["as_of"], *(_words(row[key]) for key in _KEYS)] for row in rows]
    sources = [f"  {row['name']} {row['version']}: {row['source']}" for row in rows]
    return "\n".join([table(header, shown, left=6), "", "Sources", *sources, "", _NEXT])


_KEYS = ("policy", "capacity_policy", "rank_router")
_NEXT = "Next  moeplan engines show vllm > my.toml, change it, and give it as --engine my.toml"


def _words(value: str | None) -> str:
    return (value or "no attention-DP").replace("_", " ")
