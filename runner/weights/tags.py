"""Weight tags: dataclass fields that say which tensors of a checkpoint they hold.

    @dataclass
    class Attention:
        qkv_proj: Linear = weight("self_attn.{q,k,v}_proj", (Q, KV, KV), HIDDEN, bias="attention_bias")
        o_proj: Linear = weight("self_attn.o_proj", HIDDEN, Q)

A tag is a name and a shape. The names of nested dataclasses are joined with dots. In a name,

- `{q,k,v}` expands to several tensors, which are concatenated along the output axis (axis 0) into one fused array,
- `{num_experts}` (one word: an integer of the config) expands to `0`, `1`, ..., stacked along a new first axis,
- `{mixer}` (one word: a string of the config) is that string,
- `[num_experts]` at the end says that the tensor is stored stacked already; joining is along the axis after that,
- `_` at the start continues the parent's name without a dot,
- `a|b` takes the first that the checkpoint has; `a|b||c|d` falls back on `c|d` if it has neither `a` nor `b`.

A dimension is an int, a config name, or a product of them (`"num_attention_heads*head_dim"`); a tuple gives one size
for each joined part. A child module reads its parent's dimensions as `"$0"`, `"$1"`. `plan` checks all names, shapes
and dtypes against the headers; only then does `build` read a tensor, field by field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from runner.config.base import Config
from runner.weights.module import Module
from runner.weights.transforms import IDENTITY, Transform
from runner.weights.tree import Dim, Size, Tree

FLOAT = frozenset({"F64", "F32", "F16", "BF16"})
PACKED = frozenset({"U32"})
SCALES = FLOAT | {"U8"}

HARMLESS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(attn|attention)\.(masked_bias|bias)$|rotary_pos_emb\.inv_freq$"
    r"|\.(input|output)_(scale|zero_point|global_scale|scale_ub)$|\.(q|k|v|kv|prob)_(scale|zero_point)$"
)
"""Names of tensors that no model reads: computed tables and causal masks of old checkpoints, and the scales with which
other engines round activations and KV caches, which are not rounded here."""


class Header(Protocol):
    """The header of a tensor, known before it is read: dtype (in safetensors' spelling), shape, size in bytes."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


class Source(Protocol):
    """A source of named tensors: a `Checkpoint`, or any object with these two members."""

    @property
    def headers(self) -> Mapping[str, Header]: ...
    def read(self, name: str) -> mx.array: ...


@dataclass(frozen=True)
class Tag:
    """The arguments of `weight`, kept in the field's metadata."""

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
    exact: bool


@dataclass(frozen=True)
class Setting:
    """The argument of `setting`, kept in the field's metadata."""

    name: str | None


TAG = "runner.weight"
"""Key of a field's metadata, under which its `Tag` or `Setting` is kept."""


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
    exact: bool = False,
) -> Any:
    """A field filled from a checkpoint: an `mx.array`, a dataclass of such fields, or a list of dataclasses.

    Args:
        name: the tensor's name below the parent's, or a pattern (see the module's docstring).
        shape: its dimensions; for a dataclass, what its own tags read as `$0`, `$1`.
        optional: the field is None if the checkpoint has no such tensor (for a dataclass: no tensor below its name).
        when: the config flag that says whether the field exists; if it is false, the field is None and its tensors are
            refused as unused.
        bias: whether a `Linear` here has a bias: a bool, or the config flag that says so.
        otherwise: the config flag that allows the fallback after `||` (a tied head). If the flag is set and the
            checkpoint holds both, equal tensors are shared, and of different ones the first is used.
        transform: how the stored tensor becomes the field's value.
        part: `(index, sizes)`: this field holds piece `index` of one stored tensor, whose rows are split into `sizes`.
        dtypes: accepted dtypes, in safetensors' spelling.
        length: for a list, the config name of its length.
        exact: where numbers are brought to another dtype as they are read, this field's (a module's: all below it) are
            brought to float32. For what 16 bits round too coarsely: a router's scores, a state's decay.
    """
    # A field that may be None needs a default, so that a dataclass built by hand can leave it out.
    tag = Tag(name, shape, optional, when, bias, otherwise, transform, part, dtypes, length, exact)
    return field(default=None, metadata={TAG: tag}) if optional or when is not True else field(metadata={TAG: tag})


tensor = weight
"""`weight` for classes with a field called `weight`, which hides the function in the rest of the class body."""


def setting(name: str | None = None, *, default: Any = MISSING) -> Any:
    """A field that takes the config's value of this `name` (by default, the field's own name).

    `default` is used if a dataclass is built by hand, or if the family's config has no such name.
    """
    return field(default=default, metadata={TAG: Setting(name)}, kw_only=True)


@dataclass(frozen=True)
class Choice:
    """The class that `Chooses.choose` picked, with the names and values that its tags may read."""

    cls: type
    scope: Mapping[str, Any]


class Chooses(Module):
    """Base of modules whose class depends on what is stored (a `Linear` finds out whether it is quantized)."""

    @classmethod
    def choose(cls, tree: Tree, shape: tuple[Size, ...], headers: Mapping[str, Header], config: Config) -> Choice:
        """Pick the class for the tensors below `tree`; raise `WeightsError` if they fit no class."""
        raise NotImplementedError
