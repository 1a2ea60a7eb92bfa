"""What messages show of names and values: short reprs, and what may have been meant."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def short(value: object) -> str:
    """`repr(value)` with long texts cut in the middle, and lists and dictionaries after their first few elements."""
    return _SHORT.repr(value)


LONGEST_SLIP = 100
"""Characters of a name at most that may be a slip of the pen: to compare one of millions takes minutes."""


def similar(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of the known names that a name from elsewhere may be a slip of; None where none is like it."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff) if len(name) <= LONGEST_SLIP else []
    return near[0] if near else None


def changed(value: Any) -> str:
    """A dataclass as a call with the fields that differ from their defaults; a `__repr__` for class bodies."""
    found = []
    for item in dataclasses.fields(value):
        factory = item.default_factory
        default = item.default if factory is dataclasses.MISSING else factory()
        if item.repr and (own := getattr(value, item.name)) != default:
            found.append(f"{item.name}={short(own)}")
    return f"{type(value).__name__}({', '.join(found)})"
