"""Reads the data files that come with the package, in `configs/`; works in the source tree and installed."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from typing import Any

from runner.errors import UsageError

KINDS = {"shapes": "published shape", "sampling": "sampling preset"}


def names(kind: str) -> list[str]:
    """Names of the data files of a kind ("shapes" or "sampling"), sorted."""
    files = resources.files("runner").joinpath("configs", kind).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def read(kind: str, name: str) -> dict[str, Any]:
    """Return the JSON object in the data file `name` of a kind ("shapes" or "sampling").

    Raises:
        UsageError: there is no file of that name; the message lists the names, the nearest one first.
    """
    if name not in names(kind):
        known = {each.casefold(): each for each in names(kind)}
        near = difflib.get_close_matches(name.casefold(), known, n=1)
        there = ", ".join(names(kind))
        hint = f"did you mean {known[near[0]]}? (There are {there})" if near else f"there are {there}"
        raise UsageError(f"no {KINDS.get(kind, kind)} is called {name!r}: {hint}")
    text = resources.files("runner").joinpath("configs", kind, f"{name}.json").read_text(encoding="utf-8")
    result: dict[str, Any] = json.loads(text)
    return result
