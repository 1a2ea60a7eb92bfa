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

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from runner.config.base import Config
from runner.weights.transforms import IDENTITY, Transform
from runner.weights.tree import Dim, Size, Tree

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
