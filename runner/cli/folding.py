"""Folding of a long list of tensors: runs of equal layers become one layer, several names one name with braces.

model.layers.0.mlp.up_proj.weight                        layers.0-29            model.layers.0-29    30 alike
model.layers.1.mlp.up_proj.weight      ->                  mlp.up_proj.weight   mlp.up_proj.weight
...
("w.q_proj.weight", "w.k_proj.weight", "w.v_proj.weight")  ->  w.{q,k,v}_proj.weight
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner.inspect_model import Entry

LAYER = re.compile(r"(?P<list>.*?)\.(?P<index>\d+)\.(?P<rest>.+)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One line of the tree.

    Attributes:
        depth: levels of indentation.
        tensors: the folded names of the tensors that fill the field, below those of the heading.
        entry: the field; None on the heading of a run of layers.
        repeats: how many layers the line stands for.
    """

    depth: int
    field: str
    tensors: str
    entry: Entry | None
    repeats: int


@dataclass(frozen=True)
class Layer:
    """The fields of one element of a list of blocks, in order, with their names inside that element.

    Fields outside any list are grouped with `list_name` "" and their full names.
    """

    list_name: str
    index: int
    entries: tuple[tuple[str, Entry], ...]

    def pattern(self) -> object:
        """Return a key that is equal for layers of a list that differ by their index alone."""
        return self.list_name, tuple(
            (rest, tuple(replace_index(name, self.index, "*") for name in e.tensors), e.shape, e.dtype, e.nbytes)
            for rest, e in self.entries
        )


def fold(entries: Sequence[Entry], *, unfold: bool = False) -> Iterator[Row]:
    """Yield the lines of the tree; with `unfold`, a line with its full name for each field."""
    if unfold:
        for entry in entries:
            yield Row(0, entry.field, brace(entry.tensors), entry, 1)
        return
    for layers in runs(entries):
        first, last = layers[0], layers[-1]
        if not first.list_name:
            for name, entry in first.entries:
                yield Row(0, name, brace(entry.tensors), entry, 1)
            continue
        span = str(first.index) if first is last else f"{first.index}-{last.index}"
        named = [
            (rest, entry, [replace_index(name, first.index, span) for name in entry.tensors])
            for rest, entry in first.entries
        ]
        # As fields are named below the layers, so are tensors, where all of them lie below one name.
        above = shared_start([name for *_, names in named for name in names])
        cut = above.find(f".{span}.") + len(f".{span}.") if f".{span}." in above else 0
        yield Row(0, f"{first.list_name}.{span}", above[:cut].rstrip("."), None, len(layers))
        for rest, entry, names in named:
            yield Row(1, rest, brace([name[cut:] for name in names]), entry, len(layers))


def runs(entries: Sequence[Entry]) -> Iterator[list[Layer]]:
    """Yield runs of layers that follow each other in one list and look alike, in order."""
    run: list[Layer] = []
    for layer in split(entries):
        follows = bool(run) and layer.list_name != "" and layer.index == run[-1].index + 1
        if follows and layer.pattern() == run[-1].pattern():
            run.append(layer)
            continue
        if run:
            yield run
        run = [layer]
    if run:
        yield run


def split(entries: Sequence[Entry]) -> Iterator[Layer]:
    """Group the entries by the first `name.INDEX.` of their field, in order."""

    def place(entry: Entry) -> tuple[str, int]:
        match = LAYER.fullmatch(entry.field)
        return ("", 0) if match is None else (match["list"], int(match["index"]))

    for (list_name, index), group in groupby(entries, key=place):
        cut = len(f"{list_name}.{index}.") if list_name else 0
        yield Layer(list_name, index, tuple((entry.field[cut:], entry) for entry in group))


def replace_index(name: str, index: int, text: str) -> str:
    """Replace the first part of `name` that is `index`: `model.layers.3.x`, 3, "0-29" -> `model.layers.0-29.x`."""
    return re.sub(rf"(?<=\.){index}(?=\.)", text, name, count=1)


def shared_start(names: Sequence[str]) -> str:
    """The longest prefix of all names."""
    low, high = min(names), max(names)  # names between these two in sorted order share the prefix that these share
    return low[: next((i for i, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))]


def brace(names: Sequence[str]) -> str:
    """Fold several names into one, with the parts that differ in braces; consecutive numbers become `0-63`."""
    if len(names) < 2:
        return "".join(names)
    start = shared_start(names)
    ends = [name[len(start) :] for name in names]
    tail = shared_start([end[::-1] for end in ends])[::-1]
    middles = [end[: len(end) - len(tail)] for end in ends]
    if all(middle.isdecimal() for middle in middles):
        numbers = [int(middle) for middle in middles]
        if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{start}{{{numbers[0]}-{numbers[-1]}}}{tail}"
    return f"{start}{{{','.join(middles)}}}{tail}"
