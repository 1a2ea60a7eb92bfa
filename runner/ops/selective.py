"""Mamba's recurrence as MLX ops: each channel has states of its own, with decays and steps of their own.

Source: arXiv:2312.00752, and `MambaMixer` in transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

Fused = Callable[..., mx.array]


class Selective(NamedTuple):
    """What the tokens say, and by what states are moved.

    Attributes:
        x: `[B, L, C]`.
        steps: `[B, L, C]`, before their softplus.
        b, c: `[B, L, N]`.
        rates: `[C, N]` float32, how fast each state forgets: -exp(A_log).
        skip: `[C]` float32, what of its input a channel passes on.
    """

    x: mx.array
    steps: mx.array
    b: mx.array
    c: mx.array
    rates: mx.array
    skip: mx.array


def token_by_token(fused: Fused, told: Selective, state: mx.array) -> tuple[mx.array, mx.array]:
    """`Ops.selective_scan`: the same numbers wherever a prompt is cut."""
    wide, step = told.x.astype(mx.float32), fused(softplus, told.steps)
    taken, outputs = step * wide, []
    b, c = told.b.astype(mx.float32), told.c.astype(mx.float32)
    for t in range(wide.shape[1]):
        state = fused(moved, state, step[:, t, :, None], told.rates, taken[:, t, :, None], b[:, t, None])
        outputs.append((state @ c[:, t, :, None])[..., 0])
    return mx.stack(outputs, axis=1) + wide * told.skip, state


def softplus(x: mx.array) -> mx.array:
    """The logarithm of 1 + e to the `x`, in float32."""
    wide = x.astype(mx.float32)
    return mx.logaddexp(wide, mx.zeros_like(wide))


def moved(state: mx.array, step: mx.array, rates: mx.array, taken: mx.array, b: mx.array) -> mx.array:
    """The states `[C, N]` after a token of steps `[C, 1]`, inputs `[C, 1]` times these, and b `[1, N]`."""
    return state * mx.exp(step * rates) + taken * b
