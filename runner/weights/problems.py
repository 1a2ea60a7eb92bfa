"""Collects everything that does not fit between a model and a checkpoint, for one readable message."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

Shape = tuple[int, ...]


class Problems:
    """A list of problems; `message` merges problems that differ only in a layer number: 30 layers make one line."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str, str]] = []

    def missing(self, name: str, expected: Shape) -> None:
        """Note that a tensor the model needs is missing."""
        self.found.append(("missing", name, f"expected {_shape(expected)}"))

    def unused(self, name: str, shape: Shape) -> None:
        """Note a tensor that no field holds: leaving it out would change the numbers."""
        self.found.append(("unused", name, f"{_shape(shape)} is not part of this model"))

    def shape(self, name: str, found: Shape, expected: Shape) -> None:
        """Note a tensor of another shape than its field needs."""
        self.found.append(("wrong shape", name, f"expected {_shape(expected)}, found {_shape(found)}"))

    def dtype(self, name: str, found: str, expected: Iterable[str]) -> None:
        """Note a tensor of a dtype that its field cannot hold."""
        self.found.append(("wrong dtype", name, f"expected {' or '.join(sorted(expected))}, found {found}"))

    def other(self, message: str) -> None:
        """Note a problem of any other kind, described by `message`."""
        self.found.append(("", message, ""))

    def message(self, candidates: Sequence[str], title: str = "the checkpoint does not fit the model") -> str:
        """All problems, one line each below `title`; a missing name is followed by the closest of `candidates`."""
        # The number of a layer or expert becomes `*`; what is then equal is one group.
        groups: dict[tuple[str, str, str], list[str]] = {}
        for kind, name, text in self.found:
            groups.setdefault((kind, re.sub(r"\.\d+\.", ".*.", name) if kind else name, text), []).append(name)
        lines = [f"{title} ({len(self.found)} problems)"]
        for (kind, pattern, text), names in groups.items():
            if not kind:
                lines.append(f"  {pattern}")
                continue
            shown = f"{pattern} ({len(names)} tensors)" if len(names) > 1 else names[0]
            near = difflib.get_close_matches(names[0], candidates, n=1, cutoff=0.5) if kind == "missing" else []
            lines.append(f"  {kind}: {shown}: {text}" + (f"; nearest name here: {near[0]}" if near else ""))
        return "\n".join(lines)


def _shape(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
