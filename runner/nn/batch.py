"""The input of one forward pass, besides weights and caches."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Ids `[B, L]`, the position of the first of them, and the attention mask of one forward pass.

    `offset` is a number, or `[B]` with one for each row. `length` is the length of the whole prompt if this pass is one
    chunk of it (RoPE variants that depend on the sequence length must see the same length in all chunks), else None.
    `mask` None means causal.
    """

    ids: mx.array
    offset: int | mx.array = 0
    length: int | None = None
    mask: mx.array | None = None
    _shared: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made for the first layer that asks for `name` and shared by the later ones of this pass.

        `name` must hold all that the result depends on besides the batch itself.
        """
        if name not in self._shared:
            self._shared[name] = make()
        found: T = self._shared[name]
        return found
