"""The input of one forward pass, besides weights and caches."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


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
