"""Collects everything that does not fit between a model and a checkpoint, for one readable message."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

Shape = tuple[int, ...]

MAX_LINES = 100
"""Lines of a message. Names come from strangers' files, so what is kept of them does not grow with the file."""
MAX_NAME = 160
"""Characters of a name that a message shows."""
MAX_SEARCHES, MAX_CANDIDATES = 20, 200
"""Missing names for which a similar one is looked for, and names that it is looked for among: their product is slow."""


@dataclass
class _Group:
    """Problems that differ only in a layer number: the first one's name, and how many there are."""

    name: str
    count: int = 0


class Problems:
    """Problems, of which `message` merges those that differ only in a layer number: 30 layers make one line.

    `count` is how many were noted. Memory is bounded, whatever the number of problems and the length of names.
    """

    def __init__(self) -> None:
        self.count = 0
        self._groups: dict[tuple[str, str, str], _Group] = {}
        self._left_out = 0

    def missing(self, name: str, expected: Shape) -> None:
        """Note that a tensor the model needs is missing."""
        self._note("missing", name, f"expected {_shape(expected)}")

    def unused(self, name: str, shape: Shape) -> None:
        """Note a tensor that no field holds: leaving it out would change the numbers."""
        self._note("unused", name, f"{_shape(shape)} is not part of this model")

    def shape(self, name: str, found: Shape, expected: Shape) -> None:
        """Note a tensor of another shape than its field needs."""
        self._note("wrong shape", name, f"expected {_shape(expected)}, found {_shape(found)}")

    def dtype(self, name: str, found: str, expected: Iterable[str]) -> None:
        """Note a tensor of a dtype that its field cannot hold."""
        self._note("wrong dtype", name, f"expected {' or '.join(sorted(expected))}, found {found}")

    def other(self, message: str) -> None:
        """Note a problem of any other kind, described by `message`."""
        self._note("", message, "")

    def _note(self, kind: str, name: str, text: str) -> None:
        shown = _shown(name) if kind else name[: 10 * MAX_NAME]
        pattern = _pattern(shown) if kind else shown
        key = (kind, pattern, text)
        # A tensor that two fields share (a tied head and the embeddings) has a problem once.
        if key in self._groups and pattern == self._groups[key].name:
            return
        self.count += 1
        if key not in self._groups:
            if len(self._groups) == MAX_LINES:
                self._left_out += 1
                return
            self._groups[key] = _Group(shown)
        self._groups[key].count += 1

    def message(self, candidates: Iterable[str], title: str = "the checkpoint does not fit the model") -> str:
        """All problems, one line each below `title`; a missing name is followed by the closest of `candidates`."""
        lines = [f"{title} ({self.count} problems)"]
        spellings = _spellings(candidates) if any(kind == "missing" for kind, _, _ in self._groups) else {}
        searches = 0
        for (kind, pattern, text), group in self._groups.items():
            if not kind:
                lines.append(f"  {pattern}")
                continue
            shown = f"{pattern} ({group.count} tensors)" if group.count > 1 else group.name
            near = ""
            if kind == "missing" and searches < MAX_SEARCHES and len(group.name) < MAX_NAME:
                searches += 1
                near = _nearest(pattern, spellings)
            lines.append(f"  {kind}: {shown}: {text}{near}")
        if self._left_out:
            lines.append(f"  and {self._left_out} more")
        return "\n".join(lines)


def _shown(name: str) -> str:
    """A name as messages show it: short, and without control characters."""
    name = name if len(name) <= MAX_NAME else name[: MAX_NAME - 3] + "..."
    return name if name.isprintable() else repr(name)[1:-1]


def _pattern(name: str) -> str:
    """The name with `*` for the number of a layer or expert."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _spellings(names: Iterable[str]) -> dict[str, str]:
    """The first few patterns of `names`, each with how it is shown: a pattern of one name as that name."""
    result: dict[str, str] = {}
    for name in names:
        if len(name) < MAX_NAME:
            shown = _shown(name)
            pattern = _pattern(shown)
            if pattern in result:
                result[pattern] = pattern
            elif len(result) < MAX_CANDIDATES:
                result[pattern] = shown
    return result


def _nearest(pattern: str, spellings: dict[str, str]) -> str:
    """The end of a line that names the closest of `spellings`; "" where none is similar."""
    near = difflib.get_close_matches(pattern, spellings, n=1, cutoff=0.5)
    return f"; nearest name here: {spellings[near[0]]}" if near else ""


def _shape(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
