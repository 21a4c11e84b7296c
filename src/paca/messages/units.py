"""Amounts of memory and of time, as people write and read them."""

from __future__ import annotations

import re

from paca.messages.errors import PacaError

_FACTORS = {
    "": 1,
    **{prefix: 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}i": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}


def parse_bytes(text: str) -> int:
    """`"24GiB"`, `"24 GB"` or `"500MiB"` in bytes; a unit's B may be left out. `PacaError` if it is no amount."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    count = 0 if match is None else int(float(match[1]) * _FACTORS[match[2] or ""])
    if 0 < count < 4096 and match is not None and text.strip()[-1].isdigit():
        unit = "GiB" if count < 1024 else "MiB"
        raise PacaError(f"{text.strip()!r} would be that many bytes. Did you mean {text.strip()}{unit}?")
    if count <= 0:
        raise PacaError(f"{text!r} is no amount of memory. Give a number and a unit, such as 24GiB or 80GB.")
    return count


def format_bytes(count: float) -> str:
    """`3221225472` → `"3.00 GiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def format_duration(seconds: float) -> str:
    """`3725` → `"1:02:05"`, `65` → `"1:05"`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
