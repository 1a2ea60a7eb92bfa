"""Mamba 2's recurrence as MLX ops: token by token, or in chunks whose inner part is products of matrices.

A head's state S `[P, N]` decays with each token and takes in what the token says: with the step
`dt = softplus(dt + dt_bias)`, S = exp(-exp(A_log) dt) S + dt x B^T, and the output is S C + D x. B and C `[N]` are
shared by the heads of a group (arXiv:2405.21060; `mamba2_chunk_scan` in transformers). All is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

CHUNK = 64
"""Tokens that are taken together: their products with each other grow with its square."""

Fused = Callable[..., mx.array]

Scanned = tuple[mx.array, mx.array]
"""Outputs `[B, L, H * P]` in the dtype of the inputs, and the state after them `[B, H, P, N]` in float32."""


class Dynamics(NamedTuple):
    """What stays the same from token to token.

    Attributes:
        a_log: `[H]`, the logarithm of how fast each head forgets.
        d: `[H]`, what of its input a head passes on.
        dt_bias: `[H]`, added to the steps before their softplus.
        groups: how many groups of heads share their B and C.
        limits: the least and the greatest step.
    """

    a_log: mx.array
    d: mx.array
    dt_bias: mx.array
    groups: int
    limits: tuple[float, float]


class Inputs(NamedTuple):
    """What the tokens say, in float32, the H heads as G groups of R.

    Attributes:
        x: `[B, L, G, R, P]`, and `taken`, the same times the steps.
        b, c: `[B, L, G, 1, N]`.
        forgotten: `[B, L, G, R]`, the logarithm of what is left of the state; at most 0.
    """

    x: mx.array
    taken: mx.array
    b: mx.array
    c: mx.array
    forgotten: mx.array


def token_by_token(fused: Fused, mixed: mx.array, dt: mx.array, dynamics: Dynamics, state: mx.array) -> Scanned:
    """`Ops.state_space`, one token after the other: the same numbers wherever a prompt is cut."""
    inputs = _inputs(fused, mixed, dt, dynamics, state)
    left = mx.exp(inputs.forgotten)[..., None, None]
    grouped = state.reshape(*left.shape[:1], *left.shape[2:4], *state.shape[2:])
    outputs = []
    for t in range(mixed.shape[1]):
        grouped = fused(moved, grouped, left[:, t], inputs.taken[:, t, ..., None], inputs.b[:, t, ..., None, :])
        outputs.append(grouped @ inputs.c[:, t, ..., None])
    return _passed_on(fused, mx.stack(outputs, axis=1), inputs, mixed, dynamics), grouped.reshape(state.shape)


def in_chunks(fused: Fused, mixed: mx.array, dt: mx.array, dynamics: Dynamics, state: mx.array) -> Scanned:
    """`Ops.state_space` by products of matrices within chunks, between which only states go on."""
    length = mixed.shape[1]
    if length == 1:
        return token_by_token(fused, mixed, dt, dynamics, state)
    inputs = _inputs(fused, mixed, dt, dynamics, state)
    size = min(CHUNK, length)
    # A token of zeros takes in nothing and forgets nothing, so the last chunk can be filled up with some.
    taken, b, c = _chunked(inputs.taken, size), _chunked(inputs.b, size), _chunked(inputs.c, size)
    forgotten = _chunked(inputs.forgotten[..., None], size)[..., 0]
    # Within a chunk: each token sees itself and the earlier ones by how much is left of them. What is forgotten between
    # two tokens is summed up for each pair, as the difference of two long sums would have lost its last digits.
    later = mx.tril(mx.ones((size, size), dtype=mx.bool_), -1)
    between = mx.cumsum(mx.where(later, forgotten[..., None], 0), axis=-2)
    left = mx.exp(mx.where(mx.tril(mx.ones((size, size), dtype=mx.bool_)), between, -mx.inf))
    outputs = ((c @ b.swapaxes(-1, -2)) * left) @ taken
    # What each chunk adds to the state, and how much of the state before it is left behind it.
    added = (taken * left[..., -1, :, None]).swapaxes(-1, -2) @ b
    since = mx.exp(mx.cumsum(forgotten, axis=-1))[..., None]
    kept = since[..., -1:, :]
    grouped = state.reshape(*added.shape[:1], *added.shape[2:])
    before = []
    for chunk in range(added.shape[1]):
        before.append(grouped)
        grouped = fused(carried, grouped, kept[:, chunk], added[:, chunk])
    earlier = c @ mx.stack(before, axis=1).swapaxes(-1, -2)
    outputs = fused(joined, outputs, earlier, since)
    # [B, K, G, R, S, P] -> [B, L, G, R, P]
    outputs = outputs.transpose(0, 1, 4, 2, 3, 5).flatten(1, 2)[:, :length]
    return _passed_on(fused, outputs, inputs, mixed, dynamics), grouped.reshape(state.shape)


def each_token(scan: Callable[..., Scanned], mixed: mx.array, dt: mx.array, *rest: object) -> Scanned:
    """`Ops.state_space`, but with the states behind each of the tokens, `[L, B, H, P, N]`."""
    *dynamics, state = rest
    outputs, states = [], []
    for t in range(mixed.shape[1]):
        output, state = scan(mixed[:, t : t + 1], dt[:, t : t + 1], *dynamics, state)
        outputs.append(output)
        states.append(state)
    return mx.concatenate(outputs, axis=1), mx.stack(states)


def _inputs(fused: Fused, mixed: mx.array, dt: mx.array, dynamics: Dynamics, state: mx.array) -> Inputs:
    batch, length, _ = mixed.shape
    _, heads, size, numbers = state.shape
    groups = dynamics.groups
    wide = mixed.astype(mx.float32)
    x, b, c = mx.split(wide, [heads * size, heads * size + groups * numbers], axis=-1)
    x = x.reshape(batch, length, groups, -1, size)
    low, high = dynamics.limits
    step = fused(steps, dt, dynamics.dt_bias)
    if low > 0 or high < float("inf"):
        step = mx.clip(step, low, high)
    forgotten = fused(forgetting, step, dynamics.a_log)
    step, forgotten = (part.reshape(batch, length, groups, -1) for part in (step, forgotten))
    b, c = (part.reshape(batch, length, groups, 1, numbers) for part in (b, c))
    return Inputs(x, x * step[..., None], b, c, forgotten)


def _chunked(part: mx.array, size: int) -> mx.array:
    """`[B, L, G, R, numbers]` as `[B, K, G, R, S, numbers]`, K chunks of S tokens."""
    rest = -part.shape[1] % size
    if rest:
        part = mx.pad(part, [(0, 0), (0, rest), (0, 0), (0, 0), (0, 0)])
    return part.reshape(part.shape[0], -1, size, *part.shape[2:]).transpose(0, 1, 3, 4, 2, 5)


def _passed_on(fused: Fused, outputs: mx.array, inputs: Inputs, mixed: mx.array, dynamics: Dynamics) -> mx.array:
    """Outputs of the states in any shape of `[B, L, ..]`, plus D times the inputs, as `[B, L, H * P]`."""
    x = inputs.x
    skipped = dynamics.d.astype(mx.float32).reshape(x.shape[2], x.shape[3], 1)
    return fused(added_to, outputs.reshape(x.shape), x, skipped).flatten(2).astype(mixed.dtype)


def steps(dt: mx.array, dt_bias: mx.array) -> mx.array:
    """softplus(dt + dt_bias), the logarithm of 1 + e to that."""
    wide = dt.astype(mx.float32) + dt_bias.astype(mx.float32)
    return mx.logaddexp(wide, mx.zeros_like(wide))


def forgetting(step: mx.array, a_log: mx.array) -> mx.array:
    """The logarithm of what a step leaves of the state."""
    return -step * mx.exp(a_log.astype(mx.float32))


def moved(state: mx.array, left: mx.array, x: mx.array, b: mx.array) -> mx.array:
    """The state `[P, N]` after a token with inputs x `[P, 1]` and b `[1, N]`, of which `left` is left."""
    return state * left + x * b


def carried(state: mx.array, kept: mx.array, added: mx.array) -> mx.array:
    """The state behind a chunk, from that before it."""
    return state * kept + added


def joined(outputs: mx.array, earlier: mx.array, left: mx.array) -> mx.array:
    """A chunk's outputs: of its own tokens, and of the state before it as far as it is left."""
    return outputs + earlier * left


def added_to(outputs: mx.array, x: mx.array, d: mx.array) -> mx.array:
    """Outputs plus what passes the state by."""
    return outputs + x * d
