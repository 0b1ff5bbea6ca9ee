"""Answers side by side: a pinned scenario against the one on the page, in absolute numbers and percent."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from dataclasses import dataclass, replace

from planner.units import format_bytes, format_seconds, format_usd, significant
from planner.whatif.analytic import Answer, answer, chance_of_slo
from planner.whatif.catalogue import objectives
from planner.whatif.scenario import LEFT_OUT, Scenario, from_query

MOST_PINS = 4
_MAX_PACKED = 4_000


@dataclass(frozen=True, slots=True)
class Difference:
    """A number of a pinned answer and of the present one; `change` is a share of the pinned, None where undefined."""

    name: str
    pinned: str
    now: str
    absolute: str
    change: float | None


def inputs_changed(pinned: Scenario, now: Scenario) -> list[tuple[str, str, str]]:
    """Inputs in which two scenarios differ: name, value of the first, of the second."""
    before, after = _inputs(pinned), _inputs(now)
    names = sorted(before.keys() | after.keys())
    return [(n, before.get(n, "default"), after.get(n, "default")) for n in names if before.get(n) != after.get(n)]


def differences(pinned: Answer, now: Answer) -> list[Difference]:
    """Numbers of both answers; empty where one of them has no layout."""
    if pinned.chosen is None or now.chosen is None:
        return []
    rows = []
    for (name, before, show), (_, after, _) in zip(_numbers(pinned), _numbers(now), strict=False):
        change, delta = None, ""
        if before is not None and after is not None:
            change, delta = after / before - 1 if before else None, _signed(after - before, show)
        rows.append(Difference(name, _text(before, show), _text(after, show), delta, change))
    return rows


def are_full(pins: list[Scenario], scenario: Scenario) -> bool:
    """No room for `scenario`, or it is pinned already."""
    return len(pins) >= MOST_PINS or scenario in pins


def packed(pins: list[Scenario]) -> str:
    """Pins for an address: as many as fit of those whose uploads fit."""
    return _fitting(pins)[1]


def link_note(scenario: Scenario, pins: list[Scenario]) -> str:
    """What the address of the page reproduces, and what it does not carry."""
    names = {"config": scenario.config_name, "trace": scenario.trace_name}
    lacking = [f"the uploaded {names[field]}" for field in scenario.left_out]
    if missing := len(pins) - _fitting(pins)[0]:
        lacking.append(f"{missing} of {len(pins)} pins")
    if lacking:
        return f"The address of this page does not carry {' and '.join(lacking)}: too large for a link."
    return "The address of this page reproduces the view."


def _fitting(pins: list[Scenario]) -> tuple[int, str]:
    """How many pins an address carries, and their text."""
    whole = [pin.query() for pin in pins if not pin.left_out]
    for count in range(min(len(whole), MOST_PINS), 0, -1):
        text = json.dumps(whole[:count], separators=(",", ":"))
        found = base64.urlsafe_b64encode(zlib.compress(text.encode(), 9)).decode()
        if len(found) <= _MAX_PACKED:
            return count, found
    return 0, ""


def _inputs(scenario: Scenario) -> dict[str, str]:
    """What differs from the defaults; uploads by name."""
    uploads = {"config": scenario.config and scenario.config_name, "trace": scenario.trace and scenario.trace_name}
    kept = {name: value for name, value in scenario.query().items() if name not in ("config", "config_name", LEFT_OUT)}
    return kept | {name: value for name, value in uploads.items() if value}


def unpacked(text: str) -> list[Scenario]:
    """Pins of an address; none where it cannot be read."""
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(text.encode(), altchars=b"-_", validate=True), 1_000_000)
        rows = json.loads(data)
        read = [from_query({str(k): str(v) for k, v in row.items()})[0] for row in rows[:MOST_PINS]]
        return [replace(pin, rivals="") for pin in read]
    except (ValueError, binascii.Error, zlib.error, AttributeError, TypeError, RecursionError):
        return []


def label(scenario: Scenario) -> str:
    """A pin in one line."""
    found = answer(scenario)
    model = scenario.model_name.split("/")[-1]
    load = f"{scenario.users} users" if scenario.users else f"{scenario.rate:g} requests/s"
    text = f"{model}, {scenario.gpus} x {scenario.system}, {scenario.workload_name}, {load}"
    chosen = found.chosen if isinstance(found, Answer) else None
    return f"{text}: {chosen.candidate.deployment.layout}" if chosen else text


def _numbers(found: Answer) -> list[tuple[str, float | None, str]]:
    chosen = found.chosen
    assert chosen is not None
    workload, slo = found.question.workload, found.question.slo
    rows: list[tuple[str, float | None, str]] = [("GPUs used", float(chosen.num_gpus), "count")]
    for name, (value, _) in objectives(chosen.candidate, slo, workload.mean_output_tokens).items():
        rows.append((name.replace("_", " ").upper(), value, "s"))
    use = chosen.candidate.deployment.memory
    return [
        *rows,
        ("Output tok/s per GPU", chosen.output_tok_per_s / chosen.num_gpus, "number"),
        ("$ per Mtok output", chosen.usd_per_mtok_output, "usd"),
        ("Requests/s at most", chosen.candidate.capacity_per_s, "number"),
        ("KV cache per rank", use.terms["kv_cache"], "bytes"),
        ("Chance of meeting the SLO", chance_of_slo(found), "share"),
    ]


def _text(value: float | None, show: str) -> str:
    if value is None:
        return "unknown"
    texts = {"s": format_seconds, "usd": format_usd, "bytes": format_bytes, "number": significant}
    if show in texts:
        return texts[show](value)
    return f"{value:.0%}" if show == "share" else f"{value:,.0f}"


def _signed(value: float, show: str) -> str:
    if abs(value) < 1e-12:
        return "same"
    if show == "share":
        return f"{100 * value:+.0f} points"
    sign = "-" if value < 0 else "+"
    return sign + _text(abs(value), show)
