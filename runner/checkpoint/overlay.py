"""A `Source` that replaces, adds or removes some tensors of another; all other tensors pass through unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from runner.checkpoint.safetensors_header import BITS
from runner.errors import CheckpointError
from runner.local_files import quoted
from runner.weights.tags import Header, Source


@dataclass(frozen=True)
class Info:
    """Header of a tensor that is computed when it is read."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Change:
    """A tensor that replaces one of the base source or is added to it; `read` computes it anew on each call."""

    header: Header
    read: Callable[[], mx.array]


class Overlay:
    """A `Source`: `base` with `changes` by tensor name, and without the tensors in `gone`.

    Where a change replaces a quantized matrix, the `scales` and `biases` of the old one disappear too.
    """

    def __init__(self, base: Source, changes: Mapping[str, Change], gone: frozenset[str] = frozenset()) -> None:
        self._base = base
        self._changes = dict(changes)
        # Names that the replaced weights' scales and biases have, if those were quantized: left in place, they would
        # make the new weight look quantized. `changes` are merged last, so a change may still supply its own.
        packed = {
            f"{name.removesuffix('weight')}{part}"
            for name in changes
            if name.endswith(".weight")
            for part in ("scales", "biases")
        }
        kept = {name: header for name, header in base.headers.items() if name not in gone | packed}
        self.headers: Mapping[str, Header] = {**kept, **{name: item.header for name, item in changes.items()}}

    def read(self, name: str) -> mx.array:
        """Return the tensor `name`; raises `CheckpointError` where there is none."""
        if name in self._changes:
            return self._changes[name].read()
        if name not in self.headers:
            raise CheckpointError(f"no tensor {quoted(name)}")
        return self._base.read(name)
