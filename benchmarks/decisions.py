"""Three purchase decisions worked with `moeplan compare`; writes docs/decisions.md and docs/decisions/*.json.

python benchmarks/decisions.py
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from textwrap import fill
from typing import Any

from planner.comparetext import compare_text
from planner.units import format_usd

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
READING = tomllib.loads((HERE / "decisions_reading.toml").read_text("utf-8"))
ORIGINS = ("measured", "interpolated", "extrapolated", "roofline")


def facts_of(command: str) -> dict[str, Any]:
    arguments = [sys.executable, "-m", "planner", *shlex.split(command)[1:], "--json"]
    done = subprocess.run(arguments, cwd=HERE.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command}\n{done.stderr}")
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts | {"command": command}


def numbers(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a reading may quote of each system, by its name with underscores."""
    found = {}
    for one in facts["systems"]:
        sure, name = one["sure"] or {}, one["name"].translate(str.maketrans("-:@", "___"))
        found[name] = {
            "gpus": one["num_gpus"],
            "month": format_usd(one["usd_per_month"] or 0),
            "best": f"{100 * (one['probability_best'] or 0):.0f} %",
            "enough": f"{100 * (one['probability_enough'] or 0):.0f} %",
            "sure": sure.get("num_gpus"),
            "sure_month": format_usd(sure.get("usd_per_month") or 0),
            "guessed": f"{100 * (one['origin_share']['extrapolated'] + one['origin_share']['roofline']):.0f} %",
            "low": f"{one['intervals']['tpot'][0]:.2f}",
            "high": f"{one['intervals']['tpot'][1]:.2f}",
            "capital": format_usd(one["capex_usd"] or 0),
        }
    return found


def rests_on(facts: dict[str, Any]) -> list[str]:
    """Which systems are known from data sheets, and how that widens the answer."""
    lines = [
        "| system | "
        + " | ".join(ORIGINS)
        + " | 80 % of measured over predicted step time | 80 % of the monthly bill |",
        "|---" * 7 + "|",
    ]
    for one in facts["systems"]:
        share = " | ".join(f"{one['origin_share'][origin]:.0%}" for origin in ORIGINS)
        low, high = one["intervals"]["tpot"]
        bill = one["usd_per_month_interval"]
        paid = "-" if bill is None else f"{format_usd(bill[0])} to {format_usd(bill[1])}"
        lines.append(f"| {one['name']} | {share} | x{low:.2f} to x{high:.2f} ({one['intervals']['basis']}) | {paid} |")
    return lines


def section(reading: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    said = [fill(text.format(**numbers(facts)), 120) for text in reading["said"]]
    return [
        f"## {reading['title']}",
        "",
        fill(reading["question"], 120),
        "",
        f"    {facts['command']}",
        "",
        *[part for text in said for part in (text, "")],
        "What the predictions rest on (share of the predicted time):",
        "",
        *rests_on(facts),
        "",
        "<details><summary>The whole answer</summary>",
        "",
        "```",
        compare_text(facts),
        "```",
        "",
        "</details>",
        "",
    ]


def main() -> None:
    lines = ["# Three decisions", "", fill(READING["introduction"], 120), ""]
    for reading in READING["decision"]:
        facts = facts_of(reading["command"])
        facts.pop("wall_s")
        lines += section(reading, facts)
        print(facts["headline"], flush=True)
    (DOCS / "decisions.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
