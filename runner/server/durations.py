"""Durations as Ollama's clients write them."""

from __future__ import annotations

import math
import re

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
LONGEST = 64
"""Characters of a duration at most: of a stranger's, all beginnings of a part are tried."""
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def seconds_of(value: str | float) -> float:
    """The seconds of a duration such as `5m`, `1h30m` or a number; a negative one is endless.

    Raises:
        ValueError: it is no duration.
    """
    if isinstance(value, int | float):
        return _checked(float(value), value)
    if len(value) > LONGEST:
        raise ValueError(f"{value[:40]!r} and so on is no duration, such as 5m, 30s or -1")
    text = value.strip()
    try:
        return _checked(float(text), value)
    except ValueError:
        pass
    unsigned = text.lstrip("+-")
    parts = _PART.findall(unsigned)
    if not parts or "".join(number + unit for number, unit in parts) != unsigned or len(text) - len(unsigned) > 1:
        raise ValueError(f"{value[:40]!r} is no duration, such as 5m, 30s or -1")
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    return _checked(-total if text.startswith("-") else total, value)


def _checked(seconds: float, value: str | float) -> float:
    if math.isnan(seconds):
        raise ValueError(f"{value!r:.40} is no duration")
    return math.inf if seconds < 0 else seconds
