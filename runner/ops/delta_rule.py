"""The gated delta rule as MLX ops: token by token, in chunks that are products of matrices, or by MLX's own op.

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
    q, k, wide, forgotten, beta = _repeated(*_prepared(fused, q, k, v, gates))
    decay = mx.exp(forgotten)
    # Over the two axes of the state; one for all channels, or one for each channel of the key.
    decay = decay[..., None, None] if decay.ndim == 3 else decay[..., None, :]
    outputs = []
    for t in range(v.shape[1]):
        state, column = fused(decayed, state, decay[:, t]), k[:, t, :, :, None]
        difference = fused(learned, wide[:, t, :, :, None], state @ column, beta[:, t, :, None, None])
        state = fused(moved, state, difference, k[:, t, :, None])
        outputs.append((state @ q[:, t, :, :, None])[..., 0])
    return mx.stack(outputs, axis=1).astype(v.dtype), state


CHUNK = 64
"""Tokens that are taken together: their products with each other grow with its square."""


def in_chunks(fused: Fused, q: mx.array, k: mx.array, v: mx.array, gates: Gates, state: mx.array) -> Recurrence:
    """`Ops.gated_delta` by products of matrices within chunks, between which only states go on.

    What the tokens of a chunk learn depends on each other through a triangular system, which is solved for all chunks
    at once (the WY form of arXiv:2406.06484).
    """
    length = v.shape[1]
    if length == 1 or gates.a.ndim == 4:
        return token_by_token(fused, q, k, v, gates, state)
    # A token of zeros learns nothing and forgets nothing, so the last chunk can be filled up with some.
    parts = _repeated(*_prepared(fused, q, k, v, gates))
    q, k, wide, forgotten, beta = (_chunked(part) for part in parts)  # [B, H, chunks, C, ..]
    # How much is left of each token when a later one comes. What is forgotten in between is summed up for each pair, as
    # the difference of two long sums would have lost its last digits.
    later = mx.tril(mx.ones((CHUNK, CHUNK), dtype=mx.bool_), -1)
    between = mx.cumsum(mx.where(later, forgotten[..., None], 0), axis=-2)
    left = mx.exp(mx.where(mx.tril(mx.ones((CHUNK, CHUNK), dtype=mx.bool_)), between, -mx.inf))
    since = mx.exp(mx.cumsum(forgotten, axis=-1))[..., None]  # of the state before the chunk
    learning = k * beta[..., None]
    system = mx.where(later, (learning @ k.swapaxes(-1, -2)) * left, 0)
    solved = unit_lower_inverse(system) @ mx.concatenate([wide * beta[..., None], learning * since], axis=-1)
    values, keys = mx.split(solved, [wide.shape[-1]], axis=-1)
    seen = (q @ k.swapaxes(-1, -2)) * left
    asking, kept = q * since, k * left[..., -1, :, None]
    outputs = []
    for chunk in range(q.shape[2]):
        turned = state.swapaxes(-1, -2)
        new = values[:, :, chunk] - keys[:, :, chunk] @ turned
        outputs.append(asking[:, :, chunk] @ turned + seen[:, :, chunk] @ new)
        state = state * since[:, :, chunk, -1:] + new.swapaxes(-1, -2) @ kept[:, :, chunk]
    whole = mx.concatenate(outputs, axis=2)[:, :, :length]
    return whole.swapaxes(1, 2).astype(v.dtype), state


def unit_lower_inverse(lower: mx.array) -> mx.array:
    """The inverse of I + `lower` `[.., n, n]`, which is zero on and above the diagonal; n is a power of two.

    Blocks on the diagonal are inverted two by two into ones of twice the size, which is as exact as substitution.
    Powers of the matrix would be fewer steps, but grow large where keys repeat.
    """
    count = lower.shape[-1]
    inverse = mx.ones((*lower.shape[:-1], 1, 1))  # [.., blocks, size, size]
    while (size := inverse.shape[-1]) < count:
        pairs = count // (2 * size)
        blocks = lower.reshape(*lower.shape[:-2], pairs, 2 * size, pairs, 2 * size)
        below = mx.moveaxis(mx.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)[..., size:, :size]
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        joint = -(second @ below @ first)
        above = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        inverse = mx.concatenate([above, mx.concatenate([joint, second], axis=-1)], axis=-2)
    return inverse[..., 0, :, :]


def _chunked(part: mx.array) -> mx.array:
    """`[B, L, H, ..]` as `[B, H, chunks, CHUNK, ..]`, filled up with zeros."""
    rest = -part.shape[1] % CHUNK
    if rest:
        part = mx.pad(part, [(0, 0), (0, rest)] + [(0, 0)] * (part.ndim - 2))
    turned = part.swapaxes(1, 2)
    return turned.reshape(*turned.shape[:2], -1, CHUNK, *turned.shape[3:])


def by_mlx(fused: Fused, q: mx.array, k: mx.array, v: mx.array, gates: Gates, state: mx.array) -> Recurrence:
    """`Ops.gated_delta` by MLX's op, which has kernels for whole chunks; it rounds its inputs to the dtype of q."""
    if gates.a.ndim == 4:
        return token_by_token(fused, q, k, v, gates, state)
    q, k, wide, forgotten, beta = _prepared(fused, q, k, v, gates)
    outputs, state = mx.fast.gated_delta_update(q, k, wide, mx.exp(forgotten), beta, state)
    return outputs.astype(v.dtype), state


def _prepared(
    fused: Fused, q: mx.array, k: mx.array, v: mx.array, gates: Gates
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
    """Queries and keys of length one (queries then by 1 / sqrt(dk)), values, the logarithms of what is left, and what
    share is learned, all in float32."""
    size = q.shape[-1]
    # The mean of squares that `rms_norm` takes is the sum over the size.
    q = mx.fast.rms_norm(q.astype(mx.float32), None, NORM_EPS / size) * (1 / size)
    k = mx.fast.rms_norm(k.astype(mx.float32), None, NORM_EPS / size) * size**-0.5
    forgotten = fused(forgetting, gates.a, gates.a_log if gates.a.ndim == 3 else gates.a_log[:, None], gates.dt_bias)
    return q, k, v.astype(mx.float32), forgotten, mx.sigmoid(gates.b.astype(mx.float32))


def _repeated(
    q: mx.array, k: mx.array, v: mx.array, forgotten: mx.array, beta: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
    """Queries and keys once for each value head that they serve."""
    heads = v.shape[2] // k.shape[2]
    return (q, k, v, forgotten, beta) if heads == 1 else (
        mx.repeat(q, heads, axis=2), mx.repeat(k, heads, axis=2), v, forgotten, beta,
    )  # fmt: skip


def forgetting(a: mx.array, a_log: mx.array, dt_bias: mx.array) -> mx.array:
    """The logarithm of what of the state is left: -exp(a_log) * softplus(a + dt_bias), at most 0."""
    wide = a.astype(mx.float32) + dt_bias.astype(mx.float32)
    return -mx.exp(a_log.astype(mx.float32)) * mx.logaddexp(wide, mx.zeros_like(wide))


def decayed(state: mx.array, decay: mx.array) -> mx.array:
    """The state after it has decayed."""
    return state * decay


def learned(value: mx.array, said: mx.array, beta: mx.array) -> mx.array:
    """What of the difference to the value is learned."""
    return (value - said) * beta


def moved(state: mx.array, difference: mx.array, key: mx.array) -> mx.array:
    """The state with the difference `[dv, 1]` added at the key `[1, dk]`."""
    return state + difference * key
