"""Weight tags: dataclass fields that say which tensors of a checkpoint they hold, and the one walker that reads them.

    @dataclass
    class Attention:
        qkv_proj: Linear = weight("self_attn.{q,k,v}_proj", (Q, KV, KV), HIDDEN, bias="attention_bias")
        o_proj: Linear = weight("self_attn.o_proj", HIDDEN, Q)

A tag is a name and a shape. Names of nested dataclasses join with dots; in a name

- `{q,k,v}` joins the tensors it expands to along the output axis (axis 0) into one fused array,
- `{num_experts}` (one word: an integer of the config) stacks `.0 .1 ...` along a new first axis,
- `[num_experts]` at its end says that the tensor is stored so stacked; joining is along the axis after that,
- `_` at its start continues the parent's name without a dot,
- `a|b` takes the first that the checkpoint has, `a|b||c|d` one of the last where it has none of the first.

A dimension is an int, a config name, or a product of them (`"num_attention_heads*head_dim"`); a tuple gives one size
for each joined part. A child module reads its parent's dimensions as `"$0"`, `"$1"`. `plan` checks all names, shapes
and dtypes against the headers; only then does `build` read a tensor, field by field.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from runner.config.base import Config
from runner.weights.transforms import IDENTITY, Transform

Size = int | tuple[int, ...]
Dim = str | int | tuple[str | int, ...]

FLOAT = frozenset({"F64", "F32", "F16", "BF16"})
PACKED = frozenset({"U32"})
SCALES = FLOAT | {"U8"}

HARMLESS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(attn|attention)\.(masked_bias|bias)$|rotary_pos_emb\.inv_freq$"
)
"""Tensors that old checkpoints carry and no model reads: tables that are computed, and causal masks."""


class Header(Protocol):
    """What a tensor is, known before its bytes: `dtype` in safetensors' spelling."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


class Source(Protocol):
    """Named tensors: a `Checkpoint`, or anything with its two members."""

    @property
    def headers(self) -> Mapping[str, Header]: ...
    def read(self, name: str) -> mx.array: ...


# --- the tags ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tag:
    """See `weight`."""

    name: str
    shape: tuple[Dim, ...]
    optional: bool
    when: str | bool
    bias: str | bool
    otherwise: str | None
    transform: Transform
    part: tuple[int, tuple[Dim, ...]] | None
    dtypes: frozenset[str]
    length: str | None


@dataclass(frozen=True)
class Setting:
    """See `setting`."""

    name: str | None


TAG = "runner.weight"


def weight(
    name: str,
    *shape: Dim,
    optional: bool = False,
    when: str | bool = True,
    bias: str | bool = False,
    otherwise: str | None = None,
    transform: Transform = IDENTITY,
    part: tuple[int, tuple[Dim, ...]] | None = None,
    dtypes: frozenset[str] = FLOAT,
    length: str | None = None,
) -> Any:
    """A field filled from a checkpoint: an `mx.array`, a dataclass of such fields, or a list of dataclasses.

    Args:
        name: the tensor's name below the parent's, or a pattern (see the module's docstring).
        shape: its dimensions; for a dataclass, what its own tags read as `$0`, `$1`.
        optional: None where the checkpoint has no such tensor (for a dataclass: no tensor below its name).
        when: a config flag that says whether the field exists; None, and its tensors refused, where it is false.
        bias: whether a `Linear` here has a bias: a bool, or the config flag that says so.
        otherwise: the config flag that allows what stands behind `||` (a tied head). Where the flag is set and the
            checkpoint holds both, equal tensors are shared and the first one wins over a different one.
        transform: how the stored tensor becomes the field's value.
        part: `(index, sizes)`: this field holds piece `index` of a tensor stored as one, rows of the given sizes.
        dtypes: accepted dtypes, in safetensors' spelling.
        length: for a list, the config name of its length.
    """
    tag = Tag(name, shape, optional, when, bias, otherwise, transform, part, dtypes, length)
    return field(default=None, metadata={TAG: tag}) if optional or when is not True else field(metadata={TAG: tag})


