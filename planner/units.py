"""SI units inside, readable units at the faces.

Seconds, bytes, FLOP, watts and US dollars everywhere; 1 GB = 1e9 bytes, 1 GiB = 2**30.
"""

from __future__ import annotations

import math
import re
from typing import Any

_WHOLE = re.compile(r"[0-9]{1,9}")
KB, MB, GB, TB = 1e3, 1e6, 1e9, 1e12
KIB, MIB, GIB = 2.0**10, 2.0**20, 2.0**30
US, MS = 1e-6, 1e-3
HOUR_S = 3600.0
DAY_S = 86400.0
GBIT_PER_S = 1e9 / 8
"""Bytes per second of one gigabit per second."""

DTYPE_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0,
    "int8": 1.0,
    "fp4": 0.5,
    "int4": 0.5,
}


def whole_number(text: str) -> int | None:
    """`text` as a whole number of up to nine digits and nothing else, otherwise None.

    >>> whole_number("12"), whole_number(" 12"), whole_number("1e9"), whole_number("9" * 5000)
    (12, None, None, None)
    """
    return int(text) if _WHOLE.fullmatch(text) else None


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits and thousands separators.

    >>> significant(1234.5), significant(0.012345), significant(98.76)
    ('1,234', '0.0123', '98.8')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def _scaled(value: float, steps: list[tuple[float, str]]) -> str:
    for scale, unit in steps:
        if abs(value) >= scale:
            return f"{significant(value / scale)} {unit}"
    scale, unit = steps[-1]
    return f"{significant(value / scale)} {unit}"


def format_bytes(value: float) -> str:
    """Bytes in decimal units.

    >>> format_bytes(68_100_000_000), format_bytes(70272)
    ('68.1 GB', '70.3 kB')
    """
    return _scaled(value, [(TB, "TB"), (GB, "GB"), (MB, "MB"), (KB, "kB"), (1.0, "B")])


def format_seconds(value: float) -> str:
    """Seconds in the unit a person would choose.

    >>> format_seconds(0.0382), format_seconds(2.0), format_seconds(3.3e-6)
    ('38.2 ms', '2.00 s', '3.30 us')
    """
    return _scaled(value, [(1.0, "s"), (MS, "ms"), (US, "us")])


def format_count(value: float) -> str:
    """Plain counts with SI suffixes.

    >>> format_count(671_026_404_352), format_count(4200)
    ('671 B', '4.20 k')
    """
    return _scaled(value, [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, "")]).rstrip()


def format_usd(value: float) -> str:
    """US dollars.

    >>> format_usd(0.4321), format_usd(87072)
    ('$0.432', '$87,072')
    """
    return f"${significant(value)}"


def format_usd_short(value: float) -> str:
    """US dollars in thousands or millions, for axes and narrow columns.

    >>> format_usd_short(46_603.2), format_usd_short(1_250_000), format_usd_short(12.0), format_usd_short(4.512)
    ('$46.6k', '$1.25M', '$12', '$4.51')
    """
    for scale, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"${value / scale:.3g}{unit}"
    return f"${value:g}" if value == round(value) else format_usd(value)


def format_chance(chance: float) -> str:
    """A chance in percent; never a certainty.

    >>> format_chance(0.834), format_chance(0.9999), format_chance(0.0)
    ('83%', '>99%', '<1%')
    """
    return ">99%" if chance > 0.99 else "<1%" if chance < 0.01 else f"{chance:.0%}"


def format_gpus(count: int) -> str:
    """A number of GPUs.

    >>> format_gpus(1), format_gpus(1024)
    ('1 GPU', '1,024 GPUs')
    """
    return f"{count:,} GPU{'' if count == 1 else 's'}"


def finite(value: Any) -> Any:
    """Nested facts with None where a number is not finite, which JSON cannot say.

    >>> finite({"ratio": float("inf"), "rows": (1, 2.5)})
    {'ratio': None, 'rows': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
