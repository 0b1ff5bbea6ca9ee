"""Names and numbers of the facts as a reader expects them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from planner.figures import readable
from planner.units import (
    format_bytes,
    format_chance,
    format_count,
    format_seconds,
    format_usd,
    format_usd_short,
    significant,
)

_SPELT = {"gpus": "GPUs", "usd": "$", "mtok": "Mtok", "tok per s": "tok/s"}


def title(name: str) -> str:
    """Identifier as words with a capital first letter.

    >>> title("kv_cache"), title("num_layers"), title("total_params")
    ('KV cache', 'Number of layers', 'Total parameters')
    """
    words = re.sub(r"\bparams\b", "parameters", re.sub(r"^num\b", "number of", readable(name)))
    for short, long in _SPELT.items():
        words = re.sub(rf"\b{short}\b", long, words)
    return words[:1].upper() + words[1:]


def number(value: float | None, scale: float = 1.0, whole: bool = False) -> str:
    """`value` times `scale` with three significant digits, a dash when it is unknown."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if whole else significant(value * scale)


def described(key: str, value: object) -> str:
    """`value` as text in the unit its key ends with.

    >>> described("kv_bytes_per_token", 70272), described("total_params", 671026404352), described("top_k", 8)
    ('70.3 kB', '671 B', '8')
    """
    if isinstance(value, Mapping):
        if value.keys() == {"count", "kind"}:
            return f"{value['count']} x {value['kind']}"
        return ", ".join(f"{readable(str(k))} {described(key, v)}" for k, v in value.items() if v)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(described(key, item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if "usd" in key:
        return money(value)
    if "bytes" in key:
        return format_bytes(value)
    if key.endswith(("_share", "chance")) or key.startswith(("growth", "probability")):
        return f"{value:.0%}"
    if "params" in key:
        return format_count(value)
    if key.endswith("_s"):
        return format_seconds(value)
    return f"{value:,}" if isinstance(value, int) else significant(value)


def duration(value: float | None) -> str:
    """Seconds in the unit a person would choose, a dash when they are unknown."""
    return "–" if value is None or not math.isfinite(value) else format_seconds(value)


def money(value: float | None) -> str:
    """US dollars, a dash when the price is unknown."""
    return "–" if value is None or not math.isfinite(value) else format_usd(value)


def short_money(value: float | None) -> str:
    """US dollars in thousands or millions, a dash when the price is unknown."""
    return "–" if value is None or not math.isfinite(value) else format_usd_short(value)


def chance(value: float | None) -> str:
    """A chance in percent, a dash when it is unknown."""
    return "–" if value is None or not math.isfinite(value) else format_chance(value)


def headroom(facts: Mapping[str, Any]) -> str:
    """How many times the asked demand is carried, a dash when it is unknown or the demand itself is too much.

    >>> headroom({"headroom": 2.25}), headroom({"headroom": 3.0, "headroom_at_least": True})
    ('2.25 x', 'at least 3 x')
    """
    factor = facts.get("headroom")
    if not factor or not math.isfinite(factor):
        return "–"
    return f"at least {factor:.3g} x" if facts.get("headroom_at_least") else f"{significant(factor)} x"


def spread(interval: Sequence[float | None] | None, text: Callable[[float | None], str]) -> str:
    """Low and high end as `text` writes them, a dash when they are unknown."""
    return "–" if not interval or None in interval else f"{text(interval[0])} to {text(interval[1])}"
