"""Values by name pattern (`rank_pattern`, `alpha_pattern`): thousands of plain names cost no more than a few."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from runner.adapters.pattern import Effort, NamePattern

_PLAIN = re.compile(r"\^?(?:\w|-|\\?\.)+")
"""A module's name, whose dots may be escaped (an unescaped one stands for any letter)."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Shape:
    """What plain names of one kind have in common: their length, where any letter fits, and whether `^` comes first."""

    length: int
    free: tuple[int, ...]
    whole: bool

    def blanked(self, name: str) -> str:
        """`name` with a space wherever any letter fits."""
        letters = list(name)
        for place in self.free:
            letters[place] = " " if letters[place] != "\n" else "\n"
        return "".join(letters)


@dataclass
class PatternTable(Generic[T]):
    """Patterns in order, each with a value; the first that matches an end of a name (at its start or a dot) counts.

    Plain names are looked up by their letters; only patterns with loops, groups or classes are tried one by one.
    """

    effort: Effort
    values: list[T]
    patterns: list[tuple[int, NamePattern]]
    plain: dict[_Shape, dict[str, int]]
    lengths: dict[int, list[_Shape]]
    known: dict[tuple[str, ...], int | None] = field(default_factory=dict)

    @classmethod
    def compile(cls, key: str, entries: Mapping[str, T]) -> PatternTable[T]:
        """Compile the patterns of the config's `key`; raises `ConfigError` as `NamePattern.compile` does."""
        table = cls(Effort(key), list(entries.values()), [], {}, {})
        for index, text in enumerate(entries):
            if _PLAIN.fullmatch(text) is None:
                table.patterns.append((index, NamePattern.compile(text, table.effort)))
                continue
            shape, letters = _plain(text)
            if shape not in table.plain:
                table.lengths.setdefault(shape.length, []).append(shape)
            table.plain.setdefault(shape, {}).setdefault(letters, index)
        return table

    def find(self, names: Sequence[str], default: T) -> T:
        """The value of the first pattern that matches an end of one of `names`, else `default`.

        Raises:
            ConfigError: the patterns have taken too many steps.
        """
        asked = tuple(names)
        if asked not in self.known:
            self.known[asked] = min((index for name in names for index in self._matching(name)), default=None)
        index = self.known[asked]
        return default if index is None else self.values[index]

    def _matching(self, name: str) -> Iterator[int]:
        """The first plain name that matches an end of `name`, of each shape, and the first pattern that does."""
        starts = [0, *(found.end() for found in re.finditer(r"\.", name))]
        for start in starts:
            for shape in self.lengths.get(len(name) - start, ()):
                self.effort.spend(1 + shape.length // 8)
                index = self.plain[shape].get(shape.blanked(name[start:]))
                if index is not None and not (shape.whole and start):
                    yield index
        index = next((index for index, pattern in self.patterns if pattern.ends(name)), None)
        if index is not None:
            yield index


def _plain(text: str) -> tuple[_Shape, str]:
    """The shape of a plain name, and its letters with a space wherever any letter fits."""
    whole = text.startswith("^")
    letters: list[str] = []
    free = []
    for found in re.finditer(r"\\?.", text[whole:]):
        if found[0] == ".":
            free.append(len(letters))
        letters.append(" " if found[0] == "." else found[0][-1])
    return _Shape(len(letters), tuple(free), whole), "".join(letters)
