"""RMS norms with a gate, as recurrent layers end with: normalized and then gated, or gated and then normalized."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from runner.nn.fast import provided_ops
from runner.ops.table import Ops
from runner.weights.module import Module
from runner.weights.tags import setting, tensor


@dataclass
class GatedRMSNorm(Module):
    """RMS norm of a recurrence's output, and its gate: `x` and `gate` `[..., C]` to the same shape.

    The last axis is normalized in `groups` equal parts, each by itself. Everything is computed in float32 and rounded
    once. Sources: `Qwen3NextRMSNormGated`, `Zamba2RMSNormGated` and `FalconH1RMSNormGated` in transformers.
    """

    weight: mx.array = tensor("weight", "$0")
    groups: int = setting("gated_norm_groups", default=1)
    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, gate: mx.array, eps: float) -> mx.array:
        raise NotImplementedError

    def normed(self, x: mx.array, eps: float) -> mx.array:
        """The norm of `x` `[..., C]` times the weight, in float32."""
        wide = x.astype(mx.float32)
        if self.groups == 1:
            return self.ops.rms_norm(wide, self.weight, eps)
        parts = self.ops.rms_norm(wide.reshape(*x.shape[:-1], self.groups, -1), None, eps)
        return parts.reshape(x.shape) * self.weight


@dataclass
class NormThenGate(GatedRMSNorm):
    """`norm(x) * weight * silu(gate)`."""

    def __call__(self, x: mx.array, gate: mx.array, eps: float) -> mx.array:
        return self.ops.fused(gated, self.normed(x, eps), gate).astype(x.dtype)


@dataclass
class GateThenNorm(GatedRMSNorm):
    """`norm(x * silu(gate)) * weight`."""

    def __call__(self, x: mx.array, gate: mx.array, eps: float) -> mx.array:
        return self.normed(self.ops.fused(gated, x, gate), eps).astype(x.dtype)


@dataclass
class Gate:
    """`x * silu(gate)`, rounded once; nothing is normalized, and no tensor read."""

    ops: Ops = provided_ops()

    def __call__(self, x: mx.array, gate: mx.array, eps: float) -> mx.array:
        return self.ops.fused(gated, x, gate).astype(x.dtype)


def gated(x: mx.array, gate: mx.array) -> mx.array:
    """`x` times SiLU of `gate`, in float32."""
    wide = gate.astype(mx.float32)
    return x.astype(mx.float32) * (wide * mx.sigmoid(wide))
