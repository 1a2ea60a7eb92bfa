"""Finds calls of functions in texts, for tests of how they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from runner.server.tool_calls import CallFinder
from runner.server.tool_formats import Called, read_calls


def read(text: str, schemas: Mapping[str, Any], *, cut: bool = False) -> Sequence[Called] | None:
    """The calls of a text that is nothing else; None of one that is."""
    found = read_calls(text, schemas, cut=cut)
    return found.calls if found.calls and found.end == len(text) else None


def run(finder: CallFinder, pieces: Sequence[str]) -> tuple[str, list[tuple[str, dict]]]:
    """Text and calls of an answer in pieces."""
    text, calls = "", []
    for piece in pieces:
        shown, found = finder.add(piece)
        text += shown
        calls += found
    shown, found = finder.flush()
    calls += found
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    return text + shown, [(call.name, json.loads(call.arguments)) for call in calls]
