"""Trees of tensor names: what the pattern of a tag expands to, and the shapes of its parts and of their join."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.config.base import Config

Size = int | tuple[int, ...]
"""A resolved dimension; a tuple has one size for each joined part."""

Dim = str | int | tuple[str | int, ...]
"""A dimension as a tag writes it, before `resolve`."""


@dataclass(frozen=True)
class Leaf:
    """One stored tensor, or its `rows` (start, stop, total); `stack`: length of the first axis of a stacked tensor."""

    name: str
    rows: tuple[int, int, int] | None = None
    stack: int | None = None


@dataclass(frozen=True)
class Join:
    """Several trees as one array: stacked along a new first axis, or concatenated along their rows (see `axis`)."""

    parts: tuple[Tree, ...]
    stacked: bool

    @property
    def axis(self) -> int:
        """The axis along which parts are joined: 0, or for concatenated rows the first axis after all stacked ones."""
        return 0 if self.stacked else _stacks(self.parts[0])


Tree = Leaf | Join


def leaves(tree: Tree) -> Iterator[Leaf]:
    """Every stored tensor of `tree`, in order."""
    if isinstance(tree, Leaf):
        yield tree
    else:
        for item in tree.parts:
            yield from leaves(item)


def expand(tree: Tree, name: str, config: Config) -> Tree:
    """The tree that `name` (a pattern without alternatives) gives below every leaf of `tree`."""
    if isinstance(tree, Join):
        return Join(tuple(expand(item, name, config) for item in tree.parts), tree.stacked)
    # `[count]` is no part of the tensor's name: it says that the tensor is stored stacked.
    stack = tree.stack
    counted = re.search(r"\[(\w+)\]$", name)
    if counted is not None:
        name, stack = name[: counted.start()], size_of(counted[1], config, {})
    below = tree.name + name if name.startswith("_") else ".".join(filter(None, (tree.name, name)))
    return _pattern(below, dataclasses.replace(tree, stack=stack), config)


def _pattern(name: str, leaf: Leaf, config: Config) -> Tree:
    """Expand the braces of `name` from left to right, one level of `Join` for each."""
    found = re.search(r"\{([^{}]*)\}", name)
    if found is None:
        return dataclasses.replace(leaf, name=name)
    # One word is a name that the config gives or a count to stack, several are parts to concatenate.
    words = found[1].split(",")
    stacked = len(words) == 1
    named = getattr(config, words[0], None) if stacked else None
    if isinstance(named, str):
        return _pattern(name[: found.start()] + named + name[found.end() :], leaf, config)
    if stacked:
        words = [str(i) for i in range(size_of(words[0], config, {}))]
    return Join(tuple(_pattern(name[: found.start()] + w + name[found.end() :], leaf, config) for w in words), stacked)


def _stacks(tree: Tree) -> int:
    """Number of stacked axes before the rows of a matrix."""
    if isinstance(tree, Leaf):
        return 0 if tree.stack is None else 1
    return _stacks(tree.parts[0]) + tree.stacked


def size_of(dim: str | int, config: Config, scope: Mapping[str, Any]) -> int:
    """A dimension as a number: an int, a name in `scope` or else in the config, or a product `a*b` of such."""
    if isinstance(dim, int):
        return dim
    result = 1
    for word in dim.split("*"):
        value = int(word) if word.isdigit() else scope[word] if word in scope else getattr(config, word)
        result *= value
    return result


def resolve(shape: Iterable[Dim], config: Config, scope: Mapping[str, Any]) -> tuple[Size, ...]:
    """Dimensions as numbers; `scope` holds the values of `$0`, `$1` and of a module's own names."""
    result: list[Size] = []
    for dim in shape:
        if isinstance(dim, str) and dim in scope:
            result.append(scope[dim])
        elif isinstance(dim, tuple):
            result.append(tuple(size_of(item, config, scope) for item in dim))
        else:
            result.append(size_of(dim, config, scope))
    return tuple(result)


def leaf_shapes(tree: Tree, shape: tuple[Size, ...]) -> Iterator[tuple[Leaf, tuple[int, ...]]]:
    """Each stored tensor with the shape it must have, if the field's sizes are `shape`."""
    if isinstance(tree, Leaf):
        # One tensor for all parts has the sum of their sizes; a tensor split by rows is stored with all of them.
        stored = tuple(sum(size) if isinstance(size, tuple) else size for size in shape)
        stored = (tree.rows[2], *stored[1:]) if tree.rows else stored
        yield tree, stored if tree.stack is None else (tree.stack, *stored)
        return
    # A concatenation gives each part its size of the tuple; a stack gives each part the whole tuple.
    first = shape[0]
    for index, item in enumerate(tree.parts):
        rows = first[index] if isinstance(first, tuple) and not tree.stacked else first
        yield from leaf_shapes(item, (rows, *shape[1:]))


def joined_shape(tree: Tree, shape: tuple[Size, ...]) -> tuple[int, ...]:
    """The shape of the field: what stacking and concatenating the stored tensors gives."""
    if isinstance(tree, Leaf):
        stored = tuple(sum(size) if isinstance(size, tuple) else size for size in shape)
        stored = (tree.rows[1] - tree.rows[0], *stored[1:]) if tree.rows else stored
        return stored if tree.stack is None else (tree.stack, *stored)
    if tree.stacked:
        return (len(tree.parts), *joined_shape(tree.parts[0], shape))
    first = shape[0]
    pieces = [
        joined_shape(item, (first[i] if isinstance(first, tuple) else first, *shape[1:]))
        for i, item in enumerate(tree.parts)
    ]
    axis = tree.axis
    return (*pieces[0][:axis], sum(piece[axis] for piece in pieces), *pieces[0][axis + 1 :])
