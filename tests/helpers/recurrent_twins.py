"""Naive float64 (NumPy) twins of short convolutions, recurrences and gated norms, and inputs for them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from twins import numpy, rand

from runner.ops.delta_rule import Gates

Inputs = tuple[mx.array, mx.array, mx.array, Gates, mx.array]


def wide(*arrays: mx.array) -> list[Any]:
    return [numpy(array).astype(np.float64) for array in arrays]


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def conv(x: mx.array, rows: mx.array, weight: mx.array, bias: mx.array | None, activation: str | None) -> Any:
    """One output after the other."""
    both = np.concatenate(wide(rows, x), axis=1)
    taps, w = weight.shape[0], numpy(weight)
    out = np.stack([sum(both[:, t + i] * w[i] for i in range(taps)) for t in range(x.shape[1])], axis=1)
    out = out if bias is None else out + numpy(bias)
    return out if activation is None else silu(out)


def delta_inputs(
    seed: int,
    *,
    batch: int = 1,
    length: int = 5,
    heads: tuple[int, int] = (2, 4),
    sizes: tuple[int, int] = (16, 24),
    dtype: mx.Dtype = mx.float32,
    channels: bool = False,
) -> Inputs:
    """Queries, keys, values, gates and a state; `heads` are those of keys and values, `sizes` dk and dv."""
    (few, many), (dk, dv) = heads, sizes
    q, k = (rand(batch, length, few, dk, seed=seed + i, dtype=dtype) for i in (0, 1))
    v = rand(batch, length, many, dv, seed=seed + 2, dtype=dtype)
    each = (dk,) if channels else ()
    gates = Gates(
        rand(batch, length, many, *each, seed=seed + 3, dtype=dtype),
        rand(batch, length, many, seed=seed + 4, dtype=dtype),
        rand(many, seed=seed + 5) - 1,
        rand(many, *each, seed=seed + 6),
    )
    return q, k, v, gates, rand(batch, many, dv, dk, seed=seed + 7)


def delta(q: mx.array, k: mx.array, v: mx.array, gates: Gates, state: mx.array) -> Any:
    """The gated delta rule, one token after the other: outputs and the last state."""
    q, k, v, a, b, a_log, bias, s = wide(q, k, v, *gates, state)
    a_log = a_log if a.ndim == 3 else a_log[:, None]
    decay = np.exp(-np.exp(a_log) * np.log1p(np.exp(a + bias)))
    decay = decay[..., None, None] if a.ndim == 3 else decay[..., None, :]
    q, k = (np.repeat(x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6), v.shape[2] // x.shape[2], 2) for x in (q, k))
    out = np.zeros(v.shape)
    for t in range(v.shape[1]):
        s = s * decay[:, t]
        said = np.einsum("bhvk,bhk->bhv", s, k[:, t])
        s = s + ((v[:, t] - said) / (1 + np.exp(-b[:, t]))[..., None])[..., None] * k[:, t][:, :, None]
        out[:, t] = np.einsum("bhvk,bhk->bhv", s, q[:, t]) / q.shape[-1] ** 0.5
    return out, s


def gated_norm(x: mx.array, gate: mx.array, weight: mx.array, eps: float, groups: int, gate_first: bool) -> Any:
    line, by = wide(x, gate)
    by, shape = silu(by), x.shape
    parts = (line * by if gate_first else line).reshape(*shape[:-1], groups, -1)
    normed = parts / np.sqrt(np.mean(parts**2, axis=-1, keepdims=True) + eps)
    factor = numpy(weight) if weight.shape[0] == shape[-1] else np.tile(numpy(weight), groups)
    normed = normed.reshape(shape) * factor
    return normed if gate_first else normed * by
