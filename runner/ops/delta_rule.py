"""The gated delta rule as MLX ops: token by token, or by MLX's own op for whole prompts.

A head's state S `[dv, dk]` maps keys to values. Each token first lets it decay, then moves what it says of the token's
key towards the token's value: with S' = decay * S, S = S' + beta * (v - S' k) k^T, and the output is S q. Sources:
Gated DeltaNet, arXiv:2412.06464, and `torch_recurrent_gated_delta_rule` in transformers. With a decay for each channel
of the key it is Kimi Delta Attention (arXiv:2510.26692).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

NORM_EPS = 1e-6
"""Added to the sum of squares of a query or a key before it is divided by the root."""


class Gates(NamedTuple):
    """What lets a state forget and learn, before its activations.

    Attributes:
        a: `[B, L, heads]`, or `[B, L, heads, dk]` for a decay of each channel.
        b: `[B, L, heads]`; its sigmoid is the share of the difference that is learned.
        a_log: `[heads]`, of which the decay is exp(-exp(a_log) * softplus(a + dt_bias)).
        dt_bias: `[heads]`, or `[heads, dk]`.
    """

    a: mx.array
    b: mx.array
    a_log: mx.array
    dt_bias: mx.array


Recurrence = tuple[mx.array, mx.array]
"""Outputs `[B, L, heads, dv]` in the dtype of the values, and the state after them `[B, heads, dv, dk]` in float32."""

Fused = Callable[..., mx.array]


def token_by_token(fused: Fused, q: mx.array, k: mx.array, v: mx.array, gates: Gates, state: mx.array) -> Recurrence:
    """`Ops.gated_delta`, one token after the other: the same numbers wherever a prompt is cut."""
    q, k, wide, decay, beta = _prepared(fused, q, k, v, gates)
    heads = v.shape[2] // k.shape[2]
    q, k = mx.repeat(q, heads, axis=2), mx.repeat(k, heads, axis=2)
    # Over the two axes of the state; one for all channels, or one for each channel of the key.
    decay = decay[..., None, None] if decay.ndim == 3 else decay[..., None, :]
    outputs = []
    for t in range(v.shape[1]):
        state, column = fused(decayed, state, decay[:, t]), k[:, t, :, :, None]
        difference = fused(learned, wide[:, t, :, :, None], state @ column, beta[:, t, :, None, None])
        state = fused(moved, state, difference, k[:, t, :, None])
        outputs.append((state @ q[:, t, :, :, None])[..., 0])
    return mx.stack(outputs, axis=1).astype(v.dtype), state


def by_mlx(fused: Fused, q: mx.array, k: mx.array, v: mx.array, gates: Gates, state: mx.array) -> Recurrence:
    """`Ops.gated_delta` by MLX's op, which has kernels for whole chunks; it rounds its inputs to the dtype of q."""
    if gates.a.ndim == 4:
        return token_by_token(fused, q, k, v, gates, state)
    q, k, wide, decay, beta = _prepared(fused, q, k, v, gates)
    outputs, state = mx.fast.gated_delta_update(q, k, wide, decay, beta, state)
    return outputs.astype(v.dtype), state


def _prepared(
    fused: Fused, q: mx.array, k: mx.array, v: mx.array, gates: Gates
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
    """Queries and keys of length one (queries then by 1 / sqrt(dk)), values, decays and learning rates, in float32."""
    size = q.shape[-1]
    # The mean of squares that `rms_norm` takes is the sum over the size.
    q = mx.fast.rms_norm(q.astype(mx.float32), None, NORM_EPS / size) * (1 / size)
    k = mx.fast.rms_norm(k.astype(mx.float32), None, NORM_EPS / size) * size**-0.5
    decay = fused(decays, gates.a, gates.a_log if gates.a.ndim == 3 else gates.a_log[:, None], gates.dt_bias)
    return q, k, v.astype(mx.float32), decay, mx.sigmoid(gates.b.astype(mx.float32))


def decays(a: mx.array, a_log: mx.array, dt_bias: mx.array) -> mx.array:
    """What of the state is left: exp(-exp(a_log) * softplus(a + dt_bias)), from 0 to 1."""
    wide = a.astype(mx.float32) + dt_bias.astype(mx.float32)
    return mx.exp(-mx.exp(a_log.astype(mx.float32)) * mx.logaddexp(wide, mx.zeros_like(wide)))


def decayed(state: mx.array, decay: mx.array) -> mx.array:
    """The state after it has decayed."""
    return state * decay


def learned(value: mx.array, said: mx.array, beta: mx.array) -> mx.array:
    """What of the difference to the value is learned."""
    return (value - said) * beta


def moved(state: mx.array, difference: mx.array, key: mx.array) -> mx.array:
    """The state with the difference `[dv, 1]` added at the key `[1, dk]`."""
    return state + difference * key
