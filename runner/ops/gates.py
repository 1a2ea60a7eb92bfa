"""Gates as MLX ops: what a recurrence, attention or an expert puts out, times an activation of its gate."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

Fused = Callable[..., mx.array]


def gated_norm(
    fused: Fused, x: mx.array, gate: mx.array, weight: mx.array, eps: float, groups: int, gate_first: bool
) -> mx.array:
    """`Ops.gated_norm`, computed in float32 and rounded once."""
    wide = fused(gated, x, gate) if gate_first else x.astype(mx.float32)
    parts = wide.reshape(*x.shape[:-1], groups, -1)
    shared = weight.shape[0] == parts.shape[-1]
    normed = mx.fast.rms_norm(parts, weight.astype(mx.float32) if shared else None, eps).reshape(x.shape)
    normed = normed if shared else normed * weight
    return (normed if gate_first else fused(gated, normed, gate)).astype(x.dtype)


def gated(x: mx.array, gate: mx.array) -> mx.array:
    """`x` times SiLU of `gate`, in float32."""
    wide = gate.astype(mx.float32)
    return x.astype(mx.float32) * (wide * mx.sigmoid(wide))


def opened(x: mx.array, gate: mx.array) -> mx.array:
    """`x` times the sigmoid of its gate."""
    return x * mx.sigmoid(gate)


def add_gated(routed: mx.array, gate: mx.array, shared: mx.array) -> mx.array:
    """`routed` plus `shared` times the sigmoid of its gate."""
    return routed + mx.sigmoid(gate) * shared


def clamped(gate: mx.array, up: mx.array, alpha: float, limit: float) -> mx.array:
    """`gate * sigmoid(alpha * gate) * (up + 1)`; gate is clamped from above, up on both sides."""
    gate, up = mx.minimum(gate, limit), mx.clip(up, -limit, limit)
    return gate * mx.sigmoid(alpha * gate) * (up + 1)
