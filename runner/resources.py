"""The data that comes with the package: `configs/`, in the source tree and installed alike."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from runner.errors import UsageError


def names(kind: str) -> list[str]:
    """What there is of a kind ("shapes" or "sampling")."""
    files = resources.files("runner").joinpath("configs", kind).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def read(kind: str, name: str) -> dict[str, Any]:
    """The named file's object.

    Raises:
        UsageError: there is none of that name; the message lists those there are.
    """
    if name not in names(kind):
        raise UsageError(f"no {kind} named {name!r}; there are {', '.join(names(kind))}")
    text = resources.files("runner").joinpath("configs", kind, f"{name}.json").read_text(encoding="utf-8")
    result: dict[str, Any] = json.loads(text)
    return result