tensor = weight
"""`weight` for classes with a field called `weight`, which hides the function in the rest of the class body."""


def setting(name: str | None = None, *, default: Any = MISSING) -> Any:
    """A plain field that takes the config's value of this name (its own, when none is given); `default` stands in for
    it where a dataclass is built by hand, or where the family's config has no such name."""
    return field(default=default, metadata={TAG: Setting(name)}, kw_only=True)


# --- trees of tensor names --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """One stored tensor, or `rows = (start, stop, total)` of it; `stack`: it holds so many along a first axis."""

    name: str
    rows: tuple[int, int, int] | None = None
    stack: int | None = None


@dataclass(frozen=True)
class Join:
    """Several: concatenated along their rows (axis 0, or the first that nothing is stacked on), or stacked."""

    parts: tuple[Tree, ...]
    stacked: bool

    @property
    def axis(self) -> int:
        """Where the parts are put together."""
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
    """`name` (a pattern without alternatives) below every leaf of `tree`."""
    if isinstance(tree, Join):
        return Join(tuple(expand(item, name, config) for item in tree.parts), tree.stacked)
    stack = tree.stack
    counted = re.search(r"\[(\w+)\]$", name)
    if counted is not None:
        name, stack = name[: counted.start()], size_of(counted[1], config, {})
    below = tree.name + name if name.startswith("_") else ".".join(filter(None, (tree.name, name)))
    return _pattern(below, dataclasses.replace(tree, stack=stack), config)


def _pattern(name: str, leaf: Leaf, config: Config) -> Tree:
    found = re.search(r"\{([^{}]*)\}", name)
    if found is None:
        return dataclasses.replace(leaf, name=name)
    words = found[1].split(",")
    stacked = len(words) == 1
    if stacked:
        words = [str(i) for i in range(size_of(words[0], config, {}))]
    return Join(tuple(_pattern(name[: found.start()] + w + name[found.end() :], leaf, config) for w in words), stacked)


def _stacks(tree: Tree) -> int:
    """How many axes before the rows of a matrix."""
    if isinstance(tree, Leaf):
        return 0 if tree.stack is None else 1
    return _stacks(tree.parts[0]) + tree.stacked


def size_of(dim: str | int, config: Config, scope: Mapping[str, Any]) -> int:
    if isinstance(dim, int):
        return dim
    result = 1
    for word in dim.split("*"):
        value = int(word) if word.isdigit() else scope[word] if word in scope else getattr(config, word)
        result *= value
    return result


def resolve(shape: Iterable[Dim], config: Config, scope: Mapping[str, Any]) -> tuple[Size, ...]:
    """Dimensions as numbers; `scope` holds what `$0`, `$1` and a module's own names stand for."""
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
    """Each stored tensor with the shape it should have."""
    if isinstance(tree, Leaf):
        stored = tuple(sum(size) if isinstance(size, tuple) else size for size in shape)
        stored = (tree.rows[2], *stored[1:]) if tree.rows else stored
        yield tree, stored if tree.stack is None else (tree.stack, *stored)
        return
    first = shape[0]
    for index, item in enumerate(tree.parts):
        rows = first[index] if isinstance(first, tuple) and not tree.stacked else first
        yield from leaf_shapes(item, (rows, *shape[1:]))


def joined_shape(tree: Tree, shape: tuple[Size, ...]) -> tuple[int, ...]:
    """The shape of the field: what joining and stacking the stored tensors gives."""
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


@dataclass(frozen=True)
class Choice:
    """The class that holds a module's tensors, with the names and numbers its tags may use."""

    cls: type
    scope: Mapping[str, Any]


class Chooses:
    """Base of modules whose form depends on what is stored (a `Linear` finds out whether it is quantised)."""

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        """Pick the class for the tensors below `tree`; raises `WeightsError` where they make no sense."""
        raise NotImplementedError
