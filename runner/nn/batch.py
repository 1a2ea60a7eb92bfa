"""What one forward pass is given besides weights and caches."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Batch:
    """One forward pass: ids `[B, L]`, the position of the first of them, and who sees whom.

    `length` is the length of the whole prompt that this pass is a chunk of (RoPE variants that stretch with the length
    of the sequence must see all chunks alike); None where the pass is the whole. `mask` None is causal.
    """

    ids: mx.array
    offset: int | mx.array = 0
    length: int | None = None
    mask: mx.array | None = None
