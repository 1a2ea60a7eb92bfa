"""A source with some tensors changed: what is not named comes from below, untouched."""

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
    """The header of a tensor that is made when it is read."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Change:
    """A tensor in place of another, or one more; `read` makes it each time."""

    header: Header
    read: Callable[[], mx.array]


class Overlay:
    """`base` with `changes` by name and without what is `gone`; where packed matrices become numbers, scales go too."""

    def __init__(self, base: Source, changes: Mapping[str, Change], gone: frozenset[str] = frozenset()) -> None:
        self._base = base
        self._changes = dict(changes)
        packed = {
            f"{name.removesuffix('weight')}{part}"
            for name in changes
            if name.endswith(".weight")
            for part in ("scales", "biases")
        }
        kept = {name: header for name, header in base.headers.items() if name not in gone | packed}
        self.headers: Mapping[str, Header] = {**kept, **{name: item.header for name, item in changes.items()}}

    def read(self, name: str) -> mx.array:
        """The tensor `name`; raises `CheckpointError` where there is none."""
        if name in self._changes:
            return self._changes[name].read()
        if name not in self.headers:
            raise CheckpointError(f"no tensor {quoted(name)}")
        return self._base.read(name)
