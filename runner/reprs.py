"""Short reprs for objects that people meet in a Python prompt."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def short(value: object) -> str:
    """`repr(value)` with long texts cut in the middle, and lists and dictionaries after their first few elements."""
    return _SHORT.repr(value)


def changed(value: Any) -> str:
    """A dataclass as a call with the fields that differ from their defaults; a `__repr__` for class bodies."""
    found = []
    for item in dataclasses.fields(value):
        factory = item.default_factory
        default = item.default if factory is dataclasses.MISSING else factory()
        if item.repr and (own := getattr(value, item.name)) != default:
            found.append(f"{item.name}={short(own)}")
    return f"{type(value).__name__}({', '.join(found)})"
