"""Reads the data files that come with the package, in `configs/`; works in the source tree and installed."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from runner.errors import UsageError


def names(kind: str) -> list[str]:
    """Names of the data files of a kind ("shapes" or "sampling"), sorted."""
    files = resources.files("runner").joinpath("configs", kind).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def read(kind: str, name: str) -> dict[str, Any]:
    """Return the JSON object in the data file `name` of a kind ("shapes" or "sampling").

    Raises:
        UsageError: there is no file of that name; the message lists the names.
    """
    if name not in names(kind):
        raise UsageError(f"no {kind} named {name!r}; there are {', '.join(names(kind))}")
    text = resources.files("runner").joinpath("configs", kind, f"{name}.json").read_text(encoding="utf-8")
    result: dict[str, Any] = json.loads(text)
    return result
